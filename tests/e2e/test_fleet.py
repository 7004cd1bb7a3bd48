"""A whole fleet, used as people use it: deployed to by the command line, asked by Triton's client, given nonsense, killed at random."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import msgspec
import numpy as np
import onnx
import onnx.helper as oh
import pytest
import tritonclient.http as triton

from skerry.runtime.proved_time import uptime_ms
from skerry.wire import codec
from skerry.wire.api import SplitView
from skerry.wire.box import RouteTable
from skerry.wire.proof import Proof
from tests.e2e.world import World, running, wait_until

SCALE = """\
name: scale
model: scale:1
place: {tier: [edge, cloud]}
resources: {memory: 256MiB}
slo: {deadline_ms: 5000}
"""


@pytest.fixture(scope="module")
def world(scale_model):
    with running() as world:
        pushed = world.cli("model", "push", str(scale_model), "--name", "scale", "--version", "1", "--json")
        assert pushed.returncode == 0, pushed.stderr
        deployed = world.cli("deploy", "-", "--wait", "--json", stdin=SCALE.encode())
        assert deployed.returncode == 0, deployed.stderr.decode() + world.log_tails()
        view = json.loads(deployed.stdout)
        assert (view["ready"], view["wanted"]) == (4, 4)
        yield world


def post(url: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, dict, dict[str, str]]:
    try:
        with urlopen(Request(url, body, headers or {"Content-Type": "application/json"}), timeout=20) as response:
            return response.status, json.loads(response.read()), dict(response.headers)
    except HTTPError as exc:
        with exc:
            return exc.code, json.loads(exc.read()), dict(exc.headers)


def good(values=((1.0, 2.0, 3.0),), **more) -> bytes:
    array = np.array(values, "f4")
    tensor = {"name": "x", "shape": list(array.shape), "datatype": "FP32", "data": array.ravel().tolist()}
    return json.dumps({"inputs": [tensor], **more}).encode()


def infer_url(world: World, box: str = "store-1", model: str = "scale") -> str:
    return f"{world.box(box).gateway_url}/v2/models/{model}/infer"


def test_every_box_answers_right_and_says_who_it_was(world):
    for box, served_by in (("store-1", "edge"), ("store-2", "edge"), ("van-7", "edge"), ("cloud-1", "cloud")):
        wait_until(lambda box=box, by=served_by: post(infer_url(world, box), good())[2].get("Skerry-Served-By") == by, 10)
        status, answer, headers = post(infer_url(world, box), good(id="q-7"))
        assert status == 200
        assert answer["outputs"][0]["data"] == [2.0, 4.0, 6.0]
        assert answer["id"] == "q-7"
        assert (headers["Skerry-Node"], answer["parameters"]["node"]) == (box, box)
        assert "compute;dur=" in headers["Server-Timing"]


def test_tritons_own_client_works_unchanged(world):
    address = world.box("store-1").gateway_url.removeprefix("http://")
    with triton.InferenceServerClient(address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("scale")
        assert client.is_model_ready("scale", "1")
        metadata = client.get_model_metadata("scale")
        assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
        wanted = triton.InferInput("x", [2, 3], "FP32")
        wanted.set_data_from_numpy(np.arange(6, dtype="f4").reshape(2, 3))
        result = client.infer(
            "scale", [wanted], model_version="1", request_id="t", outputs=[triton.InferRequestedOutput("y")], timeout=4_000_000
        )
        assert result.as_numpy("y").tolist() == [[0, 2, 4], [6, 8, 10]]
        statistics = client.get_inference_statistics("scale")
        assert statistics["model_stats"][0]["inference_count"] >= 1
        assert {"name": "scale", "version": "1", "state": "READY", "reason": ""} in client.get_model_repository_index()


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "words"),
    [
        ("scale/infer", good([[1.0, 2.0]]), None, 400, "shape [1, 2] given"),
        ("scale/infer", good().replace(b"FP32", b"FP64"), None, 400, "datatype FP64 given"),
        ("scale/infer", good().replace(b"FP32", b"FP99"), None, 400, "inputs[0].datatype"),
        ("scale/infer", good().replace(b"[1, 3]", b"[9, 3]"), None, 400, "inputs[0].data"),
        ("scale/infer", good().replace(b'"x"', b'"z"'), None, 400, "takes ['x']"),
        ("scale/infer", b"{", None, 400, "request:"),
        ("scale/infer", b"[]", None, 400, "request:"),
        ("scale/infer", b"\xff" * 100, None, 400, "request:"),
        ("scale/infer", good() + b"1234", {"Inference-Header-Content-Length": str(len(good()))}, 400, "4 bytes after the last tensor"),
        ("scale/infer", good(), {"Inference-Header-Content-Length": "99999999"}, 400, "Inference-Header-Content-Length"),
        ("scale/infer", good(), {"Inference-Header-Content-Length": "-1"}, 400, "Inference-Header-Content-Length"),
        ("scale/infer", good(parameters={"timeout": "soon"}), None, 400, "parameters.timeout"),
        ("scale/versions/9/infer", good(), None, 404, "version '9' is not served here"),
        ("nothing/infer", good(), None, 404, "model 'nothing' is not served here"),
        ("scale/infer", good().replace(b'"x"', b'"' + b"x" * 600_000 + b'"'), None, 400, "a name has at most"),
        ("scale/infer", good([]).replace(b"[0]", b"[0, 99999999999999999999]"), None, 400, "inputs[0].shape"),
    ],
)  # fmt: skip
def test_a_request_that_is_wrong_gets_an_answer_that_names_what(world, path, body, headers, status, words):
    got, answer, _ = post(f"{world.box('store-1').gateway_url}/v2/models/{path}", body, headers)
    assert got == status
    assert words in answer["error"]
    assert post(infer_url(world), good())[0] == 200


def test_a_huge_header_is_refused_and_the_gateway_goes_on(world):
    with pytest.raises(HTTPError) as refused:
        urlopen(Request(infer_url(world), good(), {"X-Huge": "y" * 100_000}), timeout=10)
    with refused.value:
        assert refused.value.code == 431
    assert post(infer_url(world), good())[0] == 200


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SCALE + "surprise: 1\n", ["surprise", "unknown key", "line 6"]),
        (SCALE.replace("memory: 256MiB", "memory: lots"), ["resources.memory", "line 4"]),
        (SCALE.replace("deadline_ms: 5000", "deadline_ms: soon"), ["slo.deadline_ms", "line 5"]),
        (SCALE.replace("scale:1", "scale:77"), ["model", "scale:77", "not in the model store"]),
        ("name: [", ["YAML"]),
    ],
)
def test_a_deployment_that_is_wrong_is_refused_by_key_and_line(world, text, words):
    done = world.cli("deploy", "-", stdin=text.encode())
    assert done.returncode == 4
    for word in words:
        assert word in done.stderr.decode(), done.stderr.decode()
    assert world.deployment("scale").ready == 4


def test_resources_that_no_box_has_are_refused_box_by_box_with_numbers(world):
    world.deploy(SCALE.replace("name: scale", "name: giant").replace("256MiB", "900TiB"))
    wait_until(lambda: len(world.deployment("giant").refusals) == 4, 10)
    for refusal in world.deployment("giant").refusals:
        assert "needs 900 TiB of memory" in refusal.reason
    assert world.cli("deployment", "delete", "giant").returncode == 0
    assert world.cli("deployment", "show", "giant").returncode == 5


@pytest.fixture(scope="module")
def bad_models(tmp_path_factory, scale_model) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "truncated.onnx").write_bytes(scale_model.read_bytes()[:-7])
    (folder / "text.onnx").write_bytes(b"this is not a model\n")
    (folder / "empty.onnx").write_bytes(b"")
    model = onnx.load(str(scale_model))
    tensor = model.graph.initializer[0]
    tensor.ClearField("float_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"
    (folder / "outside.onnx").write_bytes(model.SerializeToString())
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("kind", "words"),
    [("truncated", "truncated"), ("text", "not an ONNX model"), ("empty", "empty"), ("outside", "../../etc/passwd")],
)
def test_a_file_that_is_no_model_is_refused_and_says_why(world, bad_models, kind, words):
    done = world.cli("model", "push", str(bad_models[kind]), "--name", "bad", "--version", "1")
    assert done.returncode == 4
    assert words in done.stderr.decode()
    assert b"bad:1" not in world.cli("model", "list").stdout


def test_a_model_with_another_digest_than_announced_is_refused(world, scale_model):
    with pytest.raises(Exception, match="sha256"):
        world.api.call("PUT", "/v1/models/other/versions/1", object, query={"sha256": "0" * 64}, body=scale_model.read_bytes())


def test_a_version_never_changes_its_bytes(world, tmp_path):
    graph = oh.make_graph(
        [oh.make_node("Neg", ["x"], ["y"])], "neg",
        [oh.make_tensor_value_info("x", 1, ["N", 3])], [oh.make_tensor_value_info("y", 1, ["N", 3])],
    )  # fmt: skip
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=9), tmp_path / "neg.onnx")
    done = world.cli("model", "push", str(tmp_path / "neg.onnx"), "--name", "scale", "--version", "1")
    assert done.returncode == 4
    assert "push it as another version" in done.stderr.decode()


def test_commands_without_a_login_or_a_coordinator_say_what_to_do(world, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("SKERRY_URL", "SKERRY_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run([sys.executable, "-m", "skerry", "status"], capture_output=True, timeout=30, check=False)
    assert done.returncode == 6
    assert b"skerry login" in done.stderr
    monkeypatch.setenv("SKERRY_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("SKERRY_TOKEN", "x")
    done = subprocess.run([sys.executable, "-m", "skerry", "status"], capture_output=True, timeout=30, check=False)
    assert done.returncode == 3
    monkeypatch.setenv("SKERRY_URL", world.fleet.url)
    done = subprocess.run([sys.executable, "-m", "skerry", "status"], capture_output=True, timeout=30, check=False)
    assert done.returncode == 6


def test_node_list_has_the_fields_that_scripts_rely_on(world):
    nodes = json.loads(world.cli("node", "list", "--json").stdout)
    assert {n["id"] for n in nodes} == {"store-1", "store-2", "van-7", "cloud-1"}
    for node in nodes:
        assert {"id", "state", "tier", "labels", "gateway_url"} <= set(node)
    view = json.loads(world.cli("deployment", "show", "scale", "--json").stdout)
    assert {"generation", "ready", "wanted", "placements"} <= set(view)
    assert (world.fleet.env.stat().st_mode & 0o777, len(world.fleet.env.read_text().splitlines())) == (0o600, 2)


def test_the_openapi_document_names_every_call(world):
    request = Request(f"{world.fleet.url}/openapi.json", headers={"Authorization": f"Bearer {world.fleet.token}"})
    with urlopen(request, timeout=10) as response:
        document = json.loads(response.read())
    assert "/v1/deployments/{name}" in document["paths"]
    assert "DeploymentView" in document["components"]["schemas"]


def test_a_box_token_fetches_models_and_nothing_else(world):
    token = (world.fleet.folder / "coordinator" / "box.token").read_text().strip()
    headers = {"Authorization": f"Bearer {token}"}
    request = Request(f"{world.fleet.url}/v1/nodes", headers=headers)
    with pytest.raises(HTTPError) as refused:
        urlopen(request, timeout=10)
    assert refused.value.code == 403
    refused.value.close()


def test_prometheus_finds_the_counters(world):
    post(infer_url(world), good())
    with urlopen(f"{world.box('store-1').gateway_url}/metrics", timeout=10) as response:
        page = response.read().decode()
    line = next(line for line in page.splitlines() if line.startswith("skerry_requests_total{") and 'outcome="edge"' in line)
    assert float(line.rpartition(" ")[2]) >= 1


def test_what_boxes_answered_is_counted_in_the_coordinator_once(world):
    def counted() -> int:
        split = world.api.call("GET", "/v1/split", SplitView, query={"deployment": "scale", "node": "van-7"})
        return sum(point.edge for point in split.points)

    time.sleep(2.5)  # what earlier tests asked for has been taken in
    before = counted()
    for _ in range(20):
        assert post(infer_url(world, "van-7"), good())[0] == 200
    wait_until(lambda: counted() >= before + 20, 15, counted)
    world.do(world.fleet.kill("van-7.agent"))
    world.do(world.fleet.start_process("van-7.agent"))
    wait_until(lambda: world.node("van-7").state == "online", 20)
    time.sleep(3)
    assert counted() == before + 20, "an agent that starts again counts nothing twice"
    serve = world.deployment("scale").serve
    assert 0 < serve.p50_ms <= serve.p99_ms < 5000
    assert serve.late == 0


class Load:
    """Requests one after the other, for as long as it is open; remembers each answer that was not right."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.right = 0
        self.wrong: list[str] = []

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                status, answer, _ = post(self._url, good())
                if status == 200 and answer["outputs"][0]["data"] == [2.0, 4.0, 6.0]:
                    self.right += 1
                else:
                    self.wrong.append(f"{status} {answer}")
            except OSError as exc:
                self.wrong.append(str(exc))
            time.sleep(0.01)


def test_what_a_sandbox_wrote_is_shown_and_asking_costs_no_request(world, scale_model):
    """A model whose warm-up run can't work: its worker says why and ends, and the box beside it goes on serving."""
    warmup = json.dumps([{"name": "z", "shape": [1, 3]}])
    pushed = world.cli("model", "push", str(scale_model), "--name", "sick", "--version", "1", "--warmup", warmup)
    assert pushed.returncode == 0, pushed.stderr
    world.deploy("name: sick\nmodel: sick:1\nplace: {labels: {site: store-1}}\nresources: {memory: 256MiB}\n")

    def replica_of(deployment: str) -> str:
        return next((r.name for r in world.node("store-1").replicas if r.deployment == deployment), "")

    def shown(deployment: str) -> list[str]:
        done = world.cli("logs", "store-1", replica_of(deployment), "--json")
        return json.loads(done.stdout)["lines"] if done.returncode == 0 else [done.stderr.decode()]

    try:
        wait_until(lambda: bool(replica_of("sick")), 20, lambda: world.node("store-1").replicas)
        with Load(infer_url(world)) as load:
            wait_until(lambda: any("load failed" in line for line in shown("sick")), 30, lambda: shown("sick"))
            healthy = world.cli("logs", "store-1", replica_of("scale"), "--lines", "5", "--json")
            assert healthy.returncode == 0, healthy.stderr
            assert json.loads(healthy.stdout)["replica"] == replica_of("scale")
        assert load.right > 10
        assert load.wrong == []
        unknown = world.cli("logs", "store-1", "nothing-0")
        assert unknown.returncode == 5
        assert b"skerry node show store-1" in unknown.stderr
    finally:
        world.api.call("DELETE", "/v1/deployments/sick", msgspec.Raw)


def test_a_drained_box_runs_nothing_and_costs_no_request(world):
    before = world.deployment("scale")
    world.deploy(SCALE.replace("name: scale", "name: single") + "replicas: {count: 1}\n")
    home = world.wait_ready("single").placements[0].node
    with Load(infer_url(world, model="single")) as load:
        done = world.cli("node", "drain", home, "--reason", "new disk", "--wait", "--timeout", "60s", "--json")
        assert done.returncode == 0, done.stderr
        time.sleep(0.5)
    try:
        assert load.right > 5
        assert not load.wrong, load.wrong[:3]
        view = world.node(home)
        assert (view.replicas, view.drain_reason, view.drained_at_ms > 0) == ([], "new disk", True)
        moved = world.wait_ready("single")
        assert [placed.node == home for placed in moved.placements] == [False]
        assert {refusal.node: refusal.reason for refusal in moved.refusals}[home] == "is drained: new disk"
        assert "drained" in world.cli("node", "show", home).stdout.decode()
        kinds = [(event.kind, event.text) for event in world.events(node=home, kind="node.drained")]
        assert kinds[:1] == [("node.drained", "new disk")]
    finally:
        assert world.cli("node", "undrain", home).returncode == 0
        world.cli("deployment", "delete", "single")
    settle(world, before)
    assert world.cli("node", "drain", "nobody").returncode == 5


def test_a_replica_that_is_started_anew_costs_no_request_and_is_not_started_twice(world):
    def sandboxes() -> list[str]:
        return [replica.sandbox for replica in world.node("store-1").replicas if replica.phase == "ready" and replica.name == "scale-0"]

    before = sandboxes()
    with Load(infer_url(world)) as load:
        assert world.cli("node", "restart", "store-1", "scale-0").returncode == 0
        wait_until(lambda: len(found := sandboxes()) == 1 and found != before, 30)
        time.sleep(1)
    assert load.right > 5
    assert not load.wrong, load.wrong[:3]
    after = sandboxes()
    world.deploy(SCALE.replace("name: scale", "name: other"))  # another plan
    world.wait_ready("other")
    world.cli("deployment", "delete", "other")
    world.do(world.fleet.kill("store-2.agent"))
    try:
        was = [replica.sandbox for replica in world.node("store-2").replicas]
        assert world.cli("node", "restart", "store-2", "scale-0").returncode == 0
    finally:
        world.do(world.fleet.start_process("store-2.agent"))
    wait_until(lambda: [one.sandbox in was or one.phase != "ready" for one in world.node("store-2").replicas] == [False], 40)
    assert sandboxes() == after, "once asked for, once done"


@pytest.mark.parametrize("victim", ["store-1.agent", "store-1.warden", "coordinator", "broker", "worker"])
def test_killing_a_program_costs_no_request_and_the_fleet_is_whole_again(world, victim):
    before = world.deployment("scale")
    with Load(infer_url(world)) as load:
        wait_until(lambda: load.right > 5, 10)
        if victim == "worker":
            kill_worker(world, "store-1")
        else:
            world.do(world.fleet.kill(victim))
            time.sleep(0.5)
            world.do(world.fleet.start_process(victim))
        time.sleep(1)
    assert not load.wrong, load.wrong[:3]
    settle(world, before)


def test_killing_the_gateway_costs_only_the_time_to_start_it(world):
    before = world.deployment("scale")
    world.do(world.fleet.kill("store-1.gateway"))
    world.do(world.fleet.start_process("store-1.gateway"))

    def answers() -> bool:
        try:
            return post(infer_url(world), good())[0] == 200
        except OSError:
            return False

    wait_until(answers, 10)
    settle(world, before)


def kill_worker(world: World, box: str) -> None:
    """``kill -9`` of the sandbox's first process."""
    (found,) = (world.box(box).folder / "warden" / "bubblewrap").glob("scale-0-*/handle.json")
    handle = json.loads(found.read_text())
    subprocess.run(["kill", "-9", str(handle["pid"])], check=True)


def settle(world: World, before) -> None:
    """All ready again under the same generation, and every number of every box accounted for."""

    def whole() -> bool:
        try:
            view, nodes, status = world.deployment("scale"), world.nodes(), world.status()
        except Exception:  # noqa: BLE001 - the coordinator is coming up
            return False
        return (
            view.ready == view.wanted == 4
            and all(node.state == "online" for node in nodes)
            and (status.events_missing, status.events_lost) == (0, 0)
            and status.broker_connected
        )

    wait_until(
        whole,
        60,
        lambda: f"{world.status()} {[(n.id, n.state) for n in world.nodes()]} {world.deployment('scale').placements}\n{world.log_tails()}",
    )
    assert world.deployment("scale").generation == before.generation
    wait_until(lambda: all(node.outbox_events == 0 for node in world.nodes()), 30, lambda: [(n.id, n.outbox_events) for n in world.nodes()])


def test_a_restarted_warden_adopts_what_runs(world):
    (handle,) = (world.box("store-2").folder / "warden" / "bubblewrap").glob("scale-0-*/handle.json")
    before = json.loads(handle.read_text())["pid"]
    world.do(world.fleet.kill("store-2.warden"))
    world.do(world.fleet.start_process("store-2.warden"))
    wait_until(lambda: any(e.kind == "replica.adopted" for e in world.events(node="store-2")), 20)
    wait_until(lambda: world.deployment("scale").ready == 4, 20)
    assert json.loads(handle.read_text())["pid"] == before


def test_what_documents_prove_of_the_time_reaches_the_boxs_other_programs(world):
    folder = world.box("store-1").folder
    now_ms = time.time_ns() // 10**6
    told = codec.decode((folder / "routes.json").read_bytes(), RouteTable).time
    assert now_ms - 3_600_000 < told.at_least_ms(uptime_ms()) <= now_ms, "the gateway"
    kept = folder / "agent" / "proved_time.json"
    os.kill(world.fleet.pid("store-1.agent"), signal.SIGTERM)
    wait_until(kept.exists, 10)
    assert codec.decode(kept.read_bytes(), Proof).at_least_ms(uptime_ms()) >= told.moment_ms, "the agent"
    world.do(world.fleet.start_process("store-1.agent"))
    wait_until(lambda: world.node("store-1").state == "online", 30)


def test_deleting_a_deployment_drains_it_everywhere(world, scale_model):
    world.deploy(SCALE.replace("name: scale", "name: passing"))
    world.wait_ready("passing")
    assert world.cli("deployment", "delete", "passing").returncode == 0
    wait_until(lambda: all(r.deployment != "passing" for n in world.nodes() for r in n.replicas), 20)
    assert not list((world.box("store-1").folder / "warden" / "bubblewrap").glob("passing-0-*"))
    assert not list((world.box("store-1").folder / "warden" / "sandboxes").glob("passing-0-*"))
    assert post(infer_url(world, model="passing"), good())[0] == 404


def test_the_warden_has_no_socket_but_unix_ones(world):
    inodes = {inode for name in ("tcp", "tcp6", "udp", "udp6", "raw") for inode in socket_inodes(name)}
    held = set()
    for entry in Path(f"/proc/{world.fleet.pid('store-1.warden')}/fd").iterdir():
        target = str(entry.readlink())
        if target.startswith("socket:["):
            held.add(target[8:-1])
    assert held, "it listens for the agent"
    assert not held & inodes
    gateway = {str(entry.readlink())[8:-1] for entry in Path(f"/proc/{world.fleet.pid('store-1.gateway')}/fd").iterdir()}
    assert gateway & inodes, "the check would see one"


def socket_inodes(name: str) -> set[str]:
    return {line.split()[9] for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]}
