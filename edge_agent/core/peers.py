"""Whether another gateway may have a request answered here."""

from collections.abc import Collection

from skerry.wire.identity import Subject
from skerry.wire.messages import Tier


def why_not(caller: Subject, *, own: Subject, own_tier: Tier, revoked: Collection[str]) -> str:
    """Why a caller is turned away; empty where it is not.

    Boxes of one site help each other, and the cloud helps every site; the coordinator may ask any, for an operator who tries a model.
    ``revoked`` are boxes that were thrown out.
    """
    if caller.fleet != own.fleet:
        return f"it is of fleet {caller.fleet}, this is a box of {own.fleet}"
    if caller.role == "coordinator":
        return ""
    if caller.role != "gateway":
        return f"it is a {caller.role}, and gateways alone pass requests on"
    if caller.name in revoked:
        return f"{caller.name} was thrown out of the fleet"
    if own_tier == "edge" and (not own.site or caller.site != own.site):
        return f"it is of site {caller.site or 'none'}, this is a box of {own.site or 'none'}"
    return ""
