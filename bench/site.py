"""Bare machines to a fleet that serves, and an upgrade of it under load: machines that boot, Ansible over ssh.

``python -m bench.site [--boxes N]``, as root, with systemd-nspawn and mmdebstrap

First the coordinator's machine and one box, then all others in the usual waves (1, 10 %, 50 %, 100 %), each from a bare Debian; then a
model on all of them; then the next release, while every box is asked ten times a second; then one more, which the coordinator sends and
the boxes install themselves, in the same waves, each watched for ten seconds. The machines share this one's processors: a
good part of the time is that of unpacking a release, once for each of them.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import onnx

from bench.report import report
from tests.boxes import root
from tests.boxes.fleet import Load, Operator, Play, fetch_wheels, release
from tests.boxes.machine import Ground
from tests.conftest import scaling

WAVES = '{"skerry_waves": [1, "10%", "50%", "100%"]}'


def releases(folder: Path) -> Path:
    """Three of them, out of the locked wheels."""
    wheels, made = folder / "wheels", folder / "releases"
    made.mkdir()
    fetch_wheels(wheels)
    for version in ("0.1.0", "0.2.0", "0.3.0"):
        release(version, made, wheels)
    return made


def went_well(play: Play) -> float:
    """How long it took. Raises RuntimeError with what it said."""
    if play.status != 0:
        raise RuntimeError(play.text[-4000:])
    return play.took_s


def measure(folder: Path, boxes: int) -> dict[str, object]:
    """All of it."""
    made = releases(folder)
    onnx.save(scaling(2.0), folder / "scale.onnx")
    (folder / "home").mkdir()
    with Ground(folder, root.cached()) as ground:
        began = time.monotonic()
        hub, *fleet = ground.add("hub", *(f"box-{number + 1}" for number in range(boxes)))
        booted_s = time.monotonic() - began
        operator = Operator(ground, hub, fleet, folder / "home", made)
        first_s = went_well(operator.play("site", "--limit", "hub,box-1", version="0.1.0"))
        rest_s = went_well(operator.play("boxes", "-e", WAVES, version="0.1.0"))
        began = time.monotonic()
        operator.deploy((folder / "scale.onnx").read_bytes())
        deployed_s = time.monotonic() - began
        with Load(ground, fleet) as load:
            upgraded_s = went_well(operator.play("upgrade", "-e", WAVES, version="0.2.0"))
        operator.push("0.3.0")
        with Load(ground, fleet) as own:
            began = time.monotonic()
            operator.roll_out("0.3.0", observe="10s", waves=json.loads(WAVES)["skerry_waves"])
            operator.until(lambda: operator.software()["rollout"]["phase"] != "rolling", within_s=1800)
            own_s = time.monotonic() - began
        if (ended := operator.software())["versions"] != {"0.3.0": boxes}:
            raise RuntimeError(str(ended))
    return {
        "boxes": boxes,
        "booted_s": round(booted_s, 1),
        "coordinator_and_first_box_s": round(first_s, 1),
        "all_boxes_s": round(rest_s, 1),
        "a_box_s": round(rest_s / boxes, 1),
        "model_on_all_s": round(deployed_s, 1),
        "upgrade_s": round(upgraded_s, 1),
        "requests": sum(load.answered.values()),
        "lost": len(load.failed),
        "slowest_ms": round(load.slowest_ms),
        "own_update_s": round(own_s, 1),
        "own_requests": sum(own.answered.values()),
        "own_lost": len(own.failed),
        "own_slowest_ms": round(own.slowest_ms),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="bench.site", description="Bare machines to a fleet that serves, and an upgrade under load.")
    parser.add_argument("--boxes", type=int, default=10, help="beside the coordinator's machine (default: %(default)s)")
    arguments = parser.parse_args()
    if lacking := root.missing():
        sys.exit(f"bench.site: {lacking}")
    with tempfile.TemporaryDirectory(prefix="sk-boxes-") as folder:
        found = measure(Path(folder), arguments.boxes)
    report("site", **found)


if __name__ == "__main__":
    main()
