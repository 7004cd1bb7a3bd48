"""Callers of boxes: each asks one box again and again, over a connection that it keeps, until standard input ends; prints what came of it.

The argument is JSON: ``boxes`` (addresses), ``path``, ``body``, ``per_s`` for each caller.
"""

import http.client
import json
import sys
import threading
import time

ANSWER_WITHIN_S = 10.0


class Caller(threading.Thread):
    """Asks one box, and keeps each failure with the time at which it happened."""

    def __init__(self, address: str, given: dict, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self._address, self._given, self._ended = address, given, stop
        self.answered = 0
        self.failed: list[str] = []
        self.slowest_s = 0.0
        self._connection: http.client.HTTPConnection | None = None

    def run(self) -> None:
        while not self._ended.wait(1 / self._given["per_s"]):
            began = time.monotonic()
            try:
                status, body = self._ask()
            except (OSError, http.client.HTTPException) as exc:
                self._connection = None
                self.failed.append(f"{time.time():.2f} {self._address}: {type(exc).__name__}: {exc}")
                continue
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            if status == 200:
                self.answered += 1
            else:
                self.failed.append(f"{time.time():.2f} {self._address}: {status} {body[:200]!r}")

    def _ask(self) -> tuple[int, bytes]:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                return self._over(connection)
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                pass  # closed while nothing was asked over it: every client asks again then, RFC 9112, 9.3.1
        return self._over(http.client.HTTPConnection(self._address, 8000, timeout=ANSWER_WITHIN_S))

    def _over(self, connection: http.client.HTTPConnection) -> tuple[int, bytes]:
        connection.request("POST", self._given["path"], json.dumps(self._given["body"]), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        body = answer.read()
        if not answer.will_close:
            self._connection = connection
        return answer.status, body


def main() -> None:
    given = json.loads(sys.argv[1])
    stop = threading.Event()
    callers = [Caller(address, given, stop) for address in given["boxes"]]
    for caller in callers:
        caller.start()
    sys.stdin.read()
    stop.set()
    for caller in callers:
        caller.join(2 * ANSWER_WITHIN_S)
    failed = [line for caller in callers for line in caller.failed]
    sys.stdout.write(json.dumps({
        "answered": {caller._address: caller.answered for caller in callers}, "failed": failed,
        "slowest_ms": max(caller.slowest_s for caller in callers) * 1000,
    }))  # fmt: skip


main()
