"""A link that makes an administrator, for whoever owns the coordinator's machine: the first one, or one who lost the password.

``skerry-coordinator admin-link`` prints it and leaves its digest in the state directory, whether the coordinator runs or not.
"""

import argparse
import os
import secrets
import sys
from pathlib import Path

import msgspec

from coordinator.accounts.directory import now_ms
from coordinator.config import Config
from coordinator.registry.identity import digest_of
from skerry.runtime import durable, lifecycle, settings
from skerry.wire import codec

FILE = "admin-link.json"
LIFE_S = 3600


class AdminLink(msgspec.Struct, frozen=True):
    """What is kept of it."""

    secret_sha256: str
    expires_at_ms: int


def make(config: Config) -> str:
    """The link; an earlier one is good for nothing any more. Raises SettingsError."""
    code, path = secrets.token_urlsafe(32), config.state_dir / FILE
    link = AdminLink(digest_of(code), now_ms() + LIFE_S * 1000)
    try:
        owner = config.state_dir.stat()
        if os.geteuid() == 0:  # the coordinator reads it, and in its directory root should do nothing as root
            os.setegid(owner.st_gid)
            os.seteuid(owner.st_uid)
        durable.write(path, codec.encode(link), mode=0o600)
    except OSError as exc:
        raise settings.SettingsError(f"state_dir: {path}: {exc.strerror or exc}") from exc
    return f"{config.public_url.rstrip('/')}/welcome?code={code}"


def is_good(state_dir: Path, code: str) -> bool:
    """Whether that link's code would make an administrator now."""
    try:
        link = codec.decode((state_dir / FILE).read_bytes(), AdminLink)
    except (OSError, codec.Malformed):
        return False
    return secrets.compare_digest(link.secret_sha256, digest_of(code)) and link.expires_at_ms > now_ms()


def spend(state_dir: Path, code: str) -> bool:
    """Use it up; says whether it was good."""
    was_good = is_good(state_dir, code)
    if was_good:
        (state_dir / FILE).unlink(missing_ok=True)
    return was_good


def run(arguments: list[str]) -> int:
    """``skerry-coordinator admin-link``; the exit status."""
    parser = argparse.ArgumentParser(prog="skerry-coordinator admin-link", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("/etc/skerry/coordinator.toml"), help="the settings (default: %(default)s)")
    try:
        config = settings.load(parser.parse_args(arguments).config, Config)
        link = make(config)
    except settings.SettingsError as exc:
        sys.stderr.write(f"skerry-coordinator: {exc}\n")
        return lifecycle.EXIT_CONFIG
    sys.stdout.write(f"{link}\n")
    sys.stderr.write(f"It makes an administrator of whoever opens it first, within {LIFE_S // 60} minutes.\n")
    return 0
