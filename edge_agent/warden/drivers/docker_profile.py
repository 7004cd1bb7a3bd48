"""A policy as the Docker Engine reads it: a seccomp profile in JSON (the engine's ``profiles/seccomp``, libseccomp's names)."""

from typing import Any

import msgspec

from skerry.confine.policy import ENOSYS, EPERM, Policy, Rule

_ALLOW, _ERRNO, _KILL, _TRAP = "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_TRAP"
ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}


def _entry(names: list[str], action: str, *, errno: int = 0, arguments: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    entry: dict[str, Any] = {"names": names, "action": action, "args": arguments or []}
    if action == _ERRNO:
        entry["errnoRet"] = errno
    return entry


def _argument(index: int, op: str, value: int, value_two: int = 0) -> dict[str, Any]:
    return {"index": index, "value": value, "valueTwo": value_two, "op": op}


def _entries_of(rule: Rule) -> list[dict[str, Any]]:
    """One entry for each way to be allowed: libseccomp joins them by "or". Only the low 32 bits are looked at, as flags have no more."""
    mask = 0xFFFFFFFF if rule.check == "any_of" else rule.values[0]
    values = {"any_of": rule.values, "no_bits": (0,), "all_bits": (rule.values[0],)}[rule.check]
    return [_entry([rule.call], _ALLOW, arguments=[_argument(rule.argument, "SCMP_CMP_MASKED_EQ", mask, value)]) for value in values]


def profile(policy: Policy, machine: str, *, is_gvisor: bool = False) -> str:
    """The profile as a security option wants it. A rule's own errno is lost: the engine has one default answer, EPERM.

    gVisor can't kill a process for a call: it sends SIGSYS, which ends it unless it catches that, and the call is refused. Nor can it
    answer with another error than the default: clone3 is left to gVisor's own kernel there, since libraries fall back on ENOSYS alone.
    The engine's init calls what a worker does not: it is allowed here by name, which gives a process without capabilities nothing.
    """
    document = {
        "defaultAction": _ERRNO,
        "defaultErrnoRet": EPERM,
        "architectures": [ARCHITECTURES[machine]],
        "syscalls": [
            _entry(sorted(policy.allow | ({"clone3"} & policy.absent if is_gvisor else set())), _ALLOW),
            *([] if is_gvisor else [_entry(sorted(policy.absent), _ERRNO, errno=ENOSYS)]),
            _entry(sorted(policy.kill), _TRAP if is_gvisor else _KILL),
            *(entry for rule in policy.rules for entry in _entries_of(rule)),
        ],
    }
    return msgspec.json.encode(document).decode()
