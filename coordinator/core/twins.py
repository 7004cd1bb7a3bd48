"""Whether two boxes go by one name, told by the inventories that come. Pure.

A box that was installed anew has a new outbox, and the old one's never comes back. Two boxes take turns.
"""

REMEMBERED = 8


def seen(epochs: tuple[str, ...], epoch: str) -> tuple[tuple[str, ...], bool]:
    """The outboxes heard of under a name, newest last, after ``epoch`` spoke; and whether it is one that had been replaced."""
    if epochs and epochs[-1] == epoch:
        return epochs, False
    return (*(e for e in epochs if e != epoch), epoch)[-REMEMBERED:], epoch in epochs
