"""``python -m edge_agent.worker.relay --socket PATH --port N --model NAME``: a model server of one's own, as a worker.

It runs beside the server and shares its loopback: calls come as frames on the worker's socket and go on as the Open Inference
Protocol over HTTP. So the gateway sees a worker like any other, and the server has neither a network nor the socket's directory.

The server is not trusted: its answers are bounded, parsed before anything of them is passed on, and must be what was asked for.
"""

import argparse
import socket
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from edge_agent.worker.frames import MAX_CONNECTIONS, BodyTooLarge, Reader, listen, send
from edge_agent.worker.upstream import Refused, Server, ServerFailed, Upstream
from skerry.wire import codec, ipc, oip

EXIT_LOAD_FAILED = 3


def main() -> None:
    """Wait for the server and its model, then carry calls to it; a server that does not come is exit status 3."""
    parser = argparse.ArgumentParser(prog="edge_agent.worker.relay", description="Carry calls to a model server on this loopback.")
    parser.add_argument("--socket", type=Path, required=True, help="where to listen; the directory must be writable")
    parser.add_argument("--port", type=int, required=True, help="where the server listens, HTTP")
    parser.add_argument("--model", required=True, help="the model's name there")
    parser.add_argument("--memory-bytes", type=int, default=256 * 2**20, help="what this process may use: it bounds bodies")
    parser.add_argument("--ready-within", type=float, default=600.0, help="seconds that the server has to get ready (default: 600)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one call (default: 120)")
    arguments = parser.parse_args()
    server = Server(arguments.port, arguments.model, timeout_s=arguments.timeout, memory_bytes=arguments.memory_bytes)
    started = time.monotonic()
    try:
        served = server.wait_ready(within_s=arguments.ready_within)
    except ServerFailed as exc:
        sys.stderr.write(f"load failed: {exc}\n")
        sys.exit(EXIT_LOAD_FAILED)
    load_ms = (time.monotonic() - started) * 1000
    hello = ipc.Hello(served.inputs, served.outputs, f"{served.software} on port {arguments.port}"[:200], load_ms)
    serve(listen(arguments.socket), server, hello, binary=served.binary)


def answer(upstream: Upstream, header: memoryview, body: memoryview) -> tuple[ipc.Answers, list[oip.Bytes]]:
    """A batch, carried to the server call by call and back. Whatever the server does becomes an answer. Raises codec.Malformed for what is
    no batch."""
    calls, offset = [], 0
    for call in ipc.parse_header(header, ipc.Batch).calls:
        tensors, offset = ipc.tensors_of(call.inputs, body, offset, None)
        calls.append((call, tensors))
    ipc.check_end(body, offset)
    answers, parts, left_bytes = [], [], upstream.most_bytes
    for call, tensors in calls:
        said, outputs = _answer_one(upstream, call, tensors)
        left_bytes -= sum(len(output.data) for output in outputs)
        if left_bytes < 0 and len(calls) > 1:
            said = ipc.Answer(call.call, error=f"the answers to one batch have more than the {upstream.most_bytes} bytes that are taken")
        else:
            parts += [output.data for output in outputs]
        answers.append(said)
    return ipc.Answers(answers), parts


def _answer_one(upstream: Upstream, call: ipc.Call, tensors: list[oip.Tensor]) -> tuple[ipc.Answer, list[oip.Tensor]]:
    started = time.perf_counter_ns()
    try:
        outputs = upstream.infer(tensors, call.outputs)
    except Refused as exc:
        return ipc.Answer(call.call, error=str(exc), refused=True), []
    except ServerFailed as exc:
        return ipc.Answer(call.call, error=str(exc)), []
    compute_us = (time.perf_counter_ns() - started) // 1000
    return ipc.Answer(call.call, ipc.heads_of(outputs), compute_us), outputs


def _serve_connection(connection: socket.socket, upstream: Upstream, hello: ipc.Hello, slots: threading.Semaphore) -> None:
    reader = Reader(connection, most_body_bytes=upstream.most_bytes)
    try:
        with connection, upstream:
            send(connection, hello, [])
            while True:
                try:
                    frame = reader.frame()
                except BodyTooLarge as exc:
                    calls = ipc.parse_header(exc.header, ipc.Batch).calls
                    send(connection, ipc.Answers([ipc.Answer(c.call, error=f"inputs: {exc}", refused=True) for c in calls]), [])
                    continue
                if frame is None:
                    return
                send(connection, *answer(upstream, *frame))
    except (OSError, codec.Malformed, MemoryError):
        return  # the peer went away or does not speak our protocol; its connection alone ends
    finally:
        slots.release()


def serve(listener: socket.socket, server: Server, hello: ipc.Hello, *, binary: bool) -> NoReturn:
    """Accept connections for ever, each with a connection to the server of its own."""
    slots = threading.Semaphore(MAX_CONNECTIONS)
    with listener:
        while True:
            slots.acquire()
            connection, _ = listener.accept()
            arguments = (connection, Upstream(server, binary=binary), hello, slots)
            threading.Thread(target=_serve_connection, args=arguments, daemon=True).start()


if __name__ == "__main__":
    main()
