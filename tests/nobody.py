"""Programs run as an ordinary user, whoever runs the tests."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import msgspec

from tests.conftest import need

NOBODY = 65534
ROOT = Path(__file__).parents[1]


def _drop() -> list[str]:
    """By way of env: setpriv itself starts its program while it still may look anywhere."""
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "env"] if os.geteuid() == 0 else []


def environment(folder: Path) -> dict[str, str]:
    site_packages = Path(msgspec.__file__).parents[1]
    return {"PATH": os.defpath, "PYTHONPATH": f"{ROOT}:{site_packages}", "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(folder)}


@functools.cache
def interpreter() -> tuple[str, str]:
    """One that an ordinary user may run and that can load what is installed here; and what each said that may not."""
    said = []
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            tried = subprocess.run(
                [*_drop(), python, "-c", "import msgspec, edge_agent"],
                capture_output=True,
                text=True,
                check=False,
                env=environment(Path("/tmp")),
                timeout=30,
            )
        except OSError as exc:
            said.append(str(exc))
            continue
        if tried.returncode == 0:
            return python, ""
        said.append(f"{python}: {tried.stderr.strip().splitlines()[-1:]}")
    return "", "; ".join(said)


def run_as_nobody(program: str, *arguments: str | Path, folder: Path, timeout_s: float = 60) -> str:
    """What ``program`` wrote to standard output; it must end well. ``folder`` becomes the ordinary user's."""
    python, reason = interpreter()
    need("an interpreter for an ordinary user", reason)
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
        for parent in folder.parents:
            if not parent.stat().st_mode & 0o001:
                parent.chmod(parent.stat().st_mode | 0o011)  # pytest makes its folders for one user alone
    ran = subprocess.run(
        [*_drop(), python, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment(folder),
        cwd="/",
        timeout=timeout_s,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout
