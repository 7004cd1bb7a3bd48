"""Changes that spread in waves over a real fleet under load: a good one arrives, bad ones are stopped at the first box and taken back."""

import json
import threading
import time
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import onnx
import onnx.helper as oh
import pytest

from skerry.wire.api import RolloutView
from skerry.wire.fleet import VersionView
from tests.conftest import scaling
from tests.e2e.world import World, running, wait_until

SPEC = """\
name: scale
model: {model}
replicas: {replicas}
place: {{tier: [edge]}}
resources: {{memory: 384MiB}}
slo: {{deadline_ms: 4000}}
rollout: {{waves: [1, "100%"], observe: {observe}, deadline: 30s{more}}}
"""
BODY = json.dumps({"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}).encode()
TIMES = 200


def spec(model: str, *, replicas: str = "{per_node: 1}", observe: str = "2s", more: str = "") -> str:
    return SPEC.format(model=model, replicas=replicas, observe=observe, more=f", {more}" if more else "")


def slow() -> onnx.ModelProto:
    """y = 2 x, after some hundred million needless multiplications."""
    wide, graph = 1200, [oh.make_node("MatMul", ["x", "in"], ["h0"])]
    graph += [oh.make_node("MatMul", [f"h{step}", "wide"], [f"h{step + 1}"]) for step in range(TIMES)]
    graph += [oh.make_node("MatMul", [f"h{TIMES}", "out"], ["nothing"]), oh.make_node("Mul", ["nothing", "zero"], ["none"])]
    graph += [oh.make_node("Mul", ["x", "two"], ["twice"]), oh.make_node("Add", ["twice", "none"], ["y"])]
    constants = {"in": (3, wide), "wide": (wide, wide), "out": (wide, 3)}
    made = [onnx.numpy_helper.from_array(np.zeros(shape, "f4"), name) for name, shape in constants.items()]
    made += [oh.make_tensor("two", onnx.TensorProto.FLOAT, [1], [2.0]), oh.make_tensor("zero", onnx.TensorProto.FLOAT, [1], [0.0])]
    ends = ([oh.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 3])] for name in ("x", "y"))
    return oh.make_model(oh.make_graph(graph, "slow", *ends, made), opset_imports=[oh.make_opsetid("", 17)], ir_version=9)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    with running() as world:
        for version, model in ((1, scaling(2.0)), (2, scaling(3.0)), (4, slow()), (5, scaling(2.001))):
            onnx.save(model, folder / "m.onnx")
            world.push(folder / "m.onnx", "scale", version)
        # Its warm-up run can't work, so that no replica of it is ever ready.
        onnx.save(scaling(4.0), folder / "m.onnx")
        pushed = world.cli("model", "push", str(folder / "m.onnx"), "--name", "scale", "--version", "3",
                           "--warmup", json.dumps([{"name": "z", "shape": [1, 3]}]))  # fmt: skip
        assert pushed.returncode == 0, pushed.stderr
        yield world


@pytest.fixture
def good(world) -> World:
    """Version 1 on both boxes of the edge."""
    world.cli("deployment", "delete", "scale")
    wait_until(lambda: not any(node.replicas for node in world.nodes()), 30, world.nodes)
    world.deploy(spec("scale:1"))
    view = world.wait_ready("scale")
    assert len(view.placements) >= 2
    return world


class Callers:
    """Ask every box of the edge at a steady rate; what each answered, and what went wrong."""

    def __init__(self, world: World, per_s: float = 20) -> None:
        self._urls = {box.name: f"{box.gateway_url}/v2/models/scale/infer" for box in world.fleet.boxes if box.name.startswith("store")}
        self._pause_s, self._stop = 1 / per_s, threading.Event()
        self.answers: dict[str, list[float]] = {name: [] for name in self._urls}
        self.wrong: list[str] = []
        self._threads = [threading.Thread(target=self._ask, args=item, daemon=True) for item in self._urls.items()]

    def _ask(self, name: str, url: str) -> None:
        while not self._stop.wait(self._pause_s):
            try:
                with urlopen(Request(url, BODY, {"Content-Type": "application/json"}), timeout=20) as answer:
                    self.answers[name].append(json.loads(answer.read())["outputs"][0]["data"][0])
            except HTTPError as exc:
                with exc:
                    self.wrong.append(f"{name}: {exc.code} {exc.read()!r}")
            except OSError as exc:
                self.wrong.append(f"{name}: {exc}")

    def __enter__(self) -> "Callers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)


def rollout(world: World) -> RolloutView:
    return world.api.call("GET", "/v1/rollouts/scale", RolloutView)


def deploy(world: World, text: str, *options: str):
    return world.cli("deploy", "-", "--json", *options, stdin=text.encode())


def kinds(world: World) -> list[str]:
    return [event.kind for event in reversed(world.events(subject="scale")) if event.kind.startswith("rollout.")]


def versions(world: World) -> dict[str, int]:
    """By box, the generation of its replica that serves (and not of one that is compared beside it)."""
    return {
        node.id: replica.generation
        for node in world.nodes()
        for replica in node.replicas
        if replica.deployment == "scale" and replica.name != "scale-shadow"
    }


def is_compared(world: World) -> bool:
    return any(replica.name == "scale-shadow" for node in world.nodes() for replica in node.replicas)


def test_a_good_change_goes_to_one_box_first_and_then_everywhere_and_costs_no_request(good):
    with Callers(good) as callers:
        began = time.monotonic()
        done = deploy(good, spec("scale:2", observe="3s"), "--wait")
        took_s = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    assert callers.wrong == []
    view = rollout(good)
    assert (view.phase, view.wave, view.targets, view.ready) == ("done", 2, [1, view.total], view.total)
    assert took_s >= 2 * 3
    turned = {name: answers.index(3.0) for name, answers in callers.answers.items()}
    for name, answers in callers.answers.items():
        assert set(answers[: turned[name]]) == {2.0}
        assert set(answers[turned[name] + 5 :]) == {3.0}, "an answer of the old version that was on its way at most"
    assert max(turned.values()) - min(turned.values()) > 3 * 20 * 0.7, "the second box came three seconds after the first"
    after, before = good.api.call("GET", "/v1/deployments/scale/versions", list[VersionView])
    assert (after.model, before.model, after.boxes) == ("scale:2", "scale:1", None)
    assert before.until_s == view.began_ms // 1000
    told = kinds(good)
    assert told[-6:] == ["rollout.began", "rollout.wave", "rollout.ready", "rollout.wave", "rollout.ready", "rollout.done"]


@pytest.mark.parametrize(("model", "why"), [("scale:3", "1 of 1 failed"), ("scale:4", "answers were slow")])
def test_a_bad_change_is_stopped_at_the_first_box_taken_back_and_remembered(good, model, why):
    before = versions(good)
    bad = spec(model, observe="25s")
    with Callers(good, per_s=25) as callers:
        time.sleep(12)  # long enough to know how it served before
        done = deploy(good, bad, "--wait", "--timeout", "90s")
        assert done.returncode == 1, done.stderr
        assert why in done.stderr.decode()
        good.wait_ready("scale")
    assert callers.wrong == []
    view = rollout(good)
    assert (view.phase, view.admitted) == ("failed", 1)
    (canary,) = view.wave_units
    new, old = good.api.call("GET", "/v1/deployments/scale/versions", list[VersionView])
    ran = model == "scale:4"
    assert (new.model, old.model, new.boxes) == (model, "scale:1", int(ran)), "one that does not start answers nobody"
    assert ran or not new.asked
    if ran:
        assert min(new.asked, old.asked) > 0
        assert new.latency_ms["0.99"] > 2 * old.latency_ms["0.99"], (new, old)
    now = versions(good)
    assert {name: now[name] for name in now if name != canary} == {name: before[name] for name in before if name != canary}
    assert good.deployment("scale").model == "scale:1"
    again = deploy(good, bad)
    assert again.returncode == 4, again.stderr
    assert b"taken back" in again.stderr
    assert b"--again" in again.stderr
    assert deploy(good, bad, "--again").returncode == 0
    wait_until(lambda: rollout(good).phase in ("rolling", "failed"), 20, lambda: rollout(good))
    if rollout(good).phase == "rolling":
        aborted = good.cli("rollout", "abort", "scale")  # where it was not found to be no good in that very moment
        assert aborted.returncode == 0 or rollout(good).phase == "failed", aborted.stderr
    wait_until(lambda: good.deployment("scale").model == "scale:1", 20, lambda: rollout(good))


def test_answers_are_compared_beside_what_serves_before_anybody_gets_one(good):
    more = ', shadow: {share: "100%", tolerance: 0.01}'
    with Callers(good) as callers:
        time.sleep(2)
        before = versions(good)
        done = deploy(good, spec("scale:2", observe="20s", more=more[2:]), "--wait", "--timeout", "60s")
        assert done.returncode == 1, done.stdout
        assert "answers were others than those of what serves now" in done.stderr.decode()
        view = rollout(good)
        assert (view.phase, view.admitted) == ("failed", 0)
        assert 0 < view.compared == view.differed
        good.wait_ready("scale")
        assert {name for name, answers in callers.answers.items() if set(answers) - {2.0}} == set(), "nobody ever had one"
        assert versions(good) == before, "nothing that serves was started anew"
        wait_until(lambda: not is_compared(good), 20, good.nodes)
        done = deploy(good, spec("scale:5", observe="4s", more=more[2:]), "--wait", "--timeout", "60s")
        assert done.returncode == 0, done.stderr
    assert callers.wrong == []
    view = rollout(good)
    assert (view.phase, view.ready, view.differed) == ("done", view.total, 0)
    assert view.compared >= 20
    told = kinds(good)
    assert told[-7:] == [
        "rollout.shadow",
        "rollout.ready",
        "rollout.wave",
        "rollout.ready",
        "rollout.wave",
        "rollout.ready",
        "rollout.done",
    ]
    assert not is_compared(good)
    assert "beside what serves: " in good.cli("rollout", "show", "scale").stdout.decode()


def test_an_operator_pauses_approves_and_aborts(good):
    assert deploy(good, spec("scale:2", observe="1s", more="approve: true")).returncode == 0
    wait_until(lambda: rollout(good).phase == "waiting", 30, lambda: rollout(good))
    assert (rollout(good).admitted, len(set(versions(good).values()))) == (1, 2)
    assert good.cli("rollout", "pause", "scale").returncode == 0
    assert good.cli("rollout", "approve", "scale").returncode == 0
    time.sleep(2.5)
    view = rollout(good)
    assert (view.admitted, view.is_paused) == (1, True), "approved, and paused all the same"
    shown = good.cli("rollout", "show", "scale").stdout.decode()
    assert "scale:1 (generation" in shown
    assert "paused" in shown
    assert good.cli("rollout", "resume", "scale").returncode == 0
    wait_until(lambda: rollout(good).phase == "done", 30, lambda: rollout(good))
    assert good.cli("rollout", "abort", "scale").returncode == 4, "what is over is not taken back"
    assert deploy(good, spec("scale:1", observe="60s")).returncode == 0
    wait_until(lambda: bool(rollout(good).ready_since_ms), 30, lambda: rollout(good))
    assert good.cli("rollout", "abort", "scale").returncode == 0
    good.wait_ready("scale")
    assert good.deployment("scale").model == "scale:2"
    assert rollout(good).phase == "aborted"
    assert kinds(good)[-1] == "rollout.aborted"
    listed = json.loads(good.cli("rollout", "list", "--json").stdout)
    assert [entry["deployment"] for entry in listed] == ["scale"]


def test_a_killed_coordinator_goes_on_with_it_and_another_change_takes_its_place(good):
    assert deploy(good, spec("scale:2", observe="4s")).returncode == 0
    wait_until(lambda: bool(rollout(good).ready_since_ms), 30, lambda: rollout(good))
    good.do(good.fleet.kill("coordinator"))
    good.do(good.fleet.start_process("coordinator"))
    wait_until(lambda: good.cli("status").returncode == 0, 30)
    wait_until(lambda: rollout(good).phase == "done", 60, lambda: rollout(good))
    wait_until(lambda: len(set(versions(good).values())) == 1, 20, lambda: versions(good))
    assert deploy(good, spec("scale:1", observe="60s")).returncode == 0
    wait_until(lambda: bool(rollout(good).ready_since_ms), 30, lambda: rollout(good))
    text = spec("scale:1", observe="1s").replace("4000", "3900")
    assert deploy(good, text, "--wait").returncode == 0
    view = rollout(good)
    assert (view.phase, view.before_model, view.model) == ("done", "scale:2", "scale:1")
    assert "rollout.replaced" in kinds(good)


def test_replicas_that_are_counted_change_one_by_one(good):
    good.cli("deployment", "delete", "scale")
    good.deploy(spec("scale:1", replicas="{count: 3}"))
    good.wait_ready("scale")
    with Callers(good) as callers:
        assert deploy(good, spec("scale:2", replicas="{count: 3}", observe="2s"), "--wait").returncode == 0
    assert callers.wrong == []
    view = rollout(good)
    assert (view.phase, view.unit, view.targets) == ("done", "replica", [1, 3])


def test_what_a_change_would_do_is_told_before_and_is_what_it_does(good):
    text = spec("scale:2", observe="1s").replace("384MiB", "400MiB")
    before = versions(good)
    told = json.loads(good.cli("deploy", "-", "--plan", "--json", stdin=text.encode()).stdout)
    assert (told["changes"], told["starts"], told["stops"], told["spreads"]) == (len(before), 0, 0, True)
    assert {step["node"] for step in told["steps"]} == set(before)
    assert told["steps"][0]["text"] == "model scale:1 becomes scale:2; memory 384 MiB becomes 400 MiB"
    assert {refusal["node"] for refusal in told["refusals"]} == {node.id for node in good.nodes()} - set(before)
    assert versions(good) == before, "nothing was changed"
    assert "of its replicas" in good.cli("deploy", "-", "--plan", stdin=text.encode()).stdout.decode()
    assert deploy(good, text, "--wait").returncode == 0
    assert set(versions(good)) == set(before)
    again = good.cli("deploy", "-", "--plan", stdin=text.encode())
    assert again.stdout.decode().strip() == "scale is that already"
    elsewhere = text.replace("tier: [edge]", "tier: [cloud]")
    told = json.loads(good.cli("deploy", "-", "--plan", "--json", stdin=elsewhere.encode()).stdout)
    assert (told["stops"], told["changes"]) == (len(before), 0)
    assert told["starts"] > 0
    wrong = good.cli("deploy", "-", "--plan", stdin=text.replace("waves", "wave").encode())
    assert wrong.returncode == 4
    assert b"rollout" in wrong.stderr


def test_without_a_rollout_a_change_comes_at_once_and_the_first_deployment_does_too(good):
    with pytest.raises(Exception, match="no change of 'scale'"):
        rollout(good)
    text = spec("scale:2").partition("rollout:")[0]
    done = deploy(good, text)
    assert json.loads(done.stdout)["spreads"] is False
    wait_until(lambda: good.deployment("scale").model == "scale:2", 20)
    good.wait_ready("scale")


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("waves: [0]", "0 is not a number of boxes"),
        ("waves: [110%]", "neither a number nor a share"),
        ("waves: [ten]", "neither a number nor a share"),
        ("observe: soon", "rollout.observe"),
        ("max_failed: 0", "rollout.max_failed"),
        ("wave: [1]", "rollout"),
        ("shadow: {share: 0%}", "rollout.shadow.share"),
        ("shadow: {by: ear}", "rollout.shadow.by"),
    ],
)
def test_rules_that_are_wrong_are_refused_by_name(world, rules, words):
    text = spec("scale:1").partition("rollout:")[0] + f"rollout: {{{rules}}}\n"
    done = deploy(world, text)
    assert done.returncode == 4
    assert words in done.stderr.decode()
