"""Shared memory that clients register, on this machine's own /dev/shm, with clients that mean no good."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import shared_memory

from edge_agent.gateway import regions
from edge_agent.gateway.regions import Regions, uid_of_loopback_peer
from skerry.wire import oip
from tests.conftest import need
from tests.nobody import NOBODY, run_as_nobody

SHM = Path("/dev/shm")
ME = os.geteuid()
MIB = 2**20


def open_files() -> Iterator[str]:
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            yield str(descriptor.readlink())


@pytest.fixture
def held():
    """Regions of at most a MiB, closed after the test."""
    found = Regions(most_bytes=MIB)
    yield found
    found.close()
    assert not [held for held in open_files() if held.startswith(str(SHM))], "a descriptor was left open"


@pytest.fixture
def key():
    """A name in shared memory; whatever lies there is removed after the test."""
    name = f"/skerry-test-{uuid.uuid4().hex[:12]}"
    yield name
    for path in SHM.glob(f"{name[1:]}*"):
        path.unlink()


def create(key: str, content: bytes) -> Path:
    path = SHM / key[1:]
    path.write_bytes(content)
    return path


def test_tritons_client_shares_memory_and_finds_the_answer_in_it(held, key):
    handle = shared_memory.create_shared_memory_region("both", key, 64)
    try:
        shared_memory.set_shared_memory_region(handle, [np.array([1, 2, 3], "<f4")])
        held.register("both", key, offset=0, size_bytes=64, owner=ME)
        x, y = triton.InferInput("x", [2], "FP32"), triton.InferRequestedOutput("y")
        x.set_shared_memory("both", 8, offset=4)
        y.set_shared_memory("both", 16, offset=32)
        body, header_length = triton.InferenceServerClient.generate_request_body([x], outputs=[y])
        request = oip.parse_infer(body, header_length, regions=held.reader(ME))
        assert np.frombuffer(request.inputs[0].data, "<f4").tolist() == [2, 3]
        for tensor, extent in oip.placements(request, [oip.Tensor("y", "FP32", (1,), np.array([7], "<f4").tobytes())]):
            held.write(extent, tensor.data, "outputs[0]", ME)
        assert shared_memory.get_contents_as_numpy(handle, np.float32, [1], offset=32).tolist() == [7]
    finally:
        shared_memory.destroy_shared_memory_region(handle)


def test_what_is_registered_is_told_as_triton_tells_it_and_forgotten_when_asked(held, key):
    create(key, bytes(100))
    held.register("b", key, offset=20, size_bytes=80, owner=ME)
    held.register("a", key.removeprefix("/"), offset=0, size_bytes=50, owner=ME)
    a, b = ({"name": "a", "key": key[1:], "offset": 0, "byte_size": 50}, {"name": "b", "key": key, "offset": 20, "byte_size": 80})
    assert held.status(None, ME) == [a, b]
    assert held.status("b", ME) == [b]
    with pytest.raises(oip.BadRequest, match="registered already"):
        held.register("a", key, offset=0, size_bytes=1, owner=ME)
    held.unregister("a", ME)
    held.unregister("never was", ME)
    with pytest.raises(oip.BadRequest, match="'a' is not registered"):
        held.status("a", ME)
    held.unregister(None, ME)
    assert held.status(None, ME) == []


def test_overlapping_regions_are_windows_on_the_same_bytes(held, key):
    create(key, bytes(range(100)))
    held.register("a", key, offset=0, size_bytes=60, owner=ME)
    held.register("b", key, offset=40, size_bytes=60, owner=ME)
    held.write(oip.Extent("a", 50, 4), b"\xff" * 4, "f", ME)
    assert held.read(oip.Extent("b", 8, 8), "f", ME) == bytes([48, 49, 255, 255, 255, 255, 54, 55])


@pytest.mark.parametrize(("offset", "size"), [(0, 61), (60, 1), (-1, 4), (2**62, 2**62), (59, 2), (0, -1)])
def test_nothing_outside_of_the_region_is_read_or_written(held, key, offset, size):
    create(key, bytes(100))
    held.register("a", key, offset=0, size_bytes=60, owner=ME)
    with pytest.raises(oip.BadRequest, match=r"f: .*not within 'a'"):
        held.read(oip.Extent("a", offset, size), "f", ME)
    with pytest.raises(oip.BadRequest, match=r"f: .*not within 'a'"):
        held.write(oip.Extent("a", offset, size), b"", "f", ME)


def test_memory_that_was_cut_short_is_an_error_that_names_the_region(held, key):
    path = create(key, bytes(8192))
    held.register("a", key, offset=0, size_bytes=8192, owner=ME)
    os.truncate(path, 5000)
    for attempt in (
        lambda: held.read(oip.Extent("a", 0, 8192), "inputs[0]", ME),
        lambda: held.read_into(oip.Extent("a", 0, 8192), "inputs[0]", ME, memoryview(bytearray(8192))),
        lambda: held.write(oip.Extent("a", 0, 8192), bytes(8192), "inputs[0]", ME),
    ):
        with pytest.raises(oip.BadRequest, match=r"inputs\[0\]: 'a' was cut short"):
            attempt()
    assert path.stat().st_size == 5000, "the client's memory was made longer"
    target = bytearray(5000)
    held.read_into(oip.Extent("a", 0, 5000), "f", ME, memoryview(target))
    with pytest.raises(oip.BadRequest, match="do not fit"):
        held.read_into(oip.Extent("a", 0, 5000), "f", ME, memoryview(bytearray(4)))
    with pytest.raises(oip.BadRequest, match="do not fit"):
        held.write(oip.Extent("a", 0, 4), bytes(5), "f", ME)


def test_a_client_that_cuts_and_grows_its_memory_all_the_while_kills_nobody(held, key):
    path = create(key, b"\x07" * 65536)
    held.register("a", key, offset=0, size_bytes=65536, owner=ME)
    stop = threading.Event()

    def shake() -> None:
        while not stop.is_set():
            os.truncate(path, 0)
            os.truncate(path, 65536)
            time.sleep(0.0003)

    shaker = threading.Thread(target=shake)
    shaker.start()
    came = {"read": 0, "written": 0, "cut short": 0}
    until = time.monotonic() + 20
    try:
        while min(came.values()) < 50 and time.monotonic() < until:
            try:
                assert len(held.read(oip.Extent("a", 0, 65536), "f", ME)) == 65536
                came["read"] += 1
                held.write(oip.Extent("a", 4096, 8), b"12345678", "f", ME)
                came["written"] += 1
            except oip.BadRequest as exc:
                came["cut short"] += "cut short" in str(exc)
    finally:
        stop.set()
        shaker.join()
    assert min(came.values()) >= 50, came


@pytest.mark.parametrize("bad", ["", "/", "/a/b", "../x", "/..", "/.", "//x", "/etc/passwd", "/a\0b", "/" + "n" * 300, "/\ud800"])
def test_a_key_is_one_name_in_shared_memory(held, bad):
    with pytest.raises(oip.BadRequest, match="key: "):
        held.register("a", bad, offset=0, size_bytes=1, owner=ME)


def test_only_plain_memory_of_the_clients_own_user_is_taken(held, key, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(8))
    (SHM / f"{key[1:]}-link").symlink_to(secret)
    os.mkfifo(SHM / f"{key[1:]}-pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(SHM / f"{key[1:]}-socket"))
    for kind in ("link", "pipe", "socket"):
        with pytest.raises(oip.BadRequest, match="is not shared memory"):
            held.register("a", f"{key}-{kind}", offset=0, size_bytes=1, owner=ME)
    with pytest.raises(oip.BadRequest, match="No such file"):
        held.register("a", key, offset=0, size_bytes=1, owner=ME)
    create(key, bytes(8))
    with pytest.raises(oip.BadRequest, match="belongs to another user"):
        held.register("a", key, offset=0, size_bytes=8, owner=ME + 1)


def test_a_users_memory_is_its_own_even_against_root(held, key):
    need("root", "" if ME == 0 else "giving a file to another user needs root")
    path = create(key, bytes(8))
    os.chown(path, NOBODY, NOBODY)
    with pytest.raises(oip.BadRequest, match="belongs to another user"):
        held.register("a", key, offset=0, size_bytes=8, owner=0)
    held.register("a", key, offset=0, size_bytes=8, owner=NOBODY)
    with pytest.raises(oip.BadRequest, match="'a' is not registered"):
        held.read(oip.Extent("a", 0, 8), "f", 0)
    assert held.status(None, 0) == []
    held.unregister(None, 0)
    assert held.read(oip.Extent("a", 0, 8), "f", NOBODY) == bytes(8)


def test_memory_that_the_gateways_user_may_not_open_is_refused_with_what_to_do(key, tmp_path):
    need("root", "" if ME == 0 else "a file of another user needs root")
    create(key, bytes(8)).chmod(0o600)
    program = """
import sys
from edge_agent.gateway.regions import Regions
try:
    Regions(most_bytes=100).register("a", sys.argv[1], offset=0, size_bytes=8, owner=0)
except ValueError as exc:
    print(exc)
"""
    said = run_as_nobody(program, key, folder=tmp_path)
    assert "closed to the gateway's user, who must be let read and write it" in said


def test_a_file_system_that_was_mounted_over_the_memory_is_not_touched(held, key, tmp_path):
    need("root", "" if ME == 0 else "mounting needs root")
    path = create(key, bytes(8))
    over = tmp_path / "over"
    over.write_bytes(bytes(8))
    mounted = subprocess.run(["mount", "--bind", str(over), str(path)], capture_output=True, text=True, check=False)
    need("bind mounts", mounted.stderr.strip())
    try:
        with pytest.raises(oip.BadRequest, match="is not shared memory"):
            held.register("a", key, offset=0, size_bytes=8, owner=ME)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"name": ""}, "region: a name has 1 to"),
        ({"name": "n" * 513}, "region: a name has 1 to"),
        ({"offset": -1}, "not an extent"),
        ({"size_bytes": 0}, "not an extent"),
        ({"size_bytes": 101}, "has 100 bytes, the region would reach to 101"),
        ({"offset": 2**70}, "has 100 bytes"),
        ({"size_bytes": MIB + 1}, f"more than the {MIB}"),
    ],
)
def test_a_registration_that_can_not_be_is_refused(held, key, changes, complaint):
    create(key, bytes(100))
    with pytest.raises(oip.BadRequest, match=complaint):
        held.register(**{"name": "a", "key": key, "offset": 0, "size_bytes": 10, "owner": ME, **changes})
    assert held.status(None, ME) == []


def test_one_user_can_not_take_all_the_room_and_what_was_left_behind_makes_room(held, key):
    need("root", "" if ME == 0 else "files of three users need root")
    left, kept, mine = (create(f"{key}-{name}", bytes(8)) for name in ("left", "kept", "mine"))
    for number in range(regions.MOST_OF_ONE_OWNER):
        held.register(f"{number}", f"/{(left if number % 2 else kept).name}", offset=0, size_bytes=8, owner=ME)
    with pytest.raises(oip.BadRequest, match="128 regions registered, which is the most"):
        held.register("more", f"/{left.name}", offset=0, size_bytes=8, owner=ME)
    os.chown(mine, NOBODY, NOBODY)
    held.register("mine", f"/{mine.name}", offset=0, size_bytes=8, owner=NOBODY)
    for number in range(regions.MOST_OF_ONE_OWNER - 1):
        held.register(f"{number}", f"/{mine.name}", offset=0, size_bytes=8, owner=NOBODY)
    os.chown(kept, 1, 1)
    with pytest.raises(oip.BadRequest, match="256 regions are registered, which is the most"):
        held.register("a", f"/{kept.name}", offset=0, size_bytes=8, owner=1)
    left.unlink()
    held.register("a", f"/{kept.name}", offset=0, size_bytes=8, owner=1)
    assert len(held.status(None, ME)) == regions.MOST_OF_ONE_OWNER / 2


def test_a_request_reads_no_more_from_regions_than_a_body_may_have(held, key):
    create(key, bytes(MIB))
    held.register("a", key, offset=0, size_bytes=MIB, owner=ME)
    half = {"shared_memory_region": "a", "shared_memory_byte_size": MIB // 2}
    items = [{"name": f"x{i}", "shape": [MIB // 2], "datatype": "UINT8", "parameters": half} for i in range(3)]
    body = oip.msgspec.json.encode({"inputs": items})
    with pytest.raises(oip.BadRequest, match=rf"inputs\[2\].*may read {MIB} bytes"):
        oip.parse_infer(body, None, regions=held.reader(ME))


HOSTS = {"127.0.0.1": "127.0.0.1", "::1": "::1", "127.0.0.3": "127.0.0.3"}


@pytest.mark.parametrize("host", HOSTS)
def test_the_user_at_the_other_end_of_a_connection_on_this_machine_is_known(host):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        try:
            listener.bind((host, 0))
        except OSError as exc:
            need(f"address {host}", str(exc))
        listener.listen()
        port = listener.getsockname()[1]
        with socket.create_connection((host, port)), listener.accept()[0] as accepted:
            peer = accepted.getpeername()
            assert uid_of_loopback_peer(port, peer[0], peer[1]) == ME
            assert uid_of_loopback_peer(port + 1, peer[0], peer[1]) is None
        assert uid_of_loopback_peer(port, peer[0], peer[1]) is None, "a connection that has ended is nobody's"


def test_another_users_connection_is_known_by_that_user(tmp_path):
    need("root", "" if ME == 0 else "a client of another user needs root")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        found = []

        def serve() -> None:
            accepted, peer = listener.accept()
            with accepted:
                found.append(uid_of_loopback_peer(port, *peer))
                accepted.sendall(b"x")

        server = threading.Thread(target=serve)
        server.start()
        run_as_nobody("import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[1]))).recv(1)", str(port), folder=tmp_path)
        server.join()
    assert found == [NOBODY]


HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def line(local: str, remote: str, *, state: str = "01", uid: str = "1000", inode: str = "77") -> str:
    counters = "00000000:00000000 00:00000000 00000000"
    return f"   0: {local} {remote} {state} {counters} {uid:>5}        0 {inode} 1 0000000000000000 20 4 30 10 -1\n"


@pytest.mark.skipif(sys.byteorder == "big", reason="the tables below were written on a little-endian machine")
@pytest.mark.parametrize(
    ("tcp", "tcp6", "uid"),
    [
        (line("0100007F:D744", "0100007F:1F90"), "", 1000),
        ("", line("0000000000000000FFFF00000100007F:D744", "0000000000000000FFFF00000100007F:1F90"), 1000),
        (line("0100007F:D744", "0100007F:1F90", state="06", uid="0", inode="0"), "", None),
        (line("0100007F:D744", "0100007F:1F90", state="04", uid="0"), "", None),
        (line("0100007F:D744", "0100007F:1F90", inode="0"), "", None),
        (line("0100007F:D744", "0100007F:1F91"), "", None),
        (line("0100007F:1F90", "0100007F:D744", uid="5"), "", None),
        (line("0100007F:D744", "0100007F:1F90", uid="x"), "", None),
        (line("0100007F:D744", "0100007F:1F90") + line("0100007F:D744", "0200007F:1F90", uid="1001"), "", None),
        ("0100007F:D744\n\n\0\xff garbage 0100007F:D744 0100007F:1F90 01\n", "", None),
        (None, None, None),
    ],
)
def test_the_kernels_table_is_read_with_suspicion(tmp_path, tcp, tcp6, uid):
    for name, rows in (("tcp", tcp), ("tcp6", tcp6)):
        if rows is not None:
            (tmp_path / name).write_text(HEAD + rows)
    assert uid_of_loopback_peer(0x1F90, "127.0.0.1", 0xD744, tables=tmp_path) == uid
    assert uid_of_loopback_peer(0x1F90, "::ffff:127.0.0.1", 0xD744, tables=tmp_path) == uid


@pytest.mark.parametrize("host", ["10.0.0.1", "::ffff:10.0.0.1", "fe80::1%eth0", "localhost", ""])
def test_whoever_comes_from_another_machine_has_no_user_here(host):
    assert uid_of_loopback_peer(1, host, 2) is None
