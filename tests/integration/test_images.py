"""Images built, saved and loaded on a real engine: the worker's, and a model server that is not ours."""

import contextlib
import io
import json
import os
import shutil
import tarfile
import time
import uuid
from pathlib import Path

import docker
import msgspec
import numpy as np
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from typer.testing import CliRunner

from skerry.cli.main import app
from skerry.image.build import lock_of
from skerry.image.engine import Engine, ImageError
from skerry.wire import oip
from tests.conftest import need
from tests.contract.test_drivers import docker_socket
from tests.integration.test_worker import Client

pytestmark = pytest.mark.timeout(400)  # the first test that needs it makes a Debian
X = oip.Tensor("x", "FP32", (1, 3), np.array([[1, 2, 3]], "<f4").tobytes())


def absence() -> str:
    try:
        Engine(docker_socket()).id_of("nothing:at-all")
    except ImageError as exc:
        return str(exc)
    return ""


@pytest.fixture(scope="module")
def client():
    need("docker", absence())
    with contextlib.closing(docker.APIClient(f"unix://{docker_socket()}")) as client:
        yield client


@pytest.fixture(scope="module")
def can_make_a_base(client):
    need("root", "" if os.geteuid() == 0 else "debootstrap needs root")
    found = shutil.which("debootstrap", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    need("debootstrap", "" if found else "debootstrap is not installed")


def skerry(*words: str, fails_with: str = "") -> str:
    """What a command wrote; its exit status agrees with ``fails_with``, a word that its error must hold."""
    outcome = CliRunner().invoke(app, [*words, "--docker-socket", str(docker_socket())])
    assert (outcome.exit_code != 0) == bool(fails_with), outcome.output
    assert fails_with in outcome.output
    return outcome.stdout


class Image(msgspec.Struct, frozen=True):
    """What ``skerry image build --json`` says."""

    id: str
    tag: str
    base: str
    python: str
    archive: str
    sbom: str


@pytest.fixture(scope="module")
def worker_image(can_make_a_base, client, tmp_path_factory):
    folder = tmp_path_factory.mktemp("image")
    tag = f"skerry-test-{uuid.uuid4().hex[:8]}:1"
    written = ["--save", str(folder / "worker.tar"), "--sbom", str(folder / "worker.cdx.json")]
    yield msgspec.json.decode(skerry("image", "build", "--json", "--tag", tag, *written), type=Image)
    client.remove_image(tag, force=True)


@contextlib.contextmanager
def running(client, image: str, folder: Path, model: Path):
    """A worker of ``image`` with nothing but what a sandbox gives it; its socket."""
    folder.chmod(0o777)
    host = client.create_host_config(
        network_mode="none",
        read_only=True,
        cap_drop=["ALL"],
        security_opt=["no-new-privileges:true"],
        binds=[f"{model}:/model/model.onnx:ro", f"{folder}:/run/skerry"],
    )
    made = client.create_container(image, ["--model", "/model/model.onnx", "--socket", "/run/skerry/worker.sock"], host_config=host)
    try:
        client.start(made["Id"])
        deadline = time.monotonic() + 30
        while not (folder / "worker.sock").exists():
            state = client.inspect_container(made["Id"])["State"]
            assert state["Running"], client.logs(made["Id"]).decode()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield folder / "worker.sock"
    finally:
        client.remove_container(made["Id"], force=True)


def test_an_image_that_was_built_serves_a_model_without_a_shell_a_network_or_a_writable_root(worker_image, client, tmp_path, scale_model):
    inspected = client.inspect_image(worker_image.id)
    assert inspected["Config"]["User"] == "65534:65534"
    assert inspected["Config"]["Entrypoint"] == ["python3", "-m", "edge_agent.worker"]
    with running(client, worker_image.id, tmp_path, scale_model) as path, contextlib.closing(Client(path)) as worker:
        answer, body = worker.call([X])
        assert answer.error == ""
        assert np.frombuffer(body, "<f4").tolist() == [2.0, 4.0, 6.0]


def test_an_archive_that_is_loaded_elsewhere_gives_the_id_that_was_pinned(worker_image, client):
    client.remove_image(worker_image.tag, force=True)
    assert Engine(docker_socket()).id_of(worker_image.tag) == ""
    loaded = json.loads(skerry("image", "load", worker_image.archive, "--json"))
    assert loaded == [{"id": worker_image.id, "name": worker_image.tag}]


def test_the_same_libraries_and_code_are_the_same_image_again(worker_image):
    again = msgspec.json.decode(skerry("image", "build", "--json", "--tag", worker_image.tag), type=Image)
    assert again.id == worker_image.id


def test_the_bill_of_materials_is_valid_and_names_wheels_by_their_locked_digest_and_debians_packages(worker_image):
    text = Path(worker_image.sbom).read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    subject = bill["metadata"]["component"]
    assert (subject["type"], subject["hashes"]) == ("container", [{"alg": "SHA-256", "content": worker_image.id.removeprefix("sha256:")}])
    parts = {part["name"]: part for part in bill["components"]}
    lock = lock_of("cpu").read_text()
    for name in ("onnxruntime", "numpy", "msgspec"):
        assert parts[name]["purl"] == f"pkg:pypi/{name}@{parts[name]['version']}"
        assert f"--hash=sha256:{parts[name]['hashes'][0]['content']}" in lock
    assert parts["libc6"]["purl"].startswith("pkg:deb/debian/libc6@2.")
    assert "distro=debian-12" in parts["libc6"]["purl"]


@pytest.fixture
def empty_image(client):
    """An image without an interpreter."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("nothing"))
    tag = f"skerry-test-empty-{uuid.uuid4().hex[:8]}"
    client.import_image_from_data(archive.getvalue(), tag, "1")
    yield f"{tag}:1"
    client.remove_image(f"{tag}:1", force=True)


def test_a_base_without_an_interpreter_is_refused_by_name(empty_image):
    skerry("image", "build", "--base", empty_image, fails_with="python3 can't be started")


def test_a_base_that_nobody_has_is_refused_by_name(client):
    skerry("image", "build", "--base", "localhost:1/nobody/has:this", fails_with="not on this engine, and it can't be pulled")


@pytest.mark.parametrize("base", ["debootstrap:../etc", "debootstrap:-x", "debootstrap:a b"])
def test_a_suite_that_is_no_name_is_refused(client, base):
    skerry("image", "build", "--base", base, fails_with="is not the name of a Debian suite")


def test_an_engine_that_is_not_there_is_named(tmp_path):
    outcome = CliRunner().invoke(app, ["image", "build", "--docker-socket", str(tmp_path / "none.sock")])
    assert outcome.exit_code == 1
    assert "no Docker Engine can be reached" in outcome.output
    assert "--docker-socket" in outcome.output


def test_a_gpu_image_wants_a_base_with_the_runtime():
    outcome = CliRunner().invoke(app, ["image", "build", "--accelerator", "cuda"])
    assert outcome.exit_code == 2
    assert "--base" in outcome.output


def test_a_file_that_is_no_archive_is_refused(client, tmp_path):
    (tmp_path / "no.tar").write_bytes(b"no archive")
    skerry("image", "load", str(tmp_path / "no.tar"), fails_with="error")
    skerry("image", "load", str(tmp_path / "absent.tar"), fails_with="absent.tar")
