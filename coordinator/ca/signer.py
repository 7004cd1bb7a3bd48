"""The Ed25519 key that signs desired state: made once, kept in a file that only the coordinator's user can read."""

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from skerry.runtime import durable
from skerry.wire import signing
from skerry.wire.messages import Desired


class KeyUnusable(Exception):
    """The key file can't be used; the text says why."""


class Signer:
    """Signs desired documents. ``state_dir/signing.pem`` is the key, ``state_dir/signing.pub`` what boxes are given to trust."""

    def __init__(self, state_dir: Path) -> None:
        path = state_dir / "signing.pem"
        if not path.exists():
            key = Ed25519PrivateKey.generate()
            durable.write(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)
        if path.stat().st_mode & 0o077:
            raise KeyUnusable(f"{path}: others may read the signing key: chmod 600 {path}")
        loaded = load_pem_private_key(path.read_bytes(), password=None)
        if not isinstance(loaded, Ed25519PrivateKey):
            raise KeyUnusable(f"{path}: holds no Ed25519 key")
        self._key = loaded
        public = signing.public_key_line(loaded.public_key())
        durable.write(state_dir / "signing.pub", f"{public}\n".encode(), mode=0o644)

    def sign(self, desired: Desired) -> bytes:
        """The envelope that a box's warden verifies."""
        return signing.sign(desired, self._key, context=signing.DESIRED_CONTEXT)
