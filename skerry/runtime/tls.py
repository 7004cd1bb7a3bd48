"""TLS as the fleet's programs speak it to each other, on machines whose clocks may be wrong."""

import ssl
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cryptography import x509

NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which Python has no name for."""


class Judge:
    """Whether other sides' certificates are over by the time that was proved to this box, whatever its clock says.

    While that time is past the end of this side's own certificate, in ``own_file``, which the coordinator dated, it says nothing of others:
    a coordinator whose clock was ahead for a day must not have cut its fleet off.
    """

    def __init__(self, now_at_least_ms: Callable[[], int], own_file: Path | None = None) -> None:
        self._now_at_least_ms = now_at_least_ms
        self._own_file = own_file

    def is_over(self, others_end_ms: int) -> bool:
        """Whether a certificate that ends then, Unix milliseconds, has ended."""
        now_ms = self._now_at_least_ms()
        return others_end_ms < now_ms and not self._own_is_over(now_ms)

    def _own_is_over(self, now_ms: int) -> bool:
        if self._own_file is None:
            return False
        try:
            return ends_ms(x509.load_pem_x509_certificate(self._own_file.read_bytes())) < now_ms
        except (OSError, ValueError):
            return False

    def rule(self, context: ssl.SSLContext) -> None:
        """Have every handshake of ``context`` judged here, and not by the machine's clock.

        That a certificate begins later than now is never known: only what has passed is.
        """
        forget_time(context)
        context.sslobject_class = type("JudgedObject", (_Judged, ssl.SSLObject), {"judge": self})
        context.sslsocket_class = type("JudgedSocket", (_Judged, ssl.SSLSocket), {"judge": self})


class _Judged:
    """A TLS connection that ends in its handshake where the other side's certificate is over."""

    judge: Judge

    def do_handshake(self, *args: Any) -> None:
        """See ssl.SSLObject."""
        super().do_handshake(*args)  # type: ignore[misc]
        shown: bytes | None = self.getpeercert(binary_form=True)  # type: ignore[attr-defined]
        if shown and self.judge.is_over(ends_ms(x509.load_der_x509_certificate(shown))):
            raise ssl.SSLCertVerificationError(
                "certificate verify failed: the other side's certificate has ended, by the time that was proved"
            )


def client(ca_file: str, cert_file: str = "", key_file: str = "", *, judge: Judge | None = None) -> ssl.SSLContext:
    """A context that trusts ``ca_file`` alone, or the system's roots where it is empty, and shows ``cert_file``.

    Whether the other side's certificate is over says ``judge``, else the clock of this machine; while that says that ``cert_file`` has not
    begun or has ended, it proves nothing, and is not asked. Raises OSError and ValueError.
    """
    context = ssl.create_default_context(cafile=ca_file or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if cert_file:
        context.load_cert_chain(cert_file, key_file or None)
    if judge is not None:
        judge.rule(context)
    elif cert_file and not holds(Path(cert_file).read_bytes(), time.time()):
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


def ends_ms(certificate: x509.Certificate) -> int:
    """The last moment of a certificate, Unix milliseconds."""
    return int(certificate.not_valid_after_utc.timestamp() * 1000)
