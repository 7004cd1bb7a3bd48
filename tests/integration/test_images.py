"""Images built, saved and loaded on a real engine: the worker's, and a model server that is not ours."""

import asyncio
import contextlib
import io
import json
import os
import shutil
import tarfile
import time
import urllib.request
import uuid
from pathlib import Path

import docker
import msgspec
import numpy as np
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from typer.testing import CliRunner

from edge_agent.warden.drivers.docker import DockerDriver
from edge_agent.warden.drivers.host_runtime import image_environment, with_model, worker_argv
from edge_agent.warden.ports import DriverFailed, Sandbox, SandboxSpec
from skerry.cli.main import app
from skerry.image.base import find_base
from skerry.image.build import files_below, lock_of, pack
from skerry.image.engine import Engine, ImageError
from skerry.image.lock import install
from skerry.wire import ipc, oip
from skerry.wire.messages import Server
from tests.conftest import need, unreachable
from tests.contract.test_drivers import docker_socket, spec_of
from tests.e2e.world import running as running_fleet
from tests.e2e.world import wait_until
from tests.integration.test_worker import Client

ROOT = Path(__file__).parents[2]
ABSENT = f"sha256:{'0' * 64}"

pytestmark = pytest.mark.timeout(400)  # the first test that needs it makes a Debian
X = oip.Tensor("x", "FP32", (1, 3), np.array([[1, 2, 3]], "<f4").tobytes())


def absence() -> str:
    if reason := unreachable(docker_socket()):
        return reason
    try:
        Engine(docker_socket()).id_of("nothing:at-all")
    except ImageError as exc:
        return str(exc)
    return ""


@pytest.fixture(scope="module")
def client():
    need("docker", absence())
    with contextlib.closing(docker.APIClient(f"unix://{docker_socket()}")) as client:
        yield client


@pytest.fixture(scope="module")
def can_make_a_base(client):
    need("root", "" if os.geteuid() == 0 else "debootstrap needs root")
    found = shutil.which("debootstrap", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    need("debootstrap", "" if found else "debootstrap is not installed")


def skerry(*words: str, fails_with: str = "") -> str:
    """What a command wrote; its exit status agrees with ``fails_with``, a word that its error must hold."""
    outcome = CliRunner().invoke(app, [*words, "--docker-socket", str(docker_socket())])
    assert (outcome.exit_code != 0) == bool(fails_with), outcome.output
    assert fails_with in outcome.output
    return outcome.stdout


class Image(msgspec.Struct, frozen=True):
    """What ``skerry image build --json`` says."""

    id: str
    tag: str
    base: str
    python: str
    archive: str
    sbom: str


@pytest.fixture(scope="module")
def worker_image(can_make_a_base, client, tmp_path_factory):
    folder = tmp_path_factory.mktemp("image")
    tag = f"skerry-test-{uuid.uuid4().hex[:8]}:1"
    written = ["--save", str(folder / "worker.tar"), "--sbom", str(folder / "worker.cdx.json")]
    yield msgspec.json.decode(skerry("image", "build", "--json", "--tag", tag, *written), type=Image)
    client.remove_image(tag, force=True)


@contextlib.contextmanager
def running(client, image: str, folder: Path, model: Path):
    """A worker of ``image`` with nothing but what a sandbox gives it; its socket."""
    folder.chmod(0o777)
    host = client.create_host_config(
        network_mode="none",
        read_only=True,
        cap_drop=["ALL"],
        security_opt=["no-new-privileges:true"],
        binds=[f"{model}:/model/model.onnx:ro", f"{folder}:/run/skerry"],
    )
    made = client.create_container(image, ["--model", "/model/model.onnx", "--socket", "/run/skerry/worker.sock"], host_config=host)
    try:
        client.start(made["Id"])
        deadline = time.monotonic() + 30
        while not (folder / "worker.sock").exists():
            state = client.inspect_container(made["Id"])["State"]
            assert state["Running"], client.logs(made["Id"]).decode()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield folder / "worker.sock"
    finally:
        client.remove_container(made["Id"], force=True)


def test_an_image_that_was_built_serves_a_model_without_a_shell_a_network_or_a_writable_root(worker_image, client, tmp_path, scale_model):
    inspected = client.inspect_image(worker_image.id)
    assert inspected["Config"]["User"] == "65534:65534"
    assert inspected["Config"]["Entrypoint"] == ["python3", "-m", "edge_agent.worker"]
    with running(client, worker_image.id, tmp_path, scale_model) as path, contextlib.closing(Client(path)) as worker:
        answer, body = worker.call([X])
        assert answer.error == ""
        assert np.frombuffer(body, "<f4").tolist() == [2.0, 4.0, 6.0]


def test_the_same_libraries_and_code_are_the_same_image_again(worker_image):
    again = msgspec.json.decode(skerry("image", "build", "--json", "--tag", worker_image.tag), type=Image)
    assert again.id == worker_image.id


def test_an_archive_that_is_loaded_elsewhere_gives_the_id_that_was_pinned(worker_image, client):
    client.remove_image(worker_image.tag, force=True)
    assert Engine(docker_socket()).id_of(worker_image.tag) == ""
    loaded = json.loads(skerry("image", "load", worker_image.archive, "--json"))
    assert loaded == [{"id": worker_image.id, "name": worker_image.tag}]


def test_the_bill_of_materials_is_valid_and_names_wheels_by_their_locked_digest_and_debians_packages(worker_image):
    text = Path(worker_image.sbom).read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    subject = bill["metadata"]["component"]
    assert (subject["type"], subject["hashes"]) == ("container", [{"alg": "SHA-256", "content": worker_image.id.removeprefix("sha256:")}])
    parts = {part["name"]: part for part in bill["components"]}
    lock = lock_of("cpu").read_text()
    for name in ("onnxruntime", "numpy", "msgspec"):
        assert parts[name]["purl"] == f"pkg:pypi/{name}@{parts[name]['version']}"
        assert f"--hash=sha256:{parts[name]['hashes'][0]['content']}" in lock
    assert parts["libc6"]["purl"].startswith("pkg:deb/debian/libc6@2.")
    assert "distro=debian-12" in parts["libc6"]["purl"]


@pytest.fixture
def empty_image(client):
    """An image without an interpreter."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("nothing"))
    tag = f"skerry-test-empty-{uuid.uuid4().hex[:8]}"
    client.import_image_from_data(archive.getvalue(), tag, "1")
    yield f"{tag}:1"
    client.remove_image(f"{tag}:1", force=True)


def test_a_base_without_an_interpreter_is_refused_by_name(empty_image):
    skerry("image", "build", "--base", empty_image, fails_with="python3 can't be started")


def test_a_base_that_nobody_has_is_refused_by_name(client):
    skerry("image", "build", "--base", "localhost:1/nobody/has:this", fails_with="not on this engine, and it can't be pulled")


@pytest.mark.parametrize("base", ["debootstrap:../etc", "debootstrap:-x", "debootstrap:a b"])
def test_a_suite_that_is_no_name_is_refused(client, base):
    skerry("image", "build", "--base", base, fails_with="is not the name of a Debian suite")


def test_an_engine_that_is_not_there_is_named(tmp_path):
    outcome = CliRunner().invoke(app, ["image", "build", "--docker-socket", str(tmp_path / "none.sock")])
    assert outcome.exit_code == 1
    assert "no Docker Engine can be reached" in outcome.output
    assert "--docker-socket" in outcome.output


def test_a_gpu_image_wants_a_base_with_the_runtime():
    outcome = CliRunner().invoke(app, ["image", "build", "--accelerator", "cuda"])
    assert outcome.exit_code == 2
    assert "--base" in outcome.output


def test_a_file_that_is_no_archive_is_refused(client, tmp_path):
    (tmp_path / "no.tar").write_bytes(b"no archive")
    skerry("image", "load", str(tmp_path / "no.tar"), fails_with="error")
    skerry("image", "load", str(tmp_path / "absent.tar"), fails_with="absent.tar")


# -- a model server of one's own


@pytest.fixture(scope="module")
def server_image(can_make_a_base, client, tmp_path_factory):
    """MLServer from its lock file, packed as its users would: the image's id."""
    folder, engine = tmp_path_factory.mktemp("mlserver"), Engine(docker_socket())
    base = find_base(engine, "debootstrap", mirror="", say=print)
    install(ROOT / "requirements" / "mlserver.txt", folder / "dependencies", base.python)
    source = ROOT / "tests" / "images" / "mlserver"
    files = [*files_below(folder / "dependencies", "dependencies"), *((path, path.name) for path in source.iterdir() if path.is_file())]
    pack(files, folder / "context.tar")
    shutil.rmtree(folder / "dependencies")
    tag = f"skerry-test-mlserver-{uuid.uuid4().hex[:8]}:1"
    yield engine.build(folder / "context.tar", arguments={"BASE": base.id}, tag=tag, say=print)
    (folder / "context.tar").unlink()
    client.remove_image(tag, force=True)


class Box:
    """A Docker driver, and the specification of a sandbox that it can start."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.driver = DockerDriver(folder / "run", socket=docker_socket(), owner=f"test-{uuid.uuid4().hex[:8]}")

    def spec(self, name: str, server: Server) -> SandboxSpec:
        plain = spec_of(self.folder, self.model, name=name)
        return msgspec.structs.replace(plain, image=server.image, server=server, memory_bytes=1024 * 2**20)

    def sandbox(self, name: str) -> Sandbox:
        (found,) = [sandbox for sandbox in asyncio.run(self.driver.sandboxes()) if sandbox.name == name]
        return found

    def start(self, spec: SandboxSpec) -> None:
        asyncio.run(self.driver.start(spec))

    def worker(self, spec: SandboxSpec) -> Client:
        """A connection to the sandbox's socket once it is there."""
        deadline = time.monotonic() + 90
        while not (spec.socket_dir / "worker.sock").exists():
            sandbox = self.sandbox(spec.name)
            assert sandbox.running, sandbox.exit_reason
            assert time.monotonic() < deadline, asyncio.run(self.driver.logs(spec.name, lines=30)).lines
            time.sleep(0.05)
        return Client(spec.socket_dir / "worker.sock")

    def container(self, client, name: str, suffix: str = "") -> dict:
        return client.inspect_container(f"skerry-{self.driver._owner}-{name}{suffix}")

    def end(self) -> None:
        for sandbox in asyncio.run(self.driver.sandboxes()):
            asyncio.run(self.driver.stop(sandbox.name, grace_s=0))


@pytest.fixture
def box(client, tmp_path, scale_model):
    box = Box(tmp_path, scale_model)
    yield box
    box.end()


@pytest.fixture(scope="module")
def two_servers(server_image, client, tmp_path_factory, scale_model):
    """Two replicas of MLServer in sandboxes, each with a connection to its socket."""
    box = Box(tmp_path_factory.mktemp("servers"), scale_model)
    try:
        specs = [box.spec(name, Server(server_image, model="scale")) for name in ("own-0", "own-1")]
        for spec in specs:
            box.start(spec)
        with contextlib.ExitStack() as stack:
            yield box, [stack.enter_context(contextlib.closing(box.worker(spec))) for spec in specs]
    finally:
        box.end()


def inside(client, container: str, code: str) -> str:
    """What a Python program says that is run in a running container, as the user that runs there."""
    made = client.exec_create(container, ["python3", "-c", code])
    return client.exec_start(made["Id"]).decode()


def test_a_server_that_is_not_ours_answers_like_a_worker(two_servers):
    _, workers = two_servers
    for worker in workers:
        assert worker.hello.inputs == [ipc.TensorSpec("x", "FP32", (-1, 3))]
        assert worker.hello.outputs == [ipc.TensorSpec("y", "FP32", (-1, 3))]
        assert "mlserver" in worker.hello.provider
        for wanted in ([], ["y"]):
            answer, body = worker.call([X], wanted)
            assert (answer.error, [output.name for output in answer.outputs]) == ("", ["y"])
            assert np.frombuffer(body, "<f4").tolist() == [2.0, 4.0, 6.0]


def test_what_a_server_refuses_comes_back_as_the_callers_mistake(two_servers):
    _, (worker, _) = two_servers
    answer, _ = worker.call([msgspec.structs.replace(X, name="nothing")])
    assert "the server" in answer.error
    assert worker.call([X])[0].error == ""


def test_a_server_has_a_loopback_and_nothing_else(two_servers, client):
    box, _ = two_servers
    program = (
        "import os,socket\n"
        "print(sorted(os.listdir('/sys/class/net')), open('/proc/net/route').read().splitlines()[1:], os.path.exists('/run/skerry'))\n"
        "for address in ('192.0.2.1', '10.0.0.1', '172.17.0.1'):\n"
        "    try: socket.create_connection((address, 80), timeout=2); print('reached', address)\n"
        "    except OSError as exc: print(exc.errno)\n"
    )
    said = inside(client, box.container(client, "own-0")["Id"], program).splitlines()
    assert said == ["['lo'] [] False", "101", "101", "101"], "network is unreachable"


def test_two_replicas_of_a_server_can_not_reach_each_other(two_servers, client):
    box, _ = two_servers
    listener = (
        "import os,socket,sys,time\n"
        "s = socket.socket(); s.bind(('0.0.0.0', 9999)); s.listen()\n"
        "if os.fork() == 0: time.sleep(30)\n"
        "socket.create_connection(('127.0.0.1', 9999), timeout=2); print('open')\n"
        "sys.stdout.flush(); os._exit(0)\n"
    )
    first, second = (box.container(client, name) for name in ("own-0", "own-1"))
    assert inside(client, first["Id"], listener).startswith("open")
    addresses = ["127.0.0.1", "own-0", first["Config"]["Hostname"], first["Id"][:12]]
    reach = (
        "import socket\n"
        f"for address in {addresses}:\n"
        "    try: socket.create_connection((address, 9999), timeout=2); print('reached', address)\n"
        "    except OSError as exc: print('no')\n"
    )
    assert set(inside(client, second["Id"], reach).split()) == {"no"}
    assert first["NetworkSettings"]["Networks"].keys() == {"none"}


def test_a_server_is_confined_as_a_worker_is(two_servers, client):
    box, _ = two_servers
    config = box.container(client, "own-0")["HostConfig"]
    relay = box.container(client, "own-0", ".relay")["HostConfig"]
    for one in (config, relay):
        assert (one["ReadonlyRootfs"], one["CapDrop"], one["Privileged"]) == (True, ["ALL"], False)
        assert "no-new-privileges:true" in one["SecurityOpt"]
        assert any(option.startswith("seccomp={") for option in one["SecurityOpt"])
        assert one["PidsLimit"] == 128
    assert config["Memory"] + relay["Memory"] == 1024 * 2**20, "together they keep to the limit"
    ask = "import os\ntry: open('/opt/x', 'w')\nexcept OSError as exc: print(os.getuid(), exc.strerror)\n"
    said = inside(client, box.container(client, "own-0")["Id"], ask)
    assert said.strip() == f"{box.spec('own-0', Server('x')).uid} Read-only file system"


def test_server_and_relay_are_one_sandbox_to_whoever_looks(two_servers):
    box, _ = two_servers
    assert [(s.name, s.running) for s in asyncio.run(box.driver.sandboxes())] == [("own-0", True), ("own-1", True)]
    usage = asyncio.run(box.driver.stats("own-0"))
    assert usage is not None
    assert usage.memory_bytes > 60 * 2**20
    lines = asyncio.run(box.driver.logs("own-0", lines=50)).lines
    assert any("Uvicorn" in line or "mlserver" in line for line in lines)


def test_a_server_that_dies_ends_its_sandbox_and_can_be_started_again(box, server_image, client):
    spec = box.spec("mortal-0", Server(server_image, model="scale"))
    box.start(spec)
    box.worker(spec).close()
    client.kill(box.container(client, "mortal-0")["Id"])
    assert not box.sandbox("mortal-0").running
    assert box.sandbox("mortal-0").ending.exit_code == 137
    (spec.socket_dir / "worker.sock").unlink()
    box.start(spec)
    with contextlib.closing(box.worker(spec)) as worker:
        assert worker.call([X])[0].error == ""
    client.kill(box.container(client, "mortal-0", ".relay")["Id"])
    assert not box.sandbox("mortal-0").running, "without its relay nobody reaches it"
    asyncio.run(box.driver.stop("mortal-0", grace_s=1))
    assert asyncio.run(box.driver.sandboxes()) == []
    assert client.containers(all=True, filters={"name": "mortal-0"}) == []


def test_an_image_that_is_not_on_the_box_is_named_with_what_to_do(box, client):
    with pytest.raises(DriverFailed, match=rf"image {ABSENT} is not on this box: 'skerry image load' it"):
        box.start(box.spec("absent-0", Server(ABSENT, model="m")))
    worker = msgspec.structs.replace(spec_of(box.folder, box.model), image=ABSENT)
    with pytest.raises(DriverFailed, match="skerry image load"):
        box.start(worker)
    assert asyncio.run(box.driver.sandboxes()) == []


def test_a_server_is_refused_where_its_relay_would_not_find_it(tmp_path, scale_model):
    box = Box(tmp_path, scale_model)
    driver = DockerDriver(tmp_path / "run", socket=docker_socket(), runtime="runsc", owner="test")
    with pytest.raises(DriverFailed, match="rung container alone"):
        asyncio.run(driver.start(box.spec("own-0", Server(ABSENT, model="m"))))


def test_a_worker_of_an_image_is_a_sandbox_like_any_other(box, worker_image):
    plain = spec_of(box.folder, box.model, name="imaged-0")
    argv = with_model(worker_argv(1.0, interpreter="python3"), [])
    spec = msgspec.structs.replace(plain, image=worker_image.id, argv=argv, environment=image_environment(1.0))
    box.start(spec)
    with contextlib.closing(box.worker(spec)) as worker:
        _, body = worker.call([X])
        assert np.frombuffer(body, "<f4").tolist() == [2.0, 4.0, 6.0]
        assert "seccomp" in worker.hello.confinement


def test_a_fleet_serves_from_images_that_a_deployment_names_and_says_which_it_lacks(server_image, worker_image, scale_model):
    place = "place: {labels: {site: store-1}}\nsplit: {mode: edge}\nresources: {memory: 512MiB}\n"
    place += "slo: {deadline_ms: 15000}\n"  # a server's first call may take longer than what a call is given by default
    with running_fleet(drivers=("docker",)) as world:
        world.push(scale_model, "scale")
        world.deploy(f"name: own\nmodel: scale:1\n{place}server: {{image: '{server_image}', model: scale}}\n")
        world.deploy(f"name: ours\nmodel: scale:1\n{place}image: '{worker_image.id}'\n")
        world.deploy(f"name: lacks\nmodel: scale:1\n{place}server: {{image: '{ABSENT}'}}\n")
        for name in ("own", "ours"):
            view = world.wait_ready(name, 120)
            assert [(p.driver, p.rung, p.is_current) for p in view.placements] == [("docker", "container", True)]
            body, headers = oip.render_request([X])
            url = f"{world.box('store-1').gateway_url}/v2/models/{name}/infer"
            with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=20) as reply:
                answer = oip.parse_answer(reply.read(), reply.headers[oip.HEADER_LENGTH])
                assert reply.headers["Skerry-Served-By"] == "edge"
            assert np.frombuffer(answer.outputs[0].data, "<f4").tolist() == [2.0, 4.0, 6.0]

        def word() -> str:
            return " ".join(placement.status for placement in world.deployment("lacks").placements)

        wait_until(lambda: f"image {ABSENT} is not on this box" in word(), 30, word)
