"""What the demo shows: a live table on a terminal, lines elsewhere."""

from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from skerry.cli.output import STATES, deployments_table
from skerry.wire.api import DeploymentView, NodeView

MARKS = {"": "[dim]·[/]", "run": "[cyan]▸[/]", "held": "[green]✔[/]", "failed": "[red]✘[/]"}


class Screen:
    """``step`` opens a step of the story, ``held`` and ``failed`` close it; ``fleet`` gives the table fresh numbers."""

    def __init__(self, *, plain: bool) -> None:
        self.console = Console(highlight=False)
        self._live = None if plain or not self.console.is_terminal else Live(console=self.console, refresh_per_second=4, transient=True)
        self._steps: list[list[str]] = []
        self._nodes: list[NodeView] = []
        self._deployments: list[DeploymentView] = []
        self._footer = ""

    def __enter__(self) -> "Screen":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, soft_wrap=True)

    def step(self, name: str, text: str) -> None:
        """Begin a step."""
        self._steps.append([name, "run", text])
        if self._live is None:
            self.say(f"▸ {name}: {escape(text)}")
        self._draw()

    def note(self, text: str) -> None:
        """Say how the step stands."""
        self._steps[-1][2] = text
        self._draw()

    def close(self, text: str, *, held: bool) -> None:
        """End the step."""
        self._steps[-1][1:] = ["held" if held else "failed", text]
        if self._live is None:
            self.say(f"{MARKS['held' if held else 'failed']} {self._steps[-1][0]}: {escape(text)}")
        self._draw()

    def fleet(self, nodes: list[NodeView], deployments: list[DeploymentView]) -> None:
        """Fresh numbers."""
        self._nodes, self._deployments = nodes, deployments
        self._draw()

    def footer(self, text: str) -> None:
        """What stands below: the console's address."""
        self._footer = text
        if self._live is None:
            self.say(text)
        self._draw()

    def _draw(self) -> None:
        if self._live is None:
            return
        steps = Table.grid(padding=(0, 1))
        for name, state, text in self._steps:
            steps.add_row(MARKS[state], f"[bold]{name}[/]", escape(text))
        self._live.update(
            Group(steps, Text(), self._boxes(), Text(), deployments_table(self._deployments), Text(), Text.from_markup(self._footer))
        )

    def _boxes(self) -> Table:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("box", "state", "tier", "replicas ready", "cpu", "events", "samples missing"):
            table.add_column(column)
        for node in self._nodes:
            ready = sum(1 for replica in node.replicas if replica.phase == "ready")
            events = sum(stream.high for stream in node.streams if stream.stream == "events")
            missing = sum(stream.missing for stream in node.streams if stream.stream == "samples")
            cells = (f"{ready}/{len(node.replicas)}", f"{node.cpu_ratio:.0%}", str(events), str(missing))
            table.add_row(escape(node.id), STATES[node.state], node.tier or "", *cells)
        return table
