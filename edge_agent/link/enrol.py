"""``skerry-agent enroll``: a box joins a fleet. It keeps its private key; what it gets is written where its settings say.

The claim is read from a file or standard input, never from the command line, which other users can see. The coordinator is known by the
fingerprint of its root certificate, which came with the claim: whoever answers with another is refused before the claim is sent.
"""

import argparse
import hashlib
import http.client
import os
import ssl
import sys
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from edge_agent.link import identity
from edge_agent.link.config import Config
from edge_agent.link.identity import IdentityFailed
from skerry.runtime import durable, keys, lifecycle, settings, tls
from skerry.wire import codec
from skerry.wire.identity import Enrolled, EnrollRequest, RootView

T = TypeVar("T")

TIMEOUT_S = 15.0
MOST_CLAIM_BYTES = 1024
LOOPBACK = ("127.0.0.1", "::1", "localhost")
EXIT_FAILED = 1


def run(arguments: list[str]) -> int:
    """The command; returns its exit status."""
    parsed = _parser().parse_args(arguments)
    try:
        config = settings.load(parsed.config, Config)
        enrolled = enroll(config, _claim(parsed.claim_file), parsed.fingerprint)
        written = write(config, enrolled, parsed.trusted_keys)
    except settings.SettingsError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return lifecycle.EXIT_CONFIG
    except (IdentityFailed, OSError) as exc:
        sys.stderr.write(f"error: {exc}\n")
        return EXIT_FAILED
    sys.stdout.write(f"{enrolled.node} is a box of fleet {enrolled.fleet}\n" + "".join(f"  wrote {path}\n" for path in written))
    if parsed.trusted_keys is None:
        sys.stdout.write(
            "  the warden's trusted keys (its trusted_keys_file):\n"
            + "".join(f"    {line}\n" for line in enrolled.trusted_lines.splitlines())
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="skerry-agent enroll", description="Join a fleet, with a claim that 'skerry node token' made.")
    parser.add_argument(
        "--config", type=Path, required=True, help="the agent's settings; what is got is written to the files that they name"
    )
    parser.add_argument("--fingerprint", required=True, help="of the fleet's root certificate: its SHA-256, as 'skerry node token' said it")
    parser.add_argument("--claim-file", type=Path, default=Path("-"), help="a file that holds the claim (default: standard input)")
    parser.add_argument("--trusted-keys", type=Path, help="the warden's trusted_keys_file, to be written too; else its lines are printed")
    return parser


def _claim(path: Path) -> str:
    text = sys.stdin.read(MOST_CLAIM_BYTES) if str(path) == "-" else path.read_text()[:MOST_CLAIM_BYTES]
    if not text.strip():
        raise IdentityFailed("claim: there is none in the file, or on standard input")
    return text.strip()


def enroll(config: Config, claim: str, fingerprint: str) -> Enrolled:
    """Ask the coordinator of ``config`` to let this box in. Raises IdentityFailed."""
    broker, coordinator = config.broker, config.coordinator
    for name in ("ca_file", "cert_file", "key_file"):
        if not getattr(broker, name):
            raise IdentityFailed(f"broker.{name}: the settings must name a file, for this is where it is written")
    key_file = Path(broker.key_file)
    if not key_file.exists():
        _keep(key_file, keys.pem(keys.made()), mode=0o600, like=config.state_dir)
    key = identity.load_key(key_file)
    root = _root(coordinator.url, fingerprint)
    request = EnrollRequest(claim, config.node, keys.signing_request(key, config.node), config.tier)
    context = ssl.create_default_context(cadata=root)
    tls.forget_time(context)  # the clock may not be set yet, and the root is known
    enrolled = _ask(coordinator.url, "POST", "/v1/enroll", codec.encode(request), Enrolled, context)
    identity.check(enrolled.certificate, key, config.node)
    if enrolled.root.strip() != root.strip():
        raise IdentityFailed("root: the coordinator enrolled with another root than the one that was checked")
    return enrolled


def write(config: Config, enrolled: Enrolled, trusted_keys: Path | None) -> list[Path]:
    """Keep what was got; says where. The agent's user, who owns its state directory, gets what the agent reads; root the warden's keys."""
    broker, coordinator = config.broker, config.coordinator
    written = [Path(broker.cert_file), Path(broker.ca_file), coordinator.token_file]
    _keep(Path(broker.cert_file), enrolled.certificate.encode(), mode=0o644, like=config.state_dir)
    _keep(Path(broker.ca_file), enrolled.root.encode(), mode=0o644, like=config.state_dir)
    if coordinator.ca_file and coordinator.ca_file != broker.ca_file:
        _keep(Path(coordinator.ca_file), enrolled.root.encode(), mode=0o644, like=config.state_dir)
        written.append(Path(coordinator.ca_file))
    _keep(coordinator.token_file, f"{enrolled.token}\n".encode(), mode=0o600, like=config.state_dir)
    if trusted_keys is not None:
        durable.write(trusted_keys, enrolled.trusted_lines.encode(), mode=0o644)
        written.append(trusted_keys)
    return written


def _keep(path: Path, content: bytes, *, mode: int, like: Path) -> None:
    """The file, and the folders that are made for it, belong to the agent's user: it writes there again when it renews."""
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write(path, content, mode=mode)
    if os.geteuid() == 0 and like.exists():
        owner = like.stat()
        for one in (*made, path):
            os.chown(one, owner.st_uid, owner.st_gid)


def _root(url: str, fingerprint: str) -> str:
    """The root certificate, from whoever answers, if it is the one that is meant."""
    wanted = fingerprint.lower().removeprefix("sha256:").replace(":", "").strip()
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # what comes is checked by its fingerprint, and nothing is told
    view = _ask(url, "GET", "/v1/ca", None, RootView, context)
    try:
        found = hashlib.sha256(x509.load_pem_x509_certificate(view.root.encode()).public_bytes(Encoding.DER)).hexdigest()
    except ValueError as exc:
        raise IdentityFailed(f"{url}: its root certificate can't be read: {exc}") from exc
    if found != wanted:
        raise IdentityFailed(f"{url}: its root certificate has the fingerprint {found}, not {wanted}: nothing was told to it")
    return view.root


def _ask(url: str, method: str, path: str, body: bytes | None, kind: type[T], context: ssl.SSLContext) -> T:
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=TIMEOUT_S, context=context)
    elif parts.scheme == "http" and parts.hostname in LOOPBACK:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_S)
    else:
        raise IdentityFailed(f"coordinator.url: {url!r} is not https://, and a claim is sent over nothing else")
    try:
        connection.request(method, f"{parts.path.rstrip('/')}{path}", body=body, headers={"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read(identity.MOST_ANSWER_BYTES)
    except (OSError, http.client.HTTPException) as exc:
        raise IdentityFailed(f"{url} does not answer: {exc or type(exc).__name__}") from exc
    finally:
        connection.close()
    if response.status not in (200, 201):
        raise IdentityFailed(f"the coordinator says: {identity.problem_of(response.status, answer)}")
    return identity.answer_of(answer, kind)
