"""A warden that has keys for models starts nothing that none of them vouches for, and what served before goes on."""

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from edge_agent.core.report import models_wanted
from skerry.runtime import keys
from skerry.wire.bundle import Bundle
from skerry.wire.messages import ReplicaSpec
from skerry.wire.model_signature import path_of, sign
from tests.integration.box import Box

KEY, OTHER = keys.made(), keys.made()


@pytest.fixture
def box(tmp_path) -> Box:
    box = Box(tmp_path)
    box.model_keys = [KEY.public_key()]
    return box


def vouched(*specs: ReplicaSpec, key: ec.EllipticCurvePrivateKey = KEY) -> dict[str, Bundle]:
    """As the coordinator sends it."""
    return {
        f"{spec.model.name}/{spec.model.version}": sign({path_of(spec.model.name, spec.model.version): spec.model.sha256}, key, title="m")
        for spec in specs
    }


def test_a_model_that_a_trusted_key_signed_is_started(box):
    async def scene():
        async with box.up():
            spec = box.spec()
            await box.want(spec, signatures=vouched(spec))
            await box.until_ready("d-0")
            assert box.entries("model.refused") == []

    box.play(scene)


@pytest.mark.parametrize("signatures", ["none", "another key's", "another version's", "another model's bytes"])
def test_a_model_that_nobody_vouches_for_is_neither_fetched_nor_started_and_the_box_says_why(box, signatures):
    async def scene():
        async with box.up():
            spec = box.spec()
            said = {
                "none": {},
                "another key's": vouched(spec, key=OTHER),
                "another version's": {"m/1": vouched(box.spec(version=2))["m/2"]},
                "another model's bytes": vouched(box.spec(content=b"others")),
            }[signatures]
            await box.want(spec, signatures=said)
            await box.until(lambda: (report := box.report()) and report.phase == "failed")
            assert "m:1: signature: " in box.report().reason
            assert box.warden.state.needs == []
            assert [entry.subject for entry in box.entries("model.refused")] == ["d-0"]
            await box.looked()
            assert box.running == {}

    box.play(scene)


def test_the_version_before_serves_on_while_nobody_vouches_for_the_next_and_until_somebody_does(box):
    async def scene():
        async with box.up():
            first, second = box.spec(version=1), box.spec(version=2)
            await box.want(first, signatures=vouched(first))
            await box.until_ready("d-0")
            (serving,) = box.running
            await box.want(second, signatures=vouched(first))
            await box.until(lambda: "next version may not run" in box.report().reason)
            await box.looked()
            assert set(box.running) == {serving}
            assert box.report().phase == "ready"
            await box.want(second, signatures=vouched(second))
            await box.until_ready("d-0")
            assert box.report().generation == 2
            await box.until(lambda: serving not in box.running)

    box.play(scene)


def test_what_runs_is_stopped_where_its_key_is_trusted_no_more(box):
    async def scene():
        spec = box.spec()
        async with box.up():
            await box.want(spec, signatures=vouched(spec))
            await box.until_ready("d-0")
        box.model_keys = [OTHER.public_key(), KEY.public_key()]  # the two overlap: nothing changes
        async with box.up():
            await box.looked()
            assert len(box.running) == 1
        box.model_keys = [OTHER.public_key()]
        async with box.up():
            await box.until(lambda: box.running == {} and box.report().phase == "failed")
            await box.want(spec, signatures=vouched(spec, key=OTHER))
            await box.until_ready("d-0")

    box.play(scene)


def test_without_keys_every_model_is_taken(box):
    box.model_keys = None

    async def scene():
        async with box.up():
            await box.want(box.spec())
            await box.until_ready("d-0")

    box.play(scene)


def test_what_may_not_run_is_not_asked_for(box):
    document = box.document(box.spec("a-0"), box.spec("b-0", content=b"others"))
    assert {model.sha256 for model in models_wanted(document, [], ["b-0"])} == {box.spec("a-0").model.sha256}
