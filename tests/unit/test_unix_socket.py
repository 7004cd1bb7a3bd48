"""A sandbox's socket is connected to as it lay there, not as its name says later."""

import contextlib
import os
import socket
from pathlib import Path

import pytest

from skerry.runtime.unix_socket import pinned

NAME_MAX_BYTES = 107
"""What a Unix socket's address holds (unix(7)); a path below a state directory may be longer."""


@contextlib.contextmanager
def listening(path, word: bytes):
    """A socket at ``path`` whose first caller hears ``word``. Bound by a short name: that is where the limit on paths is."""
    with socket.socket(socket.AF_UNIX) as listener:
        folder = os.open(path.parent, os.O_PATH)
        listener.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)
        listener.listen()
        listener.settimeout(5)

        def answer() -> None:
            caller, _ = listener.accept()
            with caller:
                caller.sendall(word)

        yield answer


def heard(address: str, answer) -> bytes:
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(5)
        caller.connect(address)
        answer()
        return caller.recv(10)


def test_a_socket_is_connected_to(tmp_path):
    with listening(tmp_path / "s", b"here") as answer, pinned(tmp_path / "s") as address:
        assert heard(address, answer) == b"here"


def test_a_symbolic_link_to_a_socket_is_refused(tmp_path):
    with listening(tmp_path / "real", b"secret"):
        (tmp_path / "s").symlink_to(tmp_path / "real")
        with pytest.raises(OSError, match="not a socket"), pinned(tmp_path / "s"):
            pass


@pytest.mark.parametrize("make", [lambda path: path.write_text("x"), lambda path: path.mkdir(), os.mkfifo], ids=["file", "folder", "pipe"])
def test_what_is_no_socket_is_refused_at_once(tmp_path, make):
    make(tmp_path / "s")
    with pytest.raises(OSError, match="s is not a socket"), pinned(tmp_path / "s"):
        pass


def test_what_is_absent_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError), pinned(tmp_path / "s"):
        pass


def test_one_that_is_replaced_after_it_was_pinned_is_still_the_one_that_answers(tmp_path):
    with listening(tmp_path / "s", b"first") as answer, pinned(tmp_path / "s") as address:
        (tmp_path / "s").rename(tmp_path / "moved")
        with listening(tmp_path / "s", b"second"):
            assert heard(address, answer) == b"first"


def test_a_link_put_in_its_place_after_it_was_pinned_is_not_followed(tmp_path):
    with listening(tmp_path / "other", b"other"), listening(tmp_path / "s", b"first") as answer, pinned(tmp_path / "s") as address:
        (tmp_path / "s").unlink()
        (tmp_path / "s").symlink_to(tmp_path / "other")
        assert heard(address, answer) == b"first"


def test_a_path_longer_than_an_address_holds_can_be_connected_to(tmp_path):
    folder = tmp_path / ("a" * 100) / ("b" * 100)
    folder.mkdir(parents=True)
    path = folder / "s"
    assert len(str(path)) > NAME_MAX_BYTES
    with listening(path, b"far") as answer:
        with pytest.raises(OSError, match="path too long"):
            heard(str(path), answer)
        with pinned(path) as address:
            assert len(address) < NAME_MAX_BYTES
            assert heard(address, answer) == b"far"


def test_no_descriptor_is_left_open_whether_it_was_a_socket_or_not(tmp_path):
    (tmp_path / "file").touch()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with listening(tmp_path / "s", b"x"):
        with pinned(tmp_path / "s"):
            pass
        with contextlib.suppress(OSError), pinned(tmp_path / "file"):
            pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before
