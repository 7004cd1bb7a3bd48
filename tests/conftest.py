"""Shared fixtures, and the closing report of what was not run."""

import os
import subprocess
from pathlib import Path

import onnx
import onnx.helper as oh
import pytest

from skerry.runtime import unix_socket

_absent: dict[str, str] = {}


def need(component: str, reason: str, *, is_optional: bool = False) -> None:
    """Skip where ``component`` is absent (``reason`` is not empty); under SKERRY_REQUIRE=all absence is a failure, unless no landing gate
    can be expected to have it."""
    if not reason:
        return
    if not is_optional and os.environ.get("SKERRY_REQUIRE") == "all":
        pytest.fail(f"SKERRY_REQUIRE=all and {component} is absent: {reason}")
    _absent[component] = reason
    pytest.skip(f"{component}: {reason}")


def unreachable(path: Path) -> str:
    """Why nobody can be reached at a Unix socket; empty where somebody listens. Docker's client would leave a socket open finding out."""
    reason = unix_socket.unreachable(path, within_s=5)
    return f"{path}: {reason}" if reason else ""


def pytest_terminal_summary(terminalreporter) -> None:
    for component, reason in sorted(_absent.items()):
        terminalreporter.write_line(f"not run: {component}: {reason}")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of half a megabyte."""
    need("root", "" if os.geteuid() == 0 else "mounting a small disk needs root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(tmp_path)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    need("root", mounted.stderr.strip())
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def fill(folder) -> None:
    """Leave not one byte."""
    block = bytes(1 << 20)
    with (folder / "filler").open("wb", buffering=0) as file:
        while block:
            try:
                file.write(block)
            except OSError:
                block = block[: len(block) // 2 if len(block) > 256 else 0]


def scaling(factor: float) -> onnx.ModelProto:
    """y = factor x for x of shape [N, 3]."""
    graph = oh.make_graph(
        [oh.make_node("Mul", ["x", "factor"], ["y"])],
        "scale",
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 3])],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 3])],
        [oh.make_tensor("factor", onnx.TensorProto.FLOAT, [1], [factor])],
    )
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=9)


@pytest.fixture(scope="session")
def scale_model(tmp_path_factory) -> Path:
    """y = 2 x for x of shape [N, 3]."""
    path = tmp_path_factory.mktemp("model") / "scale.onnx"
    onnx.save(scaling(2.0), path)
    return path
