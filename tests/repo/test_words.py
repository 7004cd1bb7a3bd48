"""No text of the console is missing in a catalogue, and what programs read is made of the catalogues."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORDS = [sys.executable, ROOT / ".ci" / "words", "--check"]


def test_every_text_is_in_every_language():
    done = subprocess.run(WORDS, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"make words, and translate what is new:\n{done.stdout}{done.stderr}"


def test_a_text_that_is_new_is_found(tmp_path):
    """The check itself can fail."""
    copied = tmp_path / "copy"
    for part in (".ci/words", *(str(path.relative_to(ROOT)) for path in (ROOT / "coordinator/console").rglob("*") if path.is_file())):
        target = copied / part
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / part).read_bytes())
    check = [sys.executable, copied / ".ci" / "words", "--check"]
    assert subprocess.run(check, capture_output=True, timeout=120, check=False).returncode == 0
    page = copied / "coordinator/console/templates/start.html"
    page.write_text(page.read_text() + '{{ _("Never said before") }}')
    script = copied / "coordinator/console/static/start.js"
    script.write_text(script.read_text() + '\nsay(t("Nor this"));\n')
    done = subprocess.run(check, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "Never said before" in done.stdout
    assert "Nor this" in done.stdout
