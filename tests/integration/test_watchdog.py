"""Each program feeds systemd's watchdog while it works, and is ready when it says so."""

import os
import select
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from skerry.demo.fleet import free_ports


def settings(folder: Path, program: str) -> str:
    """As little as it starts with; nobody else is there."""
    (folder / "token").write_text("t\n")
    ports = free_ports(2)
    return {
        "edge_agent.link": (
            f'fleet = "f"\nnode = "n"\ntier = "edge"\nstate_dir = "{folder}"\nwarden_socket = "{folder}/w.sock"\n'
            f'gateway_socket = "{folder}/g.sock"\ngateway_url = "http://127.0.0.1:9"\nsample_every_s = 0.2\n'
            f'[broker]\nhost = "127.0.0.1"\nport = 9\n[coordinator]\nurl = "http://127.0.0.1:9"\ntoken_file = "{folder}/token"\n'
        ),
        "edge_agent.gateway": (
            f'node = "n"\ntier = "edge"\nlisten = "127.0.0.1:{ports[0]}"\nsocket = "{folder}/g.sock"\nroutes_file = "{folder}/r.json"\n'
        ),
        "coordinator": (
            f'fleet = "f"\nstate_dir = "{folder}"\nlisten = "127.0.0.1:{ports[0]}"\npublic_url = "http://127.0.0.1:{ports[0]}"\n'
            f'[broker]\nhost = "127.0.0.1"\nport = {ports[1]}\n'
        ),
    }[program]


@pytest.mark.parametrize("program", ["edge_agent.link", "edge_agent.gateway", "coordinator"])
def test_a_program_feeds_the_watchdog_while_nobody_else_is_there(tmp_path, program):
    config = tmp_path / "settings.toml"
    config.write_text(settings(tmp_path, program))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd, (tmp_path / "log").open("wb") as log:
        systemd.bind(str(tmp_path / "notify"))
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": str(3 * 200_000)}
        process = subprocess.Popen([sys.executable, "-m", program, "--config", str(config)], env=environment, stdout=log, stderr=log)
        heard: list[bytes] = []
        try:
            while heard.count(b"WATCHDOG=1") < 4:
                assert select.select([systemd], [], [], 20)[0], (heard, (tmp_path / "log").read_text())
                heard.append(systemd.recv(1000))
            assert b"READY=1" in heard
        finally:
            process.terminate()
            process.wait(20)
