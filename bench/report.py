"""The one line of JSON that each benchmark prints."""

import json
import os
import sys


def report(bench: str, **figures: object) -> None:
    """Print the figures with the command that reproduces them."""
    command = " ".join(["python", "-m", f"bench.{bench}", *sys.argv[1:]])
    sys.stdout.write(json.dumps({"bench": bench, "command": command, "cores": len(os.sched_getaffinity(0)), **figures}) + "\n")
    sys.stdout.flush()
