"""The client's side of the protocol: frames and `now` in, frames and answers out. No zmq, threads, asyncio or clock.

:mod:`recurd.client` and :mod:`recurd.aio` drive it through :class:`recurd.link.Link`: after every call that hands
something in they send ``frames_to_send(now)``, resolve ``take_answers()``, and call again at ``deadline()``. Streams
and their numbers are :mod:`recurd.writer`'s; this module knows the connection: hello, ping, which message is whose.

::

    IDLE --connected--> GREETING --WELCOME--> READY
      ^                    |                    |
      +---- connection lost, silent, or the daemon does not know it ----+
"""

import heapq
import math
from collections.abc import Iterable
from enum import Enum
from typing import Any, NamedTuple

import msgspec

from recurd import __version__, wire
from recurd.backlog import Record
from recurd.errors import BREAKING, Broken, Code, RecurdError, Refused
from recurd.signature import Signature
from recurd.writer import Answer, Phase, Writer

#: Records are joined into frames of about this size: more brings nothing, and holds up the stream that comes last.
JOIN_BYTES = 256 * 1024
#: Codes of a HELLO's ERROR after which it is said again.
_HELLO_AGAIN = frozenset({Code.BUSY, Code.DRAINING, Code.INTERNAL, Code.HELLO_REQUIRED})

#: What an ERROR about a connection or a stream as a whole replies to: nothing, or no more than a PING.
_UNASKED = frozenset({0, wire.Type.PING})

_ANSWERS = frozenset(wire.ANSWERS.values())


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The session's patience."""

    #: A connection that has not answered a HELLO or PING for this long is given up and made anew.
    liveness_seconds: float = 10.0
    #: What the daemon has not answered for this long is asked for again (twice as long the next time).
    stall_seconds: float = 5.0
    max_stall_seconds: float = 60.0
    #: Pause before a connection is made anew: the first, and the longest it doubles to while none holds.
    reconnect_seconds: float = 0.05
    max_reconnect_seconds: float = 1.0
    #: How often a stream is followed from one daemon to another before one of them has it.
    redirects: int = 8
    #: How long a stream that we had is waited for at the daemon that we were sent to.
    follow_seconds: float = 30.0


class _State(Enum):
    IDLE = "idle"
    GREETING = "greeting"
    READY = "ready"
    ENDED = "ended"


class _Ping(NamedTuple):
    """A PING that is not answered yet; what stood still then will not be answered after its PONG."""

    request_id: int
    sent_at: float
    stalled: list[Writer]


class Session:
    """One client's dialogue with a daemon over as many connections as it takes. Owns the writers of its streams."""

    def __init__(self, token: Any, now: float, limits: Limits | None = None) -> None:
        """``token`` waits for the first WELCOME."""
        self.limits = limits or Limits()
        self.welcome: wire.Welcome | None = None
        self.error: RecurdError | None = None
        #: What is the matter with connections that never come to be; empty once one has.
        self.trouble = ""
        #: What a daemon has answered the last HELLO with, that did not let us in yet.
        self.refusal: Refused | None = None
        self._answers: list[Answer] = []
        self._writers: dict[str, Writer] = {}
        self._signatures: dict[str, Signature] = {}
        self._welcome_tokens = [token]
        self._last_request_id = 0
        # connections
        #: Where a daemon has sent us on to; ``None``: nowhere, so far.
        self.redirect: Refused | None = None
        self.connections = 0
        self._state = _State.IDLE
        self._connect_at = now
        self._pause = self.limits.reconnect_seconds
        # of the present connection
        self._control: list[bytes] = []
        self._requests: dict[int, Writer] = {}
        self._by_handle: dict[int, Writer] = {}
        self._hello_id = 0
        self._ping: _Ping | None = None
        self._sent_at = now
        self._look_at = now
        # in flight
        self._ready: dict[Writer, None] = {}  # those that may have something to send, in order
        self._paused: dict[Writer, None] = {}  # those that wait for their retry_at
        self._watched: list[tuple[float, int, Writer]] = []  # a heap: those with chunks that may be late before they go
        self._watches = 0

    # --- work handed in ---

    def open(self, request: wire.Open, token: Any) -> Writer:
        """Open a stream; ``token`` is answered when the daemon has."""
        writer = Writer(request, token, self._answers, self.limits.stall_seconds)
        if self.error is not None:
            writer.end(self.error)
        elif request.stream in self._writers:
            writer.end(RecurdError(f"stream '{request.stream}' is open on this client already"))
        else:
            self._writers[request.stream] = writer
            self._ready[writer] = None
        return writer

    def submit(self, writer: Writer, records: Iterable[Record]) -> None:
        """Send records of a stream, in order, after those before."""
        for record in records:
            writer.submit(record)
            if record.starts_by < writer.late_at:
                self._watch(writer, record.starts_by)
        self._ready[writer] = None

    def close(self, writer: Writer, token: Any) -> None:
        """Close a stream when everything before is answered."""
        writer.close(token)
        self._ready[writer] = None

    def give_up(self, writer: Writer, error: RecurdError) -> None:
        """Forget a stream without asking the daemon; what waits fails with ``error``."""
        writer.end(error)
        self._settle(writer)

    def end(self, error: RecurdError) -> None:
        """Forget everything; what waits, and what is asked from now on, fails with ``error``."""
        self.error = self.error or error
        self._state = _State.ENDED
        self._answers += [Answer(token, None, error) for token in self._welcome_tokens]
        self._welcome_tokens.clear()
        for writer in list(self._writers.values()):
            self.give_up(writer, error)

    # --- the connection ---

    def wants_connection(self, now: float) -> bool:
        """Whether a new connection is to be made now."""
        return self._state is _State.IDLE and now >= self._connect_at

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection to keep."""
        return self._state in (_State.GREETING, _State.READY)

    @property
    def is_ready(self) -> bool:
        """Whether the daemon has welcomed us on the present connection."""
        return self._state is _State.READY

    def connected(self, now: float) -> None:
        """A new connection is there (or being made; frames may be sent on it at once)."""
        self.connections += 1
        self._state = _State.GREETING
        self._sent_at = now
        self._hello_id = self._request_id()
        self._send(wire.Type.HELLO, wire.Hello(client=f"recurd-python/{__version__}", multi=True), self._hello_id)

    def disconnected(self, now: float) -> None:
        """The connection is gone; frames on their way either way are lost."""
        if not self.is_connected:
            return
        self._state = _State.IDLE
        self._connect_at = now + self._pause
        self._pause = min(2 * self._pause, self.limits.max_reconnect_seconds)
        self._control.clear()
        self._requests.clear()
        self._by_handle.clear()
        self._ping = None
        for writer in self._writers.values():
            writer.disconnected()

    def _request_id(self) -> int:
        self._last_request_id += 1
        return self._last_request_id

    def _send(self, type: wire.Type, body: Any, request_id: int) -> None:
        self._control.append(wire.frame(wire.control(type, body, seq=request_id)))

    # --- frames out ---

    def frames_to_send(self, now: float) -> list[bytes]:
        """Everything that is to leave now, in order. Empty without a connection."""
        self._keep_time(now)
        if not self.is_connected:
            return []
        records: list[wire.Record] = []
        if self._state is _State.READY:
            ready, self._ready = self._ready, {}
            for writer in ready:
                self._attend(writer, records, now)
        frames, self._control = self._control, []
        if records:
            assert self.welcome is not None  # the state is READY
            frames += wire.multi_frames(records, min(JOIN_BYTES, self.welcome.max_message_bytes))
        if frames:
            self._sent_at = now
        return frames

    def _attend(self, writer: Writer, records: list[wire.Record], now: float) -> None:
        """Collect what one stream has to send."""
        if now < writer.retry_at:
            self._paused[writer] = None
        elif writer.phase is Phase.DETACHED:
            request_id = self._request_id()
            self._requests[request_id] = writer
            group = None if self.redirect is None else self.redirect.group
            self._control.append(writer.open_frame(request_id, now, group))
        else:
            records.extend(writer.records_to_send(now))
            if writer.close_is_due:
                request_id = self._request_id()
                self._requests[request_id] = writer
                self._control.append(writer.close_frame(request_id, now))

    # --- time ---

    def deadline(self) -> float | None:
        """When ``frames_to_send`` (or, without a connection, ``connected``) has to be called even if nothing came."""
        if self._state is _State.ENDED:
            return None
        if self._state is _State.IDLE:
            return self._connect_at
        if self._state is _State.GREETING:
            return min(self._sent_at + self.limits.liveness_seconds, self._late_at)
        return min([self._look_at, self._late_at, *(writer.retry_at for writer in self._paused)])

    @property
    def _late_at(self) -> float:
        """When to look for chunks that wait here and are late."""
        return self._watched[0][0] if self._watched else math.inf

    def _watch(self, writer: Writer, late_at: float) -> None:
        """Look at a writer's waiting records then; each stands in the heap once, or a few times where they differ."""
        writer.late_at = late_at
        self._watches += 1
        heapq.heappush(self._watched, (late_at, self._watches, writer))

    def _drop_late(self, now: float) -> None:
        while self._late_at <= now:
            late_at, _, writer = heapq.heappop(self._watched)
            if late_at == writer.late_at:
                writer.drop_late(now)
                self._settle(writer)
                if writer.late_at < math.inf:
                    self._watch(writer, writer.late_at)

    def _keep_time(self, now: float) -> None:
        """Notice what should have come, or gone, by now."""
        self._drop_late(now)
        for writer in [w for w in self._paused if w.retry_at <= now]:
            del self._paused[writer]
            self._ready[writer] = None
        if self._state is _State.GREETING and now >= self._sent_at + self.limits.liveness_seconds:
            self.disconnected(now)
        if self._state is _State.READY and now >= self._look_at:
            self._look_around(now)

    def _look_around(self, now: float) -> None:
        """Once in a while: ping what is silent, and give up a connection that does not answer."""
        assert self.welcome is not None  # the state is READY
        if self._ping is not None and now >= self._ping.sent_at + self.limits.liveness_seconds:
            self.disconnected(now)
            return
        keep_alive = self.welcome.peer_timeout_seconds / 3
        self._look_at = now + min(keep_alive, self.limits.stall_seconds, self.limits.liveness_seconds) / 4
        stalled = [w for w in self._writers.values() if w.awaits_answer and now >= w.progress_at + w.patience_seconds]
        if self._ping is None and (stalled or now >= self._sent_at + keep_alive):
            self._ping = _Ping(self._request_id(), now, stalled)
            self._control.append(wire.pack(wire.Type.PING, seq=self._ping.request_id))

    # --- frames in ---

    def take_answers(self) -> list[Answer]:
        """What was decided since the last call, each request once."""
        answers = self._answers[:]
        self._answers.clear()  # the writers hold this very list
        return answers

    def receive(self, frame: wire.Buffer, now: float) -> None:
        """A frame came on the present connection. Never raises for what is in it."""
        if not self.is_connected:
            return
        try:
            header, payload = wire.decode(frame)
            is_multi = header.type == wire.Type.MULTI
            records = wire.decode_multi(header, payload) if is_multi else [(header, payload)]
            for one, part in records:
                self._receive_one(one, part, now)
        except (Refused, msgspec.MsgspecError):
            # What speaks there does not speak our protocol, or its bytes are damaged; a new connection may be better.
            self.disconnected(now)

    def _receive_one(self, header: wire.Header, payload: wire.Buffer, now: float) -> None:
        if header.type in _ANSWERS:
            writer = self._by_handle.get(header.handle)
            if writer is not None:
                self._pause = self.limits.reconnect_seconds
                writer.answered(header, payload, now)
                self._settle(writer)
        elif header.type == wire.Type.ERROR:
            self._refused(header, wire.decode_body(payload, wire.Error), now)
        elif header.type == wire.Type.OPENED:
            self._opened(header, wire.decode_body(payload, wire.Opened), now)
        elif header.type == wire.Type.CLOSED:
            if writer := self._requests.pop(header.seq, None):
                writer.closed()
                self._settle(writer)
        elif header.type == wire.Type.PONG:
            self._ponged(header.seq, now)
        elif header.type == wire.Type.WELCOME:
            self._told(header, wire.decode_body(payload, wire.Welcome), now)

    def _settle(self, writer: Writer) -> None:
        """After anything came for a stream: it may have more to send, or have ended."""
        if writer.phase is not Phase.ENDED:
            self._ready[writer] = None
        else:
            self._paused.pop(writer, None)
            if self._by_handle.get(writer.handle) is writer:
                del self._by_handle[writer.handle]
            if self._writers.get(writer.stream) is writer:
                del self._writers[writer.stream]

    def _told(self, header: wire.Header, welcome: wire.Welcome, now: float) -> None:
        if header.seq == self._hello_id:
            self._welcomed(welcome, now)
        elif not header.seq and self._state is _State.READY:
            # Unasked: the daemon serves other models from now on. Streams that are open keep their signature until
            # they are told by an OPENED, unasked too, that they go by another.
            self._signatures = {}
            self.welcome = welcome

    def _welcomed(self, welcome: wire.Welcome, now: float) -> None:
        if self._state is not _State.GREETING:
            return
        self._signatures = {}
        self.welcome = welcome
        self.trouble, self.refusal = "", None
        self._state = _State.READY
        self._look_at = now
        self._ready = dict.fromkeys(self._writers.values())
        self._answers += [Answer(token, None, None) for token in self._welcome_tokens]
        self._welcome_tokens.clear()

    def _opened(self, header: wire.Header, body: wire.Opened, now: float) -> None:
        writer = self._requests.pop(header.seq, None) if header.seq else self._by_handle.get(header.handle)
        if writer is None or writer.phase is Phase.ENDED:
            return
        try:
            signature = self._signature(body)
            if not header.seq:
                writer.went_over(signature)
            else:
                self._by_handle[header.handle] = writer
                writer.opened(header, body, signature, now)
        except (KeyError, msgspec.ValidationError) as error:
            writer.end(Refused(Code.BAD_FRAME, f"the contract of model '{body.model}' cannot be read here: {error!r}"))
        self._settle(writer)

    def _signature(self, body: wire.Opened) -> Signature:
        assert self.welcome is not None  # nothing is opened before
        if body.contract is not msgspec.UNSET:
            return Signature(body.contract)  # of a version of the model that was replaced since
        model = body.model
        if model not in self._signatures:
            self._signatures[model] = Signature(self.welcome.models[model])
        return self._signatures[model]

    def _ponged(self, request_id: int, now: float) -> None:
        """Answers do not overtake a PONG: what stood still before its PING and still does was lost on the way."""
        ping = self._ping
        if ping is None or ping.request_id != request_id:
            return
        self._ping = None
        for writer in ping.stalled:
            if writer.awaits_answer and writer.progress_at < ping.sent_at:
                writer.send_again(now, self.limits.max_stall_seconds)
                self._settle(writer)

    def _refused(self, header: wire.Header, body: wire.Error, now: float) -> None:
        error = _error(header, body)
        if header.seq == self._hello_id and body.in_reply_to == wire.Type.HELLO:
            self._hello_refused(error, now)
        elif error.code is Code.HELLO_REQUIRED:
            self.disconnected(now)
        elif isinstance(error, Refused) and error.endpoint is not None:
            self._moved(header, error, now)
        elif error.code is Code.FORBIDDEN and body.in_reply_to in _UNASKED:
            self._cut_off(header.handle, error)
        elif body.in_reply_to in wire.RECORDS:
            if writer := self._by_handle.get(header.handle):
                writer.refused(header.seq, header.flags & wire.ATTEMPT, error, now)
                self._settle(writer)
        elif writer := self._requests.pop(header.seq, None):
            closing = body.in_reply_to == wire.Type.CLOSE
            (writer.close_refused if closing else writer.open_refused)(error, now)
            self._settle(writer)
        elif body.in_reply_to != wire.Type.PING:
            self.disconnected(now)  # a frame of ours was not understood: what stood in it will not be answered

    def _cut_off(self, handle: int, error: Refused | Broken) -> None:
        """A stream is not ours any more, or with handle 0 nothing is: a right or our key was taken away."""
        if not handle:
            self.end(error)
        elif writer := self._by_handle.get(handle):
            writer.end(error)
            self._settle(writer)

    def _moved(self, header: wire.Header, error: Refused, now: float) -> None:
        """A stream is served by another daemon: go there, with all streams."""
        if not self.is_connected:
            return  # it was told for another stream just before
        # One that was open here: those of a connection move together. One that was to be opened: perhaps it alone.
        writer = self._by_handle.get(header.handle) if header.handle else self._requests.pop(header.seq, None)
        if not header.handle and writer is not None:
            writer.sent_on(error, now, self.limits.follow_seconds)
            self._settle(writer)
            others = [one for one in self._writers.values() if not one.goes_to(error.endpoint)]
            if writer.phase is Phase.ENDED or others:
                return  # it waits for these, which may live here
        if writer is not None and not writer.follows(self.limits.redirects):
            writer.end(error)
            self._settle(writer)
            return
        self.redirect = error
        self.disconnected(now)
        if writer is None or writer.redirects == 1:
            self._connect_at = now  # else after a pause: the two are in the middle of something
        for one in self._writers.values():
            one.awaited_until = now + self.limits.follow_seconds

    def _hello_refused(self, error: Refused | Broken, now: float) -> None:
        if isinstance(error, Refused) and error.code in _HELLO_AGAIN:
            self.refusal = error
            self.disconnected(now)
            self._connect_at = max(self._connect_at, now + (error.retry_after_seconds or 0))
        else:
            self.end(error)


def _error(header: wire.Header, body: wire.Error) -> Refused | Broken:
    """The exception an ERROR stands for; a code we do not know is taken by its range."""
    try:
        code, text = Code(header.code), body.text
    except ValueError:
        code = Code.FAILED if 60 <= header.code < 70 else Code.INTERNAL
        text = f"{body.text} ({body.code})"
    if code in BREAKING:
        return Broken(code, text, generation=body.generation, last_seq=body.last_seq)
    return Refused(
        code,
        text,
        expected=body.expected,
        retry_after_seconds=body.retry_after_seconds,
        endpoint=body.endpoint,
        server_key=body.server_key,
        group=body.group,
    )
