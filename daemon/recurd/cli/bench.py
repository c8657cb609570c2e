"""``recurd bench``: load a running daemon, or one started for it, and print what it did."""

import contextlib
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec

from recurd import child, load, wire
from recurd.cli.endpoint import SECONDS, check_keys, checked, with_keys
from recurd.client import connect
from recurd.errors import ExitCode
from recurd.keys import read_credentials

EPILOG = """\b
Examples:
  recurd bench pump.onnx
  recurd bench pump.onnx --records 64 --chunk-steps 1 --streams 1024
  recurd bench --endpoint tcp://127.0.0.1:7070 --model pump --rate 2000 --seconds 60
  recurd bench pump.onnx --config recurd.toml --json > run.json
\b
Without --rate every stream has one chunk in flight and sends the next when it is answered: the most the daemon can do.
With --rate chunks are due at fixed times, and latency counts from then whether or not the chunk could be sent: a
stall shows in full. The load comes from this process and shares the machine's cores with a daemon on it.
\b
Exit codes: 0 every chunk was answered with a result, 1 some were not, or the daemon refused, 69 no daemon or no
answer, 77 a key file is not good, 130 interrupted; those of 'recurd serve' when the daemon does not start.
"""


@click.command(epilog=EPILOG)
@click.argument("file", metavar="[MODEL.onnx]", required=False, type=click.Path(path_type=Path))
@click.option("--endpoint", callback=checked, help="A running daemon's address, instead of MODEL.onnx.")
@with_keys
@click.option("--model", help="The model; may be left out when the daemon serves one.")
@click.option("--streams", type=click.IntRange(1, 1_000_000), default=256, show_default=True)
@click.option("--chunk-steps", type=click.IntRange(1), default=16, show_default=True, help="Time steps a chunk.")
@click.option(
    "--records", type=click.IntRange(1, wire.MAX_RECORDS), default=1, show_default=True, help="Chunks a frame, at most."
)
@click.option("--connections", type=click.IntRange(1, 1024), default=1, show_default=True)
@click.option(
    "--rate", type=click.FloatRange(0, min_open=True), help="Chunks per second of all streams.  [closed loop]"
)
@click.option("--seconds", type=SECONDS, default=10.0, show_default=True, help="Measured.")
@click.option(
    "--warm-up-seconds", type=click.FloatRange(0), default=2.0, show_default=True, help="Before, not measured."
)
@click.option("--timeout", type=SECONDS, default=10.0, show_default=True, help="In seconds.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random input.")
@click.option("--device", help="Of the daemon started here, as in 'recurd serve'.  [auto]")
@click.option("--threads", type=click.IntRange(0), help="Of the daemon started here.  [0]")
@click.option("--config", type=click.Path(path_type=Path), help="Configuration of the daemon started here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    file: Path | None,
    endpoint: str | None,
    key: str | None,
    server_key: str | None,
    timeout: float,
    device: str | None,
    threads: int | None,
    config: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure throughput and latency of MODEL.onnx served by a daemon of its own, or of a running one (--endpoint)."""
    if (file is None) == (endpoint is None):
        both = "not both" if file is not None else "one of them"
        raise click.UsageError(f"name a model file to serve here, or a running daemon with --endpoint: {both}")
    if endpoint is not None and not (device is None and threads is None and config is None):
        raise click.UsageError("--device, --threads and --config are for a daemon started here, not for --endpoint")
    check_keys(key, server_key)
    if endpoint is not None:
        # The load generator heals and explains nothing: what is wrong with an address or a key is told here.
        connect(endpoint, timeout_seconds=timeout, key=key, server_key=server_key).close()
    serve = ["--slots", str(options["streams"])]
    for name, value in (("device", device), ("threads", threads), ("config", config)):
        serve += [] if value is None else [f"--{name}", str(value)]
    options |= {"timeout_seconds": timeout, "run": secrets.token_hex(4)}
    with contextlib.ExitStack() as stack:
        daemon_cpu = None
        if file is not None:
            daemon = stack.enter_context(child.serving([str(file), *serve]))
            endpoint, daemon_cpu = daemon.endpoint, daemon.cpu_seconds
        plan = load.Plan(endpoint=endpoint or "", credentials=read_credentials(key, server_key), **options)
        with _bar() as progress:
            report = load.run(plan, progress=progress, daemon_cpu=daemon_cpu)
    click.echo(msgspec.json.encode(report).decode() if as_json else table(report))
    if not report.clean:
        ctx.exit(int(ExitCode.BUG))


@contextlib.contextmanager
def _bar() -> Iterator[load.Progress | None]:
    """A progress bar on standard error when that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=1.0)
        yield lambda fraction: bar.update(task, completed=fraction)


def table(report: load.Report) -> str:
    """A report for people."""
    loop = "closed loop" if report.rate is None else f"{report.rate:g} chunks/s scheduled"
    what = f"{report.streams} streams, {report.chunk_steps} steps a chunk, {report.records_per_frame} a frame"
    lines = [
        f"{report.model} on {report.device}: {what}, connections: {report.connections}, {loop}, {report.seconds:g} s",
        "",
        f"throughput   {report.chunks_per_second:,.0f} chunks/s   {report.steps_per_second:,.0f} steps/s",
    ]
    if (latency := report.latency_ms) is not None:
        lines.append(
            f"latency      p50 {latency.p50:.3g} ms   p99 {latency.p99:.3g} ms   p99.9 {latency.p999:.3g} ms   "
            f"max {latency.max:.3g} ms"
        )
    errors = "   ".join(f"{code} {count:,}" for code, count in sorted(report.errors.items())) or "none"
    lines.append(f"errors       {errors}")
    lines.append(
        f"retries      {report.retries:,}   unanswered {report.unanswered:,}   streams lost {report.lost_streams:,}"
    )
    cpu = f"cpu seconds  client {report.client_cpu_seconds:.2f}"
    if report.daemon_cpu_seconds is not None:
        cpu += f"   daemon {report.daemon_cpu_seconds:.2f}"
    return "\n".join([*lines, cpu])
