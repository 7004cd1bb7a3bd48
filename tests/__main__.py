"""Every test, by two pytests at a time: ``python -m tests [what pytest takes]``.

Some tests of real parts do little but wait for them: for a certificate to end, a link to be missed, a wave to be watched. These are run
beside the others; their output comes when both are over.
"""

import contextlib
import subprocess
import sys
import tempfile

WAITING = (
    "tests/e2e/test_rollouts.py",
    "tests/e2e/test_trouble.py",
    "tests/integration/test_backlog.py",
    "tests/integration/test_enrolment.py",
    "tests/integration/test_fleet_tls.py",
    "tests/integration/test_logs.py",
    "tests/integration/test_releases.py",
    "tests/integration/test_updater.py",
)
NOTHING_CHOSEN = 5
"""pytest's exit status where no test was chosen: with ``-k``, it may be so on one side."""


def main() -> int:
    """The worse of both exit statuses."""
    pytest = [sys.executable, "-m", "pytest", *sys.argv[1:]]
    with tempfile.TemporaryFile() as said:
        waiting = subprocess.Popen([*pytest, *WAITING], stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            here = subprocess.run([*pytest, *(f"--ignore={path}" for path in WAITING)], check=False).returncode
            there = waiting.wait()
        except KeyboardInterrupt:
            with contextlib.suppress(KeyboardInterrupt):
                waiting.wait()  # it was interrupted too
            return 130
        finally:
            waiting.kill()
        said.seek(0)
        sys.stdout.write(said.read().decode(errors="replace"))
    statuses = {here, there} - {0, NOTHING_CHOSEN}
    return max(statuses) if statuses else min(here, there)


if __name__ == "__main__":
    sys.exit(main())
