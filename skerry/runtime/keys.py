"""Keys of the curve P-256 as the fleet's programs hold them: made once, kept in a PEM file, shown to nobody."""

import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from skerry.runtime.settings import SettingsError
from skerry.wire import model_signature


def made() -> ec.EllipticCurvePrivateKey:
    """A new one."""
    return ec.generate_private_key(ec.SECP256R1())


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """What stands in its file (PKCS #8, not encrypted)."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def trusted(path: Path | None, setting: str = "model_keys_file") -> list[ec.EllipticCurvePublicKey] | None:
    """The public keys in the file that a setting names; None where it names none. Raises SettingsError."""
    if path is None:
        return None
    try:
        return model_signature.parse_keys(path.read_bytes())
    except OSError as exc:
        raise SettingsError(f"{setting}: {path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise SettingsError(f"{setting}: {path}: {exc}") from exc


def load(path: Path) -> ec.EllipticCurvePrivateKey:
    """The key in a file. Raises OSError, ValueError and TypeError."""
    key = load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path}: not a key of the curve P-256")
    return key


def load_own(path: Path) -> ec.EllipticCurvePrivateKey:
    """The same for a file that this program made: one that others may read is refused. Raises as ``load`` does."""
    status = path.stat()
    if status.st_mode & 0o077 and status.st_uid == os.geteuid():
        raise ValueError(f"{path}: others may read this key: chmod 600 {path}")
    return load(path)


def signing_request(key: ec.EllipticCurvePrivateKey, name: str) -> str:
    """PKCS #10, PEM: proof that whoever asks has the key."""
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(Encoding.PEM).decode()
