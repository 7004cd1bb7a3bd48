"""Whether somebody who is trusted for models vouches for one, as the keys of ``model_keys_file`` say it."""

from collections.abc import Sequence

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from coordinator.registry.models import Model
from skerry.wire import model_signature
from skerry.wire.api import SignatureState
from skerry.wire.bundle import Bundle
from skerry.wire.model_signature import NotVouched


class Vouching:
    """The keys; None where this coordinator leaves it to the boxes."""

    def __init__(self, keys: Sequence[EllipticCurvePublicKey] | None) -> None:
        self._keys = keys

    def check(self, model: Model, signature: Bundle | None) -> None:
        """Raises NotVouched where keys are named and none of them signed, and for a signature that is another model's."""
        name, version, sha256 = model.ref.name, model.ref.version, model.ref.sha256
        if self._keys is not None:
            model_signature.verify(signature, self._keys, name=name, version=version, sha256=sha256)
        elif signature is not None:
            model_signature.check_names(signature, name=name, version=version, sha256=sha256)

    def state(self, model: Model) -> SignatureState:
        """What is shown."""
        if model.signature is None:
            return "none"
        if self._keys is None:
            return "unchecked"
        try:
            self.check(model, model.signature)
        except NotVouched:
            return "not_trusted"
        return "verified"
