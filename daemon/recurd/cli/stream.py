"""``recurd stream``: rows from a file or standard input to a daemon, predictions to standard output as they come."""

import contextlib
import os
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import click
import numpy as np

from recurd.cli.rows import CsvReader, Format, InputError, JsonReader, Number, PredictionWriter, reader
from recurd.client import Stream, connect
from recurd.errors import ExitCode, RecurdError, Refused, Unanswered
from recurd.signature import Result

_READ_BYTES = 65_536
#: Chunks sent and not answered; more rows are not read until some are.
_MAX_PENDING = 64

EPILOG = """\b
Examples:
  recurd stream --model pump --stream pump-17 rows.csv > predictions.csv
  tail -f rows.csv | recurd stream --model pump --stream pump-17 --output jsonl
  recurd stream --model chars --stream demo --format jsonl --reset < tokens.jsonl

\b
The first row of CSV names the columns, in any order; where the model's contract names its features the two are
held against each other. JSON lines are objects by feature name or arrays, one a step.
Rows are sent as they come, at most --chunk-steps at once (exactly so many for models whose results depend on
where a chunk ends). The stream's state is kept by the daemon: the next call goes on where this one ended.
\b
Exit codes: 0 all rows were answered, 1 the daemon refused a row or lost the state, 65 a row cannot be read,
69 no daemon or no answer, 130 interrupted.
"""


@click.command(epilog=EPILOG)
@click.argument("file", required=False, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--endpoint", default="tcp://127.0.0.1:7070", show_default=True, help="The daemon's address.")
@click.option("--model", help="The model; may be left out when the daemon serves one.")
@click.option("--stream", "name", required=True, help="Name of the stream.")
@click.option(
    "--format", "format", type=click.Choice(["csv", "jsonl"]), help="Of the rows.  [by the file's name, or csv]"
)
@click.option("--output", type=click.Choice(["csv", "jsonl"]), help="Of the predictions.  [as the rows]")
@click.option("--chunk-steps", type=click.IntRange(min=1), default=64, show_default=True, help="Rows sent at once.")
@click.option("--reset", is_flag=True, help="Start from the initial state, not where the stream stood.")
@click.option("--no-header", is_flag=True, help="CSV without a row of names, in and out.")
@click.option("--ignore-extra", is_flag=True, help="Leave out columns the model does not know.")
@click.option("--timeout", default=30.0, show_default=True, help="Seconds to wait for the daemon.")
@click.pass_context
def stream(
    ctx: click.Context,
    /,
    file: Path | None,
    endpoint: str,
    model: str | None,
    name: str,
    format: Format | None,
    output: Format | None,
    chunk_steps: int,
    reset: bool,
    no_header: bool,
    ignore_extra: bool,
    timeout: float,
) -> None:
    """Send rows of FILE (or standard input) to a stream and print the predictions.

    One row is one time step.
    """
    if format is None:
        format = "jsonl" if file is not None and file.suffix in (".jsonl", ".ndjson") else "csv"
    try:
        with connect(endpoint, timeout_seconds=timeout) as client, _opened(file) as source:
            opened = client.open(name, model=model)
            if reset and not opened.fresh:
                opened.reset()
            signature = opened.signature
            pump = Pump(
                opened,
                source,
                reader(format, signature, header=not no_header, ignore_extra=ignore_extra),
                PredictionWriter(output or format, signature.heads),
                chunk_steps=chunk_steps,
                timeout_seconds=timeout,
            )
            with pump, _progress(file) as advance:
                pump.run(advance, header=not no_header)
    except BrokenPipeError:
        # Whoever reads us has seen enough. Python would complain when it flushes at exit; there is nowhere to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except RecurdError as error:
        click.echo(f"recurd: {error}", err=True)
        ctx.exit(_exit_code(error))


def _exit_code(error: RecurdError) -> int:
    if isinstance(error, InputError):
        return ExitCode.CONTRACT  # EX_DATAERR
    return ExitCode.DEVICE if isinstance(error, Unanswered) else ExitCode.BUG  # EX_UNAVAILABLE


@contextlib.contextmanager
def _opened(file: Path | None) -> Iterator[BinaryIO]:
    if file is None:
        if sys.stdin.isatty():
            click.echo("recurd: reading rows from the terminal; Ctrl-D ends them", err=True)
        yield sys.stdin.buffer
    else:
        with file.open("rb", buffering=0) as source:
            yield source


@contextlib.contextmanager
def _progress(file: Path | None) -> Iterator[Callable[[int], None]]:
    """A bar for a file on a terminal that the predictions do not go to; yields what is to be told of bytes read."""
    if file is None or not sys.stderr.isatty() or sys.stdout.isatty():
        yield lambda bytes_read: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(file.name), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    # rich would print our standard output, the predictions, on its console
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as progress:
        task = progress.add_task("", total=file.stat().st_size)
        yield lambda bytes_read: progress.advance(task, bytes_read)


class _Pending(NamedTuple):
    """A chunk on its way, and where its rows stood."""

    future: "Future[Result]"
    first_line: int
    last_line: int
    sent_at: float


class Pump:
    """Rows in, chunks out, predictions printed. Owns the rows that wait and the chunks on their way.

    One loop waits for whatever comes first: rows, an answer (told by a byte in a pipe), or the end of whoever reads us.
    """

    def __init__(
        self,
        stream: Stream,
        source: BinaryIO,
        rows: CsvReader | JsonReader,
        predictions: PredictionWriter,
        *,
        chunk_steps: int,
        timeout_seconds: float,
    ) -> None:
        self._stream = stream
        self._reader = rows
        self._predictions = predictions
        self._chunk_steps = min(chunk_steps, stream.max_chunk_steps)
        self._exact = not stream.signature.chunk_local
        self._timeout_seconds = timeout_seconds
        self._source = source.fileno()
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_in.setblocking(False)
        self._rest = b""
        self._ended = False
        self._rows: list[list[Number]] = []
        self._first_line = 0
        self._pending: deque[_Pending] = deque()

    def __enter__(self) -> "Pump":
        return self

    def __exit__(
        self, type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._wake_in.close()
        self._wake_out.close()

    def run(self, advance: Callable[[int], None], *, header: bool) -> None:
        """Until the last row is answered. Raises :class:`RecurdError` and BrokenPipeError."""
        if header:
            self._print(self._predictions.header())
        while self._rows or self._pending or not self._ended:
            if self._wait():
                advance(self._read())
            self._collect()
            self._send()

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
        left = self._pending[0].sent_at + self._timeout_seconds - time.monotonic()
        if left <= 0:
            pending = self._pending[0]
            raise Unanswered(f"{_lines(pending)} were not answered within {self._timeout_seconds:g} s")
        return 1000 * left

    def _read(self) -> int:
        """Take what there is; the number of bytes."""
        data = os.read(self._source, _READ_BYTES)
        self._ended = not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        if self._ended and self._rest:
            lines.append(self._rest)  # the last row lacks its line feed
        for line in lines:
            self._take(line)
        return len(data)

    def _take(self, line: bytes) -> None:
        try:
            text = line.decode("utf-8-sig" if self._reader.line == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"line {self._reader.line + 1}: not UTF-8") from error
        row = self._reader.read(text)
        if row is not None:
            self._first_line = self._first_line or self._reader.line
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
        future = self._stream.submit(chunk, timeout_seconds=self._timeout_seconds)
        self._pending.append(_Pending(future, self._first_line, self._reader.line, time.monotonic()))
        future.add_done_callback(self._wake)
        self._rows = []
        self._first_line = 0

    def _wake(self, future: "Future[Result]") -> None:
        with contextlib.suppress(OSError):  # awake already, or gone
            self._wake_in.send(b"\0")

    def _collect(self) -> None:
        """Print what has been answered, in order."""
        while self._pending and self._pending[0].future.done():
            pending = self._pending.popleft()
            try:
                result = pending.future.result()
            except Refused as error:
                raise RecurdError(f"{_lines(pending)} were refused: {error}") from error
            self._print(self._predictions.lines(result))

    def _print(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _lines(pending: _Pending) -> str:
    return f"lines {pending.first_line} to {pending.last_line}"
