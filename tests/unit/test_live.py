"""What the coordinator shows as now."""

from coordinator.live import Live
from skerry.wire.messages import Sample


def sample(epoch: str, seq: int, at_ms: int) -> Sample:
    return Sample(epoch, seq, at_ms, 0.5, 1)


def test_the_newest_reading_is_the_one_of_the_highest_number_however_the_clock_of_the_box_jumps():
    live = Live()
    for one in (sample("a", 1, 1_000), sample("a", 2, 9_000_000), sample("a", 4, 3_000), sample("a", 3, 2_000)):
        live.take("box", one, [])
    assert live.samples["box"].seq == 4
    live.take("box", sample("b", 1, 4_000), [])
    assert live.samples["box"].epoch == "b"
