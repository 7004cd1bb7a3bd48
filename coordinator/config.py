"""The coordinator's settings."""

from pathlib import Path
from typing import Annotated

import msgspec

from skerry.runtime.settings import Broker, Name


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``/etc/skerry/coordinator.toml``."""

    fleet: Name
    state_dir: Path
    listen: str
    public_url: str
    broker: Broker
    model_limit_bytes: Annotated[int, msgspec.Meta(ge=1024)] = 4 * 2**30
    """Largest model that may be pushed."""
    queue: Annotated[int, msgspec.Meta(ge=100, le=1_000_000)] = 20_000
    """Messages from boxes that wait to be taken in."""
    rollup_s: Annotated[int, msgspec.Meta(ge=1, le=3600)] = 5
    """Width of a stored bucket of measurements."""
    keep_rollups_h: Annotated[int, msgspec.Meta(ge=1)] = 48
    keep_events: Annotated[int, msgspec.Meta(ge=1000)] = 1_000_000
