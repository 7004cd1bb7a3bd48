"""The signer's Unix socket: HTTP, one call to have a document signed and one to learn the keys. Whoever reaches it may ask."""

import asyncio
import os
import signal
import time

from aiohttp import web

from coordinator.signer.config import Config
from coordinator.signer.keyring import Keyring, KeyUnusable
from skerry.runtime import lifecycle, log, refusals, sdnotify, settings
from skerry.wire import codec
from skerry.wire.messages import Desired
from skerry.wire.signer import Keys

logger = log.get("signer")

SHUTDOWN_S = 1.0
MS_PER_DAY = 86_400_000


class Service:
    """Signs what is a document of this fleet, for a time that is bounded; says in its log what it signed."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._keyring = Keyring(config.state_dir, config.fleet)

    def app(self) -> web.Application:
        """Its calls."""
        app = web.Application(client_max_size=codec.MAX_MESSAGE_BYTES)
        app.add_routes([web.post("/v1/sign", self._sign), web.get("/v1/keys", self._keys)])
        return app

    def reload(self) -> None:
        """After ``skerry-signer rotate`` or ``retire`` changed the files."""
        try:
            self._keyring = Keyring(self._config.state_dir, self._config.fleet)
        except (KeyUnusable, OSError) as exc:
            logger.error("keys.not_reloaded", reason=str(exc))
        else:
            logger.info("keys.reloaded", key_id=self._keyring.key_id, retired=self._keyring.retired)

    async def _keys(self, _: web.Request) -> web.Response:
        keys = Keys(self._keyring.public_key, self._keyring.retired)
        return web.Response(body=codec.encode(keys), content_type="application/json")

    async def _sign(self, request: web.Request) -> web.Response:
        try:
            desired = codec.decode(await request.read(), Desired)
        except codec.Malformed as exc:
            return self._refusal(str(exc))
        ahead_ms = desired.issued_at_ms - time.time_ns() // 1_000_000
        most_ms = int(self._config.most_days * MS_PER_DAY)
        if desired.fleet != self._config.fleet:
            return self._refusal(f"fleet: {desired.fleet[:80]!r} is not {self._config.fleet}")
        if ahead_ms > most_ms:  # boxes take it for proof of the time, and would take no true one for as long
            return self._refusal(f"issued_at_ms: {desired.issued_at_ms} is {ahead_ms} ms ahead of this clock")
        if not 0 < desired.expires_at_ms - desired.issued_at_ms <= most_ms:
            return self._refusal(f"expires_at_ms: {desired.expires_at_ms}: more than {self._config.most_days:g} days are not signed for")
        envelope = self._keyring.sign(desired)
        logger.info("signed", node=desired.node, generation=desired.generation, replicas=len(desired.replicas), key_id=self._keyring.key_id)
        return web.Response(body=envelope, content_type="application/json")

    @staticmethod
    def _refusal(reason: str) -> web.Response:
        refusals.count("document.refused", reason)
        return web.Response(status=422, text=reason[:1000])


async def main(config: Config, stop: asyncio.Event) -> None:
    """Serve until ``stop`` is set; SIGHUP has the keys read again."""
    try:
        service = Service(config)
    except (KeyUnusable, OSError) as exc:
        raise settings.SettingsError(f"state_dir: {exc}") from exc
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, service.reload)
    runner = web.AppRunner(service.app(), access_log=None, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    try:
        config.socket.parent.mkdir(parents=True, exist_ok=True)
        config.socket.unlink(missing_ok=True)
        await web.UnixSite(runner, str(config.socket)).start()
        os.chmod(config.socket, 0o660)  # noqa: PTH101 - the group is the coordinator's
        logger.info("signer.up", socket=str(config.socket))
        sdnotify.notify("READY=1")
        await lifecycle.feed_watchdog(stop, lambda: True)
        await stop.wait()
    finally:
        await runner.cleanup()
