"""The fleet's signer: holds the key by which boxes know what they are told to do, and nothing else."""

import argparse
import sys
from pathlib import Path

from coordinator.signer.config import Config
from coordinator.signer.keyring import Keyring, KeyUnusable
from coordinator.signer.service import main
from skerry.runtime import lifecycle, settings

EXIT_FAILED = 1


def run() -> None:
    """The console command ``skerry-signer``."""
    if sys.argv[1:2] and sys.argv[1] in ("keys", "rotate", "retire"):
        sys.exit(_change(sys.argv[1:]))
    lifecycle.run("skerry-signer", Config, main, state_dir=lambda config: config.state_dir)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="skerry-signer", description="Show or change the fleet's signing keys. Then: systemctl reload.")
    parser.add_argument("--config", type=Path, default=Path("/etc/skerry/signer.toml"), help="TOML settings (default: %(default)s)")
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("keys", help="the key that signs, and the older ones")
    what.add_parser("rotate", help="make the next key: the present one vouches for it, and boxes follow by themselves")
    retire = what.add_parser("retire", help="an older key is the fleet's no more; boxes that hear of it obey it no longer")
    retire.add_argument("key_id", help="as 'skerry-signer keys' shows it")
    return parser


def _change(arguments: list[str]) -> int:
    if "--config" in arguments[1:]:  # argparse takes a program's options before the word alone; people write them after it
        at = arguments.index("--config")
        arguments = [*arguments[at : at + 2], *arguments[:at], *arguments[at + 2 :]]
    parsed = _parser().parse_args(arguments)
    try:
        config = settings.load(parsed.config, Config)
        keyring = Keyring(config.state_dir, config.fleet)
        if parsed.what == "rotate":
            keyring.rotate()
        elif parsed.what == "retire":
            keyring.retire(parsed.key_id)
    except settings.SettingsError as exc:
        sys.stderr.write(f"skerry-signer: {exc}\n")
        return lifecycle.EXIT_CONFIG
    except (KeyUnusable, OSError) as exc:
        sys.stderr.write(f"skerry-signer: {exc}\n")
        return EXIT_FAILED
    sys.stdout.write(f"{keyring.key_id} signs  {keyring.public_key}\n")
    for key_id in keyring.older:
        sys.stdout.write(f"{key_id} {'retired' if key_id in keyring.retired else 'older'}\n")
    if parsed.what != "keys":
        sys.stdout.write("a signer that runs takes this up on SIGHUP: systemctl reload skerry-signer\n")
    return 0


if __name__ == "__main__":
    run()
