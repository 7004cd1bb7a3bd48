"""Every test, by two pytests at a time: ``python -m tests [what pytest takes]``.

Tests of real parts mostly wait for them. What only computes is done meanwhile, and gives way to them: its output comes when both are over.
"""

import contextlib
import subprocess
import sys
import tempfile

COMPUTING = ("tests/unit", "tests/property", "tests/repo", "tests/sim", "tests/fuzz/test_decoders.py")
NOTHING_CHOSEN = 5
"""pytest's exit status where no test was chosen: with ``-k``, it may be so on one side."""


def main() -> int:
    """The worse of both exit statuses."""
    pytest = [sys.executable, "-m", "pytest", *sys.argv[1:]]
    with tempfile.TemporaryFile() as said:
        computing = subprocess.Popen(["nice", "-n", "19", *pytest, *COMPUTING], stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            real = subprocess.run([*pytest, *(f"--ignore={path}" for path in COMPUTING)], check=False).returncode
            computed = computing.wait()
        except KeyboardInterrupt:
            with contextlib.suppress(KeyboardInterrupt):
                computing.wait()  # it was interrupted too
            return 130
        finally:
            computing.kill()
        said.seek(0)
        sys.stdout.write(said.read().decode(errors="replace"))
    statuses = {real, computed} - {0, NOTHING_CHOSEN}
    return max(statuses) if statuses else min(real, computed)


if __name__ == "__main__":
    sys.exit(main())
