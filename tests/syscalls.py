"""What a policy means, written out plainly: an oracle must not call the code it judges. And the calls to try it on."""

from typing import Literal

from hypothesis import strategies as st

from skerry.confine.numbers import AARCH64, X86_64
from skerry.confine.policy import FLOOR, SERVER_FLOOR, SERVING, SERVING_GPU, Policy, Rule

POLICIES = {"floor": FLOOR, "server floor": SERVER_FLOOR, "serving": SERVING, "serving on a GPU": SERVING_GPU}
TABLES = {"x86_64": X86_64, "aarch64": AARCH64}
NOT_PERMITTED, NOT_IMPLEMENTED = 1, 38
"""EPERM and ENOSYS (errno(3))."""

Verdict = tuple[Literal["allow", "errno", "kill"], int]
ALLOWED: Verdict = ("allow", 0)
KILLED: Verdict = ("kill", 0)


def refused(errno: int) -> Verdict:
    return ("errno", errno)


def rule_holds(rule: Rule, arguments: list[int]) -> bool:
    low = arguments[rule.argument] % 2**32
    if rule.check == "any_of":
        return low in rule.values
    bits = [bit for bit in range(32) if rule.values[0] >> bit & 1]
    having = [bit for bit in bits if low >> bit & 1]
    return having == (bits if rule.check == "all_bits" else [])


def meant(policy: Policy, call: str, arguments: list[int]) -> Verdict:
    """The answer to ``call``, empty for a number that no table knows."""
    for rule in policy.rules:
        if rule.call == call:
            return ALLOWED if rule_holds(rule, arguments) else refused(rule.errno)
    if call in policy.allow:
        return ALLOWED
    if call in policy.absent:
        return refused(NOT_IMPLEMENTED)
    return KILLED if call in policy.kill else refused(NOT_PERMITTED)


def edges(rule: Rule) -> list[list[int]]:
    """Arguments at which a rule's answer turns: what it looks for, the opposite, and each bit of both turned, the high half's too."""
    words = {
        base ^ turn for value in (0, *rule.values) for base in (value, ~value % 2**32) for turn in (0, *(1 << bit for bit in range(64)))
    }
    return [[0] * rule.argument + [word] + [0] * (5 - rule.argument) for word in sorted(words)]


_marks = sorted({value for policy in POLICIES.values() for rule in policy.rules for value in rule.values})
_low_halves = st.one_of(
    st.sampled_from([0, *_marks, *(~mark % 2**32 for mark in _marks)]),
    st.builds(lambda mark, bit: mark ^ (1 << bit), st.sampled_from([0, *_marks]), st.integers(0, 31)),
    st.integers(0, 2**32 - 1),
)
_words = st.builds(lambda low, high: low | high << 32, _low_halves, st.sampled_from([0, 0, 1, 0x80000000, 0xFFFFFFFF]))
arguments_ = st.lists(_words, min_size=6, max_size=6)
"""Six arguments: what the rules look for, each bit of it turned, and halves that nobody should look at."""

_names = sorted(X86_64)
_rules = st.one_of(
    st.builds(
        Rule, st.sampled_from(_names), st.integers(0, 5), st.just("any_of"), st.lists(_low_halves, min_size=1, max_size=6).map(tuple)
    ),
    st.builds(
        Rule,
        st.sampled_from(_names),
        st.integers(0, 5),
        st.sampled_from(["no_bits", "all_bits"]),
        st.tuples(st.integers(1, 2**32 - 1)),
        st.integers(1, 133),
    ),
)


@st.composite
def any_policies(draw: st.DrawFn) -> Policy:
    """A policy in which each call has one place at most, as in those that ship."""
    rules = draw(st.lists(_rules, max_size=5, unique_by=lambda rule: rule.call))
    left = [name for name in draw(st.permutations(_names)) if name not in {rule.call for rule in rules}]
    first, second, third = sorted(draw(st.lists(st.integers(0, len(left)), min_size=3, max_size=3)))
    return Policy(
        allow=frozenset(left[:first]), rules=tuple(rules), kill=frozenset(left[first:second]), absent=frozenset(left[second:third])
    )


policies_ = st.one_of(st.sampled_from(list(POLICIES.values())), any_policies())
