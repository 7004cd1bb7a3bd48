"""The command line's way to the coordinator and to gateways: plain HTTP requests, answers as Structs, errors that say what to do."""

import http.client
import os
import ssl
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from skerry.runtime import durable
from skerry.wire import codec
from skerry.wire.api import Problem, ProblemBody

T = TypeVar("T")

TIMEOUT_S = 30.0
CHUNK_BYTES = 1 << 20
MAX_ANSWER_BYTES = 256 * 2**20

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_REFUSED = 4
EXIT_NOT_FOUND = 5
EXIT_NOT_LOGGED_IN = 6


class CliError(Exception):
    """Something to tell the person at the terminal; ``exit_code`` is one of the EXIT constants."""

    def __init__(self, message: str, *, exit_code: int = EXIT_FAILED, hint: str = "") -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.hint = hint


class Login(msgspec.Struct, frozen=True):
    """Where the coordinator is and the token for it."""

    url: str
    token: str


def credentials_path() -> Path:
    """Where ``skerry login`` keeps a login."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "skerry" / "login.json"


def save_login(login: Login) -> Path:
    """Keep a login for this user alone; returns the file."""
    path = credentials_path()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    durable.write(path, codec.encode(login), mode=0o600)
    return path


def find_login() -> Login:
    """From SKERRY_URL and SKERRY_TOKEN, else from ``skerry login``. Raises CliError."""
    url, token = os.environ.get("SKERRY_URL", ""), os.environ.get("SKERRY_TOKEN", "")
    if url and token:
        return Login(url, token)
    path = credentials_path()
    try:
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise CliError(f"{path}: others may read the token", exit_code=EXIT_NOT_LOGGED_IN, hint=f"chmod 600 {path}")
        return codec.decode(path.read_bytes(), Login)
    except FileNotFoundError as exc:
        raise CliError(
            "no coordinator is known",
            exit_code=EXIT_NOT_LOGGED_IN,
            hint="set SKERRY_URL and SKERRY_TOKEN, run 'skerry login URL', or source a demo's env file",
        ) from exc
    except (OSError, codec.Malformed) as exc:
        raise CliError(f"{path}: {exc}", exit_code=EXIT_NOT_LOGGED_IN, hint="run 'skerry login URL' again") from exc


class Upload:
    """A file as a request body, telling ``on_progress`` how far it got."""

    def __init__(self, file: BinaryIO, on_progress: Callable[[int], None]) -> None:
        self._file = file
        self._on_progress = on_progress

    def __iter__(self) -> Iterator[bytes]:
        while chunk := self._file.read(CHUNK_BYTES):
            yield chunk
            self._on_progress(len(chunk))


class Answer(msgspec.Struct, frozen=True):
    """A raw HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes


def send(method: str, url: str, *, headers: dict[str, str], body: bytes | Upload | None = None, timeout_s: float = TIMEOUT_S) -> Answer:
    """One request. Raises CliError when nobody answers."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError as exc:
        raise CliError(f"{url!r}: {exc}", exit_code=EXIT_USAGE) from exc
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise CliError(f"{url!r} is not an http:// or https:// address", exit_code=EXIT_USAGE)
    if parts.scheme == "https":
        try:
            context = ssl.create_default_context(cafile=os.environ.get("SKERRY_CA_FILE") or None)
        except OSError as exc:
            raise CliError(f"SKERRY_CA_FILE: {exc}", exit_code=EXIT_USAGE) from exc
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(parts.hostname, port, timeout=timeout_s, context=context)
    else:
        connection = http.client.HTTPConnection(parts.hostname, port, timeout=timeout_s)
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    try:
        connection.request(method, path, body=iter(body) if isinstance(body, Upload) else body, headers=headers)
        response = connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read(MAX_ANSWER_BYTES))
    except (OSError, http.client.HTTPException) as exc:
        raise CliError(
            f"{parts.scheme}://{parts.netloc} does not answer: {exc or type(exc).__name__}",
            exit_code=EXIT_UNREACHABLE,
            hint="is it running, and is the address right?",
        ) from exc
    finally:
        connection.close()


class Coordinator:
    """The API, with a login."""

    def __init__(self, login: Login) -> None:
        self._login = login

    def call(
        self,
        method: str,
        path: str,
        kind: type[T],
        *,
        query: dict[str, str] | None = None,
        body: bytes | Upload | None = None,
        size: int | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> T:
        """One call; ``path`` is made of quoted parts. Raises CliError."""
        url = self._login.url.rstrip("/") + path + (f"?{urlencode(query)}" if query else "")
        headers = {"Authorization": f"Bearer {self._login.token}", "Accept": "application/json"}
        if size is not None:
            headers["Content-Length"] = str(size)
        answer = send(method, url, headers=headers, body=body, timeout_s=timeout_s)
        if answer.status >= 400:
            raise _error_of(answer)
        try:
            return codec.decode(answer.body or b"null", kind, max_bytes=MAX_ANSWER_BYTES)
        except codec.Malformed as exc:
            raise CliError(
                f"{self._login.url} answers what this version does not understand: {exc}", hint="is it a Skerry coordinator?"
            ) from exc


def path_of(*parts: str | int) -> str:
    """``/v1/a/b`` of parts that may hold anything."""
    return "/v1/" + "/".join(quote(str(part), safe="") for part in parts)


def _error_of(answer: Answer) -> CliError:
    try:
        problem = codec.decode(answer.body, ProblemBody).error
    except codec.Malformed:
        problem = Problem("unknown", f"the answer was {answer.status}")
    exit_code = {401: EXIT_NOT_LOGGED_IN, 403: EXIT_NOT_LOGGED_IN, 404: EXIT_NOT_FOUND}.get(
        answer.status, EXIT_REFUSED if answer.status < 500 else EXIT_FAILED
    )
    where = f" (line {problem.line})" if problem.line else ""
    return CliError(problem.message + where, exit_code=exit_code, hint=problem.hint)
