"""The flow of requests as a picture: from where they came to who answered them. Pure: counts go in, shapes come out.

Bands as in Sankey's diagrams: as high as what flows in them (H. R. Sankey, Minutes of Proceedings of the Institution of Civil Engineers,
vol. 134, 1898).
"""

from collections.abc import Sequence

import msgspec

from skerry.wire.fleet import WHO, FlowRow

WIDTH, BAR, GAP = 900.0, 12.0, 6.0
LEFT, RIGHT = 190.0, 720.0
"""Where the bars of sources end, and those of answers begin."""
HEIGHT_A_ROW, LEAST_HEIGHT = 30.0, 170.0
LEAST_BAND = 1.0
"""So high is the thinnest band: what is rare must be seen."""


class Bar(msgspec.Struct, frozen=True):
    """A source, or who answered: where its bar stands, and how much went through."""

    name: str
    y: float
    height: float
    count: int


class Band(msgspec.Struct, frozen=True):
    """What one source had answered by one; ``path`` is an SVG path of a filled shape."""

    source: str
    who: str
    count: int
    path: str


class Picture(msgspec.Struct, frozen=True):
    """All of it, in units of an SVG view box."""

    width: float
    height: float
    sources: list[Bar]
    answers: list[Bar]
    bands: list[Band]


def picture(rows: Sequence[FlowRow]) -> Picture | None:
    """None where nothing flows."""
    rows = [row for row in rows if row.total]
    total = sum(row.total for row in rows)
    if not total:
        return None
    height = max(LEAST_HEIGHT, HEIGHT_A_ROW * len(rows))
    who = [name for name in WHO if any(getattr(row, name) for row in rows)]
    room = height - GAP * (max(len(rows), len(who)) - 1)
    scale = room / total
    sources = _bars([(row.value, row.total) for row in rows], height, scale)
    answers = _bars([(name, sum(getattr(row, name) for row in rows)) for name in who], height, scale)
    from_y = {bar.name: bar.y for bar in sources}
    to_y = {bar.name: bar.y for bar in answers}
    bands = []
    for row in rows:
        for name in who:
            count = getattr(row, name)
            if not count:
                continue
            thick = count * scale
            bands.append(Band(row.value, name, count, _path(from_y[row.value], to_y[name], max(LEAST_BAND, thick))))
            from_y[row.value] += thick
            to_y[name] += thick
    return Picture(WIDTH, height, sources, answers, bands)


def _bars(counts: Sequence[tuple[str, int]], height: float, scale: float) -> list[Bar]:
    used = sum(count for _name, count in counts) * scale + GAP * (len(counts) - 1)
    y, bars = (height - used) / 2, []
    for name, count in counts:
        bars.append(Bar(name, round(y, 2), round(max(LEAST_BAND, count * scale), 2), count))
        y += count * scale + GAP
    return bars


def _path(left_y: float, right_y: float, thick: float) -> str:
    """From the right edge of a source's bar to the left one of an answer's, and back below."""
    begin, end = LEFT + BAR, RIGHT
    middle = (begin + end) / 2
    there = f"M{begin:.1f} {left_y:.2f}C{middle:.1f} {left_y:.2f} {middle:.1f} {right_y:.2f} {end:.1f} {right_y:.2f}"
    low, high = right_y + thick, left_y + thick
    return f"{there}v{thick:.2f}C{middle:.1f} {low:.2f} {middle:.1f} {high:.2f} {begin:.1f} {high:.2f}Z"
