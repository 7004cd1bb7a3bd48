"""Deployments: as their owners write them, what they would change, and what became of them."""

import time
from collections.abc import Callable

from aiohttp import web
from sqlite_utils import Database as Tables

from coordinator import accepting
from coordinator.api.access import Access
from coordinator.api.answers import Handler, Refused, json_answer, problem_of, refuse
from coordinator.api.bodies import beginning
from coordinator.api.calls import ACTOR, Call, checked, unknown
from coordinator.core import deployment as deployment_file
from coordinator.core.deployment import Deployment, DeploymentError
from coordinator.news import News
from coordinator.plan_loop import foresee
from coordinator.registry import audit, deployments, events, models, rollouts
from coordinator.registry.database import Database
from coordinator.views import Views
from coordinator.vouching import Vouching
from skerry.wire.api import Accepted, DeploymentView, PlanStep, PlanView, ProblemBody, RefusalView
from skerry.wire.fleet import VersionView
from skerry.wire.model_signature import NotVouched

MOST_SHOWN = 500
"""Steps and refusals of a plan that are listed; the counts are of all."""

CALLS = [
    Call("GET", "/v1/deployments", "list_deployments", "Every deployment", list[DeploymentView]),
    Call(
        "POST", "/v1/deployments", "deploy", "Create or change a deployment: the file as its owner wrote it", Accepted, 202,
        role="operator", body="application/yaml", query={"again": "true: although this very change was tried, and taken back"},
    ),
    Call(
        "POST", "/v1/deployments/plan", "plan_deployment", "What a deployment would change, without changing it", PlanView,
        role="operator", body="application/yaml",
        query={"gently": "true: what is wrong with it comes as a problem with status 200, for who asks while it is typed"},
    ),
    Call("GET", "/v1/deployments/{name}", "show_deployment", "One deployment", DeploymentView),
    Call(
        "GET", "/v1/deployments/{name}/versions", "compare_versions", "How its present version serves, and the one before it",
        list[VersionView],
    ),
    Call("DELETE", "/v1/deployments/{name}", "delete_deployment", "Remove a deployment from every box", Accepted, 202, role="operator"),
]  # fmt: skip


class DeploymentCalls:
    """The handlers of CALLS."""

    def __init__(
        self, database: Database, views: Views, vouching: Vouching, access: Access, news: News, *, replan: Callable[[], None]
    ) -> None:
        self._database = database
        self._views = views
        self._vouching = vouching
        self._access = access
        self._news = news
        self._replan = replan

    def handler(self, call: Call) -> Handler:
        """The call's method, behind the check of who calls."""
        return checked(self._access, call, getattr(self, call.handler))

    async def list_deployments(self, _: web.Request) -> web.Response:
        """See CALLS."""
        return json_answer(await self._views.deployments())

    async def compare_versions(self, request: web.Request) -> web.Response:
        """See CALLS."""
        name = request.match_info["name"]
        if found := await self._views.versions(name):
            return json_answer(found)
        raise unknown("deployment", name, "skerry deployment list")

    async def deploy(self, request: web.Request) -> web.Response:
        """See CALLS."""
        text, spec = await self._checked(request)
        now_ms, is_again = time.time_ns() // 1_000_000, request.query.get("again", "") == "true"

        def work(tables: Tables) -> tuple[int, bool]:
            failed = rollouts.read_failed(tables, spec.name, text)
            if failed is not None and not is_again:
                when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(failed.at_ms / 1000))
                raise refuse(409, "failed_before", f"this was tried, and taken back {when}: {failed.reason}", hint="skerry deploy --again")
            before = deployments.read_text(tables, spec.name)
            generation = accepting.accept(tables, spec, text, now_ms)
            if before != text:
                audit.append(tables, request[ACTOR], "deployment.accepted", spec.name, before=before, after=text, now_ms=now_ms)
            events.add_own_event(tables, "", "deployment.accepted", spec.name, f"generation {generation}", now_ms)
            held = rollouts.read_rollout(tables, spec.name)
            return generation, held is not None and held.after.generation == generation and not held.state.is_over

        generation, spreads = await self._database.write(work)
        self._news.tell("events", "deployments")
        self._replan()
        return json_answer(Accepted(spec.name, generation, spec.warnings, spreads), status=202)

    async def show_deployment(self, request: web.Request) -> web.Response:
        """See CALLS."""
        view = await self._views.deployment(request.match_info["name"])
        if view is None:
            raise unknown("deployment", request.match_info["name"], "skerry deployment list")
        return json_answer(view)

    async def delete_deployment(self, request: web.Request) -> web.Response:
        """See CALLS."""
        name = request.match_info["name"]
        now_ms = time.time_ns() // 1_000_000

        def work(tables: Tables) -> bool:
            before = deployments.read_text(tables, name)
            existed = deployments.delete_deployment(tables, name)
            rollouts.forget_rollout(tables, name)
            if existed:
                audit.append(tables, request[ACTOR], "deployment.deleted", name, before=before, now_ms=now_ms)
                events.add_own_event(tables, "", "deployment.deleted", name, "", now_ms)
            return existed

        if not await self._database.write(work):
            raise unknown("deployment", name, "skerry deployment list")
        self._replan()
        return json_answer(Accepted(name, 0), status=202)

    async def plan_deployment(self, request: web.Request) -> web.Response:
        """See CALLS."""
        try:
            text, spec = await self._checked(request)
        except (DeploymentError, Refused) as exc:
            if request.query.get("gently", "") != "true":
                raise
            return json_answer(ProblemBody(problem_of(exc)[1]))

        def work(tables: Tables) -> PlanView:
            held = deployments.read_deployment(tables, spec.name)
            found = foresee(tables, spec)
            steps = [PlanStep(one.node, one.deployment, one.replica, one.kind, one.text) for one in found.steps]
            own = [step for step in steps if step.deployment == spec.name]
            failed = rollouts.read_failed(tables, spec.name, text)
            refusals = [RefusalView(refusal.node, refusal.reason) for refusal in found.outcome.refusals]
            return PlanView(
                spec.name,
                is_new=held is None,
                is_same=held is not None and held.text == text,
                spreads=held is not None and spec.rollout is not None,
                starts=sum(step.kind == "starts" for step in own),
                stops=sum(step.kind == "stops" for step in own),
                changes=sum(step.kind == "changes" for step in own),
                keeps=sum(step.kind == "keeps" for step in own),
                refuses=len(refusals),
                problem=found.outcome.problem,
                failed_before=failed.reason if failed is not None else "",
                warnings=spec.warnings,
                steps=[step for step in own if step.kind != "keeps"][:MOST_SHOWN],
                others=[step for step in steps if step.deployment != spec.name][:MOST_SHOWN],
                refusals=refusals[:MOST_SHOWN],
            )

        return json_answer(await self._database.read(work))

    async def _checked(self, request: web.Request) -> tuple[str, Deployment]:
        """The text that was sent, and what it says, with a model that is there and may run. Raises Refused and DeploymentError."""
        try:
            text = (await beginning(request, deployment_file.MAX_TEXT_BYTES)).decode()
        except UnicodeDecodeError as exc:
            raise refuse(422, "invalid_deployment", f"the file is not UTF-8 (byte {exc.start})") from exc
        spec = deployment_file.parse(text)
        model = await self._database.read(lambda tables: models.read_model(tables, spec.model, spec.version))
        if model is None:
            held = [f"{m.name}:{m.version}" for m in await self._views.models()]
            raise refuse(
                422, "unknown_model", f"model: {spec.model}:{spec.version} is not in the model store", field="model",
                hint=f"push it with 'skerry model push'; the store has {', '.join(held) or 'no model yet'}",
            )  # fmt: skip
        try:
            self._vouching.check(model, model.signature)
        except NotVouched as exc:
            raise refuse(
                422, "not_vouched", f"model: {spec.model}:{spec.version}: {exc}", field="model",
                hint="sign it by a key of model_keys_file: 'skerry model sign', then 'skerry model push'",
            ) from exc  # fmt: skip
        return text, spec
