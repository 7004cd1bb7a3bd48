"""``python -m edge_agent.worker --model FILE --socket PATH [--threads N]``"""

import argparse
import gc
import sys
from pathlib import Path

from edge_agent.worker.serve import serve
from edge_agent.worker.session import LoadFailed, Session
from skerry.wire import codec, ipc
from skerry.wire.messages import WarmupTensor


def main() -> None:
    """Load, then serve; a model that can't be loaded is said on the socket and on standard error, and is exit status 3."""
    parser = argparse.ArgumentParser(prog="edge_agent.worker", description="Serve one ONNX model on a Unix socket.")
    parser.add_argument("--model", type=Path, required=True, help="the ONNX file")
    parser.add_argument("--socket", type=Path, required=True, help="where to listen; the directory must be writable")
    parser.add_argument("--threads", type=int, default=1, help="threads for one inference (default: 1)")
    parser.add_argument("--warmup", default="[]", help="inputs of the warm-up run, JSON: [{name, shape, value}]")
    arguments = parser.parse_args()
    try:
        warmup = codec.decode(arguments.warmup.encode(), list[WarmupTensor])
        session = Session(arguments.model, threads=arguments.threads, warmup=warmup)
    except (LoadFailed, codec.Malformed) as exc:
        sys.exit(_failed(str(exc)))
    gc.freeze()  # what loading made lives as long as the process: the collector need not walk it in the middle of a request
    serve(arguments.socket, session, ipc.Hello(session.inputs, session.outputs, session.provider, session.load_ms, session.warm))


def _failed(reason: str) -> int:
    sys.stderr.write(f"load failed: {reason}\n")
    return 3


if __name__ == "__main__":
    main()
