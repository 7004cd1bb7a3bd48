"""A deployment file is taken as it was meant or refused with the key and the line of the mistake."""

import contextlib
import time

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from coordinator.core.deployment import MAX_TEXT_BYTES, Deployment, DeploymentError, Policy, Replicas, parse
from coordinator.core.rollout import Rules
from skerry.wire import codec
from skerry.wire.messages import Batching, CloudBudget, Server

EXAMPLE = """\
name: shelf-detector
model: shelf-detector:3            # name:version in the model store, pinned by sha256
replicas: {per_node: 1}            # or {count: 40}
place: {labels: {site: "store-*"}, tier: [edge], accelerator: any}
resources: {memory: 512MiB, cpus: 1.0, gpu_memory: 0}
isolation: {at_least: container}   # process < container < gvisor < microvm; the box reports which rung it really used
slo: {deadline_ms: 50, target: 0.99}
split:                             # how work is divided between edge and cloud
  mode: overflow                   # edge | cloud | overflow   (later: cascade, partition)
  cloud_budget: {requests_per_hour: 2000}
disconnect: {lost_after: 60s, replace: true, reconcile: keep_original, stop_on_box_after: never}
rollout: {waves: [1, 10%, 100%], success: 0.95, observe: 2m}
"""
SHORT = "name: a\nmodel: m:1\n"
IMAGE = f"sha256:{'0a' * 32}"


def refused(text: str) -> DeploymentError:
    with pytest.raises(DeploymentError) as caught:
        parse(text)
    return caught.value


def test_the_example_of_the_design_is_taken_and_says_what_can_not_be_acted_on():
    parsed = parse(EXAMPLE)
    warnings = parsed.warnings
    assert msgspec.structs.replace(parsed, warnings=[]) == Deployment(
        name="shelf-detector",
        model="shelf-detector",
        version=3,
        replicas=Replicas(per_node=1),
        labels={"site": "store-*"},
        tiers=["edge"],
        accelerator="any",
        memory_bytes=512 * 2**20,
        cpus=1.0,
        gpu_memory_bytes=0,
        isolation_at_least="container",
        deadline_ms=50,
        target=0.99,
        split="overflow",
        cloud_budget=CloudBudget(2000),
        disconnect=Policy(60_000, replace=True, reconcile="keep_original", stop_on_box_after_ms=0),
        rollout=Rules([1, 0.1, 1.0], 0.95, 120_000),
    )
    assert [warning.partition(":")[0] for warning in warnings] == ["disconnect.replace"]


def test_two_lines_are_enough():
    parsed = parse(SHORT)
    assert (parsed.replicas, parsed.tiers, parsed.split, parsed.warnings) == (Replicas(per_node=1), ["edge"], "overflow", [])


def test_json_is_taken_as_well():
    assert parse('{"name": "a", "model": "m:1", "replicas": {"count": 40}}').replicas == Replicas(count=40)


@pytest.mark.parametrize(
    ("lines", "field", "line", "word"),
    [
        ("replica: {count: 1}", "replica", 3, "unknown key"),
        ("resources:\n  memory: 1GiB\n  cpu: 2", "resources.cpu", 5, "unknown key"),
        ("split:\n  cloud_budget:\n    per_hour: 3", "split.cloud_budget.per_hour", 5, "unknown key"),
        ("split:\n  cloud_budget: {}", "split.cloud_budget", 4, "give requests_per_hour, bytes_per_hour or both"),
        ("split:\n  cloud_budget:\n    bytes_per_hour: lots", "split.cloud_budget.bytes_per_hour", 5, "512MiB"),
        ("split:\n  cloud_budget:\n    bytes_per_hour: -1", "split.cloud_budget.bytes_per_hour", 5, "512MiB"),
        ("split:\n  cloud_budget:\n    bytes_per_hour: 1025TiB", "split.cloud_budget.bytes_per_hour", 5, "more than 1024TiB"),
        ("split:\n  cloud_budget:\n    requests_per_hour: 1000000001", "split.cloud_budget.requests_per_hour", 5, "<= 1000000000"),
        ("split:\n  cloud_budget:\n    requests_per_hour: 1.5", "split.cloud_budget.requests_per_hour", 5, "expected `int"),
        ("batching: 8", "batching", 3, "expected `object`"),
        ("batching:\n  max_batch: 0", "batching.max_batch", 4, ">= 1"),
        ("batching:\n  max_batch: 1025", "batching.max_batch", 4, "<= 1024"),
        ("batching:\n  max_batch: 2\n  max_wait: 2", "batching.max_wait", 5, "expected `str`"),
        ("batching:\n  max_batch: 2\n  max_wait: soon", "batching.max_wait", 5, "60s"),
        ("batching:\n  max_batch: 2\n  max_wait: 1001ms", "batching.max_wait", 5, "longer than 1s"),
        ("batching:\n  max_batch: 2\n  max_wait_us: 7", "batching.max_wait_us", 5, "unknown key"),
        ("replicas: 3", "replicas", 3, "expected `object`"),
        ("slo:\n  deadline_ms: soon", "slo.deadline_ms", 4, "expected `int`"),
        ("slo:\n  target: .nan", "slo.target", 4, "expected `float`"),
        ("resources:\n  cpus: .nan", "resources.cpus", 4, "expected `float`"),
        ("resources:\n  cpus: .inf", "resources.cpus", 4, "<= 1024"),
        ("resources:\n  cpus: -1", "resources.cpus", 4, ">= 0.01"),
        ("resources:\n  memory: .inf", "resources.memory", 4, "expected `int | str`"),
        ("resources:\n  memory: 512 Mb", "resources.memory", 4, "512MiB"),
        ("resources:\n  memory: -5", "resources.memory", 4, "512MiB"),
        ("resources:\n  memory: true", "resources.memory", 4, "expected `int | str`"),
        ("resources:\n  memory: 63MiB", "resources.memory", 4, "64MiB at the least"),
        ("resources:\n  gpu_memory: lots", "resources.gpu_memory", 4, "512MiB"),
        ("replicas:\n  per_node: 1\n  count: 2", "replicas", 3, "either per_node or count"),
        ("replicas: {}", "replicas", 3, "either per_node or count"),
        ("replicas:\n  count: -1", "replicas.count", 4, ">= 1"),
        ("replicas:\n  count: 0", "replicas.count", 4, ">= 1"),
        ("replicas:\n  per_node: 1.5", "replicas.per_node", 4, "expected `int"),
        ("replicas:\n  per_node: 100001", "replicas.per_node", 4, "<= 256"),
        ("slo:\n  deadline_ms: 0", "slo.deadline_ms", 4, ">= 1"),
        ("split:\n  cloud_budget: {requests_per_hour: -1}", "split.cloud_budget.requests_per_hour", 4, ">= 0"),
        ("split:\n  mode: cascade", "split.mode", 4, "cascade"),
        ("isolation:\n  at_least: chroot", "isolation.at_least", 4, "chroot"),
        ("place:\n  tier: [edge, moon]", "place.tier[1]", 4, "moon"),
        ("place:\n  tier: []", "place.tier", 4, "names no tier"),
        ("place:\n  accelerator: tpu", "place.accelerator", 4, "tpu"),
        ("place:\n  labels:\n    site: 5", "place.labels[...]", 4, "expected `str`"),
        ("place:\n  labels:\n    yes: x", "place.labels.yes", 5, "put it in quotes"),
        ("5: x", "5", 3, "put it in quotes"),
        ("<<: {split: {mode: edge}}", "<<", 3, "put it in quotes"),
        ("slo: {target: 0.9}\nslo: {target: 0.8}", "slo", 4, "given twice"),
        ("slo:\n  target: 0.9\n  target: 0.8", "slo.target", 5, "given twice"),
        ("image: worker:latest", "image", 3, "is not an image's id"),
        (f"image: {IMAGE}0", "image", 3, "is not an image's id"),
        (f"image: {IMAGE.upper()}", "image", 3, "is not an image's id"),
        ("server: {port: 8080}", "server.image", 3, "is required"),
        ("server:\n  image: mlserver", "server.image", 4, "is not an image's id"),
        (f"server:\n  image: {IMAGE}\n  port: 0", "server.port", 5, ">= 1"),
        (f"server:\n  image: {IMAGE}\n  port: 65536", "server.port", 5, "<= 65535"),
        (f"server:\n  image: {IMAGE}\n  model: a/../b", "server.model", 5, "is not a model's name"),
        (f"server:\n  image: {IMAGE}\n  model: ..", "server.model", 5, "is not a model's name"),
        (f"server:\n  image: {IMAGE}\n  ports: [1]", "server.ports", 5, "unknown key"),
        (f"server:\n  image: {IMAGE}\n  argv: start", "server.argv", 5, "expected `array`"),
        (f"server:\n  image: {IMAGE}\n  argv: [1]", "server.argv[0]", 5, "expected `str`"),
        (f"server:\n  image: {IMAGE}\n  argv: [{'a, ' * 257}]", "server.argv", 5, "more than 256 entries"),
        (f"server:\n  image: {IMAGE}\n  argv: ['{'a' * 20_000}']", "server.argv", 5, "16384 bytes"),
        (f'server:\n  image: {IMAGE}\n  argv: ["a\\0b"]', "server.argv", 5, "NUL"),
        (f"server:\n  image: {IMAGE}\n  environment: {{'a=b': c}}", "server.environment", 5, "is not a variable's name"),
        (f'server:\n  image: {IMAGE}\n  environment: {{a: "\\0"}}', "server.environment", 5, "NUL"),
        (f"image: {IMAGE}\nserver: {{image: '{IMAGE}'}}", "server", 4, "give one of the two"),
        (f"resources:\n  memory: 127MiB\nserver: {{image: '{IMAGE}'}}", "resources.memory", 4, "128MiB at the least"),
        ("update:\n  strategy: rolling", "update.strategy", 4, "rolling"),
        ("update:\n  no_room: wait", "update.no_room", 4, "wait"),
        ("update: recreate", "update", 3, "expected `object`"),
        ("disconnect:\n  lost_after: soon", "disconnect.lost_after", 4, "60s"),
        ("disconnect:\n  lost_after: 999ms", "disconnect.lost_after", 4, "between 1s and 10 years"),
        ("disconnect:\n  lost_after: 4000d", "disconnect.lost_after", 4, "between 1s and 10 years"),
        ("disconnect:\n  reconcile: best_score", "disconnect.reconcile", 4, "best_score"),
        ("disconnect:\n  stop_on_box_after: 0s", "disconnect.stop_on_box_after", 4, "between 1s and 10 years"),
        ("disconnect:\n  stop_on_box_after: never ever", "disconnect.stop_on_box_after", 4, "60s"),
        ("rollout:\n  observe: 2 weeks", "rollout.observe", 4, "60s"),
        ("rollout:\n  waves: [1, [2]]", "rollout.waves[1]", 4, "expected `int | str`"),
    ],
)
def test_a_mistake_is_named_with_its_key_and_its_line(lines, field, line, word):
    problem = refused(SHORT + lines)
    assert (problem.field, problem.line) == (field, line)
    assert word in str(problem)
    assert str(problem).startswith(f"{field}: ")


def test_an_image_of_the_workers_own_is_pinned_by_its_id():
    parsed = parse(SHORT + f"image: {IMAGE}")
    assert (parsed.image, parsed.server) == (IMAGE, None)


def test_a_server_of_ones_own_may_be_given_its_port_model_command_and_environment():
    text = f"server:\n  image: {IMAGE}\n  port: 9000\n  model: m.v1\n  argv: [serve, --all]\n  environment: {{A_1: 'x = y'}}"
    assert parse(SHORT + text).server == Server(IMAGE, 9000, "m.v1", ["serve", "--all"], {"A_1": "x = y"})
    assert parse(SHORT + f"server: {{image: '{IMAGE}'}}").server == Server(IMAGE)


@pytest.mark.parametrize(
    ("lines", "mode"),
    [
        ("", "hand_over_if_room"),
        ("update: {}", "hand_over_if_room"),
        ("update: {no_room: refuse}", "hand_over"),
        ("update: {strategy: hand_over, no_room: recreate}", "hand_over_if_room"),
        ("update: {strategy: recreate}", "recreate"),
        ("update: {strategy: recreate, no_room: refuse}", "recreate"),
    ],
)
def test_an_update_is_one_of_three_modes(lines, mode):
    assert parse(SHORT + lines).update == mode


@pytest.mark.parametrize(
    ("lines", "batching"),
    [
        ("", Batching(1, 0)),
        ("batching: {}", Batching(1, 0)),
        ("batching: {max_batch: 8}", Batching(8, 0)),
        ("batching: {max_batch: 8, max_wait: 2ms}", Batching(8, 2000)),
        ("batching: {max_batch: 1024, max_wait: 0.25ms}", Batching(1024, 250)),
        ("batching: {max_batch: 1, max_wait: 1s}", Batching(1, 1_000_000)),
    ],
)
def test_batches_have_a_size_and_a_wait(lines, batching):
    parsed = parse(SHORT + lines)
    assert (parsed.batching, parsed.warnings) == (batching, [])


@pytest.mark.parametrize(
    ("lines", "budget"),
    [
        ("", None),
        ("split: {cloud_budget: {requests_per_hour: 0}}", CloudBudget(0, None)),
        ("split: {cloud_budget: {bytes_per_hour: 0}}", CloudBudget(None, 0)),
        ("split: {cloud_budget: {bytes_per_hour: 1.5 GB}}", CloudBudget(None, 1_500_000_000)),
        ("split: {cloud_budget: {requests_per_hour: 7, bytes_per_hour: 1024TiB}}", CloudBudget(7, 2**50)),
    ],
)
def test_a_cloud_budget_limits_requests_bytes_or_both(lines, budget):
    parsed = parse(SHORT + lines)
    assert (parsed.cloud_budget, parsed.warnings) == (budget, [])


def test_batches_of_a_server_of_ones_own_are_warned_of():
    server = f"server: {{image: '{IMAGE}'}}\n"
    assert [w.partition(":")[0] for w in parse(SHORT + server + "batching: {max_batch: 2}").warnings] == ["batching"]
    assert parse(SHORT + server + "batching: {max_batch: 1}").warnings == []


def test_a_deployment_that_an_older_version_stored_can_be_read():
    newer = ("image", "server", "update", "batching", "cloud_budget")
    older = {key: value for key, value in msgspec.to_builtins(parse(SHORT)).items() if key not in newer}
    assert codec.decode(codec.encode(older), Deployment) == parse(SHORT)


@pytest.mark.parametrize("name", ["", "a b", "-a", "a/b", "../a", "a" * 49, "ä", "a\\n"])
def test_a_bad_name_is_named_with_its_line(name):
    problem = refused(f'model: m:1\nname: "{name}"')
    assert (problem.field, problem.line) == ("name", 2)


@pytest.mark.parametrize("model", ["m", "m:", ":1", "m:0", "m:v1", "m:-1", "m:1.0", "m:1:2", "a/b:1", "m:9999999999", "m:٣"])
def test_a_bad_model_is_named_with_its_line(model):
    problem = refused(f'name: a\nmodel: "{model}"')
    assert (problem.field, problem.line) == ("model", 2)
    assert "name:version" in str(problem)


@pytest.mark.parametrize("missing", ["name", "model"])
def test_a_key_that_must_be_there_is_named(missing):
    problem = refused("".join(line for line in SHORT.splitlines(keepends=True) if not line.startswith(missing)))
    assert (problem.field, str(problem)) == (missing, f"{missing}: is required")


BOMB = "a: &a [x, x, x, x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("", 1, "expected a mapping"),
        ("# nothing\n", 1, "expected a mapping"),
        ("- a\n- b", 1, "expected a mapping"),
        ("just words", 1, "expected a mapping"),
        ("name: a\nmodel: [", 2, "not YAML"),
        ("name: a\n\tmodel: m:1", 2, "not YAML"),
        ("name: a\nmodel: m:1\n  x: 1", 3, "not YAML"),
        (SHORT + "---\n" + SHORT, 3, "not YAML"),
        ("\x7fELF\x00\x01", 0, "not YAML"),
        (BOMB, 2, "aliases"),
        (SHORT + "slo: &x {target: 0.5}\nsplit: *x", 4, "aliases"),
        (SHORT + "x: !!python/object/apply:os.system [ls]", 3, "tags"),
        (SHORT + 'x: !!int ""', 3, "tags"),
        (SHORT + "x: !!timestamp soon", 3, "tags"),
        (SHORT + "? [a]\n: b", 3, "not YAML"),
        (SHORT + 'place: {labels: {site: "\\ud800"}}', 3, "surrogate"),
        (SHORT + '"\\udfff": 1', 3, "surrogate"),
        (SHORT + "x: " + "1:" * 300 + "1.0", 0, "not YAML"),
        (SHORT + "x: 2001-99-99", 0, "not YAML"),
        (SHORT + "x: " + "9" * 5000, 0, "not YAML"),
    ],
)
def test_what_is_no_deployment_at_all_is_refused_with_its_line_where_it_has_one(text, line, word):
    problem = refused(text)
    assert problem.line == line
    assert word in str(problem)


def test_half_a_character_that_no_file_can_hold_is_refused_too():
    assert "not YAML" in str(refused(SHORT + "# \ud800"))


@pytest.mark.parametrize("text", ["[" * 100_000, "x" * (MAX_TEXT_BYTES + 1), "#" + "ä" * (MAX_TEXT_BYTES // 2)])
def test_a_huge_file_is_refused_unread(text):
    assert f"more than {MAX_TEXT_BYTES} bytes" in str(refused(text))


@pytest.mark.parametrize("text", ["[" * 60_000, "{a: " * 16_000, "- " * 30_000, "? " * 30_000, SHORT + "x: " + "[" * 3000 + "]" * 3000])
def test_brackets_in_brackets_are_refused_before_they_cost_time(text):
    started = time.process_time()
    problem = refused(text)
    assert "deep" in str(problem)
    assert problem.line > 0
    assert time.process_time() - started < 5


def test_every_default_can_be_written_out():
    written = "replicas: {per_node: 1}\nplace: {labels: {}, tier: [edge], accelerator: any}\nslo: {deadline_ms: 1000, target: 0.99}"
    written += "\nupdate: {strategy: hand_over, no_room: recreate}\nbatching: {max_batch: 1, max_wait: 0ms}"
    assert parse(SHORT + written) == parse(SHORT)


def usable(text: str) -> None:
    """Taken, and then fit for the plan and the API; or refused in the one way that callers know."""
    with contextlib.suppress(DeploymentError):
        parsed = parse(text)
        assert (parsed.replicas.per_node is None) != (parsed.replicas.count is None)
        assert parsed.memory_bytes >= 64 * 2**20
        assert parsed.gpu_memory_bytes >= 0
        assert 0 < parsed.cpus <= 1024
        assert 0 < parsed.target <= 1
        assert parsed.tiers
        assert 1 <= parsed.batching.max_batch <= 1024
        assert 0 <= parsed.batching.max_wait_us <= 1_000_000
        budget = parsed.cloud_budget or CloudBudget(0, 0)
        assert {budget.requests_per_hour, budget.bytes_per_hour} != {None}
        assert all(limit is None or 0 <= limit <= 2**53 for limit in (budget.requests_per_hour, budget.bytes_per_hour))
        codec.encode(parsed.labels)


@given(st.text(st.characters(codec=None), max_size=200))
@example("!!int")
@example("\ud800")
@settings(max_examples=150, deadline=None)
def test_no_text_raises_anything_but_a_deployment_error(text):
    usable(text)


PIECES = [
    *"[]{}:,-?&*!|>'\"%@`#~=<\n\t ",
    "\n  ", "- ", ": ", "? ", "!!int ", "!!float ", "!!binary ", "!!set ", "!!omap ", "!x ", "&a ", "*a", "<<: ",
    "---\n", "...\n", "%YAML 9.9\n", "null", "yes", ".nan", ".inf", "-1", "0x", "0o9", "1e999", "2001-01-99", "1:1:1.0", "9" * 30,
    "\ud800", '"\\ud800"', "\x00", "\ufeff", "ä",
]  # fmt: skip


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_no_damage_to_a_good_file_raises_anything_but_a_deployment_error(data):
    text = data.draw(st.sampled_from([EXAMPLE, SHORT + "place: {labels: {a: b}}\n"]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 6))
        text = text[:at] + data.draw(st.sampled_from([*PIECES, text[at : at + 20]])) + text[at + cut :]
    usable(text)


values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda value: st.lists(value, max_size=3) | st.dictionaries(st.text(max_size=5), value, max_size=3),
    max_leaves=8,
)


@given(values, st.data())
@settings(max_examples=150, deadline=None)
def test_no_value_in_the_place_of_another_raises_anything_but_a_deployment_error(value, data):
    spec = {
        "name": "a", "model": "m:1", "replicas": {"count": 1}, "place": {"labels": {"a": "b"}, "tier": ["edge"], "accelerator": "any"},
        "resources": {"memory": "1GiB", "cpus": 1, "gpu_memory": 0}, "isolation": {"at_least": "process"},
        "slo": {"deadline_ms": 1, "target": 1}, "split": {"mode": "edge", "cloud_budget": {"requests_per_hour": 1}},
        "batching": {"max_batch": 2, "max_wait": "2ms"},
        "disconnect": {"lost_after": "1s", "reconcile": "keep_original", "stop_on_box_after": "never", "replace": True},
        "image": IMAGE, "update": {"strategy": "recreate", "no_room": "refuse"},
        "server": {"image": IMAGE, "port": 1, "model": "m", "argv": ["a"], "environment": {"A": "b"}},
        "rollout": {"waves": [1]},
    }  # fmt: skip
    del spec[data.draw(st.sampled_from(["image", "server"]))]
    key = data.draw(st.sampled_from(sorted(spec)))
    if isinstance(spec[key], dict) and data.draw(st.booleans()):
        spec[key][data.draw(st.sampled_from([*sorted(spec[key]), "new"]))] = value
    else:
        spec[key] = value
    usable(codec.encode(spec).decode())
