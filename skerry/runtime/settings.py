"""A program's settings: one TOML file, read once into a frozen Struct. Unknown keys are errors that name the key."""

import ipaddress
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

T = TypeVar("T")

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class SettingsError(Exception):
    """A settings file that can't be used; the text names the file and the key."""


class Broker(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the MQTT broker listens. With ``ca_file`` the connection is TLS, with ``cert_file`` and ``key_file`` mutual TLS."""

    host: str
    port: Port = 8883
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    keepalive_s: Annotated[int, msgspec.Meta(ge=2, le=3600)] = 10
    others: list[str] = []
    """Further addresses of it, host:port, that are tried where the first does not answer."""


def load(path: Path, kind: type[T]) -> T:
    """The settings in ``path``; raises SettingsError."""
    try:
        return msgspec.toml.decode(path.read_bytes(), type=kind, dec_hook=_path)
    except OSError as exc:
        raise SettingsError(f"{path}: {exc.strerror}") from exc
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as exc:
        raise SettingsError(f"{path}: {exc}") from exc


def _path(kind: type, value: object) -> object:
    """What msgspec does not know itself: paths, written as text."""
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"{kind.__name__} can't stand in a settings file")


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches ``host``. A name is taken for an address of others', but for ``localhost``."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def split_listen(listen: str) -> tuple[str, int]:
    """Host and port of ``host:port``; raises SettingsError."""
    host, separator, port = listen.rpartition(":")
    if not separator or not port.isdigit() or not 0 < int(port) < 65536:
        raise SettingsError(f"listen: {listen!r} is not host:port")
    return host.strip("[]"), int(port)
