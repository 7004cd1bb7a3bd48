"""The planner never promises what a box has not got, says why for every box, and moves nothing that need not move."""

import msgspec
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from coordinator.core.deployment import Deployment, Replicas
from coordinator.core.fit import Node
from coordinator.core.planner import MAX_PEERS, BoxPlan, Plan, Wanted, plan
from skerry.wire.messages import Batching, CloudBudget, ModelRef, Server

STRENGTH = {"process": 0, "container": 1, "gvisor": 2, "microvm": 3}
MATCHES = {"store-1": {"store-1"}, "store-*": {"store-1", "store-2"}, "*": {"store-1", "store-2", "depot"}, "depot": {"depot"}}
"""By pattern, the sites that it means: written out, so that nothing here asks the matcher that is judged."""


def nodes(node_id: str):
    return st.builds(
        Node,
        id=st.just(node_id),
        tier=st.sampled_from(["edge", "edge", "cloud"]),
        labels=st.sampled_from([{"site": "store-1"}, {"site": "store-1"}, {"site": "store-2"}, {"site": "depot"}, {}]),
        gateway_url=st.just(f"http://{node_id}"),
        online=st.sampled_from([True, True, False]),
        memory_bytes=st.sampled_from([0, 4, 5, 9, 10, 10, 14, 20]),
        gpu_memory_bytes=st.sampled_from([0, 0, 2, 5]),
        rungs=st.sampled_from([["process", "container"], ["container", "process"], ["process"], ["gvisor"], []]),
        rungs_absent=st.sampled_from([{}, {"container": "no engine"}, {"gvisor": "no runsc", "microvm": "no KVM"}]),
        drained=st.sampled_from(["", "", "", "", "is drained: new disk"]),
    )


@st.composite
def wants(draw, name: str):
    replicas = Replicas(per_node=draw(st.integers(1, 3))) if draw(st.booleans()) else Replicas(count=draw(st.integers(1, 9)))
    version = draw(st.integers(1, 2))
    spec = Deployment(
        name=name,
        model="m",
        version=version,
        replicas=replicas,
        labels=draw(st.sampled_from([{}, {}, *[{"site": pattern} for pattern in MATCHES]])),
        tiers=draw(st.sampled_from([["edge"], ["edge", "cloud"], ["cloud"]])),
        accelerator=draw(st.sampled_from(["any", "any", "any", "gpu", "none"])),
        memory_bytes=draw(st.sampled_from([1, 1, 2, 3, 6])),
        cpus=1.0,
        gpu_memory_bytes=draw(st.sampled_from([0, 0, 1, 2])),
        isolation_at_least=draw(st.sampled_from(["process", "process", "container", "gvisor"])),
        deadline_ms=50,
        target=0.99,
        split=draw(st.sampled_from(["edge", "cloud", "overflow"])),
        **draw(st.sampled_from([{}, {}, {}, {"image": "sha256:a"}, {"server": Server("sha256:b")}])),
        update=draw(st.sampled_from(["hand_over", "hand_over_if_room", "recreate"])),
        batching=draw(st.sampled_from([Batching(), Batching(8, 2000)])),
        cloud_budget=draw(st.sampled_from([None, CloudBudget(0), CloudBudget(None, 5)])),
    )
    model = ModelRef("m", version, f"digest-{version}", 1) if draw(st.integers(0, 9)) else None
    return Wanted(spec, draw(st.integers(1, 3)), model)


@st.composite
def fleets(draw, most_wanted: int = 4):
    """Boxes and deployments in order of age."""
    boxes = [draw(nodes(f"n{index}")) for index in range(draw(st.integers(0, 6)))]
    wanted = [draw(wants(name)) for name in draw(st.permutations("abcd"))[: draw(st.integers(1, most_wanted))]]
    return boxes, wanted


@st.composite
def worlds(draw):
    """A fleet, and the plan of one that was nearly the same: a box less or more, a deployment that was smaller, older or absent."""
    boxes, wanted = draw(fleets())
    old_boxes = [box if draw(st.integers(0, 4)) else draw(nodes(box.id)) for box in boxes if draw(st.integers(0, 5))]
    old_wanted = [want if draw(st.integers(0, 3)) else draw(wants(want.spec.name)) for want in wanted if draw(st.integers(0, 5))]
    return boxes, wanted, plan(old_boxes, old_wanted, {}).boxes if draw(st.integers(0, 3)) else {}


def misfit(node: Node, want: Wanted) -> str:
    """A word that the reason must hold; empty where the box fits. Written out again: it shares nothing with what it judges."""
    spec = want.spec
    if node.tier not in spec.tiers:
        return "tier"
    if "site" in spec.labels:
        if "site" not in node.labels:
            if node.tier == "edge":
                return "has no label"
        elif node.labels["site"] not in MATCHES[spec.labels["site"]]:
            return "does not match"
    if spec.accelerator == "gpu" and node.gpu_memory_bytes == 0:
        return "has no GPU"
    if spec.accelerator == "none" and node.gpu_memory_bytes > 0:
        return "has a GPU"
    return rung_misfit(node.rungs, spec) or ("is drained" if node.drained else "")


def rung_misfit(rungs: list[str], spec: Deployment) -> str:
    if not rungs:
        return "not said yet"
    if spec.server:
        if spec.isolation_at_least in ("gvisor", "microvm"):
            return "runs on the rung container alone"
        return "" if "container" in rungs else "server"
    if all(STRENGTH[rung] < STRENGTH[spec.isolation_at_least] for rung in rungs):
        return "isolation"
    if spec.image and all(rung == "process" for rung in rungs):
        return "image"
    return ""


def places(made: Plan) -> dict[str, list[str]]:
    """By replica, the boxes that are told to run it."""
    found: dict[str, list[str]] = {}
    for node, box in made.boxes.items():
        for replica in box.replicas:
            found.setdefault(replica.name, []).append(node)
    return found


def left(node: Node, made: Plan) -> tuple[int, int]:
    """Fifths of memory, and GPU memory, that the plan leaves of what replicas may use (four fifths)."""
    replicas = made.boxes[node.id].replicas
    return (
        4 * node.memory_bytes - 5 * sum(replica.memory_bytes for replica in replicas),
        node.gpu_memory_bytes - sum(replica.gpu_memory_bytes for replica in replicas),
    )


@given(worlds())
@settings(max_examples=70, deadline=None)
def test_no_box_is_given_more_memory_than_it_has_to_give(world):
    boxes, wanted, before = world
    made = plan(boxes, wanted, before)
    assert made.boxes.keys() == {box.id for box in boxes}
    for box in boxes:
        assert min(left(box, made)) >= 0


@given(worlds())
@settings(max_examples=70, deadline=None)
def test_every_box_runs_the_deployment_or_is_told_why_not(world):
    boxes, wanted, before = world
    made = plan(boxes, wanted, before)
    for want in wanted:
        outcome = made.outcomes[want.spec.name]
        used = {placement.node for placement in outcome.placements}
        reasons = {refusal.node: refusal.reason for refusal in outcome.refusals}
        assert len(reasons) == len(outcome.refusals), "a box is refused once"
        if want.model is None:
            assert not used
            assert "skerry model push" in outcome.problem
            continue
        assert used | reasons.keys() == {box.id for box in boxes}
        assert all(reasons.values())
        for box in boxes:
            word = misfit(box, want)
            assert not (word and box.id in used), f"placed where it does not fit: {word}"
            if word:
                assert word in reasons[box.id]
            elif box.id in reasons:
                both = box.id in used
                short = "needs" in reasons[box.id] and "free" in reasons[box.id]
                assert short or (not both and reasons[box.id].startswith("not needed") and want.spec.replicas.count)
                assert not both or want.spec.replicas.per_node, "where some of several find room, and no others, it says so"


@given(worlds())
@settings(max_examples=70, deadline=None)
def test_there_are_as_many_replicas_as_asked_for_or_there_is_a_problem_and_no_room(world):
    boxes, wanted, before = world
    made = plan(boxes, wanted, before)
    where = places(made)
    for want in wanted:
        spec, outcome = want.spec, made.outcomes[want.spec.name]
        mine = [(p.node, p.replica) for p in outcome.placements]
        told = [(n, r.name) for n, box in made.boxes.items() for r in box.replicas if r.deployment == spec.name]
        assert sorted(mine) == sorted(told), "what is said is what is done"
        fitting = [box for box in boxes if want.model and not misfit(box, want)]
        if spec.replicas.count is not None:
            assert len({replica for _, replica in mine}) == len(mine)
            assert {replica for _, replica in mine} <= {f"{spec.name}-{index}" for index in range(spec.replicas.count)}
            assert all(len(where[replica]) == 1 for _, replica in mine)
            asked = spec.replicas.count
        else:
            for box in boxes:
                numbers = [replica for node, replica in mine if node == box.id]
                assert numbers == [f"{spec.name}-{index}" for index in range(len(numbers))]
                assert len(numbers) <= (spec.replicas.per_node or 0)
            asked = (spec.replicas.per_node or 0) * len(fitting)
        assert len(mine) <= asked
        assert outcome.wanted == asked or want.model is None
        if len(mine) < asked:
            assert outcome.problem
        if want is wanted[-1] and want.model and len(mine) < asked:
            for box in fitting:
                memory, gpu_memory = left(box, made)
                is_served = len([node for node, _ in mine if node == box.id]) == spec.replicas.per_node
                assert is_served or memory < 5 * spec.memory_bytes or gpu_memory < spec.gpu_memory_bytes


@given(worlds(), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_the_order_in_which_boxes_are_listed_changes_nothing(world, rnd):
    boxes, wanted, before = world
    shuffled = rnd.sample(boxes, len(boxes))
    assert plan(boxes, wanted, before) == plan(shuffled, wanted, dict(reversed(before.items())))


@given(worlds())
@settings(max_examples=70, deadline=None)
def test_planning_again_changes_nothing(world):
    boxes, wanted, before = world
    made = plan(boxes, wanted, before)
    again = plan(boxes, wanted, made.boxes)
    assert again.boxes == made.boxes
    assert plan(boxes, wanted, again.boxes) == again


@given(fleets())
@settings(max_examples=40, deadline=None)
def test_a_new_generation_that_changes_no_replica_keeps_the_old_ones(fleet):
    boxes, wanted = fleet
    made = plan(boxes, wanted, {})
    edited = [
        Wanted(
            msgspec.structs.replace(want.spec, deadline_ms=51, update="recreate", batching=Batching(3), cloud_budget=CloudBudget(7)),
            want.generation + 1,
            want.model,
        )
        for want in wanted
    ]
    again = plan(boxes, edited, made.boxes)
    assert {node: box.replicas for node, box in again.boxes.items()} == {node: box.replicas for node, box in made.boxes.items()}
    told = [(route.deadline_ms, route.batching, route.cloud_budget) for box in again.boxes.values() for route in box.routes]
    assert all(settings == (51, Batching(3), CloudBudget(7)) for settings in told)


@given(fleets(), st.sampled_from(["memory", "model", "isolation", "image", "server"]))
@settings(max_examples=40, deadline=None)
def test_a_replica_that_changes_carries_the_new_generation(fleet, what):
    boxes, wanted = fleet
    made = plan(boxes, wanted, {})
    edited = []
    for want in wanted:
        spec, model = want.spec, want.model
        if what == "memory":
            spec = msgspec.structs.replace(spec, memory_bytes=spec.memory_bytes + 1)
        elif what == "model" and model is not None:
            model = msgspec.structs.replace(model, sha256="other")
        elif what == "isolation":
            spec = msgspec.structs.replace(spec, isolation_at_least="microvm" if spec.isolation_at_least == "gvisor" else "gvisor")
        elif what == "image":
            spec = msgspec.structs.replace(spec, image="sha256:c", update="recreate")
        elif what == "server":
            spec = msgspec.structs.replace(spec, server=Server("sha256:b", port=81))
        edited.append(Wanted(spec, want.generation + 7, model))
    generations = {want.spec.name: want.generation for want in edited}
    for box in plan(boxes, edited, made.boxes).boxes.values():
        assert all(replica.generation == generations[replica.deployment] for replica in box.replicas)
        assert what != "image" or all(replica.update == "recreate" for replica in box.replicas), "an update says how it is to be made"


@given(worlds())
@settings(max_examples=70, deadline=None)
def test_routes_lead_to_hosts_in_the_cloud_and_at_the_same_site_and_never_from_the_cloud(world):
    boxes, wanted, before = world
    made = plan(boxes, wanted, before)
    tiers = {box.id: box.tier for box in boxes}
    sites = {box.id: box.labels.get("site") for box in boxes}
    specs = {want.spec.name: want.spec for want in wanted}
    hosts = {name: {p.node for p in outcome.placements} for name, outcome in made.outcomes.items()}
    for node, box in made.boxes.items():
        routed = [route.deployment for route in box.routes]
        assert len(set(routed)) == len(routed)
        assert {replica.deployment for replica in box.replicas} <= set(routed), "what runs here is served here"
        for route in box.routes:
            upstreams = {upstream.node for upstream in route.upstreams}
            assert upstreams or node in hosts[route.deployment], "a route leads somewhere"
            if tiers[node] == "cloud" or specs[route.deployment].split == "edge":
                assert not upstreams
            else:
                neighbours = {host for host in hosts[route.deployment] - {node} if sites[host] and sites[host] == sites[node]}
                assert upstreams == {host for host in hosts[route.deployment] if tiers[host] == "cloud" or host in neighbours}
            assert all((u.tier, u.url) == (tiers[u.node], f"http://{u.node}") for u in route.upstreams)
            spec = specs[route.deployment]
            assert (route.split, route.batching, route.cloud_budget) == (spec.split, spec.batching, spec.cloud_budget)


def site_node(index: int, *, site: str = "mill", memory_bytes: int = 10) -> Node:
    return Node(f"cam-{index:02}", "edge", {"site": site} if site else {}, f"http://cam-{index:02}", True, memory_bytes, 0, ["process"])


@st.composite
def sites(draw):
    """Up to 30 boxes of three sites, and of none; some have no room for a replica and only pass requests on."""
    shapes = st.tuples(st.sampled_from(["mill", "mill", "mill", "depot", ""]), st.sampled_from([10, 10, 10, 0]))
    drawn = draw(st.lists(shapes, min_size=draw(st.sampled_from([0, 20])), max_size=30))
    return [site_node(index, site=site, memory_bytes=room) for index, (site, room) in enumerate(drawn)]


def peers(boxes: list[Node], before: Plan | None = None, split: str = "overflow") -> dict[str, list[str]]:
    """By box, the neighbours that it may ask for the one deployment there is; boxes without a route have none."""
    spec = msgspec.structs.replace(SPEC, split=split)
    made = plan(boxes, [Wanted(spec, 1, ModelRef("m", 1, "digest-1", 1))], before.boxes if before else {})
    return {node: [u.node for route in box.routes for u in route.upstreams] for node, box in made.boxes.items()}


@given(sites(), st.sampled_from(["cloud", "overflow"]))
@settings(max_examples=100, deadline=None)
def test_a_box_may_ask_neighbours_of_its_site_that_run_the_deployment_up_to_a_bound_and_never_itself(boxes, split):
    told = peers(boxes, split=split)
    for box in boxes:
        fitting = [other.id for other in boxes if other.id != box.id and other.labels == box.labels != {} and other.memory_bytes]
        assert set(told[box.id]) <= set(fitting)
        assert len(told[box.id]) == len(set(told[box.id])) == min(MAX_PEERS, len(fitting)), "as many as there are, up to the bound"
        assert told[box.id] == sorted(told[box.id])
    assert not any(peers(boxes, split="edge").values())


@given(sites())
@settings(max_examples=100, deadline=None)
def test_every_host_of_a_site_is_asked_by_as_many_neighbours_as_it_may_ask_itself(boxes):
    hosts = [box for box in boxes if box.memory_bytes]
    told = peers(hosts)
    for box in hosts:
        asked_by = [node for node, those in told.items() if box.id in those]
        assert len(asked_by) == len(told[box.id])
        if len(told[box.id]) < MAX_PEERS:
            assert set(asked_by) == set(told[box.id]), "in a small site whoever may be asked may ask"


@given(sites(), st.data())
@settings(max_examples=100, deadline=None)
def test_a_box_that_leaves_is_nobodys_neighbour_and_changes_the_routes_of_those_alone_who_asked_it(boxes, data):
    assume(boxes)
    gone = data.draw(st.sampled_from(boxes))
    before = peers(boxes)
    after = peers([box for box in boxes if box is not gone])
    assert not any(gone.id in those for those in after.values())
    changed = [node for node in after if after[node] != before[node]]
    assert changed == [node for node in after if gone.id in before[node]]


@given(sites(), st.data())
@settings(max_examples=60, deadline=None)
def test_neighbours_depend_on_neither_order_nor_liveness_nor_the_plan_before(boxes, data):
    told = peers(boxes)
    shuffled = data.draw(st.permutations(boxes))
    silent = [msgspec.structs.replace(box, online=data.draw(st.booleans())) for box in shuffled]
    made = plan(boxes, [Wanted(SPEC, 1, ModelRef("m", 1, "digest-1", 1))], {})
    assert peers(silent) == peers(silent, made) == told


def test_boxes_with_like_names_and_no_replica_do_not_all_ask_the_same_few():
    hosts = [site_node(index) for index in range(20)]
    askers = [site_node(index, memory_bytes=0) for index in range(20, 80)]
    told = peers([*hosts, *askers])
    asked = {peer for box in askers for peer in told[box.id]}
    assert asked == {host.id for host in hosts}


@given(worlds(), st.data())
@settings(max_examples=40, deadline=None)
def test_a_box_that_fits_nothing_moves_nothing(world, data):
    boxes, wanted, before = world
    made = plan(boxes, wanted, before)
    newcomer = data.draw(nodes(data.draw(st.sampled_from(["a0", "z9"]))))
    assume(all(misfit(newcomer, want) for want in wanted))
    more = plan([*boxes, newcomer], wanted, made.boxes)
    assert more.boxes.pop(newcomer.id).replicas == []
    assert more.boxes == made.boxes


@given(fleets(), st.data())
@settings(max_examples=40, deadline=None)
def test_a_new_box_draws_no_replica_away_from_where_it_runs(fleet, data):
    boxes, wanted = fleet
    made = plan(boxes, wanted, {})
    more = plan([*boxes, data.draw(nodes(data.draw(st.sampled_from(["a0", "z9"]))))], wanted, made.boxes)
    for node, box in made.boxes.items():
        stayed = {replica.name for replica in more.boxes[node].replicas}
        assert {replica.name for replica in box.replicas} <= stayed


@given(fleets(most_wanted=1), st.data())
@settings(max_examples=100, deadline=None)
def test_when_a_box_goes_only_what_ran_on_it_moves(fleet, data):
    boxes, wanted = fleet
    assume(boxes)
    made = plan(boxes, wanted, {})
    gone = data.draw(st.sampled_from(boxes))
    less = plan([box for box in boxes if box is not gone], wanted, made.boxes)
    for node, box in less.boxes.items():
        assert {replica.name for replica in made.boxes[node].replicas} <= {replica.name for replica in box.replicas}


@given(fleets())
@settings(max_examples=40, deadline=None)
def test_a_box_that_falls_silent_keeps_its_replicas(fleet):
    boxes, wanted = fleet
    made = plan(boxes, wanted, {})
    silent = [msgspec.structs.replace(box, online=not box.online) for box in boxes]
    assert plan(silent, wanted, made.boxes).boxes == made.boxes


@given(fleets())
@settings(max_examples=70, deadline=None)
def test_a_replica_carries_all_that_its_sandbox_is_made_of(fleet):
    boxes, wanted = fleet
    made = plan(boxes, wanted, {})
    specs = {want.spec.name: want.spec for want in wanted}
    for box in made.boxes.values():
        for replica in box.replicas:
            spec = specs[replica.deployment]
            told = (replica.image, replica.server, replica.update, replica.cpus, replica.memory_bytes)
            assert told == (spec.image, spec.server, spec.update, spec.cpus, spec.memory_bytes)
            least = 1 if spec.image or spec.server else 0
            assert STRENGTH[replica.isolation_at_least] == max(STRENGTH[spec.isolation_at_least], least), "an image needs an engine"


SPEC = Deployment("d", "m", 1, Replicas(per_node=1), {}, ["edge"], "any", 1, 1.0, 0, "process", 50, 0.99, "overflow")


def reason(rungs: list[str], absent: dict[str, str], **changes: object) -> str:
    """Why one box with these rungs is refused."""
    box = Node("n", "edge", {}, "http://n", True, 100, 0, rungs, absent)
    spec = msgspec.structs.replace(SPEC, **changes)
    return plan([box], [Wanted(spec, 1, ModelRef("m", 1, "digest-1", 1))], {}).outcomes["d"].refusals[0].reason


def test_a_box_that_lacks_a_rung_is_refused_in_its_own_words():
    absent = {"gvisor": "no runtime runsc", "microvm": "no /dev/kvm", "container": "no Docker Engine at /run/docker.sock"}
    assert reason(["process"], absent, isolation_at_least="gvisor") == (
        "isolation.at_least: gvisor is asked for, offers process; gvisor is not available on this box: no runtime runsc"
    )
    assert reason(["process"], absent, isolation_at_least="microvm").endswith("microvm is not available on this box: no /dev/kvm")
    assert reason(["process"], {}, isolation_at_least="gvisor") == "isolation.at_least: gvisor is asked for, offers process"
    words = "container is not available on this box: no Docker Engine at /run/docker.sock"
    assert reason(["process"], absent, image="sha256:a") == f"image: runs on the rung container or above, offers process; {words}"
    assert reason(["process", "gvisor"], absent, server=Server("sha256:a")) == (
        f"server: runs on the rung container, offers process, gvisor; {words}"
    )


def test_a_box_that_says_a_great_deal_is_cut_short():
    assert len(reason(["process"], {"gvisor": "x" * 100_000}, isolation_at_least="gvisor")) < 500


def test_a_server_of_ones_own_is_never_placed_where_it_could_not_be_reached():
    words = reason(["process", "container", "gvisor"], {}, server=Server("sha256:a"), isolation_at_least="gvisor")
    assert "runs on the rung container alone" in words


def test_a_plan_for_nobody_is_empty():
    assert plan([], [], {"gone": BoxPlan()}) == Plan({}, {})


def test_a_cloud_box_passes_nothing_on_to_another_cloud_box():
    boxes = [Node(name, "cloud", {}, f"http://{name}", True, 100, 0, ["process"]) for name in ("c1", "c2")]
    spec = Deployment("d", "m", 1, Replicas(per_node=1), {}, ["cloud"], "any", 1, 1.0, 0, "process", 50, 0.99, "overflow")
    made = plan(boxes, [Wanted(spec, 1, ModelRef("m", 1, "digest-1", 1))], {})
    assert [[route.upstreams for route in box.routes] for box in made.boxes.values()] == [[[]], [[]]]
