"""Which replicas a box stops by itself because it had no link for as long as their deployment says. Pure."""

from collections.abc import Iterable

from skerry.wire.messages import ReplicaSpec


def stopped(replicas: Iterable[ReplicaSpec], cut_off_ms: int) -> dict[str, str]:
    """By name, why a replica is not to run after ``cut_off_ms`` without a link."""
    return {
        spec.name: f"stopped: no link for {cut_off_ms // 1000} s, disconnect.stop_on_box_after is {spec.stop_after_ms // 1000} s"
        for spec in replicas
        if 0 < spec.stop_after_ms <= cut_off_ms
    }


def keep_every_s(replicas: Iterable[ReplicaSpec], *, least_s: float, most_s: float) -> float:
    """How often it must be kept on disk that the link is there: a tenth of the shortest silence that matters."""
    limits = [spec.stop_after_ms / 1000 for spec in replicas if spec.stop_after_ms]
    return min(most_s, max(least_s, min(limits) / 10)) if limits else most_s
