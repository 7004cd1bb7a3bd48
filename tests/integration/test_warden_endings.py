"""Sandboxes that end: what is said of it, when they are tried again, when no more; and what each runs as."""

import os
import signal
from pathlib import Path

import msgspec
import pytest

from edge_agent.warden.drivers.fake import OUT_OF_MEMORY, FakeDriver
from edge_agent.warden.slots import RUN_MAX_ENTRIES
from skerry.wire.messages import WarmupTensor
from tests.conftest import need
from tests.integration.box import MIB, Box, bubblewrap, groups_of, scaling_file

CLOCK_STEP_S = 0.002
"""Times in the journal are whole milliseconds."""


def waits_s(box: Box) -> list[float]:
    """From each ending to the start that followed it."""
    ends, starts = box.entries("replica.ended"), box.entries("replica.started")[1:]
    return [(start.at_ms - end.at_ms) / 1000 for end, start in zip(ends, starts, strict=True)]


async def killed(box: Box, name: str, reason: str) -> None:
    """End a replica that is ready, and wait until the warden has seen it."""
    await box.until_ready(name)
    before = len(box.entries("replica.ended", "replica.crash_loop"))
    box.world.kill(box.report(name).sandbox, reason)
    await box.until_noticed(lambda: len(box.entries("replica.ended", "replica.crash_loop")) > before)


def worker_of(box: Box) -> int:
    """The pid, on this machine, of the one bubblewrapped worker."""
    (handle,) = box.config.state_dir.glob("bubblewrap/*/handle.json")
    init = msgspec.json.decode(handle.read_bytes())["pid"]
    return int(Path(f"/proc/{init}/task/{init}/children").read_text())


def test_after_one_ending_the_next_try_is_at_once_then_each_is_waited_for_twice_as_long_and_one_too_many_ends_it(folder):
    box = Box(folder, crash_loop_after=6, restart_first_s=0.1)

    async def scene():
        async with box.up():
            await box.want(box.spec())
            for endings in range(5):
                await killed(box, "d-0", f"fell over, {endings}")
                assert box.report().restarts == endings + 1
            await killed(box, "d-0", "fell over once more")
            at_once_s, *waits = waits_s(box)
            assert at_once_s <= 0.5
            for wait_s, ceiling_s in zip(waits, [0.2, 0.4, 0.8, 1.0], strict=True):
                assert ceiling_s / 2 - CLOCK_STEP_S <= wait_s <= ceiling_s * 5
            (said,) = box.entries("replica.crash_loop")
            assert said.text == "fell over once more; not tried again until it changes\nfell over once more"
            assert (box.report().phase, box.report().is_crash_loop, box.report().reason) == ("failed", True, "fell over once more")
            await box.looked(5)
            assert box.running == {}
            assert box.routes().routes[0].replicas == []
            assert len(box.entries("replica.crash_loop")) == 1

    box.play(scene)


def test_how_often_a_replica_ended_survives_the_warden(folder):
    box = Box(folder, crash_loop_after=3)

    async def scene():
        for restarts in (1, 2):
            async with box.up():
                if restarts == 1:
                    await box.want(box.spec())
                await killed(box, "d-0", "fell over")
                await box.until_ready()
                assert box.report().restarts == restarts
        async with box.up():
            await killed(box, "d-0", "fell over for good")
            assert box.report().is_crash_loop
        async with box.up():
            await box.until(lambda: (report := box.report()) and report.is_crash_loop)
            assert box.report().reason == "fell over for good"
            await box.want()
            await box.until(lambda: box.report() is None and box.slots.all() == {} and box.world.sandboxes == {})

    box.play(scene)


def test_a_replica_that_ended_while_no_warden_ran_is_started_again_after_its_back_off(folder):
    box = Box(folder)

    async def scene():
        async with box.up():
            await box.want(box.spec())
            await box.until_ready()
        (name,) = box.running
        box.world.kill(name, "nobody saw it")
        async with box.up():
            await box.until_ready()
            assert box.report().restarts == 1
            assert [entry.text.partition(";")[0] for entry in box.entries("replica.ended")] == ["nobody saw it"]

    box.play(scene)


@pytest.mark.usefixtures("needs_bubblewrap")
def test_a_real_worker_that_is_killed_again_and_again_is_given_up_with_the_signal_as_the_reason(folder):
    box = Box(folder, bubblewrap, crash_loop_after=3)

    async def scene():
        async with box.up():
            await box.want(box.spec(content=scaling_file(10)))
            for endings in range(3):
                await box.until_ready()
                os.kill(worker_of(box), signal.SIGKILL)
                await box.until_noticed(lambda n=endings: len(box.entries("replica.ended", "replica.crash_loop")) > n)
            assert [e.text.partition(";")[0] for e in box.entries("replica.ended")] == ["killed by signal 9"] * 2
            assert (box.report().reason, box.report().is_crash_loop) == ("killed by signal 9", True)

    box.play(scene)


@pytest.mark.usefixtures("needs_bubblewrap")
def test_the_last_lines_of_what_a_real_worker_wrote_are_in_the_event(folder):
    box = Box(folder, bubblewrap, crash_loop_after=4)

    async def scene():
        async with box.up():
            warmup = [WarmupTensor("no_such_input", [1, 3])]
            await box.want(box.spec(content=scaling_file(10), warmup=warmup))
            await box.until(lambda: (report := box.report()) and report.is_crash_loop)
            ended, given_up = box.entries("replica.ended", "replica.crash_loop")
            for entry in (ended, given_up):
                assert entry.text.splitlines()[-1].startswith("load failed: ")
                assert "no_such_input" in entry.text

    box.play(scene)


# -- what held them


@pytest.mark.usefixtures("needs_bubblewrap")
def test_a_real_worker_that_takes_more_memory_than_it_may_is_contained_and_said_by_name(folder):
    box = Box(folder, bubblewrap, crash_loop_after=2)

    async def scene():
        (driver,) = bubblewrap(box)
        need("control groups", "" if driver.limits != "rlimits" else "the warden may make none here")
        async with box.up():
            greedy = [WarmupTensor("x", [30_000_000, 3], 1.0)]
            await box.want(box.spec(content=scaling_file(10), warmup=greedy))
            await box.until(lambda: (report := box.report()) and report.is_crash_loop)
            assert [(e.subject, e.text) for e in box.entries("sandbox.contained")] == [("d-0", "killed: out of memory")] * 2
            assert box.report().reason == "killed: out of memory"
            assert box.report().limits == driver.limits

    box.play(scene)


@pytest.mark.usefixtures("needs_bubblewrap")
def test_a_signal_for_a_refused_system_call_is_contained_and_said_by_name(folder):
    box = Box(folder, bubblewrap, crash_loop_after=1)

    async def scene():
        async with box.up():
            await box.want(box.spec(content=scaling_file(10)))
            await box.until_ready()
            os.kill(worker_of(box), signal.SIGSYS)
            await box.until_noticed(lambda: box.report().is_crash_loop)
            (entry,) = box.entries("sandbox.contained")
            assert entry.subject == "d-0"
            assert "SIGSYS" in entry.text

    box.play(scene)


def test_a_fake_that_runs_out_of_memory_is_contained_and_tried_again(folder):
    box = Box(folder)

    async def scene():
        async with box.up():
            await box.want(box.spec())
            await killed(box, "d-0", OUT_OF_MEMORY)
            await box.until_ready()
            assert [(e.subject, e.text) for e in box.entries("sandbox.contained")] == [("d-0", "killed: out of memory")]

    box.play(scene)


@pytest.mark.parametrize("how", ["many small files", "folders in folders", "one large file"])
def test_a_sandbox_that_fills_its_socket_directory_is_ended_and_started_anew(folder, how):
    box = Box(folder)

    async def scene():
        async with box.up():
            await box.want(box.spec())
            await box.until_ready()
            old = box.report().sandbox
            place = box.slots.socket_dir(old)
            match how:
                case "many small files":
                    for number in range(RUN_MAX_ENTRIES + 1):
                        (place / str(number)).touch()
                case "folders in folders":
                    place.joinpath(*"x" * (RUN_MAX_ENTRIES + 1)).mkdir(parents=True)
                case _:
                    (place / "large").write_bytes(bytes(5 * MIB))
            await box.until_noticed(lambda: box.entries("sandbox.contained") and box.report().sandbox != old)
            await box.until_ready()
            (entry,) = box.entries("sandbox.contained")
            assert entry.subject == "d-0"
            assert "socket directory" in entry.text
            assert not place.exists()

    box.play(scene)


def test_one_that_is_never_ready_is_ended_when_its_time_is_over(folder):
    box = Box(folder, start_timeout_s=1.0, crash_loop_after=2)

    async def scene():
        box.world.start_delay_s = 3600
        async with box.up():
            await box.want(box.spec())
            await box.until(lambda: (report := box.report()) and report.is_crash_loop)
            assert box.report().reason == "not ready within 1 s"
            await box.until(lambda: box.running == {})
            for started, ended in zip(box.entries("replica.started"), box.entries("replica.ended", "replica.crash_loop"), strict=True):
                assert ended.at_ms - started.at_ms >= 1000 - 1000 * CLOCK_STEP_S

    box.play(scene)


# -- a reboot


def test_after_a_reboot_all_that_is_wanted_is_started_at_once_and_no_failure_is_counted(folder):
    box = Box(folder, restart_first_s=60, restart_most_s=3600, warm_most=1)

    async def scene():
        async with box.up():
            await box.want(box.spec("a-0"), box.spec("b-0"), box.spec("c-0"))
            await box.until_ready()
            await box.until(box.warm)
            old = set(box.world.sandboxes)
            lost = box.report("c-0").sandbox
        box.lose_power()
        del box.world.sandboxes[lost]  # one that nothing was left of
        async with box.up():
            await box.until_ready()
            assert [box.report(name).restarts for name in ("a-0", "b-0", "c-0")] == [0, 0, 0]
            assert box.entries("replica.ended", "replica.crash_loop", "sandbox.orphan_removed") == []
            await box.until(lambda: not old & {*box.world.sandboxes, *box.slots.all()})
            assert {slot.boot_id for slot in box.slots.all().values()} == {box.slots.boot_id}

    box.play(scene)


def test_a_reboot_does_not_undo_that_a_replica_was_given_up(folder):
    box = Box(folder, crash_loop_after=1)

    async def scene():
        async with box.up():
            await box.want(box.spec())
            await killed(box, "d-0", "fell over")
            assert box.report().is_crash_loop
        box.lose_power()
        async with box.up():
            await box.until(lambda: (report := box.report()) and report.is_crash_loop)
            await box.looked(5)
            assert len(box.entries("replica.started")) == 1

    box.play(scene)


# -- what each runs as, and on


def test_no_two_sandboxes_share_a_user_id_also_not_over_a_restart_and_a_freed_one_is_used_again(folder):
    box = Box(folder, uid_first=200_000, warm_most=1)

    def uids() -> dict[str, int]:
        return {name: sandbox.spec.uid for name, sandbox in box.world.sandboxes.items()}

    async def scene():
        names = ["a-0", "b-0", "c-0"]
        async with box.up(), box.sampling(uids) as samples:
            await box.want(*(box.spec(name) for name in names))
            await box.until_ready()
            await box.until(box.warm)
            for name in names:
                await box.want(*(box.spec(other) for other in names if other != name))
                await box.until(lambda name=name: box.report(name) is None)
                await box.want(*(box.spec(other) for other in names))
                await box.until_ready()
            await box.want(*(box.spec(name, version=2) for name in names))
            await box.until_ready()
            await box.until(lambda: len(box.running) == 4 and box.warm())
        before = uids()
        async with box.up(), box.sampling(uids) as more:
            await box.until_ready()
            assert {name: uid for name, uid in uids().items() if name in before} == before
            await box.want(*(box.spec(name, version=2) for name in [*names, "d-0"]))
            await box.until_ready()
        for sample in [*samples, *more]:
            assert len(set(sample.values())) == len(sample), sample
            assert set(sample.values()) <= set(range(200_000, 200_008)), "freed ones are not used again"

    box.play(scene)


def test_each_replica_gets_the_isolation_that_it_asks_for_or_says_what_there_is(folder):
    def drivers(box: Box) -> list[FakeDriver]:
        return [FakeDriver(box.world), FakeDriver(box.world, rung="container")]

    box = Box(folder, drivers, crash_loop_after=2)

    async def scene():
        async with box.up():
            await box.want(
                box.spec("any-0"), box.spec("box-0", isolation_at_least="container"), box.spec("vm-0", isolation_at_least="microvm")
            )
            await box.until_ready("any-0", "box-0")
            await box.until(lambda: (report := box.report("vm-0")) and report.phase == "failed" and report.is_crash_loop)
            assert [(r.driver, r.rung, r.limits) for r in map(box.report, ("any-0", "box-0"))] == [
                ("fake", "process", "none"),
                ("fake", "container", "none"),
            ]
            report = box.report("vm-0")
            assert report.reason == "isolation.at_least: microvm is asked for; this box offers process, container"
            assert (report.driver, report.rung, report.limits) == ("", None, "")

    box.play(scene)


@pytest.mark.usefixtures("needs_bubblewrap")
def test_a_real_replica_says_its_driver_rung_and_limits(folder):
    box = Box(folder, bubblewrap)

    async def scene():
        async with box.up():
            await box.want(box.spec(content=scaling_file(10)))
            await box.until_ready()
            (driver,) = bubblewrap(box)
            assert (box.report().driver, box.report().rung, box.report().limits) == ("bubblewrap", "process", driver.limits)
            assert bool(groups_of(folder)) == (driver.limits != "rlimits")
            assert box.report().provider == "CPUExecutionProvider"
            uid = Path(f"/proc/{worker_of(box)}").stat().st_uid
            assert uid == (box.config.uid_first if os.geteuid() == 0 else os.geteuid())

    box.play(scene)


def test_a_box_that_can_make_no_place_for_a_sandbox_says_why_and_goes_on(folder):
    box = Box(folder, crash_loop_after=2)

    async def scene():
        async with box.up():
            place = box.config.state_dir / "sandboxes"
            place.rmdir()
            await box.want(box.spec())
            await box.until(lambda: (report := box.report()) and report.is_crash_loop)
            assert "No such file or directory" in box.report().reason
            place.mkdir()
            await box.want(box.spec(generation=2))
            await box.until_ready()

    box.play(scene)


def test_a_driver_that_is_silent_for_a_while_costs_nobody_anything(folder):
    box = Box(folder)

    async def scene():
        async with box.up():
            await box.want(box.spec())
            await box.until_ready()
            box.world.fail |= {"sandboxes", "stats"}
            await box.looked(5)
            assert box.report().phase == "ready"
            box.world.fail.clear()
            await box.looked(5)
            assert box.kinds("d-0") == ["replica.started", "replica.ready"]

    box.play(scene)
