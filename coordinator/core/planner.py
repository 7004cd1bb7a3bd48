"""Which box runs what, and why. Pure: the same fleet and deployments give the same plan, with a reason for every yes and no.

Deployments are placed in order of age, and what already runs somewhere stays there as long as it may. A silent box keeps
its replicas: from here a crash can't be told from a cut link. Where the deployment says so, what a lost box runs is run elsewhere too,
and once both are there again one of them goes.
"""

from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b

import msgspec

from coordinator.core.deployment import Deployment
from coordinator.core.fit import Node, label_mismatch, least_rung, unfit
from skerry.wire.messages import ModelRef, ReplicaSpec, RouteSpec, Upstream
from skerry.wire.units import format_bytes

USABLE_SHARE = 0.8
"""Of a box's memory; the rest is the system's and ours."""
NO_FIT = "no box fits"
MAX_PEERS = 8
"""Neighbours that one box may ask: enough to find an idle one, few enough for a document."""


class Wanted(msgspec.Struct, frozen=True):
    """A deployment with its generation and its model, None where the store has no such version. While a change spreads, ``before`` is
    what those units keep that are not ``admitted``: boxes where each has its own replicas, else replicas by name."""

    spec: Deployment
    generation: int
    model: ModelRef | None
    before: "Wanted | None" = None
    admitted: frozenset[str] = frozenset()
    shadowing: frozenset[str] = frozenset()
    """Units beside which it runs as a shadow: it is asked what they were asked, and answers nobody."""

    def unit_of(self, placement: "Placement") -> str:
        """The unit of a change that a placement is, or belongs to."""
        return placement.node if self.spec.replicas.count is None else placement.replica

    def of(self, placement: "Placement") -> "Wanted":
        """What a placement is of."""
        return self.before if self.before is not None and self.unit_of(placement) not in self.admitted else self


class Placement(msgspec.Struct, frozen=True):
    """A replica on a box, and why there. ``is_lost``: the box is lost, as the deployment sees it; ``replaces`` is the box in whose
    place it runs."""

    node: str
    replica: str
    reason: str
    is_lost: bool = False
    replaces: str = ""


class Refusal(msgspec.Struct, frozen=True):
    """A box that does not run the deployment, and why not."""

    node: str
    reason: str


class Outcome(msgspec.Struct, frozen=True):
    """What became of one deployment; ``wanted`` counts replicas, those that found no place included."""

    wanted: int
    placements: list[Placement] = []
    refusals: list[Refusal] = []
    problem: str = ""


class BoxPlan(msgspec.Struct, frozen=True):
    """What one box shall do."""

    replicas: list[ReplicaSpec] = []
    routes: list[RouteSpec] = []


class Plan(msgspec.Struct, frozen=True):
    """The whole fleet's plan, boxes and deployments by name."""

    boxes: dict[str, BoxPlan]
    outcomes: dict[str, Outcome]


class _Free:
    """What is left on a box while the plan is made."""

    def __init__(self, node: Node) -> None:
        self.usable_bytes = int(node.memory_bytes * USABLE_SHARE)
        self.memory_bytes = self.usable_bytes
        self.gpu_memory_bytes = node.gpu_memory_bytes

    def room_for(self, spec: Deployment) -> int:
        """How many replicas fit."""
        by_memory = self.memory_bytes // spec.memory_bytes
        return min(by_memory, self.gpu_memory_bytes // spec.gpu_memory_bytes) if spec.gpu_memory_bytes else by_memory

    def take(self, spec: Deployment) -> None:
        self.memory_bytes -= spec.memory_bytes
        self.gpu_memory_bytes -= spec.gpu_memory_bytes


def _no_room(free: _Free, spec: Deployment) -> str:
    if free.memory_bytes < spec.memory_bytes:
        return (
            f"needs {format_bytes(spec.memory_bytes)} of memory, "
            f"{format_bytes(max(0, free.memory_bytes))} of {format_bytes(free.usable_bytes)} are free"
        )
    return f"needs {format_bytes(spec.gpu_memory_bytes)} of GPU memory, {format_bytes(max(0, free.gpu_memory_bytes))} are free"


def plan(nodes: Sequence[Node], wanted: Sequence[Wanted], before: Mapping[str, BoxPlan]) -> Plan:
    """The plan for all boxes. ``wanted`` in order of age; ``before`` is what each box was last told to do."""
    ordered = sorted(nodes, key=lambda node: node.id)
    free = {node.id: _Free(node) for node in ordered}
    homes: dict[str, dict[str, str]] = {}
    for node_id, box in before.items():
        for replica in box.replicas:
            homes.setdefault(replica.name, {})[node_id] = replica.replaces
    by_id = {node.id: node for node in ordered}
    outcomes: dict[str, Outcome] = {}
    replicas: dict[str, list[ReplicaSpec]] = {node.id: [] for node in ordered}
    hosts: dict[str, _Hosts] = {}
    for want in wanted:
        outcome = _place(want, ordered, free, homes)
        outcomes[want.spec.name] = outcome
        hosts[want.spec.name] = _Hosts(by_id[node] for node in sorted({placement.node for placement in outcome.placements}))
        for placement in outcome.placements:
            old = next((r for r in before.get(placement.node, BoxPlan()).replicas if r.name == placement.replica), None)
            replicas[placement.node].append(_replica(want.of(placement), placement, old))
    for want in wanted:  # once all others have their place
        for node in _shadowed(want, outcomes[want.spec.name], by_id, free):
            name = shadow_of(want.spec)
            old = next((r for r in before.get(node, BoxPlan()).replicas if r.name == name), None)
            replicas[node].append(_replica(want, Placement(node, name, "beside what serves"), old, is_shadow=True))
    shadowed = {(node, replica.deployment) for node, found in replicas.items() for replica in found if replica.is_shadow}
    told = {(place.node, want.spec.name): want.of(place) for want in wanted for place in outcomes[want.spec.name].placements}
    boxes = {
        node.id: BoxPlan(
            replicas=sorted(replicas[node.id], key=lambda replica: replica.name),
            routes=[
                _beside(route, want) if (node.id, want.spec.name) in shadowed else route
                for want in wanted
                if (route := _route(_routed(want, node.id, told), node, hosts[want.spec.name])) is not None
            ],
        )
        for node in ordered
    }
    return Plan(boxes, outcomes)


def shadow_of(spec: Deployment) -> str:
    """What the shadow of a deployment's change is called on a box."""
    return f"{spec.name}-shadow"


def _shadowed(want: Wanted, outcome: Outcome, boxes: Mapping[str, Node], free: dict[str, _Free]) -> Iterator[str]:
    """Boxes on which its shadow runs: where a unit that is to be compared runs, and there is room beside."""
    if want.model is None:
        return
    for node in sorted({place.node for place in outcome.placements if want.unit_of(place) in want.shadowing}):
        if not unfit(boxes[node], want.spec) and free[node].room_for(want.spec) >= 1:
            free[node].take(want.spec)
            yield node


def _beside(route: RouteSpec, want: Wanted) -> RouteSpec:
    """With how much the shadow is asked."""
    asked = want.spec.rollout.compared if want.spec.rollout else None
    return msgspec.structs.replace(route, shadow=asked.shadow) if asked else route


def _place(want: Wanted, nodes: Sequence[Node], free: dict[str, _Free], homes: Mapping[str, Mapping[str, str]]) -> Outcome:
    """Find places for one deployment; ``homes`` are, by replica, the boxes that run it now, each with the box in whose place it does."""
    before, admitted = want.before, want.admitted
    if before is None:
        return _place_all(want, nodes, _names(want), free, homes)
    if want.spec.replicas.count is not None:
        old = _place_all(before, nodes, [name for name in _names(before) if name not in admitted], free, homes)
        return _together(old, _place_all(want, nodes, [name for name in _names(want) if name in admitted], free, homes))
    kept, changed = ([node for node in nodes if (node.id in admitted) == is_in] for is_in in (False, True))
    old = _place_all(before, kept, [], free, homes) if kept else Outcome(0)
    return _together(old, _place_all(want, changed, [], free, homes) if changed else Outcome(0))


def _names(want: Wanted) -> list[str]:
    """Of the replicas of a deployment that counts them."""
    return [f"{want.spec.name}-{index}" for index in range(want.spec.replicas.count or 0)]


def _together(old: Outcome, new: Outcome) -> Outcome:
    """What became of the two halves of a deployment that changes."""
    placements = [*old.placements, *new.placements]
    used = {placement.node for placement in placements}
    reasons = {refusal.node: refusal.reason for outcome in (old, new) for refusal in outcome.refusals if refusal.node not in used}
    refusals = [Refusal(node, reason) for node, reason in sorted(reasons.items())]
    problems = [half.problem for half in (old, new) if half.problem and not (half.problem == NO_FIT and placements)]
    problem = "; ".join(dict.fromkeys(problems))
    return Outcome(old.wanted + new.wanted, placements, refusals, problem)


def _routed(want: Wanted, node: str, told: Mapping[tuple[str, str], Wanted]) -> Wanted:
    """By which of the two a box routes: by what it runs, and one that runs nothing of it by what was there before."""
    return told.get((node, want.spec.name)) or want.before or want


def _place_all(
    want: Wanted, nodes: Sequence[Node], names: Sequence[str], free: dict[str, _Free], homes: Mapping[str, Mapping[str, str]]
) -> Outcome:
    """On each of the boxes, or those of ``names`` where replicas are counted."""
    spec = want.spec
    asked = len(names)
    if want.model is None:
        problem = f"model {spec.model}:{spec.version} is not in the model store: push it with 'skerry model push'"
        return Outcome(wanted=asked, problem=problem)
    refusals = {node.id: reason for node in nodes if (reason := unfit(node, spec) or node.drained)}
    fitting = [node for node in nodes if node.id not in refusals]
    if spec.replicas.per_node is not None:
        asked = spec.replicas.per_node * len(fitting)
        placements = _place_on_each(spec, spec.replicas.per_node, fitting, free)
    else:
        leaving = [node for node in nodes if node.drained and not unfit(node, spec) and not _is_lost(node, spec)]
        placements = _place_count(spec, names, fitting, free, homes, leaving)
    used = {placement.node for placement in placements}
    for node in fitting:
        if free[node.id].room_for(spec) < 1 and (node.id not in used or spec.replicas.per_node is not None):
            short = sum(1 for p in placements if p.node == node.id) < (spec.replicas.per_node or 1)
            if short:
                refusals[node.id] = _no_room(free[node.id], spec)
        elif node.id not in used:
            refusals[node.id] = "not needed: there are enough replicas elsewhere"
    found = len({placement.replica for placement in placements}) if spec.replicas.count is not None else len(placements)
    problem = "" if found == asked else f"{asked - found} of {asked} replicas found no box with room"
    if not problem and (lost := _without_room(spec, placements)):
        problem = f"{lost} of {asked} replicas run on boxes that are lost, and no other box has room"
    return Outcome(asked, placements, [Refusal(node, reason) for node, reason in sorted(refusals.items())], problem if fitting else NO_FIT)


def _place_on_each(spec: Deployment, per_node: int, fitting: Sequence[Node], free: dict[str, _Free]) -> list[Placement]:
    placements = []
    for node in fitting:
        for index in range(min(per_node, free[node.id].room_for(spec))):
            free[node.id].take(spec)
            placements.append(Placement(node.id, f"{spec.name}-{index}", _why(node, spec), _is_lost(node, spec)))
    return placements


def _is_lost(node: Node, spec: Deployment) -> bool:
    return node.silent_ms >= spec.disconnect.lost_after_ms


def is_doubled(outcome: Outcome) -> bool:
    """Whether a replica runs on two boxes that are both there."""
    there = Counter(placement.replica for placement in outcome.placements if not placement.is_lost)
    return any(count > 1 for count in there.values())


def _without_room(spec: Deployment, placements: Iterable[Placement]) -> int:
    """How many replicas run on lost boxes alone although they are to be replaced."""
    if spec.replicas.count is None or not spec.disconnect.replace:
        return 0
    there = {placement.replica for placement in placements if not placement.is_lost}
    return len({placement.replica for placement in placements} - there)


def _place_count(
    spec: Deployment,
    names: Sequence[str],
    fitting: Sequence[Node],
    free: dict[str, _Free],
    homes: Mapping[str, Mapping[str, str]],
    leaving: Sequence[Node],
) -> list[Placement]:
    """Each replica where it ran before if it may, else on the box with the fewest of this deployment and the most room; one that has
    only lost homes is placed elsewhere too, where the deployment says so. One on a box that is drained (``leaving``) goes on there until
    it is ready elsewhere.

    Those that stay are placed first, so that none loses its room to one that has to move.
    """
    placed: dict[str, list[Placement]] = {name: [] for name in names}
    used: Counter[str] = Counter()

    def take(name: str, node: Node, why: str, replaces: str) -> None:
        free[node.id].take(spec)
        used[node.id] += 1
        placed[name].append(Placement(node.id, name, f"{_why(node, spec)}; {why}", _is_lost(node, spec), replaces))

    def has_room(node: Node) -> bool:
        return free[node.id].room_for(spec) >= 1

    for name in names:
        held = homes.get(name, {})
        for node, why in _staying(name, [n for n in fitting if n.id in held and has_room(n)], spec, held):
            if has_room(node):
                take(name, node, why, held[node.id])
    for name in names:
        lost = [placement for placement in placed[name] if placement.is_lost]
        if len(lost) < len(placed[name]) or (lost and not spec.disconnect.replace):
            continue
        candidates = [n for n in fitting if has_room(n) and (not lost or (n.online and not _is_lost(n, spec)))]
        if candidates:
            best = min(candidates, key=lambda n: (used[n.id], not n.online, -free[n.id].memory_bytes, n.id))
            why = f"in place of {lost[-1].node}, which is lost" if lost else "most room"
            take(name, best, why, lost[-1].node if lost else "")
    for name, node in filter(lambda found: has_room(found[1]), _going_on(placed, fitting, leaving, homes)):
        take(name, node, "drained, but not ready elsewhere yet", "")
    return [placement for name in names for placement in placed[name]]


def _going_on(
    placed: Mapping[str, list[Placement]], fitting: Sequence[Node], leaving: Sequence[Node], homes: Mapping[str, Mapping[str, str]]
) -> Iterator[tuple[str, Node]]:
    """Replicas that were found a place and are not ready there, each with a drained box that runs it."""
    ready = {(node.id, name) for node in fitting for name in node.ready}
    waiting = [name for name, places in placed.items() if places and not any((place.node, name) in ready for place in places)]
    return ((name, node) for node in leaving for name in waiting if node.id in homes.get(name, {}))


def _staying(name: str, boxes: Sequence[Node], spec: Deployment, held: Mapping[str, str]) -> list[tuple[Node, str]]:
    """Which of the boxes that run a replica go on with it, and why. A lost one does while none is known to do that comes before it: it
    may be running, and nobody could tell it to stop."""

    def rank(node: Node) -> tuple[int, str]:
        removes = _removes(node.id, held)
        return (removes if spec.disconnect.reconcile == "keep_original" else -removes, node.id)

    there = [node for node in boxes if not _is_lost(node, spec)]
    ready = [node for node in there if name in node.ready]
    kept = list(boxes)
    if len(there) > 1 and ready:
        best = min(ready, key=rank)
        kept = [node for node in boxes if node is best or (_is_lost(node, spec) and rank(node) < rank(best))]
    return [
        (node, "kept, since it may be running though the box is lost" if _is_lost(node, spec) else "ran there already") for node in kept
    ]


def _removes(node: str, held: Mapping[str, str]) -> int:
    """How many boxes a replica went through before it came to ``node``; 0 for where it ran at first."""
    steps = 0
    while held.get(node) and steps < len(held):
        steps, node = steps + 1, held[node]
    return steps


def _why(node: Node, spec: Deployment) -> str:
    labels = ", ".join(f"{key}={node.labels[key]}" for key in sorted(spec.labels) if key in node.labels)
    return f"tier {node.tier}" + (f", {labels}" if labels else "")


def _replica(want: Wanted, placement: Placement, old: ReplicaSpec | None, *, is_shadow: bool = False) -> ReplicaSpec:
    """The replica's specification: the old one for as long as nothing of its sandbox changes, so that nothing restarts for nothing.

    How it is to be updated counts once there is an update, and comes with it.
    """
    assert want.model is not None  # noqa: S101 - for the type checker
    spec = want.spec
    new = ReplicaSpec(
        name=placement.replica,
        deployment=spec.name,
        generation=want.generation,
        model=want.model,
        memory_bytes=spec.memory_bytes,
        cpus=spec.cpus,
        gpu_memory_bytes=spec.gpu_memory_bytes,
        isolation_at_least=least_rung(spec),
        update=spec.update,
        image=spec.image,
        server=spec.server,
        stop_after_ms=spec.disconnect.stop_on_box_after_ms,
        replaces=placement.replaces,
        is_shadow=is_shadow,
        attempt=old.attempt if old else 0,
    )
    if old is None:
        return new
    like = msgspec.structs.replace(old, stop_after_ms=new.stop_after_ms, replaces=new.replaces)
    return like if msgspec.structs.replace(like, generation=new.generation, update=new.update) == new else new


class _Hosts:
    """The boxes that run one deployment, as others look for them. Placement counts, not liveness: a box that comes and goes changes
    no other box's document, and whoever asks it finds out in time."""

    def __init__(self, boxes: Iterable[Node]) -> None:
        self.ids: set[str] = set()
        self._cloud: list[Upstream] = []
        self._rings: dict[str, list[tuple[bytes, Upstream]]] = {}
        for box in boxes:
            upstream = Upstream(box.id, box.gateway_url, box.tier)
            self.ids.add(box.id)
            if box.tier == "cloud":
                self._cloud.append(upstream)
            elif site := box.labels.get("site"):
                self._rings.setdefault(site, []).append((_point(box.id), upstream))
        for ring in self._rings.values():
            ring.sort(key=lambda entry: entry[0])

    def upstreams_for(self, node: Node) -> list[Upstream]:
        """The cloud, then MAX_PEERS neighbours at the most: those that follow on the site's ring, so that every host of a large site
        is some boxes' neighbour, and one that goes changes the documents of those alone."""
        ring = self._rings.get(node.labels.get("site", ""), [])
        start = bisect(ring, _point(node.id), key=lambda entry: entry[0])
        following = (ring[(start + step) % len(ring)][1] for step in range(min(len(ring), MAX_PEERS + 1)))
        peers = [upstream for upstream in following if upstream.node != node.id][:MAX_PEERS]
        return [*self._cloud, *sorted(peers, key=lambda upstream: upstream.node)]


def _point(node_id: str) -> bytes:
    """Where a box stands on its site's ring: anywhere, so that boxes with like names do not all have the same neighbours."""
    return blake2b(node_id.encode(), digest_size=8).digest()


def _route(want: Wanted, node: Node, hosts: _Hosts) -> RouteSpec | None:
    """How ``node`` serves a deployment, or None where it does not. A selected box without a replica passes requests on."""
    spec = want.spec
    if want.model is None or label_mismatch(node, spec.labels):
        return None
    upstreams = [] if node.tier == "cloud" or spec.split == "edge" else hosts.upstreams_for(node)
    if node.id not in hosts.ids and not upstreams:
        return None
    return RouteSpec(
        deployment=spec.name,
        model=spec.model,
        version=spec.version,
        deadline_ms=spec.deadline_ms,
        split=spec.split,
        upstreams=upstreams,
        batching=spec.batching,
        cloud_budget=spec.cloud_budget,
    )
