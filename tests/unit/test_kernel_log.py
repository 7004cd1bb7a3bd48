"""Refused system calls are told from everything else in the kernel's log, and found there for real."""

import os
import platform
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.warden.kernel_log import KernelLog, RefusedCall, refused_call
from skerry.confine.numbers import X86_64
from tests.conftest import need

RECORD = (
    "6,1749,15631866548,-;audit: type=1326 audit(1795547676.973:3649): auid=4294967295 uid={uid} gid=1 ses=4294967295 pid=746 "
    'comm="{comm}" exe="/usr/bin/python3.11" sig={signal} arch=c000003e syscall={number} compat=0 ip=0x7f1d41ccb8d9 code=0x50000\n'
)
x86_64_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers below are x86_64's")


@x86_64_only
@pytest.mark.parametrize(
    ("signal", "number", "expected"),
    [
        (0, X86_64["unlink"], RefusedCall(1007, "unlink", is_killed=False)),
        (31, X86_64["execve"], RefusedCall(1007, "execve", is_killed=True)),
        (0, 9999, RefusedCall(1007, "number 9999", is_killed=False)),
        (0, 435, None),
    ],
)
def test_a_refused_call_is_named_with_whom_it_was_refused_to(signal, number, expected):
    assert refused_call(RECORD.format(uid=1007, comm="python", signal=signal, number=number)) == expected


@given(st.text(max_size=300))
def test_no_other_record_is_taken_for_one(text):
    assert refused_call(text) is None or "type=1326" in text


@x86_64_only
def test_a_process_can_not_pass_itself_off_as_another_by_its_name():
    found = refused_call(RECORD.format(uid=1007, comm="a uid=0 sig=31 sysc", signal=0, number=X86_64["unlink"]))
    assert found == RefusedCall(1007, "unlink", is_killed=False)


def test_what_the_kernel_refuses_to_a_locked_down_worker_is_found_in_its_log():
    log = KernelLog()
    need("root", "" if log.is_readable else "the kernel's log is closed to this user")
    program = (
        "import os, pathlib\n"
        "from edge_agent.worker import lockdown\n"
        "os.setgid(1879100777); os.setuid(1879100777)\n"
        "lockdown.before_serving('CPUExecutionProvider')\n"
        "try: os.unlink('/tmp/no-such-file')\n"
        "except PermissionError: print('refused')"
    )
    tried = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=30)
    assert tried.stdout == "refused\n", tried.stderr
    deadline = time.monotonic() + 10
    found = log.new_refusals()
    while not any(refused.uid == 1879100777 for refused in found):
        assert time.monotonic() < deadline, f"nothing in the log of {os.uname().release}: {found}"
        time.sleep(0.05)
        found += log.new_refusals()
    log.close()
    assert log.new_refusals() == {}
