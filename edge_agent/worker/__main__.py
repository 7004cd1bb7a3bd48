"""``python -m edge_agent.worker --socket PATH [--model FILE] [--threads N] [--warmup JSON] [--state JSON] [--gpu-memory BYTES]``

Without ``--model`` it imports all that it will need and waits, on ``control.sock`` beside its socket, to be told to load the model that
will then lie in its model directory.
"""

import argparse
import gc
import sys
from pathlib import Path

from edge_agent.worker import lockdown
from skerry.wire import codec, ipc
from skerry.wire.messages import StateTensor, WarmupTensor

MODEL = Path("/model/model.onnx")
CONTROL = "control.sock"
EXIT_LOAD_FAILED = 3


def main() -> None:
    """Load, lock down, then serve; a model that can't be loaded is said on standard error and is exit status 3."""
    parser = argparse.ArgumentParser(prog="edge_agent.worker", description="Serve one ONNX model on a Unix socket.")
    parser.add_argument("--model", type=Path, help="the ONNX file; without it, wait to be told to load the one in /model")
    parser.add_argument("--socket", type=Path, required=True, help="where to listen; the directory must be writable")
    parser.add_argument("--threads", type=int, default=1, help="threads for one inference (default: 1)")
    parser.add_argument("--warmup", default="[]", help="inputs of the warm-up run, JSON: [{name, shape, value}]")
    parser.add_argument("--state", default="[]", help="what is kept between the calls of a sequence, JSON: [{input, output}]")
    parser.add_argument("--gpu-memory", type=int, default=0, help="bytes of a GPU's memory (default: none, the processor computes)")
    arguments = parser.parse_args()
    try:
        lockdown.before_loading(arguments.socket.parent)
    except lockdown.ConfineFailed as exc:
        sys.exit(_failed(str(exc)))
    # Only now: what is imported starts threads, and Landlock binds the thread that asks for it and those that follow.
    from edge_agent.worker import ahead, frames, serve
    from edge_agent.worker.session import LoadFailed, Session

    try:
        if arguments.model is None:
            ahead.prepare()
            model, load = MODEL, serve.wait_for_load(arguments.socket.with_name(CONTROL))
        else:
            model, load = arguments.model, _load_of(arguments.warmup, arguments.state)
        session = Session(model, threads=arguments.threads, warmup=load.warmup, state=load.state, gpu_memory_bytes=arguments.gpu_memory)
        listener = frames.listen(arguments.socket)
        confinement = lockdown.before_serving(session.provider)
    except (LoadFailed, codec.Malformed, lockdown.ConfineFailed) as exc:
        sys.exit(_failed(str(exc)))
    gc.freeze()  # what loading made lives as long as the process: the collector need not walk it in the middle of a request
    ahead.give_back_soon()
    serve.serve(listener, serve.Worker(session, confinement=confinement))


def _load_of(warmup: str, state: str) -> ipc.Load:
    """Raises codec.Malformed."""
    return ipc.Load(codec.decode(warmup.encode(), list[WarmupTensor]), codec.decode(state.encode(), list[StateTensor]))


def _failed(reason: str) -> int:
    sys.stderr.write(f"load failed: {reason}\n")
    return EXIT_LOAD_FAILED


if __name__ == "__main__":
    main()
