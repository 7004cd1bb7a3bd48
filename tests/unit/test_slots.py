"""A place on disk for each sandbox: user ids that nobody shares, nothing left of what was half made, and a bound on what is put there."""

import os
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.core.crash import Attempts
from edge_agent.core.pool import Kind
from edge_agent.warden.slots import LOG_LEAST_BYTES, RUN_MAX_BYTES, RUN_MAX_ENTRIES, Slots
from skerry.wire.messages import ModelRef, ReplicaSpec
from tests.nobody import run_as_nobody

KIND = Kind("fake", 1, 1.0)
UID_FIRST = 1_879_100_000
REPLICA = ReplicaSpec("d-0", "d", 1, ModelRef("m", 1, "0" * 64, 1), memory_bytes=1, cpus=1.0)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "sandboxes"


def open_slot(slots: Slots, name: str, replica: ReplicaSpec | None = REPLICA, model=None):
    return slots.open(name, driver="fake", kind=KIND, replica=replica, model=model, attempts=Attempts())


def slots_of(root) -> Slots:
    return Slots(root, uid_first=UID_FIRST)


@given(
    st.lists(st.tuples(st.sampled_from(["open", "open", "close", "again"]), st.integers(0, 30)), max_size=60),
    st.sampled_from([1, 5, 40, 256]),
)
@settings(deadline=None, max_examples=50)
def test_the_logs_of_all_sandboxes_together_have_a_bound_that_a_restart_keeps_and_none_has_nothing(tmp_path_factory, doings, logs_mib):
    root = tmp_path_factory.mktemp("slots") / "sandboxes"

    def make() -> Slots:
        return Slots(root, uid_first=UID_FIRST, logs_bytes=logs_mib * 2**20)

    slots = make()
    for doing, number in doings:
        name = f"s{number}"
        if doing == "open" and name not in slots.all():
            assert LOG_LEAST_BYTES <= open_slot(slots, name).log_max_bytes <= 8 * 2**20
        elif doing == "close":
            slots.close(name)
        elif doing == "again":
            slots = make()
        granted = [slot.log_max_bytes for slot in slots.all().values()]
        assert sum(granted) <= logs_mib * 2**20 + LOG_LEAST_BYTES * granted.count(LOG_LEAST_BYTES)


def test_a_box_with_few_sandboxes_gives_each_the_most_and_one_with_many_less_and_less(root):
    slots = Slots(root, uid_first=UID_FIRST, logs_bytes=32 * 2**20)
    assert [open_slot(slots, f"s{number}").log_max_bytes // 2**20 for number in range(5)] == [8, 8, 8, 4, 2]


@given(st.lists(st.tuples(st.sampled_from(["open", "close", "again"]), st.sampled_from("abcdefg")), max_size=40))
@settings(deadline=None, max_examples=50)
def test_no_two_slots_ever_share_a_user_id_and_ids_are_used_again(tmp_path_factory, doings):
    root = tmp_path_factory.mktemp("slots") / "sandboxes"
    slots = slots_of(root)
    most = 0
    for doing, name in doings:
        if doing == "open":
            slots.close(name)
            open_slot(slots, name)
        elif doing == "close":
            slots.close(name)
        else:
            held = slots.all()
            slots = slots_of(root)
            assert slots.all() == held
        uids = [slot.uid for slot in slots.all().values()]
        most = max(most, len(uids))
        assert len(set(uids)) == len(uids)
        assert set(uids) <= set(range(UID_FIRST, UID_FIRST + most))
        assert {folder.name for folder in root.iterdir()} == set(slots.all())


def test_a_slot_is_open_to_its_sandbox_and_its_entry_to_the_warden_alone(root, scale_model):
    slots = slots_of(root)
    open_slot(slots, "a", model=scale_model)
    assert stat.S_IMODE(slots.socket_dir("a").stat().st_mode) == 0o1777
    assert stat.S_IMODE(slots.model_dir("a").stat().st_mode) == 0o755
    assert (slots.model_dir("a") / "model.onnx").samefile(scale_model)
    assert {entry.name for entry in (root / "a").iterdir()} == {"slot.json", "model", "run"}


def test_whose_a_slot_is_no_other_program_of_the_box_may_change_whatever_the_umask(root, scale_model):
    umask = os.umask(0o007)  # the unit's; `sandboxes` hands its group down
    try:
        slots = slots_of(root)
        open_slot(slots, "a", replica=None)
        entry = root / "a" / "slot.json"
        assert stat.S_IMODE(entry.stat().st_mode) == 0o600
        slots.claim("a", REPLICA, scale_model, Attempts())
        assert stat.S_IMODE(entry.stat().st_mode) == 0o600
    finally:
        os.umask(umask)


def test_a_warm_slot_becomes_a_replicas_and_keeps_its_user_id(root, scale_model):
    slots = slots_of(root)
    warm = open_slot(slots, "a", replica=None)
    assert warm.is_warm
    claimed = slots.claim("a", REPLICA, scale_model, Attempts(2, 1.0))
    assert (claimed.uid, claimed.replica, claimed.attempts) == (warm.uid, REPLICA, Attempts(2, 1.0))
    assert slots_of(root).all() == {"a": claimed}


@pytest.mark.parametrize("left", ["nothing", "no entry", "a half-written entry", "an entry beside", "a file in the place of a slot"])
def test_what_was_cut_off_while_it_was_made_is_erased(root, left):
    slots = slots_of(root)
    kept = open_slot(slots, "kept")
    folder = root / "half"
    if left == "a file in the place of a slot":
        folder.write_text("x")
    else:
        folder.mkdir()
    if left not in ("nothing", "a file in the place of a slot"):
        (folder / "run").mkdir()
        (folder / "run" / "worker.sock").touch()
    if left == "a half-written entry":
        (folder / "slot.json").write_bytes((root / "kept" / "slot.json").read_bytes()[:-5])
    if left == "an entry beside":
        (folder / "slot.json.new").write_bytes((root / "kept" / "slot.json").read_bytes())
    assert slots_of(root).all() == {"kept": kept}
    assert [entry.name for entry in root.iterdir()] == ["kept"]


def test_a_slot_can_be_opened_over_what_was_left_under_its_name(root):
    slots = slots_of(root)
    (root / "a" / "run").mkdir(parents=True)
    (root / "a" / "run" / "old").touch()
    open_slot(slots, "a")
    assert list(slots.socket_dir("a").iterdir()) == []


def test_giving_up_is_remembered_over_a_restart(root):
    slots = slots_of(root)
    open_slot(slots, "a")
    slots.give_up("a", "it crashed 5 times")
    assert slots_of(root).all()["a"].given_up == "it crashed 5 times"


def put(path, size_bytes: int) -> None:
    path.write_bytes(b"x" * size_bytes)


@pytest.fixture
def run(root):
    """The socket directory of an open slot, with what belongs there."""
    slots = slots_of(root)
    open_slot(slots, "a")
    put(slots.socket_dir("a") / "worker.sock", 0)
    return slots.socket_dir("a")


def overfull(run) -> str:
    return slots_of(run.parent.parent).overfull("a")


def test_a_directory_with_its_sockets_is_not_overfull(run):
    put(run / "log", RUN_MAX_BYTES // 2)
    assert overfull(run) == ""


def test_one_that_is_absent_is_not_overfull(root):
    assert slots_of(root).overfull("nobody") == ""


def test_too_much_in_one_file_is_seen(run):
    put(run / "big", RUN_MAX_BYTES + 1)
    assert "filled its socket directory" in overfull(run)


def test_a_large_file_that_is_a_hole_fills_nothing(run):
    with (run / "hole").open("wb") as file:
        file.truncate(RUN_MAX_BYTES * 100)
    assert overfull(run) == ""


def test_too_much_in_many_files_of_many_directories_is_seen(run):
    for number in range(10):
        (run / f"d{number}" / "deeper").mkdir(parents=True)
        put(run / f"d{number}" / "deeper" / "file", RUN_MAX_BYTES // 9)
    assert "filled its socket directory" in overfull(run)


@pytest.mark.parametrize("kind", ["files", "folders", "links"])
def test_too_many_entries_are_seen(run, kind):
    for number in range(RUN_MAX_ENTRIES):
        entry = run / f"e{number}"
        match kind:
            case "files":
                entry.touch()
            case "folders":
                entry.mkdir()
            case _:
                entry.symlink_to("/")
        assert (overfull(run) != "") == (number + 2 > RUN_MAX_ENTRIES)


def nest(folder, depth: int) -> None:
    """Directories in each other, deeper than a path can be written."""
    here = os.open(folder, os.O_PATH)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_PATH, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def test_directories_within_directories_are_seen_and_erased_however_deep(run, root):
    nest(run, 5000)
    assert "filled its socket directory" in overfull(run)
    slots_of(root).close("a")
    assert list(root.iterdir()) == []


def test_a_folder_half_erased_with_directories_in_each_other_is_erased_at_the_next_start(run, root):
    nest(run, 1500)
    (root / "a" / "slot.json").unlink()
    assert slots_of(root).all() == {}
    assert list(root.iterdir()) == []


def test_erasing_leaves_alone_what_links_point_to(run, root, tmp_path):
    (tmp_path / "elsewhere" / "folder").mkdir(parents=True)
    put(tmp_path / "elsewhere" / "file", 3)
    (run / "folder").symlink_to(tmp_path / "elsewhere")
    (run / "file").symlink_to(tmp_path / "elsewhere" / "file")
    (run / "d").mkdir()
    (run / "d" / "folder").symlink_to(tmp_path / "elsewhere" / "folder")
    slots_of(root).close("a")
    assert list(root.iterdir()) == []
    assert (tmp_path / "elsewhere" / "file").read_text() == "xxx"
    assert (tmp_path / "elsewhere" / "folder").is_dir()


AS_THE_WARDENS_OWN_USER = """
import os, sys
from pathlib import Path
from edge_agent.core.crash import Attempts
from edge_agent.core.pool import Kind
from edge_agent.warden.slots import Slots
root, mode, where = Path(sys.argv[1]) / "sandboxes", int(sys.argv[2], 8), sys.argv[3]
slots = Slots(root, uid_first=1)
slots.open("a", driver="fake", kind=Kind("fake", 1, 1.0), replica=None, model=None, attempts=Attempts())
closed = slots.socket_dir("a") / where
closed.mkdir(exist_ok=True)
(closed / "big").write_bytes(b"x" * 5 * 2**20)
(closed / "deeper" / "still").mkdir(parents=True)
closed.chmod(mode)
print(slots.overfull("a"))
slots.close("a")
print([entry.name for entry in root.iterdir()])
"""
"""An ordinary user's sandbox is that user to the host: it may close what it filled."""


@pytest.mark.parametrize("where", [".", "d"])
@pytest.mark.parametrize("mode", ["000", "300", "600", "100"])
def test_what_a_sandbox_closes_to_the_warden_is_seen_and_erased(tmp_path, mode, where):
    said, left = run_as_nobody(AS_THE_WARDENS_OWN_USER, tmp_path, mode, where, folder=tmp_path).splitlines()
    assert "socket directory" in said
    assert left == "[]"


def test_a_link_to_a_full_directory_elsewhere_fills_nothing(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    put(tmp_path / "elsewhere" / "big", RUN_MAX_BYTES * 2)
    (run / "link").symlink_to(tmp_path / "elsewhere")
    (run / "file link").symlink_to(tmp_path / "elsewhere" / "big")
    assert overfull(run) == ""


def test_names_that_are_no_text_are_counted_and_erased(run, root):
    for number in range(RUN_MAX_ENTRIES):
        os.close(os.open(os.fsencode(run) + b"/\xff%d" % number, os.O_CREAT))
    assert "filled its socket directory" in overfull(run)
    slots_of(root).close("a")
    assert list(root.iterdir()) == []
