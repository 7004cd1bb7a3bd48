"""The protocol changes only in ways that boxes and coordinators of different ages survive, and never unnoticed."""

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from skerry.wire import codec, schema
from skerry.wire.messages import (
    MESSAGES,
    SCHEMA_VERSION,
    Ack,
    Birth,
    Desired,
    EventBatch,
    LogsReply,
    LogsRequest,
    MetricsBatch,
    Presence,
    Reported,
)

COMMITTED = Path(schema.__file__).with_name("schema.json")
HINT = "bump SCHEMA_VERSION in skerry/wire/messages.py and regenerate: python -m skerry.wire.schema > skerry/wire/schema.json"
SHAPES = {1: "e2cd9d", 2: "6cb8a1", 3: "b0ecd1", 4: "84966d", 5: "a23d9f", 6: "7aa1bf", 7: "e03a41", 8: "11ea76"}
"""By version, the first digits of its shape's SHA-256. A released line is never changed: it is how a forgotten bump is seen."""
CLOSED: set[str] = set()
"""Refuse fields they do not know: they could get no new one without breaking older boxes."""

OLDEST: list[tuple[type[msgspec.Struct], bytes]] = [
    (Presence, b'{"online":true,"boot_id":"b","session_epoch":1}'),
    (
        Birth,
        b'{"tier":"edge","labels":{},"gateway_url":"u","boot_id":"b","session_epoch":1,"version":"v","cpus":1,"memory_bytes":1,'
        b'"gpus":[{"uuid":"u","name":"n","memory_mib":1}]}',
    ),
    (
        Desired,
        b'{"fleet":"f","node":"n","generation":1,"issued_at_ms":1,'
        b'"replicas":[{"name":"r","deployment":"d","generation":1,"memory_bytes":1,"cpus":1,'
        b'"model":{"name":"m","version":1,"sha256":"x","size_bytes":1,"warmup":[{"name":"x","shape":[1]}]}}],'
        b'"routes":[{"deployment":"d","model":"m","version":1,"deadline_ms":1,"upstreams":[{"node":"c","url":"u","tier":"cloud"}]}]}',
    ),
    (Reported, b'{"generation":1,"replicas":[{"name":"r","deployment":"d","generation":1,"phase":"ready"}]}'),
    (EventBatch, b'{"events":[{"epoch":"e","seq":1,"at_ms":1,"kind":"k"}]}'),
    (
        MetricsBatch,
        b'{"samples":[{"epoch":"e","seq":1,"at_ms":1,"cpu_ratio":0.1,"memory_used_bytes":1,"serve":[{"deployment":"d"}],'
        b'"gpus":[{"uuid":"u","utilization_ratio":0.1,"memory_used_mib":1,"temperature_c":1,"power_w":1}]}]}',
    ),
    (Ack, b'{"epoch":"e","events_seq":1}'),
    (LogsRequest, b'{"replica":"shelf-0"}'),
    (LogsReply, b'{"lines":["loaded"],"position":"7"}'),
]
"""What the first version sent at the least, in bytes: never edited, since boxes out there send it."""


def shape(document: dict[str, Any]) -> Any:
    """The schema without its words and its version."""

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: bare(part) for key, part in value.items() if key != "description" or not isinstance(part, str)}
        return [bare(part) for part in value] if isinstance(value, list) else value

    return bare({key: value for key, value in document.items() if key != "schema_version"})


def fingerprint(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(shape(document), sort_keys=True).encode()).hexdigest()[:6]


def breaches(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What in ``new`` a program that speaks ``old`` would stumble over, or would make it stumble."""
    found = []
    for name, now in sorted(shape(new)["$defs"].items()):
        if now.get("additionalProperties") is False and name not in CLOSED:
            found.append(f"{name}: unknown fields are ignored on the wire; leave out forbid_unknown_fields")
        was = shape(old)["$defs"].get(name)
        if was is None:
            continue
        needed = sorted(set(now.get("required", [])) - set(was.get("required", [])))
        found += [f"{name}.{field}: a new field needs a default, and an old one keeps its own" for field in needed]
        for field, old_type in was.get("properties", {}).items():
            new_type = now.get("properties", {}).get(field)
            if new_type is None:
                found.append(f"{name}.{field}: is gone, and older programs send or need it")
            elif {k: v for k, v in old_type.items() if k != "default"} != {k: v for k, v in new_type.items() if k != "default"}:
                found.append(f"{name}.{field}: its type changed; give the new meaning a new field")
            elif "default" in old_type and "default" in new_type and old_type["default"] != new_type["default"]:
                found.append(f"{name}.{field}: its default changed, so a message without it changes its meaning")
    found += [f"{name}: is gone" for name in sorted(set(shape(old)["$defs"]) - set(shape(new)["$defs"]))]
    return found


def committed() -> dict[str, Any]:
    return json.loads(COMMITTED.read_text())


def test_the_committed_schema_is_that_of_the_messages():
    now, held = schema.document(), committed()
    assert not breaches(held, now)
    assert shape(held) == shape(now), HINT
    assert held["schema_version"] == SCHEMA_VERSION, HINT
    assert COMMITTED.read_text() == schema.text(now), f"only words or order changed: {HINT.partition(' and ')[2]}"


def test_a_change_of_shape_has_a_version_of_its_own():
    assert fingerprint(schema.document()) == SHAPES.get(SCHEMA_VERSION), f"{HINT}; then add the new version to SHAPES"
    assert max(SHAPES) == SCHEMA_VERSION
    assert len(set(SHAPES.values())) == len(SHAPES)


def test_every_message_stands_in_the_schema_and_in_the_oldest_messages():
    names = [reference["$ref"].removeprefix("#/$defs/") for reference in schema.document()["anyOf"]]
    assert names == [kind.__name__ for kind in MESSAGES] == [kind.__name__ for kind, _ in OLDEST]
    assert set(names) <= schema.document()["$defs"].keys()


@pytest.mark.parametrize(("kind", "payload"), OLDEST, ids=[kind.__name__ for kind, _ in OLDEST])
def test_what_the_first_version_sent_is_still_understood(kind, payload):
    message = codec.decode(payload, kind)
    assert codec.decode(codec.encode(message), kind) == message
    for field, value in json.loads(payload).items():
        kept = getattr(message, field)
        assert isinstance(kept, list) or kept == value


def with_more(value: Any, closed: bool = False) -> Any:
    """The same with a field from the future in every object, but in maps and in what refuses them."""
    if isinstance(value, list):
        return [with_more(part, closed) for part in value]
    if isinstance(value, dict) and value:
        more = {} if closed else {"from_the_future": [1]}
        return {key: with_more(part, key == "warmup") for key, part in value.items()} | more
    return value


@pytest.mark.parametrize(("kind", "payload"), OLDEST, ids=[kind.__name__ for kind, _ in OLDEST])
def test_fields_of_a_newer_version_are_passed_over_at_every_depth(kind, payload):
    newer = json.dumps(with_more(json.loads(payload))).encode()
    assert newer.count(b"from_the_future") >= 1
    assert codec.decode(newer, kind) == codec.decode(payload, kind)


def test_every_field_but_those_of_the_first_version_has_a_default():
    for kind, payload in OLDEST:
        given = json.loads(payload)
        needed = {field.name for field in msgspec.structs.fields(kind) if field.required}
        assert needed <= given.keys(), f"{kind.__name__}: a field without a default was added"


class Old(msgspec.Struct):
    """A message as it was."""

    seq: int
    kind: Presence
    text: str = ""


def changed(*fields: Any, name: str = "Old", closed: bool = False) -> dict[str, Any]:
    return {
        "$defs": msgspec.json.schema_components(
            [msgspec.defstruct(name, fields, forbid_unknown_fields=closed)], ref_template="#/$defs/{name}"
        )[1]
    }


SEQ, KIND, TEXT = ("seq", int), ("kind", Presence), ("text", str, "")


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (changed(SEQ, KIND, TEXT), ""),
        (changed(SEQ, KIND, TEXT, ("more", int, 0)), ""),
        (changed(SEQ, KIND, ("more", int), TEXT), "Old.more: a new field needs a default"),
        (changed(SEQ, KIND, ("text", str)), "Old.text: a new field needs a default, and an old one keeps its own"),
        (changed(SEQ, KIND), "Old.text: is gone"),
        (changed(("seq", str), KIND, TEXT), "Old.seq: its type changed"),
        (changed(SEQ, ("kind", Ack), TEXT), "Old.kind: its type changed"),
        (changed(SEQ, KIND, ("text", str, "x")), "Old.text: its default changed"),
        (changed(SEQ, KIND, TEXT, name="New"), "Old: is gone"),
        (changed(SEQ, KIND, TEXT, closed=True), "Old: unknown fields are ignored"),
    ],
)
def test_a_change_that_would_break_older_programs_is_noticed(new, expected):
    old = {"$defs": msgspec.json.schema_components([Old], ref_template="#/$defs/{name}")[1]}
    found = [breach for breach in breaches(old, new) if not breach.startswith(("Presence", "Ack"))]
    assert bool(found) == bool(expected)
    assert all(breach.startswith(expected) for breach in found)
