"""What a box says it does is all that it is to do and all that it has, and its gateway is sent to what is ready and nowhere else."""

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.core.report import ReplicaStatus, Withheld, models_wanted, report_of, routes_of
from skerry.wire.messages import Desired, ModelRef, ReplicaSpec, Reported, RouteSpec, Upstream

DIGESTS = ["d1", "d2", "d3"]
CLOUD = Upstream("c", "http://c", "cloud")
PHASES = ["pending", "fetching", "starting", "ready", "draining", "backoff", "failed"]


def spec_of(name: str, deployment: str, digest: str, generation: int, cpus: float) -> ReplicaSpec:
    return ReplicaSpec(name, deployment, generation, ModelRef("m", int(digest[1:]), digest, 1), memory_bytes=1, cpus=cpus)


def specs(name: str):
    return st.builds(
        spec_of,
        st.just(name),
        st.sampled_from(["x", "y"]),
        st.sampled_from(DIGESTS),
        st.integers(1, 3),
        st.sampled_from([0.5, 1.0, 2.0, 3.7]),
    )


@st.composite
def worlds(draw):
    """A document, and what the warden knows: mostly what the document wants, in some phase."""
    wanted = [draw(specs(name)) for name in draw(st.permutations("abcd"))[: draw(st.integers(0, 4))]]
    routes = [
        RouteSpec(name, "m", 1, deadline_ms=50, split="overflow", upstreams=draw(st.sampled_from([[], [CLOUD]])))
        for name in draw(st.permutations(["x", "y", "z"]))[: draw(st.integers(0, 3))]
    ]
    desired = Desired("f", "n", draw(st.integers(1, 9)), 1, wanted, routes) if draw(st.integers(0, 7)) else None
    known = {}
    held = {spec.name: spec if draw(st.integers(0, 3)) else draw(specs(spec.name)) for spec in wanted if draw(st.integers(0, 2))}
    for name in draw(st.sets(st.sampled_from("abcdef"), max_size=2)):
        held.setdefault(name, draw(specs(name)))
    for name in draw(st.permutations(sorted(held))):
        phase = draw(st.sampled_from([*PHASES, "ready", "ready"]))
        socket = f"/run/{name}" if draw(st.integers(0, 3)) else ""
        known[name] = ReplicaStatus(held[name], phase, draw(st.sampled_from(["", "why"])), "driver", "process", "CPU", socket, 2)
    return desired, known


waitings = st.dictionaries(st.sampled_from(DIGESTS), st.sampled_from(["no room", "404"]), max_size=3)


@given(worlds(), waitings, st.sampled_from(["", "bad signature"]))
@settings(max_examples=150, deadline=None)
def test_every_wanted_replica_and_every_other_that_is_still_there_is_reported_once(world, waiting, refused):
    desired, known = world
    reported = report_of(desired, known, waiting, Withheld(), refused)
    names = [report.name for report in reported.replicas]
    wanted = {spec.name: spec for spec in desired.replicas} if desired else {}
    assert sorted(names) == names
    assert len(set(names)) == len(names)
    assert set(names) == wanted.keys() | known.keys()
    assert reported.generation == (desired.generation if desired else 0)
    assert reported.refused == refused
    for report in reported.replicas:
        if report.name in known:
            status = known[report.name]
            assert (report.phase, report.reason, report.restarts) == (status.phase, status.reason, 2)
            assert report.sha256 == status.spec.model.sha256, "the digest that runs, not the one that is wanted"
            assert report.generation == status.spec.generation
            assert (report.deployment, report.driver, report.rung, report.provider) == (status.spec.deployment, "driver", "process", "CPU")
        else:
            spec = wanted[report.name]
            assert (report.phase, report.deployment, report.generation) == ("fetching", spec.deployment, spec.generation)
            assert report.reason == waiting.get(spec.model.sha256, "")
            assert (report.sha256, report.driver, report.rung) == ("", "", None), "nothing runs, so nothing is claimed"


@given(worlds())
@settings(max_examples=150, deadline=None)
def test_a_route_leads_to_the_ready_replicas_of_its_deployment_and_to_no_other(world):
    desired, known = world
    table = routes_of(desired, known.values())
    assert [route.deployment for route in table.routes] == ([route.deployment for route in desired.routes] if desired else [])
    for route, asked in zip(table.routes, desired.routes if desired else [], strict=True):
        ready = {name: status for name, status in known.items() if status.phase == "ready" and status.socket}
        mine = {name: status for name, status in ready.items() if status.spec.deployment == route.deployment}
        versions = {status.spec.model.version for status in mine.values()}
        newest = {
            status.spec.model.version for status in mine.values() if status.spec.generation == max(s.spec.generation for s in mine.values())
        }
        assert route.version == asked.version if asked.version in versions or not mine else route.version in newest
        expected = {name: status for name, status in mine.items() if status.spec.model.version == route.version}
        assert [replica.name for replica in route.replicas] == sorted(expected), "one version at a time"
        for replica in route.replicas:
            assert replica.socket == expected[replica.name].socket
        assert (route.upstreams, route.batching, route.cloud_budget) == (asked.upstreams, asked.batching, asked.cloud_budget)
        assert (route.model, route.deadline_ms, route.split) == (asked.model, asked.deadline_ms, asked.split)
    assert table.generation == (desired.generation if desired else 0)


@given(worlds())
def test_the_same_world_gives_the_same_words_whatever_the_order(world):
    desired, known = world
    turned = dict(reversed(known.items()))
    listed = msgspec.structs.replace(desired, replicas=desired.replicas[::-1]) if desired else None
    assert report_of(listed, turned, {}, Withheld(), "") == report_of(desired, known, {}, Withheld(), "")
    assert routes_of(desired, turned.values()) == routes_of(desired, known.values())


@given(worlds(), st.sets(st.sampled_from([*DIGESTS, "other"])))
def test_the_models_asked_for_are_those_that_are_wanted_and_not_here(world, present):
    desired, _ = world
    asked = models_wanted(desired, present)
    digests = [model.sha256 for model in asked]
    assert len(set(digests)) == len(digests)
    assert set(digests) == {spec.model.sha256 for spec in (desired.replicas if desired else [])} - present
    assert all(model.version == int(model.sha256[1:]) for model in asked)


def test_a_box_that_was_told_nothing_says_that_it_does_nothing():
    assert report_of(None, {}, {}, Withheld(), "") == Reported(generation=0)
    assert models_wanted(None, []) == []
