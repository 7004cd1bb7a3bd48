"""Whatever bytes come, a decoder takes or refuses them in its own words: no other exception, no hang, no memory that they are not worth."""

import re
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.decoders import DECODERS, ROOT, Decoder

NAMES = [decoder.name for decoder in DECODERS]
MOST_S = 2.0
MOST_TIMES = 64
"""How many times its input a decoder may hold in memory: a JSON document of one-digit numbers becomes objects of 28 bytes each."""


def by_name(name: str) -> Decoder:
    return next(decoder for decoder in DECODERS if decoder.name == name)


def run(decoder: Decoder, data: bytes) -> None:
    """Raises what the decoder should not have raised; fails where it took too long."""
    started = time.process_time()
    try:
        decoder.run(data)
    except decoder.refusals as exc:
        said = str(exc).encode()  # it can be sent
    else:
        said = b"taken"
    assert said, "a refusal says why"
    assert time.process_time() - started < MOST_S


@st.composite
def near(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A seed with pieces cut out, repeated, replaced or moved; or anything."""
    data = bytearray(draw(st.sampled_from(seeds)) if seeds else b"")
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        size = draw(st.sampled_from([0, 1, 2, 4, 8, 64]))
        match draw(st.integers(0, 4)):
            case 0:
                del data[at : at + size]
            case 1:
                data[at : at + size] = draw(st.binary(max_size=8))
            case 2:
                data[at:at] = bytes(data[at : at + size]) * draw(st.sampled_from([1, 2, 200]))
            case 3:
                data[at:at] = draw(
                    st.sampled_from([b"-1", b"9" * 30, b"1e999", b"NaN", b"null", b"\xff\xfe", b"[" * 500, b'{"a":' * 500, b"\0"])
                )
            case 4 if data:
                data[at % len(data)] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)


@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_takes_what_it_should(name):
    for seed in by_name(name).seeds:
        run(by_name(name), seed)


@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_raises_nothing_but_its_own_refusals(name):
    decoder = by_name(name)

    @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(near(decoder.seeds), st.binary(max_size=300)))
    def whatever_comes(data: bytes) -> None:
        run(decoder, data)

    whatever_comes()


def test_an_archive_with_any_one_byte_changed_is_read_or_refused():
    decoder = by_name("model archive")
    (whole,) = decoder.seeds
    for at in range(len(whole)):
        for mask in (0x01, 0x08, 0xFF):
            run(decoder, whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])


LARGE = {
    "zeros": bytes(2**18),
    "brackets": b"[" * 2**17,
    "nested objects": b'{"a":' * 2**16,
    "numbers": b"[" + b"1," * 2**16 + b"1]",
    "a long text": b'"' + b"x" * 2**18 + b'"',
    "escapes": b'"' + b"\\u0000" * 2**15 + b'"',
    "aliases": b"a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n" * 50,
    "dashes": b"- " * 2**16,
    "varints": b"\xff" * 2**17,
    "length fields": b"\x0a\xff\xff\xff\xff\x0f" * 2**15,
    "PEM": b"-----BEGIN PUBLIC KEY-----\n" * 2**13,
}


@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_is_not_blown_up(name, shape):
    decoder, data = by_name(name), LARGE[shape]
    tracemalloc.start()
    try:
        run(decoder, data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MOST_TIMES * len(data) + decoder.most_bytes


def test_every_decoder_of_the_protocol_is_here():
    """Whoever adds one adds it to the table: what reads bytes from outside is known by how it is called."""
    table = (Path(__file__).parent / "decoders.py").read_text()
    parsers = set()
    for path in [*ROOT.glob("skerry/wire/*.py"), ROOT / "coordinator/core/deployment.py", ROOT / "coordinator/core/onnx_file.py"]:
        parsers |= {
            f"{path.stem}.{name}"
            for name in re.findall(r"(?m)^def ((?:parse|read|verify)\w*)\(\w+: (?:bytes|Bytes|Buffer|str)", path.read_text())
        }
    assert len(parsers) > 8
    known = {parser for parser in parsers if parser.rpartition(".")[2] in table}
    assert parsers - known == set()
