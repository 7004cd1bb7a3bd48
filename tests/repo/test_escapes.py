"""docs/security/escapes.md says what the escape suite does: each attempt has its line, each line its attempt."""

import platform
import re
import sys
from pathlib import Path

from tests.escape.gaps import GAPS, NOT_YET
from tests.escape.perform import ATTEMPTS, BOX
from tests.escape.rungs import RUNGS

TABLE = Path(__file__).parents[2] / "docs" / "security" / "escapes.md"
ROW = re.compile(r"\| ([a-z][a-z0-9-]+) \| (.+?) \| (.+) \|")


def rows() -> dict[str, tuple[str, list[str]]]:
    """What each attempt tries and its cells, from the tables before the known gaps."""
    text = TABLE.read_text().split("\n## Known gaps")[0]
    found = [match for line in text.splitlines() if (match := ROW.fullmatch(line)) and match[1] != "attempt"]
    return {match[1]: (match[2], match[3].split(" | ")) for match in found}


def test_every_attempt_has_its_line_and_every_line_its_attempt() -> None:
    tries = {name: attempt.tries for name, attempt in ATTEMPTS.items()}
    tries |= {name: (run.__doc__ or "").splitlines()[0] for name, run in BOX.items()}
    tries |= {name: what for name, (what, _) in NOT_YET.items()}
    assert {name: what for name, (what, _) in rows().items()} == tries
    assert len(ATTEMPTS) >= 44


def test_what_the_table_says_is_not_held_are_the_known_gaps() -> None:
    found = rows()
    open_cells = {
        (name, rung) for name in ATTEMPTS for rung, cell in zip(RUNGS, found[name][1], strict=True) if not cell.startswith("held")
    }
    assert open_cells <= {(gap.attempt, gap.rung) for gap in GAPS}
    assert {(gap.attempt, gap.rung) for gap in GAPS if not gap.when} <= open_cells


def test_the_table_tells_nothing_of_the_machine_it_was_made_on() -> None:
    text = TABLE.read_text()
    for mark in filter(None, (platform.node(), platform.release(), sys.prefix, str(Path.cwd()))):
        assert not re.search(rf"(?<![\w/]){re.escape(mark)}\b", text)
