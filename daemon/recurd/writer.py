"""A client's side of one stream: how it stands with the daemon, and what every answer means for its records.

Sans-I/O like :mod:`recurd.session`, which owns the writers and tells them what came (docs/protocol.md, section 4); the
records and their numbers are :mod:`recurd.backlog`'s.
"""

import math
from collections.abc import Iterator
from enum import Enum
from typing import Any, Literal, NamedTuple

import msgspec

from recurd import wire
from recurd.backlog import Backlog, Record
from recurd.errors import Broken, Code, RecurdError, Refused, Unanswered
from recurd.signature import Signature

Mode = Literal["auto", "resume", "new"]
#: Seconds to wait before the same request is tried again where the daemon names none.
RETRY_SECONDS = 0.05
#: The same, for one that another daemon would answer, while streams that live here keep the client from going there.
KEPT_SECONDS = 0.5
#: Codes of a record's ERROR that the stream does not survive, besides the breaking ones: its numbers or its life are
#: not those we know, so somebody else has started it afresh or closed it.
_LOST = frozenset({Code.STALE, Code.CLOSED, Code.UNKNOWN_STREAM})
#: Codes after which the stream goes on without us.
_NOT_OURS = frozenset({Code.FORBIDDEN, Code.DETACHED, Code.MOVED})
# As plain integers: an IntFlag's operators cost more than the rest of an answer.
_FRESH, _DUPLICATE, _GONE = int(wire.Flag.FRESH), int(wire.Flag.DUPLICATE), int(wire.Flag.GONE)


class Answer(NamedTuple):
    """What a driver hands to whoever waits: the token given with the request, and its value or its error."""

    token: Any
    value: Any
    error: RecurdError | None


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
        self._close_tokens: list[Any] = []
        self.backlog = Backlog()
        # of the stream, once opened
        self.model = request.model
        self.signature: Signature | None = None
        self.handle = 0
        self.max_chunk_steps = 0
        self._credit = 0
        #: Records that may be in flight: the credit, and less for a while after the daemon was too busy for them.
        self._window = 0
        #: Whether no step was taken since the fresh start, as far as answers have come.
        self.fresh = False
        #: Whether the chunk answered last started from the initial state.
        self.last_fresh = False
        #: Why there is no stream any more.
        self.error: RecurdError | None = None
        # of the present connection
        self.phase = Phase.DETACHED
        #: OPENs that went out on lost connections and were not answered: the daemon may yet read one of them.
        self._opens_lost = 0
        self._reopened = False
        self._closing = False
        #: Times it was sent to another daemon since one had it.
        self.redirects = 0
        #: Until when a daemon that does not know it is asked again: it is on its way there.
        self.awaited_until = 0.0
        #: Where it is, as this connection's daemon has answered the OPEN, and until when it waits to be followed.
        self._elsewhere: str | None = None
        self._kept_until = math.inf
        # of the wait for an answer
        #: The daemon's last refusal that is waited out; empty when there was none, or it is over.
        self.trouble = ""
        self.retry_at = 0.0
        #: When the first of its records that wait will be late, as far as was looked for.
        self.late_at = math.inf
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
            return bool(self.backlog.in_flight or self.backlog.errors_to_come or self._closing)
        return self.phase is Phase.OPENING

    # --- what a user asks for ---

    def submit(self, record: Record) -> None:
        """Take one more record, to be sent after all before it."""
        if self.error is not None:
            self._answers.append(Answer(record.token, None, self.error))
        elif self._close_tokens:
            self._answers.append(Answer(record.token, None, RecurdError(f"stream '{self.stream}' is being closed")))
        else:
            self.backlog.waiting.append(record)

    def close(self, token: Any) -> None:
        """Close the stream once everything before is answered. A stream whose state is lost is closed already."""
        if self.phase is Phase.ENDED:
            self._answers.append(Answer(token, None, self.error if _stands(self.error) else None))
        else:
            self._close_tokens.append(token)

    # --- the connection ---

    def detach(self) -> None:
        """What was in flight on this attachment is unanswered; the stream has to be opened again."""
        if self.phase is not Phase.ENDED:
            self.phase = Phase.DETACHED
        self.backlog.forget_answers()
        self._closing = False

    def disconnected(self) -> None:
        """The connection is gone, and with it every answer that had not arrived."""
        self._opens_lost += self.phase is Phase.OPENING
        self.detach()
        self._reopened = False
        if self._elsewhere is not None:  # the next daemon is asked at once
            self._elsewhere, self.retry_at = None, 0.0

    def follows(self, redirects: int) -> bool:
        """Whether it is to be followed to another daemon once more: not, when they send it back and forth."""
        self.redirects += 1
        return self.redirects <= redirects

    def sent_on(self, error: Refused, now: float, seconds: float) -> None:
        """An ERROR came for the OPEN: another daemon has it. It waits so long until its client can go there."""
        if self.phase is not Phase.OPENING:
            return
        self.phase = Phase.DETACHED
        self._elsewhere = error.endpoint
        self._kept_until = min(self._kept_until, now + seconds)
        if now < self._kept_until:
            self._wait(error, now, KEPT_SECONDS)
        else:
            text = f"{error.text}, and its client has streams that are not; use another client for it"
            self.end(Refused(Code.MOVED, text, endpoint=error.endpoint, server_key=error.server_key, group=error.group))

    def goes_to(self, endpoint: str | None) -> bool:
        """Whether that daemon has it, as far as this connection's has said."""
        return self._elsewhere == endpoint

    def open_frame(self, request_id: int, now: float, group: str | None = None) -> bytes:
        """The OPEN for this connection: the user's own until it was answered once, then one that only resumes.

        ``group``: what the daemon said that has sent us here.
        """
        self.phase = Phase.OPENING
        self.progress_at = now
        request = msgspec.structs.replace(self._request, group=group)
        if self.is_open:
            request = msgspec.structs.replace(request, mode="resume", generation=self.backlog.generation)
        body = msgspec.json.encode(request)
        return wire.pack(wire.Type.OPEN, size=len(body), seq=request_id, ack=self.backlog.last_seq) + body

    def opened(self, header: wire.Header, body: wire.Opened, signature: Signature, now: float) -> None:
        """OPENED came."""
        if self.phase is not Phase.OPENING:
            return
        first = not self.is_open
        if not first and (trouble := self._lost_since(body, header.handle)):
            self.end(trouble)
            return
        self.phase = Phase.ATTACHED
        self.redirects, self.awaited_until = 0, 0.0
        self._elsewhere, self._kept_until = None, math.inf
        self.signature, self.handle, self.max_chunk_steps = signature, header.handle, body.max_chunk_steps
        self._credit = self._window = body.credit
        self.trouble = ""
        self.progress_at = now
        if first:
            self.backlog.start(body.last_seq, body.generation)
            self.fresh = body.fresh
            self._answers.append(Answer(self._open_token, None, None))
            self._open_token = None

    def went_over(self, signature: Signature) -> None:
        """An OPENED came that was not asked for: the stream goes by another version of its model from now on."""
        self.signature = signature

    def _lost_since(self, body: wire.Opened, handle: int) -> RecurdError | None:
        """Why the stream that was opened is not the one we had; ``None`` when it is."""
        if handle != self.handle:
            # A handle names one life of a stream: the daemon was restarted, and another client came first.
            text = _forgotten(self.stream) + "; another client has started it afresh since"
            return Broken(Code.UNKNOWN_STREAM, text, generation=body.generation, last_seq=body.last_seq)
        if body.last_seq >= self.backlog.next_seq:
            return self._taken_over()
        expected = self.backlog.generation_after(body.last_seq)
        if expected is None:
            text = f"the daemon knows '{self.stream}' up to chunk {body.last_seq} only, later ones were answered"
            return Broken(Code.UNKNOWN_STREAM, text, generation=body.generation, last_seq=body.last_seq)
        if body.generation != expected:
            text = f"stream '{self.stream}' was started afresh by another client"
            return Broken(Code.STALE, text, generation=body.generation, last_seq=body.last_seq)
        return None

    def _taken_over(self) -> Refused:
        return Refused(Code.DETACHED, f"another client has written to stream '{self.stream}' since")

    def open_refused(self, error: Refused | Broken, now: float) -> None:
        """An ERROR came for the OPEN."""
        if self.phase is not Phase.OPENING:
            return
        self.phase = Phase.DETACHED
        if isinstance(error, Broken):
            self.end(error)
        elif (
            error.is_passing
            or (self.is_open and error.code in (Code.DRAINING, Code.INTERNAL))
            or (error.code is Code.UNKNOWN_STREAM and now < self.awaited_until)
        ):
            self._wait(error, now)
        else:
            self.end(self._not_resumed(error) if self.is_open else error)

    def _not_resumed(self, error: Refused) -> RecurdError:
        """The error of a stream that was open and is not opened again. Who uses it never asked to resume it."""
        if error.code is Code.FORBIDDEN:
            return error  # it is there still
        if error.code is Code.UNKNOWN_STREAM and self.awaited_until:
            return Unanswered(
                f"stream '{self.stream}' has not come to the daemon that its client was sent to; it may still be where "
                f"it was"
            )
        if error.code is Code.UNKNOWN_STREAM:
            return Broken(error.code, f"{_forgotten(self.stream)}; open it again to start afresh")
        return _broken(error)

    def _wait(self, error: Refused, now: float, seconds: float = RETRY_SECONDS) -> None:
        """Try again later, and with less at once: what cannot be taken should not come again and again in full.

        ``seconds``: how much later, where the daemon does not say.
        """
        self.trouble = str(error)
        self._window = max(1, self._window // 2)
        self.retry_at = now + (error.retry_after_seconds or seconds)

    # --- sending ---

    def records_to_send(self, now: float) -> Iterator[wire.Record]:
        """Everything that may go out now."""
        if self.phase is not Phase.ATTACHED or now < self.retry_at:
            return
        if not self.backlog.in_flight:
            self.progress_at = now
        for seq, record in self.backlog.to_send(self._window, now):
            record.sent += 1
            yield self._packed(seq, record, now)
        if self.backlog.late:
            self._fail_late()

    def drop_late(self, now: float) -> None:
        """Fail what waits here and is late."""
        self.late_at = self.backlog.drop_late(now)
        self._fail_late()

    def _fail_late(self) -> None:
        late, self.backlog.late = self.backlog.late, []
        text = "the chunk could not be sent within the time it gave"
        self._answers.extend(Answer(record.token, None, Refused(Code.LATE, text)) for record in late)

    def _packed(self, seq: int, record: Record, now: float) -> wire.Record:
        payload = record.payload
        header = wire.pack(
            payload.type,
            flags=payload.flags | record.attempt,
            code=0 if record.starts_by == math.inf else _milliseconds(record.starts_by - now),
            dtype=payload.dtype,
            size=len(payload.data),
            steps=payload.steps,
            width=payload.width,
            generation=record.generation,
            handle=self.handle,
            seq=seq,
            ack=self.backlog.last_seq,
        )
        return header, payload.data

    @property
    def close_is_due(self) -> bool:
        """Whether a CLOSE is wanted and its time has come. Nothing may be in flight before: it could come back."""
        if not self._close_tokens or self._closing or self.phase is not Phase.ATTACHED:
            return False
        return not (self.backlog.in_flight or self.backlog.waiting or self.backlog.errors_to_come)

    def close_frame(self, request_id: int, now: float) -> bytes:
        """The CLOSE."""
        self._closing = True
        self.progress_at = now
        generation, ack = self.backlog.generation, self.backlog.last_seq
        return wire.pack(wire.Type.CLOSE, generation=generation, handle=self.handle, seq=request_id, ack=ack)

    def send_again(self, now: float, max_stall_seconds: float) -> None:
        """Nothing that was sent before will be answered any more: send it once again."""
        self.progress_at = now
        self.patience_seconds = min(2 * self.patience_seconds, max_stall_seconds)
        if self.phase is Phase.OPENING:
            self.phase = Phase.DETACHED
        self._closing = False
        self.backlog.forget_answers()

    # --- answers ---

    def answered(self, header: wire.Header, payload: wire.Buffer, now: float) -> None:
        """RESULT, DONE or STATE_OF came. One that is not awaited (any more) is dropped."""
        record = self.backlog.in_flight.get(header.seq)
        if record is None:
            return
        if self._is_not_ours(header, record):
            self.end(self._taken_over(), header.seq)
            return
        assert self.signature is not None  # set with the first OPENED
        if self.signature.is_foreign(record.payload, payload) and not self._reopened:
            # The stream goes by another version of its model, and we were not told, or what told us was lost.
            self._reopened = True
            self.detach()
            return
        self.backlog.answered(header.seq)
        self._progressed(now)
        self._reopened = False
        if now >= self.retry_at:
            self.trouble = ""
        if self._window < self._credit:
            self._window += 1
        is_chunk, is_fresh = header.type == wire.Type.RESULT, bool(header.flags & _FRESH)
        self.fresh = is_fresh and not is_chunk
        if is_chunk:
            self.last_fresh = is_fresh
        try:
            self._answers.append(Answer(record.token, self.signature.value(record.payload, header, payload), None))
        except Refused as error:
            self._answers.append(Answer(record.token, None, error))

    def _progressed(self, now: float) -> None:
        self.progress_at = now
        self.patience_seconds = self._stall_seconds

    def _is_not_ours(self, header: wire.Header, record: Record) -> bool:
        """Whether somebody else's record ran under this number: no code says so, but this gives it away."""
        sent = record.payload
        if header.type != wire.ANSWERS[sent.type] or header.generation != record.generation + sent.starts_afresh:
            return True
        return bool(header.flags & _GONE or (header.flags & _DUPLICATE and record.sent == 1))

    def refused(self, seq: int, attempt: int, error: Refused | Broken, now: float) -> None:
        """An ERROR came for record ``seq``, as it was sent at ``attempt``."""
        backlog = self.backlog
        if seq in backlog.errors_to_come:
            backlog.errors_to_come.discard(seq)
            return
        record = backlog.in_flight.get(seq)
        if record is None or self.phase is not Phase.ATTACHED:
            return
        if attempt != record.attempt and not isinstance(error, Broken):
            # It was sent again meanwhile. That one has an answer of its own, and may be accepted.
            return
        self._progressed(now)
        if isinstance(error, Broken) or _is_cut_off(error, record):
            self.end(error, seq)
        elif error.code in _LOST:
            self.end(_broken(error))
        elif error.code in (Code.UNKNOWN_HANDLE, Code.DETACHED):
            self._open_again(error, seq)
        elif error.code is Code.GAP:
            self._missed(error.expected or 0, seq)
        elif error.is_passing:
            self._wait(error, now)
            backlog.put_back(seq, seq)
        else:
            backlog.put_back(seq, seq)
            backlog.waiting.popleft()
            in_doubt = error.code is Code.FORBIDDEN and record.sent > 1
            self._answers.append(Answer(record.token, None, _in_doubt(error) if in_doubt else error))
            if error.code is Code.STATE_MISMATCH:
                self.detach()  # opening again tells which version of the model the stream goes by

    def _missed(self, expected: int, seq: int) -> None:
        """The daemon has not got everything we sent before ``seq``."""
        if expected in self.backlog.in_flight:
            self.backlog.put_back(expected, seq)
        else:
            text = f"the daemon waits for chunk {expected} of '{self.stream}', which was answered before"
            self.end(Broken(Code.UNKNOWN_STREAM, text))

    def _open_again(self, error: Refused, seq: int) -> None:
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
            self.end(error, seq)
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
        elif error.is_passing:
            self._wait(error, now)
        else:
            self._finish(error, told=error)

    def end(self, error: RecurdError, refused: int | None = None) -> None:
        """There is no stream any more: everything that waits fails with ``error``, and so does everything to come.

        ``refused``: number of the record that the daemon has refused with it, and so those behind.
        """
        if self.phase is Phase.ENDED:
            return
        if self._open_token is not None:
            self._answers.append(Answer(self._open_token, None, error))
            self._open_token = None
        maybe_run = self._maybe_run(error, refused)
        for record in self.backlog.clear():
            self._answers.append(Answer(record.token, None, _in_doubt(error) if record in maybe_run else error))
        # A stream that is lost is closed; one that nobody answered for may be there still, one that is not ours is.
        self._finish(error, told=error if _stands(error) else None)

    def _maybe_run(self, error: RecurdError, refused: int | None) -> set[Record]:
        """Records that may have been run: that the stream is not ours any more says nothing of what was accepted."""
        if not _goes_on_without_us(error):
            return set()
        in_flight = self.backlog.in_flight.items()
        return {record for seq, record in in_flight if refused is None or seq < refused or record.sent > 1}

    def _finish(self, error: RecurdError, told: RecurdError | None = None) -> None:
        """``error`` is for what is asked of the stream from now on, ``told`` for those who asked to close it."""
        self._answers.extend(Answer(token, None, told) for token in self._close_tokens)
        self._close_tokens.clear()
        self.trouble = ""
        self.phase = Phase.ENDED
        self.error = error


def _milliseconds(seconds: float) -> int:
    """A CHUNK's ``code``. One that goes again late still says that it does not wait for ever."""
    return min(max(int(seconds * 1000), 1), 0xFFFF)


def _is_cut_off(error: Refused, record: Record) -> bool:
    """Whether the stream is not ours any more, and what is in flight may have been run before."""
    return error.code is Code.FORBIDDEN and record.sent > 1 and record.payload.type is wire.Type.CHUNK


def _goes_on_without_us(error: RecurdError | None) -> bool:
    """Whether it says that the stream goes on without us."""
    return isinstance(error, Refused) and error.code in _NOT_OURS


def _stands(error: RecurdError | None) -> bool:
    """Whether a stream that has ended for us by this may be there still: then it was not closed."""
    return isinstance(error, Unanswered) or _goes_on_without_us(error)


def _in_doubt(error: RecurdError) -> Unanswered:
    return Unanswered(f"{error}; what had been sent by then may have been run")


def _forgotten(stream: str) -> str:
    return f"the daemon was restarted (or forgot the stream), the state of stream '{stream}' is lost"


def _broken(error: Refused) -> Broken:
    return Broken(error.code, error.text)
