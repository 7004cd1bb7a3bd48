"""What of a lock file goes into an image, for the interpreter of the image and not for ours."""

import re

import pytest

from skerry.image.base import Python
from skerry.image.build import LOCKS, lock_of
from skerry.image.engine import ImageError
from skerry.image.lock import requirements_for
from skerry.image.sbom import Package, packages_of, system_of

LOCK = """\
# made by a program
numpy==2.4.6 ; python_full_version < '3.12' \\
    --hash=sha256:aa \\
    --hash=sha256:bb
    # via onnxruntime
numpy==2.5.5 ; python_full_version >= '3.12' \\
    --hash=sha256:cc
colorama==0.4.6 ; sys_platform == 'win32' \\
    --hash=sha256:dd
"""


def python(version: str) -> Python:
    return Python(version, "x86_64", "glibc", "cpython")


def names(text: str) -> list[str]:
    return [line.partition("==")[0] for line in text.splitlines()]


@pytest.mark.parametrize(
    ("version", "line"),
    [("3.11.2", "numpy==2.4.6 --hash=sha256:aa --hash=sha256:bb"), ("3.13.0", "numpy==2.5.5 --hash=sha256:cc")],
)
def test_a_marker_is_judged_by_the_python_of_the_image(version, line):
    assert requirements_for(LOCK, python(version)).splitlines() == [line]


@pytest.mark.parametrize("accelerator", LOCKS)
@pytest.mark.parametrize("version", ["3.11.2", "3.12.9", "3.13.1"])
def test_a_worker_gets_one_onnxruntime_numpy_and_msgspec_each_with_its_hashes(accelerator, version):
    chosen = requirements_for(lock_of(accelerator).read_text(), python(version))
    found = names(chosen)
    assert len(set(found)) == len(found)
    runtime = {"cpu": "onnxruntime", "cuda": "onnxruntime-gpu"}[accelerator]
    assert {name for name in found if name.startswith("onnxruntime")} == {runtime}
    assert {"numpy", "msgspec"} <= set(found)
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+( --hash=sha256:[0-9a-f]{64})+", line) for line in chosen.splitlines())


def test_a_line_that_is_no_requirement_is_named():
    with pytest.raises(ImageError, match="one two"):
        requirements_for("one two\n", python("3.11.2"))


def test_packages_that_were_removed_are_not_listed():
    status = (
        "Package: libc6\nStatus: install ok installed\nArchitecture: amd64\nVersion: 2.36-9\nDescription: words\n Version: 9\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n\nStatus: install ok installed\n"
    )
    assert packages_of(status) == [Package("libc6", "2.36-9", "amd64")]


def test_a_system_says_its_name_and_version():
    assert system_of('ID=debian\nVERSION_ID="12"\nNAME="Debian GNU/Linux"\n') == ("debian", "12")
    assert system_of("") == ("", "")
