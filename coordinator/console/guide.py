"""Pages for those who begin, and for those who build on it: the first steps, the API's calls, and how this coordinator is set."""

import asyncio
import re
from collections.abc import Iterable
from typing import Any

import msgspec
from aiohttp import web

from coordinator.api.calls import Call
from coordinator.config import Config
from coordinator.console.rendering import page
from coordinator.glance import Glance
from coordinator.views import Views


class Setting(msgspec.Struct, frozen=True):
    """One setting as it is in force. Files are named, never read: what is secret lies in them."""

    name: str
    value: str
    is_usual: bool


class Guide:
    """The handlers; ``calls`` are all of the API's."""

    def __init__(self, config: Config, glance: Glance, views: Views, calls: Iterable[Call]) -> None:
        self._config = config
        self._glance = glance
        self._views = views
        self._calls = list(calls)

    async def start(self, request: web.Request) -> web.StreamResponse:
        """The first steps, each ticked once it is done."""
        status, models, fleet = await asyncio.gather(self._glance.status(), self._views.models(), self._glance.fleet(minutes=60))
        context = {
            "models": len(models),
            "status": status,
            "asked": sum(view.asked for view in fleet.deployments),
            "deployments": [view.name for view in fleet.deployments],
            "coordinator": self._config.public_url,
        }
        return page(request, "start.html", context)

    async def calls(self, request: web.Request) -> web.StreamResponse:
        """Every call of the API, by what it is about."""
        groups: dict[str, list[Call]] = {}
        for call in self._calls:
            groups.setdefault(_about(call.path), []).append(call)
        return page(request, "api.html", {"groups": groups, "name_of": _name_of})

    async def settings(self, request: web.Request) -> web.StreamResponse:
        """How this coordinator is set."""
        return page(request, "settings.html", {"settings": list(settings_of(self._config))})


def _about(path: str) -> str:
    """The first part behind the version."""
    return next((part for part in path.split("/") if part not in ("", "v1")), path)


def _name_of(kind: Any) -> str:
    """A kind of answer or body as it is read."""
    if kind in (str, "", None):
        return ""
    if kind is bytes:
        return "bytes"
    if isinstance(kind, str):
        return kind
    return re.sub(r"[\w.]+\.(\w+)", r"\1", str(kind)) if hasattr(kind, "__args__") else getattr(kind, "__name__", str(kind))


def settings_of(config: msgspec.Struct, prefix: str = "") -> Iterable[Setting]:
    """Every setting with its value, tables of settings in their own order."""
    for field in msgspec.structs.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, msgspec.Struct):
            yield from settings_of(value, f"{prefix}{field.name}.")
        else:
            usual = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
            yield Setting(f"{prefix}{field.name}", _text(value), value == usual)


def _text(value: Any) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return "true" if value else "false"
        case list() | tuple():
            return ", ".join(map(str, value)) or "none"
        case _:
            return str(value) or "none"
