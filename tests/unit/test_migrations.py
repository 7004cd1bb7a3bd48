"""A registry that an earlier version wrote is brought up to date, step by step, and nothing in it is lost."""

import sqlite3

import msgspec
import pytest
from sqlite_utils import Database as Tables

from coordinator.core.deployment import parse
from coordinator.registry import deployments, models
from coordinator.registry.migrations import STEPS, TooNew, migrate
from skerry.wire.messages import CloudBudget, ModelRef, StateTensor, WarmupTensor

BUDGETED = "name: metered\nmodel: m:1\nsplit: {cloud_budget: {requests_per_hour: 7}}\n"
WARNING = "split.cloud_budget: kept with the deployment, but this version does not act on it yet"


def written_by(path, version: int) -> sqlite3.Connection:
    """A file as a coordinator left it that knew ``version`` steps."""
    connection = sqlite3.connect(path, isolation_level=None)
    for step in STEPS[:version]:
        assert isinstance(step, str), "the first steps of a file are statements"
        connection.executescript(step)
    connection.execute(f"PRAGMA user_version = {version}")
    return connection


def as_version_1_kept(text: str) -> str:
    spec = msgspec.to_builtins(parse(text))
    budget = spec.pop("cloud_budget")
    del spec["batching"]
    return msgspec.json.encode({**spec, "warnings": [WARNING] if budget else []}).decode()


@pytest.fixture
def old(tmp_path):
    connection = written_by(tmp_path / "registry.db", 1)
    warmup = msgspec.json.encode([WarmupTensor("x", [1, 3])]).decode()
    connection.execute("INSERT INTO models VALUES ('m', 1, 'digest', 5, ?, 99)", (warmup,))
    for text in (BUDGETED, "name: plain\nmodel: m:1\n"):
        connection.execute("INSERT INTO deployments VALUES (?, 3, ?, ?, 1, 2)", (parse(text).name, text, as_version_1_kept(text)))
    gone = BUDGETED.replace("metered", "strange")
    connection.execute("INSERT INTO deployments VALUES ('strange', 3, 'no longer: taken', ?, 1, 2)", (as_version_1_kept(gone),))
    yield connection
    connection.close()


def test_models_of_an_old_file_keep_no_state_until_they_are_pushed_with_it(old):
    migrate(old)
    old.row_factory = sqlite3.Row
    tables = Tables(old)
    held = ModelRef("m", 1, "digest", 5, [WarmupTensor("x", [1, 3])])
    assert models.read_models(tables) == [models.Model(held, 99)]
    now = msgspec.structs.replace(held, state=[StateTensor("h", "hN")])
    assert not models.save_model(tables, now, 100), "the version is the same, what is known of it is more"
    assert models.read_model(tables, "m", 1).ref == now


def test_budgets_that_an_old_file_kept_are_acted_upon_under_the_same_generation(old):
    migrate(old)
    old.row_factory = sqlite3.Row
    found = {stored.name: stored for stored in deployments.read_deployments(Tables(old))}
    assert (found["metered"].spec.cloud_budget, found["metered"].spec.warnings) == (CloudBudget(7), [])
    assert (found["metered"].generation, found["metered"].text, found["metered"].changed_at_ms) == (3, BUDGETED, 2)
    assert found["plain"].spec.cloud_budget is None
    assert found["strange"].spec.warnings == [WARNING], "what can't be read any more stays as it was"


def test_a_text_that_comes_again_is_understood_as_this_version_does(old):
    migrate(old)
    old.row_factory = sqlite3.Row
    tables = Tables(old)
    tables.execute("UPDATE deployments SET spec = ? WHERE name = 'metered'", [as_version_1_kept(BUDGETED)])
    assert deployments.save_deployment(tables, parse(BUDGETED), BUDGETED, 100) == 3
    assert next(s for s in deployments.read_deployments(tables) if s.name == "metered").spec.cloud_budget == CloudBudget(7)


@pytest.mark.parametrize("version", range(3))
def test_a_file_of_any_version_ends_like_a_new_one(tmp_path, version):
    connection, new = written_by(tmp_path / "old.db", version), written_by(tmp_path / "new.db", 0)
    for one in (connection, new):
        migrate(one)
        migrate(one)
    columns = "SELECT m.name, p.name, p.type FROM sqlite_master m, pragma_table_info(m.name) p ORDER BY 1, 2"
    assert connection.execute(columns).fetchall() == new.execute(columns).fetchall()
    assert connection.execute("PRAGMA user_version").fetchone() == (len(STEPS),)
    connection.close()
    new.close()


def test_a_file_of_a_newer_version_is_left_alone(tmp_path):
    connection = written_by(tmp_path / "registry.db", 1)
    connection.execute(f"PRAGMA user_version = {len(STEPS) + 1}")
    with pytest.raises(TooNew, match="install the newer one"):
        migrate(connection)
    connection.close()
