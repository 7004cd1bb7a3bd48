"""Sizes and durations as people write them, parsed once into integers whose name carries the unit."""

import re
from decimal import Decimal, InvalidOperation

_SIZE_UNITS = {
    "": 1,
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_DURATION_UNITS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_QUANTITY = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)", re.ASCII)


def _amount_and_unit(text: str) -> tuple[Decimal, str] | None:
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        return None
    try:
        return Decimal(match[1]), match[2]
    except InvalidOperation:
        return None


def parse_bytes(value: str | int) -> int:
    """Bytes of a size such as ``512MiB`` or ``1.5 GB``; a bare number is bytes.

    Units follow IEC 80000-13 (KiB = 1024) and SI (kB = 1000). Raises ValueError.
    """
    if isinstance(value, int):
        if isinstance(value, bool) or value < 0:
            raise ValueError(f"expected a size such as '512MiB', got {value!r}")
        return value
    parsed = _amount_and_unit(value)
    if parsed is None or parsed[1] not in _SIZE_UNITS:
        raise ValueError(f"expected a size such as '512MiB', got {value!r}; units: {', '.join(u for u in _SIZE_UNITS if u)}")
    return int(parsed[0] * _SIZE_UNITS[parsed[1]])


def parse_duration_ms(value: str) -> int:
    """Milliseconds of a duration such as ``60s``, ``250ms`` or ``2m``. Raises ValueError."""
    return int(_duration_ms(value))


def parse_duration_us(value: str) -> int:
    """Microseconds of a duration such as ``2ms`` or ``0.5ms``. Raises ValueError."""
    return int(_duration_ms(value) * 1000)


def _duration_ms(value: str) -> Decimal:
    parsed = _amount_and_unit(value)
    if parsed is None or parsed[1] not in _DURATION_UNITS_MS:
        raise ValueError(f"expected a duration such as '60s', got {value!r}; units: {', '.join(_DURATION_UNITS_MS)}")
    return parsed[0] * _DURATION_UNITS_MS[parsed[1]]


def format_bytes(size_bytes: int) -> str:
    """A short text with three significant digits for people: ``512 MiB``, ``10.9 MiB``, ``0 B``."""
    amount = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 1024:
            return f"{amount:.3g} {unit}" if abs(amount) < 1000 else f"{amount:.0f} {unit}"
        amount /= 1024
    return f"{amount:.3g} TiB" if abs(amount) < 1000 else f"{amount:.0f} TiB"
