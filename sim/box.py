"""A box without sandboxes: the agent's own session and outbox on a real broker, and the rest of a box pretended.

What a coordinator knows of a box is what its agent says, and that is the agent's own code here, resending and all: a benchmark
with a copy of the protocol would measure the copy. Pretended are the warden (a replica is ready a moment after it is wanted),
the gateway (so many answers a second) and the machine. The outbox lies in memory: a hundred of them share one disk else.
"""

import asyncio
import random
import time
from collections import Counter
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_agent.core.report import ReplicaStatus, Withheld, report_of
from edge_agent.link.outbox import Outbox
from edge_agent.link.session import Reach, Session
from skerry import __version__
from skerry.runtime import lifecycle
from skerry.runtime.settings import Broker
from skerry.wire import latency, signing
from skerry.wire.messages import Birth, Desired, Gpu, GpuSample, Sample, ServeSample

MEMORY_BYTES = 16 * 2**30
MOST_HELD_BYTES = 256 * 2**20
"""As the agent's settings have it: events, and samples, that an outbox holds."""
WILL_DELAY_S = 5
RECONNECT_S = (0.5, 60.0)
"""As the agent's settings have them."""
START_S = (0.2, 1.5)
"""How long a pretended sandbox takes to start: at least, at most."""

Said = tuple[str, str, str]
"""An event as it was said: kind, subject, text."""


class RememberingOutbox(Outbox):
    """An outbox in memory that remembers every event it numbered: ``said[i]`` has the number ``i + 1``."""

    def __init__(self) -> None:
        super().__init__(Path(":memory:"), most_bytes=MOST_HELD_BYTES)
        self.said: list[Said] = []

    def add_event(self, kind: str, subject: str = "", text: str = "", *, at_ms: int) -> None:
        """See Outbox."""
        super().add_event(kind, subject, text, at_ms=at_ms)
        self.said.append((kind, subject, text))


class SimulatedBox:
    """``run`` connects and goes on until it is told to stop. ``sampled`` and ``served`` are what it said of itself so far.

    ``look_back`` before ``run`` makes it one that sampled and served for a while without a link; ``quieten`` ends what is new
    (samples, events), so that all of it can arrive before the end.
    """

    def __init__(
        self,
        *,
        broker: Broker,
        fleet: str,
        node: str,
        trusted: list[Ed25519PublicKey],
        sample_every_s: float = 1.0,
        event_every_s: float = 3.0,
    ) -> None:
        self.node = node
        self.outbox = RememberingOutbox()
        self.sampled = 0
        self.served: dict[str, Counter[str]] = {}
        self.desired: Desired | None = None
        self._trusted = trusted
        self._sample_every_s = sample_every_s
        self._event_every_s = event_every_s
        self._chance = random.Random(node)
        self._replicas: dict[str, ReplicaStatus] = {}
        self._wanted = asyncio.Event()
        self._quiet = asyncio.Event()
        self._session = Session(
            reach=Reach(broker, WILL_DELAY_S, RECONNECT_S),
            fleet=fleet,
            node=node,
            outbox=self.outbox,
            birth=self._birth,
            on_desired=self._on_desired,
            on_command=lambda *_: None,
        )

    @property
    def is_connected(self) -> bool:
        """Whether the broker answered and has not been lost since."""
        return self._session.is_connected

    @property
    def ready(self) -> set[str]:
        """Deployments that this box says it serves."""
        return {status.spec.deployment for status in self._replicas.values() if status.phase == "ready"}

    def look_back(self, seconds: float, deployments: list[str]) -> None:
        """Have so long a backlog of samples, as of a box that served the deployments while it was cut off."""
        count = int(seconds / self._sample_every_s)
        now_ms = time.time_ns() // 1_000_000
        for index in range(count):
            sample = self._sample(deployments, at_ms=now_ms - int((count - index) * self._sample_every_s * 1000))
            self.outbox.add_sample(sample, sent_at_ms=0)

    def quieten(self) -> None:
        """Nothing new from here on."""
        self._quiet.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Be a box until ``stop`` is set."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._session.run(stop), name=f"{self.node}.session")
            tasks.create_task(self._sample_on(), name=f"{self.node}.samples")
            tasks.create_task(self._happen_on(), name=f"{self.node}.events")
            converging = tasks.create_task(self._converge(), name=f"{self.node}.warden")
            await stop.wait()
            self.quieten()
            converging.cancel()
        self.outbox.close()

    # -- the agent's inventory

    def _birth(self, session_epoch: int) -> Birth:
        return Birth(
            tier="edge",
            labels={"site": self.node, "region": "simulated"},
            gateway_url=f"http://{self.node}.invalid:8080",
            boot_id=f"boot-{self.node}",
            session_epoch=session_epoch,
            version=__version__,
            cpus=4,
            memory_bytes=MEMORY_BYTES,
            gpus=[Gpu(f"GPU-{self.node}", "simulated", 16384, "0")],
            rungs=["process", "container"],
            outbox_epoch=self.outbox.epoch,
            desired_generation=self.desired.generation if self.desired else 0,
        )

    # -- the pretended warden

    def _on_desired(self, envelope: bytes) -> None:
        desired = signing.verify(envelope, Desired, self._trusted, context=signing.DESIRED_CONTEXT)
        if self.desired is None or desired.generation > self.desired.generation:
            self.desired = desired
            self._wanted.set()

    async def _converge(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            desired = self.desired
            assert desired is not None  # noqa: S101 - set with the event
            wanted = {spec.name: spec for spec in desired.replicas}
            self._replicas = {name: status for name, status in self._replicas.items() if wanted.get(name) == status.spec}
            fresh = [spec for name, spec in wanted.items() if name not in self._replicas]
            self._replicas |= {spec.name: ReplicaStatus(spec, "starting", driver="simulated", rung="process") for spec in fresh}
            self._report()
            await asyncio.sleep(self._chance.uniform(*START_S) if fresh else 0)
            for spec in fresh:
                self._replicas[spec.name] = ReplicaStatus(
                    spec, "ready", driver="simulated", rung="process", provider="CPUExecutionProvider"
                )
                self._session.say_event("replica.ready", spec.name, f"generation {spec.generation}")
            self._report()

    def _report(self) -> None:
        self._session.report(report_of(self.desired, self._replicas, {}, Withheld(), ""))

    # -- the pretended gateway and machine

    async def _sample_on(self) -> None:
        await lifecycle.sleep_until(self._quiet, self._chance.uniform(0, self._sample_every_s))  # not all boxes at one moment
        while not await lifecycle.sleep_until(self._quiet, self._sample_every_s):
            await self._session.offer(self._sample(sorted(self.ready), at_ms=time.time_ns() // 1_000_000), None)

    def _sample(self, deployments: list[str], *, at_ms: int) -> Sample:
        events, samples = self.outbox.depth()
        self.sampled += 1
        busy = self._chance.uniform(0.1, 0.9)
        return Sample(
            epoch=self.outbox.epoch,
            seq=self.outbox.next_sample_seq(),
            at_ms=at_ms,
            cpu_ratio=round(busy, 4),
            memory_used_bytes=int(busy * MEMORY_BYTES),
            gpus=[GpuSample(f"GPU-{self.node}", busy, int(busy * 16384), 40 + 40 * busy, 30 + 120 * busy)],
            serve=[self._serve(deployment) for deployment in deployments],
            outbox_events=events,
            outbox_samples=samples,
        )

    def _serve(self, deployment: str) -> ServeSample:
        """One interval's answers, some by the cloud, with a latency each; counted in ``served``."""
        edge, cloud, refused = self._chance.randint(5, 40), self._chance.randint(0, 3), self._chance.randint(0, 1)
        histogram = Counter(latency.bucket_of(self._chance.lognormvariate(2.0, 0.5)) for _ in range(edge + cloud))
        self.served.setdefault(deployment, Counter()).update({"edge": edge, "cloud": cloud, "refused": refused})
        return ServeSample(deployment, edge=edge, cloud=cloud, refused=refused, latency=dict(histogram))

    async def _happen_on(self) -> None:
        number = 0
        while not await lifecycle.sleep_until(self._quiet, self._event_every_s * self._chance.uniform(0.5, 1.5)):
            number += 1
            self._session.say_event("simulated.happened", self.node, f"the {number}th thing on {self.node}")
