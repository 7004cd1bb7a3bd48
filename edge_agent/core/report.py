"""What a box says of its replicas, and what its gateway may route to. Pure."""

from collections.abc import Iterable, Mapping

import msgspec

from skerry.wire.box import LocalReplica, Route, RouteTable
from skerry.wire.messages import Desired, ModelRef, Phase, ReplicaReport, ReplicaSpec, Reported, RouteSpec, Rung
from skerry.wire.proof import Proof


class ReplicaStatus(msgspec.Struct, frozen=True):
    """One replica as the warden knows it; ``socket`` is empty until a worker answers there."""

    spec: ReplicaSpec
    phase: Phase
    reason: str = ""
    driver: str = ""
    rung: Rung | None = None
    provider: str = ""
    socket: str = ""
    restarts: int = 0
    sandbox: str = ""
    limits: str = ""
    is_crash_loop: bool = False
    is_warm: bool = False


class Withheld(msgspec.Struct, frozen=True):
    """By replica, why its model may not run here, and why it is stopped for want of a link."""

    unvouched: Mapping[str, str] = {}
    stopped: Mapping[str, str] = {}


def report_of(
    desired: Desired | None, known: Mapping[str, ReplicaStatus], waiting: Mapping[str, str], withheld: Withheld, refused: str
) -> Reported:
    """The reported document. ``waiting`` says, by digest, why a wanted model's bytes are not here yet.

    A wanted replica that nothing is known of is fetching, pending where it is stopped, or failed where it may not run; one that is no
    longer wanted is reported until it is gone, and one whose next version may not run says so.
    """
    reports = {name: _report_of(status) for name, status in known.items()}
    for spec in desired.replicas if desired else []:
        refusal, stop = withheld.unvouched.get(spec.name, ""), withheld.stopped.get(spec.name, "")
        if stop:
            held = reports.get(spec.name) or ReplicaReport(spec.name, spec.deployment, spec.generation, "pending")
            reports[spec.name] = msgspec.structs.replace(held, reason=stop)
        elif spec.name not in reports:
            reason = refusal or waiting.get(spec.model.sha256, "")
            reports[spec.name] = ReplicaReport(spec.name, spec.deployment, spec.generation, "failed" if refusal else "fetching", reason)
        elif refusal:
            reports[spec.name] = msgspec.structs.replace(reports[spec.name], reason=f"its next version may not run: {refusal}")
    return Reported(
        generation=desired.generation if desired else 0,
        replicas=[reports[name] for name in sorted(reports)],
        refused=refused,
    )


def _report_of(status: ReplicaStatus) -> ReplicaReport:
    return ReplicaReport(
        name=status.spec.name,
        deployment=status.spec.deployment,
        generation=status.spec.generation,
        phase=status.phase,
        reason=status.reason,
        sha256=status.spec.model.sha256,
        provider=status.provider,
        driver=status.driver,
        rung=status.rung,
        restarts=status.restarts,
        sandbox=status.sandbox,
        limits=status.limits,
        is_crash_loop=status.is_crash_loop,
        is_warm=status.is_warm,
    )


def _serving(route: RouteSpec, ready: Iterable[ReplicaStatus]) -> tuple[int, list[LocalReplica]]:
    """The version that this box serves now, and with what: the wanted one, or while none of that is ready the newest of the others.

    Two versions never serve one route at a time: their answers may differ.
    """
    by_version: dict[tuple[str, int], list[ReplicaStatus]] = {}
    for status in ready:
        by_version.setdefault((status.spec.model.name, status.spec.model.version), []).append(status)
    wanted = (route.model, route.version)
    others = [key for key in by_version if key[0] == route.model]
    served = wanted if wanted in by_version or not others else max(others, key=lambda key: (by_version[key][0].spec.generation, key))
    replicas = [LocalReplica(status.spec.name, status.socket) for status in by_version.get(served, [])]
    return served[1], sorted(replicas, key=lambda replica: (replica.name, replica.socket))


def routes_of(desired: Desired | None, known: Iterable[ReplicaStatus], time: Proof = Proof()) -> RouteTable:  # noqa: B008 - frozen
    """The gateway's table: every route of the document, with the replicas that are ready for it, and what is known of the time."""
    if desired is None:
        return RouteTable(time=time)
    ready: dict[str, list[ReplicaStatus]] = {}
    shadows: dict[str, list[LocalReplica]] = {}
    for status in known:
        if status.phase == "ready" and status.socket and status.spec.is_shadow:
            shadows.setdefault(status.spec.deployment, []).append(LocalReplica(status.spec.name, status.socket))
        elif status.phase == "ready" and status.socket:
            ready.setdefault(status.spec.deployment, []).append(status)
    serving = {route.deployment: _serving(route, ready.get(route.deployment, [])) for route in desired.routes}
    return RouteTable(
        generation=desired.generation,
        routes=[
            Route(
                deployment=route.deployment,
                model=route.model,
                version=serving[route.deployment][0],
                deadline_ms=route.deadline_ms,
                split=route.split,
                replicas=serving[route.deployment][1],
                upstreams=route.upstreams,
                batching=route.batching,
                cloud_budget=route.cloud_budget,
                shadow=route.shadow,
                shadows=sorted(shadows.get(route.deployment, []), key=lambda one: (one.name, one.socket)) if route.shadow else [],
            )
            for route in desired.routes
        ],
        revoked=desired.revoked,
        time=time,
    )


def models_wanted(desired: Desired | None, present: Iterable[str], unvouched: Iterable[str] = ()) -> list[ModelRef]:
    """Each model that a wanted replica needs, may run and the store lacks, once; ``unvouched`` names replicas whose model may not run."""
    have, refused = set(present), set(unvouched)
    replicas = [spec for spec in (desired.replicas if desired else []) if spec.name not in refused]
    wanted = {spec.model.sha256: spec.model for spec in replicas if spec.model.sha256 not in have}
    return [wanted[digest] for digest in sorted(wanted)]
