"""A daemon, for whoever runs it: ADMIN messages over a connection of one's own.

Commands are such that asking twice does no harm, so on a connection that broke and is there again, or that the daemon
has forgotten, it is greeted again and the command repeated.
"""

import itertools
import time
from types import TracebackType
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from recurd import __version__, wire
from recurd.errors import Code, Refused, Unanswered
from recurd.keys import Credentials
from recurd.link import HANDSHAKE_EVENTS, failed_handshake, no_permission

#: How long to wait before asking again what was answered with ``busy``.
_LEAST_PAUSE_SECONDS = 0.01


class _ConnectedAnew(Exception):
    """The connection broke and is there again, perhaps to another start of the daemon: what was sent may be lost."""


class Remote:
    """One DEALER socket to a daemon. A context manager; for one thread."""

    def __init__(self, endpoint: str, timeout_seconds: float = 30.0, credentials: Credentials | None = None) -> None:
        """``timeout_seconds`` bounds every answer. Raises :class:`Unanswered` without a daemon, :class:`Refused`."""
        self.endpoint = endpoint
        self._timeout_seconds = timeout_seconds
        self._numbers = itertools.count(1)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDTIMEO, int(timeout_seconds * 1000))
        for option, value in credentials.options().items() if credentials is not None else ():
            self._socket.setsockopt(option, value)
        self._credentials = credentials
        self._was_welcome = False
        self._was_connected = False
        self._monitor = self._socket.get_monitor_socket(HANDSHAKE_EVENTS | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        try:
            self._socket.connect(endpoint)
            self.welcome = self._greet(time.monotonic() + timeout_seconds)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Remote":
        return self

    def __exit__(
        self, type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connection."""
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
        self._context.term()

    def ask(
        self, command: str, data: wire.Buffer = b"", *, seconds: float | None = None, **keys: Any
    ) -> tuple[dict[str, Any], memoryview]:
        """Have a command carried out: the REPORT's body, and the data behind it.

        While the daemon is busy it is asked again, until the time-out: ``seconds``, for what takes longer than others.

        Raises:
            Refused: the daemon did not do it; ``code`` says why.
            Unanswered: no answer in time; whether it was done is not known.
        """
        end = time.monotonic() + (self._timeout_seconds if seconds is None else seconds)
        while True:
            number = next(self._numbers)
            record = wire.control_with_data(wire.Type.ADMIN, {"command": command} | keys, data, seq=number)
            try:
                header, payload = self._exchange(record, number, end)
                text, behind = wire.body_and_data(header, payload)
                return wire.decode_body(text, dict[str, Any]), behind
            except _ConnectedAnew:
                self.welcome = self._greet(end)
            except Refused as refusal:
                if refusal.code is Code.HELLO_REQUIRED:
                    self.welcome = self._greet(end)
                    continue
                pause = max(_LEAST_PAUSE_SECONDS, refusal.retry_after_seconds or 0)
                if refusal.code is not Code.BUSY or time.monotonic() + pause >= end:
                    raise  # why it was busy says more than that there was no answer
                time.sleep(pause)

    def _greet(self, end: float) -> wire.Welcome:
        body = wire.Hello(client=f"recurd/{__version__}")
        while True:
            number = next(self._numbers)
            record = wire.control(wire.Type.HELLO, body, seq=number)
            try:
                _, payload = self._exchange(record, number, end)
            except _ConnectedAnew:
                continue
            self._was_welcome = True
            return wire.decode_body(payload, wire.Welcome)

    def _exchange(self, record: wire.Record, number: int, end: float) -> tuple[wire.Header, memoryview]:
        """Send one message and wait for its answer.

        Raises :class:`Refused` for an ERROR, :class:`Unanswered`, :class:`_ConnectedAnew`.
        """
        try:
            self._socket.send(wire.frame(record))
        except zmq.Again as error:
            raise self._unanswered() from error
        while self._has_come(end):
            header, payload = wire.decode(self._socket.recv())
            if header.seq != number:
                continue  # the answer to something that was given up
            if header.type == wire.Type.ERROR:
                raise _error(header, payload)
            return header, payload
        raise self._unanswered()

    def _has_come(self, end: float) -> bool:
        """Wait until then for a message.

        Raises :class:`Refused` when the daemon does not let us in, :class:`_ConnectedAnew`.
        """
        while True:
            milliseconds = max(0, int((end - time.monotonic()) * 1000))
            ready = dict(zmq.zmq_poll([(self._socket, zmq.POLLIN), (self._monitor, zmq.POLLIN)], milliseconds))
            if self._monitor not in ready:
                return bool(ready)
            event = parse_monitor_message(self._monitor.recv_multipart())
            if event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                if self._was_connected:
                    raise _ConnectedAnew
                self._was_connected = True
            error = failed_handshake(event["event"], event["value"], self.endpoint, self._credentials)
            if error is not None:
                raise error

    def _unanswered(self) -> Unanswered:
        text = f"no answer from {self.endpoint} within {self._timeout_seconds:g} s"
        if not self._was_welcome:
            # Whoever of the two reads the other's greeting first hangs up; where that is the daemon we can only guess.
            keys = "does it want keys (--key, --server-key)" if self._credentials is None else "does it take these keys"
            text += f"; {no_permission(self.endpoint) or f'is a daemon there, and {keys}?'}"
        return Unanswered(text)


def _error(header: wire.Header, payload: memoryview) -> Refused:
    body = wire.decode_body(payload, wire.Error)
    try:
        code = Code(header.code)
    except ValueError:
        code = Code.INTERNAL
    return Refused(code, body.text, retry_after_seconds=body.retry_after_seconds, handles=body.handles)
