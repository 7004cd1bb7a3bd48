"""The coordinator's MQTT session: everything that boxes say goes into one bounded queue, what boxes are told goes out."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

import aiomqtt

from skerry.runtime import backoff, lifecycle, log, mqtt
from skerry.runtime.settings import Broker
from skerry.wire import topics

logger = log.get("coordinator.session")

Message = tuple[topics.Topic, bytes]


class NotConnected(Exception):
    """The broker is not there now; what should be said is said again on the next connect."""


class FleetSession:
    """Stays connected; ``on_connected`` runs after each connect, ``on_reply`` gets a node's answer with its correlation data at once."""

    def __init__(
        self,
        broker: Broker,
        fleet: str,
        *,
        queue: "asyncio.Queue[Message]",
        on_connected: Callable[[], Awaitable[None]],
        on_reply: Callable[[str, bytes, bytes], None],
    ) -> None:
        self._broker = broker
        self._fleet = fleet
        self._queue = queue
        self._on_connected = on_connected
        self._on_reply = on_reply
        self._client: aiomqtt.Client | None = None
        self._since_ms = 0

    @property
    def listening_since_ms(self) -> int:
        """When the broker last answered, Unix milliseconds; 0 while it is not there."""
        return self._since_ms if self._client is not None else 0

    @property
    def is_connected(self) -> bool:
        """Whether the broker answered and has not been lost since."""
        return self._client is not None

    async def publish(
        self, topic: str, payload: bytes, *, retain: bool, expiry_s: int | None = None, response_topic: str = "", correlation: bytes = b""
    ) -> None:
        """Say something at QoS 1, and where it is to be answered. Raises NotConnected."""
        if self._client is None:
            raise NotConnected("the broker is not there")
        properties = mqtt.stamped(expiry_s=expiry_s, response_topic=response_topic, correlation=correlation)
        try:
            await self._client.publish(topic, payload, qos=1, retain=retain, properties=properties)
        except aiomqtt.MqttError as exc:
            raise NotConnected(str(exc)) from exc

    async def run(self, stop: asyncio.Event) -> None:
        """Stay connected until ``stop`` is set."""
        attempt = 0
        while not stop.is_set():
            try:
                size = self._queue.maxsize
                async with mqtt.connected(self._broker, f"{self._fleet}-coordinator", last_will=None, queue=size) as client:
                    logger.info("broker.connected", broker=self._broker.host, port=self._broker.port)
                    attempt = 0
                    await self._converse(client, stop)
            except (aiomqtt.MqttError, OSError, TimeoutError) as exc:
                if attempt == 0 or self._client is not None:
                    logger.warning("broker.lost", broker=self._broker.host, port=self._broker.port, reason=str(exc) or type(exc).__name__)
                delay_s = backoff.delay_s(attempt, random.random(), first_s=0.2, most_s=10.0)
                attempt += 1
                self._client = None
                await lifecycle.sleep_until(stop, delay_s)
            finally:
                self._client = None

    async def _converse(self, client: aiomqtt.Client, stop: asyncio.Event) -> None:
        for pattern in topics.up_filters(self._fleet):
            await client.subscribe(pattern, qos=1)
        self._client, self._since_ms = client, time.time_ns() // 1_000_000
        tasks = [
            asyncio.create_task(stop.wait(), name="coordinator.session.stop"),
            asyncio.create_task(self._listen(client), name="coordinator.session.listen"),
            asyncio.create_task(self._greet(), name="coordinator.session.greet"),
        ]
        try:
            pending = set(tasks)
            while not tasks[0].done():
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done - {tasks[0]}:
                    task.result()
        finally:
            await lifecycle.end(*tasks)

    async def _greet(self) -> None:
        try:
            await self._on_connected()
        except NotConnected as exc:
            logger.warning("greeting.cut", reason=str(exc))
        await asyncio.Event().wait()

    async def _listen(self, client: aiomqtt.Client) -> None:
        async for message in client.messages:
            topic = topics.parse(str(message.topic))
            if topic is None or not isinstance(message.payload, bytes | bytearray):
                continue
            if topic.branch == "reply":  # somebody waits for it: not behind what the registry must take first
                self._on_reply(topic.node, mqtt.correlation_of(message), bytes(message.payload))
            else:
                await self._queue.put((topic, bytes(message.payload)))
