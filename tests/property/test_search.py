"""What is found in the registry is what a look at each box would find."""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlite_utils import Database as Tables

from coordinator.core.search import NotUnderstood, Search, parse
from coordinator.registry import finding
from coordinator.registry.migrations import migrate
from skerry.wire import codec
from skerry.wire.messages import Birth

NAMES = ["store-1", "store-10", "st%re", "van_7", "van-7", r"back\slash", "Store-2"]
SITES = ["store-1", "store-2", "depot", "", None]


class Box:
    def __init__(self, name: str, given: dict[str, Any]) -> None:
        self.name, self.given = name, given

    @property
    def state(self) -> str:
        given = self.given
        if given["revoked"] and given["bound"] is not None:
            return "revoked"
        if given["online"]:
            return "online"
        if not given["has_birth"]:
            return "new"
        return "offline" if given["goodbye"] else "lost" if given["lost"] else "unknown"

    def label(self, key: str) -> str | None:
        given = self.given
        if given["bound"] is not None and key in given["bound"]:
            return str(given["bound"][key])
        return given["labels"].get(key) if given["has_birth"] else None

    def is_found(self, search: Search) -> bool:
        given = self.given
        tier = "cloud" if given["bound"] is not None else "edge" if given["has_birth"] else None
        return all([
            all(part.lower() in self.name.lower() for part in search.names),
            all((value := self.label(key)) is not None and fnmatchcase(value, pattern) for key, pattern in search.labels.items()),
            search.state in ("", self.state),
            not search.version or (given["has_birth"] and fnmatchcase(given["version"], search.version)),
            search.tier in ("", tier),
        ])  # fmt: skip


def kept(boxes: list[Box]) -> Tables:
    tables = Tables(memory=True)
    migrate(tables.conn)
    for box in boxes:
        given = box.given
        birth = Birth("edge", given["labels"], "u", "b", 1, given["version"], 1, 1) if given["has_birth"] else None
        joins = [] if given["bound"] is None else [
            ("INSERT OR REPLACE INTO enrolled VALUES (?, 'cloud', ?, 'k', ?, 1, ?)",
             [box.name, codec.encode(labels).decode(), box.name, 5 if given["revoked"] else None])
            for labels in ({"site": "elsewhere", "once": "1"}, given["bound"])
        ]  # fmt: skip
        comes = [
            ("INSERT INTO nodes (id, online, changed_at_ms, first_seen_ms, session_epoch, said_goodbye, is_lost)"
             " VALUES (?, ?, 0, 0, 1, ?, ?)",
             [box.name, given["online"], given["goodbye"], given["lost"]]),
            *(("UPDATE nodes SET birth = ? WHERE id = ?", [codec.encode(one).decode(), box.name])
              for one in ([Birth("cloud", {"site": "before", "old": "1"}, "u", "b", 1, "0", 1, 1), birth] if birth else [])),
        ]  # fmt: skip
        for query, values in [*joins, *comes] if given["joins_first"] else [*comes, *joins]:
            tables.execute(query, values)
    return tables


boxes = st.lists(st.sampled_from(NAMES), unique=True).flatmap(
    lambda names: st.tuples(*(st.fixed_dictionaries({
        "online": st.booleans(), "has_birth": st.sampled_from([True, True, False]), "goodbye": st.booleans(), "lost": st.booleans(),
        "version": st.sampled_from(["0.1.0", "0.2.0"]), "labels": st.sampled_from([{}, {"site": "store-1"}, {"site": "depot", "a.b": "x"}]),
        "bound": st.sampled_from([None, None, {}, {"site": "store-2"}]), "revoked": st.booleans(), "joins_first": st.booleans(),
    }).map(lambda given, name=name: Box(name, given)) for name in names)).map(list)
)  # fmt: skip
searches = st.builds(
    Search,
    names=st.lists(st.sampled_from(["store", "-1", "%", "_", "\\", "STORE", "7"]), max_size=2),
    labels=st.sampled_from(
        [{}, {"site": "store-*"}, {"site": "*"}, {"site": "depot"}, {"a.b": "?"}, {"none": "*"}, {"old": "*"}, {"once": "*"}]
    ),
    state=st.sampled_from(["", "", "online", "lost", "unknown", "offline", "new", "revoked"]),
    version=st.sampled_from(["", "", "0.2*", "0.1.0"]),
    tier=st.sampled_from(["", "", "edge", "cloud"]),
)


@settings(max_examples=300)
@given(boxes, searches, st.integers(1, 3))
def test_each_box_that_holds_all_words_is_found_once_page_by_page(boxes, search, size):
    tables = kept(boxes)
    expected = sorted(box.name for box in boxes if box.is_found(search))
    assert finding.find(tables, search) == expected
    assert finding.count(tables, search) == len(expected)
    pages, after = [], ""
    while page := finding.find(tables, search, after=after, limit=size):
        pages += page
        after = page[-1]
    assert pages == expected
    states = finding.count_by_state(tables)
    assert {state: count for state, count in states.items() if count} == {
        state: n for state in states if (n := sum(box.state == state for box in boxes))
    }
    tables.conn.close()


@pytest.mark.parametrize(
    ("text", "search"),
    [
        ("", Search()),
        ("store 7", Search(["store", "7"])),
        ("site=store-* state:lost", Search(labels={"site": "store-*"}, state="lost")),
        ("version:0.2* tier:edge a", Search(["a"], version="0.2*", tier="edge")),
    ],
)
def test_words_are_read_as_they_say(text, search):
    assert parse(text) == search


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("state:well", "state is one of online"), ("tier:sky", "tier is one of edge, cloud"), ("colour:red", "there is state:"),
        ("=x", "KEY=PATTERN"), ("x=", "KEY=PATTERN"), ('a"b=c', "KEY=PATTERN"), ("version:", "what version"),
        ("a b c d e f g h i", "more than 8 words"), ("x" * 201, "more than 200"), ("a\x00", "can't be printed"),
    ],
)  # fmt: skip
def test_what_can_not_be_read_is_said(text, why):
    with pytest.raises(NotUnderstood, match=why):
        parse(text)


def test_nothing_that_is_typed_reaches_sql(tmp_path: Path):
    plain = {"online": True, "has_birth": True, "goodbye": False, "lost": False, "version": "1", "labels": {}, "bound": None}
    tables = kept([Box("store-1", {**plain, "revoked": False, "joins_first": False})])
    for text in ("'; DROP TABLE nodes; --", "x'=y", "a]='*", "$.x=*", "%' OR 1=1"):
        finding.find(tables, parse(text))
    assert finding.find(tables, Search()) == ["store-1"]
    tables.conn.close()
