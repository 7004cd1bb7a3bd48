"""What runs of a replica while its wanted version can't: the version that served before. Pure.

A version can't run while its model is not here or may not run, or once it was given up; then its predecessor is what this box converges
on, also after a boot without a link. As soon as the wanted version may be tried, it takes the predecessor's place as any new one does.
"""

import math
from collections.abc import Collection, Mapping

import msgspec

from edge_agent.core.diff import Seen, runs_alike
from skerry.wire.messages import ReplicaSpec


class Aim(msgspec.Struct, frozen=True):
    """What core/diff is asked for: ``want`` by replica. ``hidden`` are sandboxes of a version that was given up and whose predecessor
    runs: to take them away would be to forget that they were."""

    want: Mapping[str, ReplicaSpec]
    hidden: Collection[str] = ()

    def shown(self, seen: Mapping[str, Seen]) -> dict[str, Seen]:
        """``seen`` as core/diff is to see it."""
        return {name: one for name, one in seen.items() if name not in self.hidden}


def aim(
    want: Mapping[str, ReplicaSpec],
    seen: Mapping[str, Seen],
    *,
    served: Mapping[str, ReplicaSpec],
    here: Collection[str],
    barred: Collection[str] = (),
) -> Aim:
    """``served`` is what answered of each replica, ``here`` are the digests of the models that are in the store; ``barred`` are replicas
    whose wanted version may not run."""
    given_up = {one.spec.name: name for name, one in seen.items() if _is_given_up(one) and one.spec == want.get(one.spec.name)}
    aims = dict(want)
    for name, spec in want.items():
        before = served.get(name)
        if before is None or before == spec or any(_runs(one, spec) for one in seen.values()):
            continue
        if name in given_up or name in barred or spec.model.sha256 not in here:
            aims[name] = before
    return Aim(aims, {sandbox for name, sandbox in given_up.items() if aims[name] != want[name]})


def _runs(one: Seen, spec: ReplicaSpec) -> bool:
    """Whether it is a sandbox of ``spec``, or will be."""
    return one.phase in ("fetched", "running") and runs_alike(one.spec, spec)


def _is_given_up(one: Seen) -> bool:
    """Whether it is not tried again until its specification changes."""
    return one.phase == "dead" and one.retry_at == math.inf
