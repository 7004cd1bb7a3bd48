"""The registry, killed at each statement that it runs: what was acknowledged stands, what was not stands whole or not at all."""

import asyncio
import itertools
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from sqlite_utils import Database as Tables

from coordinator.core import deployment
from coordinator.core.planner import Outcome
from coordinator.registry import audit, deployments, events, models, nodes
from coordinator.registry.database import Database
from skerry.wire.messages import Birth, Desired, Event, ModelRef, Presence, Reported

ADA = audit.Actor("ada", "token", "10.0.0.1")
TEXT = "name: d\nmodel: m:{version}\nreplicas: {{per_node: 1}}\nplace: {{tier: [edge]}}\n"
Change = Callable[[Tables], object]


def deployed(version: int) -> Change:
    def change(tables: Tables) -> None:
        text = TEXT.format(version=version)
        before = deployments.read_text(tables, "d")
        deployments.save_deployment(tables, deployment.parse(text), text, version)
        audit.append(tables, ADA, "deployment.accepted", "d", before=before, after=text, now_ms=version)
        events.add_own_event(tables, "", "deployment.accepted", "d", f"version {version}", version)

    return change


def deleted(tables: Tables) -> None:
    deployments.delete_deployment(tables, "d")
    audit.append(tables, ADA, "deployment.deleted", "d", now_ms=9)


def heard(first: int) -> Change:
    said = [Event("epoch", seq, 7, "kind", "s", f"{seq}") for seq in range(first, first + 4)]
    return lambda tables: events.save_events(tables, "box", said, oldest=1, dropped=0, now_ms=8, nonce="n")


def pushed(tables: Tables) -> None:
    models.save_model(tables, ModelRef("m", 1, "a" * 64, 3), 1)
    audit.append(tables, ADA, "model.pushed", "m:1", now_ms=1)


BIRTH = Birth("edge", {"site": "s"}, "http://b", "boot", 1, "1", 4, 2**30, outbox_epoch="epoch")
CHANGES: list[Change] = [
    pushed,
    lambda tables: nodes.save_presence(tables, "box", Presence(True, "boot", 1), 1),
    lambda tables: nodes.save_birth(tables, "box", BIRTH, 2),
    deployed(1),
    lambda tables: deployments.save_outcomes(tables, {"d": Outcome(1)}),
    lambda tables: nodes.save_desired(tables, Desired("f", "box", 1, 3)),
    heard(1),
    lambda tables: nodes.save_reported(tables, "box", Reported(1), 4),
    deployed(2),
    heard(3),
    lambda tables: nodes.save_presence(tables, "box", Presence(False, "boot", 1), 5),
    deleted,
    lambda tables: events.forget_events(tables, keep=3),
]  # fmt: skip


async def play(path: Path, *, die_at: int, acknowledge: Callable[[], None]) -> int:
    """Make every change, and be killed as the ``die_at``-th statement begins; how many there were."""
    statements = 0

    def begins(_: str) -> None:
        nonlocal statements
        statements += 1
        if statements == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    async with Database(path) as database:
        await database.write(lambda tables: tables.conn.set_trace_callback(begins))
        for change in CHANGES:
            await database.write(change)
            acknowledge()
    return statements


def content(path: Path) -> list[str]:
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    lines = list(connection.iterdump())
    connection.close()
    return lines


def killed_at_each(folder: Path, statements: int) -> None:
    """A child for each, forked before there is any thread; prints how far each came."""
    for number in range(1, statements + 1):
        shutil.copy(folder / "empty.db", folder / f"{number}.db")
        acknowledged = folder / f"{number}.acks"
        acknowledged.touch()
        if (child := os.fork()) == 0:
            with acknowledged.open("ab", buffering=0) as acks:
                asyncio.run(play(folder / f"{number}.db", die_at=number, acknowledge=lambda acks=acks: acks.write(b".")))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(json.dumps([os.WIFSIGNALED(status), acknowledged.stat().st_size]) + "\n")


def test_whichever_statement_it_is_killed_at_what_was_acknowledged_stands_and_the_rest_is_whole_or_not_there(tmp_path):
    async def prepared() -> None:
        async with Database(tmp_path / "empty.db"):
            pass

    asyncio.run(prepared())
    shutil.copy(tmp_path / "empty.db", tmp_path / "whole.db")
    states = [content(tmp_path / "whole.db")]
    statements = asyncio.run(play(tmp_path / "whole.db", die_at=0, acknowledge=lambda: states.append(content(tmp_path / "whole.db"))))
    assert statements > 5 * len(CHANGES) / 2
    assert all(one != other for one, other in itertools.pairwise(states)), "each change is seen"
    command = [sys.executable, "-m", "tests.integration.test_registry_kills", str(tmp_path), str(statements)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    reached = [json.loads(line) for line in done.stdout.splitlines()]
    assert [was_killed for was_killed, _ in reached] == [True] * statements
    assert {acks for _, acks in reached} == set(range(len(CHANGES)))
    for number, (_, acks) in enumerate(reached, start=1):
        assert content(tmp_path / f"{number}.db") in states[acks : acks + 2], f"killed at statement {number}, after {acks} changes"


if __name__ == "__main__":
    killed_at_each(Path(sys.argv[1]), int(sys.argv[2]))
