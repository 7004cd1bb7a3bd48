"""What a warden leaves behind, and what it makes of what others left: nothing that is not wanted, and nobody else's."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_agent.core.crash import Attempts
from edge_agent.core.pool import Kind
from edge_agent.warden.drivers.docker import IMAGE, IMAGE_TAG, DockerDriver
from edge_agent.warden.drivers.host_runtime import worker_argv, worker_environment
from edge_agent.warden.journal import Journal
from edge_agent.warden.ports import Driver, SandboxSpec
from edge_agent.warden.store import Store
from skerry.wire import codec, signing
from skerry.wire.box import RouteTable
from tests.conftest import need
from tests.contract.test_drivers import absence, docker_socket
from tests.integration.box import (
    MIB,
    PATIENCE_S,
    Box,
    answer_of,
    bubblewrap,
    groups_of,
    open_descriptors,
    sandboxes_with_processes,
    scaling_file,
)


def a_sandbox(folder: Path, name: str) -> SandboxSpec:
    """A worker that waits for a model, in directories that are no slot's."""
    for part in ("model", "run"):
        (folder / name / part).mkdir(parents=True)
    (folder / name / "run").chmod(0o777)
    return SandboxSpec(
        name=name,
        argv=worker_argv(1.0),
        environment=worker_environment(1.0),
        model_dir=folder / name / "model",
        socket_dir=folder / name / "run",
        memory_bytes=256 * MIB,
        cpus=1.0,
        uid=1_879_200_000,
    )


# -- over and over again


def resident_bytes() -> int:
    """The memory of this process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_thousand_loads_and_unloads_leave_nothing_and_cost_no_memory(folder):
    box = Box(folder, drain_s=0, journal_entries=1000)

    async def scene():
        async with box.up():
            descriptors = open_descriptors()
            spec = box.spec()
            for cycle in range(1, 1001):
                await box.want(spec)
                await box.until_ready()
                await box.want()
                await box.until(lambda: box.report() is None)
                if cycle == 500:
                    halfway_bytes = resident_bytes()
            grown_bytes = resident_bytes() - halfway_bytes
            assert grown_bytes < 4 * MIB
            assert box.world.sandboxes == box.slots.all() == {}
            assert list((box.config.state_dir / "sandboxes").iterdir()) == []
            await box.until(lambda: open_descriptors() <= descriptors)
            # All of the memory is there to be given: nothing is still counted.
            await box.want(box.spec(memory_bytes=box.limits.memory_bytes))
            await box.until_ready()

    box.play(scene)


@pytest.mark.usefixtures("needs_bubblewrap")
def test_twenty_loads_and_unloads_of_a_real_worker_leave_no_process_group_mount_or_file(folder):
    box = Box(folder, bubblewrap, drain_s=0)

    async def scene():
        async with box.up():
            descriptors = open_descriptors()
            spec = box.spec(content=scaling_file(10))
            for _ in range(20):
                await box.want(spec)
                await box.until_ready()
                await box.want()
                await box.until(lambda: box.report() is None)
            assert sandboxes_with_processes(folder) == set()
            assert groups_of(folder) == set()
            assert list(box.config.state_dir.glob("bubblewrap/*")) == []
            assert list(box.config.state_dir.glob("sandboxes/*")) == []
            assert folder.name not in Path("/proc/self/mountinfo").read_text()
            assert open_descriptors() <= descriptors

    box.play(scene)


# -- what others left


def test_a_sandbox_that_nothing_is_known_of_is_left_alone_for_a_while_and_then_removed(folder):
    box = Box(folder, orphan_grace_s=0.5)

    async def scene():
        (driver,) = box._drivers(box)
        await driver.start(a_sandbox(folder, "whose-1"))
        began = time.monotonic()
        async with box.up():
            await box.want(box.spec())
            await box.until_ready()
            await box.until(lambda: "whose-1" not in box.world.sandboxes)
            assert time.monotonic() - began >= 0.5
            assert [(e.subject, e.text) for e in box.entries("sandbox.orphan_removed")] == [("whose-1", "fake")]
            assert list(box.running) == [box.report().sandbox]

    box.play(scene)


def test_an_orphan_that_cannot_be_removed_is_tried_again_and_holds_nothing_up(folder):
    box = Box(folder, orphan_grace_s=0)

    async def scene():
        (driver,) = box._drivers(box)
        await driver.start(a_sandbox(folder, "whose-1"))
        box.world.fail.add("stop")
        async with box.up():
            await box.want(box.spec())
            await box.until_ready()
            await box.looked(3)
            assert "whose-1" in box.running
            box.world.fail.clear()
            await box.until(lambda: "whose-1" not in box.world.sandboxes)

    box.play(scene)


def test_in_a_real_engine_only_what_is_ours_and_unknown_is_removed(folder):
    need("docker", absence("docker"))
    import docker

    def ours(box: Box) -> list[Driver]:
        return [DockerDriver(folder / "docker", socket=docker_socket(), owner=f"test-{folder.name}")]

    box = Box(folder, ours, orphan_grace_s=1.0, drain_s=0)
    theirs = DockerDriver(folder / "docker", socket=docker_socket(), owner=f"test-{folder.name}-other")

    async def scene():
        (driver,) = ours(box)
        with contextlib.closing(docker.APIClient(f"unix://{docker_socket()}")) as engine:
            await theirs.start(a_sandbox(folder, "theirs-1"))
            await driver.start(a_sandbox(folder, "whose-1"))
            began = time.monotonic()
            stranger = engine.create_container(f"{IMAGE}:{IMAGE_TAG}", ["/bin/true"], name=f"stranger-{folder.name}")["Id"]
            try:
                async with box.up():
                    spec = box.spec(content=scaling_file(10))
                    await box.want(spec)
                    await box.until_ready()
                    assert await answer_of(box.socket()) == (10, 20, 30)
                    await box.until(lambda: box.entries("sandbox.orphan_removed"))
                    assert time.monotonic() - began >= 1.0
                    assert [e.subject for e in box.entries("sandbox.orphan_removed")] == ["whose-1"]
                    assert [(s.name, s.running) for s in await driver.sandboxes()] == [(box.report().sandbox, True)]
                async with box.up():  # the next warden finds one that it knows of, and lets it be
                    await box.until_ready()
                    await box.looked(3)
                    assert await answer_of(box.socket()) == (10, 20, 30)
                    await box.want()
                    await box.until(lambda: box.report() is None)
                assert await driver.sandboxes() == []
                assert [(s.name, s.running) for s in await theirs.sandboxes()] == [("theirs-1", True)]
                assert engine.inspect_container(stranger)["State"]["Status"] == "created"
            finally:
                engine.remove_container(stranger, force=True)
                await theirs.stop("theirs-1", grace_s=0)

    box.play(scene)


def test_a_container_that_was_made_and_never_started_is_made_anew_and_its_replica_not_blamed(folder):
    need("docker", absence("docker"))
    import docker

    owner = f"test-{folder.name}"
    box = Box(folder, lambda _: [DockerDriver(folder / "docker", socket=docker_socket(), owner=owner)], restart_first_s=60)

    async def scene():
        spec = box.spec(content=scaling_file(10))
        async with box.up():
            await box.looked()
            kind = Kind("docker", spec.memory_bytes, spec.cpus)
            box.slots.open("d-0-cut", driver="docker", kind=kind, replica=spec, model=None, attempts=Attempts())
            box.document(spec)
        with contextlib.closing(docker.APIClient(f"unix://{docker_socket()}")) as engine:
            labels = {"skerry.owner": owner, "skerry.name": "d-0-cut"}
            engine.create_container(f"{IMAGE}:{IMAGE_TAG}", ["/bin/true"], name=f"skerry-{owner}-d-0-cut", labels=labels)
        async with box.up():
            await box.want(spec)
            await box.until_ready()
            assert (box.report().restarts, box.report().sandbox != "d-0-cut") == (0, True)
            (driver,) = box._drivers(box)
            assert [s.name for s in await driver.sandboxes()] == [box.report().sandbox]
            assert box.entries("replica.ended", "sandbox.orphan_removed") == []

    box.play(scene)


def test_slots_that_were_cut_off_while_they_were_made_are_erased_at_the_start(folder):
    box = Box(folder)
    place = box.config.state_dir / "sandboxes"
    (place / "no-entry" / "run").mkdir(parents=True)
    for name, entry in (("empty-entry", b""), ("half-an-entry", b'{"driver":"fake","uid":'), ("other-things", b"[1, 2]")):
        (place / name / "model").mkdir(parents=True)
        (place / name / "slot.json").write_bytes(entry)

    async def scene():
        async with box.up():
            assert list(place.iterdir()) == []
            await box.want(box.spec())
            await box.until_ready()
            assert [path.name for path in place.iterdir()] == [box.report().sandbox]

    box.play(scene)


def test_slots_without_a_sandbox_are_closed_and_their_replicas_started_anew(folder):
    box = Box(folder)

    async def scene():
        async with box.up():
            await box.want(box.spec())
            await box.until_ready()
            kind = Kind("fake", 256 * MIB, 1.0)
            box.slots.open("warm-1", driver="fake", kind=kind, replica=None, model=None, attempts=Attempts())
            (old,) = box.running
        box.world.close()
        async with box.up():
            await box.until_ready()
            assert box.report().restarts == 0
            assert set(box.slots.all()) == set(box.running) == {box.report().sandbox}
            assert box.report().sandbox != old
            assert box.entries("replica.ended", "sandbox.orphan_removed") == []

    box.play(scene)


# -- killed in the middle


class WardenProcess:
    """``python -m edge_agent.warden`` on a Box's disk."""

    def __init__(self, box: Box, key: Ed25519PrivateKey) -> None:
        self._box, self._key = box, key
        self._settings = box.folder / "warden.toml"
        config = msgspec.to_builtins(box.config, enc_hook=str) | {"drivers": ["bubblewrap"], "memory_bytes": box.limits.memory_bytes}
        self._settings.write_text(
            "".join(f"{name} = {msgspec.json.encode(value).decode()}\n" for name, value in config.items() if value is not None)
        )
        box.config.trusted_keys_file.write_text(signing.public_key_line(key.public_key()))

    def want(self, *replicas) -> None:
        """Leave a signed document and its models on disk, as a warden that was killed right after it took them would."""
        desired = self._box.document(*replicas)
        store = Store(self._box.config.state_dir)
        for spec in replicas:
            store.admit(self._box.bring(spec.model), spec.model)
        store.save_desired(signing.sign(desired, self._key, context=signing.DESIRED_CONTEXT))

    @contextlib.contextmanager
    def up(self):
        """Run it; it is sent SIGTERM at the end if it lives still."""
        with (self._box.folder / "warden.log").open("ab") as log:
            process = subprocess.Popen([sys.executable, "-m", "edge_agent.warden", "--config", str(self._settings)], stdout=log, stderr=log)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE_S)

    def until(self, holds: Callable[[], object], what: Callable[[], object] = lambda: "") -> None:
        """Poll until it holds; says what stood instead."""
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < deadline, f"{what()}\n{(self._box.folder / 'warden.log').read_text()[-3000:]}"
            time.sleep(0.0005)


@pytest.mark.usefixtures("needs_bubblewrap")
def test_a_warden_that_is_killed_again_and_again_while_it_starts_workers_ends_with_exactly_what_is_wanted(folder):
    box = Box(folder, bubblewrap, memory_bytes=8192 * MIB, orphan_grace_s=0.5)  # of a probe, too
    warden = WardenProcess(box, Ed25519PrivateKey.generate())
    names = ["a-0", "b-0", "c-0"]
    moments = ["*", "*/log", "*/status", "*/handle.json", "../sandboxes/*/run/worker.sock"]

    def made(pattern: str) -> set[Path]:
        return {path for path in (box.config.state_dir / "bubblewrap").glob(pattern) if "probe" not in str(path)}

    def serving() -> list[tuple[int, str]]:
        with contextlib.suppress(FileNotFoundError):
            table = codec.decode(box.config.routes_file.read_bytes(), RouteTable)
            return [(route.version, Path(replica.socket).parent.parent.name) for route in table.routes for replica in route.replicas]
        return []

    async def scene():
        for version, moment in enumerate(moments, 1):
            warden.want(*(box.spec(name, version=version, content=scaling_file(version)) for name in names))
            before = made(moment)
            with warden.up() as process:
                warden.until(lambda moment=moment, before=before: made(moment) - before)
                process.kill()
        with warden.up():
            warden.until(lambda: [version for version, _ in serving()] == [len(moments)] * 3)
            sandboxes = {name for _, name in serving()}
            state_dir = box.config.state_dir

            def there() -> list[set[str]]:
                folders = [{path.name for path in (state_dir / part).iterdir()} for part in ("bubblewrap", "sandboxes")]
                return [*folders, sandboxes_with_processes(folder), groups_of(folder) or sandboxes]

            warden.until(lambda: there() == [sandboxes] * 4, there)
            for name in sandboxes:
                assert await answer_of(state_dir / "sandboxes" / name / "run" / "worker.sock") == (5, 10, 15)
        with contextlib.closing(Journal(state_dir / "journal.db", most=1000)) as journal:
            happened = journal.after(0).entries
        assert not [entry for entry in happened if entry.kind in ("replica.ended", "replica.crash_loop")], "a replica is blamed for it"

    box.play(scene)
