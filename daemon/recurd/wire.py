"""Bytes <-> messages, and nothing else. The daemon and the clients both use it, so the codec stands once.

docs/protocol.md is the specification. After the routing id a message is exactly one ZeroMQ frame: a header of 48 bytes,
little-endian, followed by ``size`` bytes of payload::

     0  magic       2 bytes  b"RC"
     2  version     u8       1
     3  type        u8       Type
     4  flags       u8       Flag; of a record to the daemon, and its ERROR: the attempt in the high four bits, of a
                             STATE the Operation in the low four
     5  dtype       u8       Dtype of the payload (0: JSON or nothing)
     6  code        u16      errors.Code in an ERROR; in a CHUNK the milliseconds it may wait to be started, 0: for ever
     8  size        u32      payload bytes
    12  steps       u32      time steps in the payload; in a MULTI the number of records
    16  width       u32      elements a step, all heads of a result together (ADMIN, REPORT: bytes behind the JSON)
    20  generation  u32      of the stream
    24  handle      u64      of the stream, from OPENED
    32  seq         u64      number of the record in its stream; in control messages a request id, echoed
    40  ack         u64      to the daemon: results up to this seq have arrived; from it: the seq last accepted

A MULTI carries many records in one frame: its payload is ``steps`` headers, one after another, then their payloads in
the same order. Records of a MULTI are CHUNK, RESET and STATE (to the daemon), RESULT, DONE, STATE_OF and ERROR
(from it).
"""

import struct
from collections.abc import Iterable, Iterator
from enum import IntEnum, IntFlag
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from recurd.errors import Code, Refused

MAGIC = b"RC"
VERSION = 1
#: Longest time, in seconds, that a chunk may say it waits to be started.
MAX_EXPIRES_SECONDS = 65.535
#: The part of a record's flags that counts how often it was sent under its number; an ERROR repeats it.
ATTEMPT = 0xF0
#: Records in a MULTI, at most: what one frame can make the other side do before it looks up again.
MAX_RECORDS = 256
#: Bytes of the JSON of a HELLO or OPEN, at most: reading megabytes of it would hold up everybody else.
MAX_REQUEST_BYTES = 65536

Body = TypeVar("Body")
Buffer = bytes | memoryview
#: One message that is not yet a frame: header bytes and payload. Kept apart so that many can be joined into a MULTI.
Record = tuple[bytes, Buffer]

_HEADER = struct.Struct("<2sBBBBHIIIIQQQ")
HEADER_BYTES = _HEADER.size
#: The header as a numpy record, for reading and writing many at once.
HEADER_DTYPE = np.dtype(
    [
        ("magic", "S2"),
        ("version", "u1"),
        ("type", "u1"),
        ("flags", "u1"),
        ("dtype", "u1"),
        ("code", "<u2"),
        ("size", "<u4"),
        ("steps", "<u4"),
        ("width", "<u4"),
        ("generation", "<u4"),
        ("handle", "<u8"),
        ("seq", "<u8"),
        ("ack", "<u8"),
    ]
)


class Type(IntEnum):
    """Message types; the high bit marks what only the daemon sends."""

    HELLO = 0x01
    OPEN = 0x02
    CHUNK = 0x03
    MULTI = 0x04
    RESET = 0x05
    CLOSE = 0x06
    STATE = 0x07
    PING = 0x08
    ADMIN = 0x09
    WELCOME = 0x81
    OPENED = 0x82
    RESULT = 0x83
    DONE = 0x85
    CLOSED = 0x86
    STATE_OF = 0x87
    PONG = 0x88
    REPORT = 0x89
    ERROR = 0x8F


#: Messages with a number in their stream, and what each is answered with.
ANSWERS = {Type.CHUNK: Type.RESULT, Type.RESET: Type.DONE, Type.STATE: Type.STATE_OF}
RECORDS = frozenset(ANSWERS)
#: By type: whether it may stand in a MULTI.
_JOINABLE = np.isin(np.arange(256), (*ANSWERS, *ANSWERS.values(), Type.ERROR))


class Operation(IntEnum):
    """What a STATE asks for: the low four bits of its flags."""

    GET = 1
    PUT = 2
    RESET_TO = 3
    CLONE = 4

    @property
    def word(self) -> str:
        """The operation as it stands in metrics and log lines."""
        return self.name.lower()


#: The bits of a STATE's flags that hold its operation.
OPERATION = 0x0F


def starts_afresh(type: int, flags: int) -> bool:
    """Whether a record makes its stream's generation one higher."""
    return type == Type.RESET or (type == Type.STATE and flags & OPERATION == Operation.RESET_TO)


class Flag(IntFlag):
    """Flags of a RESULT, DONE or STATE_OF."""

    FRESH = 0x01  # the chunk started from the initial state; the state is the initial one
    DUPLICATE = 0x02  # answered before; this is the retained answer
    GONE = 0x04  # answered before and acknowledged since; the payload is no longer kept


class Dtype(IntEnum):
    """Element types of a payload."""

    JSON = 0
    FLOAT32 = 1
    INT64 = 2
    FLOAT16 = 3
    FLOAT64 = 4
    INT32 = 5


#: numpy types of :class:`Dtype`, always little-endian, and the way back from a contract's dtype name.
NUMPY_TYPES: dict[Dtype, np.dtype[Any]] = {
    Dtype.FLOAT32: np.dtype("<f4"),
    Dtype.INT64: np.dtype("<i8"),
    Dtype.FLOAT16: np.dtype("<f2"),
    Dtype.FLOAT64: np.dtype("<f8"),
    Dtype.INT32: np.dtype("<i4"),
}
DTYPES = {str(numpy_type.name): dtype for dtype, numpy_type in NUMPY_TYPES.items()}


class Header(NamedTuple):
    """The 48 bytes before every payload, as they stand on the wire (see the module's drawing)."""

    magic: bytes
    version: int
    type: int
    flags: int
    dtype: int
    code: int
    size: int
    steps: int
    width: int
    generation: int
    handle: int
    seq: int
    ack: int


#: Stands for the header of a frame that has none that can be read.
NO_HEADER = Header(b"", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def pack(
    type: int,
    *,
    flags: int = 0,
    dtype: int = 0,
    code: int = 0,
    size: int = 0,
    steps: int = 0,
    width: int = 0,
    generation: int = 0,
    handle: int = 0,
    seq: int = 0,
    ack: int = 0,
) -> bytes:
    """A header's 48 bytes."""
    return _HEADER.pack(MAGIC, VERSION, type, flags, dtype, code, size, steps, width, generation, handle, seq, ack)


def pack_result(
    flags: int, dtype: int, size: int, steps: int, width: int, generation: int, handle: int, seq: int, ack: int
) -> bytes:
    """A RESULT's header; for the data path, which packs one a chunk: positional arguments, half the time."""
    return _HEADER.pack(MAGIC, VERSION, Type.RESULT, flags, dtype, 0, size, steps, width, generation, handle, seq, ack)


def control(
    type: int, body: Any, *, flags: int = 0, code: int = 0, generation: int = 0, handle: int = 0, seq: int = 0
) -> Record:
    """A message with a JSON body (a msgspec struct or a dict)."""
    payload = msgspec.json.encode(body)
    header = pack(type, flags=flags, code=code, size=len(payload), generation=generation, handle=handle, seq=seq)
    return header, payload


def control_with_data(type: int, body: Any, data: Buffer, *, seq: int = 0) -> Record:
    """An ADMIN or REPORT: a JSON body, and binary data behind it."""
    text = msgspec.json.encode(body)
    return pack(type, size=len(text) + len(data), width=len(data), seq=seq), b"".join((text, data))


def body_and_data(header: Header, payload: Buffer) -> tuple[memoryview, memoryview]:
    """The JSON of an ADMIN or REPORT, and the data behind it. Raises :class:`Refused` (``bad_frame``)."""
    end = len(payload) - header.width
    if end < 0:
        raise Refused(Code.BAD_FRAME, f"{header.width} bytes of data are announced, {len(payload)} came")
    view = memoryview(payload)
    return view[:end], view[end:]


def frame(record: Record) -> bytes:
    """One record as a frame of its own."""
    return b"".join(record)


def multi(records: list[Record]) -> bytes:
    """Many records as one MULTI frame."""
    headers = b"".join([header for header, _ in records])
    payloads = b"".join([payload for _, payload in records])
    size = len(headers) + len(payloads)
    return b"".join((pack(Type.MULTI, size=size, steps=len(records)), headers, payloads))


def multi_frames(records: Iterable[Record], max_bytes: int) -> Iterator[bytes]:
    """Many records as MULTI frames of at most ``max_bytes`` and MAX_RECORDS each (a larger record goes alone)."""
    batch: list[Record] = []
    size = HEADER_BYTES
    for record in records:
        more = HEADER_BYTES + len(record[1])
        if batch and (size + more > max_bytes or len(batch) == MAX_RECORDS):
            yield multi(batch)
            batch, size = [], HEADER_BYTES
        batch.append(record)
        size += more
    if len(batch) == 1:
        yield frame(batch[0])
    elif batch:
        yield multi(batch)


def decode(data: Buffer) -> tuple[Header, memoryview]:
    """A frame's header and payload.

    Raises :class:`Refused` with ``bad_frame`` (truncated, wrong magic, a size that lies) or ``bad_version``.
    """
    if len(data) < HEADER_BYTES:
        raise Refused(Code.BAD_FRAME, f"a frame has at least {HEADER_BYTES} bytes, this one has {len(data)}")
    header = Header._make(_HEADER.unpack_from(data))
    if header.magic != MAGIC:
        raise Refused(Code.BAD_FRAME, f"the frame starts with {header.magic!r}, not with {MAGIC!r}")
    if header.version != VERSION:
        raise Refused(
            Code.BAD_VERSION, f"version {header.version} is not spoken here, only {VERSION}", expected=VERSION
        )
    if header.size != len(data) - HEADER_BYTES:
        raise Refused(Code.BAD_FRAME, f"the header announces {header.size} bytes, {len(data) - HEADER_BYTES} followed")
    return header, memoryview(data)[HEADER_BYTES:]


def records_in(data: Buffer) -> int:
    """How many records a frame says that it carries, at least one; whether it is true :func:`decode` finds out."""
    if len(data) < HEADER_BYTES or data[3] != Type.MULTI:
        return 1
    return min(max(1, int.from_bytes(data[12:16], "little")), MAX_RECORDS)


def decode_multi(header: Header, payload: memoryview) -> list[tuple[Header, Buffer]]:
    """The records of a MULTI, in order.

    All headers are checked at once, as arrays; the whole frame is refused (:class:`Refused`, ``bad_frame`` or
    ``bad_version``) when one of them lies, since nothing after a wrong size could be trusted.
    """
    if header.steps > MAX_RECORDS:
        raise Refused(Code.BAD_FRAME, f"a MULTI has at most {MAX_RECORDS} records, this one {header.steps}")
    end_of_headers = header.steps * HEADER_BYTES
    if not 0 < end_of_headers <= len(payload):
        raise Refused(Code.BAD_FRAME, f"a MULTI of {header.steps} records does not fit in {len(payload)} bytes")
    heads = payload[:end_of_headers]
    fields = np.frombuffer(heads, HEADER_DTYPE)
    if (fields["magic"] != MAGIC).any():
        raise Refused(Code.BAD_FRAME, "a record of the MULTI has the wrong magic")
    if (fields["version"] != VERSION).any():
        raise Refused(Code.BAD_VERSION, f"a record of the MULTI has a version other than {VERSION}")
    if not _JOINABLE[fields["type"]].all():
        # A HELLO is answered with kilobytes: a frame of nothing else would fill the memory.
        raise Refused(Code.BAD_FRAME, "a record of the MULTI has a type that is not joined")
    ends = np.cumsum(fields["size"], dtype=np.uint64) + end_of_headers
    if ends[-1] != len(payload):
        raise Refused(Code.BAD_FRAME, "the sizes of the MULTI's records do not add up to its payload")
    records: list[tuple[Header, Buffer]] = []
    start = end_of_headers
    for fields_of_one, end in zip(_HEADER.iter_unpack(heads), ends.tolist(), strict=True):
        # Copied, so that one small chunk that waits does not keep a whole frame.
        records.append((Header._make(fields_of_one), bytes(payload[start:end])))
        start = end
    return records


def all_finite(values: npt.NDArray[Any]) -> bool:
    """Whether a flat array holds no NaN or infinity."""
    # Looking for a zero byte takes half the time of all() on the short arrays that chunks are.
    return b"\0" not in np.isfinite(values).tobytes()


def multi_is_finite(header: Header, payload: memoryview) -> bool:
    """Whether all data of a MULTI, read as float32, is finite (False, too, when it cannot be read so)."""
    end_of_headers = header.steps * HEADER_BYTES
    # One record of an odd size and the numbers of those behind it would be read across their borders.
    if (np.frombuffer(payload[:end_of_headers], HEADER_DTYPE)["size"] & 3).any():
        return False
    return all_finite(np.frombuffer(payload[end_of_headers:], NUMPY_TYPES[Dtype.FLOAT32]))


def decode_body(payload: Buffer, type: type[Body]) -> Body:
    """A JSON body as a struct; unknown keys are tolerated. Raises :class:`Refused` (``bad_request``)."""
    try:
        return msgspec.json.decode(payload, type=type)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(Code.BAD_REQUEST, f"the JSON body cannot be read: {error}") from error


def decode_request(payload: Buffer, type: type[Body]) -> Body:
    """The JSON body of a HELLO or OPEN, as :func:`decode_body`; a large one is refused unread."""
    if len(payload) > MAX_REQUEST_BYTES:
        raise Refused(
            Code.BAD_REQUEST, f"a JSON body has at most {MAX_REQUEST_BYTES} bytes, this one has {len(payload)}"
        )
    return decode_body(payload, type)


# JSON bodies


class Hello(msgspec.Struct, kw_only=True, frozen=True):
    """HELLO: who the client is and what it can take."""

    client: str = ""
    versions: tuple[int, ...] = (VERSION,)
    #: Whether results may come joined in MULTI frames.
    multi: bool = False


class Welcome(msgspec.Struct, kw_only=True, frozen=True):
    """WELCOME: who the daemon is, its limits and its models' contracts."""

    server: str
    #: New at every start of the daemon; a client that sees it change opens its streams anew.
    epoch: str
    #: The epoch of the start at which its journal was begun, so the same as long as its streams live; without a journal
    #: the present one.
    origin: str = ""
    tenant: str
    versions: tuple[int, ...]
    #: Records a stream may have in flight: accepted or sent, their results not yet acknowledged.
    credit: int
    max_message_bytes: int
    max_chunk_steps: int
    #: A connection that has been silent this long is forgotten; PING keeps it.
    peer_timeout_seconds: float
    #: Device asked for, device in use, and whether the second is a fall-back.
    device: dict[str, Any]
    #: What streams survive: ``off`` (nothing), ``process`` (the daemon's death), ``power`` (the machine's).
    durability: str = "off"
    #: Models that give the same bits whoever shares a tick and however a stream is cut, as tried at the start: streams
    #: of these are resumed bit for bit.
    bit_exact: tuple[str, ...] = ()
    #: What the tenant may do: ``stream``, ``reset``, ``state``, ``admin``.
    rights: tuple[str, ...] = ()
    #: Contracts of the models that the tenant may use, by name, without their proofs (contract.public()).
    models: dict[str, Any]


class Open(msgspec.Struct, kw_only=True, frozen=True):
    """OPEN: attach a stream to this connection.

    ``mode`` is ``auto`` (resume, or start new when there is none), ``resume`` (refuse when there is none: what a client
    sends after a reconnect, so that a lost state is never replaced silently) or ``new`` (a fresh start in any case).
    """

    stream: str
    model: str
    mode: str = "auto"
    #: With ``resume``: the generation the client knows; another one is refused as stale.
    generation: int | None = None
    idle_timeout_seconds: float | None = None
    #: What the daemon said that sent us here (``moved``): a stream that has arrived with this group was released there.
    group: str | None = None


class Opened(msgspec.Struct, kw_only=True, frozen=True):
    """OPENED: the stream is attached; handle and generation stand in the header too."""

    stream: str
    model: str
    generation: int
    #: The seq last accepted; the next chunk is last_seq + 1. Results up to it come unasked or by resending.
    last_seq: int
    #: No step has been taken since the fresh start.
    fresh: bool
    credit: int
    max_chunk_steps: int
    idle_timeout_seconds: float
    #: The contract the stream goes by, where it is of a version of the model that was replaced since.
    contract: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


class Admin(msgspec.Struct, kw_only=True, frozen=True):
    """ADMIN: something that whoever runs the daemon asks of it. Each command has keys of its own beside this one."""

    command: str


class Error(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """ERROR: code and text; the header repeats handle, generation and seq of what it answers."""

    code: str
    text: str
    #: Type of the message this answers.
    in_reply_to: int = 0
    expected: int | None = None
    retry_after_seconds: float | None = None
    #: With ``moved``: the daemon that has the stream, its public key where it has another one, and the group that the
    #: stream left with.
    endpoint: str | None = None
    server_key: str | None = None
    group: str | None = None
    #: With ``exists``, of streams that were to come: those that cannot.
    handles: list[int] | None = None
    #: With broken streams: the last generation and seq there were.
    generation: int | None = None
    last_seq: int | None = None
