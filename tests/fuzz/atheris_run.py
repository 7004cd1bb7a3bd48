"""Fuzzes one decoder after the other, guided by coverage: ``make fuzz FUZZ_SECONDS=60``.

What it finds is written below .fuzz/NAME, together with a corpus that the next run goes on from.
"""

import argparse
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(".fuzz")
MOST_INPUT_BYTES = 65_536
HANGS_AFTER_S = 10
MOST_MIB = 2048


def folder_of(name: str) -> Path:
    return FOLDER / re.sub(r"\W+", "-", name)


def table() -> list[Any]:
    """Imported late: a run that is guided instruments what the table imports."""
    decoders: list[Any] = importlib.import_module("tests.fuzz.decoders").DECODERS
    return decoders


def fuzz(name: str, seconds: int) -> None:
    """Runs until the time is over, or something was found; never returns."""
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["skerry", "coordinator", "edge_agent", "yaml", "zipfile"]):
        decoder = next(decoder for decoder in table() if decoder.name == name)

    def one(data: bytes) -> None:
        try:
            decoder.run(data)
        except decoder.refusals:
            pass

    options = [f"-max_total_time={seconds}", f"-max_len={MOST_INPUT_BYTES}", f"-timeout={HANGS_AFTER_S}", f"-rss_limit_mb={MOST_MIB}"]
    atheris.Setup([sys.argv[0], str(folder_of(name) / "corpus"), *options, f"-artifact_prefix={folder_of(name)}/found-"], one)
    atheris.Fuzz()


def fuzzed(decoder: Any, seconds: int) -> bool:
    """Runs one in a process of its own, and says how it went; false where something was found."""
    corpus = folder_of(decoder.name) / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(decoder.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    command = [sys.executable, "-m", "tests.fuzz.atheris_run", "--one", decoder.name, "--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + 120)
    runs = re.findall(r"Done (\d+) runs", done.stderr)
    is_fine = done.returncode == 0 and bool(runs)
    sys.stdout.write(f"{decoder.name:<30} {runs[-1] + ' runs' if is_fine else 'FOUND SOMETHING'}\n")
    if not is_fine:
        sys.stdout.write("".join(f"    {line}\n" for line in done.stderr.splitlines()[-25:]))
    sys.stdout.flush()
    return is_fine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=20, help="for each decoder (default: %(default)s)")
    parser.add_argument("--only", default="", help="the decoders whose names hold this")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        fuzz(arguments.one, arguments.seconds)
    outcomes = [fuzzed(decoder, arguments.seconds) for decoder in table() if arguments.only in decoder.name]
    return 0 if outcomes and all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
