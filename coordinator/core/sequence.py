"""Which numbers of a numbered stream have come: each counted once, whatever was repeated, reordered or lost. Pure."""

import msgspec

MOST_GAPS = 1000
"""Gaps remembered by stream; over this the oldest is given up as lost."""


class Numbering(msgspec.Struct, frozen=True):
    """Numbers up to ``high`` have come, but for those in ``gaps`` (first, last) and ``lost`` that never will."""

    high: int = 0
    gaps: tuple[tuple[int, int], ...] = ()
    lost: int = 0

    @property
    def missing(self) -> int:
        """Numbers that may still come."""
        return sum(last - first + 1 for first, last in self.gaps)

    @property
    def settled(self) -> int:
        """The highest number below which nothing is awaited."""
        return self.gaps[0][0] - 1 if self.gaps else self.high


def begun(oldest: int) -> Numbering:
    """The numbering of a stream that is met for the first time: what lies before its oldest number is not known of."""
    return Numbering(high=max(0, oldest - 1))


def take(numbering: Numbering, seq: int) -> tuple[Numbering, bool]:
    """The numbering after ``seq`` came, and whether it came for the first time."""
    if seq > numbering.high:
        gaps = numbering.gaps
        if seq > numbering.high + 1:
            gaps = (*gaps, (numbering.high + 1, seq - 1))
        return _bounded(Numbering(seq, gaps, numbering.lost)), True
    for index, (first, last) in enumerate(numbering.gaps):
        if first <= seq <= last:
            parts = [part for part in ((first, seq - 1), (seq + 1, last)) if part[0] <= part[1]]
            gaps = (*numbering.gaps[:index], *parts, *numbering.gaps[index + 1 :])
            return _bounded(Numbering(numbering.high, gaps, numbering.lost)), True
    return numbering, False


def take_range(numbering: Numbering, first: int, last: int) -> tuple[Numbering, bool]:
    """The numbering after all from ``first`` to ``last`` came together, and whether every one of them came for the first time."""
    if first > numbering.high:
        gaps = (*numbering.gaps, (numbering.high + 1, first - 1)) if first > numbering.high + 1 else numbering.gaps
        return _bounded(Numbering(last, gaps, numbering.lost)), True
    fresh = sum(max(0, min(last, end) - max(first, start) + 1) for start, end in numbering.gaps) + max(0, last - numbering.high)
    gaps = tuple(
        part for start, end in numbering.gaps for part in ((start, min(end, first - 1)), (max(start, last + 1), end)) if part[0] <= part[1]
    )
    return _bounded(Numbering(max(numbering.high, last), gaps, numbering.lost)), fresh == last - first + 1


def _bounded(numbering: Numbering) -> Numbering:
    """With at most MOST_GAPS gaps; each step adds one at the most."""
    if len(numbering.gaps) <= MOST_GAPS:
        return numbering
    first, last = numbering.gaps[0]
    return Numbering(numbering.high, numbering.gaps[1:], numbering.lost + last - first + 1)


def give_up(numbering: Numbering, oldest: int) -> Numbering:
    """The numbering once the sender holds nothing below ``oldest``: gaps below it are lost."""
    lost, gaps = numbering.lost, []
    for first, last in numbering.gaps:
        if first < oldest:
            lost += min(last, oldest - 1) - first + 1
        if last >= oldest:
            gaps.append((max(first, oldest), last))
    return Numbering(numbering.high, tuple(gaps), lost)
