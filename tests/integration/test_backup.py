"""A backup is made while all is written to and holds what matters; nothing that is there is lost when one is restored, or can't be."""

import io
import sqlite3
import tarfile
import threading
import time
from pathlib import Path

import pytest
from sqlite_utils import Database

from coordinator.backup.archive import BackupFailed, make, restore
from coordinator.backup.sealed import Opening, Sealing
from coordinator.registry import audit, events
from coordinator.registry.migrations import STEPS, migrate
from skerry.wire.audit import GENESIS, sealed

SECRET = b"correct horse battery"
FLEET = "north"


def registry(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    migrate(connection)
    return connection


@pytest.fixture
def state(tmp_path) -> Path:
    folder = tmp_path / "coordinator"
    (folder / "ca").mkdir(parents=True)
    (folder / "models").mkdir()
    connection = registry(folder / "registry.db")
    tables = Database(connection)
    audit.append(tables, audit.Actor("ann", "password"), "deployment.accepted", "d", now_ms=1)
    tables.execute("INSERT INTO sessions VALUES ('s', 'ann', 'admin', '', 1, 99)")
    tables.execute("INSERT INTO claims VALUES ('c', 'h', '{}', '', 'edge', 1, 4000000000000, NULL, NULL, NULL)")
    connection.close()
    for name in ("ca/root.key", "ca/issuing.crt", "signing.pem", "operator.token", "models/" + "0" * 64):
        (folder / name).write_bytes(name.encode() * 100)
    (folder / "ca" / "root.key").chmod(0o600)
    (folder / "coordinator.toml").write_text("settings\n")
    (folder / "ca" / ".staging").write_text("half written\n")
    return folder


def backed_up(state: Path, **more) -> Path:
    target = state.parent / "file.backup"
    options = {"fleet": FLEET, "state_dir": state, "signer_dir": None, "with_models": True, "progress": lambda *_: None, **more}
    make(target, SECRET, **options)
    return target


def restored(file: Path, state: Path, *, secret: bytes = SECRET, fleet: str = FLEET, signer_dir: Path | None = None) -> None:
    restore(file, secret, fleet=fleet, state_dir=state, signer_dir=signer_dir, progress=lambda *_: None)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and "registry" not in path.name)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_all_comes_back_what_was_there_is_kept_and_what_may_have_been_used_up_is_ended(state):
    file, before = backed_up(state), contents(state)
    (state / "operator.token").write_text("another\n")
    (state / "later").write_text("x")
    restored(file, state)
    (kept,) = state.parent.glob("coordinator.before-*")
    assert (kept / "operator.token").read_text() == "another\n"
    del before["ca/.staging"]
    assert contents(state) == before, "and the settings that lay there"
    assert (state / "ca" / "root.key").stat().st_mode & 0o777 == 0o600
    connection = registry(state / "registry.db")
    tables = Database(connection)
    records = audit.read_after(tables, 0, limit=10).records
    assert [record.action for record in records] == ["deployment.accepted", "coordinator.restored"]
    previous = GENESIS
    for record in records:
        assert sealed(record) == record
        assert record.previous == previous
        previous = record.sha256
    assert list(tables.query("SELECT * FROM sessions")) == []
    (claim,) = tables.query("SELECT expires_at_ms FROM claims")
    assert claim["expires_at_ms"] <= time.time() * 1000
    assert [row.kind for row in events.read_events(tables)] == ["coordinator.restored"]
    connection.close()


def test_it_is_consistent_while_it_is_written_to(state):
    stop, written = threading.Event(), []

    def write() -> None:
        connection = sqlite3.connect(state / "registry.db", isolation_level=None, timeout=30)
        tables = Database(connection)
        while not stop.is_set():
            connection.execute("BEGIN IMMEDIATE")
            for _ in range(2):  # always two together
                events.add_own_event(tables, "n", "kind", "s", "x" * 2000, 1)
            connection.execute("COMMIT")
            written.append(1)
        connection.close()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        while len(written) < 50:
            time.sleep(0.01)
        before = len(written)
        file = backed_up(state)
    finally:
        stop.set()
        thread.join()
    restored(file, state)
    connection = registry(state / "registry.db")
    count = connection.execute("SELECT count(*) FROM events WHERE node = 'n'").fetchone()[0]
    connection.close()
    assert count % 2 == 0
    assert 2 * before <= count


@pytest.mark.parametrize("what", ["passphrase", "fleet", "cut", "changed", "newer", "signer", "nothing"])
def test_what_can_not_be_restored_changes_nothing_and_says_why(state, tmp_path, what):
    signer = tmp_path / "signer"
    signer.mkdir()
    (signer / "signing.pem").write_text("key\n")
    file = backed_up(state, signer_dir=signer if what == "signer" else None)
    data, options, word = file.read_bytes(), {}, ""
    match what:
        case "passphrase":
            options, word = {"secret": b"another"}, "passphrase is another one"
        case "fleet":
            options, word = {"fleet": "south"}, "of fleet 'north'"
        case "cut":
            file.write_bytes(data[:-1])
            word = "damaged"
        case "changed":
            file.write_bytes(data[:-40] + bytes([data[-40] ^ 1]) + data[-39:])
            word = "damaged"
        case "newer":
            file.write_bytes(forged({"manifest.json": manifest(len(STEPS) + 1)}))
            word = "newer than this one"
        case "signer":
            word = "--signer-dir"
        case "nothing":
            file.write_bytes(b"")
            word = "no backup"
    before = contents(tmp_path)
    with pytest.raises(BackupFailed, match=word):
        restored(file, state, **options)
    assert contents(tmp_path) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def manifest(version: int) -> bytes:
    return (
        f'{{"fleet":"{FLEET}","made_at_ms":1,"version":"9","registry_version":{version},"with_models":false,"with_signer":false}}'.encode()
    )


def forged(files: dict[str, bytes], *, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    """What somebody who knows the passphrase could make."""
    out = io.BytesIO()
    sealing = Sealing(out, SECRET, cost=2)
    with tarfile.open(fileobj=sealing, mode="w|") as tar:
        for number, (name, content) in enumerate(files.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if number and kind != tarfile.REGTYPE:
                member.type, member.linkname, member.size = kind, link, 0
            tar.addfile(member, io.BytesIO(content) if member.size else None)
    sealing.close()
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "kind", "link"),
    [
        ("../outside", tarfile.REGTYPE, ""),
        ("/etc/outside", tarfile.REGTYPE, ""),
        ("ca/../../outside", tarfile.REGTYPE, ""),
        ("a/b/c", tarfile.REGTYPE, ""),
        ("ca", tarfile.SYMTYPE, "/etc"),
        ("registry.db", tarfile.LNKTYPE, "/etc/passwd"),
        ("fifo", tarfile.FIFOTYPE, ""),
    ],
)
def test_a_name_that_leads_out_or_is_no_plain_file_is_not_unpacked(state, tmp_path, name, kind, link):
    file, before = tmp_path / "forged", contents(state)
    file.write_bytes(forged({"manifest.json": manifest(7), name: b"x"}, kind=kind, link=link))
    with pytest.raises(BackupFailed, match="which no backup does"):
        restored(file, state)
    assert contents(state) == before
    assert not (tmp_path / "outside").exists()


def test_the_signers_key_comes_back_where_it_is_said(state, tmp_path):
    signer = tmp_path / "signer"
    signer.mkdir()
    (signer / "signing.pem").write_text("key\n")
    (signer / "signer.toml").write_text("settings\n")
    file = backed_up(state, signer_dir=signer)
    (signer / "signing.pem").write_text("another\n")
    restored(file, state, signer_dir=signer)
    assert (signer / "signing.pem").read_text() == "key\n"
    assert (signer / "signer.toml").read_text() == "settings\n"
    assert not (state / "signer").exists()


def test_without_models_they_are_left_out_and_a_target_that_can_not_be_written_leaves_nothing(state, tmp_path):
    file = backed_up(state, with_models=False)
    with tarfile.open(fileobj=Opening(io.BytesIO(file.read_bytes()), SECRET), mode="r|") as tar:
        names = [member.name for member in tar]
    assert names[:2] == ["manifest.json", "registry.db"]
    assert not [name for name in names if name.startswith("models")]
    with pytest.raises(BackupFailed):
        make(
            tmp_path / "no" / "such" / "folder", SECRET, fleet=FLEET, state_dir=state, signer_dir=None, with_models=True,
            progress=lambda *_: None,
        )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coordinator", "file.backup"]
