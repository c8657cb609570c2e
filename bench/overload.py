"""Offers a daemon half as much again as it can do, for a minute: what is accepted, how late, and how soon is it well?

    python bench/overload.py pump.onnx                  # one minute
    python bench/overload.py pump.onnx --seconds 600 --streams 5000

First the capacity is measured (every stream sends its next chunk when the last is answered), then chunks come by the
clock, as sensors send them: 0.7 times the capacity (``--calm``), 1.5 times, and 0.7 times again. A chunk that cannot be
sent, because the daemon said when to come again or because as many as ``--window`` of the stream are unanswered, is
dropped by its source and counted. Latency is that of chunks that were accepted, from when they were sent. Every chunk
sent must be answered; exits with 1 when one was not, or when the overload did not end with it.
"""

import contextlib
import secrets
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import numpy.typing as npt
import zmq

from outcome import end, memory, say
from recurd import child, load, wire
from recurd.dealer import Connection
from recurd.fleet import Fleet
from recurd.latency import Latencies

Array = npt.NDArray[Any]

OVERLOAD = 1.5
RECORDS = 64
#: Answers later than this are missing.
ANSWER_SECONDS = 30.0
#: The daemon is well again when a tenth of a second passes without a refusal and with a median latency of at most so
#: many times the calm one.
SLICE_SECONDS, WELL = 0.1, 3.0
LOOK_SECONDS = 0.05


class Part(msgspec.Struct, frozen=True):
    """One part of the run: per second, and milliseconds."""

    offered: float
    accepted: float
    refused: float
    dropped: float
    p50_ms: float
    p99_ms: float
    #: Processor cores the daemon had.
    cores: float


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured. Bytes are the daemon's resident memory."""

    streams: int
    seconds: float
    capacity: float
    before: Part
    overload: Part
    after: Part
    recovery_seconds: float
    bytes_before: int
    bytes_peak: int
    bytes_after: int
    unanswered: int

    @property
    def ok(self) -> bool:
        """Whether everything was answered, and the daemon is well again."""
        return not self.unanswered and self.recovery_seconds < ANSWER_SECONDS


class Sensors:
    """Streams that send by the clock, whatever comes back. Owns what was counted in the present part."""

    def __init__(self, connection: Connection, fleet: Fleet, streams: int, window: int, pid: int) -> None:
        self._connection = connection
        self._fleet = fleet
        self._window = window
        self._pid = pid
        # each stream's next chunk comes at its own moment
        self._due = np.random.default_rng(0).random(streams)
        self._sent_at = np.zeros((streams, 1024))
        self.peak = 0
        self._begin()

    def _begin(self) -> None:
        self._latencies = Latencies()
        self._answered = self._offered = self._dropped = 0
        self._refused = sum(self._fleet.errors.values())
        #: When the first slice of time had passed in which the daemon was well.
        self.well_at = np.inf
        self._slice: list[Array] = []
        self._slice_at = time.perf_counter()
        self._slice_refused = self._refused

    def run(self, rate: float, seconds: float, well_seconds: float = np.inf) -> Part:
        """Send so many chunks a second altogether for so long."""
        self._begin()
        cpu = child.cpu_seconds(self._pid) or 0.0
        begin = before = looked = time.perf_counter()
        while (now := time.perf_counter()) < begin + seconds:
            self._send(now, (now - before) * rate / len(self._due))
            before = now
            self._receive(well_seconds)
            if now - looked > LOOK_SECONDS:
                looked, self.peak = now, max(self.peak, memory(self._pid))
        return self._part(seconds, (child.cpu_seconds(self._pid) or 0.0) - cpu)

    def recover(self, rate: float, seconds: float, well_seconds: float) -> float:
        """Run on, for so many seconds at a time, until the daemon is well; seconds until it was."""
        begin = time.perf_counter()
        while True:
            self.run(rate, seconds, well_seconds)
            if self.well_at < np.inf or time.perf_counter() > begin + ANSWER_SECONDS:
                return self.well_at - begin

    def settle(self) -> int:
        """Wait for all answers; how many did not come."""
        fleet, end_at = self._fleet, time.perf_counter() + ANSWER_SECONDS
        while time.perf_counter() < end_at and self._open():
            self._receive(np.inf)
        return self._open() + int(fleet.lost.sum())

    def _open(self) -> int:
        fleet = self._fleet
        fleet.ready(fleet.sent, np.inf)  # refused ones are taken back
        return int((fleet.sent - fleet.answered).sum())

    def _send(self, now: float, more: float) -> None:
        """Send what has come due, and drop what cannot be sent."""
        fleet = self._fleet
        self._due += more
        due = np.floor(self._due).astype(np.int64)
        self._due -= due
        self._offered += int(due.sum())
        while due.any():
            ids = fleet.ready(fleet.sent + due, now)
            if not len(ids):
                break
            due[ids] -= 1
            for frame in fleet.send(ids, RECORDS):
                self._connection.send(frame)
            self._sent_at[ids, fleet.sent[ids] % 1024] = now
        self._dropped += int(due.sum())

    def _receive(self, well_seconds: float) -> None:
        self._connection.socket.poll(1)
        frames = list(self._connection.receive())
        if not frames:
            return
        now = time.perf_counter()
        answers = self._fleet.take(frames, now)
        latencies = now - self._sent_at[answers.ids, answers.seqs % 1024]
        self._latencies.add(latencies)
        self._answered += len(answers.ids)
        self._slice.append(latencies)
        if now >= self._slice_at + SLICE_SECONDS:
            self._look(now, well_seconds)

    def _look(self, now: float, well_seconds: float) -> None:
        """At the end of a slice of time: was the daemon well?"""
        refused = sum(self._fleet.errors.values())
        latencies = np.concatenate(self._slice)
        if refused == self._slice_refused and len(latencies) and np.median(latencies) <= well_seconds:
            self.well_at = min(self.well_at, now)
        self._slice, self._slice_at, self._slice_refused = [], now, refused

    def _part(self, seconds: float, cpu_seconds: float) -> Part:
        latency = self._latencies.milliseconds()
        p50, p99 = (latency.p50, latency.p99) if latency else (0.0, 0.0)
        refused = sum(self._fleet.errors.values()) - self._refused
        counts = [round(count / seconds, 1) for count in (self._offered, self._answered, refused, self._dropped)]
        return Part(*counts, p50_ms=p50, p99_ms=p99, cores=round(cpu_seconds / seconds, 2))


def run(
    model: Path,
    *,
    seconds: float,
    calm: float,
    streams: int,
    steps: int,
    window: int,
    threads: int,
    queued_seconds: float,
) -> Outcome:
    """The whole of it."""
    calm_seconds = max(2.0, seconds / 6)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = folder / "recurd.toml"
        config.write_text(f"[limits]\nqueued_seconds = {queued_seconds}\n")
        arguments = [str(model), "--config", str(config), "--slots", str(streams), "--threads", str(threads)]
        daemon = stack.enter_context(child.serving([*arguments, "--device", "cpu"]))
        plan = load.Plan(
            endpoint=daemon.endpoint,
            streams=streams,
            chunk_steps=steps,
            records=RECORDS,
            seconds=calm_seconds / 2,
            warm_up_seconds=1.0,
            run=secrets.token_hex(4),
        )
        capacity = load.run(plan).chunks_per_second
        say(f"capacity: {capacity:,.0f} chunks a second")
        context = stack.enter_context(zmq.Context())
        connection = stack.enter_context(Connection(context, daemon.endpoint, ANSWER_SECONDS))
        welcome = connection.hello()
        name = next(iter(welcome.models))
        opened: list[wire.Header] = []
        connection.open([f"sensor-{number}" for number in range(streams)], name, opened)
        fleet = Fleet(
            welcome.models[name],
            np.array([header.handle for header in opened], np.uint64),
            np.array([header.generation for header in opened], np.uint32),
            chunk_steps=steps,
            window=min(window, welcome.credit),
            seed=0,
        )
        sensors = Sensors(connection, fleet, streams, window, daemon.pid)
        sensors.run(calm * capacity, 1.0)  # warm
        before = sensors.run(calm * capacity, calm_seconds)
        bytes_before = memory(daemon.pid)
        say(f"at {calm} times: {before}")
        sensors.peak = 0
        overload = sensors.run(OVERLOAD * capacity, seconds)
        say(f"at {OVERLOAD} times: {overload}")
        recovery = sensors.recover(calm * capacity, calm_seconds, WELL * before.p50_ms / 1000)
        after = sensors.run(calm * capacity, calm_seconds)
        say(f"at {calm} times again: {after}")
        unanswered = sensors.settle()
        connection.close_streams(opened)
        return Outcome(
            streams=streams,
            seconds=seconds,
            capacity=round(capacity, 1),
            before=before,
            overload=overload,
            after=after,
            recovery_seconds=round(recovery, 3),
            bytes_before=bytes_before,
            bytes_peak=sensors.peak,
            bytes_after=memory(daemon.pid),
            unanswered=unanswered,
        )


@click.command(help=(__doc__ or "").replace("\n\n", "\n\n\b\n"))
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--seconds", type=float, default=60.0, show_default=True, help="Of the overload.")
@click.option("--calm", default=0.7, show_default=True, help="Times the capacity, before and after.")
@click.option("--streams", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=16, show_default=True, help="Of a chunk.")
@click.option("--window", type=click.IntRange(1, 1000), default=64, show_default=True, help="Unanswered, at most.")
@click.option("--threads", type=click.IntRange(0), default=1, show_default=True, help="Of the daemon's model.")
@click.option("--queued-seconds", default=0.25, show_default=True, help="The daemon's bound ([limits]).")
@click.option("--json", "as_json", is_flag=True)
def main(model: Path, as_json: bool, **options: Any) -> None:
    end(run(model, **options), as_json=as_json)


if __name__ == "__main__":
    main()
