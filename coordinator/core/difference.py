"""What a box should be against what it says that it is, line by line. Pure."""

from collections.abc import Iterable

from skerry.wire.fleet import Difference, DifferenceLine
from skerry.wire.messages import Birth, Desired, ModelRef, ReplicaReport, ReplicaSpec, Reported, Rung

RUNGS: tuple[Rung, ...] = ("process", "container", "gvisor", "microvm")
"""Each isolates more than the one before."""
NONE = ""


def difference(desired: Desired | None, birth: Birth | None, reported: Reported | None) -> Difference:
    """Every replica that is wanted or runs, by name, and the box's own programs. What is not alike comes with both sides."""
    wanted = {spec.name: spec for spec in (desired.replicas if desired else [])}
    found = {report.name: report for report in (reported.replicas if reported else [])}
    lines = list(_of_box(desired, birth, reported))
    for name in sorted(wanted.keys() | found.keys()):
        lines += _of_replica(name, wanted.get(name), found.get(name))
    return Difference(desired.generation if desired else 0, reported.generation if reported else 0, lines)


def _of_box(desired: Desired | None, birth: Birth | None, reported: Reported | None) -> Iterable[DifferenceLine]:
    yield _line("", "generation", str(desired.generation if desired else 0), str(reported.generation if reported else 0))
    if desired is not None and desired.software is not None:
        yield _line("", "software", desired.software.version, birth.version if birth else NONE)


def _of_replica(name: str, spec: ReplicaSpec | None, report: ReplicaReport | None) -> Iterable[DifferenceLine]:
    if spec is None:
        yield _line(name, "replica", NONE, f"{report.state if report else ''}")
        return
    if report is None:
        yield _line(name, "replica", _model(spec.model), NONE)
        return
    is_same = report.sha256 == spec.model.sha256
    yield _line(
        name, "model", _model(spec.model), _model(spec.model) if is_same else f"sha256 {report.sha256[:12]}" if report.sha256 else NONE
    )
    yield _line(name, "generation", str(spec.generation), str(report.generation))
    yield _line(name, "phase", "ready", report.state)
    rung = report.rung or NONE
    holds = report.rung is not None and RUNGS.index(report.rung) >= RUNGS.index(spec.isolation_at_least)
    yield DifferenceLine(name, "isolation", f"at least {spec.isolation_at_least}", rung, is_alike=holds)


def _model(ref: ModelRef) -> str:
    return f"{ref.name}:{ref.version}"


def _line(replica: str, field: str, wanted: str, found: str) -> DifferenceLine:
    return DifferenceLine(replica, field, wanted, found, is_alike=wanted == found)
