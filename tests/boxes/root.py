"""The root file system that every box is an overlay of: Debian with systemd and what a site's mirror would give, made once and kept."""

import hashlib
import os
import shutil
import subprocess
import time
from pathlib import Path

PACKAGES = (
    "systemd", "systemd-sysv", "dbus", "python3", "python3-venv", "openssh-server", "iproute2", "procps", "ca-certificates",
    "bubblewrap", "mosquitto", "docker.io",
)  # fmt: skip
LEFT_OUT = ("doc", "man", "locale")
MASKED = (
    "getty.target", "console-getty.service", "e2scrub_reap.service", "e2scrub_all.timer", "apt-daily.timer",
    "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "fstrim.timer", "systemd-update-utmp-runlevel.service",
    "containerd.service",
)  # fmt: skip
# The kernel gives a sandbox a /proc of its own where all of one is seen already, and systemd-nspawn hides a part of the box's.
PROC = "[Mount]\nWhat=proc\nWhere=/run/whole-proc\nType=proc\n[Install]\nWantedBy=sysinit.target\n"
# No sandbox has a network. An overlay on an overlay is more than some kernels do, and what a box may take is bounded outside of it.
ENGINE = '{"bridge": "none", "iptables": false, "ip6tables": false, "storage-driver": "vfs"}'
# Its containerd is its own, and sees the same control groups. The empty limit is a mistake: what is wrong with somebody else's unit does
# not keep ours from being installed.
ENGINE_UNIT = "[Service]\nLimitNOFILE=\nPrivateMounts=yes\nExecStart=\nExecStart=/usr/local/sbin/engine\n"
# sshd looks a client up in a DNS that is not there for eight seconds.
SSHD = "UseDNS no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
BUILT_WITHIN_S = 600
PYTHONS = {"bookworm": "3.11", "trixie": "3.13"}
"""By the distribution's name; releases are made for the one that boxes have."""


def suite() -> str:
    """Which Debian the boxes are: ``SKERRY_BOXES_SUITE``, else this machine's own."""
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    return os.environ.get("SKERRY_BOXES_SUITE") or release.get("VERSION_CODENAME", "").strip('"')


def missing() -> str:
    """What is lacking on this machine; empty where nothing is."""
    if os.geteuid() != 0:
        return "booting boxes needs root"
    lacking = [name for name in ("systemd-nspawn", "mmdebstrap", "ip", "ssh") if shutil.which(name) is None]
    if suite() not in PYTHONS:
        return f"boxes of {suite() or 'another system'} were never tried: SKERRY_BOXES_SUITE may be {', '.join(PYTHONS)}"
    return f"{', '.join(lacking)}: not installed" if lacking else ""


def cached() -> Path:
    """The folder, made now where there is none of this week: security updates come by then."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skerry-boxes"
    source = b"".join(Path(__file__).with_name(name).read_bytes() for name in ("root.py", "engine.sh"))
    mark = f"{suite()}-{hashlib.sha256(source + time.strftime('%G-%V').encode()).hexdigest()[:16]}"
    kept = folder / mark
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{suite()}-*"):
            shutil.rmtree(old, ignore_errors=True)
        staging = folder / f"{mark}.{os.getpid()}"
        _build(staging)
        staging.rename(kept)
    return kept


def _build(folder: Path) -> None:
    options = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in LEFT_OUT]
    # fmt: off
    words = [
        "mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(PACKAGES)}", '--aptopt=Acquire::Languages "none"',
        "--dpkgopt=force-unsafe-io", *options, suite(), str(folder), *_mirror(),
    ]
    # fmt: on
    subprocess.run(words, check=True, timeout=BUILT_WITHIN_S, capture_output=True)
    etc = folder / "etc"
    (etc / "machine-id").write_text("")
    (etc / "resolv.conf").write_text("")
    for path in (folder / "var/lib/dbus/machine-id", etc / "hostname", *etc.glob("ssh/ssh_host_*")):
        path.unlink(missing_ok=True)
    for unit in MASKED:
        path = etc / "systemd/system" / unit
        path.unlink(missing_ok=True)
        path.symlink_to("/dev/null")
    (etc / "systemd/system/run-whole\\x2dproc.mount").write_text(PROC)
    # Of the distribution: the fleet's broker is for Ansible to start, an engine for the test that wants one.
    for unit in ("mosquitto", "docker"):
        (etc / f"systemd/system/multi-user.target.wants/{unit}.service").unlink()
    (etc / "systemd/system/sockets.target.wants/docker.socket").unlink()
    (etc / "docker").mkdir(exist_ok=True)
    (etc / "docker/daemon.json").write_text(ENGINE)
    (etc / "systemd/system/docker.service.d").mkdir()
    (etc / "systemd/system/docker.service.d/boxes.conf").write_text(ENGINE_UNIT)
    shutil.copy(Path(__file__).with_name("engine.sh"), folder / "usr/local/sbin/engine")
    wanted = etc / "systemd/system/sysinit.target.wants"
    wanted.mkdir(exist_ok=True)
    (wanted / "run-whole\\x2dproc.mount").symlink_to("../run-whole\\x2dproc.mount")
    (etc / "ssh/sshd_config.d/boxes.conf").write_text(SSHD)
    (folder / "var/log/journal").mkdir(exist_ok=True)


def _mirror() -> list[str]:
    """Whatever apt uses on this machine."""
    for path in (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list")):
        for line in path.read_text().splitlines() if path.exists() else []:
            match line.split():
                case ["URIs:", address, *_] | ["deb", address, *_]:
                    return [address]
    return []
