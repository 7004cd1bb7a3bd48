"""The engine's profile says what the policy says; names and operators as libseccomp reads them (seccomp_rule_add(3))."""

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edge_agent.warden.drivers.docker_profile import profile
from tests.syscalls import (
    ALLOWED,
    KILLED,
    NOT_IMPLEMENTED,
    NOT_PERMITTED,
    POLICIES,
    TABLES,
    Verdict,
    arguments_,
    edges,
    meant,
    policies_,
    refused,
)


def comparison_holds(comparison: dict, arguments: list[int]) -> bool:
    """A 64-bit comparison: with MASKED_EQ ``value`` is the mask and ``valueTwo`` what must be left."""
    assert comparison["op"] == "SCMP_CMP_MASKED_EQ"
    return arguments[comparison["index"]] & comparison["value"] == comparison["valueTwo"]


def verdict(document: dict, call: str, arguments: list[int]) -> Verdict:
    """Entries are alternatives, an entry's comparisons must all hold; one call has one action, else libseccomp's order would decide."""
    entries = [entry for entry in document["syscalls"] if call in entry["names"]]
    assert len({entry["action"] for entry in entries}) <= 1
    assert len(entries) <= 1 or all(entry["args"] for entry in entries)
    for entry in entries:
        if all(comparison_holds(comparison, arguments) for comparison in entry["args"]):
            match entry["action"]:
                case "SCMP_ACT_ALLOW":
                    return ALLOWED
                case "SCMP_ACT_KILL_PROCESS":
                    return KILLED
                case "SCMP_ACT_ERRNO":
                    return refused(entry["errnoRet"])
                case other:
                    raise AssertionError(other)
    assert document["defaultAction"] == "SCMP_ACT_ERRNO"
    return refused(document["defaultErrnoRet"])


def expected(policy, call: str, arguments: list[int]) -> Verdict:
    """As the policy, but that what a rule refuses is refused with the default."""
    if any(rule.call == call for rule in policy.rules) and meant(policy, call, arguments) != ALLOWED:
        return refused(NOT_PERMITTED)
    return meant(policy, call, arguments)


calls = st.one_of(st.sampled_from(sorted(TABLES["x86_64"])), st.sampled_from(["pidfd_open", "userfaultfd", "io_setup", "pkey_mprotect"]))


@given(policies_, calls, arguments_)
@settings(deadline=None, max_examples=400)
def test_the_engine_is_told_what_the_policy_says(policy, call, arguments):
    assert verdict(json.loads(profile(policy, "x86_64")), call, arguments) == expected(policy, call, arguments)


@given(policies_, st.data(), arguments_)
@settings(deadline=None, max_examples=400)
def test_the_engine_is_told_each_rule(policy, data, arguments):
    assume(policy.rules)
    call = data.draw(st.sampled_from([rule.call for rule in policy.rules]))
    assert verdict(json.loads(profile(policy, "x86_64")), call, arguments) == expected(policy, call, arguments)


@pytest.mark.parametrize("name", POLICIES)
def test_every_call_gets_the_answer_of_its_policy(name):
    document = json.loads(profile(POLICIES[name], "aarch64"))
    for call in TABLES["x86_64"]:
        for arguments in ([0] * 6, [2**64 - 1] * 6):
            assert verdict(document, call, arguments) == expected(POLICIES[name], call, arguments), call


@pytest.mark.parametrize("name", POLICIES)
def test_every_rule_holds_at_its_edges(name):
    document = json.loads(profile(POLICIES[name], "x86_64"))
    for rule in POLICIES[name].rules:
        for arguments in edges(rule):
            assert verdict(document, rule.call, arguments) == expected(POLICIES[name], rule.call, arguments), (rule.call, arguments)


@pytest.mark.parametrize(("machine", "architecture"), [("x86_64", "SCMP_ARCH_X86_64"), ("aarch64", "SCMP_ARCH_AARCH64")])
def test_the_tables_of_other_architectures_are_not_opened(machine, architecture):
    assert json.loads(profile(POLICIES["floor"], machine))["architectures"] == [architecture]


def test_clone3_is_said_to_be_absent_so_that_glibc_asks_for_clone():
    assert verdict(json.loads(profile(POLICIES["floor"], "x86_64")), "clone3", [0] * 6) == refused(NOT_IMPLEMENTED)
