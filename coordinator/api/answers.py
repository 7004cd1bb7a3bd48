"""Answers of one shape: JSON from Structs, and every error as ProblemBody."""

import math
from collections.abc import Awaitable, Callable

from aiohttp import web

from coordinator.accounts.refusals import NotDone, NotLetIn, NotThere, TryLater
from coordinator.ca.authority import BadRequest
from coordinator.commands import NoAnswer, TooMany
from coordinator.core.deployment import DeploymentError
from coordinator.enrolment import TooManyTries
from coordinator.model_store import NotTaken
from coordinator.registry import identity
from coordinator.registry.database import RegistryFailed
from coordinator.registry.models import Exists
from coordinator.session import NotConnected
from coordinator.signer.client import SignerAbsent
from skerry.runtime import log
from skerry.wire import codec
from skerry.wire.api import Problem, ProblemBody
from skerry.wire.model_signature import NotVouched

logger = log.get("coordinator.api")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Refused(Exception):
    """A request that is not carried out."""

    def __init__(self, status: int, problem: Problem) -> None:
        super().__init__(problem.message)
        self.status = status
        self.problem = problem


def json_answer(value: object, *, status: int = 200) -> web.Response:
    """A Struct, or a list of them, as JSON."""
    return web.Response(body=codec.encode(value), status=status, content_type="application/json")


def refuse(status: int, code: str, message: str, *, field: str = "", hint: str = "") -> Refused:
    """An error to raise."""
    return Refused(status, Problem(code, message, field=field, hint=hint))


def _unanswered(exc: TooMany | NotConnected | NoAnswer) -> tuple[int, Problem]:
    """What should have come from a box and did not."""
    match exc:
        case TooMany():
            return 503, Problem("too_many_commands", str(exc), hint="try again in a second")
        case NotConnected():
            return 503, Problem("broker_absent", f"boxes can't be asked now: {exc}", hint="see 'skerry status'")
        case NoAnswer():
            return 504, Problem("no_answer", str(exc), hint="is it still connected? See 'skerry node list'")


def _not_let_in(exc: BadRequest | identity.Refused | TooManyTries) -> tuple[int, Problem]:
    """A box that wanted to join, or to stay."""
    field = str(exc).partition(":")[0]
    match exc:
        case BadRequest():
            return 422, Problem("invalid_request", str(exc), field=field)
        case identity.Refused():
            return 403, Problem("refused", str(exc), field=field)
        case TooManyTries():
            return 429, Problem("too_many_tries", str(exc))


def _of_accounts(exc: NotLetIn | TryLater | NotDone | NotThere) -> tuple[int, Problem]:
    """Users and tokens."""
    match exc:
        case NotLetIn():
            return 401, Problem("not_let_in", str(exc))
        case TryLater():
            return 429, Problem("too_many_tries", str(exc), hint=f"try again in {exc.after_s:.0f} s")
        case NotThere():
            return 404, Problem("not_found", str(exc))
        case NotDone():
            status = 403 if exc.code == "not_allowed" else 422 if exc.code.startswith("invalid_") else 409
            return status, Problem(exc.code, str(exc), field=exc.field)


def problem_of(exc: Exception) -> tuple[int, Problem]:  # noqa: C901, PLR0912 - a table
    """Status and words for what handlers raise; what is not known is raised again."""
    match exc:
        case Refused():
            return exc.status, exc.problem
        case DeploymentError():
            return 422, Problem("invalid_deployment", str(exc), field=exc.field, line=exc.line)
        case NotTaken():
            field = "state" if exc.code == "invalid_state" else ""
            return 507 if exc.code == "disk" else 413 if exc.code == "too_large" else 422, Problem(exc.code, str(exc), field=field)
        case NotVouched():
            return 422, Problem("not_vouched", str(exc), field="signature", hint="sign it: 'skerry model sign', then push it again")
        case BadRequest() | identity.Refused() | TooManyTries():
            return _not_let_in(exc)
        case NotLetIn() | TryLater() | NotDone() | NotThere():
            return _of_accounts(exc)
        case Exists():
            return 409, Problem("version_exists", str(exc))
        case SignerAbsent():
            return 503, Problem("signer_absent", str(exc), hint="is skerry-signer running? Nothing was changed")
        case RegistryFailed():
            return 503, Problem("registry_unavailable", str(exc), hint="nothing was changed; try again once the disk has room")
        case TooMany() | NotConnected() | NoAnswer():
            return _unanswered(exc)
        case web.HTTPRequestEntityTooLarge():
            return 413, Problem("too_large", "the body is larger than this call takes")
        case web.HTTPNotFound():
            return 404, Problem("not_found", "there is nothing at this path", hint="GET /openapi.json lists every call")
        case web.HTTPMethodNotAllowed():
            return 405, Problem("method_not_allowed", f"use {', '.join(sorted(exc.allowed_methods))}")
        case _:
            raise exc


@web.middleware
async def problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn what handlers raise into ProblemBody, for the API; pages make their own."""
    try:
        return await handler(request)
    except web.HTTPRedirection:
        raise
    except Exception as exc:  # noqa: BLE001 - what is not known is raised again there
        status, problem = problem_of(exc)
        if status >= 500:
            logger.error("request.failed", path=request.path, code=problem.code, reason=problem.message)
        answer = json_answer(ProblemBody(problem), status=status)
        if isinstance(exc, TryLater):
            answer.headers["Retry-After"] = str(math.ceil(exc.after_s))
        return answer
