"""One reading of the box per interval: processor, memory, GPUs, and what the gateway answered since the last one."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import aiohttp
import msgspec
import psutil

from skerry.runtime import lifecycle, log, nvml
from skerry.wire import codec, latency
from skerry.wire.box import MAX_TOTALS_BYTES, GatewayTotals, ServeTotals
from skerry.wire.messages import GpuSample, Sample, ServeSample

logger = log.get("agent.telemetry")

ASK_TIMEOUT_S = 2.0
GPU_TIMEOUT_S = 2.0


def since(now: GatewayTotals, before: GatewayTotals | None) -> list[ServeSample]:
    """What the gateway answered between two totals; a gateway that was restarted in between counts from zero. Pure."""
    same = before is not None and before.started_at_ms == now.started_at_ms
    old = {totals.deployment: totals for totals in before.deployments} if before is not None and same else {}
    samples = []
    for totals in now.deployments:
        was = old.get(totals.deployment, ServeTotals(totals.deployment))
        samples.append(
            ServeSample(
                deployment=totals.deployment,
                edge=totals.edge - was.edge,
                peer=totals.peer - was.peer,
                cloud=totals.cloud - was.cloud,
                refused=totals.refused - was.refused,
                failed=totals.failed - was.failed,
                late=totals.late - was.late,
                latency=latency.grown(totals.latency, was.latency),
                compared=totals.compared - was.compared,
                differed=totals.differed - was.differed,
            )
        )
    return samples


class Standing(NamedTuple):
    """How the link to the coordinator stands: what waits to be confirmed, and the round trip to the broker, 0 where it is not known."""

    outbox_events: int
    outbox_samples: int
    rtt_ms: float = 0.0


class Network:
    """What goes over the box's interfaces, loopback apart; an interface that comes, goes or counts from zero again is left out once."""

    def __init__(self) -> None:
        self._before: tuple[float, dict[str, tuple[int, int]]] = (0.0, {})

    def rates(self) -> tuple[float, float]:
        """Bytes received and sent per second since the last call; zeros at the first one, and where the kernel does not say."""
        now = time.monotonic()
        try:
            counters = psutil.net_io_counters(pernic=True)
        except (OSError, RuntimeError):
            return 0.0, 0.0
        found = {name: (one.bytes_recv, one.bytes_sent) for name, one in counters.items() if name != "lo"}
        (at, before), self._before = self._before, (now, found)
        grown = [
            (received - before[name][0], sent - before[name][1])
            for name, (received, sent) in found.items()
            if name in before and received >= before[name][0] and sent >= before[name][1]
        ]
        elapsed_s = max(now - at, 0.001)
        return round(sum(one[0] for one in grown) / elapsed_s, 1), round(sum(one[1] for one in grown) / elapsed_s, 1)


class Telemetry:
    """Reads every ``every_s`` and hands each reading to ``offer``, with the gateway's counters up to which it counts.

    ``before`` are those of the last reading of the agent that ran before this one. ``routed`` gets totals that hold sampled decisions.
    ``read_gpus`` is NVML's where none is given.
    """

    def __init__(
        self,
        *,
        every_s: float,
        gateway_socket: Path,
        epoch: Callable[[], str],
        next_seq: Callable[[], int],
        standing: Callable[[], Standing],
        before: GatewayTotals | None,
        offer: Callable[[Sample, GatewayTotals | None], Awaitable[None]],
        routed: Callable[[GatewayTotals], None],
        read_gpus: Callable[[], list[GpuSample]] | None = None,
    ) -> None:
        self._every_s = every_s
        self._gateway_socket = gateway_socket
        self._epoch = epoch
        self._next_seq = next_seq
        self._standing = standing
        self._network = Network()
        self._offer = offer
        self._routed = routed
        self._before = before
        self._read_gpus = read_gpus or (nvml.samples if nvml.gpus() else None)
        self.pulse = lifecycle.Pulse()
        self._gpus: asyncio.Future[list[GpuSample]] | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Read until ``stop`` is set."""
        psutil.cpu_percent(None)  # the first call only starts the measurement
        connector = aiohttp.UnixConnector(path=str(self._gateway_socket))
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=ASK_TIMEOUT_S)) as session:
            while not await lifecycle.sleep_until(stop, self._every_s):
                self.pulse.beat()
                await self._offer(await self._read(session), self._before)

    async def _read(self, session: aiohttp.ClientSession) -> Sample:
        serve: list[ServeSample] = []
        totals = await self._ask(session)
        if totals is not None:
            if totals.routed:
                self._routed(totals)
                totals = msgspec.structs.replace(totals, routed=[])
            serve, self._before = since(totals, self._before), totals
        link = self._standing()
        received, sent = self._network.rates()
        return Sample(
            epoch=self._epoch(),
            seq=self._next_seq(),
            at_ms=time.time_ns() // 1_000_000,
            cpu_ratio=round(psutil.cpu_percent(None) / 100, 4),
            memory_used_bytes=psutil.virtual_memory().used,
            gpus=await self._gpu_samples(),
            serve=[sample for sample in serve if any((sample.latency, sample.refused, sample.failed, sample.late, sample.compared))],
            outbox_events=link.outbox_events,
            outbox_samples=link.outbox_samples,
            network_received_bytes_per_s=received,
            network_sent_bytes_per_s=sent,
            link_rtt_ms=link.rtt_ms,
        )

    async def _gpu_samples(self) -> list[GpuSample]:
        """The GPUs' counters; none while the driver hangs, and it is not asked again before it has answered."""
        if self._read_gpus is None:
            return []
        if self._gpus is None:
            self._gpus = lifecycle.in_a_thread_of_its_own(self._read_gpus)
            await asyncio.wait([self._gpus], timeout=GPU_TIMEOUT_S)
            if not self._gpus.done():
                logger.error("gpus.silent", hint="the driver does not answer; all else goes on")
        if not self._gpus.done():
            return []
        answer, self._gpus = self._gpus, None
        try:
            return answer.result()
        except Exception as exc:  # noqa: BLE001 - a driver may fail in ways that its library does not name
            logger.error("gpus.failed", reason=str(exc)[:300])
            return []

    async def _ask(self, session: aiohttp.ClientSession) -> GatewayTotals | None:
        """The gateway's counters; a gateway that is not there leaves a hole, and what it counts meanwhile comes with the next answer."""
        try:
            async with session.get("http://gateway/totals") as response:
                return codec.decode(await response.read(), GatewayTotals, max_bytes=MAX_TOTALS_BYTES)
        except (aiohttp.ClientError, OSError, TimeoutError, codec.Malformed):
            return None
