"""One connection of the load generator: frames out and in, and the control messages around the load.

Unlike :mod:`recurd.client` it does not reconnect, resend or keep anything: a fault is to be seen, not healed.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence

import zmq

from recurd import wire
from recurd.errors import Code, Refused, Unanswered
from recurd.keys import Credentials

#: Control messages in flight on a connection: below every high-water mark.
_CONTROL_BATCH = 256
#: Frames taken before the next connection is looked at.
_DRAIN_FRAMES = 256
#: Streams left behind by a run that was killed are gone after this.
_IDLE_SECONDS = 120.0
_CLOSE_SECONDS = 5.0


class Connection:
    """One DEALER socket. Owned by the run."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        timeout_seconds: float,
        credentials: Credentials | None = None,
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._endpoint = endpoint
        self.socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDTIMEO, int(timeout_seconds * 1000))
        for option, value in credentials.options().items() if credentials is not None else ():
            self.socket.setsockopt(option, value)
        self.socket.connect(endpoint)

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()

    def hello(self) -> wire.Welcome:
        """Say HELLO."""
        body = wire.Hello(client="recurd bench", multi=True)
        ((header, payload),) = self.ask([wire.control(wire.Type.HELLO, body, seq=1)], self._timeout_seconds)
        _raise_error(header, payload)
        return wire.decode_body(payload, wire.Welcome)

    def open(self, names: list[str], model: str, opened: list[wire.Header]) -> None:
        """Open streams anew. ``opened`` gets their headers, in order, also when a refusal is raised."""
        for start in range(0, len(names), _CONTROL_BATCH):
            bodies = [
                wire.Open(stream=name, model=model, mode="new", idle_timeout_seconds=_IDLE_SECONDS)
                for name in names[start : start + _CONTROL_BATCH]
            ]
            records = [wire.control(wire.Type.OPEN, body, seq=seq) for seq, body in enumerate(bodies)]
            answers = sorted(self.ask(records, self._timeout_seconds), key=lambda answer: answer[0].seq)
            opened += [header for header, _ in answers if header.type == wire.Type.OPENED]
            for header, payload in answers:
                _raise_error(header, payload)

    def close_streams(self, opened: list[wire.Header]) -> None:
        """Close streams, the results still under way not read."""
        for start in range(0, len(opened), _CONTROL_BATCH):
            part = opened[start : start + _CONTROL_BATCH]
            records = [
                (wire.pack(wire.Type.CLOSE, handle=h.handle, generation=h.generation, seq=seq), b"")
                for seq, h in enumerate(part)
            ]
            self.ask(records, min(self._timeout_seconds, _CLOSE_SECONDS))

    def ask(self, records: Sequence[wire.Record], seconds: float) -> list[tuple[wire.Header, memoryview]]:
        """Send control messages and wait for as many answers; results in between are left unread."""
        for record in records:
            self.send(wire.frame(record))
        answers: list[tuple[wire.Header, memoryview]] = []
        end = time.monotonic() + seconds
        while len(answers) < len(records):
            if not self.socket.poll(max(0, int((end - time.monotonic()) * 1000))):
                raise self.unanswered()
            header, payload = wire.decode(self.socket.recv())
            if header.type == wire.Type.WELCOME and not header.seq:
                continue  # nobody asked for it: a model was replaced
            if header.type in _CONTROL_ANSWERS and not (header.type == wire.Type.ERROR and _is_of_record(payload)):
                answers.append((header, payload))
        return answers

    def send(self, frame: bytes) -> None:
        """Send one frame, waiting a bounded time for room."""
        try:
            self.socket.send(frame)
        except zmq.Again as error:
            raise self.unanswered() from error

    def receive(self) -> Iterator[bytes]:
        """What has come, up to a bound."""
        with contextlib.suppress(zmq.Again):
            for _ in range(_DRAIN_FRAMES):
                yield self.socket.recv(zmq.NOBLOCK)

    def unanswered(self) -> Unanswered:
        """What to raise when nothing comes."""
        return Unanswered(f"no answer from {self._endpoint} within {self._timeout_seconds:g} s")


_CONTROL_ANSWERS = frozenset({wire.Type.WELCOME, wire.Type.OPENED, wire.Type.CLOSED, wire.Type.ERROR})


def _is_of_record(payload: memoryview) -> bool:
    return wire.decode_body(payload, wire.Error).in_reply_to in (wire.Type.CHUNK, wire.Type.MULTI)


def _raise_error(header: wire.Header, payload: memoryview) -> None:
    if header.type == wire.Type.ERROR:
        body = wire.decode_body(payload, wire.Error)
        raise Refused(Code(header.code), body.text)
