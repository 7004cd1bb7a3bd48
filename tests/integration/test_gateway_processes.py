"""A gateway of several processes on one port: they count together, and one that is killed costs the others nothing."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from skerry.demo.fleet import free_ports


class Unix(http.client.HTTPConnection):
    """A connection to a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("gateway", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(str(self._path))


def totals(path: Path) -> dict:
    connection = Unix(path)
    connection.request("GET", "/totals")
    told = json.loads(connection.getresponse().read())
    connection.close()
    return told


def ask(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(
            "POST", "/v2/models/m/infer", json.dumps({"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]})
        )
        return connection.getresponse().status
    finally:
        connection.close()


def up(port: int, process: subprocess.Popen[bytes], path: Path) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        assert process.poll() is None
        try:
            ask(port)
            totals(path)
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError("it does not come up")


def test_processes_count_together_and_one_that_is_killed_is_started_again_and_takes_no_count_with_it(tmp_path):
    (port,) = free_ports(1)
    private = tmp_path / "g.sock"
    route = {"deployment": "m", "model": "m", "version": 1, "deadline_ms": 20, "replicas": []}
    (tmp_path / "routes.json").write_text(json.dumps({"generation": 1, "routes": [route]}))
    paths = f'socket = "{private}"\nroutes_file = "{tmp_path}/routes.json"\n'
    (tmp_path / "gateway.toml").write_text(f'node = "b"\ntier = "edge"\nlisten = "127.0.0.1:{port}"\nprocesses = 2\n{paths}')
    parent = subprocess.Popen(
        [sys.executable, "-m", "edge_agent.gateway", "--config", str(tmp_path / "gateway.toml")], stdout=subprocess.DEVNULL
    )
    try:
        up(port, parent, private)
        time.sleep(0.6)  # what was asked meanwhile stands on the board
        before = totals(private)["deployments"][0]["refused"]
        assert [ask(port) for _ in range(40)] == [503] * 40, "no replica is ready"
        time.sleep(0.6)
        assert {totals(private)["deployments"][0]["refused"] for _ in range(8)} == {before + 40}, "whichever is asked knows all"
        serving = psutil.Process(parent.pid).children()
        assert len(serving) == 2
        os.kill(serving[0].pid, signal.SIGKILL)
        until = time.monotonic() + 20
        while len([child for child in psutil.Process(parent.pid).children() if child.status() != psutil.STATUS_ZOMBIE]) < 2:
            assert time.monotonic() < until
            time.sleep(0.05)
        up(port, parent, private)
        time.sleep(0.6)
        assert totals(private)["deployments"][0]["refused"] >= before + 40
        assert totals(private)["started_at_ms"] > 0
        children = psutil.Process(parent.pid).children()
        parent.terminate()
        assert parent.wait(timeout=20) == 0
        assert not [child for child in children if child.is_running()]
    finally:
        parent.kill()
        parent.wait()
