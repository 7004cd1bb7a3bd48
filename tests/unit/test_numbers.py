"""The numbers of system calls are the kernel's own, as its headers give them."""

import re
from pathlib import Path

import pytest

from tests.conftest import need
from tests.syscalls import TABLES

HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
"""arm64 takes the generic table as it is."""
DEFINE = re.compile(r"^#\s*define __NR(?:3264)?_(\w+)\s+(\w+)\s*$", re.MULTILINE)


def numbers_in(header: Path) -> dict[str, int]:
    """Names and numbers. The generic header first numbers those that differ by word size, then gives them names: 64 bits come first."""
    plain: dict[str, int] = {}
    aliases: dict[str, str] = {}
    for name, value in DEFINE.findall(header.read_text()):
        if value.isdigit():
            plain.setdefault(name, int(value))
        elif value.startswith("__NR3264_"):
            aliases.setdefault(value.removeprefix("__NR3264_"), name)
    return plain | {name: plain[number_of] for number_of, name in aliases.items() if number_of in plain}


@pytest.mark.parametrize("machine", TABLES)
def test_the_numbers_are_those_of_the_kernels_headers(machine):
    header = HEADERS[machine]
    need("linux-libc-dev", "" if header.is_file() else f"{header} is not there")
    theirs = numbers_in(header)
    assert {name: theirs.get(name) for name in TABLES[machine]} == TABLES[machine]


def test_a_call_that_aarch64_is_said_to_lack_is_not_in_its_header():
    need("linux-libc-dev", "" if HEADERS["aarch64"].is_file() else f"{HEADERS['aarch64']} is not there")
    lacking = set(TABLES["x86_64"]) - set(TABLES["aarch64"])
    assert lacking & {"open", "fork", "dup2"} == {"open", "fork", "dup2"}
    assert lacking & set(numbers_in(HEADERS["aarch64"])) == set()
