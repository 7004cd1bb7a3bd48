"""Ways out over a socket."""

import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from .verdict import NOT_THERE, Verdict, World, attempt, try_each

TIMEOUT_S = 2.0
GREETING = b"reached"
NETLINK_ROUTE = 0
RTM_GETLINK, RTM_NEWROUTE, RTM_NEWLINK = 18, 24, 16
NLM_REQUEST, NLM_ACK, NLM_DUMP, NLM_CREATE = 1, 4, 0x300, 0x400
NLMSG_ERROR = 2
IFLA_IFNAME = 3
TUNSETIFF, IFF_TUN = 0x400454CA, 1


def _greeted(family: int, kind: int, address: tuple[str, int] | str) -> str:
    """What the listener at ``address`` says. Raises OSError."""
    with socket.socket(family, kind) as sock:
        sock.settimeout(TIMEOUT_S)
        sock.connect(address)
        if kind == socket.SOCK_DGRAM:
            sock.send(b"hello")
        return "a listener outside answers" if sock.recv(16) == GREETING else ""


@attempt("network")
def tcp_to_the_host(world: World) -> Verdict:
    """Connects over IPv4 to a listener on each address of the host."""
    targets = [(address, port) for family, address, port in world.addresses if family == socket.AF_INET]
    return try_each((("connect", partial(_greeted, socket.AF_INET, socket.SOCK_STREAM, t)) for t in targets), held=None)


@attempt("network")
def tcp_over_ipv6(world: World) -> Verdict:
    """Connects over IPv6 to a listener on each address of the host."""
    targets = [(address, port) for family, address, port in world.addresses if family == socket.AF_INET6]
    tries = (("connect", partial(_greeted, socket.AF_INET6, socket.SOCK_STREAM, t)) for t in targets)
    return try_each(tries, held=None, nothing="the host has no IPv6")


@attempt("network")
def udp_to_the_host(world: World) -> Verdict:
    """Sends a datagram to each address of the host and waits for the answer."""
    targets = [(family, (address, port)) for family, address, port in world.udp_addresses]
    return try_each((("sendto", partial(_greeted, f, socket.SOCK_DGRAM, t)) for f, t in targets), held=None)


@attempt("network")
def name_resolution(world: World) -> Verdict:
    """Asks the host's name servers, and those in /etc/resolv.conf, for a name."""
    servers = list(world.nameservers)
    with contextlib.suppress(OSError):
        servers += [line.split()[1] for line in Path("/etc/resolv.conf").read_text().splitlines() if line.startswith("nameserver ")]
    question = struct.pack("!6H", 7, 0x100, 1, 0, 0, 0) + b"\7example\3com\0" + struct.pack("!2H", 1, 1)

    def ask(server: str) -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(TIMEOUT_S)
            sock.connect((server, 53))
            sock.send(question)
            return f"{len(sock.recv(512))} bytes from a name server"

    return try_each((("connect", partial(ask, s)) for s in servers if ":" not in s), held=None, nothing="no name server is known")


@attempt("network")
def raw_socket(_: World) -> Verdict:
    """Opens a raw ICMP socket."""
    return try_each([("socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))], held=_NO_FAMILY)


_NO_FAMILY = NOT_THERE | {errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.ESOCKTNOSUPPORT}


@attempt("network")
def packet_socket(_: World) -> Verdict:
    """Opens a packet socket, which sees and sends whole Ethernet frames."""
    return try_each([("socket", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)))], held=_NO_FAMILY)


@attempt("network")
def abstract_socket(world: World) -> Verdict:
    """Connects to an abstract Unix socket of the host, which no file system hides."""
    target = "\0" + world.abstract_socket
    return try_each([("connect", lambda: _greeted(socket.AF_UNIX, socket.SOCK_STREAM, target))], held=None)


@attempt("network")
def unix_sockets_of_the_host(world: World) -> Verdict:
    """Connects to a Unix socket of the host by its path, and to the container engine's."""
    paths = [
        world.unix_socket,
        "/run/docker.sock",
        "/var/run/docker.sock",
        "/run/containerd/containerd.sock",
        "/run/dbus/system_bus_socket",
    ]

    def reach(path: str) -> str:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(TIMEOUT_S)
            sock.connect(path)
            return "connected"

    return try_each((("connect", partial(reach, p)) for p in paths), held=None)


@attempt("network")
def vsock_to_the_hypervisor(_: World) -> Verdict:
    """Opens a socket to the hypervisor, which belongs to no network namespace."""

    def reach() -> str:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
            sock.settimeout(TIMEOUT_S)
            sock.connect((socket.VMADDR_CID_HOST, 1024))
            return "connected"

    return try_each([("socket(AF_VSOCK)", reach)], held=_NO_FAMILY - {errno.ENODEV})


@attempt("network")
def tunnel_interface(_: World) -> Verdict:
    """Makes a network interface of its own through /dev/net/tun."""

    def make() -> str:
        fd = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"escape", IFF_TUN))
        return "the interface was made"

    return try_each([("TUNSETIFF", make)])


def _message(kind: int, flags: int, payload: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(payload), kind, flags, 1, 0) + payload


def _answers(message: bytes) -> Iterator[tuple[int, bytes]]:
    """The kernel's answers to one rtnetlink message, as kind and payload. Raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE) as sock:
        sock.settimeout(TIMEOUT_S)
        sock.bind((0, 0))
        sock.send(message)
        packet = sock.recv(65536)
    while len(packet) >= 16:
        length, kind = struct.unpack_from("=IH", packet)
        yield kind, packet[16:length]
        packet = packet[(length + 3) & ~3 :]


def _interface_names() -> list[str]:
    names = []
    for kind, payload in _answers(_message(RTM_GETLINK, NLM_REQUEST | NLM_DUMP, bytes(16))):
        attributes = payload[16:] if kind == RTM_NEWLINK else b""
        while len(attributes) >= 4:
            size, attribute = struct.unpack_from("=HH", attributes)
            if attribute == IFLA_IFNAME:
                names.append(attributes[4:size].rstrip(b"\0").decode())
            attributes = attributes[(max(size, 4) + 3) & ~3 :]
    return names


@attempt("network")
def network_interfaces(_: World) -> Verdict:
    """Lists network interfaces over netlink and in /proc and /sys, looking for one besides a loopback."""

    def from_proc() -> list[str]:
        return [line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]]

    def from_sys() -> list[str]:
        return [entry.name for entry in Path("/sys/class/net").iterdir()]

    sources = {"netlink": _interface_names, "/proc/net/dev": from_proc, "/sys/class/net": from_sys}

    def others(source: Callable[[], list[str]]) -> str:
        return ", ".join(sorted(set(source()) - {"lo"}))

    tries = ((name, partial(others, source)) for name, source in sources.items())
    verdict = try_each(tries, held=_NO_FAMILY)
    return Verdict(True, verdict.how.replace("nothing found", "a loopback alone")) if verdict.held else verdict


@attempt("network")
def changing_routes(_: World) -> Verdict:
    """Adds a route over netlink."""
    attributes = struct.pack("=HHI", 8, 1, 0x000200C0) + struct.pack("=HHI", 8, 4, 1)  # to 192.0.2.0 through interface 1
    payload = struct.pack("=8BI", socket.AF_INET, 24, 0, 0, 254, 4, 253, 1, 0) + attributes

    def change() -> str:
        for kind, answer in _answers(_message(RTM_NEWROUTE, NLM_REQUEST | NLM_ACK | NLM_CREATE, payload)):
            if kind == NLMSG_ERROR:
                (code,) = struct.unpack_from("=i", answer)
                if code:
                    raise OSError(-code, "netlink")
                return "the route was added"
        return ""

    return try_each([("RTM_NEWROUTE", change)], held=_NO_FAMILY)
