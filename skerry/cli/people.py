"""``skerry user``, ``skerry token`` and ``skerry audit``: who may look and act, and who changed what."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from skerry.cli import command, output
from skerry.cli.client import EXIT_FAILED, EXIT_USAGE, CliError, Coordinator, path_of
from skerry.cli.command import Json, reporting
from skerry.cli.output import minute
from skerry.wire import codec
from skerry.wire.accounts import Invited, RoleRequest, TokenMade, TokenRequest, TokenView, UserRequest, UserView, WhoView
from skerry.wire.audit import AuditPage, Broken, Chain, Record
from skerry.wire.units import parse_duration_ms

PAGE = 1000
MOST_LINE_BYTES = 2**20

user_app = typer.Typer(no_args_is_help=True, help="Who may log in; for admins.")
token_app = typer.Typer(no_args_is_help=True, help="Tokens with which programs act for you.")
audit_app = typer.Typer(no_args_is_help=True, help="Who changed what.")


@reporting
def whoami(as_json: Json = False) -> None:
    """Who you are to the coordinator, and what you may do."""
    view = command.coordinator().call("GET", path_of("me"), WhoView)
    if as_json:
        output.print_json(view)
    else:
        output.console.print(escape(f"{view.name}, {view.role}, by {view.via}"))


# -- users


@user_app.command("list")
@reporting
def user_list(as_json: Json = False) -> None:
    """Every user."""
    views = command.coordinator().call("GET", path_of("users"), list[UserView])
    if as_json:
        output.print_json(views)
        return
    table = output.table_of("name", "role", "since", "password")
    for view in views:
        password = "set" if view.has_password else "invited" if view.is_invited else "the link ended"
        table.add_row(escape(view.name), view.role, minute(view.created_at_ms), password)
    output.console.print(table)


@user_app.command("invite")
@reporting
def user_invite(
    name: Annotated[str, typer.Argument(help="a-z, 0-9 and . _ @ + -")],
    role: Annotated[str, typer.Option(help="viewer, operator or admin")] = "viewer",
    again: Annotated[bool, typer.Option("--again", help="a new link for somebody who lost theirs, or the password")] = False,
    as_json: Json = False,
) -> None:
    """Let somebody in: prints a link with which they set a password, once, within a week."""
    coordinator = command.coordinator()
    if again:
        invited = coordinator.call("POST", path_of("users", name, "invitation"), Invited)
    else:
        body = _request({"name": name, "role": role}, UserRequest)
        invited = coordinator.call("POST", path_of("users"), Invited, body=body)
    if as_json:
        output.print_json(invited)
    else:
        output.errors.print(escape(f"for {invited.name}, {invited.role}, until {minute(invited.expires_at_ms)}; it is not shown again:"))
        output.console.print(escape(invited.url), soft_wrap=True)


@user_app.command("role")
@reporting
def user_role(name: str, role: Annotated[str, typer.Argument(help="viewer, operator or admin")], as_json: Json = False) -> None:
    """What somebody may do from now on."""
    body = _request({"role": role}, RoleRequest)
    command.coordinator().call("PUT", path_of("users", name, "role"), type(None), body=body)
    output.done(f"{name} is {role}", as_json)


@user_app.command("remove")
@reporting
def user_remove(name: str, as_json: Json = False) -> None:
    """Remove a user; their sessions and tokens end at once."""
    command.coordinator().call("DELETE", path_of("users", name), type(None))
    output.done(f"{name} is removed", as_json)


# -- tokens


@token_app.command("list")
@reporting
def token_list(as_json: Json = False) -> None:
    """Your tokens; an admin sees everybody's."""
    views = command.coordinator().call("GET", path_of("tokens"), list[TokenView])
    if as_json:
        output.print_json(views)
        return
    table = output.table_of("number", "for", "of", "role", "made", "last used", "ends")
    for view in views:
        used = minute(view.used_at_ms) if view.used_at_ms else "never"
        table.add_row(
            view.id, escape(view.title), escape(view.user), view.role, minute(view.created_at_ms), used, minute(view.expires_at_ms)
        )
    output.console.print(table)


@token_app.command("make")
@reporting
def token_make(
    title: Annotated[str, typer.Argument(help="what it is for")],
    role: Annotated[str, typer.Option(help="viewer, operator or admin; at most what you are")] = "viewer",
    expires: Annotated[str, typer.Option(help="how long it is good for, as in 12h or 30d; 366d at most")] = "90d",
    as_json: Json = False,
) -> None:
    """Make a token and print it; it is not shown again."""
    try:
        expires_s = parse_duration_ms(expires) // 1000
    except ValueError as exc:
        raise CliError(f"--expires: {exc}", exit_code=EXIT_USAGE) from exc
    body = _request({"title": title, "role": role, "expires_s": expires_s}, TokenRequest)
    made = command.coordinator().call("POST", path_of("tokens"), TokenMade, body=body)
    if as_json:
        output.print_json(made)
    else:
        output.errors.print(escape(f"number {made.id}, {made.role}, until {minute(made.expires_at_ms)}; it is not shown again:"))
        output.console.print(escape(made.token), soft_wrap=True)


@token_app.command("withdraw")
@reporting
def token_withdraw(token: Annotated[str, typer.Argument(help="its number")], as_json: Json = False) -> None:
    """A token is good for nothing from now on."""
    command.coordinator().call("DELETE", path_of("tokens", token), type(None))
    output.done(f"token {token} is withdrawn", as_json)


# -- the record


@audit_app.command("list")
@reporting
def audit_list(
    subject: Annotated[str, typer.Option(help="only about this: a deployment, a box, a user")] = "",
    who: Annotated[str, typer.Option(help="only by this one")] = "",
    limit: Annotated[int, typer.Option(help="how many of the newest", min=1, max=PAGE)] = 50,
    as_json: Json = False,
) -> None:
    """What was changed lately, and by whom."""
    query = {"subject": subject, "who": who, "limit": str(limit)}
    page = command.coordinator().call("GET", path_of("audit"), AuditPage, query=query)
    if as_json:
        output.print_json(page.records)
        return
    for record in reversed(page.records):
        change = " -> ".join(filter(None, [_first_line(record.before), _first_line(record.after)]))
        where = f" from {record.address}" if record.address else ""
        line = f"{record.id:>6}  {minute(record.at_ms)}  {record.who} ({record.via}{where})  {record.action} {record.subject}  {change}"
        output.console.print(escape(line), soft_wrap=True, highlight=False)


@audit_app.command("export")
@reporting
def audit_export(after: Annotated[int, typer.Option(help="only what comes behind this number", min=0)] = 0) -> None:
    """Print every record in order, one line of JSON each."""
    coordinator = command.coordinator()
    while page := _page(coordinator, after).records:
        for record in page:
            sys.stdout.write(codec.encode(record).decode() + "\n")
        after = page[-1].id


@audit_app.command("verify")
@reporting
def audit_verify(
    file: Annotated[Path | None, typer.Option(help="an export, instead of what the coordinator has")] = None,
    known: Annotated[str, typer.Option(help="NUMBER:DIGEST that an earlier run printed, which must stand there still")] = "",
    as_json: Json = False,
) -> None:
    """Check that no record was changed or removed. Note what it prints: with --known it finds a chain that was written anew, too."""
    number, _, noted = known.partition(":")
    if known and not (number.isdigit() and len(noted) == 64):
        raise CliError("--known is not NUMBER:DIGEST", exit_code=EXIT_USAGE)
    chain = Chain()
    try:
        if file is not None:
            _verify_file(chain, file, int(number or 0), noted)
        else:
            _verify_held(chain, command.coordinator(), int(number or 0), noted)
        if chain.count < int(number or 0):
            raise Broken(f"record {number} is missing, and was there when its digest was noted")
    except Broken as exc:
        raise CliError(f"the record does not hold: {exc}", exit_code=EXIT_FAILED) from exc
    if as_json:
        output.print_json({"records": chain.count, "head": chain.head})
    else:
        output.console.print(f"{chain.count} records hold; note {chain.count}:{chain.head}", soft_wrap=True, highlight=False)


def _verify_held(chain: Chain, coordinator: Coordinator, number: int, noted: str) -> None:
    while True:
        page = _page(coordinator, chain.count)
        if not page.records:
            chain.close(page.last_id)
            return
        for record in page.records:
            _follow(chain, record, number, noted)


def _verify_file(chain: Chain, file: Path, number: int, noted: str) -> None:
    try:
        with file.open("rb") as lines:
            while line := lines.readline(MOST_LINE_BYTES):
                _follow(chain, codec.decode(line, Record, max_bytes=MOST_LINE_BYTES), number, noted)
    except (OSError, codec.Malformed) as exc:
        raise CliError(f"{file}: {exc}", exit_code=EXIT_USAGE) from exc


def _follow(chain: Chain, record: Record, number: int, noted: str) -> None:
    chain.follow([record])
    if record.id == number and record.sha256 != noted:
        raise Broken(f"record {number} has another digest than was noted: all up to it was written anew")


def _page(coordinator: Coordinator, after: int) -> AuditPage:
    return coordinator.call("GET", path_of("audit"), AuditPage, query={"after": str(after), "limit": str(PAGE)})


def _request(fields: dict[str, object], kind: type) -> bytes:
    try:
        return codec.encode(codec.decode(codec.encode(fields), kind))
    except codec.Malformed as exc:
        raise CliError(str(exc), exit_code=EXIT_USAGE) from exc


def _first_line(text: str) -> str:
    lines = text.splitlines()
    return lines[0][:80] + (" …" if len(lines) > 1 or len(lines[0]) > 80 else "") if lines else ""
