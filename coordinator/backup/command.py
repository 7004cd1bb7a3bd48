"""``skerry-coordinator backup`` and ``restore``, for whoever owns the coordinator's machine."""

import argparse
import getpass
import sys
from pathlib import Path

from coordinator.backup.archive import BackupFailed, make, restore
from coordinator.backup.sealed import LEAST_PASSPHRASE
from coordinator.config import Config
from skerry.runtime import durable, lifecycle, settings
from skerry.wire.units import format_bytes

MOST_PASSPHRASE_BYTES = 4096


def _parser(verb: str) -> argparse.ArgumentParser:
    what = {
        "backup": "Put all that this coordinator is into one encrypted file, while it runs: registry, certificate authority, keys, tokens"
        " and models. Whoever has the file and its passphrase has the fleet.",
        "restore": "Make the state directory of a backup; the one that is there is kept beside it. The coordinator must not run. Boxes that"
        " were told more since then go on as they are until 'skerry recover'.",
    }[verb]
    parser = argparse.ArgumentParser(prog=f"skerry-coordinator {verb}", description=what)
    parser.add_argument("file", type=Path)
    parser.add_argument("--config", type=Path, default=Path("/etc/skerry/coordinator.toml"), help="the settings (default: %(default)s)")
    parser.add_argument("--passphrase-file", type=Path, help="a file that holds the passphrase; asked for otherwise")
    parser.add_argument("--signer-dir", type=Path, help="the state directory of skerry-signer, where that holds the signing key")
    if verb == "backup":
        parser.add_argument("--without-models", action="store_true", help="leave the pushed models out: they must be pushed again then")
    return parser


def _passphrase(path: Path | None, *, is_new: bool) -> bytes:
    """Raises BackupFailed."""
    if path is not None:
        try:
            with path.open("rb") as file:
                found = file.read(MOST_PASSPHRASE_BYTES).strip()
        except OSError as exc:
            raise BackupFailed(f"--passphrase-file: {path}: {exc.strerror}") from exc
    else:
        found = getpass.getpass("passphrase: ").encode()
        if is_new and found != getpass.getpass("again: ").encode():
            raise BackupFailed("the two are not the same")
    if is_new and len(found) < LEAST_PASSPHRASE:
        raise BackupFailed(f"a passphrase has {LEAST_PASSPHRASE} characters at the least")
    return found


def _progress(name: str, size_bytes: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"{name}  {format_bytes(size_bytes)}\n")


def run(verb: str, arguments: list[str]) -> int:
    """The exit status."""
    asked = _parser(verb).parse_args(arguments)
    try:
        config = settings.load(asked.config, Config)
        passphrase = _passphrase(asked.passphrase_file, is_new=verb == "backup")
        where = {"fleet": config.fleet, "state_dir": config.state_dir, "signer_dir": asked.signer_dir, "progress": _progress}
        if verb == "backup":
            manifest = make(asked.file, passphrase, with_models=not asked.without_models, **where)
            sys.stdout.write(f"{asked.file}: fleet {config.fleet}, {format_bytes(asked.file.stat().st_size)}\n")
            if not manifest.with_signer:
                sys.stderr.write("It holds no signing key: that is skerry-signer's, say where with --signer-dir.\n")
            return 0
        if config.state_dir.exists():
            durable.lock(config.state_dir, "skerry-coordinator")
        restore(asked.file, passphrase, **where)
    except settings.SettingsError as exc:
        sys.stderr.write(f"skerry-coordinator: {exc}\n")
        return lifecycle.EXIT_CONFIG
    except (BackupFailed, durable.AlreadyRunning) as exc:
        sys.stderr.write(f"skerry-coordinator {verb}: {exc}\n")
        return 1
    sys.stdout.write(f"{config.state_dir} is that of the backup. Start the coordinator, then look at 'skerry recover --dry-run'.\n")
    sys.stderr.write("Tokens, users and boxes that were ended since the backup was made are good again: end them anew.\n")
    return 0
