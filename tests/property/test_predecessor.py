"""Whatever befalls a box, it serves what is wanted where that can run, else what served before where that can; and forgets no giving up."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.core import diff
from edge_agent.core.admission import Limits
from edge_agent.core.diff import Seen
from edge_agent.core.predecessor import aim
from skerry.wire.messages import ModelRef, ReplicaSpec

BEFALLS = ["power", "power", "arrives", "arrives", "barred", "fails", "ends", "news", "back", "other settings", "proves", "lost"]


def spec_of(version: int, *, memory_bytes: int = 64, update: str = "hand_over") -> ReplicaSpec:
    model = ModelRef("m", version, f"{version}" * 64, 1)
    return ReplicaSpec("d-0", "d", version, model, memory_bytes=memory_bytes, cpus=1.0, update=update)


class Box:
    """One replica on a disk that lasts; what is given up lasts too, as in the slots."""

    def __init__(self, update: str) -> None:
        self.update = update
        self.want = spec_of(1, update=update)
        self.seen: dict[str, Seen] = {}
        self.served: dict[str, ReplicaSpec] = {}
        self.here = {self.want.model.sha256}
        self.barred: set[int] = set()
        self.bad: set[int] = set()
        self.tried_after_giving_up: list[ReplicaSpec] = []
        self._count = 0

    def settle(self) -> None:
        """Converge; one that is bad is given up at its first try."""
        for _ in range(60):
            barred = {"d-0"} if self.want.model.version in self.barred else set()
            found = aim({"d-0": self.want}, self.seen, served=self.served, here=self.here, barred=barred)
            steps = diff.next_steps(found.want, found.shown(self.seen), warm={}, limits=Limits(10**6, {}), now=0.0).steps
            if not any(self._do(step, barred) for step in steps):
                return
        raise AssertionError("it does not come to rest")

    def _do(self, step: diff.Step, barred: set[str]) -> bool:
        match step:
            case diff.Fetch(spec):
                if spec.model.sha256 not in self.here or (barred and spec == self.want):
                    return False
                self._count += 1
                self.seen[f"s{self._count}"] = Seen(spec, "fetched")
            case diff.Start(spec):
                name = next(name for name, one in self.seen.items() if one.phase == "fetched" and one.spec == spec)
                if any(one.spec == spec and one.retry_at == math.inf for one in self.seen.values()):
                    self.tried_after_giving_up.append(spec)
                is_bad = spec.model.version in self.bad
                self.seen[name] = Seen(spec, "dead", retry_at=math.inf) if is_bad else Seen(spec, "running", is_ready=True)
                if not is_bad and spec == self.want:
                    self.served.setdefault("d-0", spec)
            case diff.Drain(sandbox) | diff.Remove(sandbox):
                del self.seen[sandbox]
        return True

    def befall(self, what: str) -> None:
        version = self.want.model.version
        match what:
            case "power":
                self.seen = {name: one for name, one in self.seen.items() if one.retry_at == math.inf}
            case "arrives":
                self.here.add(self.want.model.sha256)
            case "barred":
                self.barred ^= {version}
            case "fails":
                self.bad.add(version)
            case "proves" if any(one.spec == self.want and one.phase == "running" for one in self.seen.values()):
                self.served["d-0"] = self.want
            case "lost":
                self.here.discard(self.want.model.sha256)
            case "ends":
                self.seen = {
                    name: Seen(one.spec, "dead", retry_at=0.0) if one.phase == "running" else one for name, one in self.seen.items()
                }
            case "news" | "back":
                self.want = spec_of(max(1, version + (1 if what == "news" else -1)), update=self.update)
            case "other settings":
                self.want = spec_of(version, memory_bytes=self.want.memory_bytes + 1, update=self.update)


@given(st.lists(st.sampled_from(BEFALLS), max_size=12), st.sampled_from(["hand_over", "hand_over_if_room", "recreate"]))
@settings(max_examples=1500, deadline=None)
def test_it_serves_what_is_wanted_or_else_what_served_before(befell, update):
    box = Box(update)
    box.settle()
    for what in befell:
        box.befall(what)
        runs_on = [one.spec for one in box.seen.values() if one.phase == "running"]
        given_up = [one.spec for one in box.seen.values() if one.retry_at == math.inf]
        box.settle()
        runs = [one.spec for one in box.seen.values() if one.phase == "running"]
        version = box.want.model.version
        can_run = box.want.model.sha256 in box.here and version not in box.bad and version not in box.barred and box.want not in given_up
        before = box.served.get("d-0")
        if can_run or box.want in runs_on:
            assert runs == [box.want]
        elif before is not None and before != box.want and before.model.sha256 in box.here and before.model.version not in box.bad:
            assert len(runs) == 1, "somebody serves"
            assert runs[0] == before or runs[0] in runs_on
        assert not box.tried_after_giving_up
        assert all(one in [seen.spec for seen in box.seen.values()] for one in given_up if one == box.want), "it is remembered"
