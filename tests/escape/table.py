"""``python -m tests.escape.table > docs/security/escapes.md``: makes every attempt on every rung and writes down what came out."""

import re
import sys
from collections.abc import Iterator

from tests.escape.gaps import GAPS, NOT_YET, gap_of
from tests.escape.perform import ATTEMPTS, BOX, Climb, Outcome, climb, on_the_box
from tests.escape.rungs import RUNGS, absence

HEAD = """# Escape attempts

What a worker in an enemy's hands tries, and what became of it on each rung of the sandbox ladder. Every line is made by a program
that runs inside a real sandbox and says itself whether it got through; `tests/escape/` has the programs, and the same attempts
without a sandbox around them succeed (`tests/escape/test_control.py`).

Made by `python -m tests.escape.table > docs/security/escapes.md`, as root, on a Linux machine with bubblewrap and a Docker Engine that
has the runtime `runsc`; a driver without control groups holds less, see [known gaps](#known-gaps). "held" names the error that
stopped the attempt, or what it found instead. A number in a cell is what was measured when the table was made.
"""
GROUPS = {
    "network": "Network",
    "filesystem": "Files and devices",
    "kernel": "System calls",
    "processes": "Other processes",
    "exhaustion": "Using up the machine",
    "ending": "Outliving the sandbox",
    "protocol": "Against the gateway and the warden",
}


def _cell(outcome: Outcome) -> str:
    text = re.sub(r"\s+", " ", outcome.broken or outcome.how).replace("|", "/")
    text = re.sub(r"/tmp/\S+", "its path", text)[:110]
    return f"BROKEN: {text}" if outcome.broken else f"{'held' if outcome.held else 'NOT HELD'}: {text}"


def _rows(climbs: dict[str, Climb]) -> Iterator[str]:
    for group, title in GROUPS.items():
        yield f"\n## {title}\n"
        yield f"| attempt | what it tries | {' | '.join(RUNGS)} |"
        yield "| --- | --- |" + " --- |" * len(RUNGS)
        for name, attempt in ATTEMPTS.items():
            if attempt.group == group:
                cells = [_cell(climbs[rung].outcomes[name]) if rung in climbs else "not run" for rung in RUNGS]
                yield f"| {name} | {attempt.tries} | {' | '.join(cells)} |"


def _box_rows() -> Iterator[str]:
    yield "\n## Whatever the rung\n\n| attempt | what it tries | outcome |\n| --- | --- | --- |"
    for name, run in BOX.items():
        yield f"| {name} | {(run.__doc__ or '').splitlines()[0]} | {_cell(on_the_box(name))} |"
    for name, (tries, reason) in NOT_YET.items():
        yield f"| {name} | {tries} | {reason} |"


def _gap_rows() -> Iterator[str]:
    yield "\n## Known gaps\n"
    if not GAPS:
        yield "None."
        return
    yield "| attempt | rung | where | why |\n| --- | --- | --- | --- |"
    for gap in GAPS:
        yield f"| {gap.attempt} | {gap.rung} | {gap.when or 'everywhere'} | {gap.reason} |"


def main() -> int:
    """Write the table; fails where an attempt is broken, or is not held and no known gap."""
    climbs = {rung: climb(rung) for rung in RUNGS if not absence(rung)}
    sys.stdout.write(HEAD + "\n".join([*_rows(climbs), *_box_rows(), *_gap_rows()]) + "\n")
    bad = 0
    for rung, made in climbs.items():
        sys.stderr.write(f"{rung}: {made.took_s:.0f} s, {sorted(made.conditions)}\n")
        for name, outcome in made.outcomes.items():
            if outcome.broken or outcome.held == bool(gap_of(name, rung, made.conditions)):
                sys.stderr.write(f"{rung}: {name}: {_cell(outcome)}\n")
                bad += 1
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
