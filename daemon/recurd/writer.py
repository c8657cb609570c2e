"""A client's side of one stream: what waits, what is in flight under which number, what an answer means for the rest.

Sans-I/O like :mod:`recurd.session`, which owns the writers and tells them what came (docs/protocol.md, section 4).

A record gets its number when it is sent, not before. So what the daemon has not accepted is simply put back in front of
what waits, and is numbered again when its turn comes::

    submit -> waiting -> in flight (numbered) -> answered
                 ^            |
                 +- put back -+   a record before it was refused, or it is itself to come again later
"""

from collections import deque
from collections.abc import Iterator
from enum import Enum
from typing import Any, Literal, NamedTuple

import msgspec

from recurd import wire
from recurd.errors import PASSING, Broken, Code, RecurdError, Refused, Unanswered
from recurd.signature import Payload, Signature

Mode = Literal["auto", "resume", "new"]
#: Seconds to wait before the same request is tried again where the daemon names none.
RETRY_SECONDS = 0.05
#: Codes of a record's ERROR that the stream does not survive, besides the breaking ones: its numbers or its life are
#: not those we know, so somebody else has started it afresh or closed it.
_LOST = frozenset({Code.STALE, Code.CLOSED, Code.UNKNOWN_STREAM})


class Answer(NamedTuple):
    """What a driver hands to whoever waits: the token given with the request, and its value or its error."""

    token: Any
    value: Any
    error: RecurdError | None


class Record:
    """A chunk or a reset on its way. ``generation`` is set with its number; ``sent`` counts the times it went out."""

    __slots__ = ("generation", "payload", "sent", "token")

    def __init__(self, token: Any, payload: Payload | None) -> None:
        """``payload`` ``None`` is a reset."""
        self.token = token
        self.payload = payload
        self.generation = 0
        self.sent = 0


class Phase(Enum):
    """How a writer stands with the daemon on the present connection."""

    DETACHED = "detached"
    OPENING = "opening"
    ATTACHED = "attached"
    ENDED = "ended"


class Writer:
    """One stream. Owns its records; only the session calls it, others may read its public attributes at any time."""

    def __init__(self, request: wire.Open, token: Any, answers: list[Answer], stall_seconds: float) -> None:
        """``token`` waits for the opening; ``answers`` is where every outcome is put."""
        self.stream = request.stream
        self._request = request
        self._answers = answers
        self._open_token: Any = token
        # of the stream, once opened
        self.model = request.model
        self.signature: Signature | None = None
        self.handle = 0
        self.credit = 0
        self.max_chunk_steps = 0
        #: Fresh starts, and number of the record, up to which everything is answered.
        self.generation = 0
        self.last_seq = 0
        #: Whether no step was taken since the fresh start, as far as answers have come.
        self.fresh = False
        #: Whether the chunk answered last started from the initial state.
        self.last_fresh = False
        #: Why there is no stream any more.
        self.error: RecurdError | None = None
        # records
        self._next_seq = 1
        self._next_generation = 0
        self._in_flight: dict[int, Record] = {}  # by seq, which is also their order
        self._waiting: deque[Record] = deque()
        self._close_tokens: list[Any] = []
        # of the present connection
        self.phase = Phase.DETACHED
        #: OPENs that went out on lost connections and were not answered: the daemon may yet read one of them.
        self._opens_lost = 0
        self._reopened = False
        self._resend = False
        self._closing = False
        self._errors_to_come: set[int] = set()
        self.retry_at = 0.0
        # of the wait for an answer
        self._stall_seconds = stall_seconds
        #: When something last came for this stream, or was sent while nothing was awaited.
        self.progress_at = 0.0
        #: How long to wait from then on before asking again.
        self.patience_seconds = stall_seconds

    # --- what can be asked ---

    @property
    def is_open(self) -> bool:
        """Whether the daemon has ever opened it for us."""
        return self._open_token is None

    @property
    def awaits_answer(self) -> bool:
        """Whether the daemon owes an answer, as far as we know."""
        if self.phase is Phase.ATTACHED:
            return bool(self._in_flight or self._errors_to_come or self._closing)
        return self.phase is Phase.OPENING

    # --- what a user asks for ---

    def submit(self, record: Record) -> None:
        """Take one more record, to be sent after all before it."""
        if self.error is not None:
            self._answers.append(Answer(record.token, None, self.error))
        elif self._close_tokens:
            self._answers.append(Answer(record.token, None, RecurdError(f"stream '{self.stream}' is being closed")))
        else:
            self._waiting.append(record)

    def close(self, token: Any) -> None:
        """Close the stream once everything before is answered. A stream whose state is lost is closed already."""
        if self.phase is Phase.ENDED:
            self._answers.append(Answer(token, None, None))
        else:
            self._close_tokens.append(token)

    # --- the connection ---

    def detach(self) -> None:
        """What was in flight on this attachment is unanswered; the stream has to be opened again."""
        if self.phase is not Phase.ENDED:
            self.phase = Phase.DETACHED
        self._errors_to_come.clear()
        self._closing = False

    def disconnected(self) -> None:
        """The connection is gone, and with it every answer that had not arrived."""
        self._opens_lost += self.phase is Phase.OPENING
        self.detach()
        self._reopened = False

    def open_frame(self, request_id: int, now: float) -> bytes:
        """The OPEN for this connection: the user's own until it was answered once, then one that only resumes."""
        self.phase = Phase.OPENING
        self.progress_at = now
        request = self._request
        if self.is_open:
            request = msgspec.structs.replace(request, mode="resume", generation=self.generation)
        body = msgspec.json.encode(request)
        return wire.pack(wire.Type.OPEN, size=len(body), seq=request_id, ack=self.last_seq) + body

    def opened(self, header: wire.Header, body: wire.Opened, signature: Signature, now: float) -> None:
        """OPENED came."""
        if self.phase is not Phase.OPENING:
            return
        first = not self.is_open
        if not first and (trouble := self._lost_since(body)):
            self.end(trouble)
            return
        self.phase = Phase.ATTACHED
        self.signature, self.handle, self.credit = signature, header.handle, body.credit
        self.max_chunk_steps = body.max_chunk_steps
        self.progress_at = now
        self._resend = bool(self._in_flight)
        if first:
            self._next_seq, self._next_generation, self.fresh = body.last_seq + 1, body.generation, body.fresh
            self._note_answered()
            self._answers.append(Answer(self._open_token, None, None))
            self._open_token = None

    def _lost_since(self, body: wire.Opened) -> RecurdError | None:
        """Why the stream that was opened is not the one we had; ``None`` when it is."""
        following = body.last_seq + 1
        if following > self._next_seq:
            return Refused(Code.DETACHED, f"another client has written to stream '{self.stream}' since")
        if following == self._next_seq:
            expected = self._next_generation
        elif following in self._in_flight:
            expected = self._in_flight[following].generation
        else:
            text = f"the daemon knows '{self.stream}' up to chunk {body.last_seq} only, {self.last_seq} were answered"
            return Broken(Code.UNKNOWN_STREAM, text, generation=body.generation, last_seq=body.last_seq)
        if body.generation != expected:
            text = f"stream '{self.stream}' was started afresh by another client"
            return Broken(Code.STALE, text, generation=body.generation, last_seq=body.last_seq)
        return None

    def open_refused(self, error: Refused | Broken, now: float) -> None:
        """An ERROR came for the OPEN."""
        if self.phase is not Phase.OPENING:
            return
        self.phase = Phase.DETACHED
        if isinstance(error, Broken):
            self.end(error)
        elif error.code in PASSING or (self.is_open and error.code in (Code.DRAINING, Code.INTERNAL)):
            self._wait(error, now)
        else:
            self.end(_broken(error) if self.is_open else error)

    def _wait(self, error: Refused, now: float) -> None:
        self.retry_at = now + (error.retry_after_seconds or RETRY_SECONDS)

    # --- sending ---

    def records_to_send(self, now: float) -> Iterator[wire.Record]:
        """Everything that may go out now: records to be sent again, then waiting ones as far as the credit goes."""
        if self.phase is not Phase.ATTACHED or self._errors_to_come or now < self.retry_at:
            return
        if not self._in_flight:
            self.progress_at = now
        if self._resend:
            self._resend = False
            for seq, record in self._in_flight.items():
                yield self._pack(seq, record)
        while self._waiting and self._next_seq - self.last_seq <= self.credit:
            record = self._waiting.popleft()
            record.generation = self._next_generation
            self._in_flight[self._next_seq] = record
            yield self._pack(self._next_seq, record)
            self._next_seq += 1
            self._next_generation += record.payload is None

    def _pack(self, seq: int, record: Record) -> wire.Record:
        record.sent += 1
        payload = record.payload
        if payload is None:
            reset = wire.pack(
                wire.Type.RESET, generation=record.generation, handle=self.handle, seq=seq, ack=self.last_seq
            )
            return reset, b""
        header = wire.pack(
            wire.Type.CHUNK,
            dtype=payload.dtype,
            size=len(payload.data),
            steps=payload.steps,
            width=payload.width,
            generation=record.generation,
            handle=self.handle,
            seq=seq,
            ack=self.last_seq,
        )
        return header, payload.data

    def close_frame(self, request_id: int, now: float) -> bytes | None:
        """The CLOSE, when one is wanted and its time has come. Nothing may be in flight: a record could come back."""
        ready = self._close_tokens and self.phase is Phase.ATTACHED and not self._closing
        if not ready or self._in_flight or self._waiting or self._errors_to_come:
            return None
        self._closing = True
        self.progress_at = now
        return wire.pack(
            wire.Type.CLOSE, generation=self._next_generation, handle=self.handle, seq=request_id, ack=self.last_seq
        )

    def send_again(self, now: float, max_stall_seconds: float) -> None:
        """Nothing that was sent before will be answered any more: send it once again."""
        self.progress_at = now
        self.patience_seconds = min(2 * self.patience_seconds, max_stall_seconds)
        if self.phase is Phase.OPENING:
            self.phase = Phase.DETACHED
        self._errors_to_come.clear()
        self._closing = False
        self._resend = bool(self._in_flight)

    # --- answers ---

    def answered(self, header: wire.Header, payload: memoryview, now: float) -> None:
        """RESULT or DONE came. One that is not awaited (any more) is dropped."""
        record = self._in_flight.get(header.seq)
        if record is None:
            return
        if self._is_not_ours(header, record):
            self.end(Refused(Code.DETACHED, f"another client has written to stream '{self.stream}' since"))
            return
        del self._in_flight[header.seq]
        self._note_answered()
        self._progressed(now)
        self._reopened = False
        self.fresh = record.payload is None
        if record.payload is None:
            self._answers.append(Answer(record.token, None, None))
            return
        self.last_fresh = bool(header.flags & wire.Flag.FRESH)
        assert self.signature is not None  # set with the first OPENED
        try:
            self._answers.append(Answer(record.token, self.signature.result(header, payload), None))
        except Refused as error:
            self._answers.append(Answer(record.token, None, error))

    def _note_answered(self) -> None:
        """All before the oldest record in flight is answered (plain attributes, for readers on other threads)."""
        for seq, record in self._in_flight.items():
            self.last_seq, self.generation = seq - 1, record.generation
            return
        self.last_seq, self.generation = self._next_seq - 1, self._next_generation

    def _progressed(self, now: float) -> None:
        self.progress_at = now
        self.patience_seconds = self._stall_seconds

    def _is_not_ours(self, header: wire.Header, record: Record) -> bool:
        """Whether somebody else's record ran under this number: no code says so, but this gives it away."""
        is_reset = record.payload is None
        if is_reset != (header.type == wire.Type.DONE) or header.generation != record.generation + is_reset:
            return True
        return bool(header.flags & wire.Flag.GONE or (header.flags & wire.Flag.DUPLICATE and record.sent == 1))

    def refused(self, seq: int, error: Refused | Broken, now: float) -> None:
        """An ERROR came for record ``seq``."""
        if seq in self._errors_to_come:
            self._errors_to_come.discard(seq)
            return
        record = self._in_flight.get(seq)
        if record is None or self.phase is not Phase.ATTACHED:
            return
        self._progressed(now)
        if isinstance(error, Broken):
            self.end(error)
        elif error.code in _LOST:
            self.end(_broken(error))
        elif error.code in (Code.UNKNOWN_HANDLE, Code.DETACHED):
            self._open_again(error)
        elif error.code is Code.GAP:
            self._put_back_from(error.expected or 0, seq)
        elif error.code in PASSING:
            self._wait(error, now)
            self._put_back_from(seq, seq)
        else:
            self._put_back_from(seq, seq)
            self._waiting.popleft()
            self._answers.append(Answer(record.token, None, error))

    def _put_back_from(self, first: int, refused: int) -> None:
        """The daemon waits for number ``first``: it and all after it are to be numbered and sent anew.

        Errors are on their way for what was sent behind ``refused``, and its numbers must not be used before they came.
        """
        if first not in self._in_flight:
            text = f"the daemon waits for chunk {first} of '{self.stream}', which was answered before"
            self.end(Broken(Code.UNKNOWN_STREAM, text))
            return
        back = [seq for seq in self._in_flight if seq >= first]
        self._errors_to_come.update(seq for seq in back if seq > refused)
        self._next_seq, self._next_generation = first, self._in_flight[first].generation
        records = [self._in_flight.pop(seq) for seq in back]
        for record in records:
            record.sent = 0
        self._waiting.extendleft(reversed(records))

    def _open_again(self, error: Refused) -> None:
        """The daemon does not take our records for this stream's any more.

        `detached` is believed unless an OPEN of our own may be to blame, read late from a connection that was lost: two
        clients that open a stream in turn would otherwise fight for ever.
        """
        if error.code is Code.DETACHED:
            self._opens_lost -= 1
            final = self._opens_lost < 0
        else:
            final, self._reopened = self._reopened, True
        if final:
            self.end(error)
        else:
            self.detach()

    def closed(self) -> None:
        """CLOSED came."""
        if self._closing:
            self._finish(RecurdError(f"stream '{self.stream}' was closed"))

    def close_refused(self, error: Refused | Broken, now: float) -> None:
        """An ERROR came for the CLOSE. What is not there any more is closed."""
        if not self._closing:
            return
        self._closing = False
        if isinstance(error, Broken) or error.code in (Code.UNKNOWN_HANDLE, Code.CLOSED):
            self._finish(RecurdError(f"stream '{self.stream}' was closed"))
        elif error.code in PASSING:
            self._wait(error, now)
        else:
            self._finish(error, told=error)

    def end(self, error: RecurdError) -> None:
        """There is no stream any more: everything that waits fails with ``error``, and so does everything to come."""
        if self.phase is Phase.ENDED:
            return
        waiting = [record.token for record in (*self._in_flight.values(), *self._waiting)]
        if self._open_token is not None:
            waiting.insert(0, self._open_token)
            self._open_token = None
        self._answers.extend(Answer(token, None, error) for token in waiting)
        # A stream that is lost is closed; only one that nobody answered for may be there still.
        self._finish(error, told=error if isinstance(error, Unanswered) else None)

    def _finish(self, error: RecurdError, told: RecurdError | None = None) -> None:
        """``error`` is for what is asked of the stream from now on, ``told`` for those who asked to close it."""
        self._answers.extend(Answer(token, None, told) for token in self._close_tokens)
        self._close_tokens.clear()
        self._in_flight.clear()
        self._waiting.clear()
        self._errors_to_come.clear()
        self.phase = Phase.ENDED
        self.error = error


def _broken(error: Refused) -> Broken:
    return Broken(error.code, error.text)
