"""Fleets on a virtual clock through schedules of faults, as many as there is time for.

``python -m sim.chaos [--seeds N] [--first SEED] [--seconds S] [--kinds KIND ...]``

Ends with a line of JSON; status 1 where a promise was broken, with the seeds by which it was: ``--first SEED --seeds 1`` is that one again.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter

import msgspec
from sqlite_utils import Database

from sim import checker, faults
from sim.virtual_fleet import BOXES, Fleet, clear, empty_registry

RECOVERY_S = {"gateway": 1.0, "memory": 3.0, "reboot": 6.0, "disk_read_only": 6.0}
"""How long a box may take, once it is over, to answer as before. What is not here must cost no answer."""
SHOWN = 5


class Outcome(msgspec.Struct, frozen=True):
    """What became of one schedule."""

    seed: int
    faults: int
    requests: int
    events: int
    wrong: list[str]


def one(seed: int, registry: Database, *, seconds: float, kinds: tuple[faults.Kind, ...] = faults.KINDS) -> Outcome:
    """One schedule, from its seed. ``registry`` is emptied for it."""
    clear(registry)
    fleet = Fleet(seed, registry)
    fleet.run(faults.schedule(seed, boxes=list(BOXES), seconds=seconds, kinds=kinds), seconds=seconds)
    kept = [event for box in fleet.boxes.values() for event in box.link.kept]
    away = checker.disturbances(fleet.happened, RECOVERY_S)
    wrong = (
        checker.unanswered(fleet.asked, away) + checker.events_wrong(kept, fleet.arrived(), lost={}) + checker.unconverged(fleet.states())
    )
    return Outcome(seed, len(fleet.happened), len(fleet.asked), len(kept), wrong)


def some(seeds: range, seconds: float, kinds: tuple[faults.Kind, ...]) -> list[Outcome]:
    """Many, one after the other."""
    registry = empty_registry()
    return [one(seed, registry, seconds=seconds, kinds=kinds) for seed in seeds]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m sim.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1000, help="how many schedules")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0, help="for how long things befall each fleet")
    parser.add_argument(
        "--kinds", nargs="+", choices=faults.KINDS, default=list(faults.KINDS), metavar="KIND", help=", ".join(faults.KINDS)
    )
    arguments = parser.parse_args()
    cores = min(os.cpu_count() or 1, arguments.seeds)
    every = range(arguments.first, arguments.first + arguments.seeds)
    parts = [every[index::cores] for index in range(cores)]
    began_s = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        found = [
            outcome
            for part in pool.starmap(some, [(part, arguments.seconds, tuple(arguments.kinds)) for part in parts])
            for outcome in part
        ]
    took_s = time.monotonic() - began_s
    broken = sorted((outcome for outcome in found if outcome.wrong), key=lambda outcome: outcome.seed)
    kinds = Counter(text.split(":")[-1].strip()[:40] for outcome in broken for text in outcome.wrong)
    report = {
        "sim": "chaos", "schedules": len(found), "seconds_each": arguments.seconds, "took_s": round(took_s, 1),
        "schedules_per_minute": round(60 * len(found) / took_s), "faults": sum(outcome.faults for outcome in found),
        "requests": sum(outcome.requests for outcome in found), "events": sum(outcome.events for outcome in found),
        "broken": len(broken), "kinds_of_wrong": dict(kinds.most_common(SHOWN)),
        "first_broken": msgspec.to_builtins(broken[:SHOWN]),
    }  # fmt: skip
    sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
