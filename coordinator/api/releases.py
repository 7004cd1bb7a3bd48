"""Releases of the box software: what was pushed, and which of them every box is to run."""

import asyncio
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from sqlite_utils import Database as Tables

from coordinator.api import rollouts
from coordinator.api.access import Access
from coordinator.api.answers import Handler, json_answer, refuse
from coordinator.api.bodies import json_body
from coordinator.api.calls import ACTOR, Call, checked, chunks
from coordinator.api.rollouts import MOST_SHOWN, Title, progress
from coordinator.core import deployment, rollout, software
from coordinator.core.rollout import State
from coordinator.core.software import RULES, Release, Spread
from coordinator.model_store import ModelStore, NotTaken
from coordinator.news import News
from coordinator.registry import audit, events, finding, releases
from coordinator.registry.database import Database
from coordinator.software_rollout import Fleet, title
from skerry.release import unpack
from skerry.wire import codec, model_signature
from skerry.wire.accounts import Role
from skerry.wire.api import ReleaseView, RolloutView, SignatureState, SoftwareView, SpreadRequest, TroubleView
from skerry.wire.bundle import MAX_BUNDLE_BYTES, Bundle

OPERATOR: Role = "operator"
TAR_BLOCK, TAR_KIND = 512, slice(156, 157)
"""A header's size, and where it says what kind of entry follows (POSIX.1-2001, ustar)."""

CALLS = [
    Call("GET", "/v1/releases", "list_releases", "Releases of the box software in the store", list[ReleaseView]),
    Call(
        "PUT", "/v1/releases", "push_release", "Push a release, as `skerry release build` makes it", ReleaseView, 201, role=OPERATOR,
        body="application/octet-stream", query={"sha256": "the file's digest, checked"},
    ),
    Call(
        "PUT", "/v1/releases/{sha256}/signature", "sign_release", "Say who vouches for a release: an OpenSSF model signature", ReleaseView,
        role=OPERATOR, body=Bundle,
    ),
    Call("DELETE", "/v1/releases/{version}", "remove_release", "Forget a release", str, 204, role=OPERATOR),
    Call("GET", "/v1/software", "show_software", "Which release the boxes are to run, and which they run", SoftwareView),
    Call(
        "PUT", "/v1/software", "spread_release", "Have every box run a release, in waves", SoftwareView, 202, role=OPERATOR,
        body=SpreadRequest,
    ),
    Call("POST", "/v1/software/pause", "pause_release", "Let no further wave begin", SoftwareView, role=OPERATOR),
    Call("POST", "/v1/software/resume", "resume_release", "Go on", SoftwareView, role=OPERATOR),
    Call("POST", "/v1/software/approve", "approve_release", "Let the next wave begin", SoftwareView, role=OPERATOR),
    Call("POST", "/v1/software/abort", "abort_release", "Have every box go back to what ran before", SoftwareView, role=OPERATOR),
]  # fmt: skip


class Trusted:
    """By whose signatures releases are taken; None where this coordinator leaves it to the boxes."""

    def __init__(self, keys: Sequence[EllipticCurvePublicKey] | None) -> None:
        self._keys = keys

    def check(self, release: Release, signature: Bundle | None) -> None:
        """Raises NotVouched where keys are named and none of them signed, and for a signature that is another file's."""
        path = model_signature.release_path(release.version)
        if self._keys is not None:
            model_signature.verify_file(signature, self._keys, path=path, sha256=release.sha256)
        elif signature is not None:
            model_signature.check_file(signature, path=path, sha256=release.sha256)

    def state(self, release: Release) -> SignatureState:
        """What is shown."""
        if release.signature is None:
            return "none"
        if self._keys is None:
            return "unchecked"
        try:
            self.check(release, release.signature)
        except model_signature.NotVouched:
            return "not_trusted"
        return "verified"


class ReleaseCalls:
    """The handlers of CALLS."""

    def __init__(
        self, database: Database, store: ModelStore, trusted: Trusted, access: Access, news: News, *, changed: Callable[[], None]
    ) -> None:
        self._database = database
        self._store = store
        self._trusted = trusted
        self._access = access
        self._news = news
        self._changed = changed

    def handler(self, call: Call) -> Handler:
        """The call's method, behind the check of who calls."""
        return checked(self._access, call, getattr(self, call.handler))

    def _view(self, release: Release, *, is_new: bool = False) -> ReleaseView:
        return ReleaseView(
            *release.build, release.sha256, release.size_bytes, release.pushed_at_ms, signature=self._trusted.state(release), is_new=is_new
        )

    async def list_releases(self, _: web.Request) -> web.Response:
        """See CALLS."""
        return json_answer([self._view(release) for release in await self._database.read(releases.read_releases)])

    async def push_release(self, request: web.Request) -> web.Response:
        """See CALLS."""
        found: list[dict[str, Any]] = []

        async def look(path: Path) -> None:
            found.append(await asyncio.to_thread(_manifest, path))

        expected = request.query.get("sha256", "").lower()
        sha256, size = await self._store.receive(
            chunks(request), expected_sha256=expected, expected_bytes=request.content_length, look=look
        )  # fmt: skip
        now_ms, manifest = _now_ms(), found[0]
        pushed = Release(manifest["version"], manifest["python"], manifest["machine"], sha256, size, now_ms)

        def work(tables: Tables) -> tuple[Release, bool]:
            is_new = releases.save_release(tables, pushed)
            if is_new:
                after = f"sha256 {sha256}, {size} bytes"
                audit.append(tables, request[ACTOR], "release.pushed", " ".join(pushed.build), after=after, now_ms=now_ms)
            return releases.by_build(tables)[pushed.build], is_new

        held, is_new = await self._database.write(work)
        return json_answer(self._view(held, is_new=is_new), status=201 if is_new else 200)

    async def sign_release(self, request: web.Request) -> web.Response:
        """See CALLS."""
        signature, sha256 = await json_body(request, Bundle), request.match_info["sha256"]
        if len(codec.encode(signature)) > MAX_BUNDLE_BYTES:
            raise refuse(413, "too_large", f"the signature has more than {MAX_BUNDLE_BYTES} bytes", hint="sign the release alone")

        def work(tables: Tables) -> Release:
            held = next((release for release in releases.read_releases(tables) if release.sha256 == sha256), None)
            if held is None:
                raise _unknown(sha256)
            self._trusted.check(held, signature)
            signed = msgspec.structs.replace(held, signature=signature)
            if releases.save_release(tables, signed):
                after = f"key {signature.verification_material.public_key.hint[:16]}"
                audit.append(tables, request[ACTOR], "release.signed", " ".join(held.build), after=after, now_ms=_now_ms())
            return signed

        signed = await self._database.write(work)
        self._changed()
        return json_answer(self._view(signed))

    async def remove_release(self, request: web.Request) -> web.Response:
        """See CALLS."""
        version = request.match_info["version"]

        def work(tables: Tables) -> list[str]:
            spread = releases.read_spread(tables)
            if (
                spread is not None
                and version in (spread.version, spread.earlier)
                and not (spread.is_taken_back and version == spread.version)
            ):
                raise refuse(409, "in_use", f"boxes are to run {version}, or would go back to it", hint="see 'skerry release status'")
            gone = releases.remove_release(tables, version)
            if not gone:
                raise _unknown(version)
            audit.append(tables, request[ACTOR], "release.removed", version, before=", ".join(gone), now_ms=_now_ms())
            return gone

        for sha256 in await self._database.write(work):
            await asyncio.to_thread(self._store.remove, sha256)
        return web.Response(status=204)

    # -- which of them boxes run

    async def show_software(self, _: web.Request) -> web.Response:
        """See CALLS."""
        return json_answer(await self._database.read(view))

    async def spread_release(self, request: web.Request) -> web.Response:
        """See CALLS."""
        wanted, now_ms = await json_body(request, SpreadRequest), _now_ms()
        rules = _rules(wanted)

        def work(tables: Tables) -> None:
            self._check_known(tables, wanted)
            held = releases.read_spread(tables)
            if held is not None and not held.state.is_over:
                raise refuse(409, "spreading", f"{held.version} spreads: abort it first", hint="see 'skerry release status'")
            if (failed := releases.read_failed_spread(tables, wanted.version)) is not None and not wanted.again:
                raise refuse(
                    409, "failed_before", f"{wanted.version} was taken back: {failed.state.reason}", hint="try it again with --again"
                )
            earlier = "" if held is None else held.earlier if held.is_taken_back else held.version
            attempt = releases.count_spreads(tables, wanted.version) * software.MOST_TRIES
            spread = Spread(wanted.version, earlier, rules, State("rolling", [], now_ms, now_ms), {}, attempt, now_ms)
            releases.add_spread(tables, spread)
            audit.append(tables, request[ACTOR], "release.spread", wanted.version, before=earlier, now_ms=now_ms)
            events.add_own_event(tables, "", "rollout.began", title(spread), f"by {request[ACTOR].who}", now_ms)

        await self._database.write(work)
        return await self._answer(status=202)

    def _check_known(self, tables: Tables, wanted: SpreadRequest) -> None:
        builds = [release for release in releases.read_releases(tables) if release.version == wanted.version]
        if not builds:
            raise _unknown(wanted.version)
        for release in builds:
            if release.signature is None:
                name = f"{release.version} for Python {release.python} on {release.machine}"
                hint = "sign it: 'skerry release sign', then push it again"
                raise refuse(422, "not_vouched", f"release {name} is not signed, and boxes take no other", field="version", hint=hint)
            self._trusted.check(release, release.signature)

    async def pause_release(self, request: web.Request) -> web.Response:
        """See CALLS."""
        return await self._said(request, "rollout.paused", lambda state: rollout.paused(state, is_paused=True))

    async def resume_release(self, request: web.Request) -> web.Response:
        """See CALLS."""
        return await self._said(request, "rollout.resumed", lambda state: rollout.paused(state, is_paused=False))

    async def approve_release(self, request: web.Request) -> web.Response:
        """See CALLS."""
        return await self._said(request, "rollout.approved", rollout.approved)

    async def abort_release(self, request: web.Request) -> web.Response:
        """See CALLS."""
        return await self._said(request, "rollout.aborted", lambda state: rollout.aborted(state, f"aborted by {request[ACTOR].who}"))

    async def _said(self, request: web.Request, kind: str, change: Callable[[State], State]) -> web.Response:
        now_ms = _now_ms()

        def work(tables: Tables) -> None:
            held = releases.read_spread(tables)
            if held is None or held.state.is_over:
                raise refuse(409, "is_over", "no release spreads", hint="see 'skerry release status'")
            now = msgspec.structs.replace(held, state=change(held.state), changed_at_ms=now_ms)
            if now.state != held.state:
                releases.save_spread(tables, now)
                audit.append(tables, request[ACTOR], kind, title(now), after=f"wave {len(now.state.waves)}", now_ms=now_ms)
                events.add_own_event(tables, "", kind, title(now), f"by {request[ACTOR].who}, in wave {len(now.state.waves)}", now_ms)

        await self._database.write(work)
        return await self._answer()

    async def _answer(self, status: int = 200) -> web.Response:
        self._news.tell("nodes", "events")
        self._changed()
        return json_answer(await self._database.read(view), status=status)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _unknown(name: str) -> Exception:
    return refuse(404, "unknown_release", f"there is no release {name[:80]!r}", hint="see 'skerry release list'")


def _rules(wanted: SpreadRequest) -> rollout.Rules:
    if not wanted.rollout:
        return RULES
    try:
        given = msgspec.convert({"deadline": "30m", **wanted.rollout}, deployment.Rollout)
    except msgspec.ValidationError as exc:
        raise refuse(422, "invalid_rollout", f"rollout: {exc}", field="rollout") from exc
    return deployment.rules_of(given)


def _manifest(path: Path) -> dict[str, Any]:
    """What a release says of itself. Raises NotTaken."""
    with path.open("rb") as file:
        # Of another kind of entry the library reads a name, or attributes, of whatever length into memory.
        if file.read(TAR_BLOCK)[TAR_KIND] not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise NotTaken("invalid_release", "this is no release: it does not begin with a file")
    try:
        with tarfile.open(path, "r:") as archive:
            return unpack.read_manifest(archive)
    except (tarfile.TarError, unpack.NotUnpacked) as exc:
        raise NotTaken("invalid_release", f"this is no release: {exc}") from exc


def view(tables: Tables) -> SoftwareView:
    """As people and scripts see it."""
    spread, versions = releases.read_spread(tables), dict(sorted(finding.count_by_version(tables).items()))
    if spread is None:
        return SoftwareView("", versions, None, [])
    troubles = [TroubleView(node, said.version, said.phase, said.reason) for node, said in finding.read_troubled(tables, most=MOST_SHOWN)]
    return SoftwareView(spread.earlier if spread.is_taken_back else spread.version, versions, _rollout(tables, spread), troubles)


def spreading(tables: Tables) -> list[RolloutView]:
    """All that spreads, or did last: deployments' changes and the box software."""
    spread = releases.read_spread(tables)
    return [*rollouts.views(tables), *([_rollout(tables, spread)] if spread else [])]


def _rollout(tables: Tables, spread: Spread) -> RolloutView:
    ran = sorted(set(spread.ran.values()))
    before = ", ".join([*ran[:3], *(["..."] if len(ran) > 3 else [])]) or "what ran"
    named = Title(title(spread), (0, before), (0, spread.version), "box")
    standing = spread.standing
    if spread.state.is_over and not standing.total:  # it was over before how far it was stood on record
        standing = rollout.standing(spread.state, Fleet(tables).units(spread, {}))
    return progress(named, spread.state, spread.rules, standing, changed_at_ms=spread.changed_at_ms)
