"""The peers: servers that others made, each in an environment of its own, given the same models with the same options.

Each is a file of this folder that runs in the peer's environment: ``python FILE PORT REPLICAS SCRATCH`` serves at once. It gets raw
bytes where the peer has a way for them, since that is the fastest, and the Open Inference Protocol where it has none.
"""

from typing import Literal

import msgspec

Wire = Literal["raw", "json", "grpc"]
"""How it is asked: the inputs' bytes alone, the protocol's JSON, the protocol over gRPC with raw contents."""


class Way(msgspec.Struct, frozen=True):
    """One way of asking a peer: the path with the model's name in it, and how far its port lies above the first."""

    wire: Wire
    path: str = ""
    port_offset: int = 0


class Peer(msgspec.Struct, frozen=True):
    """One peer: what its environment is made of, how it is started, and the ways in which it is asked, by name.

    An ``argv`` says it where the file alone is not the command. A peer that is ``restless`` uses a core while nobody asks it anything: it
    is measured in a rotation of its own, against bare ONNX Runtime, so that it disturbs no other.
    """

    name: str
    packages: list[str]
    ways: dict[str, Way]
    versions: list[str]
    argv: list[str] = []
    environment: dict[str, str] = {}
    restless: bool = False
    is_model_server: bool = True


ONNX = ["numpy", "onnxruntime"]
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            "fastapi",
            ["fastapi", "uvicorn[standard]", *ONNX],
            {"fastapi": Way("raw", "/inline/{name}"), "fastapi-threads": Way("raw", "/threads/{name}")},
            ["fastapi", "uvicorn"],
            argv=["-m", "uvicorn", "fastapi_server:app", "--host", "127.0.0.1", "--port", "{port}", "--workers", "{replicas}",
                  "--log-level", "warning", "--no-access-log", "--timeout-keep-alive", "75"],
            is_model_server=False,
        ),
        Peer(
            "mlserver",
            ["mlserver", "uvloop<0.22", *ONNX],  # MLServer asks uvloop for an event loop in a way that 0.22 took away
            {"mlserver": Way("json", "/v2/models/{name}/infer"), "mlserver-grpc": Way("grpc", port_offset=1)},
            ["mlserver"],
        ),
        Peer("kserve", ["kserve", *ONNX], {"kserve-grpc": Way("grpc", port_offset=1)}, ["kserve"]),
        Peer(
            "ray",
            ["ray[serve]", *ONNX],
            {"ray": Way("raw", "/raw/{name}")},
            ["ray"],
            environment={"RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0"},
            restless=True,
        ),
        Peer(
            "bentoml",
            ["bentoml", *ONNX],
            {"bentoml": Way("raw", "/raw/{name}")},
            ["bentoml"],
            argv=["-m", "bentoml", "serve", "bentoml_server:Service", "--host", "127.0.0.1", "--port", "{port}",
                  "--working-dir", "{folder}"],
            environment={"BENTOML_DO_NOT_TRACK": "True"},
        ),
        Peer(
            "litserve",
            ["litserve", *ONNX],
            {"litserve": Way("raw", "/raw/{name}")},
            ["litserve"],
            environment={"DO_NOT_TRACK": "1"},
        ),
    )
}  # fmt: skip
