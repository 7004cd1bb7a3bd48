"""One box of a chaos run: a network, a disk, a clock, memory and a boot of its own, and the three programs on it."""

import asyncio
import ctypes
import errno
import fcntl
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import uuid
from pathlib import Path

from skerry.demo.broker import find_mosquitto
from skerry.runtime import durable
from tests.chaos.supervisor import Program
from tests.chaos.wire import Wire, run, tap
from tests.conftest import fill

DISK_MIB = 160
EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2
FIFREEZE, FITHAW = 0xC0045877, 0xC0045878
MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")
BOX_GROUPS = next((path for path in (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")) if (path / "cgroup.procs").exists()), Path())
"""Of version 2, where a box with all its processes can be ended at once; wardens make no groups there beside version 1."""
CLOCK = Path(__file__).parent / "clock"
PROGRAMS = {"warden": "edge_agent.warden", "gateway": "edge_agent.gateway", "agent": "edge_agent.link"}
HOG = """
import time
held = []
while True:
    if len(held) < 300: held.append(bytearray(b"x") * 2**20)
    time.sleep(0.01)
"""
GATEWAY_PORT = 8000
BROKER_PORT, COORDINATOR_PORT = 1883, 8080
CENTRE = "10.78.0.1"


def absent() -> str:
    """Why no box can be made here; empty where one can."""
    if os.geteuid() != 0:
        return "making network namespaces and disks needs root"
    for path in (Path("/dev/net/tun"), Path("/dev/loop-control"), MEMORY_GROUPS / "memory.limit_in_bytes", BOX_GROUPS / "cgroup.procs"):
        if not path.exists():
            return f"{path} is not there"
    programs = ("bwrap", "ip", "mkfs.ext4", "losetup", "e2fsck", "nsenter", "unshare")
    missing = [name for name in programs if not shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")]
    missing += [] if find_mosquitto() else ["mosquitto"]
    return f"not installed: {', '.join(missing)}" if missing else ""


class Machine:
    """``folder`` holds all of it: ``disk`` (a file system of its own), ``run`` (what a boot begins without), ``log``, its settings."""

    def __init__(self, name: str, tier: str, labels: dict[str, str], folder: Path, *, index: int, fleet: str, centre: Path) -> None:
        self.name = name
        self.tier = tier
        self.labels = labels
        self.folder = folder
        self.address = f"10.78.0.{11 + index}"
        self.url = f"http://{self.address}:{GATEWAY_PORT}"
        self.disk = folder / "disk"
        self.programs: dict[str, Program] = {}
        self.boots = 0
        self._index = index
        self._fleet = fleet
        self._centre = centre
        self._image = folder / "disk.img"
        self._memory = MEMORY_GROUPS / f"chaos-{os.getpid()}-{name}"
        self._group = BOX_GROUPS / f"chaos-{os.getpid()}-{name}"
        self._holder: subprocess.Popen[bytes] | None = None
        self._loop_device = ""
        self.wire: Wire

    # -- from nothing, and back to it

    def make(self, bridge: str, *, seed: int) -> None:
        """Network, disk and settings; nothing runs yet. Inside a running loop."""
        for folder in (self.disk, self.folder / "run", self.folder / "log", self.folder / "settings"):
            folder.mkdir(parents=True)
        self._memory.mkdir()
        self._group.mkdir()
        self._holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        while Path(f"/proc/{self._holder.pid}/ns/net").readlink() == Path("/proc/self/ns/net").readlink():
            os.sched_yield()
        far_name = f"to{self._index}"
        self.wire = Wire(tap("up0", self._holder.pid), tap(far_name, os.getpid()), seed=seed)
        run("ip", "link", "set", far_name, "master", bridge, "up")
        inside = ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net", "ip"]
        run(*inside, "link", "set", "lo", "up")
        run(*inside, "addr", "add", f"{self.address}/24", "dev", "up0")
        run(*inside, "link", "set", "up0", "up")
        self.wire.start()
        with self._image.open("wb") as image:
            image.truncate(DISK_MIB * 2**20)
        run("mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(self._image))
        self._mount()
        self.set_clock(0.0)
        self._settings()

    @property
    def network(self) -> int:
        """The process whose network it is."""
        assert self._holder is not None
        return self._holder.pid

    async def destroy(self) -> list[str]:
        """End all of it; what would not end, or was left."""
        wrong = [f"{self.name}.{part} had to be killed" for part, program in self.programs.items() if not await program.end()]
        purge = self._program("purge", [sys.executable, "-m", "edge_agent.warden.purge", "--config", f"{self.folder}/settings/warden.toml"])
        await purge.once(within_s=30.0)
        wrong += [f"{self.name}: left {_command(pid)[:100]!r}" for pid in self._pids()]
        self._kill_all()
        wrong += [f"{self.name}: left {path}" for path in MEMORY_GROUPS.glob(f"skerry*{self._fleet}*{self.name}*/*") if path.is_dir()]
        self.wire.close()
        if self._holder is not None:
            self._holder.kill()
            self._holder.wait()
        self._unmount()
        self._memory.rmdir()
        self._group.rmdir()
        return wrong

    def _settings(self) -> None:
        disk, runtime, settings = self.disk, self.folder / "run", self.folder / "settings"
        labels = ", ".join(f'{key} = "{value}"' for key, value in self.labels.items())
        texts = {
            "agent": f"""fleet = "{self._fleet}"\nnode = "{self.name}"\ntier = "{self.tier}"\nlabels = {{ {labels} }}
state_dir = "{disk}/agent"\nwarden_socket = "{runtime}/warden.sock"\ngateway_socket = "{runtime}/gateway.sock"
gateway_url = "{self.url}"\nsample_every_s = 1.0\nwill_delay_s = 1\nreconnect_most_s = 3
[broker]\nhost = "{CENTRE}"\nport = {BROKER_PORT}\nkeepalive_s = 2
[coordinator]\nurl = "http://{CENTRE}:{COORDINATOR_PORT}"\ntoken_file = "{self._centre}/coordinator/box.token"\n""",
            "warden": f"""fleet = "{self._fleet}"\nnode = "{self.name}"\nstate_dir = "{disk}/warden"\nsocket = "{runtime}/warden.sock"
incoming_dir = "{disk}/agent/incoming"\nroutes_file = "{runtime}/routes.json"
trusted_keys_file = "{self._centre}/signer/signing.pub"\ndrivers = ["bubblewrap"]\ndrain_s = 0.5\nwarm_most = 1
disk_reserve_bytes = 1048576\norphan_grace_s = 5.0\nrestart_most_s = 4.0\ncrash_loop_after = 1000
uid_first = {1_879_200_000 + 1000 * self._index}\n""",
            "gateway": f"""node = "{self.name}"\ntier = "{self.tier}"\nlisten = "{self.address}:{GATEWAY_PORT}"
socket = "{runtime}/gateway.sock"\nroutes_file = "{runtime}/routes.json"\n""",
        }
        for program, text in texts.items():
            (settings / f"{program}.toml").write_text(text)

    # -- power

    async def boot(self) -> None:
        """Start the programs, as a machine does that was off."""
        self.boots += 1
        (self.folder / "boot_id").write_text(f"{uuid.uuid4()}\n")
        shutil.rmtree(self.folder / "run")
        (self.folder / "run").mkdir()
        for part, module in PROGRAMS.items():
            self.programs[part] = self._program(part, [sys.executable, "-m", module, "--config", f"{self.folder}/settings/{part}.toml"])
            await self.programs[part].start()

    async def power_off(self) -> None:
        """Every process is gone at once, and of the disk what was never synced."""
        for program in self.programs.values():
            program.is_held = True
        self._kill_all()
        await asyncio.gather(*(program.end(signal.SIGKILL) for program in self.programs.values()))
        self._shut_down_disk()
        self._unmount()
        self._mount()

    def _kill_all(self) -> None:
        (self._group / "cgroup.kill").write_text("1")
        deadline = time.monotonic() + 10.0
        while self._pids():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name}: processes that can't be killed: {[_command(pid) for pid in self._pids()]}")
            time.sleep(0.01)

    def _pids(self) -> list[int]:
        return [int(line) for line in (self._group / "cgroup.procs").read_text().split()]

    def _program(self, part: str, command: list[str]) -> Program:
        prefix = ["nsenter", f"--net=/proc/{self.network}/ns/net", "unshare", "--mount", "--propagation", "slave", "sh", "-c"]
        script = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'
        env = {**os.environ, "PYTHONPATH": str(CLOCK), "CHAOS_CLOCK": str(self.folder / "clock")}
        argv = [*prefix, script, str(self.folder / "boot_id"), *command]
        return Program(f"{self.name}.{part}", argv, log=self.folder / "log" / f"{part}.log", sockets=self.folder, env=env, into=self._join)

    def _join(self) -> None:
        for group in (self._memory, self._group):
            with (group / "cgroup.procs").open("w") as file:
                file.write(str(os.getpid()))

    # -- clock, disk, memory, processes

    def set_clock(self, offset_s: float) -> None:
        """From now on the box takes the time to be so much later."""
        path = self.folder / "clock"
        with path.open("r+b" if path.exists() else "wb") as file:  # in place: the programs have it mapped
            file.write(struct.pack("q", int(offset_s * 1e9)))

    def _mount(self) -> None:
        found = subprocess.run(["losetup", "--find", "--show", str(self._image)], capture_output=True, text=True, check=True, timeout=30)
        self._loop_device = found.stdout.strip()
        if self.boots:
            subprocess.run(["e2fsck", "-p", self._loop_device], capture_output=True, timeout=60, check=False)
        run("mount", "-o", "errors=remount-ro,noatime", self._loop_device, str(self.disk))

    def _unmount(self) -> None:
        run("umount", "--lazy", str(self.disk))
        run("losetup", "--detach", self._loop_device)
        held = Path(f"/sys/fs/ext4/{Path(self._loop_device).name}")
        deadline = time.monotonic() + 5.0
        while held.exists():  # else the same disk would be mounted twice
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.disk}: somebody still holds it")
            time.sleep(0.01)

    def _shut_down_disk(self) -> None:
        self._tell_disk(EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH)

    def _tell_disk(self, request: int, value: int = 0) -> None:
        descriptor = os.open(self.disk, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(descriptor, request, ctypes.c_uint32(value))
        finally:
            os.close(descriptor)

    def stick_disk(self) -> None:
        """From now on whoever writes to it waits, and can't even be killed, until ``free_stuck_disk``."""
        self._tell_disk(FIFREEZE)

    def free_stuck_disk(self) -> None:
        """It goes on."""
        self._tell_disk(FITHAW)

    def fill_disk(self) -> None:
        """Leave not one byte."""
        fill(self.disk)

    def free_disk(self) -> None:
        """Take it back."""
        (self.disk / "filler").unlink(missing_ok=True)
        durable.sync_directory(self.disk)  # else a power cut soon after would fill it for good

    def break_disk(self) -> None:
        """The file system meets an error and turns read-only, as its mount options say, until the next boot."""
        Path(f"/sys/fs/ext4/{Path(self._loop_device).name}/trigger_fs_error").write_text("chaos\n")
        try:
            (self.disk / "written").touch()
        except OSError as exc:
            if exc.errno == errno.EROFS:
                return
        raise RuntimeError(f"{self.disk} can still be written to")

    def squeeze(self) -> subprocess.Popen[bytes]:
        """Somebody eats the box's memory: the kernel ends what is largest, until that is the eater. ``relax`` ends it."""
        used = int((self._memory / "memory.usage_in_bytes").read_text())
        (self._memory / "memory.limit_in_bytes").write_text(str(used + 48 * 2**20))
        groups = [str(group / "cgroup.procs") for group in (self._memory, self._group)]
        script = 'echo $$ > "$0" && echo $$ > "$1" && shift && exec "$@"'
        return subprocess.Popen(["sh", "-c", script, *groups, sys.executable, "-c", HOG])

    def relax(self, eater: subprocess.Popen[bytes]) -> None:
        """See ``squeeze``."""
        (self._memory / "memory.limit_in_bytes").write_text("-1")
        eater.kill()
        eater.wait()

    def pid_of(self, part: str, *, which: int) -> int:
        """The process that is meant; 0 where it does not run now."""
        if part != "worker":
            return self.programs[part].pid
        workers = sorted(pid for pid in self._pids() if b"edge_agent.worker" in _command(pid) and _is_inside(pid))
        return workers[which % len(workers)] if workers else 0

    def sandboxes(self) -> list[str]:
        """Replicas that sandboxes on it are made for; a sandbox that is held ready is none's."""
        found = []
        for path in self.disk.glob("warden/sandboxes/*/slot.json"):
            try:
                replica = json.loads(path.read_text()).get("replica")
            except (OSError, ValueError) as exc:  # replaced just now, or not whole: the warden has to end the latter
                found.append(f"{path.parent.name}: {exc}")
            else:
                found += [replica["name"]] if replica else []
        return sorted(found)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _is_inside(pid: int) -> bool:
    """Whether it is in a process namespace of its own: a sandbox's, and not the program that makes it."""
    try:
        return len(Path(f"/proc/{pid}/status").read_text().partition("NSpid:")[2].splitlines()[0].split()) > 1
    except OSError:
        return False
