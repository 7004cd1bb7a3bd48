"""(d) The gateway is an enemy's: it has its own key and certificate, its user's files and groups on the box, and the replicas' sockets."""

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import aiomqtt
import pytest
from cryptography import x509

from skerry.demo.broker import find_mosquitto
from skerry.runtime import keys, mqtt
from skerry.runtime.settings import Broker
from skerry.wire.identity import subject_of
from tests.conftest import need
from tests.e2e.world import wait_until
from tests.integration.test_enrolment import FLEET, UP, Box, Fleet, joined
from tests.nobody import environment, interpreter

SYSTEMD = Path(__file__).parents[2] / "systemd"
WATCHES_S = 3.0
FIRST_UID = 1_950_000_000
USERS = {"root": 0, "skerry-agent": FIRST_UID, "skerry-warden": FIRST_UID + 1, "skerry-gateway": FIRST_UID + 2}
GROUPS = {**USERS, "skerry": FIRST_UID + 10, "skerry-coordinator": FIRST_UID + 11}
USERS["skerry-signer"] = FIRST_UID + 3


# -- with its certificate, in the network


@pytest.fixture(scope="module")
def reef(tmp_path_factory) -> Iterator[tuple[Fleet, Box]]:
    """A fleet with a box whose gateway has a certificate, and that gateway's key."""
    need("mosquitto", "" if find_mosquitto() else "not installed")
    fleet = Fleet(tmp_path_factory.mktemp("reef"))
    try:
        fleet.start_coordinator()
        fleet.start_broker()
        box = joined(fleet, "robbed")
        fleet.programs["robbed"].end()
        box.with_gateway().start()
        key = keys.made()
        (box.folder / "g" / "gateway.key").write_bytes(keys.pem(key))
        (box.folder / "g" / "gateway.csr").write_text(keys.signing_request(key, "robbed"))
        wait_until((box.folder / "id" / "gateway.crt").exists, 30, lambda: box.log)
        joined(fleet, "neighbour")
        yield fleet, box
    finally:
        fleet.stop()
        shutil.rmtree(fleet.folder, ignore_errors=True)


def broker_as_gateway(fleet: Fleet, box: Box) -> Broker:
    own = box.folder / "id"
    return Broker(
        "127.0.0.1", fleet.broker_port, ca_file=f"{own}/ca.crt", cert_file=f"{own}/gateway.crt", key_file=f"{box.folder}/g/gateway.key"
    )


def test_the_broker_hears_nothing_of_it_and_tells_it_nothing(reef):
    fleet, box = reef
    before = {name: fleet.ask("GET", f"/v1/nodes/{name}")[1] for name in ("robbed", "neighbour")}
    heard: list[str] = []

    async def scene() -> None:
        async with mqtt.connected(broker_as_gateway(fleet, box), "robbed", last_will=None, queue=100) as client:
            for pattern in ("#", f"skerry/v1/{FLEET}/#", f"skerry/v1/{FLEET}/robbed/desired", f"skerry/v1/{FLEET}/+/command/#"):
                with contextlib.suppress(aiomqtt.MqttError):
                    await client.subscribe(pattern, qos=1)
            for name in ("robbed", "neighbour", "_gateway"):
                for branch in (*UP, "desired", "command/ack"):
                    with contextlib.suppress(aiomqtt.MqttError):
                        await client.publish(
                            f"skerry/v1/{FLEET}/{name}/{branch}", b'{"online":false,"boot_id":"evil","session_epoch":99}', qos=1
                        )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WATCHES_S):
                    async for message in client.messages:
                        heard.append(str(message.topic))  # noqa: PERF401 - what came before the time is over counts

    asyncio.run(scene())
    assert [topic for topic in heard if not topic.startswith(f"skerry/v1/{FLEET}/_gateway/")] == []
    for name, held in before.items():
        after = fleet.ask("GET", f"/v1/nodes/{name}")[1]
        assert (after["state"], after["changed_at_ms"]) == ("online", held["changed_at_ms"]), name
    assert {view["id"] for view in fleet.ask("GET", "/v1/nodes")[1]} == {"robbed", "neighbour"}, "and no new box came of it"


def test_the_coordinator_makes_no_box_of_it_and_gives_it_nothing(reef):
    fleet, box = reef
    certificate = (box.folder / "id" / "gateway.crt").read_text()
    assert subject_of(x509.load_pem_x509_certificate(certificate.encode())).role == "gateway"
    key = keys.load(box.folder / "g" / "gateway.key")
    for name in ("robbed", "neighbour"):
        asked = {"certificate": certificate, "csr": keys.signing_request(key, name), "gateway_csr": keys.signing_request(key, name)}
        assert fleet.ask("POST", "/v1/renew", asked, role=None)[0] == 403
    for path in ("/v1/nodes", f"/v1/artifacts/{'0' * 64}", "/v1/models"):
        assert fleet.ask("GET", path, role=None)[0] == 401


# -- with its user, on the box


def folders(root: Path) -> None:
    """A box's folders, owned and closed as the units' tmpfiles say."""
    for line in (SYSTEMD / "skerry.tmpfiles.conf").read_text().splitlines():
        if found := re.match(r"d\s+(\S+)\s+(\d+)\s+(\S+)\s+(\S+)", line):
            path, mode, user, group = found.groups()
            folder = root / path.lstrip("/")
            folder.mkdir(parents=True, exist_ok=True)
            os.chown(folder, USERS[user], GROUPS[group])
            folder.chmod(int(mode, 8))


def as_user(user: str, program: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """Run Python as a user of the units, in the groups that they give it, with their umask."""
    python, reason = interpreter()
    need("an interpreter for an ordinary user", reason)
    identity = [f"--reuid={USERS[user]}", f"--regid={GROUPS[user]}", f"--groups={GROUPS['skerry']}"]
    return subprocess.run(
        ["setpriv", *identity, "env", python, "-c", program, *map(str, arguments)],
        preexec_fn=lambda: os.umask(int(unit_value(user.removeprefix("skerry-"), "UMask"), 8)) and None,
        env=environment(Path("/tmp")), capture_output=True, text=True, timeout=30, check=False, cwd="/",
    )  # fmt: skip


def unit_value(program: str, key: str) -> str:
    found = re.search(rf"(?m)^{key}=(\S+)", (SYSTEMD / f"skerry-{program}.service").read_text())
    assert found is not None
    return found[1]


@pytest.fixture
def root(tmp_path) -> Path:
    """A box on which the warden left what it leaves."""
    need("root", "" if os.geteuid() == 0 else "becoming another user takes root")
    for folder in (tmp_path, *tmp_path.parents):
        if folder != Path("/") and folder.stat().st_mode & 0o005 != 0o005 and folder.owner() == "root" and "pytest" in str(folder):
            folder.chmod(folder.stat().st_mode | 0o005)
    folders(tmp_path)
    wrote = as_user(
        "skerry-warden",
        "import sys; from pathlib import Path; from skerry.runtime import durable\n"
        "run, state = map(Path, sys.argv[1:])\n"
        "durable.write(run / 'routes.json', b'{}', mode=0o644, is_synced=False)\n"
        "durable.write(state / 'desired.json', b'{}')\n"
        "(state / 'models').mkdir(); (state / 'models' / 'm').write_bytes(b'model')",
        tmp_path / "run/skerry/warden",
        tmp_path / "var/lib/skerry/warden",
    )
    assert wrote.returncode == 0, wrote.stderr
    return tmp_path


ATTEMPTS = {
    "write the route table": "open(run / 'routes.json', 'w')",
    "put another in its place": "(run / 'mine').write_text('{}')",
    "remove it": "os.unlink(run / 'routes.json')",
    "rename it": "os.rename(run / 'routes.json', run / 'x')",
    "read what was ordered": "open(state / 'desired.json').read()",
    "order something": "open(state / 'desired.json', 'w')",
    "read a model": "open(state / 'models' / 'm').read()",
    "trust another key": "open(state / 'trust.json', 'w')",
    "put a sandbox's socket elsewhere": "(state / 'sandboxes' / 'x').mkdir()",
    "take the agent's place": "(agent / 'outbox.db').write_text('')",
    "bring a model in": "(agent / 'incoming' / 'm').write_text('')",
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_its_user_can_not(root, attempt):
    places = (root / "run/skerry/warden", root / "var/lib/skerry/warden", root / "var/lib/skerry/agent")
    program = f"import os, sys; from pathlib import Path\nrun, state, agent = map(Path, sys.argv[1:])\n{ATTEMPTS[attempt]}"
    tried = as_user("skerry-gateway", program, *places)
    assert tried.returncode == 1
    assert re.search(r"(PermissionError|FileNotFoundError)", tried.stderr), tried.stderr
    assert "FileNotFoundError" not in tried.stderr or "trust.json" in program
    assert (places[0] / "routes.json").read_bytes() == b"{}"


def test_what_it_needs_it_can(root):
    """Else the refusals above would be worth nothing."""
    tried = as_user(
        "skerry-gateway",
        "import sys; from pathlib import Path; run, own = map(Path, sys.argv[1:])\n(run / 'routes.json').read_text()\n(own / 'x').touch()",
        root / "run/skerry/warden",
        root / "run/skerry/gateway",
    )
    assert tried.returncode == 0, tried.stderr
