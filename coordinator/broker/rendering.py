"""``skerry-coordinator broker-config``: everything that a mosquitto for this fleet needs, in one folder.

Its settings and access list come from the same two templates as those of Ansible's role ``broker``; certificate, key, authority and the
list of revoked certificates from this coordinator's own authority, as a coordinator that has run leaves them.
"""

import argparse
import shutil
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from coordinator.config import Config
from skerry.runtime import durable, lifecycle, settings

EXIT_FAILED = 1
COORDINATOR_NAME = "_coordinator"
MAX_QUEUED_MESSAGES = 50_000
MEMORY_LIMIT_BYTES = 2**30
FILES = {"trusted.crt": "ca.crt", "broker.crt": "server.crt", "broker.key": "server.key"}
"""Of the authority's folder, and how the settings call them."""


class NotRendered(Exception):
    """Something is missing; the text says what."""


def variables(config: Config, folder: Path) -> dict[str, Any]:
    """What the templates ask for; the role has the same names in its defaults."""
    return {
        "ansible_managed": "written by skerry-coordinator broker-config",
        "broker_fleet": config.fleet,
        "broker_port": config.broker.port,
        "broker_config_dir": str(folder),
        "broker_data_dir": str(folder / "data"),
        "broker_coordinator_name": COORDINATOR_NAME,
        "broker_max_queued_messages": MAX_QUEUED_MESSAGES,
        "broker_memory_limit_bytes": MEMORY_LIMIT_BYTES,
    }


def render(name: str, values: dict[str, Any]) -> str:
    """A template of this package, as Ansible renders it: a line that holds a statement alone leaves none behind."""
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined, autoescape=False)  # noqa: S701 - no HTML
    return environment.from_string(resources.files("coordinator.broker").joinpath(name).read_text()).render(values)


def write(config: Config, folder: Path) -> Path:
    """Fill the folder; returns the settings' path. Raises NotRendered."""
    authority = config.state_dir / "ca"
    folder = folder.resolve()
    values = variables(config, folder)
    missing = [name for name in FILES if not (authority / name).exists()]
    if missing:
        raise NotRendered(f"state_dir: {authority / missing[0]} is not there yet: start the coordinator once")
    try:
        (folder / "skerry").mkdir(parents=True, exist_ok=True)
        (folder / "data").mkdir(exist_ok=True)
        for name, called in FILES.items():
            durable.write(folder / "skerry" / called, (authority / name).read_bytes(), mode=0o600 if name.endswith(".key") else 0o644)
        revoked, target = config.revoked_list_file or authority / "revoked.pem", folder / "skerry" / "crl.pem"
        if revoked.resolve() != target:
            shutil.copyfile(revoked, target)
        durable.write(folder / "skerry" / "acl", render("acl.j2", values).encode(), mode=0o644)
        durable.write(folder / "mosquitto.conf", render("mosquitto.conf.j2", values).encode(), mode=0o644)
    except OSError as exc:
        raise NotRendered(f"{exc.filename or folder}: {exc.strerror}") from exc
    return folder / "mosquitto.conf"


def run(arguments: list[str]) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="skerry-coordinator broker-config", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=Path, default=Path("/etc/skerry/coordinator.toml"), help="the settings (default: %(default)s)")
    parser.add_argument("--dir", type=Path, required=True, help="the folder to write; what is there of an earlier run is replaced")
    parsed = parser.parse_args(arguments)
    try:
        config = settings.load(parsed.config, Config)
        path = write(config, parsed.dir)
    except settings.SettingsError as exc:
        sys.stderr.write(f"skerry-coordinator: {exc}\n")
        return lifecycle.EXIT_CONFIG
    except NotRendered as exc:
        sys.stderr.write(f"skerry-coordinator: {exc}\n")
        return EXIT_FAILED
    sys.stdout.write(f"{path}\n")
    listed = path.parent / "skerry" / "crl.pem"
    if config.revoked_list_file != listed:
        sys.stderr.write(
            f'Revoked boxes are cut off once mosquitto reads the list again: set revoked_list_file = "{listed}", and reload it\n'
        )
    return 0
