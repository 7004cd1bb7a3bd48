"""What a webhook is sent, and how it can tell that it is ours: the Standard Webhooks specification (standardwebhooks.com, 1.0.0). Pure."""

import base64
import hashlib
import hmac
from collections.abc import Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any

from skerry.wire import codec
from skerry.wire.api import EventView

PREFIX = "whsec_"
LEAST_SECRET_BYTES = 16
FIRST_S, MOST_S = 1.0, 300.0
"""Between two tries: the first pause, and the longest."""


class NotASecret(ValueError):
    """The text says why."""


def secret_of(text: str) -> bytes:
    """The key of a secret as the specification writes it: ``whsec_`` and base64 of 16 to 64 bytes and more. Raises NotASecret."""
    plain = text.strip()
    if not plain.startswith(PREFIX):
        raise NotASecret(f"a webhook's secret begins with {PREFIX}")
    try:
        key = base64.b64decode(plain.removeprefix(PREFIX), validate=True)
    except ValueError as exc:
        raise NotASecret(f"what follows {PREFIX} is not base64") from exc
    if len(key) < LEAST_SECRET_BYTES:
        raise NotASecret(f"a webhook's secret has {LEAST_SECRET_BYTES} bytes or more, this one has {len(key)}")
    return key


def is_wanted(event: EventView, kinds: Sequence[str]) -> bool:
    """Whether one of the patterns fits its kind, as in ``replica.*``."""
    return any(fnmatchcase(event.kind, kind) for kind in kinds)


def body_of(event: EventView, fleet: str) -> bytes:
    """An event as it is sent: ``type``, ``timestamp`` (ISO 8601) and ``data``."""
    at = datetime.fromtimestamp(event.at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    said: dict[str, Any] = {"type": event.kind, "timestamp": at, "data": {"fleet": fleet, "event": event}}
    return codec.encode(said)


def headers_of(fleet: str, event: EventView, body: bytes, key: bytes | None, *, now_s: int) -> dict[str, str]:
    """Number, time and signature. The number is the same at each try: who gets an event twice can tell."""
    number = f"{fleet}-{event.id}"
    headers = {"Content-Type": "application/json", "webhook-id": number, "webhook-timestamp": str(now_s)}
    if key is not None:
        signed = hmac.new(key, f"{number}.{now_s}.".encode() + body, hashlib.sha256).digest()
        headers["webhook-signature"] = f"v1,{base64.b64encode(signed).decode()}"
    return headers
