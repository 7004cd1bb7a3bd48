"""What the coordinator and its signer say to each other, over HTTP on a Unix socket."""

import msgspec


class Keys(msgspec.Struct, frozen=True):
    """``public_key`` signs now, as a line of a warden's file of trusted keys; ``retired`` are ids of keys to be named in documents."""

    public_key: str
    retired: list[str] = []
