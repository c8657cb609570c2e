"""The daemon beside its limits, in one run: what share of the bare model's speed is left when streams are served.

Reference work: a 2-layer LSTM 8 -> 128 -> 128 -> 4, 256 streams, each with one chunk in flight, client and daemon on
the same cores. For 16 steps and 1 step a chunk, in turns, several rounds:

    bare     the wrapped model in a process of its own, arrays in and out, no network; the best of three batch sizes
    daemon   'recurd serve' under the load of 'recurd bench', with 1 and with 64 records a frame
    echo     a ROUTER loop that answers each frame with bytes of a result's size: the transport alone

Only ratios of one round mean something on a machine that others use too, hence rounds, and medians of ratios.
"""

import contextlib
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import msgspec
import numpy as np
import zmq

from recurd import child, load, wire

STREAMS = 256
FEATURES, HIDDEN, OUTPUTS = 8, 128, 4
BATCHES = (32, 64, 256)
RECORDS = (1, 64)
WARM_UP_SECONDS = 0.5


#: A round in which other processes took more of the machine than this says little about anything.
QUIET_CORES = 0.15


class Figure(msgspec.Struct, frozen=True):
    """One measurement: chunks a second, latency in ms where there is one, what it is compared as."""

    what: str
    steps: int
    chunks_per_second: float
    p50_ms: float | None = None
    p99_ms: float | None = None
    note: str = ""


class Round(msgspec.Struct, frozen=True):
    """One round's measurements, and how many cores other processes took meanwhile."""

    figures: list[Figure]
    others_cores: float


@click.group(invoke_without_command=True, help=(__doc__ or "").replace("\n\n", "\n\n\b\n"))
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--seconds", type=float, default=2.0, show_default=True, help="Of every measurement.")
@click.option("--steps", type=click.IntRange(1), multiple=True, default=(16, 1), show_default=True)
@click.option("--model", type=click.Path(path_type=Path), help="Instead of the reference model (exported from torch).")
@click.option("--threads", type=click.IntRange(0), default=0, show_default=True, help="Of bare model and daemon.")
@click.option("--config", type=click.Path(path_type=Path), help="Configuration of the daemon.")
@click.option("--wait-seconds", default=60.0, show_default=True, help="At most, for a quiet machine before a round.")
@click.option("--json", "as_json", is_flag=True, help="Print every measurement as one JSON object a round.")
@click.pass_context
def main(
    ctx: click.Context,
    /,
    rounds: int,
    seconds: float,
    steps: tuple[int, ...],
    model: Path | None,
    threads: int,
    config: Path | None,
    wait_seconds: float,
    as_json: bool,
) -> None:
    if ctx.invoked_subcommand is not None:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = model or export_reference(Path(folder) / "reference.onnx")
        arguments = [str(path), "--slots", str(STREAMS), "--device", "cpu", "--threads", str(threads)]
        arguments += ["--config", str(config)] if config else []
        rounds_done: list[Round] = []
        with child.serving(arguments) as daemon, echo_process() as echo:
            for number in range(rounds):
                wait_until_quiet(wait_seconds)
                say(f"round {number + 1} of {rounds}")
                begin, busy, own = time.monotonic(), busy_seconds(), own_seconds(daemon, echo)
                figures = [f for n in steps for f in one_round(path, n, seconds, threads, daemon, echo)]
                others = (busy_seconds() - busy) - (own_seconds(daemon, echo) - own)
                rounds_done.append(Round(figures, round(others / (time.monotonic() - begin), 3)))
                if as_json:
                    click.echo(msgspec.json.encode(rounds_done[-1]))
        if not as_json:
            click.echo(summary(rounds_done))


def busy_seconds() -> float:
    """CPU seconds of all processes since the machine started (Linux), interrupts and stolen time left out."""
    with open("/proc/stat") as file:
        user, nice, system = map(int, file.readline().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def own_seconds(daemon: child.Child, echo: "Echo") -> float:
    """CPU seconds of this run: this process, the children it waited for, the daemon and the echo."""
    return sum(os.times()[:4]) + (daemon.cpu_seconds() or 0.0) + (child.cpu_seconds(echo.pid) or 0.0)


def wait_until_quiet(limit_seconds: float) -> None:
    """Wait until nobody else computes, but not longer than this."""
    end = time.monotonic() + limit_seconds
    while time.monotonic() < end:
        begin, busy = time.monotonic(), busy_seconds()
        time.sleep(1.0)
        if busy_seconds() - busy < QUIET_CORES * (time.monotonic() - begin):
            return
        say("other processes are busy, waiting")


def one_round(
    path: Path, steps: int, seconds: float, threads: int, daemon: child.Child, echo: "Echo"
) -> Iterator[Figure]:
    """Every measurement once, one after another."""
    yield bare_in_process(path, steps, seconds, threads)
    for records in RECORDS:
        report = load.run(
            load.Plan(
                endpoint=daemon.endpoint,
                streams=STREAMS,
                chunk_steps=steps,
                records=records,
                seconds=seconds,
                warm_up_seconds=WARM_UP_SECONDS,
                run=secrets.token_hex(4),
            ),
            daemon_cpu=daemon.cpu_seconds,
        )
        if not report.clean or report.errors:
            raise click.ClickException(f"the daemon did not answer every chunk: {report}")
        latency = report.latency_ms
        cores = (report.daemon_cpu_seconds or 0.0) / seconds
        note = f"cores: daemon {cores:.2f}, client {report.client_cpu_seconds / seconds:.2f}"
        yield Figure(
            f"daemon, {records} a frame",
            steps,
            report.chunks_per_second,
            latency.p50 if latency else None,
            latency.p99 if latency else None,
            note,
        )
    for records in RECORDS:
        yield echo_rate(echo.endpoint, records, steps, seconds / 2)


def summary(done: list[Round]) -> str:
    """Medians and ranges over the quiet rounds, and the ratio to the bare model of the same round."""
    quiet = [one for one in done if one.others_cores <= QUIET_CORES]
    rounds = [one.figures for one in quiet or done]
    others = ", ".join(f"{one.others_cores:.2f}" for one in done)
    lines = [f"{len(quiet)} of {len(done)} rounds were quiet; cores taken by other processes: {others}"]
    if not quiet:
        lines.append("no round was quiet: these figures are of all rounds, and worth little")
    lines.append(
        f"{'steps':>5}  {'':20} {'chunks/s':>9}  {'range':>17}  {'of bare':>7}  {'range':>11}  {'p50/p99 ms':>13}"
    )
    for column, figure in enumerate(rounds[0]):
        runs = [figures[column] for figures in rounds]
        bare = [next(f for f in figures if f.steps == figure.steps and f.what == "bare") for figures in rounds]
        rates = [run.chunks_per_second for run in runs]
        ratios = [run.chunks_per_second / limit.chunks_per_second for run, limit in zip(runs, bare, strict=True)]
        latency = ""
        if figure.p50_ms is not None:
            p50, p99 = (statistics.median([getattr(run, name) for run in runs]) for name in ("p50_ms", "p99_ms"))
            latency = f"{p50:.1f} / {p99:.1f}"
        lines.append(
            f"{figure.steps:5}  {figure.what:20} {statistics.median(rates):9,.0f}  {_range(rates, ',.0f'):>17}  "
            f"{statistics.median(ratios):7.0%}  {_range(ratios, '.0%'):>11}  {latency:>13}  {runs[-1].note}".rstrip()
        )
    return "\n".join(lines)


def _range(values: list[float], form: str) -> str:
    return f"{format(min(values), form)}-{format(max(values), form)}"


def say(text: str) -> None:
    """Progress, for a person who watches."""
    if sys.stderr.isatty():
        click.echo(text, err=True)


def export_reference(path: Path) -> Path:
    """The reference model with random weights, exported as a user would."""
    import torch

    import recurd_export

    class Reference(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = torch.nn.LSTM(FEATURES, HIDDEN, num_layers=2, batch_first=True)
            self.head = torch.nn.Linear(HIDDEN, OUTPUTS)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.head(self.lstm(x)[0])
            return result

    torch.manual_seed(1234)
    say("exporting the reference model")
    recurd_export.export(Reference(), torch.zeros(1, 16, FEATURES), path, name="reference")
    return path


def bare_in_process(path: Path, steps: int, seconds: float, threads: int) -> Figure:
    """:func:`bare` in a process of its own."""
    command = [sys.executable, __file__, "bare", str(path), str(steps), str(seconds), str(threads)]
    return msgspec.json.decode(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout, type=Figure)


@main.command(hidden=True)
@click.argument("path", type=Path)
@click.argument("steps", type=int)
@click.argument("seconds", type=float)
@click.argument("threads", type=int)
def bare(path: Path, steps: int, seconds: float, threads: int) -> None:
    """Run the wrapped model over all streams, batch after batch, for each batch size; print the best."""
    from recurd.model import Model

    model = Model.load(path, device="cpu", slots=STREAMS, threads=threads)
    x = np.random.default_rng(0).standard_normal((STREAMS, steps, FEATURES), np.float32)
    turns: dict[int, list[float]] = {rows: [] for rows in BATCHES}
    end = time.perf_counter() + seconds + WARM_UP_SECONDS
    while (begin := time.perf_counter()) < end:
        for rows in BATCHES:
            if begin > end - seconds:
                turns[rows].append(pass_over_all(model, x, rows))
            else:
                pass_over_all(model, x, rows)
    rates = {rows: STREAMS * len(times) / sum(times) for rows, times in turns.items()}
    best = max(rates, key=lambda rows: rates[rows])
    note = "rows: " + ", ".join(f"{rows} {rate:,.0f}" for rows, rate in rates.items())
    click.echo(msgspec.json.encode(Figure("bare", steps, rates[best], note=note)))


def pass_over_all(model: Any, x: np.ndarray, rows: int) -> float:
    """Every stream's chunk once, ``rows`` at a time; the seconds it took."""
    slots, lengths = np.arange(STREAMS, dtype=np.int64), np.full(STREAMS, x.shape[1], np.int32)
    fresh = np.zeros(STREAMS, np.bool_)
    begin = time.perf_counter()
    for start in range(0, STREAMS, rows):
        part = slice(start, start + rows)
        model.run(slots[part], fresh[part], lengths[part], x[part])
    return time.perf_counter() - begin


def _sizes(records: int, steps: int) -> tuple[int, int]:
    """Bytes of a frame of chunks and of a frame of results."""
    one = [wire.HEADER_BYTES + 4 * steps * width for width in (FEATURES, OUTPUTS)]
    head = wire.HEADER_BYTES if records > 1 else 0
    return head + records * one[0], head + records * one[1]


def echo_rate(endpoint: str, records: int, steps: int, seconds: float) -> Figure:
    """Chunks a second when as many frames as the load keeps in flight go to and fro and nobody looks inside."""
    sent, answered = _sizes(records, steps)
    frame = answered.to_bytes(4, "little") + bytes(sent - 4)
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(endpoint)
        for _ in range(STREAMS // records):
            dealer.send(frame)
        begin = time.perf_counter() + WARM_UP_SECONDS
        count, now = 0, 0.0
        while now < begin + seconds:
            dealer.recv()
            dealer.send(frame)
            now = time.perf_counter()
            count += now >= begin
        for _ in range(STREAMS // records):
            dealer.recv()
    return Figure(f"echo, {records} a frame", steps, count * records / seconds)


class Echo(NamedTuple):
    """A running echo."""

    endpoint: str
    pid: int


@contextlib.contextmanager
def echo_process() -> Iterator[Echo]:
    """The echo in a process of its own."""
    process = subprocess.Popen([sys.executable, __file__, "echo"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as stdout:
        try:
            yield Echo(stdout.readline().strip(), process.pid)
        finally:
            process.terminate()
            process.wait()


@main.command(hidden=True)
def echo() -> None:
    """Answer every frame with as many bytes as its first four say."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind("tcp://127.0.0.1:*")
        click.echo(router.getsockopt_string(zmq.LAST_ENDPOINT))
        sys.stdout.flush()
        answers: dict[bytes, bytes] = {}
        while True:
            router.poll()
            with contextlib.suppress(zmq.Again):
                while True:
                    peer, frame = router.recv_multipart(zmq.NOBLOCK)
                    answer = answers.setdefault(frame[:4], bytes(int.from_bytes(frame[:4], "little")))
                    router.send_multipart((peer, answer))


if __name__ == "__main__":
    main()
