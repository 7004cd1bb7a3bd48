"""The units: every key is one that systemd knows, the exposure stays where it was measured, each program holds what it may and no more."""

import os
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from coordinator.broker.rendering import FILES
from edge_agent.gateway.listen import HTTP
from tests.conftest import need

SYSTEMD = Path(__file__).resolve().parents[2] / "systemd"
PROGRAMS = ("agent", "warden", "gateway", "coordinator", "signer")
OTHERS = (
    "skerry-broker-files.path", "skerry-broker-files.service", "skerry-gateway.socket", "skerry.slice", "skerry-sandboxes.slice",
    "skerry-housekeeping.timer", "skerry-housekeeping.service",
    "skerry-updater.service", "skerry-updater.path",
)  # fmt: skip
NEWER = ("DelegateSubgroup=", "RestartSteps=")
"""Keys of drop-ins that are installed from systemd 254 on."""
STOPS_WITHIN_S = 10

# Exposure as systemd 252 counts it, times ten: the highest that passes. `0` is best, a unit with nothing but ExecStart= has 96.
EXPOSURE = [
    ("agent", [], 11),
    ("agent", ["nvidia"], 13),
    ("gateway", [], 11),
    ("coordinator", [], 11),
    ("coordinator", ["openid-connect"], 11),
    ("signer", [], 9),
    ("updater", [], 13),
    ("warden", [], 21),
    ("warden", ["docker"], 21),
    ("warden", ["docker", "nvidia"], 23),
]


def settings_of(program: str, *drop_ins: str) -> dict[str, list[str]]:
    """Every value of every key, in order, as ``systemd`` merges a unit with its drop-ins."""
    merged: dict[str, list[str]] = defaultdict(list)
    unit = SYSTEMD / f"skerry-{program}.service"
    for path in [unit, *(unit.with_suffix(".service.d") / f"{name}.conf" for name in drop_ins)]:
        for line in path.read_text().splitlines():
            if "=" in line and not line.startswith("#"):
                key, _, value = line.partition("=")
                merged[key].append(value)
    return merged


def seconds(value: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(ms|s|)", value).groups()
    return int(number) / (1000 if unit == "ms" else 1)


@pytest.fixture
def analyze():
    """``systemd-analyze ...``; the process's outcome."""
    need("systemd-analyze", "" if shutil.which("systemd-analyze") else "not on the PATH")

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["systemd-analyze", *map(str, arguments)], capture_output=True, text=True, timeout=30, check=False)

    return run


def systemd_version() -> int:
    return int(subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, check=True).stdout.split()[1])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine's root with the units, their drop-ins and stubs of what they start."""
    units = tmp_path / "etc/systemd/system"
    shutil.copytree(SYSTEMD, units, ignore=shutil.ignore_patterns("*.conf"))
    for drop_in in SYSTEMD.glob("*.service.d/*.conf"):
        if systemd_version() >= 254 or not any(key in drop_in.read_text() for key in NEWER):
            shutil.copy(drop_in, units / drop_in.parent.name)
    # What the units lean on; a real systemd brings these.
    for target in ("sysinit", "basic", "paths", "sockets", "timers", "time-set", "shutdown", "network", "time-sync", "multi-user"):
        (units / f"{target}.target").write_text("[Unit]\nDescription=stub\n")
    for unit in ("system.slice", "-.slice", "dbus.socket"):
        (units / unit).write_text("[Unit]\nDescription=stub\n" + ("[Socket]\nListenStream=/run/dbus\n" if unit.endswith("socket") else ""))
    for path in (
        "bin/kill",
        "usr/bin/install",
        "usr/bin/systemctl",
        "opt/skerry/current/bin/skerry",
        "opt/skerry/proven/bin/skerry-updater",
        *(f"opt/skerry/current/bin/skerry-{program}" for program in PROGRAMS),
    ):
        stub = tmp_path / path
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text("#!/bin/sh\n")
        stub.chmod(0o755)
    return tmp_path


def verify(analyze, root: Path) -> subprocess.CompletedProcess[str]:
    units = [f"skerry-{program}.service" for program in PROGRAMS]
    return analyze(f"--root={root}", "verify", "--man=no", "--recursive-errors=yes", *units, *OTHERS)


def test_systemd_takes_every_unit_and_drop_in_as_it_stands(analyze, root):
    outcome = verify(analyze, root)
    assert (outcome.returncode, outcome.stderr) == (0, "")


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("skerry-gateway.service", "WatchdogSec=", "WatchdogSecs="),
        ("skerry-warden.service", "KillMode=process", "KillMode=proces"),
        ("skerry-agent.service", "SystemCallFilter=@system-service", "SystemCallFilter=@system-servic"),
        ("skerry-warden.service.d/docker.conf", "SupplementaryGroups=", "SupplementaryGroup="),
    ],
)
def test_a_misspelt_key_or_value_is_found(analyze, root, file, right, wrong):
    path = root / "etc/systemd/system" / file
    assert right in path.read_text()
    path.write_text(path.read_text().replace(right, wrong))
    outcome = verify(analyze, root)
    assert outcome.returncode != 0
    assert path.name in outcome.stderr


def test_a_program_that_is_not_installed_is_found(analyze, root):
    (root / "opt/skerry/current/bin/skerry-agent").unlink()
    outcome = verify(analyze, root)
    assert outcome.returncode != 0
    assert "skerry-agent" in outcome.stderr


@pytest.mark.parametrize(("program", "drop_ins", "most"), EXPOSURE)
def test_exposure_stays_at_or_below_its_threshold(analyze, tmp_path, program, drop_ins, most):
    unit = tmp_path / f"skerry-{program}.service"
    shutil.copy(SYSTEMD / unit.name, unit)
    for name in drop_ins:
        folder = tmp_path / f"{unit.name}.d"
        folder.mkdir(exist_ok=True)
        shutil.copy(SYSTEMD / folder.name / f"{name}.conf", folder)
    outcome = analyze("security", "--offline=true", f"--threshold={most}", "--no-pager", unit)
    assert outcome.returncode == 0, outcome.stdout[-200:]


def test_the_threshold_does_refuse(analyze, tmp_path):
    bare = tmp_path / "bare.service"
    bare.write_text("[Service]\nExecStart=/bin/true\n")
    assert analyze("security", "--offline=true", "--threshold=50", "--no-pager", bare).returncode != 0


def test_the_warden_has_no_network():
    warden = settings_of("warden", "docker", "nvidia")
    assert warden["PrivateNetwork"] == ["yes"]
    assert warden["IPAddressDeny"] == ["any"]
    # AF_NETLINK reaches the kernel alone; without it bubblewrap can't bring up a sandbox's loopback.
    assert set(warden["RestrictAddressFamilies"][-1].split()) <= {"AF_UNIX", "AF_NETLINK"}


def test_the_signer_has_no_network_and_its_key_is_out_of_the_coordinators_reach():
    signer, coordinator = settings_of("signer"), settings_of("coordinator")
    assert signer["PrivateNetwork"] == ["yes"]
    assert signer["RestrictAddressFamilies"] == ["AF_UNIX"]
    assert signer["StateDirectoryMode"] == ["0700"]
    assert signer["User"] != coordinator["User"]
    assert "-/var/lib/skerry/signer" in coordinator["InaccessiblePaths"][-1].split()
    meeting_place = next(line for line in (SYSTEMD / "skerry.tmpfiles.conf").read_text().splitlines() if "/run/skerry/signer" in line)
    assert meeting_place.split()[2:5] == ["2750", "skerry-signer", "skerry-coordinator"]


@pytest.mark.parametrize("program", ["agent", "gateway", "coordinator", "signer"])
def test_who_faces_the_network_holds_no_container_engine(program):
    folder = SYSTEMD / f"skerry-{program}.service.d"
    unit = settings_of(program, *(path.stem for path in folder.glob("*.conf")))
    assert "docker" not in " ".join(unit["SupplementaryGroups"]).split()
    if program in ("agent", "gateway"):
        assert unit["TemporaryFileSystem"] == ["/run:ro"]
        assert unit["BindPaths"] == ["/run/skerry"]
    else:
        assert "-/run/docker.sock" in unit["InaccessiblePaths"][-1].split()
    assert unit["RestrictNamespaces"] == ["yes"]
    assert unit["CapabilityBoundingSet"] == [""]


def test_docker_is_asked_for_in_a_drop_in_alone_since_the_group_may_not_exist():
    assert settings_of("warden")["SupplementaryGroups"] == ["skerry"]
    assert settings_of("warden", "docker")["SupplementaryGroups"] == ["skerry", "docker"]


def test_groups_for_sandboxes_are_made_only_where_the_warden_has_a_subgroup_of_its_own():
    assert settings_of("warden")["ProtectControlGroups"] == ["yes"]
    assert settings_of("warden", "cgroup")["ProtectControlGroups"][-1] == "no"
    assert settings_of("warden", "cgroup")["DelegateSubgroup"] == ["warden"], "edge_agent/warden/drivers/cgroup.py looks for that name"


def test_a_worker_can_lock_itself_down_under_the_wardens_list_of_system_calls():
    allowed = " ".join(settings_of("warden")["SystemCallFilter"]).split()
    assert {"seccomp", "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"} <= set(allowed)


def test_what_looks_into_a_model_can_confine_itself_under_the_coordinators_list_of_system_calls():
    allowed = " ".join(settings_of("coordinator")["SystemCallFilter"]).split()
    needed = {"prlimit64", "seccomp", "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"}
    assert needed <= set(allowed)
    assert max(allowed.index(name) for name in needed) > allowed.index("~@privileged"), "what is denied later is denied"


def test_the_warden_may_open_files_the_way_a_later_bubblewrap_does():
    assert settings_of("warden")["RestrictSUIDSGID"] == ["no"], "systemd answers openat2 with ENOSYS where it is on"


def test_what_the_authority_makes_for_the_broker_is_taken_over_from_where_the_coordinator_writes_it():
    watched = re.findall(r"PathChanged=(\S+)", (SYSTEMD / "skerry-broker-files.path").read_text())
    authority = Path("/var/lib") / settings_of("coordinator")["StateDirectory"][0] / "ca"
    assert watched == [str(authority / "revoked.pem"), str(authority / "broker.crt")]
    service = (SYSTEMD / "skerry-broker-files.service").read_text()
    taken = dict(re.findall(r"install .*?(\S+) /etc/mosquitto/skerry/(\S+)\n", service))
    assert {path: taken[path] for path in watched} == {watched[0]: "crl.pem", watched[1]: "server.crt"}
    assert taken == {str(authority / name): called for name, called in {**FILES, "revoked.pem": "crl.pem"}.items()}
    template = (SYSTEMD.parent / "coordinator" / "broker" / "mosquitto.conf.j2").read_text()
    assert set(re.findall(r"\}/skerry/(\S+\.\S+)\n", template)) == set(taken.values())


def test_the_gateways_port_is_held_under_the_name_that_the_gateway_looks_for():
    unit = (SYSTEMD / "skerry-gateway.socket").read_text()
    assert f"FileDescriptorName={HTTP}\n" in unit
    assert "Accept=" not in unit
    assert "skerry-gateway.socket" not in (SYSTEMD / "skerry-gateway.service").read_text(), "it runs without one too"


def test_sandboxes_outlive_the_warden():
    warden = settings_of("warden")
    assert warden["KillMode"] == ["process"]
    assert warden["Delegate"] == ["yes"]
    assert warden["OOMPolicy"] == ["continue"]
    assert "MemoryMax" not in warden
    # These would be removed under the sandboxes, or under the gateway that reads the route table.
    assert "RuntimeDirectory" not in warden


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_unit_starts_without_a_network_restarts_for_ever_and_stops_in_time(program):
    unit = settings_of(program)
    assert unit["Type"] == ["notify"]
    assert unit["Restart"] == ["always"]
    assert unit["StartLimitIntervalSec"] == ["0"]
    assert seconds(unit["WatchdogSec"][0]) > 0
    assert STOPS_WITHIN_S < seconds(unit["TimeoutStopSec"][0]) <= 2 * STOPS_WITHIN_S
    for key in ("Requires", "Requisite", "BindsTo", "After", "Wants"):
        assert "network-online.target" not in " ".join(unit[key])
    assert int(unit["OOMScoreAdjust"][0]) < 0


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_runs_as_a_user_of_its_own_that_exists(program):
    users = (SYSTEMD / "skerry.sysusers.conf").read_text()
    unit = settings_of(program)
    assert unit["User"] == unit["Group"] == [f"skerry-{program}"]
    assert re.search(rf"^u\s+skerry-{program}\s", users, re.MULTILINE)
    joined = re.search(rf"^m\s+skerry-{program}\s+skerry$", users, re.MULTILINE) is not None
    assert joined == ("skerry" in unit["SupplementaryGroups"]) == (program in ("agent", "warden", "gateway"))


def test_users_and_folders_are_made_as_described(tmp_path):
    for tool in ("systemd-sysusers", "systemd-tmpfiles"):
        need(tool, "" if shutil.which(tool) else "not on the PATH")
    need("root", "" if os.geteuid() == 0 else "giving folders to users takes root")
    (tmp_path / "etc").mkdir()
    subprocess.run(
        ["systemd-sysusers", f"--root={tmp_path}", SYSTEMD / "skerry.sysusers.conf"], check=True, timeout=30, capture_output=True
    )
    names = {line.split(":")[0] for line in (tmp_path / "etc/passwd").read_text().splitlines()}
    assert names >= {f"skerry-{program}" for program in PROGRAMS}
    subprocess.run(
        ["systemd-tmpfiles", f"--root={tmp_path}", "--create", SYSTEMD / "skerry.tmpfiles.conf"],
        check=True,
        timeout=30,
        capture_output=True,
    )
    for meeting_place in ("run/skerry/warden", "run/skerry/gateway", "var/lib/skerry/agent/incoming", "var/lib/skerry/warden/sandboxes"):
        assert (tmp_path / meeting_place).stat().st_mode & 0o7777 == 0o2750


def test_secrets_are_credentials_or_lie_in_folders_of_the_programs_own():
    assert settings_of("coordinator", "openid-connect")["LoadCredential"] == ["openid-client-secret:/etc/skerry/openid-client-secret"]
    for program in PROGRAMS:
        assert not [value for value in settings_of(program)["Environment"] if re.search("token|key|secret|password", value, re.IGNORECASE)]
