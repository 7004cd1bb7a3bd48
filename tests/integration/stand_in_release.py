"""Releases whose programs do as they are told: real files, links, environments and processes, and a service manager that is a script."""

import base64
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from skerry.release import archive
from skerry.wire import model_signature
from skerry.wire.messages import Software

PROGRAMS = ("skerry-warden", "skerry-agent", "skerry-gateway")

STAND_IN = """
import json, os, pathlib, socket, sys, time

VERSION, NATURE = {version!r}, {nature!r}


def _is(what, name):
    return NATURE.get(what) == name


def _run(name):
    if "--check" in sys.argv:
        sys.exit("these settings are not for me" if _is("refuses", name) else 0)
    folder = pathlib.Path(os.environ["STAND_IN"])
    if _is("ends", name):
        time.sleep(0.05)
        sys.exit(1)
    if name == "skerry-agent" and not _is("unheard", name):
        (folder / "heard.new").write_text(json.dumps({{"version": VERSION, "pid": os.getpid()}}))
        (folder / "heard.new").rename(folder / "heard.json")
    if name == "skerry-gateway":
        _serve(folder)
    time.sleep(1e6)


def _serve(folder):
    listener = socket.socket(socket.AF_UNIX)
    (folder / "gateway.sock").unlink(missing_ok=True)
    listener.bind(str(folder / "gateway.sock"))
    listener.listen()
    body = json.dumps({{"waiting_for": ["lost", "d"] if _is("loses", "d") else ["lost"]}}).encode()
    while True:
        caller, _ = listener.accept()
        caller.recv(65536)
        caller.sendall(b"HTTP/1.1 503 x\\r\\nContent-Length: %d\\r\\nConnection: close\\r\\n\\r\\n" % len(body) + body)
        caller.close()


def skerry():
    print("skerry", VERSION)


def agent():
    _run("skerry-agent")


def warden():
    _run("skerry-warden")


def gateway():
    _run("skerry-gateway")


def updater():
    _run("skerry-updater")
"""

SYSTEMCTL = '''#!{python}
"""As systemctl, for programs below {folder}: starts what `current` names, and again what ended."""
import json, os, pathlib, signal, subprocess, sys

FOLDER = pathlib.Path({folder!r})
STATE = FOLDER / "manager.json"
UNITS = {units!r}


def runs(pid):
    try:
        return pid and pathlib.Path(f"/proc/{{pid}}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def start(unit):
    return subprocess.Popen([FOLDER / "root/current/bin" / unit], env={{"STAND_IN": str(FOLDER), "PATH": "/usr/bin:/bin"}},
                            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True).pid


def kill(pid):
    if runs(pid):
        os.kill(pid, signal.SIGKILL)


def main(verb, *words):
    held = json.loads(STATE.read_text()) if STATE.exists() else {{unit: [0, 0] for unit in UNITS}}
    units = [word.removesuffix(".service") for word in words if not word.startswith("-")]
    if verb == "show":
        for unit in units:
            if not runs(held[unit][0]):
                held[unit] = [start(unit), held[unit][1] + 1]
            print(f"Id={{unit}}.service\\nActiveState=active\\nMainPID={{held[unit][0]}}\\nNRestarts={{held[unit][1]}}\\n")
    elif verb in ("restart", "boot", "off"):
        for unit in units or UNITS:
            kill(held[unit][0])
            held[unit] = [0 if verb == "off" else start(unit), 0]
    STATE.with_suffix(".new").write_text(json.dumps(held))
    STATE.with_suffix(".new").rename(STATE)
    with (FOLDER / "called").open("a") as file:
        file.write(" ".join([verb, *units]) + "\\n")


main(*sys.argv[1:])
'''


class Site:
    """A box's disk, as far as releases go. ``key`` vouches for them."""

    def __init__(self, folder: Path, key: EllipticCurvePrivateKey) -> None:
        self.folder, self.key = folder, key
        for name in ("root", "settings", "units", "made"):
            (folder / name).mkdir()
        self.systemctl = folder / "systemctl"
        self.systemctl.write_text(SYSTEMCTL.format(python=sys.executable, folder=str(folder), units=list(PROGRAMS)))
        self.systemctl.chmod(0o755)

    def manage(self, verb: str) -> None:
        subprocess.run([self.systemctl, verb], check=True, timeout=30)

    @property
    def running(self) -> dict[str, str]:
        """By program, the release that its process was started from; empty for one that does not run."""
        held = json.loads((self.folder / "manager.json").read_text())
        return {unit: self._version(pid) for unit, (pid, _) in held.items()}

    @staticmethod
    def _version(pid: int) -> str:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"/")
        except OSError:
            return ""
        return words[words.index(b"root") + 1].decode() if b"root" in words else ""

    @property
    def links(self) -> dict[str, str]:
        found = {}
        for name in ("current", "previous", "proven"):
            path = self.folder / "root" / name
            if path.is_symlink():
                found[name] = str(path.readlink())
        return found

    def end(self) -> None:
        """Whatever was started."""
        held = json.loads((self.folder / "manager.json").read_text()) if (self.folder / "manager.json").exists() else {}
        for pid, _ in held.values():
            if pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def release(self, version: str, *, gateway: str = "1", unit: str = "as ever", **nature: str) -> tuple[Software, Path]:
        """A release in a file, and what the coordinator would say of it. ``gateway`` is the data plane's code."""
        wheels = self.folder / f"wheels-{version}"
        wheels.mkdir()
        _wheel(wheels, "skerry", version, _files(version, nature, gateway, unit))
        library = _wheel(wheels, "library", "1.0", {"library.py": ""})
        digest = hashlib.sha256(library.read_bytes()).hexdigest()
        (wheels / "lock.txt").write_text(f"library==1.0 --hash=sha256:{digest}\n")
        path = self.folder / "made" / f"{version}.tar"
        archive.build(wheels, wheels / "lock.txt", path)
        return self.software(version, path), path

    def software(self, version: str, path: Path, *, key: EllipticCurvePrivateKey | None = None) -> Software:
        """As it is told of, by ``key`` if not by the site's own."""
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        signature = model_signature.sign({model_signature.release_path(version): sha256}, key or self.key, title="skerry")
        return Software(version, sha256, path.stat().st_size, signature)


def _files(version: str, nature: dict[str, str], gateway: str, unit: str) -> dict[str, str]:
    scripts = ["skerry", "agent", "warden", "gateway", "updater"]
    entries = "\n".join(f"{'' if name == 'skerry' else 'skerry-'}{name} = stand_in:{name}" for name in scripts)
    data = f"skerry-{version}.data/data/share/skerry/systemd"
    return {
        "stand_in.py": STAND_IN.format(version=version, nature=nature),
        "edge_agent/__init__.py": "", "edge_agent/gateway/__init__.py": f"CODE = {gateway!r}\n", "edge_agent/worker/__init__.py": "",
        "edge_agent/worker/ahead.py": f"def prepare():\n    assert {nature.get('computes', 'yes') == 'yes'}, 'no runtime'\n",
        f"{data}/skerry-warden.service": f"# {unit}\n",
        f"{data}/skerry-gateway.service": "# the same\n",
        f"{data}/skerry-new.service": "# nobody installed it\n",
        f"skerry-{version}.dist-info/entry_points.txt": f"[console_scripts]\n{entries}\n",
    }  # fmt: skip


def _wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> Path:
    info = f"{name}-{version}.dist-info"
    about = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},sha256={_record_hash(text)},{len(text.encode())}\n" for path, text in [*files.items(), *about.items()])
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in [*files.items(), *about.items(), (f"{info}/RECORD", f"{record}{info}/RECORD,,\n")]:
            archive.writestr(path, text)
    return wheel


def _record_hash(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
