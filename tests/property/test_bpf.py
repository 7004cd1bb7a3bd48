"""The kernel's filter says of every call what the policy says, whatever the number, the architecture and the arguments."""

import struct

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from skerry.confine.bpf import UnknownArchitecture, program
from skerry.confine.policy import FLOOR, Policy
from tests.syscalls import ALLOWED, KILLED, NOT_IMPLEMENTED, POLICIES, TABLES, Verdict, arguments_, edges, meant, policies_, refused

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH_* of linux/audit.h: the ELF machine (62, 183), 64 bits, little-endian."""
STRANGE_ARCHITECTURES = [0, 0x40000003, 0x40000028, 0x8000003E, 0x4000003E, 0xC0000016, 0x800000B7, 0xFFFFFFFF]
"""i386, ARM, x86_64 and aarch64 with a bit off, and others."""
MAX_INSTRUCTIONS = 4096
"""BPF_MAXINSNS, linux/bpf_common.h."""
DATA_BYTES = 64

_JUMPS = {
    0x15: lambda accumulator, constant: accumulator == constant,
    0x25: lambda accumulator, constant: accumulator > constant,
    0x35: lambda accumulator, constant: accumulator >= constant,
    0x45: lambda accumulator, constant: accumulator & constant != 0,
}
"""BPF_JMP with BPF_K: JEQ, JGT, JGE, JSET."""


def instructions_of(code: bytes) -> list[tuple[int, int, int, int]]:
    """``struct sock_filter``: code, jump if true, jump if false, constant (linux/filter.h)."""
    return list(struct.iter_unpack("=HBBI", code))


def answer_of(code: bytes, number: int, architecture: int, arguments: list[int]) -> tuple[int, int]:
    """What the machine of Documentation/networking/filter.rst makes of one ``struct seccomp_data``: its value, and how many steps."""
    call = struct.pack("<IIQ6Q", number, architecture, 0xFFFF_8000_1234_5678, *arguments)
    instructions, at, accumulator, steps = instructions_of(code), 0, 0, 0
    while True:
        operation, if_true, if_false, constant = instructions[at]
        at, steps = at + 1, steps + 1
        if operation == 0x06:  # RET K
            return constant, steps
        if operation == 0x20:  # LD W ABS: a word of the call
            (accumulator,) = struct.unpack_from("<I", call, constant)
        elif operation == 0x54:  # ALU AND K
            accumulator &= constant
        elif operation == 0x05:  # JMP JA
            at += constant
        else:
            at += if_true if _JUMPS[operation](accumulator, constant) else if_false


def verdict(code: bytes, number: int, architecture: int, arguments: list[int]) -> Verdict:
    """The answer in words (linux/seccomp.h: the action is the upper half)."""
    value, _ = answer_of(code, number, architecture, arguments)
    action, argument = value & 0xFFFF0000, value & 0xFFFF
    names = {0x7FFF0000: "allow", 0x00050000: "errno", 0x80000000: "kill"}
    assert action in names, f"an action that is none of ours: {value:#x}"
    return (names[action], argument)  # type: ignore[return-value]  # the three of them


machines = st.sampled_from(sorted(TABLES))


def numbers_of(machine: str, policy: Policy) -> st.SearchStrategy[int]:
    ruled = [TABLES[machine][rule.call] for rule in policy.rules if rule.call in TABLES[machine]]
    known = st.sampled_from(sorted(TABLES[machine].values()))
    near = st.builds(lambda number, step: (number + step) % 2**32, known, st.sampled_from([-1, 1]))
    far = st.sampled_from([0x3FFFFFFF, 0x40000000, 0x40000001, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF])
    with_high_bits = st.builds(lambda number, bit: number | 1 << bit, known, st.integers(9, 31))
    return st.one_of(st.sampled_from(ruled) if ruled else known, known, near, far, with_high_bits, st.integers(0, 600))


def expected(policy, machine: str, number: int, arguments: list[int]) -> Verdict:
    if machine == "x86_64" and number >= 0x40000000:
        return refused(NOT_IMPLEMENTED)  # the x32 table, and what is no number at all
    call = next((name for name, known in TABLES[machine].items() if known == number), "")
    return meant(policy, call, arguments)


@given(policies_, machines, st.data(), arguments_)
@settings(deadline=None, max_examples=400)
def test_the_kernel_is_told_what_the_policy_says(policy, machine, data, arguments):
    number = data.draw(numbers_of(machine, policy))
    assert verdict(program(policy, machine), number, ARCHITECTURES[machine], arguments) == expected(policy, machine, number, arguments)


@given(policies_, machines, st.data(), arguments_)
@settings(deadline=None, max_examples=400)
def test_calls_with_a_rule_are_told_apart_by_the_low_half_of_that_argument_alone(policy, machine, data, arguments):
    ruled = [rule for rule in policy.rules if rule.call in TABLES[machine]]
    assume(ruled)
    rule = data.draw(st.sampled_from(ruled))
    number, code = TABLES[machine][rule.call], program(policy, machine)
    said = verdict(code, number, ARCHITECTURES[machine], arguments)
    assert said == meant(policy, rule.call, arguments)
    others = data.draw(arguments_)
    others[rule.argument] = others[rule.argument] >> 32 << 32 | arguments[rule.argument] % 2**32
    assert verdict(code, number, ARCHITECTURES[machine], others) == said


@pytest.mark.parametrize("machine", TABLES)
@pytest.mark.parametrize("name", POLICIES)
def test_every_call_of_the_table_gets_the_answer_of_its_policy(machine, name):
    code = program(POLICIES[name], machine)
    for call, number in TABLES[machine].items():
        for arguments in ([0] * 6, [2**64 - 1] * 6):
            assert verdict(code, number, ARCHITECTURES[machine], arguments) == meant(POLICIES[name], call, arguments), call


@pytest.mark.parametrize("machine", TABLES)
@pytest.mark.parametrize("name", POLICIES)
def test_every_rule_holds_at_its_edges(machine, name):
    code = program(POLICIES[name], machine)
    for rule in POLICIES[name].rules:
        for arguments in edges(rule) if rule.call in TABLES[machine] else []:
            said = verdict(code, TABLES[machine][rule.call], ARCHITECTURES[machine], arguments)
            assert said == meant(POLICIES[name], rule.call, arguments), (rule.call, arguments)


@pytest.mark.parametrize("number", [0x40000000, 0x40000001, 0x4000003B, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_numbers_of_the_x32_table_are_absent(number):
    for policy in POLICIES.values():
        assert verdict(program(policy, "x86_64"), number, ARCHITECTURES["x86_64"], [0] * 6) == refused(NOT_IMPLEMENTED)


@given(
    policies_,
    machines,
    st.data(),
    arguments_,
    st.one_of(st.sampled_from([*STRANGE_ARCHITECTURES, *ARCHITECTURES.values()]), st.integers(0, 2**32 - 1)),
)
@settings(deadline=None)
def test_a_call_of_another_architecture_ends_the_process(policy, machine, data, arguments, architecture):
    if architecture == ARCHITECTURES[machine]:
        architecture ^= data.draw(st.sampled_from([1, 0x40000000, 0x80000000]))
    assert verdict(program(policy, machine), data.draw(numbers_of(machine, policy)), architecture, arguments) == KILLED


@given(policies_, machines)
@settings(deadline=None)
def test_a_program_is_one_that_the_kernel_takes(policy, machine):
    """seccomp_check_filter and bpf_check_basics_ok: whole instructions, jumps within, loads of words of the call, RET last."""
    code = program(policy, machine)
    assert len(code) % 8 == 0
    instructions = instructions_of(code)
    assert 0 < len(instructions) <= MAX_INSTRUCTIONS
    for at, (operation, if_true, if_false, constant) in enumerate(instructions):
        if operation in _JUMPS:
            assert at + 1 + max(if_true, if_false) < len(instructions), f"a jump out of bounds at {at}"
        elif operation == 0x20:
            assert constant % 4 == 0
            assert constant < DATA_BYTES
        else:
            assert operation in (0x06, 0x54), f"operation {operation:#x} at {at}"
    assert instructions[-1][0] == 0x06


def test_a_machine_without_a_table_is_refused_by_name():
    with pytest.raises(UnknownArchitecture, match="'riscv64'"):
        program(FLOOR, "riscv64")


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_names_known_calls_and_each_of_them_once(name):
    """A name that no table has is left out without a word; one with two places would be answered by the first, or by both."""
    policy = POLICIES[name]
    places = [*policy.allow, *policy.absent, *policy.kill, *(rule.call for rule in policy.rules)]
    assert sorted(places) == sorted(set(places))
    assert set(places) <= set(TABLES["x86_64"])
    assert all(0 <= rule.argument < 6 and rule.values for rule in policy.rules)


def test_serving_allows_nothing_that_the_floor_refuses():
    """The floor lies below it anyhow: what it answers otherwise would be there for nothing."""
    for name in ("serving", "serving on a GPU"):
        for call in POLICIES[name].allow:
            assert meant(FLOOR, call, [0] * 6) == ALLOWED, call
