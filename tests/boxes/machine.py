"""Boxes on a network of their own that has no way out: booted, stopped, cut off, and deprived of power."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TypeAlias

Done: TypeAlias = "subprocess.CompletedProcess[str]"

NETWORK = "skerry-boxes"
PREFIX = "10.78.0"
RESOLVED = Path("/etc/netns") / NETWORK
"""Where `ip netns exec` finds what is to stand in /etc."""
BOOTED_WITHIN_S = 60.0
STOPPED_WITHIN_S = 30.0
COMMAND_WITHIN_S = 60.0
# Whoever enters a box brings the capabilities of this machine along, and its clock is this machine's.
DROPPED = "--bounding-set=-sys_time,-sys_module,-sys_rawio,-syslog,-wake_alarm,-mac_admin,-mac_override"


def run(*words: str | Path, check: bool = True, within_s: float = COMMAND_WITHIN_S, stdin: str = "") -> Done:
    """A command of this machine."""
    return subprocess.run([str(word) for word in words], check=check, capture_output=True, text=True, timeout=within_s, input=stdin)


class Machine:
    """One box at ``PREFIX.number``. Its disk outlives its power."""

    def __init__(self, ground: "Ground", name: str, number: int) -> None:
        self._ground = ground
        self.name = name
        self.address = f"{PREFIX}.{number}"
        self.namespace = f"{NETWORK}-{number}"
        self._wire = f"v-{number}"
        self.folder = ground.folder / name
        self.root = self.folder / "root"
        self._console = self.folder / "console"
        self._outer: subprocess.Popen[bytes] | None = None

    def make(self) -> None:
        """Disk and network."""
        for part in ("up", "work", "root"):
            (self.folder / part).mkdir(parents=True)
        layers = f"lowerdir={self._ground.keys}:{self._ground.base},upperdir={self.folder / 'up'},workdir={self.folder / 'work'}"
        run("mount", "-t", "overlay", "overlay", "-o", layers, self.root)
        run("ip", "netns", "add", self.namespace)
        run("ip", "link", "add", self._wire, "netns", NETWORK, "type", "veth", "peer", "name", "host0", "netns", self.namespace)
        run("ip", "-n", NETWORK, "link", "set", self._wire, "master", "br0", "up")
        run("ip", "-n", self.namespace, "link", "set", "lo", "up")
        run("ip", "-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", "host0")
        run("ip", "-n", self.namespace, "link", "set", "host0", "up")

    def power_on(self) -> None:
        """Begin to boot."""
        inner = Path(__file__).with_name("inner.sh")
        with self._console.open("ab") as console:
            self._outer = subprocess.Popen(
                ["unshare", "--mount", "--propagation", "private", "bash", inner, self.namespace, f"--directory={self.root}",
                 f"--machine={self.name}", f"--hostname={self.name}", f"--network-namespace-path=/run/netns/{self.namespace}"],
                stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True,
            )  # fmt: skip

    def booted(self) -> None:
        """Wait until systemd has started all there is to start; a unit that failed is an error."""
        state, deadline = "dead", time.monotonic() + BOOTED_WITHIN_S
        while state not in ("running", "degraded"):
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.name} did not boot: {state}\n{self._console.read_text()[-2000:]}")
            time.sleep(0.1)
            if self.leader():
                state = self.run("systemctl", "is-system-running", check=False).stdout.strip()
        assert state == "running", self.run("systemctl", "--failed", "--no-pager").stdout

    def leader(self) -> int:
        """Its PID 1, as this machine numbers it; 0 where it has none."""
        inner = _children(self._outer.pid, "systemd-nspawn") if self._outer else []
        found = [pid for one in inner for pid in _children(one, "systemd")]
        return found[0] if found else 0

    def run(self, *words: str, check: bool = True, within_s: float = COMMAND_WITHIN_S, stdin: str = "") -> Done:
        """A command in the box, as root. Raises CalledProcessError with what it wrote."""
        enter = ["nsenter", "-t", str(self.leader()), "-m", "-u", "-i", "-n", "-p", "-C", "--", "setpriv", DROPPED, "--"]
        done = run(*enter, *words, check=False, within_s=within_s, stdin=stdin)
        if check and done.returncode:
            raise AssertionError(f"{self.name}: {' '.join(words)}: {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        return done

    def show(self, unit: str, key: str) -> str:
        """One property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={key}", unit).stdout.strip()

    def power_off(self) -> None:
        """As the button does it."""
        if leader := self.leader():
            os.kill(leader, signal.SIGRTMIN + 4)
        self._gone()

    def cut_power(self) -> None:
        """At once."""
        if leader := self.leader():
            os.kill(leader, signal.SIGKILL)
        self._gone()

    def _gone(self) -> None:
        if self._outer is None:
            return
        try:
            self._outer.wait(STOPPED_WITHIN_S)
        except subprocess.TimeoutExpired:
            for pid in (self.leader(), *_children(self._outer.pid, "systemd-nspawn"), self._outer.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL) if pid else None
            self._outer.wait(STOPPED_WITHIN_S)
        self._outer = None

    def link(self, state: str) -> None:
        """Its cable: "up" or "down"."""
        run("ip", "-n", NETWORK, "link", "set", self._wire, state)

    def remove(self) -> None:
        """Nothing of it stays."""
        self.cut_power()
        run("umount", "--recursive", "--lazy", self.root, check=False)
        run("ip", "netns", "del", self.namespace, check=False)
        for mount in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"):
            for folder, _, _ in os.walk(f"{mount}/skerry-boxes/{self.namespace}", topdown=False):
                with contextlib.suppress(OSError):
                    Path(folder).rmdir()


def _children(pid: int, name: str) -> list[int]:
    done = run("pgrep", "-P", str(pid), "-x", name, check=False)
    return [int(word) for word in done.stdout.split()]


class Ground:
    """The network, and what all boxes have: the root file system below, and the keys of this run over it."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base, self.keys = folder / "disks", base, folder / "keys-layer"
        self.key, self.known_hosts = folder / "key", folder / "known_hosts"
        self.machines: list[Machine] = []

    def __enter__(self) -> "Ground":
        run("ip", "netns", "del", NETWORK, check=False)
        run("ip", "netns", "add", NETWORK)
        RESOLVED.mkdir(parents=True, exist_ok=True)
        run("ip", "-n", NETWORK, "link", "set", "lo", "up")
        run("ip", "-n", NETWORK, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", NETWORK, "addr", "add", f"{PREFIX}.1/24", "dev", "br0")
        run("ip", "-n", NETWORK, "link", "set", "br0", "up")
        self.folder.mkdir(parents=True)
        run("mount", "-t", "tmpfs", "-o", "size=12g,mode=755", "skerry-boxes", self.folder)
        ssh, home = self.keys / "etc/ssh", self.keys / "root/.ssh"
        ssh.mkdir(parents=True)
        home.mkdir(parents=True, mode=0o700)
        (self.keys / "root").chmod(0o700)
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "boxes", "-f", self.key)
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "boxes", "-f", ssh / "ssh_host_ed25519_key")
        shutil.copy(f"{self.key}.pub", home / "authorized_keys")
        return self

    def add(self, *names: str) -> list[Machine]:
        """Boot boxes, all at a time."""
        added = [Machine(self, name, 10 + len(self.machines) + offset) for offset, name in enumerate(names)]
        self.machines += added
        host_key = " ".join((self.keys / "etc/ssh/ssh_host_ed25519_key.pub").read_text().split()[:2])
        self.known_hosts.write_text("".join(f"{machine.address} {host_key}\n" for machine in self.machines))
        names_file = "127.0.0.1 localhost\n" + "".join(f"{machine.address} {machine.name}\n" for machine in self.machines)
        (self.keys / "etc/hosts").write_text(names_file)
        (RESOLVED / "hosts").write_text(names_file)
        for machine in added:
            machine.make()
            machine.power_on()
        for machine in added:
            machine.booted()
        return added

    def inside(self, *words: str | Path) -> list[str]:
        """A command line as it is run on this network, by whoever looks after the boxes."""
        return ["ip", "netns", "exec", NETWORK, *map(str, words)]

    def __exit__(self, *_: object) -> None:
        for machine in self.machines:
            machine.remove()
        run("umount", "--recursive", "--lazy", self.folder, check=False)
        run("ip", "netns", "del", NETWORK, check=False)
        shutil.rmtree(RESOLVED, ignore_errors=True)
