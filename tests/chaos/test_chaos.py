"""A real fleet under load, through all that a seed has in store for it: no promise is broken."""

import json
import subprocess
import sys

import pytest

from sim import faults
from tests.chaos.machine import absent
from tests.conftest import need

SECONDS = 40
WITHIN_S = 280


@pytest.mark.timeout(WITHIN_S + 20)
@pytest.mark.parametrize("seed", [14])
def test_through_every_kind_of_fault_no_request_and_no_event_is_lost_and_all_is_as_it_was_told_in_the_end(seed):
    need("chaos", absent())
    command = [sys.executable, "-m", "tests.chaos", "--seed", str(seed), "--seconds", str(SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S, check=False)
    assert done.stdout, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["wrong"] == [], done.stderr[-3000:]
    assert set(report["faults"]) >= {*faults.LINK[:2], "reboot", "disk_full", "disk_read_only", "disk_stuck", "twin"}
    assert report["requests"] > 10 * SECONDS
    assert report["events_kept"] > 50
    assert report["changes"] > 2
    assert done.returncode == 0
