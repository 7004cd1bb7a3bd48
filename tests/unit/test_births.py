"""What a coordinator keeps of what a box says it is."""

import sqlite3

from sqlite_utils import Database

from coordinator.registry import nodes
from coordinator.registry.migrations import migrate
from skerry.wire.messages import Birth


def birth(**more) -> Birth:
    return Birth("edge", {}, "http://box", "boot", 1, "v", 1, 1, **more)


def test_an_agent_that_has_not_heard_from_its_warden_does_not_take_the_sandboxes_from_its_box():
    connection = sqlite3.connect(":memory:", isolation_level=None)
    migrate(connection)
    tables = Database(connection)
    nodes.save_birth(tables, "box", birth(), 1)
    assert nodes.read_node(tables, "box").birth.rungs == []
    nodes.save_birth(tables, "box", birth(rungs=["container"], rungs_absent={"gvisor": "not installed"}), 2)
    assert not nodes.save_birth(tables, "box", birth(), 3), "nothing changed"
    kept = nodes.read_node(tables, "box").birth
    assert (kept.rungs, kept.rungs_absent) == (["container"], {"gvisor": "not installed"})
    assert nodes.save_birth(tables, "box", birth(rungs_absent={"container": "the engine is gone"}), 4), "a warden that offers none says why"
    assert nodes.read_node(tables, "box").birth.rungs == []
