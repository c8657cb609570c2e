"""The codec against the specification, byte by byte, and against bytes that lie."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recurd import wire
from recurd.errors import Code, Refused
from recurd.wire import HEADER_BYTES, Dtype, Type

PROTOCOL = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()

U8, U16, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))
FIELDS = st.fixed_dictionaries(
    {
        "type": U8,
        "flags": U8,
        "dtype": U8,
        "code": U16,
        "steps": U32,
        "width": U32,
        "generation": U32,
        "handle": U64,
        "seq": U64,
        "ack": U64,
    }
)
RECORDS = st.lists(st.tuples(FIELDS, st.binary(max_size=40)), min_size=1, max_size=8)


def documented_vectors() -> list[bytes]:
    section = PROTOCOL.partition(". Test vectors\n")[2].partition("\n## ")[0]
    return [bytes.fromhex(block) for block in re.findall(r"```\n(.*?)```", section, re.DOTALL)]


def documented_rows(title: str) -> list[list[str]]:
    """The cells of the first table of a section of the specification."""
    section = PROTOCOL.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert table is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()[2:]]


def refusal(data: bytes) -> Refused:
    with pytest.raises(Refused) as refused:
        wire.decode_multi(*wire.decode(data))
    return refused.value


def record(payload: bytes = b"", type: int = Type.CHUNK, **fields: int) -> wire.Record:
    return wire.pack(type, **({"size": len(payload)} | fields)), payload


def test_the_documents_chunk_is_written_and_read_as_it_stands_there() -> None:
    chunk, _ = documented_vectors()
    data = np.array([1.0, -2.0], "<f4").tobytes()
    header = wire.pack(Type.CHUNK, dtype=Dtype.FLOAT32, size=8, steps=2, width=1, generation=1, handle=7, seq=3, ack=2)

    assert wire.frame((header, data)) == chunk
    read, payload = wire.decode(chunk)
    assert read == wire.Header(b"RC", 1, Type.CHUNK, 0, Dtype.FLOAT32, 0, 8, 2, 1, 1, 7, 3, 2)
    assert np.frombuffer(payload, wire.NUMPY_TYPES[Dtype.FLOAT32]).tolist() == [1.0, -2.0]


def test_the_documents_ping_is_written_and_read_as_it_stands_there() -> None:
    _, ping = documented_vectors()

    assert wire.pack(Type.PING, seq=9) == ping
    assert wire.decode(ping)[0].seq == 9


def test_the_documents_header_table_is_the_header() -> None:
    sizes = {"2 bytes": "2s", "u8": "B", "u16": "H", "u32": "I", "u64": "Q"}
    rows = documented_rows("3. Messages")
    layout = struct.Struct("<" + "".join(sizes[row[2]] for row in rows))

    assert [row[1] for row in rows] == list(wire.Header._fields)
    assert layout.size == HEADER_BYTES
    offset = 0
    for row in rows:
        assert int(row[0]) == offset
        offset += struct.calcsize("<" + sizes[row[2]])


def test_the_documents_error_codes_are_the_codes() -> None:
    documented = {int(row[0]): row[1] for row in documented_rows("5. Errors")}

    assert documented == {int(code): code.word for code in Code}


def test_the_documents_message_types_are_the_types() -> None:
    documented = dict(re.findall(r"^\| ([A-Z_]+) \| ([0-9a-f]{2}) \|", PROTOCOL, re.MULTILINE))

    assert {name: int(code, 16) for name, code in documented.items()} == {t.name: int(t) for t in Type}


@given(FIELDS, st.binary(max_size=100))
@settings(max_examples=200, deadline=None)
def test_every_frame_comes_back_as_it_was(fields: dict[str, int], payload: bytes) -> None:
    header, body = wire.decode(wire.frame((wire.pack(**fields, size=len(payload)), payload)))

    assert bytes(body) == payload
    assert {name: getattr(header, name) for name in fields} == fields


@given(RECORDS, st.integers(0, 400))
@settings(max_examples=200, deadline=None)
def test_joined_records_come_back_in_order_from_frames_within_their_size(
    drawn: list[tuple[dict[str, int], bytes]], max_bytes: int
) -> None:
    records = [record(payload, **fields | {"type": Type.RESULT}) for fields, payload in drawn]

    got = []
    for frame in wire.multi_frames(records, max_bytes):
        header, payload = wire.decode(frame)
        several = wire.decode_multi(header, payload) if header.type == Type.MULTI else [(header, payload)]
        assert len(frame) <= max_bytes or len(several) == 1
        got += [(wire.pack(**_fields(h)), bytes(p)) for h, p in several]
    assert got == records


def _fields(header: wire.Header) -> dict[str, int]:
    return {name: value for name, value in header._asdict().items() if name not in ("magic", "version")}


def test_no_records_make_no_frame() -> None:
    assert list(wire.multi_frames([], 1000)) == []


@pytest.mark.parametrize("size", [0, 1, HEADER_BYTES - 1])
def test_a_truncated_header_is_a_bad_frame_that_says_how_short_it_is(size: int) -> None:
    assert refusal(wire.pack(Type.PING)[:size]).code is Code.BAD_FRAME
    assert str(size) in refusal(wire.pack(Type.PING)[:size]).text


@pytest.mark.parametrize("lie", [-1, 1, 2**31, 2**32 - 9])
def test_a_size_that_lies_is_a_bad_frame(lie: int) -> None:
    header, payload = record(b"12345678", size=(8 + lie) % 2**32)

    assert refusal(header + payload).code is Code.BAD_FRAME


@pytest.mark.parametrize("magic", [b"CR", b"RD", b"\0\0", b"rc"])
def test_a_wrong_magic_is_a_bad_frame(magic: bytes) -> None:
    assert refusal(magic + wire.pack(Type.PING)[2:]).code is Code.BAD_FRAME


@pytest.mark.parametrize("version", [0, 2, 255])
def test_another_version_is_told_which_one_is_spoken(version: int) -> None:
    frame = b"RC" + bytes([version]) + wire.pack(Type.PING)[3:]

    assert refusal(frame).code is Code.BAD_VERSION
    assert refusal(frame).expected == 1


@pytest.mark.parametrize("steps", [0, 3, 2**31, 2**32 - 1])
def test_a_multi_whose_number_of_records_lies_is_a_bad_frame(steps: int) -> None:
    body = b"".join([*(header for header, _ in [record(b"1234")] * 2), b"1234" * 2])

    assert refusal(wire.pack(Type.MULTI, size=len(body), steps=steps) + body).code is Code.BAD_FRAME


@pytest.mark.parametrize("sizes", [(3, 4), (5, 4), (9, 0), (0, 0), (2**32 - 1, 9), (2**32 - 4, 2**32 - 4)])
def test_a_multi_whose_records_sizes_do_not_add_up_is_a_bad_frame(sizes: tuple[int, int]) -> None:
    heads = b"".join(record(b"1234", size=size)[0] for size in sizes)
    body = heads + b"1234" * 2
    honest = sum(sizes) == 8
    frame = wire.pack(Type.MULTI, size=len(body), steps=2) + body

    assert honest or refusal(frame).code is Code.BAD_FRAME


def test_a_multi_with_one_wrong_magic_or_version_inside_is_refused_whole() -> None:
    good = wire.pack(Type.CHUNK)
    for bad, code in ((b"XX" + good[2:], Code.BAD_FRAME), (b"RC\x02" + good[3:], Code.BAD_VERSION)):
        body = good + bad + good
        assert refusal(wire.pack(Type.MULTI, size=len(body), steps=3) + body).code is code


@pytest.mark.parametrize("type", [Type.HELLO, Type.OPEN, Type.CLOSE, Type.PING, Type.WELCOME, Type.MULTI, 0, 255])
def test_a_multi_holds_nothing_but_chunks_resets_and_their_answers(type: int) -> None:
    """A HELLO of 48 bytes is answered with kilobytes: a frame full of them would be a weapon."""
    assert refusal(wire.multi([record(b"1234"), record(b"{}", type=type)])).code is Code.BAD_FRAME


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"7", b'{"stream": 7, "model": "m"}', b'{"stream": "s"}', b'{"stream":"\xff","model":""}'],
)
def test_a_body_that_is_not_what_it_must_be_is_a_bad_request(body: bytes) -> None:
    with pytest.raises(Refused) as refused:
        wire.decode_body(body, wire.Open)

    assert refused.value.code is Code.BAD_REQUEST


def test_a_body_nested_beyond_reason_is_a_bad_request() -> None:
    body = b'{"stream": "s", "model": "m", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"

    with pytest.raises(Refused) as refused:
        wire.decode_body(body, wire.Open)

    assert refused.value.code is Code.BAD_REQUEST


def test_unknown_keys_in_a_body_are_tolerated() -> None:
    assert wire.decode_body(b'{"stream": "s", "model": "m", "colour": [1, {}]}', wire.Open).stream == "s"


def only_refused(data: bytes) -> None:
    """Decode as far as it goes; anything but Refused fails the test."""
    try:
        header, payload = wire.decode(data)
        if header.type == Type.MULTI:
            for _, body in wire.decode_multi(header, payload):
                wire.decode_body(body, wire.Open)
        wire.decode_body(payload, wire.Hello)
    except Refused:
        pass


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_random_bytes_raise_nothing_but_refused(data: bytes) -> None:
    only_refused(data)
    only_refused(wire.MAGIC + b"\x01" + data)
    only_refused(wire.pack(Type.MULTI, size=len(data), steps=len(data) // HEADER_BYTES) + data)


@given(RECORDS, st.lists(st.tuples(st.integers(0, 10_000), U8), min_size=1, max_size=6), st.integers(0, 60))
@settings(max_examples=300, deadline=None)
def test_damaged_frames_raise_nothing_but_refused(
    drawn: list[tuple[dict[str, int], bytes]], damage: list[tuple[int, int]], cut: int
) -> None:
    whole = wire.multi([record(payload, **fields | {"type": Type.CHUNK}) for fields, payload in drawn])
    data = bytearray(whole)
    for place, value in damage:
        data[place % len(data)] = value
    only_refused(bytes(data))
    only_refused(bytes(data[: len(data) - cut]))
    only_refused(whole[cut:])
