"""What is told of the server and its models, checked against the messages of Triton's own client."""

import msgspec
import pytest
from google.protobuf import json_format
from tritonclient.grpc import model_config_pb2, service_pb2

from edge_agent.gateway.facts import Facts, NotKnown
from edge_agent.gateway.ledger import Account
from skerry.wire.box import LocalReplica, Route
from skerry.wire.ipc import Hello, TensorSpec
from skerry.wire.messages import Batching, StateTensor, Upstream

HELLO = Hello(
    inputs=[TensorSpec("x", "FP32", (-1, 64)), TensorSpec("h", "BYTES", (-1, 2))],
    outputs=[TensorSpec("y", "FP16", (-1, 10)), TensorSpec("hn", "BYTES", (-1, 2))],
    provider="CUDAExecutionProvider",
    batches=True,
)


class Pool(msgspec.Struct):
    hello: Hello | None = None
    slots: int = 0


class Served(msgspec.Struct):
    route: Route
    pool: Pool
    account: Account


class Directory:
    """The names of a gateway, without its requests."""

    def __init__(self, *served: Served) -> None:
        self.served = served

    def routes(self) -> list[Served]:
        return list(self.served)

    def find(self, name: str, version: str | None) -> Served:
        return next(s for s in self.served if name in (s.route.model, s.route.deployment) and version in (None, str(s.route.version)))


def served(deployment: str = "d", version: int = 1, *, slots: int = 1, hello: Hello | None = HELLO, **route) -> Served:
    replicas = [LocalReplica(f"{deployment}-{number}", "s") for number in range(2)]
    account = Account("m", version)
    account.served("edge", total_ms=2, queue_ms=0.5, compute_ms=1, rows=3, at_ms=1234)
    account.ran(3, 1)
    account.refused(4)
    return Served(Route(deployment, "m", version, 100, replicas=replicas, **route), Pool(hello, slots), account)


def facts(*found: Served, **more) -> Facts:
    return Facts(Directory(*found), node="box", tier="edge", **more)


def test_the_server_says_what_it_offers_and_where_it_is():
    told = facts().server_metadata()
    assert (told["name"], told["node"], told["tier"]) == ("skerry", "box", "edge")
    message = json_format.ParseDict(told, service_pb2.ServerMetadataResponse(), ignore_unknown_fields=True)
    assert {"sequence", "statistics", "model_configuration"} <= set(message.extensions)
    offered = Facts(Directory(), node="box", tier="edge", extensions=["system_shared_memory"]).server_metadata()
    assert offered["extensions"] == ["system_shared_memory"]


def test_a_models_metadata_lists_the_versions_of_all_its_deployments():
    found = served("a", 1), served("b", 3), served("c", 3)
    message = json_format.ParseDict(facts(*found).model_metadata(found[0]), service_pb2.ModelMetadataResponse())
    assert list(message.versions) == ["1", "3"]
    assert [(t.name, t.datatype, list(t.shape)) for t in message.inputs] == [("x", "FP32", [-1, 64]), ("h", "BYTES", [-1, 2])]


def test_the_configuration_of_a_model_that_is_run_in_batches_leaves_out_the_batch_axis():
    found = served(batching=Batching(8, 500))
    config = json_format.ParseDict(facts(found).model_config(found), model_config_pb2.ModelConfig())
    assert config.max_batch_size == 8
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [
        ("x", model_config_pb2.TYPE_FP32, [64]),
        ("h", model_config_pb2.TYPE_STRING, [2]),
    ]
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert (config.instance_group[0].count, config.instance_group[0].kind) == (2, model_config_pb2.ModelInstanceGroup.KIND_GPU)
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"


def test_the_configuration_of_a_model_that_is_not_keeps_every_axis():
    for found in (
        served(),
        served(hello=msgspec.structs.replace(HELLO, batches=False, provider="CPUExecutionProvider"), batching=Batching(8, 5)),
    ):
        config = json_format.ParseDict(facts(found).model_config(found), model_config_pb2.ModelConfig())
        assert config.max_batch_size == 0
        assert list(config.input[0].dims) == [-1, 64]
        assert config.WhichOneof("scheduling_choice") is None
        assert list(config.version_policy.specific.versions) == [1]


def test_the_configuration_of_a_model_with_a_state_says_what_it_keeps():
    found = served(hello=msgspec.structs.replace(HELLO, state=[StateTensor("h", "hn")]))
    config = json_format.ParseDict(facts(found).model_config(found), model_config_pb2.ModelConfig())
    (state,) = config.sequence_batching.state
    assert (state.input_name, state.output_name, state.data_type) == ("h", "hn", model_config_pb2.TYPE_STRING)
    assert [i.optional for i in config.input] == [False, True]


def test_of_a_model_that_was_never_ready_nothing_is_made_up():
    found = served(hello=None)
    for ask in (facts(found).model_metadata, facts(found).model_config):
        with pytest.raises(NotKnown, match="'m' has been ready"):
            ask(found)


def test_statistics_are_of_all_of_one_model_or_of_one_version_and_count_each_version_once():
    one, two, same = served("a", 1), served("b", 2), served("c", 2)
    told = facts(one, two, same)
    message = json_format.ParseDict(told.statistics(), service_pb2.ModelStatisticsResponse())
    assert [(s.version, s.inference_count, s.execution_count, s.last_inference) for s in message.model_stats] == [
        ("1", 3, 1, 1234),
        ("2", 6, 2, 1234),
    ]
    first = message.model_stats[0]
    assert (first.inference_stats.success.count, first.inference_stats.success.ns) == (1, 2_000_000)
    assert (first.inference_stats.fail.count, first.inference_stats.fail.ns) == (1, 4_000_000)
    assert (first.inference_stats.queue.ns, first.inference_stats.compute_infer.ns) == (500_000, 1_000_000)
    assert [(b.batch_size, b.compute_infer.count, b.compute_infer.ns) for b in first.batch_stats] == [(3, 1, 1_000_000)]
    assert [s["version"] for s in told.statistics("m")["model_stats"]] == ["1", "2"]
    assert [s["version"] for s in told.statistics("m", "2")["model_stats"]] == ["2"]
    assert [s["version"] for s in told.statistics("a")["model_stats"]] == ["1"]
    with pytest.raises(StopIteration):
        told.statistics("other")


def test_statistics_of_several_processes_are_their_sum():
    mine = served("a")
    other = served("a").account
    other.ran(1, 1)
    told = facts(mine, accounts=lambda: {"a": other}).statistics("m")["model_stats"][0]
    assert told["execution_count"] == 2


def test_a_version_is_ready_where_one_of_its_deployments_can_be_answered_by_anybody():
    upstream = Upstream(node="cloud", tier="cloud", url="https://c")
    lost, passed_on, here = served("a", 1, slots=0), served("b", 2, slots=0, upstreams=[upstream]), served("c", 3)
    told = facts(lost, passed_on, here, served("d", 3, slots=0))
    assert [(e["version"], e["state"]) for e in told.repository_index(ready_only=False)] == [
        ("1", "UNAVAILABLE"),
        ("2", "READY"),
        ("3", "READY"),
    ]
    assert [e["version"] for e in told.repository_index(ready_only=True)] == ["2", "3"]
    assert told.repository_index(ready_only=False)[0]["reason"]
    assert told.waiting_for() == ["a", "d"]
    assert not told.is_ready()
    assert facts(here, passed_on).is_ready()
    assert told.can_answer(passed_on)
    json_format.ParseDict({"models": told.repository_index(ready_only=False)}, service_pb2.RepositoryIndexResponse())
