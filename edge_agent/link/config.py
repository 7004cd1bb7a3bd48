"""The agent's settings."""

from pathlib import Path
from typing import Annotated

import msgspec

from skerry.runtime.settings import Broker
from skerry.wire.messages import Tier
from skerry.wire.topics import Name


class Coordinator(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where models and certificates are fetched from. ``proxy`` is an HTTP proxy, where the site has no other way out.

    ``ca_file`` holds the root that an ``https`` address is checked against; empty: those of the system.
    """

    url: str
    token_file: Path
    proxy: str = ""
    ca_file: str = ""


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``/etc/skerry/agent.toml``."""

    fleet: Name
    node: Name
    tier: Tier
    state_dir: Path
    warden_socket: Path
    gateway_socket: Path
    gateway_url: str
    broker: Broker
    coordinator: Coordinator
    gateway_csr_file: Path | None = None
    """What the gateway wants signed, and where its certificate goes."""
    gateway_certificate_file: Path | None = None
    labels: dict[str, str] = {}
    sample_every_s: Annotated[float, msgspec.Meta(ge=0.2, le=3600)] = 10.0
    outbox_bytes: Annotated[int, msgspec.Meta(ge=4 * 2**20, le=2**40)] = 64 * 2**20
    """What waits for the coordinator takes so much of the disk at the most."""
    will_delay_s: Annotated[int, msgspec.Meta(ge=0, le=3600)] = 5
    reconnect_first_s: Annotated[float, msgspec.Meta(ge=0.05, le=60)] = 0.5
    reconnect_most_s: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 60.0
