"""The coordinator's machine is an enemy's, its signing key included: it can have boxes run no model that nobody vouched for."""

import asyncio
import hashlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from skerry.cli.client import CliError
from skerry.runtime import mqtt
from skerry.wire import model_signature, signing, topics
from skerry.wire.api import ModelView
from skerry.wire.messages import Desired
from tests.conftest import scaling
from tests.drills.fleet import DEPLOYMENT, Target, broker_of, document_in, signed_documents
from tests.e2e.world import World, running, wait_until


def skerry(*arguments: str | Path, world: World | None = None) -> subprocess.CompletedProcess[str]:
    login = {"SKERRY_URL": world.fleet.url, "SKERRY_TOKEN": world.fleet.token} if world else {}
    command = [sys.executable, "-m", "skerry", *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **login, "COLUMNS": "200"}, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def key(tmp_path_factory) -> Path:
    """The key of whoever vouches for models; it never comes near the coordinator."""
    path = tmp_path_factory.mktemp("keys") / "models.key"
    done = skerry("model", "keygen", "--key", path)
    assert done.returncode == 0, done.stderr
    assert path.stat().st_mode & 0o077 == 0
    return path


@pytest.fixture(scope="module")
def world(key, scale_model, tmp_path_factory) -> Iterator[World]:
    """A fleet that asks models to be signed, with one that is."""
    model = tmp_path_factory.mktemp("model") / "scale.onnx"
    model.write_bytes(Path(scale_model).read_bytes())
    with running(model_keys=key.with_name("models.key.pub").read_bytes()) as world:
        world.push(model, "scale")
        with pytest.raises(CliError, match="scale:1: signature: there is none"):
            world.deploy(DEPLOYMENT)
        for command in (("sign", model, "--key", key), ("verify", model, "--key", f"{key}.pub"), ("push", model)):
            done = skerry("model", *command, "--name", "scale", "--version", "1", world=world)
            assert done.returncode == 0, done.stderr
        (view,) = world.api.call("GET", "/v1/models", list[ModelView])
        assert view.signature == "verified"
        world.deploy(DEPLOYMENT)
        world.wait_ready("scale")
        yield world


@pytest.fixture(scope="module")
def target(world) -> Target:
    return Target(world, "store-1")


@pytest.fixture(scope="module")
def evil(world) -> str:
    """A model of the enemy's own, which lies where the coordinator's models lie; its digest."""
    content = scaling(666.0).SerializeToString()
    digest = hashlib.sha256(content).hexdigest()
    (world.fleet.folder / "coordinator" / "models" / digest).write_bytes(content)
    return digest


def order(world: World, document: Desired) -> None:
    """Have the broker deliver a document that the coordinator's own key signed."""
    signing_key = load_pem_private_key((world.fleet.folder / "signer" / "signing.pem").read_bytes(), password=None)
    envelope = signing.sign(document, signing_key, context=signing.DESIRED_CONTEXT)

    async def send() -> None:
        async with mqtt.connected(broker_of(world), f"test-drill-{secrets.token_hex(4)}", last_will=None, queue=10) as client:
            await client.publish(topics.desired("demo", document.node), envelope, qos=1, retain=True)

    asyncio.run(send())


@pytest.fixture(scope="module")
def newest(world, target) -> Desired:
    return document_in(signed_documents(world)[target.name][-1])


def forged(newest: Desired, generation: int, digest: str, size_bytes: int, *, version: int = 1) -> Desired:
    """The box's document, with other bytes for its model."""
    model = msgspec.structs.replace(newest.replicas[0].model, sha256=digest, size_bytes=size_bytes, version=version)
    replica = msgspec.structs.replace(newest.replicas[0], model=model, generation=newest.replicas[0].generation + 1)
    return msgspec.structs.replace(newest, generation=newest.generation + generation, replicas=[replica])


def test_bytes_that_nobody_vouched_for_do_not_run_and_what_ran_serves_on(world, target, newest, evil):
    before = target.ask()
    size = (world.fleet.folder / "coordinator" / "models" / evil).stat().st_size
    for steps, document in enumerate(
        [
            forged(newest, 1000, evil, size),  # under the signature of the true one
            msgspec.structs.replace(forged(newest, 1001, evil, size), signatures={}),
            forged(
                newest, 1002, newest.replicas[0].model.sha256, newest.replicas[0].model.size_bytes, version=2
            ),  # true bytes as another version
        ]
    ):
        order(world, document)
        wait_until(lambda number=document.generation: world.node("store-1").reported_generation == number, 20, world.log_tails)
        (replica,) = [one for one in world.node("store-1").replicas if one.name == newest.replicas[0].name]
        assert "signature: " in replica.reason, f"step {steps}: {replica}"
        assert target.ask() == before
    assert not (target.box.folder / "warden" / "models" / evil).exists()
    time.sleep(2)
    assert target.ask() == before


def test_its_own_signature_under_the_coordinators_key_vouches_for_nothing(world, target, newest, evil, tmp_path):
    """The keys that say what runs where, and those that say what may run at all, are not the same."""
    stolen = tmp_path / "stolen.key"
    assert skerry("model", "keygen", "--key", stolen).returncode == 0
    private = load_pem_private_key(stolen.read_bytes(), password=None)
    bundle = model_signature.sign({model_signature.path_of("scale", 1): evil}, private, title="scale")
    document = msgspec.structs.replace(forged(newest, 2000, evil, 1), signatures={"scale/1": bundle})
    order(world, document)
    wait_until(lambda: world.node("store-1").reported_generation == document.generation, 20, world.log_tails)
    (replica,) = world.node("store-1").replicas
    assert "by none of the keys" in replica.reason


def test_a_signature_that_is_not_the_models_is_not_taken_by_the_coordinator_either(world, key, tmp_path):
    other = tmp_path / "other.onnx"
    other.write_bytes(scaling(3.0).SerializeToString())
    for command in (("sign", "--key", key), ("push", "--signature", tmp_path / "other.onnx.sig")):
        verb, *options = command
        done = skerry("model", verb, other, *options, "--name", "scale", "--version", "2" if verb == "sign" else "3", world=world)
    assert done.returncode != 0
    assert "it is for scale/2/model.onnx, not for scale/3/model.onnx" in done.stderr
    done = skerry("model", "verify", other, "--key", f"{key}.pub", "--name", "scale", "--version", "3")
    assert done.returncode == 1
    assert "not for scale/3" in done.stderr
