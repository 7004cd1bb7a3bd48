"""Which release of the box software each box is to run, while one spreads over the fleet and after. Pure."""

from collections.abc import Mapping

import msgspec

from coordinator.core.rollout import Rules, Standing, State, Unit
from skerry.wire.bundle import Bundle
from skerry.wire.messages import Birth, Software, SoftwareReport

WAVES: list[int | float] = [1, 0.1, 0.5, 1.0]
RULES = Rules(WAVES, deadline_ms=1_800_000)
"""Where nothing else is said: a box has half an hour to fetch, unpack and try it."""
MOST_TRIES = 3
"""Of a box whose only fault was that it did not reach the coordinator: its link may have been down."""
Build = tuple[str, str, str]
"""Version, Python and processor."""


class Release(msgspec.Struct, frozen=True):
    """A release in the store, for one Python and one processor."""

    version: str
    python: str
    machine: str
    sha256: str
    size_bytes: int
    pushed_at_ms: int
    signature: Bundle | None = None

    @property
    def build(self) -> Build:
        """What tells it from others."""
        return self.version, self.python, self.machine


class Spread(msgspec.Struct, frozen=True):
    """How a release spreads over the fleet. ``earlier`` is the one that was wanted before it, empty for none; ``ran`` is, by box that
    was let in, what ran there; ``attempt`` sets it apart from an earlier try of the same. ``p99_ms`` is how slow each deployment's slowest
    answers were before on the boxes of the present wave; ``planned`` counts the waves that the last plan took into account."""

    version: str
    earlier: str
    rules: Rules
    state: State
    ran: dict[str, str]
    attempt: int
    changed_at_ms: int
    p99_ms: dict[str, float] = {}
    planned: int = 0
    standing: Standing = Standing()

    @property
    def is_taken_back(self) -> bool:
        """Whether it is no good, or not wanted after all."""
        return self.state.phase in ("failed", "aborted")


def target_of(node: str, spread: Spread | None) -> str:
    """The version that a box is to run; empty where that is its own affair."""
    if spread is None:
        return ""
    if spread.is_taken_back:
        return spread.ran.get(node, spread.earlier)
    if spread.state.phase == "done" or node in spread.state.admitted:
        return spread.version
    return spread.earlier


def wanted(
    node: str, birth: Birth, said: SoftwareReport, held: Software | None, spread: Spread | None, releases: Mapping[Build, Release]
) -> Software | None:
    """What a box is told. ``said`` is what it reported last, ``held`` what it was told last."""
    version = target_of(node, spread)
    if spread is None or not version:
        return None
    release = releases.get((version, birth.python, birth.machine))
    least = spread.attempt if version == spread.version else 0
    attempt = max(least, held.attempt if held is not None and held.version == version else 0)
    if may_try_again(said, version, attempt, least):
        attempt += 1
    if release is None:
        # Only what ran there lies there.
        return Software(version, attempt=attempt) if version in (birth.version, spread.ran.get(node)) else None
    return Software(version, release.sha256, release.size_bytes, release.signature, attempt)


def may_try_again(said: SoftwareReport, version: str, attempt: int, least: int) -> bool:
    """Whether a box gave up for want of a link, and not too often yet."""
    is_over = said.phase == "failed" and said.version == version and said.attempt == attempt
    return is_over and said.is_unreached and attempt - least + 1 < MOST_TRIES


def is_there(node: str, spread: Spread, *, is_online: bool, since_ms: int) -> bool:
    """Whether a box counts. One that was let in and went away since may be away because of it, if only while its agent starts anew: nobody
    else is let in in its place. ``since_ms`` is since when it is online, or not."""
    return is_online or (node in spread.state.admitted and since_ms >= spread.state.began_ms)


def unit_of(
    birth: Birth,
    said: SoftwareReport,
    held: Software | None,
    spread: Spread,
    releases: Mapping[Build, Release],
    *,
    is_there: bool,
    asked: int,
) -> Unit:
    """A box as core/rollout takes it."""
    version = spread.version
    is_current = said.version == version and said.attempt >= spread.attempt
    if said.version == version and birth.version == version and said.phase == "done":
        return Unit(is_there, ready=True, asked=asked)
    if is_current and said.phase == "failed":
        attempt = held.attempt if held is not None and held.version == version else 0
        tries_again = attempt > said.attempt or may_try_again(said, version, said.attempt, spread.attempt)
        return Unit(is_there, failure="" if tries_again else said.reason, asked=asked)
    if (version, birth.python, birth.machine) not in releases and birth.version != version:
        return Unit(is_there, failure=f"no build of {version} for Python {birth.python or '?'} on {birth.machine or '?'}", asked=asked)
    return Unit(is_there, asked=asked)
