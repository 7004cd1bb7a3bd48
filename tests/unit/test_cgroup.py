"""Control groups of version 1 lie in several hierarchies, which are not busy, and not gone, at the same time."""

import pytest

from edge_agent.warden.drivers.cgroup import CgroupV1

CONTROLLERS = ["cpu", "cpuacct", "memory", "pids"]


@pytest.mark.parametrize("busy", CONTROLLERS)
def test_a_group_that_is_still_busy_in_one_hierarchy_is_seen_until_it_is_gone_from_all(tmp_path, busy):
    groups = CgroupV1({controller: tmp_path / controller for controller in CONTROLLERS}, "f-n")
    places = [tmp_path / controller / "skerry-f-n" / "d-0" for controller in CONTROLLERS]
    for place in places:
        place.mkdir(parents=True)
    process = tmp_path / busy / "skerry-f-n" / "d-0" / "process"
    process.touch()  # as a process in it does, it keeps the folder from being removed
    groups.remove("d-0")
    assert groups.names() == {"d-0"}
    assert groups.counters("d-0") is not None
    process.unlink()
    groups.remove("d-0")
    assert groups.names() == set()
    assert groups.counters("d-0") is None
    assert not any(place.parent.exists() for place in places)
