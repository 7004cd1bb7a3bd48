"""What is said to those who are not let in, and of changes that are not made."""


class NotLetIn(Exception):
    """A name and a password, or a link, that lets nobody in. The text tells no more than that."""


class TryLater(Exception):
    """Too many tries; ``after_s`` is when another one is heard."""

    def __init__(self, message: str, *, after_s: float) -> None:
        super().__init__(message)
        self.after_s = after_s


class NotDone(Exception):
    """A change that is refused; ``code`` is for programs, ``field`` names what it is about."""

    def __init__(self, code: str, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.field = field


class NotThere(Exception):
    """There is no such user, or no such token of the caller's."""
