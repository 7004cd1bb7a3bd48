"""The calls by which boxes join and stay, and those by which operators let them in and throw them out."""

from aiohttp import web

from coordinator.api.access import Access
from coordinator.api.answers import Handler, json_answer, refuse
from coordinator.api.bodies import json_body
from coordinator.api.calls import ACTOR, Call, checked
from coordinator.enrolment import Enrolment
from skerry.wire.identity import (
    CertificateView,
    ClaimMade,
    ClaimRequest,
    ClaimView,
    Enrolled,
    EnrollRequest,
    Renewed,
    RenewRequest,
    RevokeRequest,
    RootView,
)

CALLS = [
    Call(
        "GET",
        "/v1/ca",
        "show_root",
        "The root certificate; compare its fingerprint with the one that you were told",
        RootView,
        is_open=True,
    ),
    Call(
        "POST", "/v1/enroll", "enroll", "A box joins, with a claim and a signing request", Enrolled, 201, body=EnrollRequest, is_open=True
    ),
    Call("POST", "/v1/renew", "renew", "A box gets a new certificate for the key of its old one", Renewed, body=RenewRequest, is_open=True),
    Call("GET", "/v1/claims", "list_claims", "Claims, redeemed or not", list[ClaimView], role="operator"),
    Call(
        "POST",
        "/v1/claims",
        "make_claim",
        "A claim with which one box may join, told once",
        ClaimMade,
        201,
        role="operator",
        body=ClaimRequest,
    ),
    Call("DELETE", "/v1/claims/{id}", "withdraw_claim", "Take back a claim that nobody redeemed", str, 204, role="operator"),
    Call("GET", "/v1/nodes/{id}/certificates", "list_certificates", "A box's certificates that have not ended", list[CertificateView]),
    Call("POST", "/v1/nodes/{id}/revoke", "revoke", "Throw a box out, now", str, 204, role="operator", body=RevokeRequest),
]


class EnrolmentCalls:
    """The handlers of CALLS."""

    def __init__(self, enrolment: Enrolment, access: Access) -> None:
        self._enrolment = enrolment
        self._access = access

    def handler(self, call: Call) -> Handler:
        """The call's method, behind the check of who calls."""
        return checked(self._access, call, getattr(self, call.handler))

    async def show_root(self, _: web.Request) -> web.Response:
        """See CALLS."""
        return json_answer(self._enrolment.root())

    async def enroll(self, request: web.Request) -> web.Response:
        """See CALLS."""
        asked = await json_body(request, EnrollRequest)
        return json_answer(await self._enrolment.enroll(asked, address=self._access.address_of(request)), status=201)

    async def renew(self, request: web.Request) -> web.Response:
        """See CALLS."""
        return json_answer(await self._enrolment.renew(await json_body(request, RenewRequest)))

    async def list_claims(self, _: web.Request) -> web.Response:
        """See CALLS."""
        return json_answer(await self._enrolment.claims())

    async def make_claim(self, request: web.Request) -> web.Response:
        """See CALLS."""
        return json_answer(await self._enrolment.make_claim(await json_body(request, ClaimRequest), request[ACTOR]), status=201)

    async def withdraw_claim(self, request: web.Request) -> web.Response:
        """See CALLS."""
        if not await self._enrolment.withdraw(request.match_info["id"], request[ACTOR]):
            raise refuse(404, "not_found", f"there is no claim {request.match_info['id']!r} that nobody redeemed")
        return web.Response(status=204)

    async def list_certificates(self, request: web.Request) -> web.Response:
        """See CALLS."""
        return json_answer(await self._enrolment.certificates(request.match_info["id"]))

    async def revoke(self, request: web.Request) -> web.Response:
        """See CALLS."""
        node = request.match_info["id"]
        if not await self._enrolment.revoke(node, (await json_body(request, RevokeRequest)).reason, request[ACTOR]):
            raise refuse(404, "not_found", f"no box {node!r} is enrolled", hint="see 'skerry node list'")
        return web.Response(status=204)
