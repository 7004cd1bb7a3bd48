"""Topics are built and parsed in one place, and only whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skerry.wire import topics


def test_every_topic_that_is_built_parses_back():
    built = [topics.up("f", "n", branch) for branch in topics.UP_BRANCHES]
    built += [topics.desired("f", "n")] + [topics.command("f", "n", verb) for verb in topics.VERBS]
    for topic in built:
        parsed = topics.parse(topic)
        assert parsed is not None
        assert "/".join(["skerry/v1", parsed.fleet, parsed.node, parsed.branch]) == topic


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "skerry/v1/f/n",
        "skerry/v2/f/n/birth",
        "skerry/v1/f/n/birth/x",
        "skerry/v1/f//birth",
        "skerry/v1/f/+/birth",
        "skerry/v1/f/n/command/rm",
    ],
)
def test_anything_that_is_not_exactly_a_topic_of_ours_is_none(topic):
    assert topics.parse(topic) is None


@given(st.text(alphabet=st.sampled_from("ab1-_/+#. \x00é"), max_size=8))
def test_no_name_can_reach_outside_its_position(name):
    try:
        built = topics.up("fleet", name, "birth")
    except ValueError:
        return
    assert built.count("/") == 4
    assert not set(name) & set("/+#\x00 ")
