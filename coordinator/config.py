"""The coordinator's settings."""

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import msgspec

from coordinator.core.hook import secret_of
from skerry.runtime.settings import Broker, SettingsError, is_loopback, split_listen
from skerry.wire.messages import MOST_ADDRESSES
from skerry.wire.topics import Name

MOST_WEBHOOKS = 16
MOST_KINDS = 32


class OpenIdConnect(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Table ``[openid_connect]``: people who log in elsewhere. A group of theirs gives the role; who has none of these is not let in."""

    issuer: str
    client_id: str
    client_secret_file: Path | None = None
    title: str = "single sign-on"
    ca_file: str = ""
    scopes: list[str] = msgspec.field(default_factory=lambda: ["openid", "profile", "email"])
    name_claim: str = "preferred_username"
    roles_claim: str = "groups"
    admins: list[str] = []
    operators: list[str] = []
    viewers: list[str] = []

    def __post_init__(self) -> None:
        parts = urlsplit(self.issuer)
        if not (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))):
            raise ValueError(f"issuer: {self.issuer} is not https://")
        if not (self.admins or self.operators or self.viewers):
            raise ValueError("admins, operators, viewers: without a group nobody is let in")


class Announce(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where boxes are told to find broker and coordinator, before where their settings say: for a move, or for a second way."""

    brokers: list[str] = []
    """host:port, in the order in which they are tried."""
    coordinator: str = ""
    """Its URL, from which boxes fetch models and certificates."""

    def __post_init__(self) -> None:
        if len(self.brokers) > MOST_ADDRESSES:
            raise ValueError(f"announce.brokers: names more than {MOST_ADDRESSES}")
        for address in self.brokers:
            try:
                split_listen(address)
            except SettingsError as exc:
                raise ValueError(f"announce.brokers: {address[:80]!r} is not host:port") from exc
        if self.coordinator and not self.coordinator.startswith(("http://", "https://")):
            raise ValueError(f"announce.coordinator: {self.coordinator[:80]!r} is not an http:// or https:// address")


class Webhook(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Table ``[[webhooks]]``: somebody who is told of events as they come."""

    url: str
    secret_file: Path | None = None
    """Holds the secret by which the receiver tells that they are ours, as ``whsec_`` and base64 of 16 bytes or more."""
    kinds: list[str] = msgspec.field(default_factory=lambda: ["*"])
    """Of events, with ``*`` for any part."""
    title: str = ""
    """What its own events call it; its host where none is given."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if not (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))):
            raise ValueError(f"webhooks.url: {self.url[:80]!r} is not https://")
        if not self.kinds or len(self.kinds) > MOST_KINDS:
            raise ValueError(f"webhooks.kinds: 1 to {MOST_KINDS}, {len(self.kinds)} are given")

    @property
    def name(self) -> str:
        """Without what may be secret in an address."""
        return self.title or urlsplit(self.url).hostname or "webhook"

    def key(self) -> bytes | None:
        """Of the secret's file. Raises SettingsError."""
        if self.secret_file is None:
            return None
        try:
            return secret_of(self.secret_file.read_text())
        except (OSError, ValueError) as exc:
            raise SettingsError(f"webhooks.secret_file: {self.secret_file}: {exc}") from exc


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``/etc/skerry/coordinator.toml``."""

    fleet: Name
    state_dir: Path
    listen: str
    public_url: str
    broker: Broker
    announce: Announce = Announce()
    signer_socket: Path | None = None
    """Where ``skerry-signer`` listens; where none is named, the key lies in ``state_dir`` and this program signs."""
    desired_days: Annotated[float, msgspec.Meta(ge=0.001, le=365)] = 30.0
    """How long what boxes are told may be taken by one that does not hold it; it is told anew after half of that."""
    certificate_days: Annotated[float, msgspec.Meta(ge=0.001, le=365)] = 7.0
    """How long the certificates of boxes last; they renew theirs after two thirds of it."""
    revoked_list_file: Path | None = None
    """Where the list of revoked certificates is written for the broker; ``state_dir/ca/revoked.pem`` where none is named."""
    broker_hosts: list[str] = []
    """Names and addresses by which boxes reach the broker, for its certificate; where none is given, ``broker.host``."""
    require_enrolled: bool = False
    """Pass over what boxes say that did not enrol. A broker that asks for certificates turns them away itself."""
    tls: bool = False
    """Serve HTTPS with a certificate of the fleet's own authority, for the host of ``public_url``."""
    plain_http: bool = False
    """Listen beyond this machine without TLS: passwords and tokens can then be read on the way."""
    openid_connect: OpenIdConnect | None = None
    """People who are known elsewhere; without it they log in by passwords alone."""
    webhooks: list[Webhook] = []
    """Who is told of events as they come; see Webhook."""
    behind_proxy: bool = False
    """Whether a proxy in front tells callers' addresses (X-Forwarded-For) and TLS (X-Forwarded-Proto); else anybody could."""
    model_keys_file: Path | None = None
    """Public keys (PEM) by which models must be signed: where it is named, only such a model is deployed."""
    release_keys_file: Path | None = None
    """Public keys (PEM) by which releases of the box software must be signed. Boxes look for themselves, by keys of their own."""
    model_limit_bytes: Annotated[int, msgspec.Meta(ge=1024)] = 4 * 2**30
    """Largest model that may be pushed."""
    queue: Annotated[int, msgspec.Meta(ge=100, le=1_000_000)] = 20_000
    """Messages from boxes that wait to be taken in."""
    lost_after_s: Annotated[float, msgspec.Meta(ge=1)] = 60.0
    """How long a box must be silent to be called lost. What is done about it each deployment says (``disconnect``)."""
    rollup_s: Annotated[int, msgspec.Meta(ge=1, le=3600)] = 5
    """Width of a stored bucket of measurements."""
    keep_rollups_h: Annotated[int, msgspec.Meta(ge=1)] = 48
    keep_events: Annotated[int, msgspec.Meta(ge=1000)] = 1_000_000

    def __post_init__(self) -> None:
        if len(self.webhooks) > MOST_WEBHOOKS or len({one.url for one in self.webhooks}) != len(self.webhooks):
            raise ValueError(f"webhooks: at most {MOST_WEBHOOKS}, each with a url of its own")
        try:
            host = split_listen(self.listen)[0]
        except SettingsError as exc:
            raise ValueError(str(exc)) from exc
        if not (self.tls or self.plain_http or is_loopback(host)):
            raise ValueError(
                f"listen: {self.listen} is reached from other machines, and without TLS: set `tls = true`, listen on 127.0.0.1 behind a"
                " proxy that has TLS, or say `plain_http = true`"
            )
