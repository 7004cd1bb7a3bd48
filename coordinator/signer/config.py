"""The signer's settings."""

from pathlib import Path
from typing import Annotated

import msgspec

from skerry.wire.topics import Name


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``/etc/skerry/signer.toml``."""

    fleet: Name
    state_dir: Path
    socket: Path
    """Where the coordinator asks; the socket's group is that of the folder that it lies in."""
    most_days: Annotated[float, msgspec.Meta(ge=0.001, le=3650)] = 60.0
    """The longest that a document may be valid; one that never ends is not signed."""
