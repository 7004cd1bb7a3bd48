"""gRPC beside HTTP: where it listens, over what, and how much one message may hold."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgspec

from edge_agent.gateway.grpc_calls import Calls, Facts, Regions
from edge_agent.gateway.service import Service

HANDSHAKE_MS = 10_000
"""What TLS may take with a client that has just connected."""


class Tls(msgspec.Struct, frozen=True):
    """Who this server is, and with ``client_ca_pem`` whose clients alone it answers. All in PEM."""

    certificate_pem: bytes
    key_pem: bytes
    client_ca_pem: bytes | None = None


class Listen(msgspec.Struct, frozen=True):
    """An address to listen on: ``host:port``, or the absolute path of a Unix socket, which its group may connect to."""

    address: str
    tls: Tls | None = None
    latest: Callable[[], Tls] | None = None
    """What ``tls`` has become, asked for each client that connects, in a thread of gRPC's."""


class GrpcServer:
    """``inference.GRPCInferenceService`` on a list of addresses, in the loop that starts it."""

    def __init__(
        self,
        service: Service,
        facts: Facts,
        regions: Regions | None,
        *,
        listen: Sequence[Listen],
        body_limit_bytes: int,
        calls_limit: int = 1024,
        reuse_port: bool = False,
    ) -> None:
        """``body_limit_bytes`` holds for requests and for answers; beyond ``calls_limit`` calls at once, more are refused.

        ``reuse_port`` lets other processes listen on the same port, and the kernel share out the connections.
        """
        self._calls = Calls(service, facts, regions)
        self._listen = listen
        self._options = [
            ("grpc.max_receive_message_length", body_limit_bytes),
            ("grpc.max_send_message_length", body_limit_bytes),
            ("grpc.so_reuseport", int(reuse_port)),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ]
        self._calls_limit = calls_limit
        self._server: Any = None
        self.addresses: list[str] = []
        """Where it listens, in the order that was asked for: of port 0 the one that the kernel chose."""

    async def start(self) -> None:
        """Listen. Raises OSError, naming the address, where that can't be had."""
        server = grpc.aio.server(options=self._options, maximum_concurrent_rpcs=self._calls_limit)
        server.add_generic_rpc_handlers((self._calls.handler(),))
        try:
            self.addresses = [_add(server, listen) for listen in self._listen]
            await server.start()
        except BaseException:
            await server.stop(None)
            raise
        self._server = server
        for listen in self._listen:
            if listen.address.startswith("/"):
                _put_in_place(Path(listen.address))

    async def stop(self, grace_s: float) -> None:
        """Take no more calls, and let those under way end for ``grace_s``; what is left then is cancelled."""
        if self._server is not None:
            await self._server.stop(grace_s)
            self._server = None


def _add(server: Any, listen: Listen) -> str:
    """Bind; the address that came of it. A Unix socket is bound beside its place, so that whoever sees it can connect."""
    address, is_path = listen.address, listen.address.startswith("/")
    if is_path:
        Path(address).parent.mkdir(parents=True, exist_ok=True)
        address = f"unix:{_staged(Path(address))}"
    try:
        port = server.add_secure_port(address, _credentials(listen.tls, listen.latest)) if listen.tls else server.add_insecure_port(address)
    except RuntimeError as exc:
        raise OSError(f"{listen.address}: gRPC can't listen here: {exc}") from exc
    return listen.address if is_path else f"{address.rpartition(':')[0]}:{port}"


def _credentials(tls: Tls, latest: Callable[[], Tls] | None) -> Any:
    used = [tls]

    def renewed() -> Any:
        now = latest() if latest is not None else tls
        if now == used[0]:
            return None
        used[0] = now
        return _configuration(now)

    return grpc.dynamic_ssl_server_credentials(_configuration(tls), renewed, require_client_authentication=tls.client_ca_pem is not None)


def _configuration(tls: Tls) -> Any:
    return grpc.ssl_server_certificate_configuration([(tls.key_pem, tls.certificate_pem)], root_certificates=tls.client_ca_pem)


def _staged(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _put_in_place(path: Path) -> None:
    os.chmod(_staged(path), 0o660)  # noqa: PTH101 - the group is the programs of this box
    _staged(path).rename(path)
