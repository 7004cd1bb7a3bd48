"""Regions of shared memory that local clients register, to pass tensors without sending them: Triton's system shared memory extension.

Whoever can reach the gateway is hostile here, in two ways. A client could name memory that is not its own, and have the gateway read or
write what the client itself may not: so a client is known by its user, and may name files of that user alone, root being no exception (a
proxy that runs as root speaks for others). And it could cut the file short while it is used, which kills whoever has it mapped: so nothing
is mapped. Bytes are read and written with calls that fall short instead.

What the gateway is the first to write to counts as the gateway's memory, not the client's: a client that cares touches its pages first.
"""

import contextlib
import ipaddress
import os
import stat
import struct
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgspec

from skerry.wire.oip import MAX_NAME, BadRequest, Bytes, Extent, RegionReader

FOLDER = Path("/dev/shm")  # noqa: S108 - shared memory lies there and nowhere else
MOST_REGIONS = 256
MOST_OF_ONE_OWNER = MOST_REGIONS // 2
MOST_KEY = 255


class _Region(msgspec.Struct, frozen=True):
    name: str
    key: str
    offset: int
    size_bytes: int
    descriptor: int


class Regions:
    """What is registered, by owner: the user id of the client, to be found by the caller from its connection.

    Each owner has its own names. ``most_bytes`` bounds a region, and what one request may read from all of them. Everything that a client
    says wrongly is a BadRequest.
    """

    def __init__(self, *, most_bytes: int, folder: Path = FOLDER) -> None:
        self._most_bytes = most_bytes
        self._folder = folder
        self._held: dict[tuple[int, str], _Region] = {}

    def register(self, name: str, key: str, *, offset: int, size_bytes: int, owner: int) -> None:
        """Take ``size_bytes`` from ``offset`` on of the shared memory ``key`` under the name ``name``."""
        if not 0 < len(name) <= MAX_NAME:
            raise BadRequest(f"region: a name has 1 to {MAX_NAME} characters, got {len(name)}")
        if (owner, name) in self._held:
            raise BadRequest(f"region: {name[:80]!r} is registered already, unregister it first")
        if offset < 0 or size_bytes < 1:
            raise BadRequest(f"offset or byte_size: {offset} and {size_bytes} are not an extent")
        if size_bytes > self._most_bytes:
            raise BadRequest(f"byte_size: {size_bytes} is more than the {self._most_bytes} that a region may have")
        self._make_room(owner)
        descriptor = _opened(self._folder, key, owner)
        size = os.fstat(descriptor).st_size
        if size < offset + size_bytes:
            os.close(descriptor)
            raise BadRequest(f"byte_size: {key[:80]!r} has {size} bytes, the region would reach to {offset + size_bytes}")
        self._held[owner, name] = _Region(name, key, offset, size_bytes, descriptor)

    def _make_room(self, owner: int) -> None:
        def counts() -> tuple[int, int]:
            return len(self._held), sum(1 for by, _ in self._held if by == owner)

        held, own = counts()
        if held >= MOST_REGIONS or own >= MOST_OF_ONE_OWNER:
            self._forget_unlinked()
            held, own = counts()
        if own >= MOST_OF_ONE_OWNER:
            raise BadRequest(f"region: this user has {own} regions registered, which is the most; unregister some")
        if held >= MOST_REGIONS:
            raise BadRequest(f"region: {held} regions are registered, which is the most")

    def _forget_unlinked(self) -> None:
        """Forget those whose memory has no name any more: a client that ended without a word leaves nothing for ever."""
        for at, region in [*self._held.items()]:
            if os.fstat(region.descriptor).st_nlink == 0:
                os.close(self._held.pop(at).descriptor)

    def unregister(self, name: str | None, owner: int) -> None:
        """Forget a region of this owner, all of them without a name. One that is not there is no mistake, as with Triton."""
        for at in [at for at in self._held if at[0] == owner and name in (None, at[1])]:
            os.close(self._held.pop(at).descriptor)

    def status(self, name: str | None, owner: int) -> list[dict[str, Any]]:
        """This owner's regions as Triton tells them, one of them where a name is given."""
        found = [region for (by, _), region in sorted(self._held.items()) if by == owner and name in (None, region.name)]
        if name is not None and not found:
            raise BadRequest(f"region: {name[:80]!r} is not registered")
        return [{"name": r.name, "key": r.key, "offset": r.offset, "byte_size": r.size_bytes} for r in found]

    def reader(self, owner: int) -> RegionReader:
        """For one request of this owner: reads what it names, as much as a body may have in all."""
        left = self._most_bytes

        def read(extent: Extent, field: str) -> Bytes:
            nonlocal left
            left -= extent.size_bytes
            if left < 0:
                raise BadRequest(f"{field}: a request may read {self._most_bytes} bytes from regions")
            return self.read(extent, field, owner)

        return read

    def read(self, extent: Extent, field: str, owner: int) -> bytes:
        """A copy of what lies there; ``field`` is what the request calls it."""
        region, at = self._find(extent, field, owner)
        with _told(region, field):
            data = os.pread(region.descriptor, extent.size_bytes, at)
            while len(data) < extent.size_bytes:
                more = os.pread(region.descriptor, extent.size_bytes - len(data), at + len(data))
                if not more:
                    raise BadRequest(f"{field}: {region.name[:80]!r} was cut short, {len(data)} of {extent.size_bytes} bytes are there")
                data += more
        return data

    def read_into(self, extent: Extent, field: str, owner: int, target: memoryview) -> None:
        """As ``read``, into ``target``, which has the extent's size; what it holds after a BadRequest is anybody's guess."""
        region, at = self._find(extent, field, owner)
        if target.nbytes != extent.size_bytes:
            raise BadRequest(f"{field}: {extent.size_bytes} bytes do not fit the {target.nbytes} that are wanted")
        done = 0
        with _told(region, field):
            while done < extent.size_bytes:
                got = os.preadv(region.descriptor, [target[done:]], at + done)
                if not got:
                    raise BadRequest(f"{field}: {region.name[:80]!r} was cut short, {done} of {extent.size_bytes} bytes are there")
                done += got

    def write(self, extent: Extent, data: Bytes, field: str, owner: int) -> None:
        """Put ``data`` there, which may be shorter than the extent."""
        region, at = self._find(extent, field, owner)
        view = memoryview(data)
        if view.nbytes > extent.size_bytes:
            raise BadRequest(f"{field}: {view.nbytes} bytes do not fit the extent's {extent.size_bytes}")
        with _told(region, field):
            if os.fstat(region.descriptor).st_size < at + view.nbytes:  # a write past the end would make the client's file longer
                raise BadRequest(f"{field}: {region.name[:80]!r} was cut short, {view.nbytes} bytes at {extent.offset} do not fit it")
            done = 0
            while done < view.nbytes:
                done += os.pwrite(region.descriptor, view[done:], at + done)

    def _find(self, extent: Extent, field: str, owner: int) -> tuple[_Region, int]:
        """The region, and where in its file the extent begins."""
        region = self._held.get((owner, extent.region))
        if region is None:
            raise BadRequest(f"{field}: {extent.region[:80]!r} is not registered")
        if extent.offset < 0 or extent.size_bytes < 0 or extent.offset + extent.size_bytes > region.size_bytes:
            what = f"{extent.size_bytes} bytes at {extent.offset}"
            raise BadRequest(f"{field}: {what} are not within {region.name[:80]!r}, which has {region.size_bytes}")
        return region, region.offset + extent.offset

    def close(self) -> None:
        """Forget everything."""
        while self._held:
            os.close(self._held.popitem()[1].descriptor)


@contextlib.contextmanager
def _told(region: _Region, field: str) -> Any:
    try:
        yield
    except OSError as exc:
        raise BadRequest(f"{field}: {region.name[:80]!r} can't be used: {exc.strerror}") from exc


def _opened(folder: Path, key: str, owner: int) -> int:
    """A descriptor of the shared memory that ``key`` names, if it is ``owner``'s. Raises BadRequest.

    Looked at before it is opened: a user can put a pipe there, or mount a file system of its own on a file, and both could make the
    opening wait for ever. What was looked at is what is opened, whatever the name points to by then.
    """
    name = key.removeprefix("/")
    if not name or "/" in name or "\0" in name or name in (".", "..") or len(name) > MOST_KEY:
        raise BadRequest(f"key: {key[:80]!r} is not the name of a shared memory object: '/' and one name of at most {MOST_KEY} characters")
    with contextlib.ExitStack() as opened:
        try:
            above = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            opened.callback(os.close, above)
            seen = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
            opened.callback(os.close, seen)
            if _mount_of(seen) != _mount_of(above):
                raise BadRequest(f"key: {key[:80]!r} is not shared memory")
            about = os.fstat(seen)
            if not stat.S_ISREG(about.st_mode):
                raise BadRequest(f"key: {key[:80]!r} is not shared memory")
            if about.st_uid != owner:
                raise BadRequest(f"key: {key[:80]!r} belongs to another user")
            return os.open(f"/proc/self/fd/{seen}", os.O_RDWR | os.O_CLOEXEC)
        except PermissionError as exc:
            raise BadRequest(f"key: {key[:80]!r} is closed to the gateway's user, who must be let read and write it") from exc
        except (OSError, UnicodeError) as exc:
            raise BadRequest(f"key: {key[:80]!r} can't be opened: {exc.strerror if isinstance(exc, OSError) else exc}") from exc


def _mount_of(descriptor: int) -> int:
    """The mount that an open file lies on; the file system behind it is not asked."""
    for line in Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines():
        if line.startswith("mnt_id:"):
            return int(line.split()[1])
    raise BadRequest("region: this system does not say what is shared memory")


ESTABLISHED = "01"


def uid_of_loopback_peer(local_port: int, peer_host: str, peer_port: int, *, tables: Path = Path("/proc/net")) -> int | None:
    """The user at the other end of a TCP connection from this machine, None where that can't be told for certain.

    To be asked as soon as the connection is accepted: what has ended is nobody's, and its numbers go to others. Reads the whole table of
    connections, which takes milliseconds where there are thousands.
    """
    try:
        address = ipaddress.ip_address(peer_host)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    address = mapped or address
    if not address.is_loopback:
        return None
    written = [("tcp" if address.version == 4 else "tcp6", address.packed)]
    if address.version == 4:
        written.append(("tcp6", bytes(10) + b"\xff\xff" + address.packed))
    found = set()
    for table, packed in written:
        words = struct.unpack(f"={len(packed) // 4}I", packed)
        wanted = "".join(f"{word:08X}" for word in words) + f":{peer_port:04X}"
        found |= _owners(tables / table, wanted, f":{local_port:04X}")
    return found.pop() if len(found) == 1 else None


def _owners(table: Path, local: str, remote_port: str) -> set[int]:
    """The users of the open sockets in one of the kernel's tables that have these ends."""
    try:
        lines = table.read_text(errors="replace").splitlines()[1:]
    except OSError:
        return set()
    found = set()
    for line in lines:
        if local not in line:
            continue
        cells = line.split()
        if len(cells) < 10 or cells[1] != local or not cells[2].endswith(remote_port) or cells[3] != ESTABLISHED:
            continue  # one that is ending has lost its owner, and shows as root's
        if cells[7].isdecimal() and cells[9] != "0":
            found.add(int(cells[7]))
    return found


class PeerRegions:
    """Regions for callers of whom only gRPC's name for the other end is known (``ipv4:127.0.0.1:50000``)."""

    def __init__(self, regions: Regions, local_port: int) -> None:
        self._regions = regions
        self._local_port = local_port
        self._owners: dict[str, int] = {}

    def _owner(self, peer: str) -> int:
        owner = self._owners.get(peer)
        if owner is None:
            _, _, address = peer.partition(":")
            host, _, port = unquote(address).rpartition(":")
            owner = uid_of_loopback_peer(self._local_port, host.strip("[]"), int(port)) if port.isdecimal() else None
            if owner is None:
                raise BadRequest("shared memory is offered to callers on this box alone, over TCP")
            if len(self._owners) >= MOST_REGIONS:
                self._owners.clear()
            self._owners[peer] = owner
        return owner

    def register(self, name: str, key: str, offset: int, size_bytes: int, peer: str) -> None:
        """See Regions."""
        self._regions.register(name, key, offset=offset, size_bytes=size_bytes, owner=self._owner(peer))

    def unregister(self, name: str | None, peer: str) -> None:
        """See Regions."""
        self._regions.unregister(name, self._owner(peer))

    def status(self, name: str | None, peer: str) -> list[dict[str, Any]]:
        """See Regions."""
        return self._regions.status(name, self._owner(peer))

    def resolver(self, peer: str) -> RegionReader:
        """See Regions.reader; whose they are is found once one is read."""

        def read(extent: Extent, field: str) -> Bytes:
            return self._regions.read(extent, field, self._owner(peer))

        return read

    def write(self, extent: Extent, data: Bytes, field: str, peer: str) -> None:
        """See Regions."""
        self._regions.write(extent, data, field, self._owner(peer))
