"""Plans anew whenever boxes, models or deployments changed, and tells the boxes whose part changed."""

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping

import msgspec
from sqlite_utils import Database as Tables

from coordinator.core import fit, foresight, planner, software
from coordinator.core.deployment import Deployment
from coordinator.core.foresight import Foreseen
from coordinator.core.liveness import Ear, counts_again_at_ms
from coordinator.news import News
from coordinator.publish import Publisher
from coordinator.registry import deployments, events, identity, models, nodes, releases, rollouts
from coordinator.registry.database import Database, RegistryFailed
from coordinator.registry.deployments import Stored
from coordinator.session import NotConnected
from coordinator.signer.client import Signer, SignerAbsent
from skerry.runtime import lifecycle, log
from skerry.wire import codec, model_signature
from skerry.wire.bundle import Bundle
from skerry.wire.identity import SITE
from skerry.wire.messages import Addresses, Desired, ReplicaSpec, Software, SoftwareReport

logger = log.get("coordinator.plan")

GATHER_S = 0.02
"""Changes that come together are planned together."""
REST = 4.0
REST_MOST_S = 5.0
"""A plan is followed by a rest of so many times as long as it took: where a whole fleet says something at once, planning leaves the
machine to those who ask and to what else is said, and a small fleet's plan is as quick as ever."""
AGAIN_S = 60.0
DOUBLED_AGAIN_MS = 2_000
"""While a replica runs on two boxes of which one is to go."""
SOONEST_AGAIN_S = 1.0
"""Where silence is counted: until everybody could be heard after a connect, it does not go on."""
UNSIGNED_AGAIN_S = 2.0
"""While the signer is away."""
ENVELOPE_BYTES = 512
"""What signing adds to a document."""


def node_of(stored: nodes.Node, enrolment: identity.Enrolment | None, ear: Ear, drained: nodes.Drained | None = None) -> fit.Node | None:
    """A box as the planner sees it; None for one that has not said what it is, and for one that was thrown out.

    The tier and labels that it was enrolled with stand above those that it says.
    """
    if stored.birth is None or (enrolment is not None and enrolment.revoked_at_ms):
        return None
    birth = stored.birth
    return fit.Node(
        id=stored.id,
        tier=enrolment.tier if enrolment else birth.tier,
        labels=birth.labels | (enrolment.labels if enrolment else {}),
        gateway_url=birth.gateway_url,
        online=stored.online,
        memory_bytes=birth.memory_bytes,
        gpu_memory_bytes=sum(gpu.memory_mib for gpu in birth.gpus) * 2**20,
        rungs=birth.rungs,
        rungs_absent=birth.rungs_absent,
        silent_ms=stored.contact.silent_ms(ear.heard_until_ms),
        ready=frozenset(replica.name for replica in (stored.reported.replicas if stored.reported else []) if replica.phase == "ready"),
        drained=drained.text if drained else "",
    )


def _boxes(
    stored_nodes: list[nodes.Node], enrolled: Mapping[str, identity.Enrolment], ear: Ear, drained: Mapping[str, nodes.Drained]
) -> list[fit.Node]:
    seen = (node_of(stored, enrolled.get(stored.id), ear, drained.get(stored.id)) for stored in stored_nodes)
    return [box for box in seen if box is not None]


class Terms(msgspec.Struct, frozen=True):
    """Under which documents are made: how long they may be taken, and which signing keys are the fleet's no more; None while the signer
    has not said. And how long a box must be silent to be called lost, and where boxes are told to find us."""

    lifetime_ms: int
    retired_keys: list[str] | None
    lost_after_ms: int = 60_000
    addresses: Addresses = Addresses()


def is_stale(document: Desired | None, terms: Terms, *, enrolled_at_ms: int, now_ms: int) -> bool:
    """Whether a box must be told the same anew: it would soon be too old for one that comes back without a disk, it was issued before
    the box was enrolled, or other keys are retired. Spread over the fleet: between a half and two thirds of its life."""
    if document is None:
        return True
    jitter = int.from_bytes(hashlib.sha256(document.node.encode()).digest()[:4], "big") / 2**32
    half_ms = terms.lifetime_ms * (0.5 - jitter / 6)
    is_old = not document.expires_at_ms or document.expires_at_ms - now_ms < half_ms
    is_long = document.expires_at_ms - document.issued_at_ms > terms.lifetime_ms
    is_other = terms.retired_keys is not None and document.retired_keys != terms.retired_keys
    return is_old or is_long or is_other or document.issued_at_ms < enrolled_at_ms


class Replanned(msgspec.Struct, frozen=True):
    """The documents that changed, and when the plan may be another although nothing happened (Unix milliseconds)."""

    changed: list[Desired]
    again_at_ms: int | None = None


def replan(tables: Tables, *, fleet: str, now_ms: int, terms: Terms, listening_since_ms: int = 0) -> Replanned:
    """Plan and keep the plan. ``listening_since_ms`` is when the coordinator last connected to the broker; 0 while it is not connected."""
    enrolled, thrown_out = identity.read_enrolled(tables), identity.read_thrown_out(tables)
    ear = nodes.read_ear(tables).after(listening_since_ms=listening_since_ms, now_ms=now_ms)
    nodes.save_ear(tables, ear)
    stored_nodes = nodes.read_nodes(tables)
    _note_lost(tables, stored_nodes, ear, terms.lost_after_ms, now_ms)
    boxes = _boxes(stored_nodes, enrolled, ear, nodes.read_drained(tables))
    sites = {box.id: box.labels.get(SITE, "") for box in boxes if box.tier == "edge"}  # the cloud hears of all who were thrown out
    stored_models = {(model.ref.name, model.ref.version): model for model in models.read_models(tables)}
    spreading = {held.deployment: held for held in rollouts.read_active(tables)}
    wanted = [_wanted(stored, spreading.get(stored.name), stored_models) for stored in deployments.read_deployments(tables)]
    before = nodes.read_desired(tables)
    plan = planner.plan(boxes, wanted, {node: planner.BoxPlan(doc.replicas, doc.routes) for node, doc in before.items()})
    changed = []
    untold = {
        node.id: f"{node.id} can't be told: it holds generation {held}, and this coordinator knows no such: see 'skerry recover'"
        for node in stored_nodes
        if (held := nodes.ahead(node, before.get(node.id)))
    }
    own, restarts = _software(tables, stored_nodes, before), nodes.take_restarts(tables)
    for node, planned in plan.boxes.items():
        if node in untold:
            continue
        part = _anew(planned, restarts.get(node, set()))
        old, release = before.get(node), own.get(node)
        revoked = sorted(name for name, site in thrown_out.items() if sites.get(node) in (None, site))
        signatures = _signatures_of(part.replicas, stored_models)
        now = (part.replicas, part.routes, revoked, signatures)
        enrolled_at_ms = enrolled[node].enrolled_at_ms if node in enrolled else 0
        is_told = old is not None and (old.replicas, old.routes, old.revoked, old.signatures) == now
        is_told = is_told and old is not None and (old.addresses, old.software) == (terms.addresses, release)
        if is_told and not is_stale(old, terms, enrolled_at_ms=enrolled_at_ms, now_ms=now_ms):
            continue
        if old is None and not part.replicas and not part.routes and release is None:
            continue
        generation = (old.generation if old else 0) + 1
        issued_at_ms = max(now_ms, enrolled_at_ms, old.issued_at_ms + 1 if old else 0)  # boxes take it for proof of the time
        expires_at_ms = issued_at_ms + terms.lifetime_ms
        retired = terms.retired_keys if terms.retired_keys is not None else old.retired_keys if old else []
        document = Desired(
            fleet, node, generation, issued_at_ms, *now, expires_at_ms=expires_at_ms, retired_keys=retired, addresses=terms.addresses,
            software=release,
        )  # fmt: skip
        size = len(codec.encode(document)) + ENVELOPE_BYTES
        if size > codec.MAX_MESSAGE_BYTES:
            untold[node] = f"{node} can't be told: its document would have {size} bytes, at most {codec.MAX_MESSAGE_BYTES} are sent"
            continue
        nodes.save_desired(tables, document)
        changed.append(document)
    outcomes = {name: _with_untold(outcome, untold) for name, outcome in plan.outcomes.items()}
    if outcomes != deployments.read_outcomes(tables):
        deployments.save_outcomes(tables, outcomes)
    _note_planned(tables, spreading.values())
    _note_moves(tables, {node: part for node, part in plan.boxes.items() if node not in untold}, before, now_ms)
    limits = {terms.lost_after_ms, *(want.spec.disconnect.lost_after_ms for want in wanted)}
    times = _silence_changes_at_ms(stored_nodes, ear, limits, listening_since_ms, now_ms)
    if any(planner.is_doubled(outcome) for outcome in plan.outcomes.values()):
        times.append(now_ms + DOUBLED_AGAIN_MS)
    return Replanned(changed, min(times, default=None))


def _anew(part: planner.BoxPlan, names: set[str]) -> planner.BoxPlan:
    """With these replicas started once more."""
    if not names:
        return part
    replicas = [msgspec.structs.replace(one, attempt=one.attempt + 1) if one.name in names else one for one in part.replicas]
    return msgspec.structs.replace(part, replicas=replicas)


def _wanted(stored: Stored, held: rollouts.Rollout | None, known: Mapping[tuple[str, int], models.Model]) -> planner.Wanted:
    """A deployment, and while a change of it spreads, what it was before and who has the change."""

    def of(spec: Deployment, generation: int) -> planner.Wanted:
        model = known.get((spec.model, spec.version))
        return planner.Wanted(spec, generation, model.ref if model else None)

    now = of(stored.spec, stored.generation)
    if held is None or held.after.generation != stored.generation:
        return now
    return msgspec.structs.replace(
        now, before=of(held.before.spec, held.before.generation), admitted=held.state.admitted, shadowing=held.state.shadowing
    )


def foresee(tables: Tables, spec: Deployment) -> Foreseen:
    """What a deployment would change, once it is everywhere."""
    enrolled, ear = identity.read_enrolled(tables), nodes.read_ear(tables)
    boxes = _boxes(nodes.read_nodes(tables), enrolled, ear, nodes.read_drained(tables))
    known = {(model.ref.name, model.ref.version): model for model in models.read_models(tables)}
    spreading = {held.deployment: held for held in rollouts.read_active(tables)}
    held = deployments.read_deployments(tables)
    wanted = [_wanted(stored, spreading.get(stored.name), known) for stored in held]
    generation = max((stored.generation for stored in held if stored.name == spec.name), default=0) + 1
    model = known.get((spec.model, spec.version))
    told = {node: planner.BoxPlan(doc.replicas, doc.routes) for node, doc in nodes.read_desired(tables).items()}
    return foresight.foresee(boxes, wanted, planner.Wanted(spec, generation, model.ref if model else None), told)


def _software(tables: Tables, stored_nodes: list[nodes.Node], before: Mapping[str, Desired]) -> dict[str, Software | None]:
    """By box, the release of its own programs that it is to run; boxes are told of the waves of now from here on."""
    spread = releases.read_spread(tables)
    if spread is None:
        return {}
    builds, found = releases.by_build(tables), {}
    for node in stored_nodes:
        if node.birth is not None:
            said = node.reported.software if node.reported else SoftwareReport()
            held = before[node.id].software if node.id in before else None
            found[node.id] = software.wanted(node.id, node.birth, said, held, spread, builds)
    if spread.planned != len(spread.state.waves):
        releases.save_spread(tables, msgspec.structs.replace(spread, planned=len(spread.state.waves)))
    return found


def _note_planned(tables: Tables, spreading: Iterable[rollouts.Rollout]) -> None:
    """Boxes are told of these waves from now on."""
    for held in spreading:
        if held.planned != held.state.stage:
            rollouts.save_rollout(tables, msgspec.structs.replace(held, planned=held.state.stage))


def _silence_changes_at_ms(
    stored_nodes: list[nodes.Node], ear: Ear, limits: Collection[int], listening_since_ms: int, now_ms: int
) -> list[int]:
    """When a box will be lost, or back, if nothing happens; while silence is not counted, when it is again."""
    counts_at_ms = counts_again_at_ms(listening_since_ms=listening_since_ms, now_ms=now_ms)
    if counts_at_ms == now_ms:
        times = (stored.contact.next_change_ms(ear.heard_until_ms, limits) for stored in stored_nodes)
        return [at_ms for at_ms in times if at_ms is not None]
    return [counts_at_ms] if counts_at_ms is not None and any(stored.silent_since_ms for stored in stored_nodes) else []


def _note_lost(tables: Tables, stored_nodes: list[nodes.Node], ear: Ear, lost_after_ms: int, now_ms: int) -> None:
    """Write down which boxes are lost from now on, and which are back."""
    for stored in stored_nodes:
        silent_ms = stored.contact.silent_ms(ear.heard_until_ms)
        is_lost = silent_ms >= lost_after_ms
        if is_lost == stored.is_lost:
            continue
        nodes.save_lost(tables, stored.id, is_lost=is_lost)
        kind = "node.lost" if is_lost else "node.back"
        text = f"silent for {silent_ms // 1000} s" if is_lost else "heard steadily again"
        events.add_own_event(tables, stored.id, kind, stored.id, text, now_ms)


def _note_moves(tables: Tables, boxes: Mapping[str, planner.BoxPlan], before: Mapping[str, Desired], now_ms: int) -> None:
    """Write down what runs elsewhere from now on, in place of a lost box's, and what does no more."""
    for node, part in boxes.items():
        old = {replica.name: replica for replica in before[node].replicas} if node in before else {}
        new = {replica.name: replica for replica in part.replicas}
        for name in new.keys() - old.keys():
            if new[name].replaces:
                events.add_own_event(tables, node, "replica.replaces", name, f"in place of {new[name].replaces}, which is lost", now_ms)
        for name in old.keys() - new.keys():
            elsewhere = sorted(other for other, box in boxes.items() if any(replica.name == name for replica in box.replicas))
            if elsewhere:
                events.add_own_event(tables, node, "replica.moved", name, f"it runs on {elsewhere[0]}, and here no more", now_ms)


def _signatures_of(replicas: list[ReplicaSpec], stored: Mapping[tuple[str, int], models.Model]) -> dict[str, Bundle]:
    """Who vouches for what a box is to run."""
    wanted = sorted({(spec.model.name, spec.model.version) for spec in replicas})
    found = ((key, stored[key].signature) for key in wanted if key in stored)
    return {model_signature.key_of(name, version): signature for (name, version), signature in found if signature is not None}


def _with_untold(outcome: planner.Outcome, untold: Mapping[str, str]) -> planner.Outcome:
    """The outcome, with a word on boxes that can't be told of it: what they run fits into no message, or they hold newer documents."""
    stuck = sorted({placement.node for placement in outcome.placements} & set(untold))
    if not stuck:
        return outcome
    return msgspec.structs.replace(outcome, problem="; ".join(filter(None, [outcome.problem, untold[stuck[0]]])))


class PlanLoop:
    """``wake`` asks for a plan."""

    def __init__(
        self,
        database: Database,
        publisher: Publisher,
        news: News,
        signer: Signer,
        *,
        fleet: str,
        terms: Terms,
        listening_since_ms: Callable[[], int],
    ) -> None:
        self._database = database
        self._publisher = publisher
        self._news = news
        self._signer = signer
        self._fleet = fleet
        self._terms = terms
        self._listening_since_ms = listening_since_ms
        self._again_at_ms: int | None = None
        self._rested_at_s = 0.0
        self.pulse = lifecycle.Pulse()
        self._wake = asyncio.Event()
        self._wake.set()

    def wake(self) -> None:
        """Plan soon."""
        self._wake.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Plan until ``stop`` is set."""
        while not stop.is_set():
            self.pulse.beat()
            await lifecycle.first_of(self._wake, stop, within_s=self._pause_s())
            if await lifecycle.sleep_until(stop, max(GATHER_S, self._rested_at_s - time.monotonic())):
                return
            self._wake.clear()
            await self._plan()

    def _pause_s(self) -> float:
        if self._publisher.unsigned:
            return UNSIGNED_AGAIN_S
        if self._again_at_ms is None:
            return AGAIN_S
        return min(AGAIN_S, max(SOONEST_AGAIN_S, (self._again_at_ms - time.time_ns() // 1_000_000) / 1000))

    async def _plan(self) -> None:
        started = time.perf_counter()
        try:
            with contextlib.suppress(SignerAbsent):  # what was known last holds
                self._terms = msgspec.structs.replace(self._terms, retired_keys=(await self._signer.keys()).retired)
            now_ms, terms = time.time_ns() // 1_000_000, self._terms
            since_ms, began_s = self._listening_since_ms(), time.monotonic()
            planned = await self._database.write(
                lambda tables: replan(tables, fleet=self._fleet, now_ms=now_ms, terms=terms, listening_since_ms=since_ms)
            )
            planned_s = time.monotonic()
            self._rested_at_s = planned_s + min(REST_MOST_S, REST * (planned_s - began_s))
        except (RegistryFailed, msgspec.DecodeError, codec.Malformed) as exc:
            logger.error("plan.failed", reason=str(exc))
            return
        with contextlib.suppress(NotConnected):  # all are told again after the next connect
            await self._publisher.publish_unsigned()
        changed, self._again_at_ms = planned.changed, planned.again_at_ms
        for document in changed:
            try:
                await self._publisher.publish(document)
            except NotConnected:
                logger.warning("desired.waits", node=document.node, generation=document.generation)
        if changed:
            took_ms = round((time.perf_counter() - started) * 1000, 1)
            logger.info("planned", boxes=[document.node for document in changed][:20], changed=len(changed), took_ms=took_ms)
        self._news.tell("deployments", "nodes")
