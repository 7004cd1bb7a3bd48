"""The updater's settings."""

from pathlib import Path
from typing import Annotated

import msgspec


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``/etc/skerry/updater.toml``."""

    release_keys_file: Path | None = None
    """Public keys (PEM) of those who may vouch for releases; where it is not named, none is installed."""
    root: Path = Path("/opt/skerry")
    """Where releases lie side by side, with the links ``current``, ``previous`` and ``proven``."""
    state_dir: Path = Path("/var/lib/skerry/updater")
    wanted_file: Path = Path("/var/lib/skerry/warden/software.json")
    """Where the warden says what the box was told."""
    heard_file: Path = Path("/var/lib/skerry/agent/heard.json")
    """Where the agent says that the coordinator answered."""
    gateway_socket: Path = Path("/run/skerry/gateway/gateway.sock")
    settings_dir: Path = Path("/etc/skerry")
    """Where the programs' settings lie, which a new release must be able to read."""
    units_dir: Path = Path("/etc/systemd/system")
    systemctl: Path = Path("/usr/bin/systemctl")
    observe_s: Annotated[float, msgspec.Meta(ge=0.1, le=86400)] = 30.0
    """For how long a release must be well without a break."""
    trial_s: Annotated[float, msgspec.Meta(ge=1, le=86400)] = 300.0
    """What it has for that in all."""
    reserve_bytes: Annotated[int, msgspec.Meta(ge=0)] = 256 * 2**20
    """Left free on the disk of ``root``."""
