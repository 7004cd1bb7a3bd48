"""What runs of a replica while its wanted version can't: the version that served before. Pure.

A version can't run while its model is not here or may not run, or once it was given up; then its predecessor is what this box converges
on, also after a boot without a link. As soon as the wanted version may be tried, it takes the predecessor's place as any new one does.
"""

import math
from collections.abc import Collection, Mapping

import msgspec

from edge_agent.core.diff import Seen
from skerry.wire.messages import ReplicaSpec


class Aim(msgspec.Struct, frozen=True):
    """What core/diff is asked for: ``want`` by replica, of the sandboxes ``seen`` but for those of a version that was given up and
    whose predecessor runs: to take them away would be to forget that they were."""

    want: Mapping[str, ReplicaSpec]
    seen: Mapping[str, Seen]


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
    given_up = {one.spec.name: name for name, one in seen.items() if is_given_up(one) and one.spec == want.get(one.spec.name)}
    aims, hidden = {}, set()
    for name, spec in want.items():
        aims[name], before = spec, served.get(name)
        if before is None or before == spec or any(runs(one, spec) for one in seen.values()):
            continue
        if name in given_up or name in barred or spec.model.sha256 not in here:
            aims[name] = before
            hidden.add(given_up.get(name, ""))
    return Aim(aims, {name: one for name, one in seen.items() if name not in hidden})


def runs(one: Seen, spec: ReplicaSpec) -> bool:
    """Whether it is a sandbox of ``spec``, or will be."""
    return one.spec == spec and one.phase in ("fetched", "running")


def is_given_up(one: Seen) -> bool:
    """Whether it is not tried again until its specification changes."""
    return one.phase == "dead" and one.retry_at == math.inf
