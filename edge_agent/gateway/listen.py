"""Where callers reach this gateway: HTTP and gRPC, plain and over TLS, by ports and Unix sockets."""

import asyncio
import errno
import socket
from typing import Any

from edge_agent.gateway import http
from edge_agent.gateway.config import Config
from edge_agent.gateway.facts import Facts
from edge_agent.gateway.fleet import FleetIdentity
from edge_agent.gateway.processes import Place
from edge_agent.gateway.regions import PeerRegions, Regions
from edge_agent.gateway.service import Service
from edge_agent.gateway.tls import Certificates
from skerry.runtime import activation, settings

BACKLOG = 1024
HANDSHAKE_S = 10.0
"""What TLS may take with a client that has just connected."""
HTTP, HTTPS, LOCAL, PRIVATE, PEERS = "http", "https", "local", "private", "peers"
"""TCP, TCP with TLS, the Unix sockets of callers on the box and of the box's own programs, and TCP with TLS for other gateways."""

Sockets = dict[str, list[socket.socket]]


class Front:
    """HTTP in this process: on sockets that all its processes share, those of systemd among them, and on ports of its own."""

    def __init__(self, config: Config, place: Place, sockets: Sockets, certificates: Certificates | None) -> None:
        self._config = config
        self._shares_port = place.is_shared
        self._sockets = dict(sockets)
        self._certificates = certificates
        self._servers: dict[str, list[asyncio.AbstractServer]] = {}

    async def open(self, public: http.Server, private: http.Server) -> None:
        """Listen wherever the settings say; callers are accepted from now on. Raises SettingsError."""
        tls = self._config.tls
        wanted = {HTTP: self._config.listen, HTTPS: tls.listen if tls is not None else ""}
        for name, listen in wanted.items():
            if listen and name not in self._sockets:
                self._sockets[name] = await asyncio.to_thread(tcp_listeners, name, listen, shares_port=self._shares_port)
        self._public = public
        for name, sockets in self._sockets.items():
            self._servers[name] = await self._serve(name, private if name == PRIVATE else public, sockets)

    async def _serve(self, name: str, server: http.Server, sockets: list[socket.socket]) -> list[asyncio.AbstractServer]:
        """Accept on copies of ``sockets``: that one server ends does not close them for the next one."""
        loop = asyncio.get_running_loop()
        options: dict[str, Any] = {"backlog": BACKLOG}
        if name == HTTPS and self._certificates is not None:
            options |= {"ssl": self._certificates.context, "ssl_handshake_timeout": HANDSHAKE_S}
        create: Any = loop.create_unix_server if name in (LOCAL, PRIVATE) else loop.create_server
        return [await create(server.connection, sock=one.dup(), **options) for one in sockets]

    async def renew(self) -> None:
        """Look for replaced certificates; whoever connects from then on sees the new ones. Not one connection is refused meanwhile."""
        if self._certificates is not None and await asyncio.to_thread(self._certificates.look) and HTTPS in self._servers:
            old = self._servers[HTTPS]
            self._servers[HTTPS] = await self._serve(HTTPS, self._public, self._sockets[HTTPS])
            for server in old:
                server.close()

    def close(self) -> None:
        """Accept no more. Connections go on."""
        for servers in self._servers.values():
            for server in servers:
                server.close()
        self._servers.clear()
        for sockets in self._sockets.values():
            for one in sockets:
                one.close()
        self._sockets.clear()


class Fleetward:
    """HTTP over TLS for other gateways, on a port of its own: from when this gateway has a certificate of the fleet on."""

    def __init__(self, listen: str, place: Place, fleet: FleetIdentity, server: http.Server) -> None:
        self._listen = listen
        self._shares_port = place.is_shared
        self._fleet = fleet
        self._server = server
        self._sockets: list[socket.socket] = []
        self._servers: list[asyncio.AbstractServer] = []

    async def open(self) -> None:
        """Take the port, and accept callers if there is a certificate. Raises SettingsError."""
        if self._listen:
            self._sockets = await asyncio.to_thread(tcp_listeners, PEERS, self._listen, shares_port=self._shares_port)
            await self._accept()

    async def renew(self) -> None:
        """Look for a certificate, or the next one; whoever connects from then on sees it."""
        if await asyncio.to_thread(self._fleet.look):
            await self._accept()

    async def _accept(self) -> None:
        old, context = self._servers, self._fleet.server
        if context is None:
            return
        loop = asyncio.get_running_loop()
        options: dict[str, Any] = {"backlog": BACKLOG, "ssl": context, "ssl_handshake_timeout": HANDSHAKE_S}
        self._servers = [await loop.create_server(self._server.connection, sock=one.dup(), **options) for one in self._sockets]
        for server in old:
            server.close()

    def close(self) -> None:
        """Accept no more. Connections go on."""
        for server in self._servers:
            server.close()
        for one in self._sockets:
            one.close()
        self._servers, self._sockets = [], []


class Remote:
    """gRPC in this process, where the settings ask for it."""

    def __init__(self, config: Config, place: Place, certificates: Certificates | None) -> None:
        self._config = config
        self._place = place
        self._certificates = certificates if config.tls is not None and config.tls.grpc_listen else None
        # gRPC takes no socket that is open already, so the path can be one process's alone.
        local = config.grpc_socket is not None and place.number == 0
        self._local = str(config.grpc_socket.absolute()) if local and config.grpc_socket is not None else ""
        self._server: Any = None

    async def open(self, service: Service, facts: Facts, regions: Regions | None) -> None:
        """Listen. Raises SettingsError, also where gRPC's libraries are absent."""
        config, certificates = self._config, self._certificates
        if not (config.grpc_listen or self._local or certificates):
            return
        try:
            from edge_agent.gateway import grpc_server
        except ImportError as exc:
            raise settings.SettingsError(f"grpc_listen: {exc.name or exc} is not installed; install skerry with the extra `grpc`") from exc
        where = [grpc_server.Listen(address) for address in (config.grpc_listen, self._local) if address]
        if certificates is not None and config.tls is not None:

            def tls() -> grpc_server.Tls:
                return grpc_server.Tls(certificates.pem.certificate, certificates.pem.key, certificates.pem.client_ca)

            where.append(grpc_server.Listen(config.tls.grpc_listen, tls(), latest=tls))
        local_port = settings.split_listen(config.grpc_listen)[1] if config.grpc_listen else 0
        server = grpc_server.GrpcServer(
            service, facts, PeerRegions(regions, local_port) if regions is not None and local_port else None, listen=where,
            body_limit_bytes=config.body_limit_bytes, calls_limit=self._place.share(config.connection_limit),
            reuse_port=self._place.is_shared,
        )  # fmt: skip
        try:
            await server.start()
        except OSError as exc:
            raise settings.SettingsError(f"grpc_listen: {exc}") from exc
        self._server = server

    async def stop(self, grace_s: float) -> None:
        """Take no more calls, and let those under way end for ``grace_s``."""
        if self._server is not None:
            await self._server.stop(grace_s)
            self._server = None


def before_fork(config: Config) -> Sockets:
    """The sockets that all processes of this gateway share: what systemd opened, and Unix sockets. Raises SettingsError."""
    given = activation.listeners()
    known = {HTTP, LOCAL, *([HTTPS] if config.tls is not None and config.tls.listen else [])}
    for name in given:
        if name not in known:  # nobody would ever answer those who connect to it
            raise settings.SettingsError(f"a socket unit opened {name!r}; with these settings there can be {', '.join(sorted(known))}")
    for name, path in ((PRIVATE, config.socket), (LOCAL, config.http_socket)):
        if path is not None and name not in given:
            given[name] = [_unix_listener(path)]
    return given


def _unix_listener(path: Any) -> socket.socket:
    """Swapped in whole, so that whoever sees it can connect."""
    staging = path.with_name(f".{path.name}.new")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging.unlink(missing_ok=True)
        listener.bind(str(staging))
        listener.listen(BACKLOG)
        staging.chmod(0o660)  # the group is the programs of this box
        staging.rename(path)
    except OSError as exc:
        listener.close()
        raise settings.SettingsError(f"{path}: {exc.strerror or exc}") from exc
    return listener


def tcp_listeners(name: str, listen: str, *, shares_port: bool) -> list[socket.socket]:
    """Sockets that listen on ``host:port``, one for each address of the host. Raises SettingsError."""
    host, port = settings.split_listen(listen)
    found: list[socket.socket] = []
    absent: OSError | None = None
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
            try:
                found.append(_tcp_listener(socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol), address, shares_port=shares_port))
            except OSError as exc:
                if exc.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
                absent = exc  # a name may stand for addresses of a family that this machine does not have
        if not found and absent is not None:
            raise absent
    except OSError as exc:
        for one in found:
            one.close()
        raise settings.SettingsError(f"{name}: can't listen on {listen}: {exc.strerror or exc}") from exc
    return found


def _tcp_listener(listener: socket.socket, address: Any, *, shares_port: bool) -> socket.socket:
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shares_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if listener.family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
