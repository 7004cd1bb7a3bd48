"""The fleet's signing keys: the one that signs, how boxes find from older ones to it, and those that are the fleet's no more."""

import os
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from skerry.runtime import durable
from skerry.wire import codec, signing
from skerry.wire.messages import Desired
from skerry.wire.signing import SignedGrant


class KeyUnusable(Exception):
    """A key can't be used, or not so; the text says why."""


class _History(msgspec.Struct, frozen=True):
    """``grants`` lead from the first key to the one that signs; ``retired`` are ids."""

    grants: list[SignedGrant] = []
    retired: list[str] = []


class Keyring:
    """``signing.pem`` is the key, ``signing.pub`` what boxes are given to trust, ``signing.json`` how it came to be the key."""

    def __init__(self, state_dir: Path, fleet: str) -> None:
        self._folder = state_dir
        self._fleet = fleet
        path = state_dir / "signing.pem"
        if not path.exists():
            _write_key(path, Ed25519PrivateKey.generate())
        self._key = _load(path)
        self._history = _read_history(state_dir / "signing.json")
        self._publish()

    def _publish(self) -> None:
        durable.write(self._folder / "signing.pub", f"{self.public_key}\n".encode(), mode=0o644)

    @property
    def public_key(self) -> str:
        """A line of a warden's file of trusted keys."""
        return signing.public_key_line(self._key.public_key())

    @property
    def key_id(self) -> str:
        """The signing key's."""
        return signing.key_id_of(self._key.public_key())

    @property
    def retired(self) -> list[str]:
        """Ids of keys that every document names as the fleet's no more."""
        return self._history.retired

    @property
    def older(self) -> list[str]:
        """Ids of the keys before, the oldest first."""
        return [granted.key_id for granted in self._history.grants]

    def sign(self, desired: Desired) -> bytes:
        """The envelope that a box's warden verifies."""
        return signing.sign(desired, self._key, context=signing.DESIRED_CONTEXT, grants=self._history.grants)

    def rotate(self) -> str:
        """Make the next key, which the present one vouches for and which signs from now on; returns its id. Raises KeyUnusable."""
        if len(self._history.grants) >= signing.MAX_GRANTS:
            raise KeyUnusable(f"{signing.MAX_GRANTS} keys have followed one another: give boxes the present one as their anchor first")
        following = Ed25519PrivateKey.generate()
        grant = signing.grant(self._fleet, following.public_key(), self._key)
        # The grant first: a grant for a key that never came to be opens nothing, a key without one shuts the boxes out.
        self._keep(msgspec.structs.replace(self._history, grants=[*self._history.grants, grant]))
        _write_key(self._folder / "signing.pem", following)
        self._key = following
        self._publish()
        return self.key_id

    def retire(self, key_id: str) -> None:
        """Have every document say that an older key is the fleet's no more. Raises KeyUnusable."""
        if key_id == self.key_id:
            raise KeyUnusable(f"{key_id} signs: rotate first")
        if key_id not in self.older:
            raise KeyUnusable(f"{key_id!r} is not an older key: they are {', '.join(self.older) or 'none'}")
        if key_id not in self.retired:
            self._keep(msgspec.structs.replace(self._history, retired=[*self.retired, key_id]))

    def _keep(self, history: _History) -> None:
        durable.write(self._folder / "signing.json", codec.encode(history), mode=0o600)
        self._history = history


def _write_key(path: Path, key: Ed25519PrivateKey) -> None:
    durable.write(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)


def _load(path: Path) -> Ed25519PrivateKey:
    if path.stat().st_mode & 0o077:
        raise KeyUnusable(f"{path}: others may read the signing key: chmod 600 {path}")
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as exc:
        raise KeyUnusable(f"{path}: {exc}") from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyUnusable(f"{path}: holds no Ed25519 key")
    return key


def _read_history(path: Path) -> _History:
    if not os.path.lexists(path):
        return _History()
    try:
        return codec.decode(path.read_bytes(), _History)
    except (OSError, codec.Malformed) as exc:
        raise KeyUnusable(f"{path}: {exc}") from exc
