"""Load on a chaos fleet: callers beside each box and callers out in the network, each request with its patience, each outcome kept."""

import asyncio
import random
import threading
import time

import aiohttp
import numpy as np

from sim.checker import Request
from skerry.demo.load import ask, request_of
from skerry.wire import oip
from tests.chaos.machine import Machine
from tests.chaos.wire import enter_network

MODEL = "everywhere"
FACTORS = (2.0, 3.0)
"""What the versions of the model multiply by: either is right while one takes over from the other."""
DEADLINE_MS = 1500.0
PATIENCE_S = 6.0
TRY_S = 2.0
PAUSE_S = (0.05, 0.2)
INPUT = np.array([[1.0, 2.0, 3.0]], dtype=np.float32)


class Callers(threading.Thread):
    """So many requests a second from one place, in a thread of its own, in the network of process ``network`` (0: of this one)."""

    def __init__(self, name: str, targets: list[Machine], *, began_s: float, network: int, per_second: float, seed: int) -> None:
        super().__init__(name=f"callers.{name}")
        self.asked: list[Request] = []
        self._targets = targets
        self._began_s = began_s
        self._network = network
        self._every_s = 1 / per_second
        self._chance = random.Random(f"{name}/{seed}")
        self._is_over = threading.Event()
        self._question = request_of(MODEL, [oip.Tensor("x", "FP32", list(INPUT.shape), INPUT.tobytes())], deadline_ms=DEADLINE_MS)

    def end(self) -> None:
        """Wait for what is under way."""
        self._is_over.set()
        self.join(PATIENCE_S + 5)

    def run(self) -> None:
        """See Thread."""
        if self._network:
            enter_network(self._network)
        asyncio.run(self._call())

    async def _call(self) -> None:
        turn = 0
        timeout = aiohttp.ClientTimeout(total=TRY_S, sock_connect=1.0)
        async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as tasks:
            while not self._is_over.is_set():
                order = self._targets[turn % len(self._targets) :] + self._targets[: turn % len(self._targets)]
                tasks.create_task(self._one(session, order), name="request")
                turn += 1
                await asyncio.sleep(self._every_s)

    async def _one(self, session: aiohttp.ClientSession, order: list[Machine]) -> None:
        sent_s, turn, error = time.monotonic(), 0, ""
        is_answered, is_right = False, True
        while not is_answered and time.monotonic() - sent_s < PATIENCE_S:
            target = order[turn % len(order)]
            turn += 1
            reply = await ask(session, target.url, self._question)
            if reply.status == 200:
                is_answered = True
                is_right = _is_right(reply.outputs)
                error = "" if is_right else f"{reply.outputs}"
            else:
                error = f"{error[-200:]} | {target.name}: {reply.status} {reply.error[:160]}"
                await asyncio.sleep(self._chance.uniform(*PAUSE_S))
        names = [target.name for target in order]
        now_s = time.monotonic()
        self.asked.append(Request(sent_s - self._began_s, now_s - self._began_s, names, bool(self._network), is_answered, is_right, error))


def _is_right(outputs: list[oip.Tensor]) -> bool:
    if len(outputs) != 1:
        return False
    values = np.frombuffer(outputs[0].data, dtype=np.float32)
    return any(np.array_equal(values, factor * INPUT.ravel()) for factor in FACTORS)
