"""The warden's settings."""

from pathlib import Path
from typing import Annotated

import msgspec

from skerry.wire.topics import Name


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``/etc/skerry/warden.toml``. Sizes are in bytes, 0 means: what the machine has."""

    fleet: Name
    node: Name
    state_dir: Path
    socket: Path
    incoming_dir: Path
    routes_file: Path
    trusted_keys_file: Path
    model_keys_file: Path | None = None
    """Public keys (PEM) of those who may vouch for models: where it is named, nothing else is started."""
    updater_record_file: Path | None = None
    """What ``skerry-updater`` keeps; where it is not named, this box's own programs are not the coordinator's to change."""
    drivers: list[str] = msgspec.field(default_factory=lambda: ["docker", "bubblewrap", "gvisor"])
    """Kinds of sandbox in order of preference; those that do not work here are left out, with the reason in the log."""
    docker_socket: Path = Path("/var/run/docker.sock")
    memory_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    gpu_memory_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    drain_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 2.0
    start_timeout_s: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 120.0
    restart_first_s: Annotated[float, msgspec.Meta(ge=0.05, le=60)] = 0.5
    restart_most_s: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 60.0
    crash_loop_after: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 8
    """Endings in a row, those that could not load their model counted twice, after which a replica is given up."""
    warm_most: Annotated[int, msgspec.Meta(ge=0, le=64)] = 2
    """Sandboxes held ready with the runtime imported and no model; 0 holds none."""
    warm_keep_s: Annotated[float, msgspec.Meta(ge=1, le=7 * 86400)] = 600.0
    """How long a start of a kind makes it worth holding one ready."""
    orphan_grace_s: Annotated[float, msgspec.Meta(ge=0, le=86400)] = 60.0
    """How long a sandbox of ours that nothing is known of is left alone after a start."""
    uid_first: Annotated[int, msgspec.Meta(ge=1000, le=2_147_000_000)] = 1_879_100_000
    """User ids are given to sandboxes from here on; above those that systemd, container engines and directories give out."""
    models_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    """What models may take of the disk, as far as others than those that are deployed and their predecessors can go for it."""
    disk_reserve_bytes: Annotated[int, msgspec.Meta(ge=0)] = 192 * 2**20
    """Models that are not deployed go while less of the disk is free."""
    logs_bytes: Annotated[int, msgspec.Meta(ge=2**20)] = 256 * 2**20
    """What the logs of all sandboxes may take of the disk together, 8 MiB of it one sandbox's, less where there are many."""
    journal_entries: Annotated[int, msgspec.Meta(ge=100, le=1_000_000)] = 10_000
