"""Sizes and durations carry their unit and refuse what they do not know."""

import pytest

from skerry.wire.units import format_bytes, parse_bytes, parse_duration_ms, parse_duration_us


@pytest.mark.parametrize(("text", "size"), [("512MiB", 512 * 2**20), ("1.5 GB", 1_500_000_000), ("7", 7), (0, 0), ("0.5KiB", 512)])
def test_sizes_parse_to_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1MiB", "1mib", "1e9", "1 MiB extra", -1, True, "\u0661MiB"])
def test_what_is_not_a_size_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="expected a size such as '512MiB'"):
        parse_bytes(text)


@pytest.mark.parametrize(("text", "ms"), [("60s", 60_000), ("250ms", 250), ("2m", 120_000), ("1.5h", 5_400_000), ("1d", 86_400_000)])
def test_durations_parse_to_milliseconds(text, ms):
    assert parse_duration_ms(text) == ms


@pytest.mark.parametrize(("text", "us"), [("2ms", 2000), ("0.25ms", 250), ("0.0001ms", 0), ("1s", 1_000_000), ("0ms", 0)])
def test_durations_parse_to_microseconds(text, us):
    assert parse_duration_us(text) == us


@pytest.mark.parametrize("text", ["", "60", "s", "-1s", "1 week"])
@pytest.mark.parametrize("parse", [parse_duration_ms, parse_duration_us])
def test_a_duration_without_a_known_unit_is_refused(text, parse):
    with pytest.raises(ValueError, match="expected a duration"):
        parse(text)


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (1023, "1023 B"), (2**20, "1 MiB"), (10_857_958, "10.4 MiB"), (5 * 2**40, "5 TiB")])
def test_sizes_print_with_their_unit(size, text):
    assert format_bytes(size) == text
