"""``skerry rollout``: changes of deployments that spread in waves."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from skerry.cli import command, output
from skerry.cli.client import EXIT_FAILED, CliError, Coordinator, path_of
from skerry.cli.command import Json, reporting
from skerry.cli.output import moment
from skerry.wire.api import RolloutView

LOOK_EVERY_S = 1.0
BAR = 40
OVER = ("done", "failed", "aborted")
PHASES = {
    "rolling": "[blue]spreading[/]", "waiting": "[yellow]waits to be approved[/]", "done": "[green]done[/]",
    "failed": "[red]failed[/]", "aborted": "[yellow]aborted[/]",
}  # fmt: skip

app = typer.Typer(no_args_is_help=True, help="Changes of deployments that spread in waves.")

Name = Annotated[str, typer.Argument(help="the deployment")]


@app.command("list")
@reporting
def rollout_list(as_json: Json = False) -> None:
    """The last change of each deployment that spreads its changes."""
    views = command.coordinator().call("GET", path_of("rollouts"), list[RolloutView])
    if as_json:
        output.print_json(views)
        return
    table = output.table_of("deployment", "change", "state", "wave", "ready", "since")
    for view in views:
        table.add_row(
            escape(view.deployment), escape(f"{view.before_model} to {view.model}"), _state(view), f"{view.wave} of {len(view.targets)}",
            f"{view.ready}/{view.total}", moment(view.changed_at_ms),
        )  # fmt: skip
    output.console.print(table if views else "no deployment was changed yet that says 'rollout:'")


@app.command("show")
@reporting
def rollout_show(
    name: Name,
    watch: Annotated[bool, typer.Option("--watch", help="until it is over; the exit code says how it ended")] = False,
    as_json: Json = False,
) -> None:
    """How far a change is, wave by wave."""
    coordinator = command.coordinator()
    now = coordinator.call("GET", path_of("rollouts", name), RolloutView)
    view = follow(coordinator, name, is_quiet=as_json) if watch else now
    if as_json:
        output.print_json(view)
    else:
        output.console.print(drawn(view, time.time() * 1000))
    if watch and view.phase != "done":
        raise CliError(f"{name}: {view.phase}: {view.reason}", exit_code=EXIT_FAILED)


def follow(coordinator: Coordinator, name: str, *, is_quiet: bool, timeout_s: float = math.inf) -> RolloutView:
    """Look until it is over, and draw it where somebody sees it; returns it as it is then. Raises CliError when that takes too long."""

    def look() -> RolloutView:
        return coordinator.call("GET", path_of("rollouts", name), RolloutView)

    return watched(look, is_quiet=is_quiet, timeout_s=timeout_s)


def watched(look: Callable[[], RolloutView], *, is_quiet: bool, timeout_s: float = math.inf) -> RolloutView:
    """The same of anything that spreads."""
    deadline = time.monotonic() + timeout_s
    view = look()
    is_drawn = output.errors.is_terminal and not is_quiet
    with Live(drawn(view, time.time() * 1000), console=output.errors, refresh_per_second=4) if is_drawn else nullcontext() as live:
        while view.phase not in OVER:
            if time.monotonic() > deadline:
                hint = f"it goes on: skerry rollout show {view.deployment} --watch"
                raise CliError(f"{view.deployment}: not over after {timeout_s:g} s, in wave {view.wave} of {len(view.targets)}", hint=hint)
            time.sleep(LOOK_EVERY_S)
            view = look()
            if live is not None:
                live.update(drawn(view, time.time() * 1000))
    return view


def _state(view: RolloutView) -> str:
    return PHASES[view.phase] + (", [yellow]paused[/]" if view.is_paused and view.phase not in OVER else "")


def _generation(number: int) -> str:
    """Deployments have one, releases of the box software none."""
    return f" (generation {number})" if number else ""


def drawn(view: RolloutView, now_ms: float) -> Group:
    """A rollout as people see it: a bar, and each wave's place on it."""
    units = "boxes" if view.unit == "box" else "replicas"
    head = Text.from_markup(
        f"[bold]{escape(view.deployment)}[/]  {escape(view.before_model)}{_generation(view.before_generation)} to "
        f"{escape(view.model)}{_generation(view.generation)}  {_state(view)}"
    )
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        ProgressBar(total=max(1, view.total), completed=view.ready, width=BAR), f"{view.ready} of {view.total} {units} ready",
        f"{view.admitted} let in" + (f", {view.away} away" if view.away else ""),
    )  # fmt: skip
    lines = [Text.from_markup(f"  {_shadow(view, now_ms)}")] if view.is_shadow or view.compared else []
    for number, target in enumerate(view.targets, 1):
        if number < view.wave or view.phase == "done":
            said = "[green]good[/]"
        elif number > view.wave or view.phase in OVER or view.is_shadow:
            said = "[dim]not begun[/]" if number > view.wave or view.is_shadow else _state(view)
        else:
            said = _present(view, now_ms)
        lines.append(Text.from_markup(f"  wave {number}: {target} of {view.total} {units}  {said}"))
    reason = [Text(f"  {view.reason}", style="red")] if view.reason else []
    return Group(head, bar, *lines, *reason)


def _shadow(view: RolloutView, now_ms: float) -> str:
    said = f"beside what serves: {view.compared} answers compared, {view.differed} were others"
    return f"{said}  {_present(view, now_ms)}" if view.is_shadow else said


def _present(view: RolloutView, now_ms: float) -> str:
    if view.phase == "waiting":
        verb = f"rollout approve {escape(view.deployment)}" if view.generation else "release approve"
        return f"good; the next waits for: skerry {verb}"
    names = f" ({escape(', '.join(view.wave_units[:3]))}{', ...' if len(view.wave_units) > 3 else ''})" if view.wave_units else ""
    if not view.ready_since_ms:
        return f"getting ready for {max(0, now_ms - view.wave_since_ms) / 1000:.0f} s{names}"
    left_s = max(0.0, (view.ready_since_ms + view.observe_ms - now_ms) / 1000)
    return f"ready, watched for another {left_s:.0f} s{names}"


def _said(name: str, verb: str, text: str, *, as_json: bool) -> None:
    view = command.coordinator().call("POST", path_of("rollouts", name, verb), RolloutView)
    if as_json:
        output.print_json(view)
    else:
        output.console.print(text)


@app.command("pause")
@reporting
def rollout_pause(name: Name, as_json: Json = False) -> None:
    """Let no further wave begin; the present one is watched on, and taken back if it is no good."""
    _said(name, "pause", f"{escape(name)}: no further wave begins until 'skerry rollout resume {escape(name)}'", as_json=as_json)


@app.command("resume")
@reporting
def rollout_resume(name: Name, as_json: Json = False) -> None:
    """Go on after a pause."""
    _said(name, "resume", f"{escape(name)}: goes on", as_json=as_json)


@app.command("approve")
@reporting
def rollout_approve(name: Name, as_json: Json = False) -> None:
    """Let the next wave begin, where the deployment says 'rollout: {approve: true}'."""
    _said(name, "approve", f"{escape(name)}: the next wave may begin", as_json=as_json)


@app.command("abort")
@reporting
def rollout_abort(name: Name, as_json: Json = False) -> None:
    """Take the change back everywhere."""
    _said(name, "abort", f"{escape(name)}: what was there before comes back", as_json=as_json)
