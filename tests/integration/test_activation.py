"""A gateway takes over the listening socket that whoever started it holds, so that being started again refuses nobody."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

LAUNCHER = """
import os, sys
os.dup2(int(sys.argv[1]), 3, inheritable=True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="http")
os.execv(sys.executable, [sys.executable, "-m", "edge_agent.gateway", "--config", sys.argv[2]])
"""


def start(listener: socket.socket, config: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", LAUNCHER, str(listener.fileno()), str(config)]
    return subprocess.Popen(command, pass_fds=[listener.fileno()], stdout=subprocess.DEVNULL)


def ask(port: int) -> str:
    """What became of one request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=15)
    try:
        connection.request("GET", "/v2/health/live")
        return str(json.loads(connection.getresponse().read())["live"])
    except (OSError, http.client.HTTPException) as exc:
        return type(exc).__name__
    finally:
        connection.close()


def test_a_gateway_that_is_started_again_refuses_no_connection(tmp_path):
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    port = listener.getsockname()[1]
    config = tmp_path / "gateway.toml"
    config.write_text(
        f'node = "b"\ntier = "edge"\nlisten = "127.0.0.1:1"\nsocket = "{tmp_path}/g.sock"\nroutes_file = "{tmp_path}/r.json"\n'
    )
    outcomes: Counter[str] = Counter()
    is_over = threading.Event()

    def call() -> None:
        while not is_over.is_set():
            outcomes[ask(port)] += 1

    gateway = start(listener, config)
    try:
        assert ask(port) == "True", "who came before it was up is served too"
        callers = [threading.Thread(target=call) for _ in range(4)]
        for caller in callers:
            caller.start()
        for signum in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
            time.sleep(0.5)
            before = outcomes["True"]
            os.kill(gateway.pid, signum)
            gateway.wait(timeout=20)
            gateway = start(listener, config)
            until = time.monotonic() + 20
            while outcomes["True"] < before + 20:
                assert time.monotonic() < until, outcomes
                time.sleep(0.05)
        is_over.set()
        for caller in callers:
            caller.join(timeout=20)
        assert outcomes["True"] > 100
        assert outcomes["ConnectionRefusedError"] == 0
        assert outcomes.total() - outcomes["True"] <= 3 * 2 * len(callers), f"only what was under way: {outcomes}"
    finally:
        is_over.set()
        gateway.kill()
        gateway.wait()
        listener.close()
