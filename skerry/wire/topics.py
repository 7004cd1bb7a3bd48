"""MQTT topics: ``skerry/v1/<fleet>/<node>/<branch>``, built and parsed here and nowhere else.

Positions are fixed, so that a broker's access list can compare the node with the certificate's identity.
"""

import re
from typing import Annotated, Literal, get_args

import msgspec

ROOT = "skerry/v1"

UpBranch = Literal["presence", "birth", "reported", "metrics", "events", "reply"]
Verb = Literal["ack", "logs", "drain", "restart", "snapshot"]
UP_BRANCHES: tuple[UpBranch, ...] = get_args(UpBranch)
VERBS: tuple[Verb, ...] = get_args(Verb)

NAME = "[A-Za-z0-9][A-Za-z0-9_-]{0,62}"
"""What may name a fleet, node, model or deployment: safe in topics, paths, URLs and ACLs alike."""
Name = Annotated[str, msgspec.Meta(pattern=rf"^{NAME}\Z")]
_NAME = re.compile(NAME, re.ASCII)


class Topic(msgspec.Struct, frozen=True):
    """A parsed topic; ``branch`` is an up-branch, ``desired`` or ``command/<verb>``."""

    fleet: str
    node: str
    branch: str


def is_name(text: str) -> bool:
    """Whether ``text`` is such a name."""
    return _NAME.fullmatch(text) is not None


def _checked(fleet: str, node: str) -> str:
    for label, name in (("fleet", fleet), ("node", node)):
        if not is_name(name):
            raise ValueError(f"{label}: {name!r} is not a name (letters, digits, '_' and '-', at most 63)")
    return f"{ROOT}/{fleet}/{node}"


def up(fleet: str, node: str, branch: UpBranch) -> str:
    """The topic on which a box publishes ``branch``."""
    return f"{_checked(fleet, node)}/{branch}"


def desired(fleet: str, node: str) -> str:
    """The topic that retains a box's signed desired document."""
    return f"{_checked(fleet, node)}/desired"


def command(fleet: str, node: str, verb: Verb) -> str:
    """The topic of one typed command to a box."""
    return f"{_checked(fleet, node)}/command/{verb}"


def down_filters(fleet: str, node: str) -> list[str]:
    """What a box subscribes to: its own down-branches and nothing else."""
    base = _checked(fleet, node)
    return [f"{base}/desired", f"{base}/command/+"]


def up_filters(fleet: str) -> list[str]:
    """What the coordinator subscribes to: every box's up-branches."""
    if not is_name(fleet):
        raise ValueError(f"fleet: {fleet!r} is not a name")
    return [f"{ROOT}/{fleet}/+/{branch}" for branch in UP_BRANCHES]


def parse(topic: str) -> Topic | None:
    """The parts of one of our topics, or None for anything that is not exactly one."""
    parts = topic.split("/")
    if len(parts) not in (5, 6) or "/".join(parts[:2]) != ROOT or not (is_name(parts[2]) and is_name(parts[3])):
        return None
    branch = "/".join(parts[4:])
    known = branch in UP_BRANCHES or branch == "desired" or (parts[4] == "command" and len(parts) == 6 and parts[5] in VERBS)
    return Topic(parts[2], parts[3], branch) if known else None


def client_id(fleet: str, node: str) -> str:
    """As what a box connects; a broker that goes by certificates makes the node's name of it."""
    return f"{fleet}-box-{node}"
