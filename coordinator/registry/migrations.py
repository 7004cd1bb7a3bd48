"""Numbered, forward only. A file knows its number in ``user_version``; each step runs in a transaction of its own."""

import sqlite3
from collections.abc import Callable

from coordinator.core import deployment
from skerry.wire import codec


def _read_budgets(connection: sqlite3.Connection) -> None:
    _read_again(connection, "split.cloud_budget")


def _read_policies(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE nodes ADD COLUMN silent_since_ms INTEGER NOT NULL DEFAULT 0")
    connection.execute("ALTER TABLE nodes ADD COLUMN said_goodbye INTEGER NOT NULL DEFAULT 0")
    connection.execute("ALTER TABLE nodes ADD COLUMN is_lost INTEGER NOT NULL DEFAULT 0")
    connection.execute("UPDATE nodes SET silent_since_ms = changed_at_ms WHERE NOT online AND birth IS NOT NULL")
    connection.execute("CREATE TABLE ear (heard_until_ms INTEGER NOT NULL)")
    connection.execute("INSERT INTO ear VALUES (0)")
    _read_again(connection, "disconnect")


def _read_again(connection: sqlite3.Connection, key: str) -> None:
    """What was kept and not acted upon: the text is read again. One that is no deployment any more stays as it is."""
    rows = connection.execute("SELECT name, text FROM deployments WHERE spec LIKE ?", (f"%{key}: kept%",)).fetchall()
    for name, text in rows:
        try:
            spec = deployment.parse(text)
        except deployment.DeploymentError:
            continue
        connection.execute("UPDATE deployments SET spec = ? WHERE name = ?", (codec.encode(spec).decode(), name))


STEPS: list[str | Callable[[sqlite3.Connection], None]] = [
    # 1
    """
    CREATE TABLE nodes (
        id TEXT PRIMARY KEY, online INTEGER NOT NULL, changed_at_ms INTEGER NOT NULL, first_seen_ms INTEGER NOT NULL,
        session_epoch INTEGER NOT NULL, birth TEXT, reported TEXT);
    CREATE TABLE desired (node TEXT PRIMARY KEY, generation INTEGER NOT NULL, document TEXT NOT NULL);
    CREATE TABLE models (
        name TEXT NOT NULL, version INTEGER NOT NULL, sha256 TEXT NOT NULL, size_bytes INTEGER NOT NULL, warmup TEXT NOT NULL,
        pushed_at_ms INTEGER NOT NULL, PRIMARY KEY (name, version));
    CREATE TABLE deployments (
        name TEXT PRIMARY KEY, generation INTEGER NOT NULL, text TEXT NOT NULL, spec TEXT NOT NULL,
        created_at_ms INTEGER NOT NULL, changed_at_ms INTEGER NOT NULL);
    CREATE TABLE generations (name TEXT PRIMARY KEY, last INTEGER NOT NULL);
    CREATE TABLE outcomes (deployment TEXT PRIMARY KEY, outcome TEXT NOT NULL);
    CREATE TABLE events (
        id INTEGER PRIMARY KEY AUTOINCREMENT, node TEXT NOT NULL, epoch TEXT NOT NULL, seq INTEGER NOT NULL, at_ms INTEGER NOT NULL,
        received_at_ms INTEGER NOT NULL, kind TEXT NOT NULL, subject TEXT NOT NULL, text TEXT NOT NULL, UNIQUE (node, epoch, seq));
    CREATE INDEX events_by_node ON events (node, id);
    CREATE TABLE numberings (
        node TEXT NOT NULL, epoch TEXT NOT NULL, stream TEXT NOT NULL, numbering TEXT NOT NULL, dropped INTEGER NOT NULL,
        PRIMARY KEY (node, epoch, stream));
    CREATE TABLE serve_rollups (
        deployment TEXT NOT NULL, at_s INTEGER NOT NULL, node TEXT NOT NULL, edge INTEGER NOT NULL, peer INTEGER NOT NULL,
        cloud INTEGER NOT NULL, refused INTEGER NOT NULL, failed INTEGER NOT NULL, late INTEGER NOT NULL, latency TEXT NOT NULL,
        PRIMARY KEY (node, at_s, deployment)) WITHOUT ROWID;
    CREATE TABLE box_rollups (
        node TEXT NOT NULL, at_s INTEGER NOT NULL, samples INTEGER NOT NULL, cpu_ratio REAL NOT NULL, memory_used_bytes INTEGER NOT NULL,
        gpu_ratio REAL NOT NULL, PRIMARY KEY (node, at_s)) WITHOUT ROWID;
    """,
    # 2: what a model remembers between the requests of a sequence
    "ALTER TABLE models ADD COLUMN state TEXT NOT NULL DEFAULT '[]'",
    # 3: split.cloud_budget is acted upon
    _read_budgets,
    # 4: who may join, who did, and the certificates that were issued
    """
    CREATE TABLE claims (
        id TEXT PRIMARY KEY, secret_sha256 TEXT NOT NULL, labels TEXT NOT NULL, node TEXT NOT NULL, tier TEXT NOT NULL,
        created_at_ms INTEGER NOT NULL, expires_at_ms INTEGER NOT NULL, used_at_ms INTEGER, used_by TEXT, key_sha256 TEXT);
    CREATE TABLE enrolled (
        node TEXT PRIMARY KEY, tier TEXT NOT NULL, labels TEXT NOT NULL, key_sha256 TEXT NOT NULL, token_sha256 TEXT NOT NULL UNIQUE,
        enrolled_at_ms INTEGER NOT NULL, revoked_at_ms INTEGER);
    CREATE TABLE certificates (
        serial TEXT PRIMARY KEY, node TEXT NOT NULL, role TEXT NOT NULL, key_sha256 TEXT NOT NULL, not_before_ms INTEGER NOT NULL,
        not_after_ms INTEGER NOT NULL, revoked_at_ms INTEGER, reason TEXT NOT NULL);
    CREATE INDEX certificates_by_node ON certificates (node, not_before_ms);
    CREATE INDEX certificates_by_end ON certificates (not_after_ms);
    """,
    # 5: who may look and act, and who changed what
    """
    CREATE TABLE users (name TEXT PRIMARY KEY, role TEXT NOT NULL, password_hash TEXT NOT NULL, created_at_ms INTEGER NOT NULL);
    CREATE TABLE invitations (name TEXT PRIMARY KEY, secret_sha256 TEXT NOT NULL UNIQUE, expires_at_ms INTEGER NOT NULL);
    CREATE TABLE sessions (
        secret_sha256 TEXT PRIMARY KEY, user TEXT NOT NULL, role TEXT NOT NULL, token TEXT NOT NULL, began_at_ms INTEGER NOT NULL,
        expires_at_ms INTEGER NOT NULL);
    CREATE INDEX sessions_by_user ON sessions (user, began_at_ms);
    CREATE TABLE api_tokens (
        id TEXT PRIMARY KEY, secret_sha256 TEXT NOT NULL, title TEXT NOT NULL, user TEXT NOT NULL, role TEXT NOT NULL,
        created_at_ms INTEGER NOT NULL, expires_at_ms INTEGER NOT NULL, used_at_ms INTEGER NOT NULL DEFAULT 0);
    CREATE INDEX api_tokens_by_user ON api_tokens (user);
    CREATE TABLE audit (
        id INTEGER PRIMARY KEY AUTOINCREMENT, at_ms INTEGER NOT NULL, who TEXT NOT NULL, via TEXT NOT NULL, address TEXT NOT NULL,
        action TEXT NOT NULL, subject TEXT NOT NULL, before TEXT NOT NULL, after TEXT NOT NULL, previous TEXT NOT NULL,
        sha256 TEXT NOT NULL);
    CREATE INDEX audit_by_subject ON audit (subject, id);
    CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'audit records are not changed'); END;
    CREATE TRIGGER audit_is_not_removed BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'audit records are not removed'); END;
    """,
    # 6: who vouches for a model
    "ALTER TABLE models ADD COLUMN signature TEXT NOT NULL DEFAULT ''",
    # 7: users who are known elsewhere
    "ALTER TABLE users ADD COLUMN subject TEXT NOT NULL DEFAULT ''",
    # 8: for how long a box was silent; disconnect is acted upon
    _read_policies,
    # 9: which of a box's numbers each of its connections was heard to use, and which of them were told that theirs are spent
    """
    CREATE TABLE heard (
        node TEXT NOT NULL, nonce TEXT NOT NULL, epoch TEXT NOT NULL, through INTEGER NOT NULL, is_spent INTEGER NOT NULL,
        UNIQUE (node, nonce));
    """,
    # 10: boxes that are to run nothing, and why
    """
    CREATE TABLE drained (node TEXT PRIMARY KEY, at_ms INTEGER NOT NULL, reason TEXT NOT NULL);
    """,
    # 11: changes of deployments that spread in waves, and those that were no good
    """
    CREATE TABLE rollouts (deployment TEXT PRIMARY KEY, is_over INTEGER NOT NULL, rollout TEXT NOT NULL);
    CREATE TABLE failed_changes (
        deployment TEXT NOT NULL, text_sha256 TEXT NOT NULL, at_ms INTEGER NOT NULL, reason TEXT NOT NULL,
        PRIMARY KEY (deployment, text_sha256));
    """,
    # 12: releases of the box software, and how each spread over the fleet
    """
    CREATE TABLE releases (
        version TEXT NOT NULL, python TEXT NOT NULL, machine TEXT NOT NULL, sha256 TEXT NOT NULL, size_bytes INTEGER NOT NULL,
        signature TEXT NOT NULL, pushed_at_ms INTEGER NOT NULL, PRIMARY KEY (version, python, machine));
    CREATE TABLE spreads (number INTEGER PRIMARY KEY AUTOINCREMENT, version TEXT NOT NULL, spread TEXT NOT NULL);
    CREATE INDEX spreads_by_version ON spreads (version, number);
    """,
    # 13: answers of shadows
    """
    ALTER TABLE serve_rollups ADD COLUMN compared INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE serve_rollups ADD COLUMN differed INTEGER NOT NULL DEFAULT 0;
    """,
    # 14: what boxes are looked for by; labels stand here as they count, those that a box was enrolled with above its own
    """
    ALTER TABLE nodes ADD COLUMN version TEXT AS (json_extract(birth, '$.version')) VIRTUAL;
    ALTER TABLE nodes ADD COLUMN own_tier TEXT AS (json_extract(birth, '$.tier')) VIRTUAL;
    ALTER TABLE nodes ADD COLUMN has_birth INTEGER AS (birth IS NOT NULL) VIRTUAL;
    CREATE INDEX nodes_by_version ON nodes (version, id);
    CREATE INDEX nodes_by_state ON nodes (online, has_birth, said_goodbye, is_lost, id);
    CREATE INDEX enrolled_revoked ON enrolled (node) WHERE revoked_at_ms > 0;
    CREATE TABLE node_labels (key TEXT NOT NULL, value TEXT NOT NULL, node TEXT NOT NULL, PRIMARY KEY (key, value, node)) WITHOUT ROWID;
    CREATE INDEX node_labels_by_node ON node_labels (node);
    CREATE VIEW effective_labels AS
        SELECT e.node AS node, l.key AS key, CAST(l.value AS TEXT) AS value FROM enrolled e, json_each(e.labels) l
        UNION ALL
        SELECT n.id, l.key, CAST(l.value AS TEXT) FROM nodes n, json_each(n.birth, '$.labels') l WHERE n.birth IS NOT NULL
            AND NOT EXISTS (SELECT 1 FROM enrolled e, json_each(e.labels) b WHERE e.node = n.id AND b.key = l.key);
    INSERT INTO node_labels SELECT key, value, node FROM effective_labels WHERE node IN (SELECT id FROM nodes);
    CREATE TRIGGER labels_of_a_new_node AFTER INSERT ON nodes BEGIN
        INSERT INTO node_labels SELECT key, value, node FROM effective_labels WHERE node = NEW.id; END;
    CREATE TRIGGER labels_of_a_birth AFTER UPDATE OF birth ON nodes WHEN OLD.birth IS NOT NEW.birth BEGIN
        DELETE FROM node_labels WHERE node = NEW.id;
        INSERT INTO node_labels SELECT key, value, node FROM effective_labels WHERE node = NEW.id; END;
    CREATE TRIGGER labels_of_a_node_that_is_gone AFTER DELETE ON nodes BEGIN DELETE FROM node_labels WHERE node = OLD.id; END;
    CREATE TRIGGER labels_of_an_enrolment AFTER INSERT ON enrolled BEGIN
        DELETE FROM node_labels WHERE node = NEW.node;
        INSERT INTO node_labels SELECT key, value, node FROM effective_labels WHERE node = NEW.node
            AND NEW.node IN (SELECT id FROM nodes); END;
    CREATE TRIGGER labels_of_another_enrolment AFTER UPDATE OF labels ON enrolled BEGIN
        DELETE FROM node_labels WHERE node = NEW.node;
        INSERT INTO node_labels SELECT key, value, node FROM effective_labels WHERE node = NEW.node
            AND NEW.node IN (SELECT id FROM nodes); END;
    """,
    # 15: what each box was told to run and says that it runs, by replica, for sums over a fleet whose documents nobody reads for them
    """
    ALTER TABLE nodes ADD COLUMN said_generation INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE nodes ADD COLUMN refused TEXT NOT NULL DEFAULT '';
    UPDATE nodes SET said_generation = json_extract(reported, '$.generation'), refused = coalesce(json_extract(reported, '$.refused'), '')
        WHERE reported IS NOT NULL;
    CREATE INDEX nodes_refusing ON nodes (id) WHERE refused != '';
    CREATE TABLE told (
        node TEXT NOT NULL, replica TEXT NOT NULL, deployment TEXT NOT NULL, generation INTEGER NOT NULL, sha256 TEXT NOT NULL,
        PRIMARY KEY (deployment, node, replica)) WITHOUT ROWID;
    CREATE INDEX told_by_node ON told (node);
    CREATE TABLE said (
        node TEXT NOT NULL, replica TEXT NOT NULL, deployment TEXT NOT NULL, generation INTEGER NOT NULL, sha256 TEXT NOT NULL,
        phase TEXT NOT NULL, PRIMARY KEY (deployment, node, replica)) WITHOUT ROWID;
    CREATE INDEX said_by_node ON said (node);
    CREATE INDEX said_failing ON said (node, phase) WHERE phase IN ('failed', 'backoff');
    CREATE VIEW told_of AS
        SELECT d.node AS node, json_extract(r.value, '$.name') AS replica, json_extract(r.value, '$.deployment') AS deployment,
            json_extract(r.value, '$.generation') AS generation, json_extract(r.value, '$.model.sha256') AS sha256
        FROM desired d, json_each(d.document, '$.replicas') r;
    CREATE VIEW said_of AS
        SELECT n.id AS node, json_extract(r.value, '$.name') AS replica, json_extract(r.value, '$.deployment') AS deployment,
            json_extract(r.value, '$.generation') AS generation, coalesce(json_extract(r.value, '$.sha256'), '') AS sha256,
            json_extract(r.value, '$.phase') AS phase
        FROM nodes n, json_each(n.reported, '$.replicas') r WHERE n.reported IS NOT NULL;
    INSERT OR REPLACE INTO told SELECT node, replica, deployment, generation, sha256 FROM told_of;
    INSERT OR REPLACE INTO said SELECT node, replica, deployment, generation, sha256, phase FROM said_of;
    CREATE TRIGGER replicas_told AFTER INSERT ON desired BEGIN
        DELETE FROM told WHERE node = NEW.node;
        INSERT OR REPLACE INTO told SELECT node, replica, deployment, generation, sha256 FROM told_of WHERE node = NEW.node; END;
    CREATE TRIGGER replicas_said AFTER UPDATE OF reported ON nodes WHEN OLD.reported IS NOT NEW.reported BEGIN
        UPDATE nodes SET said_generation = coalesce(json_extract(NEW.reported, '$.generation'), 0),
            refused = coalesce(json_extract(NEW.reported, '$.refused'), '') WHERE id = NEW.id;
        DELETE FROM said WHERE node = NEW.id;
        INSERT OR REPLACE INTO said SELECT node, replica, deployment, generation, sha256, phase FROM said_of WHERE node = NEW.id; END;
    CREATE TRIGGER replicas_of_a_node_that_is_gone AFTER DELETE ON nodes BEGIN DELETE FROM said WHERE node = OLD.id; END;
    CREATE TRIGGER replicas_no_longer_told AFTER DELETE ON desired BEGIN DELETE FROM told WHERE node = OLD.node; END;
    CREATE TABLE hooks (url TEXT PRIMARY KEY, reached INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE restarts (node TEXT NOT NULL, replica TEXT NOT NULL, PRIMARY KEY (node, replica)) WITHOUT ROWID;
    ALTER TABLE box_rollups ADD COLUMN temperature_c REAL NOT NULL DEFAULT 0;
    ALTER TABLE box_rollups ADD COLUMN power_w REAL NOT NULL DEFAULT 0;
    ALTER TABLE box_rollups ADD COLUMN network_received_bytes_per_s REAL NOT NULL DEFAULT 0;
    ALTER TABLE box_rollups ADD COLUMN network_sent_bytes_per_s REAL NOT NULL DEFAULT 0;
    ALTER TABLE box_rollups ADD COLUMN link_rtt_ms REAL NOT NULL DEFAULT 0;
    ALTER TABLE numberings ADD COLUMN lost INTEGER AS (coalesce(json_extract(numbering, '$.lost'), 0)) VIRTUAL;
    CREATE INDEX numberings_with_gaps ON numberings (stream) WHERE json_array_length(numbering, '$.gaps') > 0;
    CREATE INDEX numberings_lost ON numberings (stream, lost);
    """,
    """
    CREATE INDEX nodes_software_failed ON nodes (id) WHERE json_extract(reported, '$.software.phase') = 'failed';
    """,
]


class TooNew(Exception):
    """The file was written by a newer coordinator; the text says what to do."""


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the file up to date. Raises TooNew."""
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(STEPS):
        raise TooNew(
            f"the registry is of version {version}, this coordinator knows {len(STEPS)}: install the newer one, or restore a backup"
        )
    for number, step in enumerate(STEPS[version:], version + 1):
        if isinstance(step, str):
            connection.executescript(f"BEGIN; {step}; PRAGMA user_version = {number}; COMMIT;")
            continue
        with connection:
            connection.execute("BEGIN")
            step(connection)
            connection.execute(f"PRAGMA user_version = {number}")
