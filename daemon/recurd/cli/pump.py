"""The loop of ``recurd stream``: rows in, chunks out, predictions printed."""

import contextlib
import os
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import BinaryIO, NamedTuple

import click
import numpy as np

from recurd.cli.output import discard_output
from recurd.cli.rows import CsvReader, InputError, JsonReader, Number, PredictionWriter
from recurd.client import Stream
from recurd.errors import Code, RecurdError, Refused, Unanswered
from recurd.signature import Result

_READ_BYTES = 65_536
#: Chunks sent and not answered; more rows are not read until some are.
_MAX_PENDING = 64


class _Unwritten(RecurdError):
    """The predictions cannot be written; the text says how far the stream went."""


class _Pending(NamedTuple):
    """A chunk on its way, and where its rows stood."""

    future: "Future[Result]"
    first_line: int
    last_line: int
    sent_at: float


class Pump:
    """Rows in, chunks out, predictions printed. Owns the rows that wait and the chunks on their way.

    One loop waits for whatever comes first: rows, an answer (told by a byte in a pipe), or the end of whoever reads us.
    A row that cannot be sent, or is refused, ends the reading; what was sent is still waited for and printed. Rows that
    are late are left out.
    """

    def __init__(
        self,
        stream: Stream,
        source: BinaryIO,
        rows: CsvReader | JsonReader,
        predictions: PredictionWriter,
        *,
        chunk_steps: int,
        expires_seconds: float | None,
        timeout_seconds: float,
    ) -> None:
        self._stream = stream
        self._reader = rows
        self._predictions = predictions
        self._chunk_steps = min(chunk_steps, stream.max_chunk_steps)
        self._exact = not stream.signature.chunk_local
        self._expires_seconds = expires_seconds
        self._timeout_seconds = timeout_seconds
        self._source = source.fileno()
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_in.setblocking(False)
        self._rest = b""
        self._ended = False
        self._rows: list[list[Number]] = []
        self._first_line = self._last_line = 0
        self._pending: deque[_Pending] = deque()
        #: Line of the last row whose prediction was printed; 0 before the first.
        self._answered = 0
        #: When anything was answered last.
        self._answered_at = 0.0
        #: And of the last row that was sent.
        self._sent = 0
        #: Why reading ended early.
        self._trouble: RecurdError | None = None

    def __enter__(self) -> "Pump":
        return self

    def __exit__(
        self, type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._wake_in.close()
        self._wake_out.close()

    def run(self, advance: Callable[[int], None], *, header: bool) -> None:
        """Until the last row is answered.

        Raises BrokenPipeError when nobody reads the predictions any more, and else :class:`RecurdError` that says up to
        which line rows were answered.
        """
        try:
            if header:
                self._print(self._predictions.header())
            while self._rows or self._pending or not self._ended:
                if self._wait():
                    advance(self._read())
                self._collect()
                self._send()
        except _Unwritten:
            raise
        except Unanswered as error:
            raise Unanswered(f"{error}; {self._place()}") from error
        except RecurdError as error:  # the state is lost
            raise RecurdError(f"{error}; {self._place()}") from error
        if self._trouble is not None:
            raise self._placed(self._trouble)

    def _place(self) -> str:
        return f"rows up to line {self._answered} were answered" if self._answered else "no row was answered"

    def _placed(self, trouble: RecurdError) -> RecurdError:
        """What ended the reading, and where to go on."""
        if not isinstance(trouble, InputError):
            return RecurdError(f"{trouble}; {'the other ' if self._answered else ''}{self._place()}")
        if not self._answered:
            return trouble
        return InputError(f"{trouble}; {self._place()}; go on from line {self._answered + 1}")

    def _stop_reading(self, trouble: RecurdError) -> None:
        self._ended = True
        self._trouble = trouble
        if self._exact or not isinstance(trouble, InputError):
            self._rows = []  # short of a chunk, or behind rows that are missing in the state

    # --- what the loop does ---

    def _wait(self) -> bool:
        """Wait for something to do; whether it is to read. Raises BrokenPipeError when nobody reads us any more."""
        wants_rows = not self._ended and len(self._pending) < _MAX_PENDING
        poll = select.poll()
        poll.register(self._wake_out, select.POLLIN)
        poll.register(sys.stdout.fileno(), 0)  # errors are told unasked
        if wants_rows:
            poll.register(self._source, select.POLLIN)
        events = dict(poll.poll(self._milliseconds()))
        if self._wake_out.fileno() in events:
            self._wake_out.recv(4096)
        if events.get(sys.stdout.fileno(), 0) & select.POLLERR:
            raise BrokenPipeError
        return wants_rows and self._source in events

    def _milliseconds(self) -> float | None:
        if not self._pending:
            return None
        # One that is held to so many chunks a second waits long for the last of many, and all goes well.
        left = max(self._pending[0].sent_at, self._answered_at) + self._timeout_seconds - time.monotonic()
        if left <= 0:
            pending = self._pending[0]
            text = f"{_lines(pending)} were not answered within {self._timeout_seconds:g} s"
            raise Unanswered("; ".join(filter(None, [text, self._stream.trouble])))
        return 1000 * left

    def _read(self) -> int:
        """Take what there is; the number of bytes."""
        data = os.read(self._source, _READ_BYTES)
        self._ended = not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        if self._ended and self._rest:
            lines.append(self._rest)  # the last row lacks its line feed
        try:
            for line in lines:
                self._take(line)
        except InputError as error:
            self._stop_reading(error)
        return len(data)

    def _take(self, line: bytes) -> None:
        try:
            text = line.decode("utf-8-sig" if self._reader.line == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"line {self._reader.line + 1}: not UTF-8") from error
        row = self._reader.read(text)
        if row is not None:
            self._last_line = self._reader.line
            self._first_line = self._first_line or self._last_line
            self._rows.append(row)
            if len(self._rows) == self._chunk_steps:
                self._submit()

    def _send(self) -> None:
        """Send rows that do not fill a chunk when nothing else is to come soon.

        That is at the end, or when every chunk sent is answered and the source has paused. While answers are awaited,
        rows gather into larger chunks by themselves.
        """
        if self._rows and (self._ended or not (self._exact or self._pending or self._has_more())):
            self._submit()

    def _has_more(self) -> bool:
        poll = select.poll()
        poll.register(self._source, select.POLLIN)
        return bool(poll.poll(0))

    def _submit(self) -> None:
        chunk = np.array(self._rows).reshape(-1, *self._stream.signature.shape)
        future = self._stream.submit(
            chunk, timeout_seconds=self._timeout_seconds, expires_seconds=self._expires_seconds
        )
        self._pending.append(_Pending(future, self._first_line, self._last_line, time.monotonic()))
        future.add_done_callback(self._wake)
        self._sent = self._last_line
        self._rows = []
        self._first_line = 0

    def _wake(self, future: "Future[Result]") -> None:
        with contextlib.suppress(OSError):  # awake already, or gone
            self._wake_in.send(b"\0")

    def _collect(self) -> None:
        """Print what has been answered, in order."""
        while self._pending and self._pending[0].future.done():
            pending = self._pending.popleft()
            self._answered_at = time.monotonic()
            try:
                result = pending.future.result()
            except Refused as error:
                if error.code is Code.LATE:
                    click.echo(f"recurd: {_lines(pending)} were late and not run", err=True)
                elif self._trouble is None or isinstance(self._trouble, InputError):
                    self._stop_reading(RecurdError(f"{_lines(pending)} were refused: {error}"))
                continue
            self._print(self._predictions.lines(result))
            self._answered = pending.last_line

    def _print(self, text: str) -> None:
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            discard_output()
            gone = f"rows up to line {self._sent} were sent, and the stream goes on behind them"
            text = f"the predictions cannot be written: {error.strerror}; {gone if self._sent else 'no row was sent'}"
            raise _Unwritten(text) from error


def _lines(pending: _Pending) -> str:
    return f"lines {pending.first_line} to {pending.last_line}"
