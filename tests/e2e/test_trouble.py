"""What goes wrong on real boxes: no broker at the start, two boxes of one name, a full disk, Docker for sandboxes, the demo itself."""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from edge_agent.warden.drivers.docker import DockerDriver
from skerry.cli.client import CliError
from skerry.demo.broker import find_mosquitto
from skerry.demo.fleet import docker_socket, free_ports, left_behind
from skerry.wire.api import DeploymentView
from tests.conftest import need
from tests.e2e.test_fleet import SCALE, good, infer_url, kill_worker, post
from tests.e2e.world import running, wait_until


def docker_is_absent(tmp_path: Path) -> str:
    import asyncio

    return asyncio.run(DockerDriver(tmp_path / "probe", socket=Path(docker_socket()), owner="probe").probe())


def test_with_docker_each_replica_is_a_container_and_answers_right(scale_model, tmp_path):
    need("docker", docker_is_absent(tmp_path))
    with running(drivers=("docker", "bubblewrap")) as world:
        world.push(scale_model, "scale")
        world.deploy(SCALE + "isolation: {at_least: container}\n")
        view = world.wait_ready("scale")
        assert {(p.driver, p.rung) for p in view.placements} == {("docker", "container")}
        wait_until(lambda: post(infer_url(world), good())[2].get("Skerry-Served-By") == "edge", 10)
        assert post(infer_url(world), good())[1]["outputs"][0]["data"] == [2.0, 4.0, 6.0]


def test_a_broker_that_comes_late_is_waited_for_and_isolation_that_no_box_has_is_refused(scale_model):
    with running(wait=False) as world:
        world.do(world.fleet.kill("broker"))
        world.push(scale_model, "scale")
        world.deploy(SCALE)
        time.sleep(2)
        assert not world.status().broker_connected
        assert world.fleet.dead() == ["broker"]
        world.do(world.fleet.start_process("broker"))
        wait_until(lambda: len(world.nodes()) == 4 and all(node.state == "online" for node in world.nodes()), 30, world.log_tails)
        world.wait_ready("scale")
        world.deploy(SCALE.replace("name: scale", "name: strict") + "isolation: {at_least: microvm}\n")
        # A box tells what it has once its sandboxes were tried, which takes a busy machine its time.
        wait_until(lambda: len(world.deployment("strict").refusals) == 4, 60, lambda: f"{world.deployment('strict')}\n{world.log_tails()}")
        assert all("microvm is asked for" in refusal.reason for refusal in world.deployment("strict").refusals)
        assert world.deployment("strict").problem == "no box fits"


def test_a_box_that_connects_before_the_coordinator_does_is_known_all_the_same():
    with running(wait=False) as world:
        for name in world.fleet.names():
            if name in ("broker", "coordinator") or name.endswith(".agent"):
                world.do(world.fleet.kill(name))
        world.do(world.fleet.start_process("broker"))
        world.do(world.fleet.start_process("store-1.agent"))
        time.sleep(3)  # its presence is kept by the broker, what it is is not
        world.do(world.fleet.start_process("coordinator"))

        def is_known() -> bool:
            try:
                return bool(world.node("store-1").rungs)
            except CliError:
                return False

        wait_until(is_known, 40, world.log_tails)


def test_a_second_agent_of_the_same_name_is_told_so_and_the_fleet_converges(scale_model):
    with running(broker_kind="mosquitto" if not mosquitto_is_absent() else "embedded") as world:
        need("mosquitto", mosquitto_is_absent())
        box = world.box("van-7")
        other = box.folder / "agent2.toml"
        other.write_text((box.folder / "agent.toml").read_text().replace(f"{box.folder}/agent", f"{box.folder}/agent2"))
        same_state = subprocess.run(
            [sys.executable, "-m", "edge_agent.link", "--config", str(box.folder / "agent.toml")],
            capture_output=True,
            timeout=20,
            check=False,
        )
        assert same_state.returncode == 78
        assert b"runs already with process id" in same_state.stderr
        log = world.fleet.logs / "second.log"
        with log.open("wb") as out:
            second = subprocess.Popen([sys.executable, "-m", "edge_agent.link", "--config", str(other)], stdout=out, stderr=out)
        try:
            wait_until(lambda: any(e.kind == "node.duplicate" for e in world.events(node="van-7")), 30, log.read_text)
            words = "does another agent run as node 'van-7'?"
            wait_until(lambda: any(words in e.text for e in world.events(node="van-7")) or words in log.read_text(), 30, log.read_text)
        finally:
            second.terminate()
            second.wait(20)
        world.do(world.fleet.kill("van-7.agent"))
        world.do(world.fleet.start_process("van-7.agent"))
        world.push(scale_model, "scale")
        world.deploy(SCALE)
        world.wait_ready("scale")
        wait_until(lambda: all(s.missing == 0 and s.lost == 0 for s in world.node("van-7").streams if s.stream == "events"), 30)


def test_what_a_lost_box_ran_runs_elsewhere_too_and_once_when_it_is_back(scale_model):
    """The box serves on by itself meanwhile, and nothing on it is stopped or started by its coming back."""
    with running() as world:
        world.push(scale_model, "scale")
        text = SCALE.replace("tier: [edge, cloud]", "tier: [edge]") + "replicas: {count: 1}\ndisconnect: {lost_after: 8s, replace: true}\n"
        world.deploy(text)
        (placed,) = world.wait_ready("scale").placements
        (handle,) = (world.box(placed.node).folder / "warden" / "bubblewrap").glob("scale-0-*/handle.json")
        world.do(world.fleet.kill(f"{placed.node}.agent"))
        wait_until(lambda: world.node(placed.node).state == "unknown", 20)
        silent = world.node(placed.node)
        assert 0 < silent.silent_since_ms <= time.time_ns() // 10**6
        assert next(step.text.partition(";")[0] for step in silent.outlook) == "scale-0: lost"
        assert silent.outlook[0].at_ms == silent.silent_since_ms + 8000
        wait_until(lambda: len(world.deployment("scale").placements) == 2, 20, lambda: world.deployment("scale"))
        wait_until(lambda: world.deployment("scale").ready == 1, 20, lambda: world.deployment("scale"))
        other = next(one for one in world.deployment("scale").placements if one.node != placed.node)
        assert (other.replaces, other.phase) == (placed.node, "ready")
        assert [event.kind for event in world.events(node=other.node, subject="scale-0") if "replaces" in event.kind] == [
            "replica.replaces"
        ]
        for box in (placed.node, other.node):
            assert post(infer_url(world, box), good())[0] == 200
        world.do(world.fleet.start_process(f"{placed.node}.agent"))
        wait_until(lambda: world.node(placed.node).state == "online", 20)
        time.sleep(5)
        assert len(world.deployment("scale").placements) == 2, "it might go again"
        wait_until(lambda: [p.node for p in world.deployment("scale").placements] == [placed.node], 45, lambda: world.deployment("scale"))
        wait_until(lambda: world.node(other.node).replicas == [], 20)
        assert handle.exists()
        assert world.node(placed.node).replicas[0].restarts == 0
        assert {event.kind for event in world.events(node=placed.node) if event.kind.startswith("replica.")} == {
            "replica.started", "replica.ready"
        }  # fmt: skip


def test_a_box_whose_disk_is_one_of_an_earlier_day_goes_on_under_new_numbers_and_no_event_is_missing_or_doubled():
    with running() as world:
        box = world.box("van-7")
        outbox, image = box.folder / "agent" / "outbox.db", box.folder / "image.db"

        def restart(between=lambda: None) -> None:
            os.kill(world.fleet.pid("van-7.agent"), 15)
            wait_until(lambda: world.node("van-7").state == "offline", 20)
            between()
            world.do(world.fleet.start_process("van-7.agent"))
            wait_until(lambda: world.node("van-7").state == "online" and world.node("van-7").outbox_events == 0, 30)

        restart(lambda: shutil.copy(outbox, image))
        for _ in range(2):
            restart()

        def restore() -> None:
            for path in outbox.parent.glob("outbox.db*"):
                path.unlink()
            shutil.copy(image, outbox)

        restart(restore)
        wait_until(lambda: any(event.kind == "node.restored" for event in world.events(node="van-7")), 20)
        wait_until(lambda: any(event.kind == "outbox.renumbered" for event in world.events(node="van-7")), 20)
        restart()
        started = [event for event in world.events(node="van-7") if event.kind == "agent.started"]
        wait_until(lambda: len([e for e in world.events(node="van-7") if e.kind == "agent.started"]) == 6, 20, lambda: started)
        assert [event.kind for event in world.events(node="van-7")].count("node.restored") == 1
        assert all(stream.missing == 0 and stream.lost == 0 for stream in world.node("van-7").streams if stream.stream == "events")


def test_a_coordinator_restored_from_an_earlier_day_stops_nothing_and_leads_again_when_it_is_told_to(scale_model, tmp_path):
    with running() as world:
        world.push(scale_model, "scale")
        world.deploy(SCALE)
        world.wait_ready("scale")
        config, secret, file = world.fleet.folder / "coordinator" / "coordinator.toml", tmp_path / "secret", tmp_path / "monday.backup"
        secret.write_text("correct horse battery\n")
        coordinator = [sys.executable, "-m", "coordinator"]
        where = [file, "--config", config, "--passphrase-file", secret, "--signer-dir", world.fleet.folder / "signer"]
        subprocess.run([*coordinator, "backup", *where], check=True, timeout=60, stdin=subprocess.DEVNULL)
        assert file.stat().st_mode & 0o777 == 0o600
        world.deploy(SCALE.replace("name: scale", "name: later"))
        world.wait_ready("later")

        def sandboxes() -> set[str]:
            return {path.parent.name for path in world.fleet.folder.glob("boxes/*/warden/bubblewrap/*/handle.json")}

        before = sandboxes()
        refused = subprocess.run([*coordinator, "restore", *where], capture_output=True, text=True, timeout=60, check=False)
        assert (refused.returncode, "runs already" in refused.stderr) == (1, True), "not while it runs"
        world.do(world.fleet.kill("coordinator"))
        world.do(world.fleet.kill("signer"))
        subprocess.run([*coordinator, "restore", *where], check=True, timeout=60, stdin=subprocess.DEVNULL)
        world.do(world.fleet.start_process("signer"))
        world.do(world.fleet.start_process("coordinator"))

        def all_are_ahead() -> bool:
            with contextlib.suppress(CliError):  # it starts
                return [node.is_ahead for node in world.nodes()] == [True] * 4
            return False

        wait_until(all_are_ahead, 60, world.log_tails)
        time.sleep(3)
        assert sandboxes() == before
        for name in ("scale", "later"):
            assert post(infer_url(world, model=name), good())[0] == 200
        assert "see 'skerry recover'" in world.deployment("scale").problem
        told = world.cli("recover", "--dry-run")
        assert b"stops later-0" in told.stdout, told
        world.deploy(SCALE.replace("name: scale", "name: later"))
        wait_until(lambda: b"stops" not in world.cli("recover", "--dry-run").stdout, 20)
        assert world.cli("recover", "no-such-box").returncode == 2
        done = world.cli("recover", "--yes")
        assert b"4 boxes are led from here again" in done.stdout, done
        world.wait_ready("scale")
        world.wait_ready("later")
        wait_until(lambda: all(node.generation == node.reported_generation for node in world.nodes()), 20)
        assert sandboxes() == before, "nothing was stopped or started by it"
        assert {"coordinator.restored", "node.taken_over"} <= {event.kind for event in world.events()}


def test_a_broker_that_moves_is_found_where_a_signed_document_said_and_nothing_is_restarted(scale_model, tmp_path):
    need("mosquitto", mosquitto_is_absent())
    (port,) = free_ports(1)
    with running() as world:
        world.push(scale_model, "scale")
        world.deploy(SCALE)
        world.wait_ready("scale")
        config, old_port = world.fleet.folder / "coordinator" / "coordinator.toml", world.fleet.broker_port

        def sandboxes() -> set[str]:
            return {path.parent.name for path in world.fleet.folder.glob("boxes/*/warden/bubblewrap/*/handle.json")}

        def restart_coordinator(text: str) -> None:
            world.do(world.fleet.kill("coordinator"))
            config.write_text(text)
            world.do(world.fleet.start_process("coordinator"))

        def all_are_in_step() -> bool:
            with contextlib.suppress(CliError):  # the coordinator starts
                return all(node.state == "online" and node.generation == node.reported_generation for node in world.nodes())
            return False

        before = sandboxes()
        restart_coordinator(f'announce = {{brokers = ["127.0.0.1:{port}"]}}\n{config.read_text()}')
        books = [box.folder / "agent" / "addresses.json" for box in world.fleet.boxes]
        wait_until(lambda: all(book.exists() for book in books), 30, world.log_tails)
        wait_until(all_are_in_step, 30, world.log_tails)
        assert f"127.0.0.1:{port}" in books[0].read_text(), "nobody is there yet, and so the box stays where it is"
        (tmp_path / "m.conf").write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
        with (tmp_path / "m.log").open("wb") as log:
            moved = subprocess.Popen([find_mosquitto(), "-c", str(tmp_path / "m.conf")], stdout=log, stderr=log)
        try:
            world.do(world.fleet.kill("broker"))
            restart_coordinator(config.read_text().replace(f"port = {old_port}", f"port = {port}"))
            wait_until(all_are_in_step, 60, world.log_tails)
            assert sandboxes() == before
            assert post(infer_url(world), good())[0] == 200
        finally:
            moved.terminate()
            moved.wait(10)


def test_a_link_that_comes_back_changes_nothing_on_the_box_and_no_request_there_is_lost(scale_model):
    with running() as world:
        world.push(scale_model, "scale")
        world.deploy(SCALE)
        world.wait_ready("scale")
        box, before = world.box("store-1"), world.node("store-1")
        (handle,) = (box.folder / "warden" / "bubblewrap").glob("scale-0-*/handle.json")
        fetched = (world.fleet.logs / "store-1.agent.log").read_text().count("model.fetched")
        assert fetched == 1
        last = world.events()[0].id
        box.uplink.cut()
        deadline, asked = time.monotonic() + 20, 0
        while world.node("store-1").state != "unknown":
            assert time.monotonic() < deadline, world.log_tails()
            assert post(infer_url(world), good())[0] == 200
            asked += 1
        box.uplink.mend()
        while world.node("store-1").state != "online":
            assert time.monotonic() < deadline + 20, world.log_tails()
            assert post(infer_url(world), good())[0] == 200
            asked += 1
        wait_until(lambda: world.node("store-1").outbox_events == 0, 20)
        after = world.node("store-1")
        assert asked > 10
        assert handle.exists()
        assert (after.generation, after.reported_generation) == (before.generation, before.generation)
        assert [(replica.sandbox, replica.restarts) for replica in after.replicas] == [(r.sandbox, r.restarts) for r in before.replicas]
        assert (world.fleet.logs / "store-1.agent.log").read_text().count("model.fetched") == fetched
        # What it counted in its outbox may have been said before the cut: its own two events come when they come.
        told = {"node.silent", "node.online", "link.lost", "link.up"}
        wait_until(lambda: told <= {event.kind for event in world.events(node="store-1") if event.id > last}, 20, world.log_tails)
        kinds = {event.kind for event in world.events(node="store-1") if event.id > last}
        assert not {kind for kind in kinds if kind.startswith(("replica.", "model.", "desired."))}, kinds


def test_a_coordinator_that_is_killed_at_any_moment_has_every_change_that_it_acknowledged(scale_model):
    with running(wait=False) as world:
        wait_until(lambda: answers(world), 30, world.log_tails)
        world.push(scale_model, "scale")
        acknowledged: dict[str, str] = {}
        chance, number = random.Random(7), 0
        for _ in range(6):
            killer = threading.Timer(chance.uniform(0.02, 0.6), lambda: world.do(world.fleet.kill("coordinator")))
            killer.start()
            while True:
                number += 1
                name, text = f"d{number % 7}", SCALE.replace("5000", str(1000 + number))
                text = text.replace("name: scale", f"name: d{number % 7}")
                try:
                    world.deploy(text)
                except CliError:
                    break
                acknowledged[name] = text
            killer.join()
            world.do(world.fleet.start_process("coordinator"))
            wait_until(lambda: answers(world), 30, world.log_tails)
            held = {view.name: view.text for view in world.api.call("GET", "/v1/deployments", list[DeploymentView])}
            for one, said in acknowledged.items():
                assert held[one] == said or (one == name and held[one] == text), "it may have been kept before its answer was cut off"
            acknowledged = dict(held)
        assert number > 30, "it was killed before it did anything"
        verified = world.cli("audit", "verify")
        assert verified.returncode == 0, verified


def answers(world) -> bool:
    with contextlib.suppress(CliError):
        return world.status().fleet == "demo"
    return False


def test_a_cold_boot_with_no_network_at_all_ends_in_a_serving_box(scale_model):
    with running() as world:
        world.push(scale_model, "scale")
        world.deploy(SCALE)
        world.wait_ready("scale")
        for name in ("store-1.agent", "store-1.warden", "store-1.gateway", "coordinator", "broker"):
            world.do(world.fleet.kill(name))
        world.box("store-1").uplink.cut()
        kill_worker(world, "store-1")
        (world.box("store-1").folder / "routes.json").unlink()
        for program in ("gateway", "agent", "warden"):
            world.do(world.fleet.start_process(f"store-1.{program}"))

        def answers() -> bool:
            try:
                return post(infer_url(world), good())[0] == 200
            except OSError:
                return False

        wait_until(answers, 15, world.log_tails)
        assert post(infer_url(world), good())[1]["outputs"][0]["data"] == [2.0, 4.0, 6.0]
        for name in ("broker", "coordinator"):
            world.do(world.fleet.start_process(name))
        world.box("store-1").uplink.mend()
        wait_until(lambda: is_whole(world), 60, world.log_tails)
        assert all(replica.restarts <= 1 for replica in world.node("store-1").replicas)


def is_whole(world) -> bool:
    try:
        return world.deployment("scale").ready == 4 and all(node.state == "online" for node in world.nodes())
    except CliError:
        return False  # the coordinator is coming up


def mosquitto_is_absent() -> str:
    from skerry.demo.broker import find_mosquitto

    return "" if find_mosquitto() else "mosquitto is not installed"


@pytest.fixture
def small_disk():
    """A file system of 100 MiB."""
    if os.geteuid() != 0:
        need("a file system of its own", "only root may mount a tmpfs")
    folder = Path(tempfile.mkdtemp(prefix="sk-disk-", dir="/tmp"))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(folder)], capture_output=True, check=False)
    need("a file system of its own", mounted.stderr.decode().strip())
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
    folder.rmdir()


def test_a_box_whose_disk_is_full_goes_on_answering_and_says_so_and_heals(scale_model, small_disk):
    with running(wait=False) as world:
        world.do(world.fleet.kill("store-1.agent"))
        world.do(world.fleet.kill("store-1.warden"))
        for program in ("agent", "warden"):
            folder = world.box("store-1").folder / program
            if folder.exists():
                shutil.rmtree(folder)
            (small_disk / program).mkdir()
            folder.symlink_to(small_disk / program)
        for program in ("agent", "warden"):
            world.do(world.fleet.start_process(f"store-1.{program}"))
        wait_until(
            lambda: len(world.nodes()) == 4 and all(node.state == "online" and node.rungs for node in world.nodes()), 30, world.log_tails
        )
        world.push(scale_model, "scale")
        world.deploy(SCALE)
        world.wait_ready("scale")
        wait_until(lambda: post(infer_url(world), good())[2].get("Skerry-Served-By") == "edge", 10)
        ballast = small_disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(65536))
        world.deploy(SCALE.replace("name: scale", "name: second"))
        for _ in range(30):
            assert post(infer_url(world), good())[0] == 200
            time.sleep(0.1)
        assert not world.fleet.dead(), world.log_tails()
        wait_until(
            lambda: world.node("store-1").refused != "" or "disk" in world.log_tails() or "full" in world.log_tails(), 15, world.log_tails
        )
        ballast.unlink()
        world.deploy(SCALE.replace("name: scale", "name: third"))
        world.wait_ready("third")
        world.wait_ready("second")
        assert world.node("store-1").refused == ""


@pytest.mark.timeout(300)
def test_the_demo_holds_every_step_and_leaves_nothing_behind():
    folder = Path(tempfile.mkdtemp(prefix="sk-", dir="/tmp")) / "d"
    done = subprocess.run(
        [sys.executable, "-m", "skerry", "demo", "--dir", str(folder), "--seconds", "1", "--plain", "--broker", "embedded"],
        capture_output=True, timeout=280, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout.decode()[-4000:] + done.stderr.decode()[-2000:]
    assert b"every step held" in done.stdout
    assert left_behind(folder) == []
