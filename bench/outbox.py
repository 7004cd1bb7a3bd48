"""A box that is cut off for a month: what its outbox takes of the disk, what it says that it lost, and how long the agent takes to start.

``python -m bench.outbox [--days 30] [--every-s 1] [--size-mib 64] [--starts 15]``

The month is simulated: readings of every second, as large as a real one with two deployments, an event every half a minute. Starts are real
ones of the agent's program, until it says that it is ready, on the full outbox and on an empty one by turns.
"""

import argparse
import os
import random
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.report import report
from edge_agent.link.outbox import Outbox
from skerry.wire import latency
from skerry.wire.messages import GpuSample, Sample, ServeSample

BAR_START_RATIO = 1.10
EVENT_EVERY_S = 30
LOOK_EVERY = 20_000
START_WITHIN_S = 30.0


def reading(outbox: Outbox, at_s: float, chance: random.Random) -> Sample:
    """As a busy box takes it."""
    serve = []
    for deployment in ("shelf-detector", "speech"):
        edge = chance.randint(5, 40)
        histogram: dict[int, int] = {}
        for _ in range(8):
            bucket = latency.bucket_of(chance.lognormvariate(2.0, 0.5))
            histogram[bucket] = histogram.get(bucket, 0) + edge // 8
        serve.append(ServeSample(deployment, edge=edge, latency=histogram))
    gpu = GpuSample("GPU-0", chance.random(), 9000, 61.0, 97.0)
    return Sample(outbox.epoch, outbox.next_sample_seq(), int(at_s * 1000), chance.random(), 2**33, [gpu], serve)


def disk_bytes(folder: Path) -> int:
    """What the outbox's files take."""
    return sum(path.stat().st_size for path in folder.glob("outbox.db*"))


def fill(folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """Live through the time, and compare what the outbox holds and says with what happened."""
    chance, most_bytes = random.Random(7), arguments.size_mib * 2**20
    outbox = Outbox(folder / "outbox.db", most_bytes=most_bytes)
    readings, events, answered, most_disk = int(arguments.days * 86400 / arguments.every_s), 0, 0, 0
    start_s, began = 1_800_000_000, time.monotonic()
    for index in range(readings):
        sample = reading(outbox, start_s + index * arguments.every_s, chance)
        answered += sum(one.edge for one in sample.serve)
        outbox.add_sample(sample, sent_at_ms=0)
        if index % max(1, round(EVENT_EVERY_S / arguments.every_s)) == 0:
            events += 1
            outbox.add_event("simulated.happened", "shelf-detector-0", f"the {events}th thing", at_ms=sample.at_ms)
        if index % LOOK_EVERY == 0:
            most_disk = max(most_disk, disk_bytes(folder))
            print(f"{index / readings:.0%} of {arguments.days} days, {most_disk / 2**20:.1f} MiB", file=sys.stderr)
    took_s = time.monotonic() - began
    most_disk = max(most_disk, disk_bytes(folder))
    loss, held_readings, held_answers, after = outbox.take_loss(), 0, 0, 0
    while samples := outbox.samples_after(after, 500):
        after = samples[-1].seq
        held_readings += sum(sample.readings for sample in samples)
        held_answers += sum(one.edge for sample in samples for one in sample.serve)
    depth = outbox.depth()
    outbox.close()
    return {
        "readings": readings, "events": events, "cap_mib": arguments.size_mib, "most_disk_mib": round(most_disk / 2**20, 2),
        "never_over_the_cap": most_disk <= most_bytes, "lost_readings": loss.samples, "lost_events": loss.events, "thinned": loss.thinned,
        "report_is_exact": held_readings + loss.samples == readings and depth[0] + loss.events == events,
        "answers_kept_ratio": held_answers / answered, "held_events": depth[0], "held_readings": depth[1],
        "us_per_reading": round(took_s / readings * 1e6, 1),
    }  # fmt: skip


def settings(folder: Path) -> Path:
    """An agent's, whose broker is not there."""
    (folder / "token").write_text("t\n")
    config = folder / "agent.toml"
    config.write_text(
        f'fleet = "f"\nnode = "n"\ntier = "edge"\nstate_dir = "{folder}"\nwarden_socket = "{folder}/w.sock"\n'
        f'gateway_socket = "{folder}/g.sock"\ngateway_url = "http://127.0.0.1:9"\n[broker]\nhost = "127.0.0.1"\nport = 9\n'
        f'[coordinator]\nurl = "http://127.0.0.1:9"\ntoken_file = "{folder}/token"\n'
    )
    return config


def start_s(config: Path) -> float:
    """From the start of the program until it says that it is ready."""
    path = config.parent / "notify.sock"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening, (config.parent / "log").open("ab") as log:
        listening.bind(str(path))
        began = time.monotonic()
        agent = subprocess.Popen(
            [sys.executable, "-m", "edge_agent.link", "--config", str(config)],
            env={**os.environ, "NOTIFY_SOCKET": str(path)}, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            while True:
                if not select.select([listening], [], [], START_WITHIN_S)[0]:
                    raise SystemExit(f"the agent did not start: {(config.parent / 'log').read_text()[-500:]}")
                if b"READY=1" in listening.recv(4096):
                    return time.monotonic() - began
        finally:
            agent.terminate()
            agent.wait(20)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.outbox", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--days", type=float, default=30.0)
    parser.add_argument("--every-s", type=float, default=1.0)
    parser.add_argument("--size-mib", type=int, default=64)
    parser.add_argument("--starts", type=int, default=15)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="skerry-outbox-"))
    try:
        figures = fill(folder, arguments)
        (folder / "empty").mkdir()
        full, empty = settings(folder), settings(folder / "empty")
        times: dict[Path, list[float]] = {full: [], empty: []}
        for _ in range(arguments.starts):
            for config in (full, empty):
                times[config].append(start_s(config))
        medians = {config: statistics.median(measured) for config, measured in times.items()}
        ratio = medians[full] / medians[empty]
        report(
            "outbox", **figures, start_full_s=round(medians[full], 4), start_empty_s=round(medians[empty], 4),
            start_ratio=round(ratio, 3), bar_start_ratio=BAR_START_RATIO, reached=ratio <= BAR_START_RATIO,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
