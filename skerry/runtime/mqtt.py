"""MQTT 5 through aiomqtt, as both ends of the fleet use it: TLS, session expiry, and the schema version on every message."""

import contextlib
import socket
import ssl
import sys
from collections.abc import AsyncIterator

import aiomqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from skerry.runtime import tls
from skerry.runtime.settings import Broker, SettingsError
from skerry.wire.messages import SCHEMA_VERSION

SESSION_EXPIRY_S = 3600
CONNECT_TIMEOUT_S = 4.0
"""How long an answer to CONNECT may take; aiomqtt waits all of it when the connection breaks before the answer."""
OPERATION_TIMEOUT_S = 10.0
_RTT_AT = 68


def _tls(broker: Broker, judge: tls.Judge | None) -> ssl.SSLContext | None:
    if not broker.ca_file:
        return None
    try:
        return tls.client(broker.ca_file, broker.cert_file, broker.key_file, judge=judge)
    except (OSError, ValueError) as exc:
        raise SettingsError(f"broker.ca_file, cert_file or key_file: {exc}") from exc


def will(topic: str, payload: bytes, *, delay_s: int) -> aiomqtt.Will:
    """A retained Last Will that the broker sends ``delay_s`` after the connection died, unless the box is back by then."""
    properties = Properties(PacketTypes.WILLMESSAGE)
    properties.WillDelayInterval = delay_s
    return aiomqtt.Will(topic, payload, qos=1, retain=True, properties=properties)


@contextlib.asynccontextmanager
async def connected(
    broker: Broker, identifier: str, *, last_will: aiomqtt.Will | None, queue: int, judge: tls.Judge | None = None
) -> AsyncIterator[aiomqtt.Client]:
    """A connected client whose incoming messages wait in a queue of at most ``queue``; the broker keeps its session for an hour.

    ``judge`` says whether the broker's certificate is over (see tls.client).

    Raises aiomqtt.MqttError when the broker does not answer and when it is lost.
    """
    properties = Properties(PacketTypes.CONNECT)
    properties.SessionExpiryInterval = SESSION_EXPIRY_S
    client = aiomqtt.Client(
        broker.host,
        broker.port,
        identifier=identifier,
        protocol=aiomqtt.ProtocolVersion.V5,
        will=last_will,
        clean_start=False,
        properties=properties,
        keepalive=broker.keepalive_s,
        tls_context=_tls(broker, judge),
        timeout=CONNECT_TIMEOUT_S,
        max_queued_incoming_messages=queue,
    )
    async with client:
        client.timeout = OPERATION_TIMEOUT_S
        yield client


def stamped(*, expiry_s: int | None = None, response_topic: str = "", correlation: bytes = b"") -> Properties:
    """Properties of a published message: the schema's version; for a command, when it is stale, and where the answer is to go.

    ``correlation`` names a request and comes back in its answer (MQTT 5, 4.10).
    """
    properties = Properties(PacketTypes.PUBLISH)
    properties.UserProperty = ("schema", str(SCHEMA_VERSION))
    if expiry_s is not None:
        properties.MessageExpiryInterval = expiry_s
    if response_topic:
        properties.ResponseTopic = response_topic
    if correlation:
        properties.CorrelationData = correlation
    return properties


def response_topic_of(message: aiomqtt.Message) -> str:
    """Where the sender wants its answer; empty where it wants none."""
    return str(getattr(message.properties, "ResponseTopic", ""))


def correlation_of(message: aiomqtt.Message) -> bytes:
    """What names the request that this message is, or answers; empty where nothing does."""
    return bytes(getattr(message.properties, "CorrelationData", b""))


def rtt_ms(client: aiomqtt.Client) -> float:
    """The round trip to the broker as TCP has smoothed it (tcpi_rtt in struct tcp_info, linux/tcp.h); 0 where the kernel does not say."""
    connection = client._client.socket()
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RTT_AT + 4) if isinstance(connection, socket.socket) else b""
    except OSError:
        return 0.0
    return round(int.from_bytes(info[_RTT_AT:], sys.byteorder) / 1000, 3) if len(info) == _RTT_AT + 4 else 0.0
