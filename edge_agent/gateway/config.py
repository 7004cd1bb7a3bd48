"""The gateway's settings."""

from pathlib import Path
from typing import Annotated

import msgspec

from skerry.runtime.settings import SettingsError, split_listen
from skerry.wire.messages import Tier
from skerry.wire.topics import Name


class Tls(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For callers from outside the box; with ``client_ca_file`` each must show a certificate that it signed."""

    certificate_file: Path
    key_file: Path
    client_ca_file: Path | None = None
    listen: str = ""
    """HTTP over TLS, host:port."""
    grpc_listen: str = ""

    def __post_init__(self) -> None:
        if not (self.listen or self.grpc_listen):
            raise ValueError("tls: names neither `listen` nor `grpc_listen`")
        for name in ("listen", "grpc_listen"):
            _check_listen(name, getattr(self, name), may_be_empty=True)


class Peers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """This gateway among the fleet's others: how it shows who it is, and where it answers them."""

    key_file: Path
    """Made by the gateway, and read by it alone."""
    csr_file: Path
    """The signing request that the gateway leaves for the agent."""
    certificate_file: Path
    """The agent puts it there."""
    ca_file: Path
    """The fleet's root certificate."""
    listen: str = ""
    """Where other gateways of this site, or with tier `cloud` of every site, are answered; empty: nowhere."""

    def __post_init__(self) -> None:
        _check_listen("peers.listen", self.listen, may_be_empty=True)


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``/etc/skerry/gateway.toml``."""

    node: Name
    tier: Tier
    listen: str
    socket: Path
    routes_file: Path
    grpc_listen: str = ""
    """gRPC, host:port; empty: none."""
    http_socket: Path | None = None
    """A Unix socket for callers on this box, HTTP."""
    grpc_socket: Path | None = None
    tls: Tls | None = None
    peers: Peers | None = None
    processes: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    """How many serve, on the same ports; what is limited below is limited for all together."""
    budget_file: Path | None = None
    """Where it is kept what was sent to the cloud this hour; beside the socket where it is not given."""
    upstream_proxy: str = ""
    """An HTTP proxy through which upstreams are reached, where the site has no other way out."""
    queue_limit: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 256
    """Requests that may wait for a replica, by deployment."""
    upstream_limit: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 64
    """Requests under way to one upstream."""
    body_limit_bytes: Annotated[int, msgspec.Meta(ge=1024)] = 256 * 2**20
    bodies_limit_bytes: Annotated[int, msgspec.Meta(ge=1024)] = 1024 * 2**20
    """Of all requests that are under way."""
    connection_limit: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 4096
    replica_memory_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**40)] = 64 * 2**20
    """Memory shared with each replica, at most, by all processes together; what does not fit is sent to it. 0: all is sent."""
    shared_memory: bool = False
    """Whether callers on this box may name shared memory of their own (Triton's system shared memory extension); with one process alone."""

    def __post_init__(self) -> None:
        if self.shared_memory and self.processes > 1:
            raise ValueError("shared_memory: is offered by a gateway of one process alone, and `processes` is more")
        for name in ("listen", "grpc_listen"):
            _check_listen(name, getattr(self, name), may_be_empty=name != "listen")
        for name in ("queue_limit", "upstream_limit", "connection_limit"):
            if getattr(self, name) < self.processes:
                raise ValueError(f"{name}: is less than `processes`, and each needs a part of it")
        if self.bodies_limit_bytes // self.processes < self.body_limit_bytes:
            raise ValueError("bodies_limit_bytes: the part of each of the `processes` is less than one body of `body_limit_bytes`")


def _check_listen(name: str, listen: str, *, may_be_empty: bool) -> None:
    if not listen and may_be_empty:
        return
    try:
        split_listen(listen)
    except SettingsError as exc:
        raise ValueError(f"{name}: {listen[:80]!r} is not host:port") from exc
