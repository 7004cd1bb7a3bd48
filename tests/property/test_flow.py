"""Bands are as high as what flows, lie within their bars and beside each other, and none is lost."""

import re
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from coordinator.console.flow import GAP, LEAST_BAND, picture
from skerry.wire.fleet import WHO, FlowRow

counts = st.sampled_from([0, 0, 1, 7, 1000, 10**9])
rows = st.lists(st.sampled_from(["", "store-1", "store-2", "van", "x" * 60]), unique=True, max_size=5).flatmap(
    lambda names: st.tuples(*(st.builds(FlowRow, st.just(name), counts, counts, counts, counts) for name in names)).map(list)
)
NUMBER = r"-?[0-9.]+"


def ends(path: str) -> tuple[float, float, float]:
    """Where a band begins and ends, and how thick it is."""
    found = re.fullmatch(rf"M{NUMBER} ({NUMBER})C{NUMBER} {NUMBER} {NUMBER} {NUMBER} {NUMBER} ({NUMBER})v({NUMBER})C.*Z", path)
    assert found, path
    return float(found[1]), float(found[2]), float(found[3])


@given(rows)
def test_all_that_flows_is_drawn_to_one_scale_and_nothing_lies_over_another(found):
    drawn = picture(found)
    total = sum(row.total for row in found)
    assert (drawn is None) == (total == 0)
    if drawn is None:
        return
    wanted = {(row.value, who): getattr(row, who) for row in found for who in WHO if getattr(row, who)}
    assert {(band.source, band.who): band.count for band in drawn.bands} == wanted
    scale = max(band.count for band in drawn.bands)
    thickest = next(ends(band.path)[2] for band in drawn.bands if band.count == scale)
    for band in drawn.bands:
        assert ends(band.path)[2] >= max(LEAST_BAND, band.count / scale * thickest) - 0.02
        assert ends(band.path)[2] <= max(LEAST_BAND, band.count / scale * thickest) + 0.02
    for bars in (drawn.sources, drawn.answers):
        assert sum(bar.count for bar in bars) == total
        for above, below in pairwise(bars):
            assert below.y - above.y >= GAP - 0.02
        for bar in bars:
            assert -0.02 <= bar.y <= drawn.height
    for side, bars in ((0, drawn.sources), (1, drawn.answers)):
        for bar in bars:
            mine = sorted(ends(band.path)[side] for band in drawn.bands if (band.source, band.who)[side] == bar.name)
            assert mine[0] >= bar.y - 0.02
            assert mine[-1] <= bar.y + bar.height + 0.02
