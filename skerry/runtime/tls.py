"""TLS as the fleet's programs speak it to each other, on machines whose clocks may be wrong."""

import ssl
import time
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509

NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which Python has no name for."""


def client(ca_file: str, cert_file: str = "", key_file: str = "", *, own: str = "") -> ssl.SSLContext:
    """A context that trusts ``ca_file`` alone, or the system's roots where it is empty, and shows ``cert_file``. ``own`` is this program's
    certificate where it is not shown.

    A box may have woken in 1970, or think that it is two years later than it is. While its clock says that its own certificate, which the
    coordinator dated, has not begun or has ended, that clock proves nothing, and the other side's is not judged by it: who signed it and
    whose it is are. Raises OSError and ValueError.
    """
    context = ssl.create_default_context(cafile=ca_file or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if cert_file:
        context.load_cert_chain(cert_file, key_file or None)
    own = own or cert_file
    if own and not holds(Path(own).read_bytes(), time.time()):
        forget_time(context)
    return context


def server(certificate_file: Path, key_file: Path, *, client_ca_file: Path | None = None) -> ssl.SSLContext:
    """A context that shows ``certificate_file``; with ``client_ca_file`` whoever comes must show a certificate that one of these signed.

    Raises OSError (ssl.SSLError is one).
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate_file, key_file, password="")  # without one OpenSSL would ask the terminal
    if client_ca_file is not None:
        context.load_verify_locations(client_ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def marks(paths: Iterable[Path]) -> list[tuple[int, int, int]]:
    """Something else whenever one of the files is another, was written, or is gone or back."""
    found = []
    for path in paths:
        try:
            status = path.stat()
        except OSError as exc:
            found.append((exc.errno or 0, 0, 0))
        else:
            found.append((status.st_mtime_ns, status.st_ino, status.st_size))
    return found


def forget_time(context: ssl.SSLContext) -> None:
    """Have a context not look at the first and last moments of the other side's certificates."""
    context.verify_flags = ssl.VerifyFlags(int(context.verify_flags) | NO_CHECK_TIME)


def holds(pem: bytes, now_s: float) -> bool:
    """Whether a certificate has begun and not ended by a clock that says ``now_s``. Raises ValueError."""
    certificate = x509.load_pem_x509_certificate(pem)
    return certificate.not_valid_before_utc.timestamp() <= now_s <= certificate.not_valid_after_utc.timestamp()
