"""Who may join: a real coordinator that is its own authority, a real mosquitto that asks for certificates, real agents."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from coordinator.ca.authority import DAY_MS, Authority
from skerry.demo.broker import find_mosquitto
from skerry.demo.fleet import free_ports
from skerry.runtime import keys
from skerry.wire import signing
from skerry.wire.identity import Subject, subject_of
from tests.conftest import need
from tests.e2e.world import wait_until
from tests.nobody import NOBODY

FLEET = "north"
WITHIN_S = 20.0
UP = ("presence", "birth", "reported", "metrics", "events", "reply")


class Program:
    """A process whose words go to a file."""

    def __init__(self, log: Path, *argv: str | Path) -> None:
        self.log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen([str(word) for word in argv], stdout=file, stderr=file, stdin=subprocess.DEVNULL)

    def end(self, number: int = signal.SIGTERM) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)


class Fleet:
    """A coordinator and a broker in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "coordinator"
        self.ca = self.state / "ca"
        self.revoked_list = folder / "broker" / "skerry" / "crl.pem"
        self.revoked_list.parent.mkdir(parents=True)
        self.port, self.broker_port = free_ports(2)
        self.url = f"https://127.0.0.1:{self.port}"
        self.programs: dict[str, Program] = {}

    def start_coordinator(self, **more: Any) -> None:
        settings = {
            "fleet": FLEET, "state_dir": str(self.state), "listen": f"127.0.0.1:{self.port}", "public_url": self.url, "tls": True,
            "require_enrolled": True, "revoked_list_file": str(self.revoked_list), **more,
        }  # fmt: skip
        text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
        text += f'[broker]\nhost = "127.0.0.1"\nport = {self.broker_port}\n'
        text += "".join(f'{key} = "{self.ca}/{name}"\n' for key, name in (
            ("ca_file", "root.crt"), ("cert_file", "coordinator.crt"), ("key_file", "coordinator.key")))  # fmt: skip
        config = self.folder / "coordinator.toml"
        config.write_text(text)
        self.programs["coordinator"] = Program(self.folder / "coordinator.log", sys.executable, "-m", "coordinator", "--config", config)
        wait_until(lambda: self.ask("GET", "/healthz", role=None)[0] == 200, WITHIN_S, (self.folder / "coordinator.log").read_text)

    def start_broker(self) -> None:
        """As the command of the coordinator's own makes it."""
        folder = self.folder / "broker"
        command = [sys.executable, "-m", "coordinator", "broker-config", "--config", self.folder / "coordinator.toml", "--dir", folder]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == str(folder / "mosquitto.conf")
        assert done.stderr == "", "the list of revoked certificates lies where it is read"
        if os.geteuid() == 0:
            with (folder / "mosquitto.conf").open("a") as file:
                file.write("user root\n")
        self.programs["broker"] = Program(folder / "mosquitto.log", find_mosquitto() or "", "-c", folder / "mosquitto.conf")

    def stop(self) -> None:
        for program in reversed(self.programs.values()):
            program.end()

    def ask(self, method: str, path: str, body: object = None, *, role: str | None = "operator", token: str = "") -> tuple[int, Any]:
        """Status and JSON of a call."""
        headers = {"Content-Type": "application/json"}
        if role:
            headers["Authorization"] = f"Bearer {(self.state / f'{role}.token').read_text().strip()}"
        if token:
            headers["Authorization"] = f"Bearer {token}"
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, method=method, headers=headers, data=data)
        try:
            context = ssl.create_default_context(cafile=str(self.ca / "root.crt"))
            with urllib.request.urlopen(request, timeout=10, context=context) as answer:
                content = answer.read()
                status = answer.status
        except urllib.error.HTTPError as exc:
            content, status = exc.read(), exc.code
        except (OSError, ssl.SSLError):
            return 0, None
        try:
            return status, json.loads(content) if content else None
        except ValueError:
            return status, content

    def claim(self, **fields: Any) -> dict[str, Any]:
        status, made = self.ask("POST", "/v1/claims", fields)
        assert status == 201, made
        return dict(made)

    def state_of(self, node: str) -> str:
        return next((view["state"] for view in self.ask("GET", "/v1/nodes")[1] if view["id"] == node), "")


class Box:
    """A box's agent, and what an operator types on it."""

    def __init__(self, fleet: Fleet, node: str, **more: Any) -> None:
        self.fleet, self.node = fleet, node
        self.folder = fleet.folder / node
        self.folder.mkdir(exist_ok=True)
        labels = more.get("labels", {})
        self.config = self.folder / "agent.toml"
        self.config.write_text(
            f'fleet = "{FLEET}"\nnode = "{node}"\ntier = "edge"\nstate_dir = "{self.folder}/state"\n'
            f'warden_socket = "{self.folder}/w.sock"\ngateway_socket = "{self.folder}/g.sock"\ngateway_url = "http://127.0.0.1:9"\n'
            f"labels = {{ {', '.join(f'{key} = {json.dumps(value)}' for key, value in labels.items())} }}\nreconnect_most_s = 1\n"
            f'[broker]\nhost = "127.0.0.1"\nport = {fleet.broker_port}\nkeepalive_s = 4\nca_file = "{self.folder}/id/ca.crt"\n'
            f'cert_file = "{self.folder}/id/box.crt"\nkey_file = "{self.folder}/id/box.key"\n'
            f'[coordinator]\nurl = "{fleet.url}"\ntoken_file = "{self.folder}/id/token"\nca_file = "{self.folder}/id/ca.crt"\n'
        )

    def with_gateway(self) -> "Box":
        """Have the agent see to its gateway's certificate."""
        text = self.config.read_text()
        more = f'gateway_csr_file = "{self.folder}/g/gateway.csr"\ngateway_certificate_file = "{self.folder}/id/gateway.crt"\n'
        self.config.write_text(text.replace("[broker]", f"{more}[broker]"))
        (self.folder / "g").mkdir()
        return self

    def enroll(self, claim: str, fingerprint: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "edge_agent.link", "enroll", "--config", str(self.config), "--fingerprint", fingerprint,
             "--trusted-keys", str(self.folder / "trusted.keys")],
            input=claim, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def start(self, *before: str) -> Program:
        program = Program(self.folder / "agent.log", *before, sys.executable, "-m", "edge_agent.link", "--config", self.config)
        self.fleet.programs[self.node] = program
        return program

    @property
    def log(self) -> str:
        return (self.folder / "agent.log").read_text()

    def certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate((self.folder / "id" / "box.crt").read_bytes())


@pytest.fixture(scope="module")
def fleet(tmp_path_factory) -> Iterator[Fleet]:
    need("mosquitto", "" if find_mosquitto() else "not installed")
    fleet = Fleet(tmp_path_factory.mktemp("fleet"))
    try:
        fleet.start_coordinator()
        fleet.start_broker()
        yield fleet
    finally:
        fleet.stop()
        shutil.rmtree(fleet.folder, ignore_errors=True)


def joined(fleet: Fleet, node: str, **more: Any) -> Box:
    box = Box(fleet, node, **more)
    made = fleet.claim(labels={"site": "hull"})
    done = box.enroll(made["claim"], made["fingerprint"])
    assert done.returncode == 0, done.stderr
    box.start()
    wait_until(lambda: fleet.state_of(node) == "online", WITHIN_S, lambda: box.log + (fleet.folder / "coordinator.log").read_text())
    return box


def revoked_list_is_read(fleet: Fleet) -> None:
    """What a path unit beside the broker does when the list changes."""
    fleet.programs["broker"].process.send_signal(signal.SIGHUP)


def test_a_box_joins_with_a_claim_and_a_fingerprint_and_is_online_by_its_certificate(fleet):
    box = joined(fleet, "box-1")
    root = x509.load_pem_x509_certificate((box.folder / "id" / "ca.crt").read_bytes())
    assert hashlib.sha256(root.public_bytes(Encoding.DER)).hexdigest() == fleet.ask("GET", "/v1/ca", role=None)[1]["fingerprint"]
    assert (box.folder / "id" / "box.key").stat().st_mode & 0o777 == 0o600
    lines = (box.folder / "trusted.keys").read_text().splitlines()
    assert lines[0] == (fleet.state / "signing.pub").read_text().strip()
    assert abs(signing.parse_trusted("\n".join(lines))[1] - time.time() * 1000) < 60_000, "and the moment from which on it takes documents"
    key = (box.folder / "id" / "box.key").read_bytes().splitlines()[1]
    assert not [path for path in fleet.state.rglob("*") if path.is_file() and key in path.read_bytes()], "the key left the box"


def test_what_root_is_given_belongs_to_the_user_of_the_agent_folders_and_all(fleet):
    need("root", "" if os.geteuid() == 0 else "giving files away needs root")
    box = Box(fleet, "given")
    (box.folder / "state").mkdir()
    os.chown(box.folder / "state", NOBODY, NOBODY)
    made = fleet.claim()
    assert box.enroll(made["claim"], made["fingerprint"]).returncode == 0
    found = [box.folder / "id", *(box.folder / "id").iterdir()]
    assert {path.name for path in found} == {"id", "ca.crt", "box.crt", "box.key", "token"}
    assert {path.name for path in found if path.stat().st_uid != NOBODY} == set(), "the agent could not renew its certificate there"


def test_tier_and_labels_that_a_box_joined_with_can_not_be_changed_by_it(fleet):
    box = joined(fleet, "mover", labels={"site": "bank", "colour": "red"})
    fleet.programs["mover"].end()
    settings = box.config.read_text()
    box.config.write_text(settings.replace('tier = "edge"', 'tier = "cloud"').replace("red", "blue"))
    assert box.config.read_text() != settings
    box.start()
    wait_until(lambda: fleet.ask("GET", "/v1/nodes/mover")[1]["labels"].get("colour") == "blue", WITHIN_S, lambda: box.log)
    view = fleet.ask("GET", "/v1/nodes/mover")[1]
    assert (view["tier"], view["labels"]) == ("edge", {"site": "hull", "colour": "blue"})
    assert (view["is_enrolled"], view["bound"]) == (True, ["site"])


def test_a_claim_is_for_a_box_of_the_edge_unless_it_says_otherwise(fleet):
    climber = Box(fleet, "climber")
    climber.config.write_text(climber.config.read_text().replace('tier = "edge"', 'tier = "cloud"'))
    made = fleet.claim()
    refused = climber.enroll(made["claim"], made["fingerprint"])
    assert refused.returncode == 1
    assert "this claim is for 'edge' alone" in refused.stderr
    made = fleet.claim(tier="cloud")
    assert climber.enroll(made["claim"], made["fingerprint"]).returncode == 0


def test_whoever_answers_with_another_root_is_told_nothing(fleet):
    made = fleet.claim()
    done = Box(fleet, "wary").enroll(made["claim"], "0" * 64)
    assert done.returncode == 1
    assert "fingerprint" in done.stderr
    assert "nothing was told" in done.stderr
    assert [view["used_at_ms"] for view in fleet.ask("GET", "/v1/claims")[1] if view["id"] == made["id"]] == [0]


def test_a_claim_lets_one_box_in_and_the_same_box_again_if_the_answer_was_lost(fleet):
    made = fleet.claim()
    first, second = Box(fleet, "one"), Box(fleet, "two")
    assert first.enroll(made["claim"], made["fingerprint"]).returncode == 0
    assert first.enroll(made["claim"], made["fingerprint"]).returncode == 0, "the same key asks again"
    refused = second.enroll(made["claim"], made["fingerprint"])
    assert refused.returncode == 1
    assert "redeemed before" in refused.stderr
    (first.folder / "id" / "box.key").unlink()
    refused = first.enroll(made["claim"], made["fingerprint"])
    assert refused.returncode == 1
    assert "another key" in refused.stderr


def test_a_name_is_given_anew_only_by_a_claim_that_names_it(fleet):
    box = joined(fleet, "swapped")
    (box.folder / "id" / "box.key").unlink()
    made = fleet.claim()
    refused = box.enroll(made["claim"], made["fingerprint"])
    assert refused.returncode == 1
    assert "--name swapped" in refused.stderr
    other = fleet.claim(node="another")
    refused = box.enroll(other["claim"], other["fingerprint"])
    assert refused.returncode == 1
    assert "'another' alone" in refused.stderr
    named = fleet.claim(node="swapped")
    assert box.enroll(named["claim"], named["fingerprint"]).returncode == 0
    reasons = [view["reason"] for view in fleet.ask("GET", "/v1/nodes/swapped/certificates")[1]]
    assert sorted(reasons) == ["", "replaced"]


def test_a_withdrawn_claim_and_a_guessed_one_let_nobody_in(fleet):
    made = fleet.claim()
    assert fleet.ask("DELETE", f"/v1/claims/{made['id']}")[0] == 204
    assert fleet.ask("DELETE", f"/v1/claims/{made['id']}")[0] == 404
    box = Box(fleet, "late")
    for claim in (made["claim"], "skn_00000000_x", "nonsense"):
        done = box.enroll(claim, made["fingerprint"])
        assert done.returncode == 1
        assert "claim:" in done.stderr
    assert fleet.state_of("late") == ""


def test_a_boxs_token_fetches_models_and_nothing_else_and_ends_with_the_box(fleet):
    box = joined(fleet, "reader")
    token = (box.folder / "id" / "token").read_text().strip()
    assert fleet.ask("GET", f"/v1/artifacts/{'0' * 64}", role=None, token=token)[0] == 404
    assert fleet.ask("GET", "/v1/nodes", role=None, token=token)[0] == 403
    assert fleet.ask("POST", "/v1/nodes/reader/revoke", {})[0] == 204
    assert fleet.ask("GET", f"/v1/artifacts/{'0' * 64}", role=None, token=token)[0] == 401


def test_a_box_that_is_thrown_out_is_off_the_broker_within_seconds_and_stays_off(fleet):
    box = joined(fleet, "stolen")
    pem = (box.folder / "id" / "box.crt").read_text()
    began = time.monotonic()
    assert fleet.ask("POST", "/v1/nodes/stolen/revoke", {"reason": "stolen from the van"})[0] == 204
    revoked_list_is_read(fleet)
    wait_until(lambda: "link.lost" in box.log, 5, lambda: box.log)
    assert time.monotonic() - began < 5
    assert fleet.state_of("stolen") == "revoked"
    wait_until(lambda: "revoked" in box.log.partition("link.lost")[2], WITHIN_S, lambda: box.log)
    assert fleet.programs["stolen"].process.poll() is None, "it goes on by itself"
    time.sleep(2)
    assert fleet.state_of("stolen") == "revoked"
    key = keys.load(box.folder / "id" / "box.key")
    asked = {"certificate": pem, "csr": keys.signing_request(key, "stolen")}
    status, answer = fleet.ask("POST", "/v1/renew", asked, role=None)
    assert status == 403
    assert "revoked" in answer["error"]["message"]
    kinds = [event["kind"] for event in fleet.ask("GET", "/v1/events?node=stolen")[1]]
    assert "node.revoked" in kinds
    assert "node.enrolled" in kinds


def test_what_a_box_that_was_thrown_out_still_says_is_passed_over(fleet):
    """The broker has not read the list yet: only the coordinator knows."""
    box = joined(fleet, "talker")
    before = fleet.ask("GET", "/v1/nodes/talker")[1]["version"]
    assert before
    assert fleet.ask("POST", "/v1/nodes/talker/revoke", {})[0] == 204
    wait_until(lambda: box.log.count("link.lost") >= 1, WITHIN_S, lambda: box.log)
    time.sleep(3)
    assert fleet.state_of("talker") == "revoked"


def test_a_box_that_is_thrown_out_soon_after_another_does_not_wait_for_it(fleet):
    first, second = joined(fleet, "first-out"), joined(fleet, "second-out")
    assert fleet.ask("POST", "/v1/nodes/first-out/revoke", {})[0] == 204
    wait_until(lambda: "link.lost" in first.log, 5, lambda: first.log)
    time.sleep(5)  # the first is thrown off the broker again and again by now, at longer and longer intervals
    assert fleet.ask("POST", "/v1/nodes/second-out/revoke", {})[0] == 204
    wait_until(lambda: "link.lost" in second.log, 3, lambda: second.log)


def expire(fleet: Fleet, box: Box) -> None:
    """Give a box a certificate for its key that ended nine days ago."""
    authority = Authority(fleet.ca, FLEET, now_ms=time.time_ns() // 10**6)
    key = keys.load(box.folder / "id" / "box.key")
    ten_days_ago = time.time_ns() // 10**6 - 10 * DAY_MS
    issued = authority.issue(key.public_key(), Subject(FLEET, "box", box.node), now_ms=ten_days_ago, life_ms=DAY_MS)
    (box.folder / "id" / "box.crt").write_text(issued.chain)


def test_a_box_whose_certificate_ended_long_ago_gets_another_by_itself(fleet):
    box = joined(fleet, "sleeper")
    fleet.programs["sleeper"].end()
    wait_until(lambda: fleet.state_of("sleeper") == "offline", WITHIN_S)
    expire(fleet, box)
    before = box.certificate().serial_number
    box.start()
    wait_until(lambda: box.certificate().serial_number != before, 40, lambda: box.log)
    wait_until(lambda: fleet.state_of("sleeper") == "online", WITHIN_S, lambda: box.log)
    wait_until(lambda: "certificate.renewed" in [event["kind"] for event in fleet.ask("GET", "/v1/events?node=sleeper")[1]], WITHIN_S)


def test_the_agent_has_its_gateways_key_signed_and_it_is_thrown_out_with_the_box(fleet):
    box = joined(fleet, "with-gateway")
    fleet.programs[box.node].end()
    box.with_gateway().start()
    key = ec.generate_private_key(ec.SECP256R1())
    (box.folder / "g" / "gateway.csr").write_text(keys.signing_request(key, "any name"))
    path = box.folder / "id" / "gateway.crt"
    wait_until(path.exists, 30, lambda: box.log)
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    assert subject_of(certificate) == Subject(FLEET, "gateway", "with-gateway", "hull")
    assert certificate.public_key() == key.public_key()
    roles = {view["role"]: view["revoked_at_ms"] for view in fleet.ask("GET", "/v1/nodes/with-gateway/certificates")[1]}
    assert roles == {"box": 0, "gateway": 0}
    assert fleet.ask("POST", "/v1/nodes/with-gateway/revoke", {})[0] == 204
    assert all(view["revoked_at_ms"] for view in fleet.ask("GET", "/v1/nodes/with-gateway/certificates")[1])
    listed = x509.load_pem_x509_crl(fleet.revoked_list.read_bytes())
    assert listed.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None


@pytest.mark.parametrize("clock", ["1970-01-02 00:00:00", "+730d"])
def test_a_box_whose_clock_is_wrong_by_years_is_online_all_the_same(fleet, clock):
    program = shutil.which("faketime")
    need("faketime", "" if program else "not installed")
    box = joined(fleet, f"clock-{'1970' if clock.startswith('1970') else 'ahead'}")
    fleet.programs[box.node].end()
    wait_until(lambda: fleet.state_of(box.node) == "offline", WITHIN_S)
    before = len(box.log)
    argv = [str(program), "-f", f"@{clock}" if clock.startswith("1970") else clock]
    box.start("env", "FAKETIME_DONT_FAKE_MONOTONIC=1", *argv)
    wait_until(lambda: fleet.state_of(box.node) == "online", 30, lambda: box.log[before:])
    timestamps = {json.loads(line)["timestamp"][:4] for line in box.log[before:].splitlines() if line.startswith("{")}
    assert timestamps
    assert str(time.gmtime().tm_year) not in timestamps, "the clock was not shifted"


@pytest.mark.parametrize("clock", ["1970-01-02 00:00:00", "-3d"])
def test_a_broker_whose_certificate_ended_before_the_box_joined_is_not_believed_whatever_the_boxs_clock_says(fleet, clock):
    """With a clock of three days ago it would still be valid."""
    program = shutil.which("faketime")
    need("faketime", "" if program else "not installed")
    box = joined(fleet, f"wary{'-1970' if clock.startswith('1970') else ''}")
    fleet.programs[box.node].end()
    key = ec.generate_private_key(ec.SECP256R1())
    authority = Authority(fleet.ca, FLEET, now_ms=time.time_ns() // 10**6)
    ten_days_ago = time.time_ns() // 10**6 - 10 * DAY_MS
    ended = authority.issue(key.public_key(), Subject(FLEET, "broker", "b"), now_ms=ten_days_ago, life_ms=9 * DAY_MS, hosts=["127.0.0.1"])
    (box.folder / "old.pem").write_bytes(keys.pem(key) + ended.chain.encode())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(box.folder / "old.pem")
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(WITHIN_S)
        box.config.write_text(box.config.read_text().replace(f"port = {fleet.broker_port}", f"port = {listening.getsockname()[1]}"))
        before = len(box.log)
        box.start("env", "FAKETIME_DONT_FAKE_MONOTONIC=1", str(program), "-f", f"@{clock}" if clock.startswith("1970") else clock)
        for _ in range(2):
            raw, _ = listening.accept()
            with raw, contextlib.suppress(OSError):
                raw.settimeout(WITHIN_S)
                with context.wrap_socket(raw, server_side=True) as secured:
                    heard.append(secured.recv(100))
    assert b"".join(heard) == b"", "not one byte was said to it"
    wait_until(lambda: "has ended, by the time that was proved" in box.log[before:], WITHIN_S, lambda: box.log[before:])


def test_a_certificate_of_another_authority_and_another_boxs_key_renew_nothing(fleet, tmp_path):
    box = joined(fleet, "honest")
    pem = (box.folder / "id" / "box.crt").read_text()
    key = ec.generate_private_key(ec.SECP256R1())
    theirs = {"certificate": pem, "csr": keys.signing_request(key, "honest")}
    status, answer = fleet.ask("POST", "/v1/renew", theirs, role=None)
    assert status == 422
    assert "another key" in answer["error"]["message"]
    now_ms = time.time_ns() // 10**6
    foreign = Authority(tmp_path / "ca", FLEET, now_ms=now_ms).issue(
        key.public_key(), Subject(FLEET, "box", "honest"), now_ms=now_ms, life_ms=DAY_MS
    )
    status, answer = fleet.ask("POST", "/v1/renew", {"certificate": foreign.chain, "csr": theirs["csr"]}, role=None)
    assert status == 422
    assert "not issued by this fleet" in answer["error"]["message"]


@pytest.mark.parametrize("wrong", [None, "token", "ca"])
def test_ansible_finds_the_boxes_that_the_coordinator_knows(fleet, tmp_path, wrong):
    program = Path(sys.executable).with_name("ansible-inventory")
    need("ansible-inventory", "" if program.exists() else "not installed")
    if not wrong:
        joined(fleet, "listed", labels={"floor": "ground", "note": "{{ lookup('pipe', 'id') }}"})
    (tmp_path / "token").write_text("skt_0_0" if wrong == "token" else (fleet.state / "operator.token").read_text())
    (tmp_path / "fleet.skerry.yml").write_text(
        f"plugin: nodes\nurl: {fleet.url}\ntoken_file: {tmp_path}/token\n"
        f"ca_file: {fleet.ca / ('coordinator.crt' if wrong == 'ca' else 'root.crt')}\n"
        "compose: {where: \"edge_agent_labels.floor | default('cellar')\"}\n"
    )
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LC_ALL": "C.UTF-8",
                   "ANSIBLE_CONFIG": str(Path(__file__).resolve().parents[2] / "ansible" / "ansible.cfg"),
                   "ANSIBLE_INVENTORY_UNPARSED_FAILED": "1"}  # fmt: skip
    words = [str(program), "-i", str(tmp_path / "fleet.skerry.yml"), "--list"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, env=environment)
    if wrong:
        assert done.returncode != 0
        assert {"token": "401", "ca": "CERTIFICATE_VERIFY_FAILED"}[wrong] in done.stderr
        assert "Traceback" not in done.stderr
        return
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # What came over the network is marked as such: Ansible puts nothing into a box's words.
    plain = {name: value.get("__ansible_unsafe", value) if isinstance(value, dict) else value
             for name, value in found["_meta"]["hostvars"]["listed"].items()}  # fmt: skip
    assert (plain["ansible_host"], plain["edge_agent_node"], plain["where"]) == ("127.0.0.1", "listed", "ground")
    assert plain["edge_agent_labels"]["note"] == {"__ansible_unsafe": "{{ lookup('pipe', 'id') }}"}
    for group in ("edge", "tier_edge", "state_online", "site_hull", "floor_ground"):
        assert "listed" in found[group]["hosts"]


@pytest.mark.parametrize("path", ["/v1/enroll", "/v1/renew"])
def test_what_is_no_request_is_refused_and_the_coordinator_goes_on(fleet, path):
    pem = "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"
    bodies: list[object] = [
        b"", b"[]", b"\xff", b"[" * 20_000, b"{}", {"claim": "skn_a_b", "node": "../x", "csr": pem},
        {"claim": "skn_a_b", "node": "x", "csr": pem},
        {"claim": "skn_a_b", "node": "x", "csr": "A" * 20_000}, {"claim": "c" * 300, "node": "x", "csr": pem}, b"x" * 100_000,
        {"certificate": pem, "csr": pem}, {"certificate": "", "csr": ""},
    ]  # fmt: skip
    for body in bodies:
        status, answer = fleet.ask("POST", path, body, role=None)
        assert status in (413, 422), (status, answer)
        assert answer["error"]["message"]
    assert fleet.ask("GET", "/healthz", role=None)[0] == 200


def test_operators_calls_are_for_operators(fleet):
    for method, path in (
        ("GET", "/v1/claims"),
        ("POST", "/v1/claims"),
        ("POST", "/v1/nodes/x/revoke"),
        ("GET", "/v1/nodes/x/certificates"),
    ):
        assert fleet.ask(method, path, {}, role=None)[0] == 401
        assert fleet.ask(method, path, {}, role="box")[0] == 403
