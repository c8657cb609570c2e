"""``recurd stream``: rows from a file or standard input to a daemon, predictions to standard output as they come."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import click

from recurd import wire
from recurd.cli.endpoint import SECONDS, check_keys, checked, with_keys
from recurd.cli.output import discard_output
from recurd.cli.pump import Pump
from recurd.cli.rows import Format, InputError, PredictionWriter, reader
from recurd.client import Client, Stream, connect
from recurd.errors import ExitCode, KeyFileError, RecurdError, Unanswered

#: A wait for the daemon that is longer than this is told on a terminal.
_PATIENCE_SECONDS = 2.0

EPILOG = """\b
Examples:
  recurd stream --model pump --stream pump-17 rows.csv > predictions.csv
  tail -f rows.csv | recurd stream --model pump --stream pump-17 --output jsonl
  recurd stream --model chars --stream demo --format jsonl --reset < tokens.jsonl

\b
The first row of CSV names the columns, in any order; where the model's contract names its features the two are
held against each other. JSON lines are objects by feature name or arrays, one a step.
Rows are sent as they come, at most --chunk-steps at once (exactly so many for models whose results depend on
where a chunk ends). The stream's state is kept by the daemon: the next call goes on where this one ended, or begins
afresh where there is no such stream (any more); with --resume that is an error.
Close a stream that is done with (--close), or the daemon keeps its state until the idle time-out.
\b
Exit codes: 0 all rows were answered (but those that --expires left out, and those after the end of whoever reads the
predictions), 1 the daemon refused a row or lost the state, or the predictions cannot be
written, 2 wrong usage, 65 a row cannot be read, 69 no daemon or no answer, 77 a
key file is not good, 130 interrupted.
"""


@click.command(epilog=EPILOG)
@click.argument("file", required=False, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--endpoint", default="tcp://127.0.0.1:7070", show_default=True, callback=checked, help="The daemon's address."
)
@with_keys
@click.option("--model", help="The model; may be left out when the daemon serves one.")
@click.option("--stream", "name", required=True, help="Name of the stream.")
@click.option(
    "--format", "format", type=click.Choice(["csv", "jsonl"]), help="Of the rows.  [by the file's name, or csv]"
)
@click.option("--output", type=click.Choice(["csv", "jsonl"]), help="Of the predictions.  [as the rows]")
@click.option("--chunk-steps", type=click.IntRange(min=1), default=64, show_default=True, help="Rows sent at once.")
@click.option(
    "--expires",
    type=click.FloatRange(0, wire.MAX_EXPIRES_SECONDS, min_open=True),
    help="Seconds rows may wait to be run; those that are late are left out, and said so on standard error.",
)
@click.option("--reset", is_flag=True, help="Start from the initial state, not where the stream stood.")
@click.option("--resume", is_flag=True, help="Only go on with a stream that is there; one that is gone is an error.")
@click.option("--close", is_flag=True, help="Close the stream at the end of input; its state is dropped.")
@click.option("--no-header", is_flag=True, help="CSV without a row of names, in and out.")
@click.option("--ignore-extra", is_flag=True, help="Leave out columns the model does not know.")
@click.option("--timeout", type=SECONDS, default=30.0, show_default=True, help="Seconds to wait for the daemon.")
@click.pass_context
def stream(ctx: click.Context, /, file: Path | None, format: Format | None, **options: Any) -> None:
    """Send rows of FILE (or standard input) to a stream and print the predictions.

    One row is one time step.
    """
    if sys.stdout is None:
        raise click.UsageError("standard output is closed, and the predictions go there")
    if file is None and sys.stdin is None:
        raise click.UsageError("standard input is closed: name a FILE of rows")
    if format is None:
        format = "jsonl" if file is not None and file.suffix in (".jsonl", ".ndjson") else "csv"
    try:
        _stream(file, format, **options)
    except BrokenPipeError:  # whoever reads us has seen enough
        discard_output()
    except RecurdError as error:
        click.echo(f"recurd: {error}", err=True)
        ctx.exit(_exit_code(error))


def _stream(
    file: Path | None,
    format: Format,
    *,
    endpoint: str,
    key: str | None,
    server_key: str | None,
    model: str | None,
    name: str,
    output: Format | None,
    chunk_steps: int,
    expires: float | None,
    reset: bool,
    resume: bool,
    close: bool,
    no_header: bool,
    ignore_extra: bool,
    timeout: float,
) -> None:
    """The whole of it. Raises :class:`RecurdError`, click.UsageError and BrokenPipeError."""
    check_keys(key, server_key)
    if reset and resume:
        raise click.UsageError("--reset starts afresh and --resume does not: give one of them")
    with _connected(endpoint, timeout, key, server_key) as client, _opened(file) as source:
        opened = _open(client, name, model, reset=reset, resume=resume)
        signature = opened.signature
        pump = Pump(
            opened,
            source,
            reader(format, signature, header=not no_header, ignore_extra=ignore_extra),
            PredictionWriter(output or format, signature.heads),
            chunk_steps=chunk_steps,
            expires_seconds=expires,
            timeout_seconds=timeout,
        )
        with pump, _progress(file) as advance:
            pump.run(advance, header=not no_header)
        if close:
            opened.close()


def _connected(endpoint: str, timeout_seconds: float, key: str | None, server_key: str | None) -> Client:
    """A client; says on a terminal that it waits when that takes long."""
    told = threading.Timer(
        _PATIENCE_SECONDS, click.echo, [f"recurd: waiting for a daemon at {endpoint} ..."], {"err": True}
    )
    told.daemon = True
    if sys.stderr is not None and sys.stderr.isatty():
        told.start()
    try:
        return connect(endpoint, timeout_seconds=timeout_seconds, key=key, server_key=server_key)
    finally:
        told.cancel()


def _open(client: Client, name: str, model: str | None, *, reset: bool, resume: bool) -> Stream:
    if model is None and len(client.models) > 1:
        names = ", ".join(sorted(client.models))
        raise click.UsageError(f"the daemon serves several models; name one with --model: {names}")
    opened = client.open(name, model=model, mode="resume" if resume else "auto")
    if reset and not opened.fresh:
        opened.reset()
    elif not reset and opened.fresh and opened.generation > 1:
        click.echo(f"recurd: stream '{name}' begins afresh: what there was before was reset or has ended", err=True)
    return opened


def _exit_code(error: RecurdError) -> int:
    if isinstance(error, InputError):
        return ExitCode.CONTRACT  # EX_DATAERR
    if isinstance(error, KeyFileError):
        return ExitCode.AUTH  # EX_NOPERM
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
    if file is None or sys.stderr is None or not sys.stderr.isatty() or sys.stdout.isatty():
        yield lambda bytes_read: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(file.name), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    # rich would print our standard output, the predictions, on its console
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as progress:
        task = progress.add_task("", total=file.stat().st_size)
        yield lambda bytes_read: progress.advance(task, bytes_read)
