"""What holds memory, processors and processes, tried on this machine's own kernel; bombs carry their own bounds."""

import subprocess
import sys
import textwrap
import time
import uuid
from pathlib import Path

import pytest

from edge_agent.warden.drivers import cgroup
from edge_agent.warden.drivers.cgroup import Cgroups, CgroupV1, CgroupV2, Counters
from tests.conftest import need
from tests.nobody import run_as_nobody

MIB = 2**20
TIMEOUT_S = 30


@pytest.fixture
def owner():
    return f"test-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def groups(owner):
    found = cgroup.find(owner)
    need("cgroups version 1", "" if isinstance(found, CgroupV1) else f"this process may use {found.kind if found else 'none'}")
    yield found
    wait_removed(found, *found.names())


def wait_removed(groups: Cgroups, *names: str) -> None:
    """A group is empty a moment after its processes have ended."""
    deadline = time.monotonic() + TIMEOUT_S
    for name in names:
        while groups.remove(name) or groups.counters(name) is not None:
            assert time.monotonic() < deadline, f"{name} is still busy"
            time.sleep(0.01)


def command_in(procs: list[Path], program: str) -> list[str]:
    """A program that puts itself into the groups before it begins."""
    joined = f"import pathlib\nfor file in {[*map(str, procs)]}: pathlib.Path(file).write_text('0')\n"
    return [sys.executable, "-I", "-S", "-c", joined + textwrap.dedent(program)]


def run_in(procs: list[Path], program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command_in(procs, program), capture_output=True, text=True, check=False, timeout=TIMEOUT_S)


def folders_of(owner: str) -> list[Path]:
    """What is left in any hierarchy; a folder that is gone took what was below it along."""
    return [folder for mount in Path("/sys/fs/cgroup").iterdir() if (folder := mount / f"skerry-{owner}").exists()]


MEMORY_BOMB = """
held = []
for _ in range(256):  # MiB: the bomb's own bound
    held.append(b"x" * 2**20)
print("survived")
"""
FORK_BOMB = """
import os, time
children, refused = [], 0
for _ in range(40):  # the bomb's own bound
    try:
        child = os.fork()
    except OSError:
        refused += 1
        continue
    if child == 0:
        time.sleep(20)
        os._exit(0)
    children.append(child)
print(len(children), refused)
for child in children:
    os.kill(child, 9)
    os.waitpid(child, 0)
"""


def test_more_memory_than_a_group_may_have_ends_the_process_and_is_counted(groups):
    ran = run_in(groups.create("a", memory_bytes=48 * MIB, cpus=1.0, pids_max=16), MEMORY_BOMB)
    assert (ran.returncode, ran.stdout) == (-9, "")
    assert groups.counters("a").oom_kills >= 1


def test_less_memory_than_a_group_may_have_is_none_of_its_business(groups):
    ran = run_in(groups.create("a", memory_bytes=512 * MIB, cpus=1.0, pids_max=16), MEMORY_BOMB)
    assert (ran.returncode, ran.stdout) == (0, "survived\n")
    assert groups.counters("a").oom_kills == 0


def test_more_processes_than_a_group_may_have_are_refused_and_counted(groups):
    ran = run_in(groups.create("a", memory_bytes=256 * MIB, cpus=1.0, pids_max=12), FORK_BOMB)
    assert ran.returncode == 0, ran.stderr
    made, refused = map(int, ran.stdout.split())
    assert (made, refused) == (11, 29)  # the bomb itself is the twelfth
    assert groups.counters("a").pids_refused == 29


def test_a_group_gets_no_more_of_the_processors_than_its_share(groups):
    busy = """
        import time
        end, begin = time.monotonic() + 1.0, time.process_time()
        while time.monotonic() < end:
            pass
        print(time.process_time() - begin)
    """
    ran = run_in(groups.create("a", memory_bytes=256 * MIB, cpus=0.05, pids_max=16), busy)
    used_s = float(ran.stdout)
    assert used_s < 0.05 * 2
    assert used_s <= groups.counters("a").cpu_seconds < used_s + 0.5  # the interpreter's start besides


def test_the_memory_in_use_is_counted_and_the_cache_that_can_be_taken_back_is_not(groups, tmp_path):
    program = f"""
        import os
        held = b"x" * (64 * 2**20)
        with open({str(tmp_path / "file")!r}, "wb") as file:
            for _ in range(64):
                file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
        memory = open("/proc/self/cgroup").read()
        root = "/sys/fs/cgroup/memory" + next(line.split(":")[2] for line in memory.splitlines() if ":memory:" in line)
        print(open(root + "/memory.usage_in_bytes").read())
        import time
        print(flush=True)
        time.sleep(20)
    """
    procs = groups.create("a", memory_bytes=512 * MIB, cpus=1.0, pids_max=16)
    with subprocess.Popen(command_in(procs, program), stdout=subprocess.PIPE, text=True) as process:
        raw_bytes = int(process.stdout.readline())
        counted_bytes = groups.counters("a").memory_bytes
        process.kill()
    assert raw_bytes > 128 * MIB
    assert 64 * MIB < counted_bytes < 112 * MIB


def test_a_group_whose_processes_live_is_left_and_one_that_is_empty_leaves_nothing(groups, owner):
    procs = groups.create("a", memory_bytes=64 * MIB, cpus=1.0, pids_max=16)
    groups.create("b", memory_bytes=64 * MIB, cpus=1.0, pids_max=16)
    sleeper = subprocess.Popen(["sleep", "30"])
    with sleeper:
        for file in procs:
            file.write_text(str(sleeper.pid))
        groups.remove("a")
        assert groups.names() == {"a", "b"}
        assert str(sleeper.pid) in procs[0].read_text().split()
        wait_removed(groups, "b")
        assert groups.names() == {"a"}
        sleeper.kill()
    wait_removed(groups, "a")
    assert groups.names() == set()
    assert folders_of(owner) == []


def test_removing_and_counting_what_is_not_there_is_nothing(groups, owner):
    groups.remove("nobody")
    assert groups.counters("nobody") is None
    assert groups.names() == set()


@pytest.mark.parametrize(("first", "second"), [(64, 256), (256, 64)])
def test_a_group_that_is_left_from_before_takes_the_limits_of_its_new_sandbox(groups, first, second):
    groups.create("a", memory_bytes=first * MIB, cpus=1.0, pids_max=4)
    procs = groups.create("a", memory_bytes=second * MIB, cpus=0.5, pids_max=16)
    (memory,) = [file.parent for file in procs if (file.parent / "memory.limit_in_bytes").exists()]
    assert int((memory / "memory.limit_in_bytes").read_text()) == second * MIB
    assert int((memory / "memory.memsw.limit_in_bytes").read_text()) == second * MIB


def test_trying_out_what_may_be_used_leaves_nothing(owner):
    cgroup.find(owner)
    assert folders_of(owner) == []


# -- version 2


@pytest.fixture
def unified(owner):
    """A group of a real version 2 hierarchy, whatever controllers it has."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    mount = next((Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"), None)
    need("a cgroup2 mount", "" if mount is not None else "none is mounted")
    base = mount / f"skerry-{owner}"
    try:
        base.mkdir()
    except OSError as exc:
        need("root", f"no group can be made below {mount}: {exc.strerror}")
    yield base
    for folder in [*base.iterdir(), base]:
        if folder.is_dir():
            folder.rmdir()


def test_version_2_without_the_controllers_is_an_error_and_not_a_group_without_limits(unified):
    if "memory" in (unified / "cgroup.subtree_control").read_text():
        pytest.skip("the controllers are handed down here")
    with pytest.raises(OSError, match=r"memory\.max"):
        CgroupV2(unified).create("a", memory_bytes=64 * MIB, cpus=1.0, pids_max=16)


def test_version_2_counts_lists_and_removes_a_real_group_once_it_is_empty(unified):
    groups = CgroupV2(unified)
    (unified / "a").mkdir()
    ran = run_in([unified / "a" / "cgroup.procs"], "import time\nwhile time.process_time() < 0.2: pass")
    assert ran.returncode == 0, ran.stderr
    assert 0.1 < groups.counters("a").cpu_seconds < 5
    assert groups.names() == {"a"}
    with subprocess.Popen(["sleep", "30"]) as sleeper:
        (unified / "a" / "cgroup.procs").write_text(str(sleeper.pid))
        groups.remove("a")
        assert groups.names() == {"a"}
        sleeper.kill()
    wait_removed(groups, "a")
    assert (groups.names(), groups.counters("a")) == (set(), None)


def test_version_2_writes_and_reads_the_documented_files_tried_on_plain_files_that_imitate_them(tmp_path):
    """cgroup-v2.rst: what is written where, and in which unit; that the kernel keeps to it is not shown here."""
    groups = CgroupV2(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "memory.swap.max").write_text("max")
    procs = groups.create("a", memory_bytes=64 * MIB, cpus=0.25, pids_max=16)
    assert procs == [tmp_path / "a" / "cgroup.procs"]
    written = {file.name: file.read_text() for file in (tmp_path / "a").iterdir()}
    assert written == {
        "memory.max": str(64 * MIB),
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "pids.max": "16",
        "cpu.max": "25000 100000",
    }
    shown = {
        "memory.current": "7000\n",
        "memory.stat": "anon 1\ninactive_file 2000\nactive_file 9\n",
        "memory.events": "low 0\noom 3\noom_kill 2\noom_group_kill 1\n",
        "cpu.stat": "usage_usec 1500000\nuser_usec 1\n",
        "pids.events": "max 4\n",
    }
    for name, content in shown.items():
        (tmp_path / "a" / name).write_text(content)
    assert groups.counters("a") == Counters(memory_bytes=5000, cpu_seconds=1.5, oom_kills=2, pids_refused=4)


# -- an ordinary user

SCENE = """
import asyncio, sys, time
from pathlib import Path
from edge_agent.warden.drivers import cgroup
from edge_agent.warden.drivers.bubblewrap import BubblewrapDriver
from edge_agent.warden.ports import SandboxSpec

folder, program = Path(sys.argv[1]), sys.argv[2]

async def scene():
    driver = BubblewrapDriver(folder / "run")
    print(driver.limits, cgroup.find("test"))
    reason = await driver.probe()
    print(reason)
    if reason:
        return
    for part in ("model", "socket"):
        (folder / part).mkdir()
    await driver.start(SandboxSpec(
        name="a", argv=[sys.executable, "-I", "-S", "-c", program], model_dir=folder / "model", socket_dir=folder / "socket",
        memory_bytes=64 * 2**20, cpus=1.0, pids_max=12))
    end = time.monotonic() + 20
    while (await driver.sandboxes())[0].running and time.monotonic() < end:
        await asyncio.sleep(0.02)
    print(*(await driver.logs("a", lines=100)).lines, sep="\\n")
    await driver.stop("a", grace_s=0)

asyncio.run(scene())
"""


def said_in_a_sandbox_of_an_ordinary_user(folder: Path, program: str) -> list[str]:
    found, reason, *lines = run_as_nobody(SCENE, folder, textwrap.dedent(program), folder=folder).split("\n")
    need("an ordinary user without control groups", "" if found == "rlimits None" else f"{found} here")
    need("bubblewrap for an ordinary user", reason)
    return lines


def test_an_ordinary_user_is_held_by_resource_limits_memory_ends_at_the_limit_of_address_space(tmp_path):
    program = """
        import mmap
        held = []  # pages that are never touched: the bomb's bound is that it uses none
        try:
            for _ in range(64):
                held.append(mmap.mmap(-1, 128 * 2**20))
            print("survived")
        except OSError:
            print("refused", len(held) * 128)
    """
    (line, *_) = said_in_a_sandbox_of_an_ordinary_user(tmp_path, program)
    word, mib = line.split()
    assert word == "refused"
    assert 1024 < int(mib) <= 64 + 2048


def test_an_ordinary_user_is_held_by_resource_limits_processes_are_refused(tmp_path):
    (line, *_) = said_in_a_sandbox_of_an_ordinary_user(tmp_path, FORK_BOMB)
    made, refused = map(int, line.split())
    assert made + refused == 40
    assert 5 <= made <= 12
