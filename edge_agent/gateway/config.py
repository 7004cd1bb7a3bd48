"""The gateway's settings."""

from pathlib import Path
from typing import Annotated

import msgspec

from skerry.runtime.settings import Name
from skerry.wire.messages import Tier


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``/etc/skerry/gateway.toml``."""

    node: Name
    tier: Tier
    listen: str
    socket: Path
    routes_file: Path
    upstream_proxy: str = ""
    """An HTTP proxy through which upstreams are reached, where the site has no other way out."""
    queue_limit: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 256
    """Requests that may wait for a replica, by deployment."""
    upstream_limit: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 64
    """Requests under way to one upstream."""
    body_limit_bytes: Annotated[int, msgspec.Meta(ge=1024)] = 256 * 2**20
