"""The demo's processes: a broker, a signer, a coordinator and four boxes of three programs each, below one directory."""

import asyncio
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import msgspec

from skerry.demo.uplink import Uplink
from skerry.wire.messages import Tier

MARK = "skerry-demo"
"""A file of this name says that the directory is a demo's and may be emptied."""
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 12.0
FLEET = "demo"
_PR_SET_PDEATHSIG = 1
UID_FIRST, UIDS_PER_BOX = 1_879_100_000, 1000
"""Boxes that share a machine must not share the user ids of their sandboxes."""


class DemoFailed(Exception):
    """The fleet could not be brought up or did not do what it should; the text says what, and where to look."""


class Box(msgspec.Struct):
    """One box: where its things are, and how to reach it."""

    name: str
    tier: Tier
    labels: dict[str, str]
    folder: Path
    gateway_url: str
    uplink: Uplink
    broker_port: int
    proxy_port: int

    @property
    def gateway_socket(self) -> Path:
        """The socket of the box's own programs."""
        return self.folder / "gateway.sock"


class Fleet:
    """Starts and ends everything. ``env`` is the file that other shells can source."""

    def __init__(self, folder: Path, *, broker_kind: str = "auto", drivers: list[str] | None = None, warm_most: int = 0) -> None:
        self.folder = folder.resolve()
        self.env = self.folder / "env"
        self.logs = self.folder / "logs"
        self._broker_kind = broker_kind
        self._drivers = drivers or ["docker", "bubblewrap"]
        self._warm_most = warm_most
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._commands: dict[str, list[str]] = {}
        self.boxes: list[Box] = []
        self.broker_port = 0
        self.url = ""
        self.token = ""

    # -- set-up

    def prepare(self) -> None:
        """Make the directory, end what an earlier demo left in it, and write every program's settings. Raises DemoFailed."""
        if self.folder.exists() and any(self.folder.iterdir()) and not (self.folder / MARK).exists():
            raise DemoFailed(f"{self.folder} is not empty and not a demo's: name another directory with DIR=")
        self.folder.mkdir(parents=True, exist_ok=True)
        if len(str(self.folder)) > 60:
            raise DemoFailed(f"{self.folder}: the path is too long for Unix sockets below it: name a shorter one with DIR=")
        for name in ("boxes", "coordinator", "signer", "broker", "logs"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / MARK).touch()
        self.logs.mkdir()
        ports = free_ports(2 + 4 * 3)
        self.broker_port, coordinator_port = ports[:2]
        self.url = f"http://127.0.0.1:{coordinator_port}"
        self._commands["broker"] = _python(
            "skerry.demo.broker", "--port", str(self.broker_port), "--dir", str(self.folder / "broker"), "--kind", self._broker_kind
        )
        signer = self.folder / "signer"
        signer.mkdir()
        (signer / "signer.toml").write_text(f'fleet = "{FLEET}"\nstate_dir = "{signer}"\nsocket = "{signer}/signer.sock"\n')
        self._commands["signer"] = _python("coordinator.signer", "--config", str(signer / "signer.toml"))
        config = self.folder / "coordinator" / "coordinator.toml"
        config.parent.mkdir()
        config.write_text(
            f'fleet = "{FLEET}"\nstate_dir = "{config.parent}"\nlisten = "127.0.0.1:{coordinator_port}"\npublic_url = "{self.url}"\n'
            f'rollup_s = 1\nsigner_socket = "{signer}/signer.sock"\n[broker]\nhost = "127.0.0.1"\nport = {self.broker_port}\n'
        )
        self._commands["coordinator"] = _python("coordinator", "--config", str(config))
        sites: list[tuple[str, Tier, dict[str, str]]] = [
            ("store-1", "edge", {"site": "store-1", "region": "north"}),
            ("store-2", "edge", {"site": "store-2", "region": "north"}),
            ("van-7", "edge", {"site": "van-7", "region": "road"}),
            ("cloud-1", "cloud", {"region": "eu-1"}),
        ]
        for index, (name, tier, labels) in enumerate(sites):
            self._prepare_box(name, tier, labels, ports[2 + 3 * index : 5 + 3 * index])

    def _prepare_box(self, name: str, tier: Tier, labels: dict[str, str], ports: list[int]) -> None:
        gateway_port, broker_port, proxy_port = ports
        folder = self.folder / "boxes" / name
        folder.mkdir(parents=True)
        uplink = Uplink(broker_port=self.broker_port, door_port=broker_port, proxy_port=proxy_port)
        url = f"http://127.0.0.1:{gateway_port}"
        self.boxes.append(Box(name, tier, labels, folder, url, uplink, broker_port, proxy_port))
        labels_text = ", ".join(f'{key} = "{value}"' for key, value in labels.items())
        settings = {
            "agent": f"""fleet = "{FLEET}"\nnode = "{name}"\ntier = "{tier}"\nlabels = {{ {labels_text} }}
state_dir = "{folder}/agent"\nwarden_socket = "{folder}/warden.sock"\ngateway_socket = "{folder}/gateway.sock"
gateway_url = "{url}"\nsample_every_s = 0.5\nwill_delay_s = 2\nreconnect_most_s = 3
[broker]\nhost = "127.0.0.1"\nport = {broker_port}\nkeepalive_s = 4
[coordinator]\nurl = "{self.url}"\ntoken_file = "{self.folder}/coordinator/box.token"\nproxy = "http://127.0.0.1:{proxy_port}"\n""",
            "warden": f"""fleet = "{FLEET}"\nnode = "{name}"\nstate_dir = "{folder}/warden"\nsocket = "{folder}/warden.sock"
incoming_dir = "{folder}/agent/incoming"\nroutes_file = "{folder}/routes.json"
trusted_keys_file = "{self.folder}/signer/signing.pub"\ndrivers = {json.dumps(self._drivers)}
docker_socket = "{docker_socket()}"\ndrain_s = 0.5\nwarm_most = {self._warm_most}
uid_first = {UID_FIRST + UIDS_PER_BOX * len(self.boxes)}\n""",
            "gateway": f"""node = "{name}"\ntier = "{tier}"\nlisten = "127.0.0.1:{gateway_port}"\nsocket = "{folder}/gateway.sock"
routes_file = "{folder}/routes.json"\nupstream_proxy = "http://127.0.0.1:{proxy_port}"\n""",
        }
        for program, text in settings.items():
            (folder / f"{program}.toml").write_text(text)
        for program, module in (("warden", "warden"), ("gateway", "gateway"), ("agent", "link")):
            self._commands[f"{name}.{program}"] = _python(f"edge_agent.{module}", "--config", str(folder / f"{program}.toml"))

    # -- processes

    async def start(self) -> None:
        """Bring everything up. Raises DemoFailed."""
        await self.start_process("broker")
        await self._wait_for("broker", "127.0.0.1", self.broker_port)
        await self.start_process("signer")
        await self.start_process("coordinator")
        await self._wait_for("signer", path=self.folder / "signer" / "signer.sock")
        await self._wait_for("coordinator", "127.0.0.1", int(self.url.rpartition(":")[2]))
        self.token = (self.folder / "coordinator" / "operator.token").read_text().strip()
        descriptor = os.open(self.env, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(f"export SKERRY_URL={self.url}\nexport SKERRY_TOKEN={self.token}\n")
        for box in self.boxes:
            await box.uplink.start()
        await asyncio.gather(*(self.start_process(name) for name in self._commands if "." in name))

    async def start_process(self, name: str) -> None:
        """Start one program; its words go to ``logs/NAME.log``."""
        with (self.logs / f"{name}.log").open("ab") as log:
            self._processes[name] = await asyncio.create_subprocess_exec(
                *self._commands[name],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_parent,
                start_new_session=True,
            )

    async def _wait_for(self, name: str, host: str = "", port: int = 0, *, path: Path | None = None) -> None:
        """Until it listens on a port, or on a Unix socket. Raises DemoFailed."""
        log = self.logs / f"{name}.log"
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._processes[name].returncode is not None:
                last = (log.read_text(errors="replace").strip().splitlines() or ["without a word"])[-1]
                raise DemoFailed(f"{name} ended at once: {last[:300]} (see {log})")
            with contextlib.suppress(OSError):
                _, writer = await (asyncio.open_unix_connection(str(path)) if path else asyncio.open_connection(host, port))
                writer.close()
                return
            await asyncio.sleep(0.05)
        raise DemoFailed(f"{name} does not listen on {path or port} after {START_TIMEOUT_S:.0f} s: see {log}")

    def names(self) -> list[str]:
        """Every program's name: broker, signer, coordinator, BOX.agent, BOX.warden, BOX.gateway."""
        return list(self._commands)

    def pid(self, name: str) -> int:
        """The process id of a program."""
        return self._processes[name].pid

    def dead(self) -> list[str]:
        """Programs that ended although nobody asked them to."""
        return [name for name, process in self._processes.items() if process.returncode is not None]

    async def kill(self, name: str) -> None:
        """``kill -9``."""
        process = self._processes[name]
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        await process.wait()

    async def stop(self) -> list[str]:
        """End everything, sandboxes included; returns what would not end by itself."""
        stubborn = []
        for kind in (".agent", ".gateway", ".warden", "coordinator", "signer", "broker"):
            group = {name: process for name, process in self._processes.items() if name.endswith(kind) and process.returncode is None}
            for process in group.values():
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)
            for name, process in group.items():
                try:
                    await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
                except TimeoutError:
                    stubborn.append(name)
                    process.kill()
                    await process.wait()
        self._processes.clear()
        for box in self.boxes:
            await box.uplink.stop()
        await self.purge()
        return stubborn

    async def purge(self) -> None:
        """End every sandbox of every box in the directory, an earlier demo's included."""
        configs = sorted(self.folder.glob("boxes/*/warden.toml"))
        processes = [
            await asyncio.create_subprocess_exec(
                *_python("edge_agent.warden.purge", "--config", str(config)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
            )
            for config in configs
        ]
        for process in processes:
            try:
                await asyncio.wait_for(process.wait(), START_TIMEOUT_S)
            except TimeoutError:
                process.kill()

    def left_behind(self) -> list[str]:
        """Processes whose command line, and mounts whose path, name the directory: empty after a clean end."""
        return left_behind(self.folder)


def left_behind(folder: Path) -> list[str]:
    """Processes, but for this one, and mounts that name ``folder``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in (os.getpid(), os.getppid()):
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if f"{folder}/" in command or f"{folder}/" in (entry / "mountinfo").read_text():
                    found.append(f"process {entry.name}: {command[:120]}")
    found += [f"mount {line.split()[1]}" for line in Path("/proc/mounts").read_text().splitlines() if f"{folder}/" in line]
    return found


def docker_socket() -> str:
    """The container engine's socket, as Docker's own client finds it, for engines on this machine."""
    host = os.environ.get("DOCKER_HOST", "")
    return os.environ.get("SKERRY_DOCKER_SOCKET") or (
        host.removeprefix("unix://") if host.startswith("unix://") else "/var/run/docker.sock"
    )


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _die_with_parent() -> None:
    """Runs in the child: a demo that is killed takes its programs along."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now; held open together so that they differ."""
    holders = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [holder.getsockname()[1] for holder in holders]
    for holder in holders:
        holder.close()
    return ports
