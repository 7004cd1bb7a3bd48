"""OpenID Connect: people who are known elsewhere come in by the authorization code flow, with PKCE, a state and a nonce.

Sources: OpenID Connect Core 1.0 (3.1), OpenID Connect Discovery 1.0, RFC 7636 (PKCE), RFC 9207 (the answer's ``iss``).
"""

import base64
import hashlib
import json
import secrets
import time
from collections import OrderedDict
from typing import Any
from urllib.parse import urlencode

import aiohttp
import jwt
import msgspec

from coordinator.accounts.refusals import NotLetIn
from coordinator.config import OpenIdConnect
from coordinator.registry.identity import digest_of
from skerry.runtime import log, streams, tls
from skerry.wire.accounts import Role, is_user_name

logger = log.get("coordinator.accounts")

TIMEOUT_S = 10.0
MOST_BYTES = 256 * 1024
PENDING_S = 600
MOST_PENDING = 1000
KEYS_S = 3600
KEYS_AGAIN_S = 30
LEEWAY_S = 60
ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
"""Of keys that the provider alone holds; never ``none``, nor one that shares a secret with us."""
ROLES: tuple[Role, ...] = ("admin", "operator", "viewer")


class Known(msgspec.Struct, frozen=True):
    """Somebody whom the provider vouches for; ``subject`` is the provider and its own name for them, which never changes."""

    subject: str
    name: str
    role: Role


class _Pending(msgspec.Struct, frozen=True):
    browser_sha256: str
    nonce: str
    verifier: str
    after: str
    until: float


class _Discovered(msgspec.Struct, frozen=True):
    issuer: str
    authorization_endpoint: str
    token_endpoint: str
    jwks_uri: str


class _Tokens(msgspec.Struct, frozen=True):
    id_token: str


class Provider:
    """One provider. ``callback_url`` is the address of ours that it sends browsers back to, as it was registered there."""

    def __init__(self, settings: OpenIdConnect, callback_url: str) -> None:
        self._settings = settings
        self._callback_url = callback_url
        self._pending: OrderedDict[str, _Pending] = OrderedDict()
        self._discovered: _Discovered | None = None
        self._keys: jwt.PyJWKSet | None = None
        self._keys_at = 0.0

    @property
    def title(self) -> str:
        """What the login page calls it."""
        return self._settings.title

    async def begin(self, after: str) -> tuple[str, str]:
        """Where to send the browser, and a cookie by which it is known when it comes back. Raises NotLetIn."""
        found = await self._discover()
        now = time.monotonic()
        for state in [state for state, one in self._pending.items() if one.until <= now]:
            del self._pending[state]
        while len(self._pending) >= MOST_PENDING:
            self._pending.popitem(last=False)
        state, browser, nonce, verifier = (secrets.token_urlsafe(32) for _ in range(4))
        self._pending[state] = _Pending(digest_of(browser), nonce, verifier, after, now + PENDING_S)
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
        query = {
            "response_type": "code",
            "client_id": self._settings.client_id,
            "redirect_uri": self._callback_url,
            "scope": " ".join(self._settings.scopes),
            "state": state,
            "nonce": nonce,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        separator = "&" if "?" in found.authorization_endpoint else "?"
        return f"{found.authorization_endpoint}{separator}{urlencode(query)}", browser

    async def finish(self, browser: str, query: dict[str, str]) -> tuple[Known, str]:
        """Who came back, and where they wanted to go. Raises NotLetIn; the state is spent in any case."""
        pending = self._pending.pop(query.get("state", ""), None)
        if pending is None or pending.until <= time.monotonic() or not secrets.compare_digest(pending.browser_sha256, digest_of(browser)):
            raise NotLetIn("This login was begun elsewhere, or too long ago: begin it again.")
        if query.get("iss", self._settings.issuer) != self._settings.issuer:
            raise NotLetIn("The answer came from another provider.")
        if "error" in query or "code" not in query:
            raise NotLetIn(f"{self.title} lets you not in: {query.get('error', 'no code came')[:80]}.")
        found = await self._discover()
        form = {
            "grant_type": "authorization_code",
            "code": query["code"],
            "redirect_uri": self._callback_url,
            "client_id": self._settings.client_id,
            "code_verifier": pending.verifier,
        }
        if secret := self._secret():
            form["client_secret"] = secret
        tokens = _decoded(await self._fetch("POST", found.token_endpoint, form), _Tokens)
        return self._known(await self._claims(tokens.id_token, pending.nonce)), pending.after

    def _secret(self) -> str:
        path = self._settings.client_secret_file
        try:
            return path.read_text().strip() if path else ""
        except OSError as exc:
            logger.error("oidc.no_secret", reason=exc.strerror)
            raise NotLetIn(f"{self.title} can't be asked now.") from exc

    async def _discover(self) -> _Discovered:
        if self._discovered is None:
            issuer = self._settings.issuer.rstrip("/")
            found = _decoded(await self._fetch("GET", f"{issuer}/.well-known/openid-configuration"), _Discovered)
            if found.issuer.rstrip("/") != issuer:
                logger.error("oidc.other_issuer", configured=issuer, found=found.issuer[:200])
                raise NotLetIn(f"{self.title} calls itself by another name than the settings do.")
            self._discovered = found
        return self._discovered

    async def _key(self, kid: str) -> jwt.PyJWK:
        """The provider's key of that name; asked for anew where it is not known yet. Raises NotLetIn."""
        age_s = time.monotonic() - self._keys_at
        known = {key.key_id or "": key for key in self._keys.keys} if self._keys else {}
        if self._keys is None or age_s > KEYS_S or (kid not in known and age_s > KEYS_AGAIN_S):
            text = await self._fetch("GET", (await self._discover()).jwks_uri)
            try:
                self._keys = jwt.PyJWKSet.from_json(text.decode())
            except (jwt.PyJWTError, ValueError, KeyError, TypeError) as exc:
                raise self._fault("keys", exc) from exc
            self._keys_at = time.monotonic()
            known = {key.key_id or "": key for key in self._keys.keys}
        if not kid and len(known) == 1:  # OpenID Connect Core 10.1: a name is needed only where there are several
            return next(iter(known.values()))
        if kid not in known:
            raise self._fault("keys", KeyError(kid[:80]))
        return known[kid]

    async def _claims(self, id_token: str, nonce: str) -> dict[str, Any]:
        try:
            key = await self._key(jwt.get_unverified_header(id_token).get("kid", ""))
            claims: dict[str, Any] = jwt.decode(
                id_token, key.key, algorithms=ALGORITHMS, audience=self._settings.client_id,
                issuer=(await self._discover()).issuer, leeway=LEEWAY_S, options={"require": ["exp", "iat", "iss", "aud", "sub"]},
            )  # fmt: skip
        except (jwt.PyJWTError, ValueError, TypeError) as exc:
            raise self._fault("id_token", exc) from exc
        if not isinstance(claims.get("nonce"), str) or not secrets.compare_digest(claims["nonce"], nonce):
            raise self._fault("nonce", ValueError("it is another login's"))
        if claims.get("azp", self._settings.client_id) != self._settings.client_id:
            raise self._fault("azp", ValueError("the token is for another program"))
        return claims

    def _known(self, claims: dict[str, Any]) -> Known:
        """Raises NotLetIn."""
        name, said = claims.get(self._settings.name_claim), claims.get(self._settings.roles_claim, [])
        groups = {said} if isinstance(said, str) else {str(one) for one in said} if isinstance(said, list) else set()
        if not isinstance(name, str) or not is_user_name(name.lower()):
            raise NotLetIn(f"{self.title} says nothing that can be a name here ({self._settings.name_claim}).")
        granted = {"admin": self._settings.admins, "operator": self._settings.operators, "viewer": self._settings.viewers}
        role = next((role for role in ROLES if groups & set(granted[role])), None)
        if role is None:
            raise NotLetIn(f"{name} has no role here: {self._settings.roles_claim} holds none of the groups that the settings name.")
        return Known(f"{self._settings.issuer} {claims['sub']}", name.lower(), role)

    async def _fetch(self, method: str, url: str, form: dict[str, str] | None = None) -> bytes:
        """Raises NotLetIn."""
        context = tls.client(self._settings.ca_file) if url.startswith("https:") else True
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as session,
                session.request(
                    method, url, data=form, ssl=context, allow_redirects=False, headers={"Accept": "application/json"}
                ) as answer,
            ):
                body = await streams.beginning(answer.content, MOST_BYTES)
                if answer.status != 200:
                    raise self._fault(url, ValueError(f"status {answer.status}"))
                return body
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as exc:
            raise self._fault(url, exc) from exc

    def _fault(self, what: str, exc: Exception) -> NotLetIn:
        logger.warning("oidc.refused", what=what[:200], reason=(str(exc) or type(exc).__name__)[:300])
        return NotLetIn(f"{self.title} can't be asked now, or its answer is not to be trusted.")


def _decoded(body: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.convert(json.loads(body), kind)
    except (ValueError, RecursionError) as exc:  # msgspec.ValidationError is one
        logger.warning("oidc.refused", what=kind.__name__, reason=str(exc)[:300])
        raise NotLetIn("The provider's answer is not to be understood.") from exc
