"""What an operator has: releases, an inventory, Ansible, and a way to ask coordinator and boxes."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tests.boxes import root
from tests.boxes.machine import Ground, Machine

REPO = Path(__file__).resolve().parents[2]
ANSIBLE = REPO / "ansible"
SKERRY = Path(sysconfig.get_path("scripts")) / "skerry"
PLAY_WITHIN_S = 900
FLEET = "shops"
KEY = "releases.key"
"""Beside the releases: who vouches for them."""
# As in the collection's ansible.cfg, with less patience.
SSH_ARGUMENTS = "-o ControlMaster=auto -o ControlPersist=60s -o ConnectTimeout=3 -o ServerAliveInterval=2 -o ServerAliveCountMax=2"
REQUEST = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}], "parameters": {"timeout": 5_000_000}}
DEPLOYMENT = """
name: scale
model: scale:1
replicas: {per_node: 1}
resources: {memory: 256MiB}
slo: {deadline_ms: 5000}
"""


class Play(msgspec.Struct, frozen=True):
    """How a playbook ended: exit status, what it said, how long it took, and each host's counts (``ok``, ``changed``, ``failed`` ...)."""

    status: int
    text: str
    took_s: float
    recap: dict[str, dict[str, int]]


class Operator:
    """Sits on the boxes' network, with ssh and the fleet's inventory."""

    def __init__(self, ground: Ground, hub: Machine, boxes: list[Machine], folder: Path, releases: Path) -> None:
        self.ground, self.hub, self.boxes, self._folder, self.releases = ground, hub, boxes, folder, releases
        self.inventory = folder / "inventory.json"
        self.write_inventory()

    def write_inventory(self, **extra: Any) -> None:
        """``extra`` are variables of all boxes."""
        ssh = f"-i {self.ground.key} -o UserKnownHostsFile={self.ground.known_hosts}"
        names = {machine.name: {"ansible_host": machine.address} for machine in [self.hub, *self.boxes]}
        edge = {"hosts": {box.name: {"edge_agent_labels": {"site": "one"}} for box in self.boxes}, "vars": extra}
        common = {
            "ansible_user": "root", "ansible_ssh_common_args": ssh, "skerry_fleet": FLEET, "skerry_release_dir": str(self.releases),
            "skerry_broker_host": self.hub.name, "skerry_coordinator_url": f"https://{self.hub.name}:8443", "coordinator_soak": 2,
            "edge_agent_soak": 10, "edge_agent_least_requests": 20, "edge_agent_agent_settings": {"sample_every_s": 1},
            "skerry_waves": [1, "100%"], "skerry_release_keys": (self.releases / f"{KEY}.pub").read_text(),
            "edge_agent_updater_settings": {"observe_s": 8, "trial_s": 90},
        }  # fmt: skip
        groups = {"coordinator": {"hosts": {self.hub.name: {}}}, "broker": {"hosts": {self.hub.name: {}}}, "edge": edge}
        self.inventory.write_text(json.dumps({"all": {"hosts": names, "vars": common, "children": groups}}))

    def play(self, name: str, *options: str, version: str = "") -> Play:
        """Run a playbook of the collection."""
        program = Path(sysconfig.get_path("scripts")) / "ansible-playbook"
        words = [
            program,
            "-i",
            self.inventory,
            *(["-e", f"skerry_version={version}"] if version else []),
            *options,
            ANSIBLE / "playbooks" / f"{name}.yml",
        ]
        environment = {
            "PATH": f"{program.parent}:{os.environ['PATH']}", "HOME": str(self._folder), "LANG": "C.UTF-8", "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_CONFIG": str(ANSIBLE / "ansible.cfg"), "ANSIBLE_HOST_KEY_CHECKING": "True",
            "ANSIBLE_SSH_ARGS": SSH_ARGUMENTS,
        }  # fmt: skip
        began = time.monotonic()
        done = subprocess.run(
            self.ground.inside(*words), capture_output=True, text=True, timeout=PLAY_WITHIN_S, check=False, env=environment,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return Play(done.returncode, done.stdout + done.stderr, time.monotonic() - began, _recap(done.stdout))

    def api(self, method: str, path: str, body: bytes = b"", *, media: str = "application/json") -> Any:
        """Ask the coordinator as an operator; raises AssertionError with its answer."""
        token = (self.hub.root / "var/lib/skerry/coordinator/operator.token").read_text().strip()
        given = {"url": f"https://{self.hub.name}:8443{path}", "method": method, "token": token, "media": media,
                 "host": self.hub.address, "ca": str(self.hub.root / "var/lib/skerry/coordinator/ca/root.crt")}  # fmt: skip
        done = subprocess.run(
            self.ground.inside(sys.executable, Path(__file__).with_name("ask.py"), json.dumps(given)),
            capture_output=True, input=body, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr).decode()
        return json.loads(done.stdout) if done.stdout.strip() else None

    def deploy(self, model: bytes) -> None:
        """A model on every box, ready."""
        self.api("PUT", "/v1/models/scale/versions/1", model, media="application/octet-stream")
        self.api("POST", "/v1/deployments", DEPLOYMENT.encode(), media="application/yaml")
        self.until(lambda: self.ready() == len(self.boxes))

    def push(self, version: str) -> None:
        """Have a release in the coordinator's store, with its signature."""
        path = self.releases / f"skerry-{version}.tar"
        pushed = self.api("PUT", "/v1/releases", path.read_bytes(), media="application/octet-stream")
        self.api("PUT", f"/v1/releases/{pushed['sha256']}/signature", path.with_name(f"{path.name}.sig").read_bytes())

    def software(self) -> Any:
        """Which release the boxes are to run, and which they run."""
        return self.api("GET", "/v1/software")

    def roll_out(self, version: str, *, observe: str, waves: Sequence[int | str] = (1, "100%")) -> None:
        """Have every box run it."""
        rules = {"waves": list(waves), "observe": observe, "deadline": "5m"}
        self.api("PUT", "/v1/software", json.dumps({"version": version, "rollout": rules}).encode())

    def ready(self) -> int:
        """Replicas of the deployment that are."""
        return int(self.api("GET", "/v1/deployments/scale")["ready"])

    def until(self, happened: Callable[[], bool], within_s: float = 60.0) -> None:
        """Wait."""
        deadline = time.monotonic() + within_s
        while not happened():
            assert time.monotonic() < deadline, json.dumps(self.api("GET", "/v1/deployments"))[:3000]
            time.sleep(0.5)


class Load:
    """Callers of every box, for as long as the block lasts; ``answered``, ``failed`` and ``slowest_ms`` after it."""

    def __init__(self, ground: Ground, boxes: list[Machine], *, per_s: float = 10.0, deployment: str = "scale") -> None:
        given = {"boxes": [box.address for box in boxes], "path": f"/v2/models/{deployment}/infer", "body": REQUEST, "per_s": per_s}
        self._words = ground.inside(sys.executable, Path(__file__).with_name("load.py"), json.dumps(given))
        self.answered: dict[str, int] = {}
        self.failed: list[str] = []
        self.slowest_ms = 0.0

    def __enter__(self) -> "Load":
        self._process = subprocess.Popen(self._words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        found = json.loads(self._process.communicate(timeout=60)[0])
        self.answered, self.failed, self.slowest_ms = found["answered"], found["failed"], found["slowest_ms"]


def _recap(text: str) -> dict[str, dict[str, int]]:
    found = {}
    for line in text.partition("PLAY RECAP")[2].splitlines():
        name, separator, counts = line.partition(" : ")
        if separator:
            found[name.strip()] = {key: int(value) for key, _, value in (word.partition("=") for word in counts.split())}
    return found


def fetch_wheels(folder: Path) -> None:
    """Those of the lock file, for the boxes' Python."""
    fetch = [SKERRY, "release", "fetch", "--requirements", REPO / "requirements/box.txt", "--wheels", folder]
    subprocess.run([*fetch, "--python", root.PYTHONS[root.suite()]], check=True, capture_output=True, timeout=600)


def release(version: str, folder: Path, wheels: Path, **patches: str) -> Path:
    """Make a release of this checkout under another version, and sign it; ``patches`` are changes of modules, as OLD=>NEW."""
    tree = folder / f"tree-{version}"
    shutil.copytree(
        REPO,
        tree,
        ignore=shutil.ignore_patterns(".*", "build", "tests", "bench", "docs", "shared", "*.onnx", "__pycache__", "node_modules"),
    )
    shutil.copy(REPO / "edge_agent/worker/small.onnx", tree / "edge_agent/worker/small.onnx")
    for path, old in (("pyproject.toml", 'version = "{}"'), ("skerry/__init__.py", '__version__ = "{}"')):
        file = tree / path
        ours = _version()
        file.write_text(file.read_text().replace(old.format(ours), old.format(version)))
    for module, change in patches.items():
        file = tree / f"{module.replace('__', '/')}.py"
        old, _, new = change.partition("=>")
        text = file.read_text()
        assert old in text, f"{file} has no {old!r}"
        file.write_text(text.replace(old, new, 1))
    made = folder / f"wheels-{version}"
    shutil.copytree(wheels, made)
    for own in made.glob("skerry-*.whl"):
        own.unlink()
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-qqq",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        made,
        tree,
    ]
    subprocess.run(pip, check=True, timeout=300)
    out = folder / f"skerry-{version}.tar"
    words = [SKERRY, "release", "build", "--wheels", made, "--requirements", REPO / "requirements/box.txt", "--out", out]
    subprocess.run([*words, "--python", root.PYTHONS[root.suite()]], check=True, timeout=300, capture_output=True)
    key = folder / KEY
    if not key.exists():
        subprocess.run([SKERRY, "release", "keygen", "--key", key], check=True, timeout=60, capture_output=True)
    subprocess.run([SKERRY, "release", "sign", out, "--key", key], check=True, timeout=60, capture_output=True)
    shutil.rmtree(tree)
    shutil.rmtree(made)
    return out


def _version() -> str:
    from skerry import __version__

    return __version__
