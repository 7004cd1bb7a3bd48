"""``skerry what-if`` and ``skerry slowest``: what boxes tell of the requests of the last hour."""

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.markup import escape

from skerry.cli import command, output
from skerry.cli.client import EXIT_USAGE, CliError, path_of
from skerry.cli.command import Json, reporting
from skerry.wire import units
from skerry.wire.decision import MOST_KEPT_MIN, Tally, WhatIf
from skerry.wire.slowest import SlowestOfAll

WORDS = {"edge": "by the box itself", "peer": "by a neighbour", "cloud": "by the cloud", "refused": "refused"}
Name = Annotated[str, typer.Argument(help="a deployment")]
Minutes = Annotated[int, typer.Option(help="of the last so many minutes", min=1, max=MOST_KEPT_MIN)]
Node = Annotated[str, typer.Option(help="of this box alone; of those with the most requests otherwise")]


@reporting
def what_if(
    name: Name,
    deadline: Annotated[str, typer.Option(help="had the deadline been this, such as 50ms")] = "",
    split: Annotated[str, typer.Option(help="had split.mode been edge, cloud or overflow")] = "",
    cloud_budget: Annotated[int | None, typer.Option(help="had each box had so many requests an hour for the cloud", min=0)] = None,
    link: Annotated[str, typer.Option(help="had answers of other boxes taken so much longer, such as 80ms, or less long: -5ms")] = "",
    cut_off: Annotated[bool, typer.Option("--cut-off", help="had no other box been reached")] = False,
    minutes: Minutes = MOST_KEPT_MIN,
    node: Node = "",
    as_json: Json = False,
) -> None:
    """What would have become of the requests that came, had things been otherwise: boxes decide them anew."""
    query = {"minutes": str(minutes), "node": node, "split": split, "is_cut_off": "true" if cut_off else ""}
    query["deadline_ms"] = _ms(deadline, "--deadline") if deadline else ""
    query["cloud_requests_per_hour"] = "" if cloud_budget is None else str(cloud_budget)
    sign, length = ("-", link[1:]) if link.startswith("-") else ("", link)
    query["link_ms"] = f"{sign}{_ms(length, '--link')}" if link else ""
    path = path_of("deployments", name, "decisions")
    found = command.coordinator().call("GET", path, WhatIf, query={key: value for key, value in query.items() if value})
    if as_json:
        output.print_json(found)
        return
    _print_asked(found.asked, found.boxes, found.silent)
    output.console.print(f"{sum(_counts(found.before))} requests since {output.moment(found.since_ms)}, from {found.cases} of them")
    table = output.table_of("", "as it was", "as it would have been")
    for (who, word), before, after in zip(WORDS.items(), _counts(found.before), _counts(found.after), strict=True):
        change = f"  [bold]{after - before:+}[/]" if after != before else ""
        table.add_row(f"[red]{word}[/]" if who == "refused" and after else word, str(before), f"{after}{change}")
    output.console.print(table)
    if found.moved:
        moved = output.table_of("at", "box", "requests", "was", "would have been", "because")
        for one in found.moved:
            moved.add_row(output.moment(one.at_ms), escape(one.node), str(one.count), WORDS[one.before], WORDS[one.after], escape(one.text))
        output.console.print(moved)


@reporting
def slowest(name: Name, minutes: Minutes = MOST_KEPT_MIN, node: Node = "", as_json: Json = False) -> None:
    """The requests that took longest, and where the time went."""
    query = {"minutes": str(minutes)} | ({"node": node} if node else {})
    found = command.coordinator().call("GET", path_of("deployments", name, "slowest"), SlowestOfAll, query=query)
    if as_json:
        output.print_json(found)
        return
    _print_asked(found.asked, found.boxes, found.silent)
    table = output.table_of("at", "asked", "took", "of", "answered by", "where the time went", "why there")
    for one in found.requests:
        by = f"{one.who}, {one.node}" if one.node else one.who
        table.add_row(
            output.moment(one.at_ms), escape(one.asked), f"{one.took_ms:.1f} ms", f"{one.deadline_ms:.0f} ms", escape(by),
            escape(one.timing), escape(one.reason),
        )  # fmt: skip
    output.console.print(table)


def _counts(tally: Tally) -> list[int]:
    return [getattr(tally, who) for who in WORDS]


def _print_asked(asked: Sequence[str], boxes: int, silent: Sequence[str]) -> None:
    output.console.print(f"{len(asked)} of {boxes} boxes that had requests told", highlight=False)
    for reason in silent:
        output.console.print(f"  [yellow]{escape(reason)}[/]", highlight=False)


def _ms(text: str, option: str) -> str:
    try:
        return f"{units.parse_duration_us(text) / 1000:g}"
    except ValueError as exc:
        raise CliError(f"{option}: {exc}", exit_code=EXIT_USAGE) from exc
