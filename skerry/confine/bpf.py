"""A policy as the kernel reads it: a classic BPF program over ``struct seccomp_data`` (seccomp(2), linux/filter.h, linux/audit.h).

    struct seccomp_data { int nr; u32 arch; u64 instruction_pointer; u64 args[6]; }

Checked first: the architecture, and on x86_64 that the number is not of the x32 table, since another table gives numbers other meanings.
One pair of instructions a call, so that no jump is long; the kernel keeps a bitmap of what is always allowed, so that length costs nothing.
"""

import struct
from collections.abc import Mapping

from skerry.confine.numbers import AARCH64, X86_64
from skerry.confine.policy import ENOSYS, EPERM, Policy, Rule

_LD_ABS, _JEQ, _JGE, _JSET, _AND, _RET = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_NR_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_X32_BIT = 0x40000000
_ARCHITECTURES: dict[str, tuple[int, Mapping[str, int]]] = {"x86_64": (0xC000003E, X86_64), "aarch64": (0xC00000B7, AARCH64)}
"""AUDIT_ARCH_* and the call numbers, by ``platform.machine()``."""

Instruction = tuple[int, int, int, int]


class UnknownArchitecture(ValueError):
    """There is no table of call numbers for this machine."""


def _statement(code: int, value: int) -> Instruction:
    return (code, 0, 0, value)


def _answer(errno: int) -> Instruction:
    return _statement(_RET, _ERRNO | errno)


def _rule(rule: Rule, number: int) -> list[Instruction]:
    """What follows the load of the call's number: skipped as a whole where it is another call."""
    yes, no = _statement(_RET, _ALLOW), _answer(rule.errno)
    body = [_statement(_LD_ABS, _ARGUMENTS_AT + 8 * rule.argument)]
    match rule.check:
        case "any_of":
            for value in rule.values:
                body += [(_JEQ, 0, 1, value), yes]
            body.append(no)
        case "no_bits":
            body += [(_JSET, 0, 1, rule.values[0]), no, yes]
        case "all_bits":
            body += [_statement(_AND, rule.values[0]), (_JEQ, 0, 1, rule.values[0]), yes, no]
    return [(_JEQ, 0, len(body), number), *body]


def program(policy: Policy, machine: str) -> bytes:
    """The filter for ``machine`` as an array of ``struct sock_filter``, 8 bytes each. Raises UnknownArchitecture."""
    if machine not in _ARCHITECTURES:
        raise UnknownArchitecture(f"no table of system calls for {machine!r}: {', '.join(_ARCHITECTURES)} are known")
    arch, numbers = _ARCHITECTURES[machine]
    code = [_statement(_LD_ABS, _ARCH_AT), (_JEQ, 1, 0, arch), _statement(_RET, _KILL), _statement(_LD_ABS, _NR_AT)]
    if machine == "x86_64":
        code += [(_JGE, 0, 1, _X32_BIT), _answer(ENOSYS)]
    for rule in policy.rules:
        if rule.call in numbers:
            code += _rule(rule, numbers[rule.call])
    for names, answer in (
        (policy.allow, _statement(_RET, _ALLOW)),
        (policy.absent, _answer(ENOSYS)),
        (policy.kill, _statement(_RET, _KILL)),
    ):
        for number in sorted(numbers[name] for name in names if name in numbers):
            code += [(_JEQ, 0, 1, number), answer]
    code.append(_answer(EPERM))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)
