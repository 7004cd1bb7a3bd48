"""What the API and the console show, put together from the registry and from what is only true now."""

import time
from collections.abc import Iterable, Mapping

import msgspec
from sqlite_utils import Database as Tables

from coordinator import versions
from coordinator.core.deployment import Deployment
from coordinator.core.difference import difference
from coordinator.core.outlook import outlook
from coordinator.core.planner import Outcome, Placement
from coordinator.core.search import Search
from coordinator.live import Live, serve_view
from coordinator.news import News
from coordinator.recent import Recent
from coordinator.registry import deployments, events, finding, glance, identity, measurements, models, nodes
from coordinator.registry.database import Database
from coordinator.registry.deployments import Stored
from coordinator.registry.nodes import Drained, Node
from coordinator.vouching import Vouching
from skerry.wire import latency
from skerry.wire.api import (
    DeploymentView,
    EventView,
    LoadPoint,
    LoadView,
    ModelView,
    NodeState,
    NodeView,
    Outlook,
    PlacementView,
    RefusalView,
    ServeView,
    SplitPoint,
    SplitView,
    Stream,
)
from skerry.wire.fleet import Difference, VersionView
from skerry.wire.messages import Desired, ReplicaReport, ReplicaSpec, SoftwareReport


class Found(msgspec.Struct, frozen=True):
    """A page of boxes; ``last`` is where the next one begins, empty where there is none."""

    nodes: list[NodeView]
    last: str


class Cut(msgspec.Struct, frozen=True):
    """A deployment with some of its placements and refusals, and how many there are of each."""

    view: DeploymentView
    placements: int
    refusals: int


class Views:
    """Reads; changes nothing."""

    def __init__(self, database: Database, live: Live, vouching: Vouching, news: News, *, rollup_s: int) -> None:
        self._recent = Recent(news)
        self._database = database
        self._live = live
        self._vouching = vouching
        self._rollup_s = rollup_s

    async def nodes(self) -> list[NodeView]:
        """Every box, by name."""
        return await self._database.read(lambda tables: self._nodes(tables, None))

    async def some(self, names: Iterable[str]) -> list[NodeView]:
        """These boxes, by name; one that is not known is not there."""
        wanted = sorted(names)
        return await self._database.read(lambda tables: self._nodes(tables, wanted))

    async def found(self, search: Search, *, after: str, limit: int | None) -> Found:
        """A page of the boxes that are looked for: those behind ``after``."""

        def work(tables: Tables) -> Found:
            names = finding.find(tables, search, after=after, limit=None if limit is None else limit + 1)
            is_more = limit is not None and len(names) > limit
            shown = names[:limit]
            return Found(self._nodes(tables, shown), shown[-1] if is_more and shown else "")

        return await self._database.read(work)

    async def found_in_all(self, search: Search) -> tuple[int, dict[NodeState, int]]:
        """How many boxes are found by it, and how many of the whole fleet are in each state."""
        return await self._database.read(lambda tables: (finding.count(tables, search), finding.count_by_state(tables)))

    def _nodes(self, tables: Tables, names: list[str] | None) -> list[NodeView]:
        """These boxes, or all; nothing is read of others."""
        desired = nodes.read_desired(tables) if names is None else nodes.read_desired_of_some(tables, names)
        streams: dict[str, list[events.Account]] = {}
        for account in events.read_accounts(tables) if names is None else events.read_accounts_of_some(tables, names):
            streams.setdefault(account.node, []).append(account)
        enrolled = identity.read_enrolled(tables) if names is None else identity.read_some(tables, names)
        specs = {stored.name: stored.spec for stored in deployments.read_deployments(tables)}
        drained = nodes.read_drained(tables)
        return [
            self._node(
                node, told := desired.get(node.id), streams.get(node.id, []), enrolled.get(node.id), _outlook(node, told, specs),
                drained.get(node.id),
            )
            for node in (nodes.read_nodes(tables) if names is None else nodes.read_some(tables, names))
        ]  # fmt: skip

    async def node(self, name: str) -> NodeView | None:
        """One box."""

        def work(tables: Tables) -> NodeView | None:
            node = nodes.read_node(tables, name)
            if node is None:
                return None
            told, enrolment = nodes.read_desired_of(tables, name), identity.read_one(tables, name)
            wanted = {replica.deployment for replica in told.replicas} if told else set()
            specs = {stored.name: stored.spec for stored in deployments.read_deployments(tables) if stored.name in wanted}
            drained = nodes.read_drained_one(tables, name)
            return self._node(node, told, events.read_accounts(tables, name), enrolment, _outlook(node, told, specs), drained)

        return await self._database.read(work)

    def _node(
        self,
        node: Node,
        desired: Desired | None,
        streams: list[events.Account],
        enrolment: identity.Enrolment | None,
        coming: list[Outlook],
        drained: Drained | None,
    ) -> NodeView:
        birth, reported = node.birth, node.reported
        is_out = _is_out(enrolment)
        sample = self._live.samples.get(node.id)
        return NodeView(
            id=node.id,
            state="revoked" if is_out else _state(node),
            silent_since_ms=0 if node.online else node.silent_since_ms,
            outlook=coming,
            is_ahead=bool(nodes.ahead(node, desired)),
            drained_at_ms=drained.at_ms if drained else 0,
            software=reported.software if reported else SoftwareReport(),
            drain_reason=drained.reason if drained else "",
            tier=enrolment.tier if enrolment else birth.tier if birth else None,
            labels=(birth.labels if birth else {}) | (enrolment.labels if enrolment else {}),
            is_enrolled=enrolment is not None and not is_out,
            bound=sorted(enrolment.labels) if enrolment else [],
            gateway_url=birth.gateway_url if birth else "",
            changed_at_ms=node.changed_at_ms,
            heard_at_ms=self._live.heard_at_ms.get(node.id, 0),
            version=birth.version if birth else "",
            cpus=birth.cpus if birth else 0,
            memory_bytes=birth.memory_bytes if birth else 0,
            gpus=birth.gpus if birth else [],
            rungs=birth.rungs if birth else [],
            rungs_absent=birth.rungs_absent if birth else {},
            generation=desired.generation if desired else 0,
            reported_generation=reported.generation if reported else 0,
            refused=reported.refused if reported else "",
            replicas=reported.replicas if reported else [],
            cpu_ratio=sample.cpu_ratio if sample else 0.0,
            memory_used_bytes=sample.memory_used_bytes if sample else 0,
            gpu_samples=sample.gpus if sample else [],
            outbox_events=sample.outbox_events if sample else 0,
            outbox_samples=sample.outbox_samples if sample else 0,
            streams=[Stream(a.stream, a.epoch, a.numbering.high, a.numbering.missing, a.numbering.lost, a.dropped) for a in streams],
        )

    async def difference(self, name: str) -> Difference | None:
        """What a box should be against what it says that it is."""

        def work(tables: Tables) -> Difference | None:
            node = nodes.read_node(tables, name)
            return None if node is None else difference(nodes.read_desired_of(tables, name), node.birth, node.reported)

        return await self._database.read(work)

    async def deployments(self) -> list[DeploymentView]:
        """Every deployment, oldest first."""

        def work(tables: Tables) -> list[DeploymentView]:
            outcomes = deployments.read_outcomes(tables)
            desired = nodes.read_desired(tables)
            reports = _reports_of(nodes.read_nodes(tables))
            return [
                self._deployment(stored, outcomes.get(stored.name), desired, reports) for stored in deployments.read_deployments(tables)
            ]

        views = await self._database.read(work)
        return [msgspec.structs.replace(view, serve=self._live.serve(view.name)) for view in views]

    async def deployment(self, name: str) -> DeploymentView | None:
        """One deployment."""
        cut = await self._cut(name, most=None)
        return None if cut is None else msgspec.structs.replace(cut.view, serve=self._live.serve(name))

    async def deployment_cut(self, name: str, *, most: int, ready: int) -> Cut | None:
        """One deployment with so many of its placements and refusals, those first that are not as they should be; the sums are of all.
        ``ready`` is how many replicas are, where that is too dear to be counted here. Made once for all who look."""
        cut = await self._recent.get(("cut", name, most), lambda: self._cut(name, most=most))
        if cut is None:
            return None
        counted = ready if max(cut.placements, cut.refusals) > most else cut.view.ready
        return msgspec.structs.replace(cut, view=msgspec.structs.replace(cut.view, ready=counted, serve=self._live.serve(name)))

    async def versions(self, name: str) -> list[VersionView]:
        """How a deployment's present version serves, and the one before it; made once for all who look."""
        return await self._recent.get(("versions", name), lambda: self._database.read(lambda tables: versions.read(tables, name)))

    async def most_asked(self, name: str, *, minutes: int, limit: int) -> tuple[list[str], int]:
        """The boxes that had the most requests for a deployment, and how many had any; made once for all who look."""
        since_s = int(time.time()) - minutes * 60
        return await self._recent.get(
            ("asked", name, minutes, limit),
            lambda: self._database.read(lambda tables: measurements.read_most_asked(tables, name, since_s=since_s, limit=limit)),
        )

    async def _cut(self, name: str, *, most: int | None) -> Cut | None:
        def work(tables: Tables) -> Cut | None:
            stored = deployments.read_deployment(tables, name)
            if stored is None:
                return None
            outcome = deployments.read_outcome(tables, name)
            placed, refused = (len(outcome.placements), len(outcome.refusals)) if outcome else (0, 0)
            if outcome is not None and most is not None and max(placed, refused) > most:
                worst = glance.read_worst(tables, name, most=most)
                shown = [one for one in outcome.placements if (one.node, one.replica) in worst]
                outcome = msgspec.structs.replace(outcome, placements=shown, refusals=outcome.refusals[:most])
            used = {one.node for one in (outcome.placements if outcome else [])}
            view = self._deployment(stored, outcome, nodes.read_desired_of_some(tables, used), _reports_of(nodes.read_some(tables, used)))
            return Cut(view, placed, refused)

        return await self._database.read(work)

    def _deployment(
        self,
        stored: Stored,
        outcome: Outcome | None,
        desired: dict[str, Desired],
        reports: dict[tuple[str, str], ReplicaReport],
    ) -> DeploymentView:
        spec = stored.spec
        specs = {(node, replica.name): replica for node, document in desired.items() for replica in document.replicas}
        placements = [
            _placement(p, specs.get((p.node, p.replica)), reports.get((p.node, p.replica))) for p in (outcome.placements if outcome else [])
        ]
        return DeploymentView(
            name=stored.name,
            generation=stored.generation,
            model=f"{spec.model}:{spec.version}",
            ready=len(
                {
                    (placement.replica, placement.node if spec.replicas.count is None else "")
                    for placement in placements
                    if placement.phase == "ready" and placement.is_current and not placement.is_lost
                }
            ),
            wanted=outcome.wanted if outcome else 0,
            placements=placements,
            refusals=[RefusalView(refusal.node, refusal.reason) for refusal in (outcome.refusals if outcome else [])],
            problem=outcome.problem if outcome else "not planned yet",
            deadline_ms=spec.deadline_ms,
            target=spec.target,
            split=spec.split,
            text=stored.text,
            created_at_ms=stored.created_at_ms,
            changed_at_ms=stored.changed_at_ms,
            serve=ServeView(window_s=0.0),
            batching=spec.batching,
            cloud_budget=spec.cloud_budget,
        )

    def serve(self, deployment: str) -> ServeView:
        """A deployment's last seconds."""
        return self._live.serve(deployment)

    async def models(self) -> list[ModelView]:
        """Every model version."""

        def work(tables: Tables) -> list[ModelView]:
            used: dict[tuple[str, int], list[str]] = {}
            for stored in deployments.read_deployments(tables):
                used.setdefault((stored.spec.model, stored.spec.version), []).append(stored.name)
            return [
                ModelView(
                    name=m.ref.name,
                    version=m.ref.version,
                    sha256=m.ref.sha256,
                    size_bytes=m.ref.size_bytes,
                    pushed_at_ms=m.pushed_at_ms,
                    used_by=used.get((m.ref.name, m.ref.version), []),
                    state=m.ref.state,
                    signature=self._vouching.state(m),
                )
                for m in models.read_models(tables)
            ]

        return await self._database.read(work)

    async def events(
        self, *, node: str = "", subject: str = "", kind: str = "", except_kind: str = "", after: int = 0, limit: int = 200
    ) -> list[EventView]:
        """The newest events, newest first."""
        rows = await self._database.read(
            lambda tables: events.read_events(
                tables, node=node, subject=subject, kind=kind, except_kind=except_kind, after=after, limit=limit
            )
        )
        return [EventView(row.id, row.node, row.at_ms, row.kind, row.subject, row.text) for row in rows]

    async def split(self, *, minutes: int, deployment: str = "", node: str = "") -> SplitView:
        """Who answered over time, over all boxes or on one, summed over deployments where none is named."""
        since_s = int(time.time()) - minutes * 60
        served = await self._database.read(
            lambda tables: measurements.read_served(tables, since_s=since_s, deployment=deployment, node=node)
        )
        buckets: dict[int, measurements.Served] = {}
        for one in served:
            held = buckets.get(one.at_s)
            buckets[one.at_s] = one if held is None else measurements.plus(held, one)
        return SplitView(
            self._rollup_s,
            [
                SplitPoint(
                    b.at_s, b.edge, b.peer, b.cloud, b.refused, b.failed, b.late,
                    latency.quantile_ms(b.latency, 0.5), latency.quantile_ms(b.latency, 0.99),
                )
                for _, b in sorted(buckets.items())
            ],
        )  # fmt: skip

    async def serve_of(self, node: str, *, window_s: int) -> ServeView:
        """What one box answered within the last ``window_s``, over all deployments, in whole buckets."""
        since_s = int(time.time()) - window_s
        served = await self._database.read(lambda tables: measurements.read_served(tables, since_s=since_s, node=node))
        return serve_view(measurements.total(served), window_s)

    async def load(self, node: str, *, minutes: int) -> LoadView:
        """One box's load over time."""
        since_s = int(time.time()) - minutes * 60
        loads = await self._database.read(lambda tables: measurements.read_loads(tables, node, since_s=since_s))
        return LoadView(self._rollup_s, [_load_point(b) for b in loads])


def _load_point(load: measurements.BoxLoad) -> LoadPoint:
    return LoadPoint(**{name: getattr(load, name) for name in LoadPoint.__struct_fields__})


def _is_out(enrolment: identity.Enrolment | None) -> bool:
    """Whether it was thrown out."""
    return enrolment is not None and enrolment.revoked_at_ms > 0


def _reports_of(found: Iterable[Node]) -> dict[tuple[str, str], ReplicaReport]:
    """By box and name."""
    return {(node.id, replica.name): replica for node in found for replica in (node.reported.replicas if node.reported else [])}


def _state(node: Node) -> NodeState:
    if node.online:
        return "online"
    if node.birth is None:
        return "new"
    return "offline" if node.said_goodbye else "lost" if node.is_lost else "unknown"


def _outlook(node: Node, desired: Desired | None, specs: Mapping[str, Deployment]) -> list[Outlook]:
    if node.online or desired is None or not node.silent_since_ms:
        return []
    runs: dict[str, list[str]] = {}
    for replica in desired.replicas:
        runs.setdefault(replica.deployment, []).append(replica.name)
    known = [(specs[name], names) for name, names in runs.items() if name in specs]
    return [Outlook(step.at_ms, step.deployment, step.text) for step in outlook(node.silent_since_ms, known)]


def _placement(placed: Placement, spec: ReplicaSpec | None, report: ReplicaReport | None) -> PlacementView:
    is_current = spec is not None and report is not None and report.is_of(spec)
    if report is None:
        return PlacementView(
            placed.node, placed.replica, placed.reason, "pending", is_current=False, status="the box has not reported it yet",
            is_lost=placed.is_lost, replaces=placed.replaces,
        )  # fmt: skip
    return PlacementView(
        node=placed.node,
        replica=placed.replica,
        reason=placed.reason,
        is_lost=placed.is_lost,
        replaces=placed.replaces,
        phase=report.state,
        is_current=is_current,
        status=report.reason,
        driver=report.driver,
        rung=report.rung,
        provider=report.provider,
        restarts=report.restarts,
    )
