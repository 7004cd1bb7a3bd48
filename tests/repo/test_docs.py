"""The documents: nothing that the code has is missing in the reference, nothing there is gone, and what is named exists."""

import ast
import re
import shlex
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
import pytest
import typer
from typer.testing import CliRunner

from coordinator.api.openapi import EVERY
from coordinator.config import Announce, OpenIdConnect, Webhook
from coordinator.config import Config as CoordinatorConfig
from coordinator.core import deployment
from coordinator.signer.config import Config as SignerConfig
from edge_agent.gateway.config import Config as GatewayConfig
from edge_agent.gateway.config import Peers, Tls
from edge_agent.link.config import Config as AgentConfig
from edge_agent.link.config import Coordinator as AgentsCoordinator
from edge_agent.updater.config import Config as UpdaterConfig
from edge_agent.warden.config import Config as WardenConfig
from skerry.cli import client
from skerry.cli.main import app
from skerry.runtime.settings import Broker
from skerry.wire import oip, topics

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
SETTINGS = {
    "Agent": AgentConfig,
    "Agent's coordinator": AgentsCoordinator,
    "Warden": WardenConfig,
    "Updater": UpdaterConfig,
    "Gateway": GatewayConfig,
    "Gateway's TLS": Tls,
    "Gateway's peers": Peers,
    "Coordinator": CoordinatorConfig,
    "Announce": Announce,
    "OpenID Connect": OpenIdConnect,
    "Webhooks": Webhook,
    "Signer": SignerConfig,
    "Broker": Broker,
}
EVENT_CALLS = {
    "say": 0,
    "_say": 0,
    "say_event": 0,
    "add": 0,
    "add_event": 0,
    "add_routed": 0,
    "add_own_event": 2,
    "_changed": 1,
    "_said": 1,
    "_keep": 1,
    "keep": 1,
}
"""Functions that write an event, and which argument is its kind."""
KIND = re.compile(r"[a-z]+\.[a-z_]+")
PLACEHOLDER = re.compile(r"\*|(?:^|/)[A-Z]{2,}(?:/|\.py|$)")
"""A path that stands for many: ``drivers/NAME.py``, ``tests/*``."""
ADR_PARTS = ["Status", "Context", "Decision", "Consequences"]
NOT_OURS = ("coordinator/console/static/vendor/",)


@cache
def read(path: Path) -> str:
    return path.read_text()


def page(name: str) -> str:
    return read(REFERENCE / name)


def documents() -> list[Path]:
    """Every Markdown file of the repository, without hidden folders and what others wrote."""
    folders = [folder for folder in ROOT.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    found = [*ROOT.glob("*.md"), *(path for folder in folders for path in folder.rglob("*.md"))]
    return sorted(path for path in found if not str(path.relative_to(ROOT)).startswith(NOT_OURS))


def prose(text: str) -> str:
    """Without fenced blocks."""
    return re.sub(r"(?ms)^```.*?^```\n", "", text)


def sections(text: str) -> dict[str, str]:
    """What stands below each heading, down to the next one of any level."""
    parts = re.split(r"(?m)^#+ (.+)\n", prose(text))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text: str) -> list[list[str]]:
    """The cells of every table row, but for the heads and the lines below them."""
    lines = text.splitlines()
    found = [index for index, line in enumerate(lines) if line.startswith("|")]
    heads = {index for index in found if index + 1 < len(lines) and lines[index + 1].startswith("| ---")}
    return [[cell.strip() for cell in lines[i].strip("|").split("|")] for i in found if i not in heads and not lines[i].startswith("| ---")]


def first_cells(text: str) -> list[str]:
    """Names in backquotes in the first column."""
    return [cells[0].strip("`") for cells in rows(text) if cells[0].startswith("`")]


# -- settings


def type_words(kind: Any) -> str:
    """How the page calls a type."""
    bounds = ""
    if get_origin(kind) is types.UnionType:  # what may be left out
        kind = get_args(kind)[0]
    if get_origin(kind) is Annotated:
        kind, meta = get_args(kind)[:2]
        if meta.pattern is not None:
            return "name"
        bounds = f", {meta.ge} or more" if meta.le is None else f", {meta.ge} to {meta.le}"
    if get_origin(kind) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return "table"
    words = {
        str: "text",
        Path: "path",
        bool: "true or false",
        int: "whole number",
        float: "number",
        dict[str, str]: "table of text",
        list[str]: "list of text",
        list[Webhook]: "list of tables",
    }
    return words[kind] + bounds


def default_words(field: Any) -> str:
    default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    if default is None:
        return "none"
    return "required" if default is msgspec.NODEFAULT else f"`{msgspec.json.encode(default, enc_hook=str).decode()}`"


@pytest.mark.parametrize("section", SETTINGS)
def test_every_setting_is_documented_with_its_type_and_default(section):
    told = {cells[0].strip("`"): (cells[1], cells[2]) for cells in rows(sections(page("settings.md"))[section])}
    fields = msgspec.structs.fields(SETTINGS[section])
    assert told == {field.name: (type_words(field.type), default_words(field)) for field in fields}


def test_every_settings_file_and_table_of_settings_has_its_section():
    nested = {
        get_args(field.type)[0] if get_args(field.type) else field.type
        for kind in SETTINGS.values()
        for field in msgspec.structs.fields(kind)
        if type_words(field.type) == "table"
    }
    files = [*ROOT.glob("edge_agent/*/config.py"), *ROOT.glob("coordinator/config.py"), *ROOT.glob("coordinator/*/config.py")]
    defined = {f"{path.relative_to(ROOT).with_suffix('')}".replace("/", ".") for path in files}
    assert nested <= set(SETTINGS.values())
    assert defined == {kind.__module__ for kind in SETTINGS.values()} - {Broker.__module__}


# -- the deployment file


def leaves(kind: type[msgspec.Struct], path: str = "", given: Any = None) -> Iterator[tuple[str, str]]:
    """Every key of a deployment with its default; ``given`` is what the key above stands at when it is left out."""
    for field in msgspec.structs.fields(kind):
        default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        if given is not None:
            default = getattr(given, field.name)
        parts = get_args(field.type) if get_origin(field.type) in (Union, types.UnionType) else (field.type,)
        below = next((part for part in parts if isinstance(part, type) and issubclass(part, msgspec.Struct)), None)
        if below is not None:
            yield from leaves(below, f"{path}{field.name}.", default if isinstance(default, below) else None)
        else:
            words = "required" if default is msgspec.NODEFAULT else "none" if default is None else msgspec.json.encode(default).decode()
            yield f"{path}{field.name}", words


def test_every_key_of_a_deployment_is_documented_with_its_default():
    told = {cells[0].strip("`"): cells[2].strip("`") for cells in rows(sections(page("deployment.md"))["Keys"])}
    assert told == dict(leaves(deployment.Spec))


def test_no_key_of_a_deployment_is_taken_and_passed_over():
    keys = "name: a\nmodel: a:1\nrollout: {}\ndisconnect: {}\nupdate: {}\nbatching: {}\n"
    assert deployment.parse(keys).warnings == []
    assert [cells[0] for cells in rows(page("deployment.md")) if "not acted on yet" in cells[-1]] == []


def test_the_examples_are_what_they_are_called():
    examples = ROOT / "docs" / "examples"
    for path in examples.glob("*.yaml"):
        assert deployment.parse(read(path)).name == path.stem
    request = oip.parse_infer((examples / "silence.json").read_bytes(), None)
    assert [tensor.name for tensor in request.inputs] == ["input", "state", "sr"]


# -- the command line


def commands() -> dict[str, Any]:
    """Every command by its words, as the parser has them."""
    found = {}

    def walk(command: Any, words: str) -> None:
        below = getattr(command, "commands", None)
        if below is None:
            found[words] = command
        for name, part in (below or {}).items():
            walk(part, f"{words} {name}")

    walk(typer.main.get_command(app), "skerry")
    return found


def test_every_command_is_documented_with_its_options():
    told = {title.strip("`"): text for title, text in sections(page("cli.md")).items() if title.startswith("`")}
    known = commands()
    assert set(told) == set(known)
    for words, command in known.items():
        options = {name for p in command.params if p.param_type_name == "option" for name in p.opts} - {"--help"}
        arguments = {p.name.upper() for p in command.params if p.param_type_name == "argument"}
        listed = re.findall(r"(?m)^- `(\S+?)(?: [A-Z]+)?`", told[words])
        assert sorted(listed) == sorted(options | arguments), words


def test_every_exit_code_is_documented():
    codes = {0, *(value for name, value in vars(client).items() if name.startswith("EXIT_"))}
    assert {int(cells[0]) for cells in rows(sections(page("cli.md"))["Exit codes"])} == codes


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md"])
def test_commands_that_a_reader_is_told_to_type_exist(path):
    known = commands()
    blocks = re.findall(r"(?ms)^```\n(.*?)^```", read(ROOT / path))
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    targets = set(re.findall(r"(?m)^([a-z]+):", read(ROOT / "Makefile")))
    assert lines
    for line in lines:
        words = shlex.split(line)
        if words[:1] == ["make"]:
            assert words[1] in targets, line
        if words[:1] == ["skerry"]:
            command = known.get(" ".join(words[:3])) or known.get(" ".join(words[:2]))
            assert command is not None, line
            flags = {flag for param in command.params for flag in param.opts}
            assert {word for word in words if word.startswith("--")} <= flags, line


def test_the_help_that_the_page_is_about_can_be_printed():
    outcome = CliRunner().invoke(app, ["--help"])
    assert outcome.exit_code == 0
    for words in commands():
        assert words.split()[1] in outcome.output


# -- what programs emit


def written_kinds(path: Path) -> Iterator[str]:
    """The kinds of event that a module writes; a kind in a variable is looked up in the function around the call."""
    tree = ast.parse(read(path))
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
        named: dict[str, list[ast.expr]] = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                named.setdefault(node.targets[0].id, []).append(node.value)
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            at = EVENT_CALLS.get(name)
            if at is None or len(call.args) <= at:
                continue
            kind = call.args[at]
            values = named.get(kind.id, []) if isinstance(kind, ast.Name) else [kind]
            for value in (value for value in values if isinstance(value, ast.Constant | ast.IfExp)):
                texts = [part.value for part in ast.walk(value) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
                yield from (text for text in texts if KIND.fullmatch(text))


def test_every_kind_of_event_is_documented():
    modules = [path for folder in ("edge_agent", "coordinator") for path in (ROOT / folder).rglob("*.py")]
    written = {kind for path in modules for kind in written_kinds(path)}
    assert {"node.offline", "replica.ready", "link.up", "driver.none"} <= written, "the search for events finds too little"
    assert sorted(first_cells(page("events.md"))) == sorted(written)


def test_every_topic_is_documented():
    up, down = (sections(page("topics.md"))[title] for title in ("From a box", "To a box"))
    assert first_cells(up) == list(topics.UP_BRANCHES)
    assert first_cells(down) == ["desired", *(f"command/{verb}" for verb in topics.VERBS)]


def test_every_call_of_the_api_is_documented_with_who_may():
    told = [(cells[0], cells[1].strip("`"), cells[2]) for cells in rows(sections(page("api.md"))["API"])]
    assert told == [
        (call.method, call.path, "everybody" if call.is_open else call.role + (", box" if call.boxes else "")) for call in EVERY
    ]


# -- decisions


def test_every_decision_is_listed_numbered_without_gaps_and_has_its_parts():
    paths = sorted((ROOT / "docs" / "adr").glob("*.md"))
    listed = {cells[0]: cells[1] for cells in rows(sections(page("README.md"))["Decisions"])}
    assert list(listed) == [f"[{number:04}](../adr/{path.name})" for number, path in enumerate(paths, 1)]
    for number, path in enumerate(paths, 1):
        titles = re.findall(r"(?m)^(#+) (.+)$", read(path))
        assert titles[0][1].startswith(f"{number:04}: "), path.name
        assert path.name.startswith(f"{number:04}-")
        assert [title for level, title in titles if level == "##"] == ADR_PARTS, path.name


def test_every_page_of_the_reference_is_listed():
    assert sorted(re.findall(r"(?m)^\| \[(\S+)\]\(\1\)", page("README.md"))) == sorted(
        {p.name for p in REFERENCE.glob("*.md")} - {"README.md"}
    )


# -- what is named exists


def promises() -> list[tuple[int, str]]:
    """The numbered promises with their text."""
    parts = re.split(r"(?m)^(\d+)\. ", prose(read(ROOT / "SPECIFICATION.md")))
    return [(int(number), re.split(r"(?m)^(?:#|\|)", text)[0]) for number, text in zip(parts[1::2], parts[2::2], strict=True)]


def names_in(path: Path) -> set[str]:
    return {node.name for node in ast.parse(read(path)).body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_promises_are_numbered_without_gaps():
    numbers = [number for number, _ in promises()]
    assert len(numbers) > 50
    assert numbers == list(range(1, len(numbers) + 1))


def test_every_promise_has_a_test_a_measurement_or_says_that_it_is_pending():
    for number, text in promises():
        enforced = re.findall(r"`tests/\S+::test_\w+`|`python -m bench\.\w+", text)
        pending = re.search(r"\btest\s+pending\b", text)
        assert bool(enforced) != bool(pending), f"{number}: {text}"
        assert not re.search(r"\bpending\b", text.replace("test pending", "")), f"{number}: write 'test pending'"


@pytest.mark.parametrize(
    "name", ["ARCHITECTURE.md", "SPECIFICATION.md", "CONTRIBUTING.md", "README.md", "docs/adr/*.md", "docs/security/promises.md"]
)
def test_every_path_and_test_that_is_named_exists(name):
    top = {path.name for path in ROOT.iterdir()}
    found = 0
    for document in ROOT.glob(name):
        text = prose(read(document))
        for span in re.findall(r"`([^`\s]+)`", text):
            path, _, test = span.partition("::")
            is_ours = path.split("/")[0] in top or path.endswith((".py", ".md"))
            if "/" not in path or not is_ours or PLACEHOLDER.search(path):
                continue
            found += 1
            assert (ROOT / path).exists(), f"{document.name}: {span}"
            assert not test or test in names_in(ROOT / path), f"{document.name}: {span}"
        for module in re.findall(r"python -m ((?:bench|edge_agent|skerry|coordinator)(?:\.\w+)+)", text):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists(), f"{document.name}: {module}"
    assert found


def anchors(path: Path) -> set[str]:
    """What a heading is called in a link."""
    titles = re.findall(r"(?m)^#+ (.+)$", prose(read(path)))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(document):
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", prose(read(document))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (document.parent / file).resolve() if file else document
        assert path.exists(), target
        assert path.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(path), target
