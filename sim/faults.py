"""What befalls a fleet, drawn from a seed: the same seed, boxes and time give the same schedule, on real machines and on a virtual clock.

Each box has two lanes, its link and its machine, and the coordinator's side has one. Within a lane one fault is over before the next
begins; lanes are independent, so that a box may be cut off while its disk is full and the broker is gone.
"""

import random
from typing import Literal, get_args

import msgspec

Kind = Literal[
    "cut", "loss", "latency", "slow", "one_way",
    "kill", "freeze", "disk_full", "disk_read_only", "disk_stuck", "clock", "memory", "reboot", "twin",
    "broker_restart", "broker_wipe", "centre_kill", "centre_freeze",
]  # fmt: skip
LINK: tuple[Kind, ...] = ("cut", "loss", "latency", "slow", "one_way")
MACHINE: tuple[Kind, ...] = ("kill", "freeze", "disk_full", "disk_read_only", "disk_stuck", "clock", "memory", "reboot", "twin")
CENTRE: tuple[Kind, ...] = ("broker_restart", "broker_wipe", "centre_kill", "centre_freeze")
KINDS: tuple[Kind, ...] = get_args(Kind)

PARTS = ("agent", "warden", "gateway", "worker")
CENTRE_PARTS = ("coordinator", "signer", "broker")
LOSS = 0.3
LATENCY_S = 2.0
BITS_PER_S = 64_000
CLOCKS_S = (-86_400.0, -30.0, 45.0, 7_200.0)
REST_S = (1.0, 6.0)
"""Between two faults of a lane: at least, at most."""
LASTS_S: dict[Kind, tuple[float, float]] = {
    "cut": (1.0, 12.0), "loss": (3.0, 12.0), "latency": (4.0, 12.0), "slow": (4.0, 12.0), "one_way": (2.0, 12.0),
    "kill": (0.0, 0.0), "freeze": (0.5, 12.0), "disk_full": (2.0, 10.0), "disk_read_only": (2.0, 8.0),
    "disk_stuck": (2.0, 14.0), "clock": (2.0, 10.0),
    "memory": (2.0, 5.0), "reboot": (0.5, 4.0), "twin": (3.0, 8.0),
    "broker_restart": (0.2, 5.0), "broker_wipe": (0.2, 5.0), "centre_kill": (0.0, 0.0), "centre_freeze": (0.5, 8.0),
}  # fmt: skip


class Fault(msgspec.Struct, frozen=True):
    """One thing that happens to ``box`` (empty: to the coordinator's side), seconds from the start. ``part`` is the program that is meant,
    ``amount`` a share, seconds or bits a second, as the kind has it."""

    at_s: float
    lasts_s: float
    kind: Kind
    box: str = ""
    part: str = ""
    amount: float = 0.0

    @property
    def until_s(self) -> float:
        """When it is over."""
        return self.at_s + self.lasts_s


def schedule(seed: int, *, boxes: list[str], seconds: float, kinds: tuple[Kind, ...] = KINDS) -> list[Fault]:
    """All that happens within ``seconds``, by time; only of these kinds."""
    chance = random.Random(seed)
    lanes = [(box, lane) for box in boxes for lane in (LINK, MACHINE)] + [("", CENTRE)]
    found = []
    for box, lane in lanes:
        chosen = [kind for kind in lane if kind in kinds]
        at_s = chance.uniform(*REST_S)
        while chosen:
            fault = _drawn(chance, at_s, box, chance.choice(chosen))
            if fault.until_s > seconds:
                break
            found.append(fault)
            at_s = fault.until_s + chance.uniform(*REST_S)
    return sorted(found, key=lambda fault: (fault.at_s, fault.box, fault.kind))


def _drawn(chance: random.Random, at_s: float, box: str, kind: Kind) -> Fault:
    part, amount = "", 0.0
    match kind:
        case "kill" | "freeze":
            part = chance.choice(PARTS)
        case "centre_kill" | "centre_freeze":
            part = chance.choice(CENTRE_PARTS)
        case "one_way":
            part = chance.choice(("up", "down"))
        case "loss":
            amount = LOSS
        case "latency":
            amount = LATENCY_S
        case "slow":
            amount = BITS_PER_S
        case "clock":
            amount = chance.choice(CLOCKS_S)
        case _:
            pass
    return Fault(round(at_s, 3), round(chance.uniform(*LASTS_S[kind]), 3), kind, box, part, amount)
