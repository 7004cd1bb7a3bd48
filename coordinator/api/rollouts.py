"""Changes of deployments that spread in waves: how far they are, and an operator's word on them."""

import time
from collections.abc import Callable
from typing import Literal

import msgspec
from aiohttp import web
from sqlite_utils import Database as Tables

from coordinator.api.access import Access
from coordinator.api.answers import Handler, json_answer, refuse
from coordinator.api.calls import ACTOR, Call, checked
from coordinator.core import rollout
from coordinator.core.rollout import State
from coordinator.deployment_rollout import DEFAULT, World, take_back, units_of
from coordinator.news import News
from coordinator.registry import audit, events, rollouts
from coordinator.registry.database import Database
from coordinator.registry.rollouts import Rollout
from skerry.wire.api import RolloutView

MOST_SHOWN = 100
"""Units of a wave that are listed by name."""

CALLS = [
    Call("GET", "/v1/rollouts", "list_rollouts", "How each deployment's last change spreads, or spread", list[RolloutView]),
    Call("GET", "/v1/rollouts/{name}", "show_rollout", "One deployment's", RolloutView),
    Call("POST", "/v1/rollouts/{name}/pause", "pause", "Let no further wave begin", RolloutView, role="operator"),
    Call("POST", "/v1/rollouts/{name}/resume", "resume", "Go on", RolloutView, role="operator"),
    Call("POST", "/v1/rollouts/{name}/approve", "approve", "Let the next wave begin", RolloutView, role="operator"),
    Call("POST", "/v1/rollouts/{name}/abort", "abort", "Take the change back everywhere", RolloutView, role="operator"),
]


class RolloutCalls:
    """The handlers of CALLS."""

    def __init__(self, database: Database, access: Access, news: News, *, look: Callable[[], None], replan: Callable[[], None]) -> None:
        self._database = database
        self._access = access
        self._news = news
        self._look = look
        self._replan = replan

    def handler(self, call: Call) -> Handler:
        """The call's method, behind the check of who calls."""
        return checked(self._access, call, getattr(self, call.handler))

    async def list_rollouts(self, _: web.Request) -> web.Response:
        """See CALLS."""
        return json_answer(await self._database.read(views))

    async def show_rollout(self, request: web.Request) -> web.Response:
        """See CALLS."""
        name = request.match_info["name"]
        return json_answer(await self._database.read(lambda tables: view_of(tables, _known(tables, name))))

    async def pause(self, request: web.Request) -> web.Response:
        """See CALLS."""
        return await self._changed(request, "rollout.paused", lambda state: rollout.paused(state, is_paused=True))

    async def resume(self, request: web.Request) -> web.Response:
        """See CALLS."""
        return await self._changed(request, "rollout.resumed", lambda state: rollout.paused(state, is_paused=False))

    async def approve(self, request: web.Request) -> web.Response:
        """See CALLS."""
        return await self._changed(request, "rollout.approved", rollout.approved)

    async def abort(self, request: web.Request) -> web.Response:
        """See CALLS."""
        return await self._changed(request, "rollout.aborted", lambda state: rollout.aborted(state, f"aborted by {request[ACTOR].who}"))

    async def _changed(self, request: web.Request, kind: str, change: Callable[[State], State]) -> web.Response:
        name, now_ms = request.match_info["name"], time.time_ns() // 1_000_000

        def work(tables: Tables) -> RolloutView:
            held = _known(tables, name)
            if held.state.is_over:
                raise refuse(
                    409, "is_over", f"the last change of {name} is over: {held.state.phase}", hint=f"see 'skerry rollout show {name}'"
                )
            now = msgspec.structs.replace(held, state=change(held.state), changed_at_ms=now_ms)
            if now.state != held.state:
                rollouts.save_rollout(tables, now)
                audit.append(tables, request[ACTOR], kind, name, after=f"wave {len(now.state.waves)}", now_ms=now_ms)
                events.add_own_event(tables, "", kind, name, f"by {request[ACTOR].who}, in wave {len(now.state.waves)}", now_ms)
            if now.state.phase == "aborted":
                take_back(tables, now, now_ms)
            return view_of(tables, now)

        view = await self._database.write(work)
        self._news.tell("deployments", "events")
        self._look()
        self._replan()
        return json_answer(view)


def _known(tables: Tables, name: str) -> Rollout:
    held = rollouts.read_rollout(tables, name)
    if held is None:
        hint = "see 'skerry rollout list'; a deployment has one once it was changed, and says 'rollout:'"
        raise refuse(404, "not_found", f"no change of {name[:80]!r} spreads, or ever did", hint=hint)
    return held


def shown(tables: Tables, name: str) -> RolloutView | None:
    """Of one deployment, if it has one."""
    held = rollouts.read_rollout(tables, name)
    return view_of(tables, held) if held is not None else None


def views(tables: Tables) -> list[RolloutView]:
    """Of every deployment that has one."""
    return [view_of(tables, held) for held in rollouts.read_rollouts(tables)]


def view_of(tables: Tables, held: Rollout) -> RolloutView:
    """As people and scripts see it: as it was last looked at: each second, more seldom with very many boxes."""
    before, after, standing = held.before, held.after, held.standing
    if held.state.is_over and not standing.total:  # it was over before how far it was stood on record
        standing = rollout.standing(held.state, units_of(held, World(tables), {}))
    return progress(
        Title(
            held.deployment,
            (before.generation, f"{before.spec.model}:{before.spec.version}"),
            (after.generation, f"{after.spec.model}:{after.spec.version}"),
            "replica" if after.spec.replicas.count is not None else "box",
        ),
        held.state,
        after.spec.rollout or DEFAULT,
        standing,
        changed_at_ms=held.changed_at_ms,
    )


class Title(msgspec.Struct, frozen=True):
    """What spreads: its name, from what to what (each with a generation, 0 for none), and over what."""

    name: str
    before: tuple[int, str]
    after: tuple[int, str]
    unit: Literal["box", "replica"]


def progress(title: Title, state: State, rules: rollout.Rules, standing: rollout.Standing, *, changed_at_ms: int) -> RolloutView:
    """How far something is that spreads in waves."""
    wave = state.waves[-1] if state.waves else []
    return RolloutView(
        deployment=title.name,
        phase=state.phase,
        is_paused=state.is_paused,
        generation=title.after[0],
        model=title.after[1],
        before_generation=title.before[0],
        before_model=title.before[1],
        unit=title.unit,
        total=standing.total,
        targets=rollout.targets(rules, standing.total),
        admitted=len(state.admitted),
        ready=0 if state.phase in ("failed", "aborted") else standing.ready,
        away=standing.away,
        wave=len(state.waves),
        wave_units=sorted(wave)[:MOST_SHOWN],
        began_ms=state.began_ms,
        wave_since_ms=state.wave_since_ms,
        ready_since_ms=state.ready_since_ms,
        observe_ms=rules.observe_ms,
        changed_at_ms=changed_at_ms,
        reason=state.reason,
        is_shadow=state.is_shadow and not state.is_over,
        compared=state.seen.compared,
        differed=state.seen.differed,
    )
