"""The OpenAPI 3.1 document, made from the same list of calls as the router."""

import re
from typing import Any

import msgspec

from coordinator.api import accounts, deployments, draining, enrolment, exposition, glance, models, recovery, releases, restarting, rollouts
from coordinator.api.calls import CALLS, Call
from skerry import __version__
from skerry.wire.api import ProblemBody

EVERY = [
    *glance.CALLS,
    *CALLS,
    *deployments.CALLS,
    *enrolment.CALLS,
    *accounts.CALLS,
    *recovery.CALLS,
    *draining.CALLS,
    *models.CALLS,
    *restarting.CALLS,
    *rollouts.CALLS,
    *releases.CALLS,
    *exposition.CALLS,
]
"""Every call of the API."""


def document() -> dict[str, Any]:
    """The whole document."""
    calls = EVERY
    kinds = [kind for call in calls for kind in (call.answer, call.body) if not isinstance(kind, str) and kind not in (bytes, str)]
    schemas, components = msgspec.json.schema_components([*kinds, ProblemBody], ref_template="#/components/schemas/{name}")
    by_kind = dict(zip([str(kind) for kind in [*kinds, ProblemBody]], schemas, strict=True))
    paths: dict[str, Any] = {}
    for call in calls:
        paths.setdefault(call.path, {})[call.method.lower()] = _operation(call, by_kind)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Skerry coordinator", "version": __version__, "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}},
        "security": [{"token": []}],
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(call: Call, by_kind: dict[str, dict[str, Any]]) -> dict[str, Any]:
    plain = isinstance(call.answer, str)
    media = call.answer if plain else {bytes: "application/octet-stream", str: "text/event-stream"}.get(call.answer, "application/json")
    simple = {"type": "string"} if plain else {bytes: {"type": "string", "format": "binary"}, str: {"type": "string"}}.get(call.answer)
    schema = simple or by_kind[str(call.answer)]
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in re.findall(r"\{(\w+)\}", call.path)
    ] + [{"name": name, "in": "query", "description": text, "schema": {"type": "string"}} for name, text in call.query.items()]
    operation: dict[str, Any] = {
        "operationId": call.handler,
        "summary": call.summary,
        "parameters": parameters,
        "responses": {
            str(call.status): {"description": "as asked"} | ({} if call.status == 204 else {"content": {media: {"schema": schema}}}),
            "default": {"description": "a problem", "content": {"application/json": {"schema": by_kind[str(ProblemBody)]}}},
        },
    }
    if call.is_open:
        operation["security"] = []
    if isinstance(call.body, str) and call.body:
        operation["requestBody"] = {"required": True, "content": {call.body: {"schema": {"type": "string"}}}}
    elif call.body:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": by_kind[str(call.body)]}}}
    return operation
