"""The Ansible collection: lint's strictest profile, a playbook that parses, and templates that the programs and the broker accept."""

import contextlib
import datetime
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import tomllib
import uuid
from pathlib import Path

import docker
import paho.mqtt.client as paho
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from paho.mqtt.properties import Properties

from coordinator.config import Config as CoordinatorConfig
from coordinator.signer.config import Config as SignerConfig
from edge_agent.gateway.config import Config as GatewayConfig
from edge_agent.link.config import Config as AgentConfig
from edge_agent.warden.config import Config as WardenConfig
from skerry.runtime import settings
from skerry.wire import topics
from tests.conftest import need, unreachable
from tests.contract.test_drivers import docker_socket

ANSIBLE = Path(__file__).resolve().parents[2] / "ansible"
SYSTEMD = ANSIBLE.parent / "systemd"
INVENTORY = ANSIBLE / "inventory.example.yml"
FLEET, NODE = "shops", "store-1"
AWKWARD = 'kälte "A" \\ 1'
"""Quotes, a backslash and a letter beyond ASCII, in a label."""

RENDER = """
- hosts: all
  connection: local
  gather_facts: false
  roles:
    - {role: edge_agent, when: false}
    - {role: coordinator, when: false}
    - {role: broker, when: false}
  post_tasks:
    - ansible.builtin.copy:  # one task, since each costs a second
        dest: "{{ out }}/all.json"
        mode: "0600"
        content: "{{ dict(names | zip(query('ansible.builtin.template', *paths))) | to_json }}"
      vars:
        names: "{{ paths | map('basename') | map('splitext') | map('first') }}"
        paths: "{{ templates | map('regex_replace', '^', playbook_dir ~ '/roles/') }}"
"""


TEMPLATES = [
    *(f"edge_agent/templates/{name}.toml.j2" for name in ("agent", "warden", "gateway")),
    "edge_agent/templates/gateway-listen.conf.j2",
    *(f"coordinator/templates/{name}.toml.j2" for name in ("coordinator", "signer")),
    *(f"broker/templates/{name}.j2" for name in ("mosquitto.conf", "acl", "override.conf")),
]


def tool(name: str) -> str:
    """A console command of this environment, or of the PATH."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    need(name, "" if path else "not installed")
    assert path is not None
    return path


def ansible(home: Path, command: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run one of Ansible's commands on this collection; nothing of it is written beside the checkout."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {
        **os.environ,
        "ANSIBLE_HOME": str(home),
        "ANSIBLE_NOCOLOR": "1",
        "NO_COLOR": "1",
        "PATH": path,
        "PYTHONWARNINGS": "ignore",
    }
    environment |= {"ANSIBLE_CONFIG": str(ANSIBLE / "ansible.cfg"), "ANSIBLE_LOCALHOST_WARNING": "False", "LC_ALL": "C.UTF-8"}
    return subprocess.run(
        [tool(command), *map(str, arguments)], cwd=ANSIBLE, env=environment, capture_output=True, text=True, timeout=100, check=False
    )


def test_ansible_lint_finds_nothing_at_its_strictest_profile(tmp_path):
    copy = tmp_path / "ansible"  # lint leaves a cache where it works
    shutil.copytree(ANSIBLE, copy)
    outcome = ansible(tmp_path / "home", "ansible-lint", "--offline", "--profile", "production", "-q", "--project-dir", copy, copy)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_the_playbook_parses_with_the_example_inventory(tmp_path):
    outcome = ansible(tmp_path, "ansible-playbook", "-i", INVENTORY, "--syntax-check", "playbooks/site.yml")
    assert outcome.returncode == 0, outcome.stderr


LOAD = """
- hosts: all
  connection: local
  gather_facts: false
  roles:
    - sandbox_image
"""


def test_an_image_is_loaded_where_it_is_absent_and_only_there(tmp_path):
    need("docker", unreachable(docker_socket()))
    engine = docker.APIClient(f"unix://{docker_socket()}")
    tag = f"skerry-test-role-{uuid.uuid4().hex[:8]}:1"
    with contextlib.closing(engine):
        layer = io.BytesIO()
        with tarfile.open(fileobj=layer, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("nothing"))
        engine.import_image_from_data(layer.getvalue(), *tag.split(":"))
        pinned = engine.inspect_image(tag)["Id"]
        (tmp_path / "saved.tar").write_bytes(b"".join(engine.get_image(tag)))
        engine.remove_image(tag, force=True)
        (tmp_path / "root" / "current" / "bin").mkdir(parents=True)
        (tmp_path / "root" / "current" / "bin" / "skerry").symlink_to(tool("skerry"))
        (tmp_path / "load.yml").write_text(LOAD)
        (tmp_path / "roles").symlink_to(ANSIBLE / "roles")

        def load(identifier: str, *options: str) -> subprocess.CompletedProcess[str]:
            given = {
                "sandbox_image_archives": [{"id": identifier, "archive": str(tmp_path / "saved.tar")}],
                "sandbox_image_docker_socket": str(docker_socket()),
                "sandbox_image_root": str(tmp_path / "root"),
                "sandbox_image_staging": str(tmp_path),
                "ansible_python_interpreter": sys.executable,
            }
            words = ["-i", "box,", "-e", json.dumps(given), *options, tmp_path / "load.yml"]
            return ansible(tmp_path / "home", "ansible-playbook", *words)

        try:
            for options, changed in ((["--check"], 0), ([], 1), ([], 0)):
                outcome = load(pinned, *options)
                assert outcome.returncode == 0, outcome.stdout + outcome.stderr
                if not options:
                    assert ("changed=0" in outcome.stdout) == (not changed), outcome.stdout
                    assert engine.inspect_image(pinned)["RepoTags"] == [tag]
            outcome = load(f"sha256:{'0' * 64}")
            assert outcome.returncode != 0
            assert "does not hold" in outcome.stdout
            assert list(tmp_path.glob("skerry-sha256-*")) == [], "no archive stays on the box"
        finally:
            engine.remove_image(tag, force=True)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    """Every template, rendered by Ansible itself for one box of the example inventory, with the roles' own defaults."""
    work = tmp_path_factory.mktemp("rendered")
    (work / "render.yml").write_text(RENDER)
    (work / "roles").symlink_to(ANSIBLE / "roles")
    (work / "out").mkdir()
    given = {
        "out": str(work / "out"),
        "templates": TEMPLATES,
        "edge_agent_labels": {"site": NODE, "room": AWKWARD},
        "edge_agent_warden_settings": {"memory_bytes": 2**31},
        "edge_agent_agent_settings": {"sample_every_s": 2.5},
        "edge_agent_upstream_proxy": "http://proxy.example.org:3128",
        "coordinator_broker_ca_file": "ca.crt",
        "coordinator_broker_cert_file": "coordinator.crt",
        "coordinator_plain_http": True,
        "coordinator_public_key": "unused",
        "skerry_model_keys": "-----BEGIN PUBLIC KEY-----",
        "broker_config_dir": str(work / "broker"),
        "broker_data_dir": str(work / "data"),
        "broker_port": _free_port(),
    }
    (work / "given.yml").write_text(yaml.safe_dump(given))
    outcome = ansible(
        work, "ansible-playbook", "-i", INVENTORY, "--limit", f"{NODE}.example.org", "-e", f"@{work / 'given.yml'}", work / "render.yml"
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    for name, text in json.loads((work / "out/all.json").read_text()).items():
        (work / "out" / name).write_text(text)
    return work / "out"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("agent", AgentConfig),
        ("warden", WardenConfig),
        ("gateway", GatewayConfig),
        ("coordinator", CoordinatorConfig),
        ("signer", SignerConfig),
    ],
)
def test_a_program_takes_its_rendered_settings(rendered, name, kind):
    loaded = settings.load(rendered / f"{name}.toml", kind)
    if isinstance(loaded, WardenConfig | CoordinatorConfig):
        assert loaded.model_keys_file == Path("/etc/skerry/model-keys.pem")


def test_rendered_settings_say_what_the_inventory_says(rendered):
    files = {name: tomllib.loads((rendered / f"{name}.toml").read_text()) for name in ("agent", "warden", "gateway", "coordinator")}
    agent, warden, gateway = files["agent"], files["warden"], files["gateway"]
    assert (agent["fleet"], agent["node"], agent["tier"]) == (FLEET, NODE, "edge")
    assert agent["labels"] == {"site": NODE, "room": AWKWARD}
    assert agent["gateway_url"] == f"http://{NODE}.example.org:8000"
    assert agent["sample_every_s"] == 2.5
    assert agent["broker"] == {
        "host": "broker.example.org",
        "port": 8883,
        "ca_file": "/etc/skerry/tls/broker-ca.crt",
        "cert_file": "/run/credentials/skerry-agent.service/broker.crt",
        "key_file": "/run/credentials/skerry-agent.service/broker.key",
    }
    assert agent["coordinator"] == {"url": "http://coordinator.example.org:8080", "token_file": "/etc/skerry/coordinator-token"}
    assert (warden["drivers"], warden["memory_bytes"]) == (["docker", "bubblewrap"], 2**31)
    assert (gateway["listen"], gateway["upstream_proxy"]) == ("0.0.0.0:8000", "http://proxy.example.org:3128")
    assert files["coordinator"]["listen"] == "0.0.0.0:8080"
    # Where two programs meet, their settings name the same path.
    assert agent["warden_socket"] == warden["socket"]
    assert agent["gateway_socket"] == gateway["socket"]
    assert gateway["routes_file"] == warden["routes_file"]
    assert warden["incoming_dir"] == f"{agent['state_dir']}/incoming"


def test_settings_and_units_name_the_same_files(rendered):
    agent = tomllib.loads((rendered / "agent.toml").read_text())
    unit = (SYSTEMD / "skerry-agent.service").read_text()
    name = Path(agent["coordinator"]["token_file"]).name  # the agent looks for a credential of the file's name
    assert f"LoadCredential={name}:{agent['coordinator']['token_file']}\n" in unit
    drop_in = (SYSTEMD / "skerry-agent.service.d/broker-tls.conf").read_text()
    for key in ("cert_file", "key_file"):
        folder, _, credential = agent["broker"][key].rpartition("/")
        assert folder == "/run/credentials/skerry-agent.service"
        assert f"LoadCredential={credential}:/etc/skerry/tls/" in drop_in
    for folder in ("warden", "gateway"):
        assert f"ReadWritePaths=/run/skerry/{folder}\n" in (SYSTEMD / f"skerry-{folder}.service").read_text()


def test_the_port_that_is_held_for_the_gateway_is_its_own(rendered):
    listen = tomllib.loads((rendered / "gateway.toml").read_text())["listen"]
    assert (rendered / "gateway-listen.conf").read_text().endswith(f"ListenStream=\nListenStream={listen}\n")


def test_a_rollback_knows_every_file_that_an_installation_writes():
    for role in ("edge_agent", "coordinator"):
        listed = {entry["path"] for entry in yaml.safe_load((ANSIBLE / f"roles/{role}/vars/main.yml").read_text())[f"{role}_files"]}
        for unit in ("coordinator", "signer") if role == "coordinator" else ("agent", "warden", "gateway"):
            assert f"/etc/skerry/{unit}.toml" in listed
            assert f"/etc/systemd/system/skerry-{unit}.service" in listed
            for drop_in in (SYSTEMD / f"skerry-{unit}.service.d").glob("*.conf"):
                assert f"/etc/systemd/system/{drop_in.parent.name}/{drop_in.name}" in listed


def test_secrets_are_kept_out_of_the_output_and_a_rescue_ends_in_failure():
    for role in ("edge_agent", "coordinator", "broker"):
        tasks = [task for path in (ANSIBLE / f"roles/{role}/tasks").glob("*.yml") for task in yaml.safe_load(path.read_text())]
        secret = [task for task in tasks if any(word in str(task) for word in ("_token }}", "_key_file }}"))]
        assert secret
        assert all(task.get("no_log") is True for task in secret)
        rescues = [task["rescue"] for task in tasks if "rescue" in task]
        assert [rescue[-1].get("ansible.builtin.fail") is not None for rescue in rescues] == [True]
    play = yaml.safe_load((ANSIBLE / "playbooks/site.yml").read_text())[-1]
    assert play["serial"][0] == 1
    assert play["max_fail_percentage"] == 0


# -- the broker, with the rendered settings


def _issue(
    folder: Path, name: str, ca: tuple[x509.Name, ec.EllipticCurvePrivateKey] | None
) -> tuple[x509.Name, ec.EllipticCurvePrivateKey]:
    """A certificate for ``name`` at ``folder/name.crt`` and ``.key``; its own issuer where ``ca`` is None."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    issuer, signing_key = ca or (subject, key)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=ca is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(signing_key, hashes.SHA256())
    )
    (folder / f"{name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / f"{name}.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return subject, key


@pytest.fixture(scope="module")
def broker(rendered):
    """mosquitto with the settings and access list as rendered; yields its port and a folder of certificates."""
    program = shutil.which("mosquitto", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")
    need("mosquitto", "" if program else "not installed")
    folder = rendered.parent / "broker" / "skerry"
    folder.mkdir(parents=True)
    (rendered.parent / "data").mkdir()
    ca = _issue(folder, "ca", None)
    for name in ("server", NODE, "_coordinator"):
        _issue(folder, name, ca)
    shutil.copy(rendered / "acl", folder / "acl")
    config = rendered / "mosquitto.conf"
    if os.geteuid() == 0:  # else it takes the user `mosquitto`, who can't see these folders
        config.write_text(config.read_text() + "user root\n")
    log = (rendered.parent / "mosquitto.log").open("wb")
    process = subprocess.Popen([str(program), "-c", str(config)], stdout=log, stderr=log)
    port = next(int(line.split()[1]) for line in config.read_text().splitlines() if line.startswith("listener "))
    try:
        deadline = time.monotonic() + 10
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (rendered.parent / "mosquitto.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield port, folder
    finally:
        process.terminate()
        process.wait(10)
        log.close()


class Client:
    """An MQTT 5 client with a certificate; every call waits for the broker's answer, for at most 5 s."""

    def __init__(self, port: int, folder: Path, name: str) -> None:
        self._answers: dict[tuple[str, int], int] = {}
        self.client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id="anything", protocol=paho.MQTTv5)
        self.client.tls_set(ca_certs=str(folder / "ca.crt"), certfile=str(folder / f"{name}.crt"), keyfile=str(folder / f"{name}.key"))
        self.client.on_publish = lambda _c, _u, mid, code, _p: self._answers.__setitem__(("publish", mid), code.value)
        self.client.on_message = lambda _c, _u, message: self.heard.append(message.topic)
        self.client.on_subscribe = lambda _c, _u, mid, codes, _p: self._answers.__setitem__(("subscribe", mid), codes[0].value)
        self.heard: list[str] = []
        self.client.connect("localhost", port, keepalive=10)
        self._until(self.client.is_connected)

    def _until(self, happened) -> None:
        deadline = time.monotonic() + 5
        while not happened():
            assert time.monotonic() < deadline
            if self.client.loop(0.05) != paho.MQTT_ERR_SUCCESS:
                raise ConnectionError("the broker closed the connection")

    def publish(self, topic: str) -> bool:
        """Whether the broker took it."""
        mid = self.client.publish(topic, b"{}", qos=1, properties=Properties(paho.PacketTypes.PUBLISH)).mid
        self._until(lambda: ("publish", mid) in self._answers)
        return self._answers[("publish", mid)] < 0x80

    def subscribe(self, topic_filter: str) -> None:
        """Ask for a filter; mosquitto grants any and judges each message."""
        mid = self.client.subscribe(topic_filter, qos=1)[1]
        self._until(lambda: ("subscribe", mid) in self._answers)

    def listen(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.client.loop(0.05)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop(0.1)


def test_the_broker_lets_a_box_speak_under_its_own_name_alone_and_hear_what_is_meant_for_it(broker):
    port, folder = broker
    box, fleet = Client(port, folder, NODE), Client(port, folder, "_coordinator")
    try:
        for topic_filter in topics.up_filters(FLEET):
            fleet.subscribe(topic_filter)
        box.subscribe("skerry/#")
        for branch in topics.UP_BRANCHES:
            assert box.publish(topics.up(FLEET, NODE, branch))
            assert not box.publish(topics.up(FLEET, "store-2", branch))
            assert not box.publish(topics.up("another", NODE, branch))
        assert not box.publish(topics.desired(FLEET, NODE))
        assert not box.publish(topics.command(FLEET, "store-2", "drain"))
        for node in (NODE, "store-2"):
            assert fleet.publish(topics.desired(FLEET, node))
            assert fleet.publish(topics.command(FLEET, node, "drain"))
        box.listen(0.3)
        fleet.listen(0.3)
        assert sorted(box.heard) == sorted([topics.desired(FLEET, NODE), topics.command(FLEET, NODE, "drain")])
        assert sorted(fleet.heard) == sorted(topics.up(FLEET, NODE, branch) for branch in topics.UP_BRANCHES)
    finally:
        box.close()
        fleet.close()


def test_the_broker_refuses_a_client_without_a_certificate_of_the_fleet(broker, tmp_path):
    port, folder = broker
    shutil.copy(folder / "ca.crt", tmp_path / "ca.crt")
    _issue(tmp_path, NODE, None)  # the right name, signed by nobody that the broker knows
    with pytest.raises(OSError, match=r"closed the connection|alert|reset"):
        Client(port, tmp_path, NODE)
