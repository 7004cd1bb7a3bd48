"""The Ansible collection: lint's strictest profile, a playbook that parses, and templates that the programs and the broker accept."""

import contextlib
import datetime
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import tomllib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from edge_agent.updater.config import Config as UpdaterConfig
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
    *(f"edge_agent/templates/{name}.toml.j2" for name in ("agent", "warden", "gateway", "updater")),
    "edge_agent/templates/gateway-listen.conf.j2",
    *(f"coordinator/templates/{name}.toml.j2" for name in ("coordinator", "signer")),
    *(f"broker/templates/{name}.j2" for name in ("mosquitto.conf", "acl")),
]


def tool(name: str) -> str:
    """A console command of this environment, or of the PATH."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    need(name, "" if path else "not installed")
    assert path is not None
    return path


def ansible(home: Path, command: str, *arguments: str | Path, more: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
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
    environment |= more or {}
    return subprocess.run(
        [tool(command), *map(str, arguments)], cwd=ANSIBLE, env=environment, capture_output=True, text=True, timeout=100, check=False
    )


def test_ansible_lint_finds_nothing_at_its_strictest_profile(tmp_path):
    copy = tmp_path / "ansible"  # lint leaves a cache where it works
    shutil.copytree(ANSIBLE, copy)
    outcome = ansible(tmp_path / "home", "ansible-lint", "--offline", "--profile", "production", "-q", "--project-dir", copy, copy)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_every_playbook_parses_with_the_example_inventory(tmp_path):
    books = sorted(path.relative_to(ANSIBLE) for path in (ANSIBLE / "playbooks").glob("*.yml"))
    assert {"site", "upgrade", "rollback", "drain", "enroll", "uninstall"} <= {path.stem for path in books}
    outcome = ansible(tmp_path, "ansible-playbook", "-i", INVENTORY, "--syntax-check", *books)
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize("book", ["boxes", "uninstall"])
def test_waves_are_those_of_the_command_line_or_the_inventory(tmp_path, book):
    """The playbook's own plays, each with the one task that tells who is in the batch."""
    plays = yaml.safe_load((ANSIBLE / "playbooks" / f"{book}.yml").read_text())
    tell = [{"ansible.builtin.debug": {"msg": "batch {{ ansible_play_batch | join('+') }}"}, "run_once": True, "when": "is_waved"}]
    kept = [
        {"hosts": "edge", "gather_facts": False, "tasks": tell, "vars": {"is_waved": "serial" in play}}
        | ({"serial": play["serial"]} if "serial" in play else {})
        for play in plays
    ]
    assert any("serial" in play for play in kept)
    (tmp_path / "book.yml").write_text(yaml.safe_dump(kept))

    def batches(*options: str, **known: object) -> list[str]:
        inventory = {"edge": {"hosts": {f"b{number}": {} for number in range(1, 5)}, "vars": {"ansible_connection": "local", **known}}}
        (tmp_path / "inventory.yml").write_text(yaml.safe_dump(inventory))
        outcome = ansible(tmp_path, "ansible-playbook", "-i", tmp_path / "inventory.yml", *options, tmp_path / "book.yml")
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
        return re.findall(r'"batch (.*)"', outcome.stdout)

    assert batches()[0] == "b1"
    assert batches(skerry_waves=[2, "100%"]) == ["b1+b2", "b3+b4"]
    assert batches("-e", '{"skerry_waves": [3, 1]}', skerry_waves=[2, "100%"]) == ["b1+b2+b3", "b4"]


def test_a_built_collection_needs_nothing_of_the_checkout(tmp_path):
    outcome = ansible(tmp_path, "ansible-galaxy", "collection", "build", "--output-path", tmp_path, ANSIBLE)
    assert outcome.returncode == 0, outcome.stderr
    built = next(tmp_path.glob("skerry-fleet-*.tar.gz"))
    folder = tmp_path / "collections/ansible_collections/skerry/fleet"
    folder.mkdir(parents=True)
    with tarfile.open(built) as archive:
        assert [member.name for member in archive if member.issym()] == []
        archive.extractall(folder, filter="data")
    assert (folder / "roles/broker/templates/mosquitto.conf.j2").read_text().startswith("# {{ ansible_managed }}")
    more = {"ANSIBLE_COLLECTIONS_PATH": str(tmp_path / "collections"), "ANSIBLE_CONFIG": str(tmp_path / "none.cfg")}
    (tmp_path / "none.cfg").write_text("")
    outcome = ansible(tmp_path, "ansible-playbook", "-i", INVENTORY, "--list-tasks", "skerry.fleet.site", more=more)
    assert outcome.returncode == 0, outcome.stderr
    assert "skerry.fleet.edge_agent : " in outcome.stdout or "edge_agent : " in outcome.stdout


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
        "coordinator_settings": {
            "lost_after_s": 30,
            "webhooks": [{"url": "https://a.example.org/", "kinds": ["node.*"]}, {"url": "https://b.example.org/"}],
            "openid_connect": {"issuer": "https://id.example.org", "client_id": "s", "admins": ["a"]},
        },
        "coordinator_openid_client_secret": "{{ none_such | default('told') }}",
        "skerry_model_keys": "-----BEGIN PUBLIC KEY-----",
        "skerry_release_keys": "-----BEGIN PUBLIC KEY-----",
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
        ("updater", UpdaterConfig),
        ("coordinator", CoordinatorConfig),
        ("signer", SignerConfig),
    ],
)
def test_a_program_takes_its_rendered_settings(rendered, name, kind):
    loaded = settings.load(rendered / f"{name}.toml", kind)
    if isinstance(loaded, WardenConfig | CoordinatorConfig):
        assert loaded.model_keys_file == Path("/etc/skerry/model-keys.pem")
    if isinstance(loaded, CoordinatorConfig):
        assert (loaded.tls, loaded.lost_after_s) == (True, 30)
        assert [(one.url, one.kinds) for one in loaded.webhooks] == [
            ("https://a.example.org/", ["node.*"]), ("https://b.example.org/", ["*"]),
        ]  # fmt: skip
        assert loaded.openid_connect is not None
        assert loaded.openid_connect.client_secret_file == Path("/run/credentials/skerry-coordinator.service/openid-client-secret")


def test_rendered_settings_say_what_the_inventory_says(rendered):
    files = {name: tomllib.loads((rendered / f"{name}.toml").read_text()) for name in ("agent", "warden", "gateway", "coordinator")}
    agent, warden, gateway = files["agent"], files["warden"], files["gateway"]
    assert (agent["fleet"], agent["node"], agent["tier"]) == (FLEET, NODE, "edge")
    assert agent["labels"] == {"site": NODE, "room": AWKWARD}
    assert agent["gateway_url"] == f"https://{NODE}.example.org:8444"
    assert gateway["peers"]["listen"] == "0.0.0.0:8444"
    assert agent["sample_every_s"] == 2.5
    assert (agent["broker"]["host"], agent["broker"]["port"]) == ("broker.example.org", 8883)
    assert agent["coordinator"]["url"] == "https://coordinator.example.org:8443"
    assert (warden["drivers"], warden["memory_bytes"]) == (["docker", "bubblewrap"], 2**31)
    assert (gateway["listen"], gateway["upstream_proxy"]) == ("0.0.0.0:8000", "http://proxy.example.org:3128")
    assert files["coordinator"]["listen"] == "0.0.0.0:8443"
    # Where two programs meet, their settings name the same path.
    updater = settings.load(rendered / "updater.toml", UpdaterConfig)
    assert warden["updater_record_file"] == str(updater.state_dir / "record.json")
    assert updater.wanted_file == Path(warden["state_dir"]) / "software.json"
    assert updater.heard_file == Path(agent["state_dir"]) / "heard.json"
    assert str(updater.gateway_socket) == gateway["socket"]
    assert agent["warden_socket"] == warden["socket"]
    assert agent["gateway_socket"] == gateway["socket"]
    assert gateway["routes_file"] == warden["routes_file"]
    assert warden["incoming_dir"] == f"{agent['state_dir']}/incoming"


def test_settings_and_units_name_the_same_files(rendered):
    """What a program writes lies where its unit lets it, and what two programs share is named alike."""
    agent, gateway = (tomllib.loads((rendered / f"{name}.toml").read_text()) for name in ("agent", "gateway"))
    units = {name: (SYSTEMD / f"skerry-{name}.service").read_text() for name in ("agent", "gateway", "warden")}
    assert agent["gateway_csr_file"] == gateway["peers"]["csr_file"]
    assert agent["gateway_certificate_file"] == gateway["peers"]["certificate_file"]
    assert agent["broker"]["ca_file"] == agent["coordinator"]["ca_file"] == gateway["peers"]["ca_file"]
    assert "StateDirectory=skerry/agent\n" in units["agent"]
    owned = [agent["broker"]["cert_file"], agent["broker"]["key_file"], agent["coordinator"]["token_file"]]
    assert {path for path in owned if not path.startswith("/var/lib/skerry/agent/")} == set()
    for program, path in (("agent", agent["gateway_certificate_file"]), ("gateway", gateway["peers"]["csr_file"])):
        writable = re.search(r"^ReadWritePaths=(.*)$", units[program], re.MULTILINE)
        assert writable is not None
        assert str(Path(path).parent) in writable[1].split()
    for folder in ("warden", "gateway"):
        assert f"ReadWritePaths=/run/skerry/{folder}" in units[folder]


def test_the_port_that_is_held_for_the_gateway_is_its_own(rendered):
    listen = tomllib.loads((rendered / "gateway.toml").read_text())["listen"]
    assert (rendered / "gateway-listen.conf").read_text().endswith(f"ListenStream=\nListenStream={listen}\n")


def test_a_rollback_knows_every_file_that_an_installation_writes():
    for role in ("edge_agent", "coordinator"):
        listed = {entry["path"] for entry in yaml.safe_load((ANSIBLE / f"roles/{role}/vars/main.yml").read_text())[f"{role}_files"]}
        for unit in ("coordinator", "signer") if role == "coordinator" else ("agent", "warden", "gateway", "updater"):
            assert f"/etc/skerry/{unit}.toml" in listed
        # Units come back with the link, of which they are: both ways run the same tasks.
        for path in (
            ANSIBLE / f"roles/{role}/tasks/{'switch' if role == 'edge_agent' else 'install'}.yml",
            ANSIBLE / f"roles/{role}/tasks/rollback.yml",
        ):
            assert "ansible.builtin.include_tasks: units.yml" in path.read_text()
        offered = {f"{path.parent.name.removesuffix('.service.d')} {path.stem}" for path in SYSTEMD.glob("skerry-*.service.d/*.conf")}
        known = yaml.safe_load((ANSIBLE / f"roles/{role}/vars/main.yml").read_text())[f"{role}_dropins"]
        units = ("skerry-coordinator", "skerry-signer") if role == "coordinator" else ("skerry-agent", "skerry-gateway", "skerry-warden")
        assert {f"{entry['unit']} {entry['name']}" for entry in known} == {name for name in offered if name.startswith(units)}


SECRETS = ("operator_token_file", "_token.content", "client_secret }}", "claim.json.claim", "broker_files", "broker_made")
MAY_SHOW = ("Redeem it on the box", "Install the units that take over what the coordinator makes anew")
"""What they show has no secret in it: a command's standard input is not shown, and a condition is only true or false."""
LOUD = "{{ ansible_verbosity > 2 }}"
"""Where a task shows its arguments, which else it does not."""


def _tasks(entries: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for entry in entries:
        yield entry
        for part in ("block", "rescue", "always"):
            yield from _tasks(entry.get(part, []))


def test_secrets_are_kept_out_of_the_output():
    found = 0
    for path in ANSIBLE.glob("roles/*/tasks/*.yml"):
        for task in _tasks(yaml.safe_load(path.read_text())):
            text = str({key: value for key, value in task.items() if key not in ("block", "rescue", "always")})
            if any(word in text for word in SECRETS) and task["name"] not in MAY_SHOW:
                found += 1
                assert task.get("no_log") is True or (task.get("no_log") == LOUD and "ansible.builtin.uri" in task), task["name"]
    assert found >= 10


def test_what_is_taken_back_ends_in_failure_and_the_rollout_with_it():
    for role in ("coordinator", "broker"):
        tasks = yaml.safe_load((ANSIBLE / f"roles/{role}/tasks/main.yml").read_text())
        assert [task["rescue"][-1].get("ansible.builtin.fail") is not None for task in tasks if "rescue" in task] == [True]
    assert "ansible.builtin.fail" in yaml.safe_load((ANSIBLE / "roles/edge_agent/tasks/main.yml").read_text())[-1]
    play = next(play for play in yaml.safe_load((ANSIBLE / "playbooks/boxes.yml").read_text()) if "serial" in play)
    assert play["max_fail_percentage"] == 0
    assert "[1, '10%', '50%', '100%']" in play["serial"]


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


def _revoke_nobody(folder: Path, ca: tuple[x509.Name, ec.EllipticCurvePrivateKey]) -> None:
    """An empty list of revoked certificates."""
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateRevocationListBuilder().issuer_name(ca[0]).last_update(now - datetime.timedelta(hours=1))
    listed = builder.next_update(now + datetime.timedelta(hours=1)).sign(ca[1], hashes.SHA256())
    (folder / "crl.pem").write_bytes(listed.public_bytes(serialization.Encoding.PEM))


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
    _revoke_nobody(folder, ca)
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
