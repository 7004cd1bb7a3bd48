"""Whether a desired document may be acted on: signed, for this box, and no older than what is already held; and what of it may run."""

from collections.abc import Sequence

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from edge_agent.warden.trust import Trust
from skerry.wire import codec, model_signature, signing, topics
from skerry.wire.messages import Desired


class Refused(Exception):
    """A document that changes nothing; the text says why and is reported."""


def judge(
    envelope: bytes, *, trust: Trust, fleet: str, node: str, held: Desired | None, now_at_least_ms: int = 0, is_own: bool = False
) -> tuple[Desired, Trust]:
    """The document in ``envelope``, and whom to trust from then on. Raises Refused.

    The document already held is accepted again: it is how a coordinator that restarts greets its boxes. ``is_own`` says that it comes from
    this box's own disk, where it was accepted once: its time is not judged again.
    """
    try:
        outer = codec.decode(envelope, signing.Envelope)
        keys = signing.followed(trust.keys, outer.grants, fleet=fleet, retired=trust.retired)
        desired = signing.verify(envelope, Desired, keys, context=signing.DESIRED_CONTEXT)
    except (signing.BadSignature, codec.Malformed) as exc:
        raise Refused(str(exc)) from exc
    if (desired.fleet, desired.node) != (fleet, node):
        raise Refused(f"node: the document is for {desired.fleet}/{desired.node}, this box is {fleet}/{node}")
    if outer.key_id in desired.retired_keys:
        raise Refused(f"retired_keys: {outer.key_id} can't retire itself")
    if held is not None and desired.generation < held.generation:
        raise Refused(f"generation: {desired.generation} is older than {held.generation}, which this box holds")
    if held is not None and desired.generation == held.generation and desired != held:
        raise Refused(f"generation: another document of generation {desired.generation} is held already")
    if desired != held and not is_own:
        _check_time(desired, trust.since_ms, now_at_least_ms)
    _check_replicas(desired)
    return desired, trust.following(keys, desired.retired_keys)


def _check_time(desired: Desired, since_ms: int, now_at_least_ms: int) -> None:
    if desired.issued_at_ms < since_ms:
        raise Refused(f"issued_at_ms: {desired.issued_at_ms} is before {since_ms}, when this box was enrolled")
    if 0 < desired.expires_at_ms < now_at_least_ms:
        raise Refused(f"expires_at_ms: {desired.expires_at_ms} is over: it is {now_at_least_ms} at the least")


def _check_replicas(desired: Desired) -> None:
    for replica in desired.replicas:
        if not topics.is_name(replica.name):
            raise Refused(f"replicas.name: {replica.name[:80]!r} is not a name")
        if len(replica.model.sha256) != 64 or not set(replica.model.sha256) <= set("0123456789abcdef"):
            raise Refused(f"replicas.model.sha256: {replica.model.sha256[:80]!r} is not a SHA-256 digest")
    names = [replica.name for replica in desired.replicas]
    if len(set(names)) != len(names):
        raise Refused("replicas.name: a name is given twice")


def unvouched(desired: Desired | None, keys: Sequence[EllipticCurvePublicKey] | None) -> dict[str, str]:
    """By replica, why its model may not run here: none of ``keys`` vouches for it. Empty where no keys are named."""
    if desired is None or keys is None:
        return {}
    reasons = {}
    for replica in desired.replicas:
        model = replica.model
        signature = desired.signatures.get(model_signature.key_of(model.name, model.version))
        try:
            model_signature.verify(signature, keys, name=model.name, version=model.version, sha256=model.sha256)
        except model_signature.NotVouched as exc:
            reasons[replica.name] = f"model {model.name}:{model.version}: {exc}"
    return reasons
