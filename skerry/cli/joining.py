"""``skerry node …``: who may join the fleet, and who is thrown out."""

import time
from typing import Annotated

import typer
from rich.markup import escape

from skerry.cli import command, output
from skerry.cli.client import EXIT_USAGE, CliError, path_of
from skerry.cli.command import Json, reporting
from skerry.cli.output import minute
from skerry.wire import codec
from skerry.wire.identity import CertificateView, ClaimMade, ClaimRequest, ClaimView, RevokeRequest
from skerry.wire.units import parse_duration_ms


def attach(app: typer.Typer) -> None:
    """Add these commands to ``skerry node``."""
    app.command("token")(token)
    app.command("tokens")(tokens)
    app.command("withdraw-token")(withdraw)
    app.command("certificates")(certificates)
    app.command("revoke")(revoke)


@reporting
def token(
    label: Annotated[list[str] | None, typer.Option(help="KEY=VALUE, which the box gets and can't change; again for more")] = None,
    name: Annotated[str, typer.Option(help="the only name that it is good for; needed to enrol a box anew with another key")] = "",
    tier: Annotated[str, typer.Option(help="edge or cloud: what the box is, and can't change")] = "edge",
    expires: Annotated[str, typer.Option(help="how long it may be redeemed, as in 90m or 7d; 30d at most")] = "24h",
    as_json: Json = False,
) -> None:
    """Make a claim with which one box may join, and say what to type on the box."""
    pairs = [text.partition("=") for text in label or []]
    if wrong := [text for text, (key, separator, _) in zip(label or [], pairs, strict=True) if not key or not separator]:
        raise CliError(f"--label {wrong[0]!r} is not KEY=VALUE", exit_code=EXIT_USAGE)
    try:
        expires_s = parse_duration_ms(expires) // 1000
    except ValueError as exc:
        raise CliError(f"--expires: {exc}", exit_code=EXIT_USAGE) from exc
    fields = {"labels": {key: value for key, _, value in pairs}, "node": name or None, "tier": tier, "expires_s": expires_s}
    try:
        body = codec.encode(codec.decode(codec.encode(fields), ClaimRequest))
    except codec.Malformed as exc:
        raise CliError(str(exc), exit_code=EXIT_USAGE) from exc
    made = command.coordinator().call("POST", path_of("claims"), ClaimMade, body=body)
    if as_json:
        output.print_json(made)
        return
    output.console.print(
        f"good for one box until {minute(made.expires_at_ms)}; it is not shown again:\n\n  {escape(made.claim)}\n", soft_wrap=True
    )
    output.console.print(
        f"On the box, whose settings name {escape(made.coordinator)}, type this and then the claim:\n\n"
        f"  skerry-agent enroll --config /etc/skerry/agent.toml --fingerprint {made.fingerprint}",
        soft_wrap=True,
    )


@reporting
def tokens(as_json: Json = False) -> None:
    """Claims that were made, and what became of them."""
    views = command.coordinator().call("GET", path_of("claims"), list[ClaimView])
    if as_json:
        output.print_json(views)
        return
    now_ms = time.time() * 1000
    for view in views:
        state = f"redeemed by {view.used_by} {minute(view.used_at_ms)}" if view.used_at_ms else (
            f"open until {minute(view.expires_at_ms)}" if view.expires_at_ms > now_ms else f"ended {minute(view.expires_at_ms)}"
        )  # fmt: skip
        bound = [*(f"{key}={value}" for key, value in view.labels.items()), *filter(None, [view.node, view.tier])]
        output.console.print(f"{view.id}  {escape(state)}  {escape(' '.join(bound))}", soft_wrap=True, highlight=False)


@reporting
def withdraw(claim: Annotated[str, typer.Argument(help="its number, as 'skerry node tokens' shows it")], as_json: Json = False) -> None:
    """Take back a claim that nobody redeemed."""
    command.coordinator().call("DELETE", path_of("claims", claim), type(None))
    output.done(f"claim {claim} is withdrawn", as_json)


@reporting
def certificates(name: str, as_json: Json = False) -> None:
    """A box's certificates that have not ended."""
    views = command.coordinator().call("GET", path_of("nodes", name, "certificates"), list[CertificateView])
    if as_json:
        output.print_json(views)
        return
    for view in views:
        state = f"revoked {minute(view.revoked_at_ms)}: {view.reason}" if view.revoked_at_ms else "good"
        line = f"{view.serial}  {minute(view.not_before_ms)} to {minute(view.not_after_ms)}  {escape(state)}"
        output.console.print(line, soft_wrap=True, highlight=False)


@reporting
def revoke(
    name: Annotated[str, typer.Argument(help="the box")],
    reason: Annotated[str, typer.Option(help="kept with the certificates and in the events")] = "",
    as_json: Json = False,
) -> None:
    """Throw a box out: its certificates and its token are good for nothing from now on. It comes back with a new claim that names it."""
    command.coordinator().call("POST", path_of("nodes", name, "revoke"), type(None), body=codec.encode(RevokeRequest(reason)))
    output.done(f"{name} is thrown out", as_json)
