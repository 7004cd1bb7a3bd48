"""What REST and gRPC both tell of the server and its models, in the shapes that Triton's JSON has.

Sources: kserve/open-inference-protocol; Triton's ``extension_model_configuration.md``, ``extension_model_repository.md`` and
``extension_statistics.md``. The shapes are those of Triton's protobuf messages too, field by field.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from edge_agent.gateway.ledger import Account, merged
from skerry import __version__
from skerry.wire import ipc, oip
from skerry.wire.box import Route
from skerry.wire.messages import StateTensor, Tier

PLATFORM = "onnxruntime_onnx"
BACKEND = "onnxruntime"


class NotKnown(Exception):
    """No replica has been ready yet to say what its model takes; the text says so."""


class Pool(Protocol):
    """A deployment's replicas: what the last one said of its model, and how many calls those that are ready run at once."""

    @property
    def hello(self) -> ipc.Hello | None: ...
    @property
    def slots(self) -> int: ...


class Served(Protocol):
    """One deployment as it is served."""

    @property
    def route(self) -> Route: ...
    @property
    def pool(self) -> Pool: ...
    @property
    def account(self) -> Account: ...


class Directory(Protocol):
    """Everything served. ``find`` raises its own error where nothing has that name and version."""

    def routes(self) -> Sequence[Served]: ...
    def find(self, name: str, version: str | None) -> Served: ...


def can_answer(served: Served) -> bool:
    """Whether somebody, here or elsewhere, would take a request."""
    return served.pool.slots > 0 or bool(served.route.upstreams)


class Facts:
    """Answers that change nothing; several deployments of one model in one version are told as one."""

    def __init__(
        self,
        service: Directory,
        *,
        node: str,
        tier: Tier,
        extensions: Sequence[str] = oip.EXTENSIONS,
        accounts: Callable[[], Mapping[str, Account]] = dict,
    ) -> None:
        """``accounts`` by deployment, the sum of several processes, stand in for those of ``service``."""
        self._service = service
        self._node = node
        self._tier = tier
        self._extensions = list(extensions)
        self._accounts = accounts

    def waiting_for(self) -> list[str]:
        """The deployments that nobody can answer for now."""
        return [served.route.deployment for served in self._service.routes() if not can_answer(served)]

    def is_ready(self) -> bool:
        """Whether every deployment can be answered by somebody."""
        return not self.waiting_for()

    def can_answer(self, served: Served) -> bool:
        """Whether somebody, here or elsewhere, would take a request."""
        return can_answer(served)

    def server_metadata(self) -> dict[str, Any]:
        """``GET v2``."""
        return {"name": "skerry", "version": __version__, "extensions": self._extensions, "node": self._node, "tier": self._tier}

    def model_metadata(self, served: Served) -> dict[str, Any]:
        """``GET v2/models/<m>``: inputs and outputs as the worker reads them off the model. Raises NotKnown."""
        hello = _hello(served)
        return {
            "name": served.route.model,
            "versions": [str(version) for version in self._versions(served.route.model)],
            "platform": PLATFORM,
            "inputs": [{"name": t.name, "datatype": t.datatype, "shape": list(t.shape)} for t in hello.inputs],
            "outputs": [{"name": t.name, "datatype": t.datatype, "shape": list(t.shape)} for t in hello.outputs],
        }

    def _versions(self, model: str) -> list[int]:
        return sorted({served.route.version for served in self._service.routes() if served.route.model == model})

    def model_config(self, served: Served) -> dict[str, Any]:
        """``GET v2/models/<m>/config``. Raises NotKnown.

        Extents are told without the batch axis where requests are put together (``max_batch_size`` above 0), as Triton's clients expect.
        """
        hello, route = _hello(served), served.route
        batches = hello.batches and route.batching.max_batch > 1
        kept = {state.input for state in hello.state}
        config: dict[str, Any] = {
            "name": route.model,
            "platform": PLATFORM,
            "backend": BACKEND,
            "version_policy": {"specific": {"versions": self._versions(route.model)}},
            "max_batch_size": route.batching.max_batch if batches else 0,
            "input": [_io(spec, batches) | ({"optional": True} if spec.name in kept else {}) for spec in hello.inputs],
            "output": [_io(spec, batches) for spec in hello.outputs],
            "instance_group": [
                {
                    "name": route.deployment,
                    "kind": "KIND_GPU" if hello.provider.startswith(("CUDA", "Tensorrt")) else "KIND_CPU",
                    "count": max(1, len(route.replicas)),
                }
            ],
            "default_model_filename": "model.onnx",
        }
        if batches:
            config["dynamic_batching"] = {"preferred_batch_size": [], "max_queue_delay_microseconds": route.batching.max_wait_us}
        if hello.state:
            config["sequence_batching"] = {"direct": {}, "state": [_state(state, hello, batches) for state in hello.state]}
        return config

    def statistics(self, name: str | None = None, version: str | None = None) -> dict[str, Any]:
        """``GET v2/models[/<m>[/versions/<v>]]/stats``: every model, every version of one, or one. Raises what ``find`` raises."""
        accounts = self._accounts()
        chosen = [s for s in self._service.routes() if name is None or (version is None and name in (s.route.model, s.route.deployment))]
        if name is not None and not chosen:
            chosen = [self._service.find(name, version)]
        found: dict[tuple[str, int], list[Account]] = {}
        for served in chosen:
            account = accounts.get(served.route.deployment, served.account)
            found.setdefault((served.route.model, served.route.version), []).append(account)
        return {"model_stats": [_statistics(model, number, merged(same)) for (model, number), same in sorted(found.items())]}

    def repository_index(self, *, ready_only: bool) -> list[dict[str, str]]:
        """``POST v2/repository/index``."""
        found: dict[tuple[str, int], bool] = {}
        for served in self._service.routes():
            key = (served.route.model, served.route.version)
            found[key] = found.get(key, False) or can_answer(served)
        return [
            {
                "name": model,
                "version": str(version),
                "state": "READY" if ready else "UNAVAILABLE",
                "reason": "" if ready else "no replica of it is ready and no other box serves it",
            }
            for (model, version), ready in sorted(found.items())
            if ready or not ready_only
        ]


def _hello(served: Served) -> ipc.Hello:
    hello = served.pool.hello
    if hello is None:
        raise NotKnown(f"no replica of {served.route.model!r} has been ready here yet, its inputs are not known")
    return hello


def _io(spec: ipc.TensorSpec, batches: bool) -> dict[str, Any]:
    return {"name": spec.name, "data_type": _type_of(spec.datatype), "dims": list(spec.shape[1:] if batches else spec.shape)}


def _type_of(datatype: str) -> str:
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"


def _state(state: StateTensor, hello: ipc.Hello, batches: bool) -> dict[str, Any]:
    told: dict[str, Any] = {"input_name": state.input, "output_name": state.output}
    for spec in hello.inputs:
        if spec.name == state.input:
            io = _io(spec, batches)
            told |= {"data_type": io["data_type"], "dims": io["dims"]}
    return told


def _statistics(model: str, version: int, account: Account) -> dict[str, Any]:
    nothing = {"count": 0, "ns": 0}
    return {
        "name": model,
        "version": str(version),
        "last_inference": account.last_at_ms,
        "inference_count": account.rows,
        "execution_count": account.executions,
        "inference_stats": {
            "success": {"count": account.answered, "ns": account.total_ns},
            "fail": {"count": account.unanswered, "ns": account.failures_ns},
            "queue": {"count": account.computed, "ns": account.queue_ns},
            "compute_input": {"count": account.computed, "ns": account.input_ns},
            "compute_infer": {"count": account.computed, "ns": account.compute_ns},
            "compute_output": {"count": account.computed, "ns": account.output_ns},
            "cache_hit": nothing,
            "cache_miss": nothing,
        },
        "batch_stats": [
            {
                "batch_size": rows,
                "compute_input": nothing,
                "compute_infer": {"count": runs.count, "ns": runs.compute_ns},
                "compute_output": nothing,
            }
            for rows, runs in sorted(account.runs.items())
        ],
    }
