"""What we ship is known: locks with hashes, a bill of materials, no secret in the tree, a reason beside every exception from a rule."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCKS = [*sorted((ROOT / "requirements").glob("*.txt")), *sorted((ROOT / "skerry" / "image").glob("*.txt"))]
SECRETS_THAT_ARE_NONE = {
    ("models/speech-detector/model.toml", "Hex High Entropy String"): "digests that pin a package and the model in it",
    ("models/text-recogniser/model.toml", "Hex High Entropy String"): "the same",
    ("skerry/demo/inputs.py", "Hex High Entropy String"): "digests of recordings",
    ("skerry/cli/people.py", "Secret Keyword"): "the words of a prompt",
    ("tests/integration/test_accounts.py", "Secret Keyword"): "a password of people who do not exist",
    ("tests/integration/test_catalogue.py", "Hex High Entropy String"): "a digest",
    ("tests/integration/test_single_sign_on.py", "Secret Keyword"): "the secret of a client that does not exist",
    ("tests/integration/test_gateway_program.py", "Private Key"): "the first line of a key that is none",
}


def tool(name: str) -> str:
    path = shutil.which(name, path=str(Path(sys.executable).parent))
    assert path is not None, f"{name} is not installed"
    return path


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def secrets_in(folder: Path, names: list[str]) -> set[tuple[str, str]]:
    """What the scanner takes for secrets: file and kind."""
    done = subprocess.run(
        [tool("detect-secrets"), "scan", "--all-files", *names], cwd=folder, capture_output=True, text=True, check=True, timeout=110
    )
    return {(name, found["type"]) for name, all_found in json.loads(done.stdout)["results"].items() for found in all_found}


def test_no_secret_lies_in_the_tree():
    locks = {str(path.relative_to(ROOT)) for path in LOCKS}
    names = [name for name in tracked() if name not in locks and "/vendor/" not in name and not name.endswith((".png", ".onnx"))]
    assert len(names) > 300
    assert secrets_in(ROOT, names) == set(SECRETS_THAT_ARE_NONE)


def test_a_secret_would_be_found(tmp_path):
    (tmp_path / "settings.py").write_text('password = "' + "correct-horse-" + 'battery-staple"\n')
    (tmp_path / "id").write_text("-----BEGIN " + "EC PRIVATE KEY-----\nAAAA\n")
    assert secrets_in(tmp_path, ["settings.py", "id"]) == {("settings.py", "Secret Keyword"), ("id", "Private Key")}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_requirement_is_locked_by_version_and_hash_and_no_index_is_named(path):
    text = path.read_text()
    requirements = re.findall(r"(?m)^([A-Za-z0-9._-]+(?:\[[^\]]+\])?)(\S*)", re.sub(r"(?m)^\s*#.*\n", "", text))
    assert requirements
    for (name, pin), block in zip(requirements, re.split(r"(?m)^(?=[A-Za-z0-9])", re.sub(r"(?m)^\s*#.*\n", "", text))[1:], strict=True):
        assert pin.startswith("=="), name
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), name
    assert not re.search(r"--(extra-)?index-url|--find-links|https?://", text)


def test_the_bill_of_materials_names_every_locked_package_with_its_hashes(tmp_path):
    bill = tmp_path / "sbom.json"
    lock = ROOT / "requirements" / "box.txt"
    command = [tool("cyclonedx-py"), "requirements", "--pyproject", ROOT / "pyproject.toml", "--validate", "--of", "JSON", "-o", bill, lock]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    made = json.loads(bill.read_text())
    assert made["metadata"]["component"]["name"] == "skerry"
    listed = {
        component["name"]: {digest["content"] for reference in component["externalReferences"] for digest in reference.get("hashes", [])}
        for component in made["components"]
    }
    locked: dict[str, set[str]] = {}
    for block in re.split(r"(?m)^(?=[A-Za-z0-9])", lock.read_text()):
        if match := re.match(r"([A-Za-z0-9._-]+)==", block):
            locked.setdefault(match[1], set()).update(re.findall(r"--hash=sha256:([0-9a-f]{64})", block))
    assert len(locked) > 30
    assert set(listed) == set(locked)
    assert all(listed[name] <= locked[name] and listed[name] for name in listed)


def test_every_exception_from_a_rule_has_its_reason():
    found = 0
    for name in tracked():
        if name.endswith(".py") and not name.startswith("tests/"):
            for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
                if "# noqa" in line:
                    found += 1
                    assert re.search(r"# noqa: [A-Z]+\d+(, [A-Z]+\d+)* - \S", line), f"{name}:{number}"
    assert found > 30
