"""What images ask of a Docker Engine. An image is known by its id, the digest of its configuration, which pins every layer."""

import contextlib
import io
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from skerry.runtime import unix_socket

if TYPE_CHECKING:  # the SDK is imported on first use: most commands never need it
    from docker import APIClient

Say = Callable[[str], None]
"""Gets a line for each step of work that takes long."""

CALL_TIMEOUT_S = 600
"""The longest silence of the engine in the middle of an answer; a build step says nothing while it works."""
CONNECT_TIMEOUT_S = 2.0
RUN_TIMEOUT_S = 60
MAX_FILE_BYTES = 64 * 1024 * 1024
_CHUNK_BYTES = 1 << 20


class ImageError(Exception):
    """An image can't be built, saved or loaded; the text says why, ``hint`` what to do."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class _Image(msgspec.Struct, frozen=True, rename="pascal"):
    id: str


class _Created(msgspec.Struct, frozen=True, rename="pascal"):
    id: str


class _Ended(msgspec.Struct, frozen=True, rename="pascal"):
    status_code: int


class _Step(msgspec.Struct, frozen=True):
    """A line of the engine's answer to a build, a load or a pull."""

    stream: str = ""
    status: str = ""
    error: str = ""


def _last(lines: Iterable[Any], say: Say | None = None) -> list[str]:
    """Follow an answer to its end and return its lines; raises ImageError with the error that stands in it."""
    seen: list[str] = []
    error = ""
    for line in lines:
        step = msgspec.convert(line, _Step)
        error = error or step.error.strip()
        text = step.stream.strip() or step.status.strip()
        if text:
            seen.append(text)
            if say is not None and text.startswith("Step "):
                say(text[:160])
    if error:  # only now: an answer that is not read to its end holds its connection
        raise ImageError(f"the Docker Engine: {error[:500]}")
    return seen


class Engine:
    """One engine at a Unix socket. Every method raises ImageError."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    def _check_listening(self) -> None:
        if reason := unix_socket.unreachable(self._socket, within_s=CONNECT_TIMEOUT_S):
            hint = "start one, or name its socket with --docker-socket"
            raise ImageError(f"no Docker Engine can be reached at {self._socket}: {reason}", hint=hint)

    @contextlib.contextmanager
    def _client(self) -> Iterator["APIClient"]:
        """The SDK's client; what it raises becomes ImageError."""
        self._check_listening()
        import docker
        import requests

        try:
            with contextlib.closing(docker.APIClient(f"unix://{self._socket}", version="auto", timeout=CALL_TIMEOUT_S)) as client:
                client.trust_env = False  # proxies and .netrc are not for a Unix socket
                yield client
        except docker.errors.APIError as exc:
            raise ImageError(f"the Docker Engine refused: {exc.explanation or exc}") from exc
        except (docker.errors.DockerException, requests.RequestException, msgspec.ValidationError) as exc:
            raise ImageError(f"the Docker Engine at {self._socket} does not answer as it should: {exc}") from exc

    def id_of(self, image: str) -> str:
        """The id of an image by name or id; empty where the engine has no such image."""
        import docker

        with self._client() as client:
            try:
                found = client.inspect_image(image)  # type: ignore[no-untyped-call]  # the stubs lack it
                return msgspec.convert(found, _Image).id
            except docker.errors.ImageNotFound:
                return ""

    def pull(self, image: str) -> str:
        """Fetch an image by name from its registry; returns its id."""
        with self._client() as client:
            _last(client.pull(image, stream=True, decode=True))
        return self.id_of(image)

    def import_base(self, archive: Path, *, repository: str, tag: str, labels: dict[str, str]) -> str:
        """Make an image of one layer from a tar archive of a root folder; returns its id."""
        changes = [f"LABEL {key}={value}" for key, value in sorted(labels.items())]
        with self._client() as client:
            client.import_image_from_file(str(archive), repository=repository, tag=tag, changes=changes)
        return self.id_of(f"{repository}:{tag}")

    def build(self, context: Path, *, arguments: dict[str, str], tag: str, say: Say) -> str:
        """Build the ``Dockerfile`` of a context archive, without a network; returns the image's id."""
        with self._client() as client, context.open("rb") as file:
            answer = client.build(
                fileobj=file, custom_context=True, buildargs=arguments, tag=tag, rm=True, forcerm=True, network_mode="none", decode=True
            )
            _last(answer, say)
        return self.id_of(tag)

    def run(self, image: str, argv: list[str]) -> tuple[int, str]:
        """Run a short program in a container without a network and without privileges: its exit status, and what it wrote."""
        with self._client() as client:
            limits = client.create_host_config(
                network_mode="none", cap_drop=["ALL"], security_opt=["no-new-privileges:true"], read_only=True
            )
            made = client.create_container(
                image, argv[1:], entrypoint=argv[:1], user="65534:65534", host_config=limits, use_config_proxy=False
            )
            container = msgspec.convert(made, _Created).id
            try:
                client.start(container)
                status = msgspec.convert(client.wait(container, timeout=RUN_TIMEOUT_S), _Ended).status_code
                return status, client.logs(container, tail=50).decode(errors="replace")
            finally:
                client.remove_container(container, force=True, v=True)

    def read_file(self, image: str, path: str) -> bytes | None:
        """A regular file of an image, links on the way followed by the engine; None where there is none."""
        import docker

        with self._client() as client:
            container = msgspec.convert(client.create_container(image, ["none"], use_config_proxy=False), _Created).id
            try:
                chunks, _ = client.get_archive(container, path)
                archive = io.BytesIO()
                for chunk in chunks:
                    archive.write(chunk)
                    if archive.tell() > MAX_FILE_BYTES:
                        raise ImageError(f"{path} in {image}: more than {MAX_FILE_BYTES} bytes")
            except docker.errors.NotFound:
                return None
            finally:
                client.remove_container(container, force=True, v=True)
        archive.seek(0)
        with tarfile.open(fileobj=archive) as tar:
            member = tar.next()
            content = tar.extractfile(member) if member is not None and member.isfile() else None
            return content.read() if content is not None else None

    def save(self, image: str, target: Path) -> int:
        """Write an image's archive, whole or not at all; returns its size in bytes."""
        staging = target.with_name(f"{target.name}.part")
        try:
            with self._client() as client, staging.open("wb") as file:
                for chunk in client.get_image(image, chunk_size=_CHUNK_BYTES):
                    file.write(chunk)
                size = file.tell()
            staging.rename(target)
        except OSError as exc:
            raise ImageError(f"{target}: {exc.strerror or exc}") from exc
        finally:
            staging.unlink(missing_ok=True)
        return size

    def load(self, archive: Path) -> list[tuple[str, str]]:
        """Load a saved archive: by each image's name in it, or by its id where it has none, the id on this engine."""
        try:
            with self._client() as client, archive.open("rb") as file:
                lines = _last(client.load_image(file))  # type: ignore[no-untyped-call]  # the stubs lack it
        except OSError as exc:
            raise ImageError(f"{archive}: {exc.strerror or exc}") from exc
        marks = ("Loaded image ID: ", "Loaded image: ")
        names = [line.removeprefix(mark) for line in lines for mark in marks if line.startswith(mark)]
        if not names:
            raise ImageError(f"{archive}: the Docker Engine found no image in it", hint="an archive is made by 'skerry image build --save'")
        return [(name, self.id_of(name)) for name in names]
