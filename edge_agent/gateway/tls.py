"""The files of ``[tls]``: who this gateway is to callers from outside the box, and whom it answers. They may be replaced while it runs."""

import ssl
from pathlib import Path

import msgspec

from edge_agent.gateway.config import Tls
from skerry.runtime import log, settings, tls

logger = log.get("gateway.tls")


class Pem(msgspec.Struct, frozen=True):
    """What the files held."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None


class Certificates:
    """The files as they were last read, all of one moment and fitting each other. Raises SettingsError where they never did.

    ``judge`` says which callers' certificates are over.
    """

    def __init__(self, files: Tls, judge: tls.Judge) -> None:
        self._tls = files
        self._judge = judge
        self._tried: object = None
        self.context, self.pem = self._read()

    def look(self) -> bool:
        """Read them again if one was replaced; says whether there is something new. What does not fit changes nothing, and is said once."""
        if tls.marks(self._paths()) == self._tried:
            return False
        try:
            self.context, self.pem = self._read()
        except settings.SettingsError as exc:
            logger.error("tls.not_renewed", reason=str(exc))
            return False
        logger.info("tls.renewed", certificate_file=str(self._tls.certificate_file))
        return True

    def _paths(self) -> list[Path]:
        return [path for path in (self._tls.certificate_file, self._tls.key_file, self._tls.client_ca_file) if path is not None]

    def _read(self) -> tuple[ssl.SSLContext, Pem]:
        self._tried = tls.marks(self._paths())
        try:
            context = tls.server(self._tls.certificate_file, self._tls.key_file, client_ca_file=self._tls.client_ca_file)
            self._judge.rule(context)
            certificate, key, *more = (path.read_bytes() for path in self._paths())
            is_open = bool(self._tls.key_file.stat().st_mode & 0o007)
        except (OSError, ssl.SSLError) as exc:
            raise settings.SettingsError(f"tls: {', '.join(map(str, self._paths()))}: {exc}") from exc
        if tls.marks(self._paths()) != self._tried:
            raise settings.SettingsError("tls: its files were replaced while they were read")
        if is_open:
            logger.warning("tls.key_is_open", key_file=str(self._tls.key_file), reason="others than its owner and group may read it")
        return context, Pem(certificate, key, more[0] if more else None)
