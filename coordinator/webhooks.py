"""Tells others of events as they come: each webhook in order, at least once, over restarts of either side.

An event that a webhook does not take is told again, after ever longer pauses, and the next ones wait behind it; what the registry forgets
meanwhile (``keep_events``) is never told. That one does not take them, and that it does again, are events of their own.
"""

import asyncio
import random
import time

import aiohttp
import msgspec
from sqlite_utils import Database as Tables

from coordinator.config import Webhook
from coordinator.core import hook
from coordinator.news import News
from coordinator.registry import events, hooks
from coordinator.registry.database import Database, RegistryFailed
from skerry.runtime import backoff, lifecycle, log
from skerry.wire.api import EventView

logger = log.get("coordinator.webhooks")

TIMEOUT_S = 10.0
AT_A_TIME = 50
LOOK_S = 30.0
"""Without news of any event it is looked all the same."""
TOLD_AFTER = 3
"""Tries that fail, before it is an event."""
MOST_WORDS = 200


class Webhooks:
    """The registry knows how far each is. Raises SettingsError for a secret that can't be read."""

    def __init__(self, database: Database, news: News, webhooks: list[Webhook], fleet: str) -> None:
        self._database = database
        self._news = news
        self._webhooks = webhooks
        self._fleet = fleet
        self._keys = {one.url: one.key() for one in webhooks}

    async def run(self, stop: asyncio.Event) -> None:
        """Until ``stop`` is set."""
        await self._database.write(lambda tables: hooks.keep_only(tables, [one.url for one in self._webhooks]))
        async with asyncio.TaskGroup() as tasks:
            for one in self._webhooks:
                tasks.create_task(self._follow(one, stop), name="coordinator.webhook")

    async def _follow(self, webhook: Webhook, stop: asyncio.Event) -> None:
        key = self._keys[webhook.url]
        reached = await self._database.read(lambda tables: hooks.read_reached(tables, webhook.url))
        await self._save(webhook, reached)
        failed, why = 0, ""
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while not stop.is_set():
                version = self._news.version
                fresh = await self._database.read(lambda tables, after=reached: _after(tables, after))  # type: ignore[misc]  # bound now
                for event in fresh:
                    if hook.is_wanted(event, webhook.kinds):
                        why = await self._send(session, webhook.url, event, key)
                        if why:
                            failed += 1
                            break
                        failed = await self._taken(webhook, failed)
                    reached = event.id
                if fresh:  # measurements are news as well, many times a second: the disk is not asked for those
                    await self._save(webhook, reached)
                if fresh and reached != fresh[-1].id:
                    await self._not_taken(webhook, failed, why)
                    pause_s = backoff.delay_s(failed - 1, random.random(), first_s=hook.FIRST_S, most_s=hook.MOST_S)
                    await lifecycle.sleep_until(stop, pause_s)
                elif len(fresh) < AT_A_TIME and self._news.version == version:
                    await self._news.changed(stop, within_s=LOOK_S)

    async def _send(self, session: aiohttp.ClientSession, url: str, event: EventView, key: bytes | None) -> str:
        """Why it was not taken; empty where it was."""
        body = hook.body_of(event, self._fleet)
        headers = hook.headers_of(self._fleet, event, body, key, now_s=int(time.time()))
        try:
            async with session.post(url, data=body, headers=headers, allow_redirects=False) as answer:
                return "" if 200 <= answer.status < 300 else f"status {answer.status}"
        except (aiohttp.ClientError, OSError, TimeoutError) as exc:
            return (str(exc) or type(exc).__name__)[:MOST_WORDS]

    async def _save(self, webhook: Webhook, reached: int) -> None:
        try:
            await self._database.write(lambda tables: hooks.save_reached(tables, webhook.url, reached))
        except RegistryFailed as exc:
            logger.error("webhook.not_kept", reason=str(exc))

    async def _taken(self, webhook: Webhook, failed: int) -> int:
        """It took one; says how many in a row it did not take, which is none."""
        if failed >= TOLD_AFTER:
            await self._say("webhook.back", webhook, f"takes events again, after {failed} tries")
        return 0

    async def _not_taken(self, webhook: Webhook, failed: int, why: str) -> None:
        logger.warning("webhook.failed", webhook=webhook.name, tries=failed, reason=why)
        if failed == TOLD_AFTER:
            await self._say("webhook.failed", webhook, why)

    async def _say(self, kind: str, webhook: Webhook, text: str) -> None:
        now_ms = time.time_ns() // 1_000_000
        try:
            await self._database.write(lambda tables: events.add_own_event(tables, "", kind, webhook.name, text, now_ms))
        except RegistryFailed as exc:
            logger.error("webhook.not_told", reason=str(exc))
        self._news.tell("events")


def _after(tables: Tables, after: int) -> list[EventView]:
    rows = events.read_following(tables, after=after, limit=AT_A_TIME)
    return [msgspec.convert(msgspec.structs.asdict(row), EventView) for row in rows]
