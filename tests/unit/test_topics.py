"""Topics are built and parsed in one place, and only whole."""

import msgspec
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


@given(
    st.text(max_size=70)
    | st.from_regex(topics.NAME, fullmatch=True)
    | st.sampled_from(["a\n", "a\r\n", "a" * 63, "a" * 64, "_a", "\u00e9"])
)
def test_a_message_takes_for_a_name_what_a_topic_does(text):
    try:
        taken = msgspec.convert(text, topics.Name) == text
    except msgspec.ValidationError:
        taken = False
    assert taken == topics.is_name(text)
