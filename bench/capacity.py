"""Many more streams than slots: memory, speed and truth with a million known streams and ten thousand slots.

    python bench/capacity.py net.onnx                     # a million streams, in the host's memory
    python bench/capacity.py net.onnx --journal           # in a journal; ends with a restart of the daemon
    python bench/capacity.py net.onnx --streams 100000

A real daemon on loopback gets all streams opened, then one chunk for each, then chunks for random ones, nearly all of
which have to be paged in, and, for comparison, chunks for streams that have a slot. Some streams are looked at closely:
all their results are compared, bit by bit, with the model run alone. Exits with 1 when one differs, or when the
daemon's memory was ever over the bound.
"""

import contextlib
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import zmq

from outcome import end, memory, say
from recurd import child, wire
from recurd.dealer import Connection
from recurd.model import Model

#: Records in a frame, and frames under way.
RECORDS, FRAMES = 256, 16
#: Streams whose every result is compared.
WITNESSES = 1000
ANSWER_SECONDS = 600.0
CONFIG = """
[limits]
streams = {streams}
queued_seconds = 600
host_state_bytes = 1000000000000
"""
#: How many ticks had to page in, for how long altogether, and how many streams.
PAGING = ("recurd_page_in_seconds_count", "recurd_page_in_seconds_sum", "recurd_streams_paged_in_total")


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured; bytes are the daemon's resident memory."""

    streams: int
    slots: int
    state_bytes: int
    opened_per_second: float
    bytes_at_start: int
    bytes_per_opened_stream: float
    #: A stream that has a state and no slot, everything counted.
    bytes_per_idle_stream: float
    peak_bytes: int
    bound_bytes: int
    first_chunks_per_second: float
    cold_chunks_per_second: float
    hot_chunks_per_second: float
    #: Part of the cold chunks whose state had to be paged in, and a tick's mean time for that.
    paged_in: float
    page_in_ms: float
    longest_answer_ms: float
    restart_seconds: float | None = None
    results_compared: int
    wrong_results: int

    @property
    def ok(self) -> bool:
        """Whether all were right and the memory within its bound."""
        return not self.wrong_results and self.results_compared > 0 and self.peak_bytes <= self.bound_bytes


def metrics(daemon: child.Child, names: tuple[str, ...]) -> np.ndarray[Any, Any]:
    """The sums of these metrics' samples."""
    with urllib.request.urlopen(f"http://{daemon.metrics}/metrics") as page:
        samples = [line.rpartition(" ") for line in page.read().decode().splitlines() if line[:1] != "#"]
    return np.array([sum(float(value) for name, _, value in samples if name.partition("{")[0] == n) for n in names])


class Load:
    """One connection with all the streams, and what is known of those that are looked at."""

    def __init__(self, connection: Connection, reference: Model, streams: int, seed: int) -> None:
        self.connection = connection
        self._contract = reference.contract
        self._random = np.random.default_rng(seed)
        self._handles = np.zeros(streams, np.uint64)
        self._seqs = np.zeros(streams, np.int64)
        self._numbers: dict[int, int] = {}
        #: Chunks sent to, and results got from, streams that are looked at.
        self.sent: dict[int, list[Any]] = {n: [] for n in range(0, streams, max(1, streams // WITNESSES))}
        self.got: dict[int, list[bytes]] = {n: [] for n in self.sent}
        self.longest_seconds = 0.0

    def open(self, mode: str) -> None:
        """Open all streams, or resume them."""
        name = self._contract.name
        for start in range(0, len(self._handles), 256):
            numbers = range(start, min(start + 256, len(self._handles)))
            bodies = [wire.Open(stream=f"s{n}", model=name, mode=mode) for n in numbers]
            requests = [wire.control(wire.Type.OPEN, body, seq=seq) for seq, body in enumerate(bodies)]
            for header, payload in self.connection.ask(requests, ANSWER_SECONDS):
                if header.type != wire.Type.OPENED:
                    raise click.ClickException(wire.decode_body(payload, wire.Error).text)
                self._handles[start + header.seq] = header.handle
                self._numbers[header.handle] = start + header.seq

    def push(self, numbers: Iterable[int]) -> int:
        """A chunk of one step for each of these streams, none of them twice in a frame; how many."""
        count, waiting = 0, 0
        frames = self._frames(numbers)
        sent_at: list[float] = []
        while True:
            while waiting < FRAMES * RECORDS and (frame := next(frames, None)) is not None:
                self.connection.send(frame[1])
                sent_at.append(time.monotonic())
                waiting += frame[0]
                count += frame[0]
            if not waiting:
                return count
            begin = time.monotonic()
            if not self.connection.socket.poll(int(ANSWER_SECONDS * 1000)):
                raise self.connection.unanswered()
            self.longest_seconds = max(self.longest_seconds, time.monotonic() - begin)
            for data in self.connection.receive():
                waiting -= self._take(data)

    def _frames(self, numbers: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        records: list[wire.Record] = []
        for number in numbers:
            records.append(self._record(number))
            if len(records) == RECORDS:
                yield len(records), wire.multi(records)
                records = []
        if records:
            yield len(records), wire.multi(records)

    def _record(self, number: int) -> wire.Record:
        self._seqs[number] += 1
        seq = int(self._seqs[number])
        x = draw(self._contract, number, seq)
        if number in self.sent:
            self.sent[number].append(x)
        header = wire.pack(
            wire.Type.CHUNK,
            dtype=wire.DTYPES[self._contract.input.dtype],
            size=x.nbytes,
            steps=1,
            width=self._contract.input.width,
            generation=1,
            handle=int(self._handles[number]),
            seq=seq,
            ack=seq - 1,
        )
        return header, x.tobytes()

    def _take(self, data: bytes) -> int:
        header, payload = wire.decode(data)
        is_multi = header.type == wire.Type.MULTI
        records = wire.decode_multi(header, payload) if is_multi else [(header, payload)]
        for one, result in records:
            if one.type != wire.Type.RESULT:
                raise click.ClickException(wire.decode_body(result, wire.Error).text)
            number = self._numbers[one.handle]
            if number in self.got:
                self.got[number].append(bytes(result))
        return len(records)

    def random(self, seconds: float, streams: int) -> tuple[int, float]:
        """Chunks for random ones of the first ``streams`` streams, those looked at among them; how many, how long."""
        witnesses = np.array([n for n in self.sent if n < streams])
        count, begin = 0, time.monotonic()
        while time.monotonic() < begin + seconds:
            drawn = self._random.integers(0, streams, FRAMES * RECORDS)
            some = self._random.choice(witnesses, min(len(witnesses), FRAMES * RECORDS // 16), replace=False)
            count += self.push(np.unique(np.concatenate([drawn, some])).tolist())
        return count, time.monotonic() - begin


def draw(contract: Any, number: int, seq: int) -> np.ndarray[Any, Any]:
    """The step that a stream gets as its record ``seq``."""
    random = np.random.default_rng([number, seq])
    shape = (1, *contract.input.shape)
    if contract.input.classes is not None:
        return random.integers(0, contract.input.classes, shape)
    return random.standard_normal(shape).astype(contract.input.dtype)


def compare(reference: Model, load: Load) -> tuple[int, int]:
    """Results of the streams that were looked at, and how many of them are not the model's own."""
    slots, compared, wrong = np.zeros(1, np.int64), 0, 0
    for number, chunks in load.sent.items():
        compared += len(chunks)
        wrong += abs(len(chunks) - len(load.got[number]))
        for index, (x, got) in enumerate(zip(chunks, load.got[number], strict=False)):
            heads = reference.run(slots, np.array([not index]), np.ones(1, np.int32), np.ascontiguousarray(x[None]))
            wrong += b"".join(head.tobytes() for head in heads) != got
    return compared, wrong


def run(
    model: Path, *, streams: int, slots: int, seconds: float, journal: bool, bound_gib: float, seed: int
) -> Outcome:
    """The whole of it."""
    reference = Model.load(model, slots=1, threads=1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, zmq.Context() as context:
        config = Path(folder) / "recurd.toml"
        config.write_text(CONFIG.format(streams=streams))
        arguments = [str(model), "--config", str(config), "--slots", str(slots), "--device", "cpu"]
        arguments += ["--journal", f"{folder}/journal"] if journal else []
        with _served(context, arguments) as (daemon, connection):
            load = Load(connection, reference, streams, seed)
            found |= fill(daemon, load, streams) | turn(daemon, load, streams, slots, seconds)
            peak = memory(daemon.pid, "VmHWM")
        if journal:
            begin = time.monotonic()
            with _served(context, arguments) as (daemon, connection):
                found["restart_seconds"] = time.monotonic() - begin
                load.connection = connection
                load.open("resume")
                load.push(list(load.sent))
                peak = max(peak, memory(daemon.pid, "VmHWM"))
    compared, wrong = compare(reference, load)
    return Outcome(
        streams=streams,
        slots=slots,
        state_bytes=reference.row_bytes,
        peak_bytes=peak,
        bound_bytes=int(bound_gib * 2**30),
        longest_answer_ms=1000 * load.longest_seconds,
        results_compared=compared,
        wrong_results=wrong,
        **found,
    )


@contextlib.contextmanager
def _served(context: Any, arguments: list[str]) -> Iterator[tuple[child.Child, Connection]]:
    with (
        child.serving(arguments, metrics="127.0.0.1:0") as daemon,
        Connection(context, daemon.endpoint, ANSWER_SECONDS) as connection,
    ):
        connection.hello()
        yield daemon, connection


def fill(daemon: child.Child, load: Load, streams: int) -> dict[str, float]:
    """Open all streams and give each a state."""
    at_start, begin = memory(daemon.pid), time.monotonic()
    load.open("auto")
    open_seconds, after_open = time.monotonic() - begin, memory(daemon.pid)
    say(f"{streams} streams opened in {open_seconds:.1f} s, {after_open / 2**30:.2f} GiB")
    begin = time.monotonic()
    load.push(range(streams))
    first_seconds, idle = time.monotonic() - begin, memory(daemon.pid)
    say(f"one chunk each in {first_seconds:.1f} s, {idle / 2**30:.2f} GiB")
    return {
        "opened_per_second": streams / open_seconds,
        "bytes_at_start": at_start,
        "bytes_per_opened_stream": (after_open - at_start) / streams,
        "bytes_per_idle_stream": (idle - at_start) / streams,
        "first_chunks_per_second": streams / first_seconds,
    }


def turn(daemon: child.Child, load: Load, streams: int, slots: int, seconds: float) -> dict[str, float]:
    """Chunks for random ones of all streams, then for as many as there are slots for."""
    before = metrics(daemon, PAGING)
    cold_chunks, cold_seconds = load.random(seconds, streams)
    ticks, spent, paged = (metrics(daemon, PAGING) - before).tolist()
    say(f"{cold_chunks / cold_seconds:,.0f} chunks a second where the states have to be paged in")
    some = min(streams, slots // 2)
    load.push(range(some))
    hot_chunks, hot_seconds = load.random(seconds, some)
    say(f"{hot_chunks / hot_seconds:,.0f} where they have not")
    return {
        "cold_chunks_per_second": cold_chunks / cold_seconds,
        "hot_chunks_per_second": hot_chunks / hot_seconds,
        "paged_in": paged / cold_chunks,
        "page_in_ms": 1000 * spent / max(1, ticks),
    }


@click.command(help=(__doc__ or "").replace("\n\n", "\n\n\b\n"))
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--streams", type=click.IntRange(1), default=1_000_000, show_default=True)
@click.option("--slots", type=click.IntRange(2), default=10_000, show_default=True)
@click.option("--seconds", type=float, default=20.0, show_default=True, help="Of each measurement of speed.")
@click.option("--journal", is_flag=True, help="Keep the streams in a journal, and restart the daemon at the end.")
@click.option("--bound-gib", type=float, default=8.0, show_default=True, help="What the daemon may take.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(model: Path, as_json: bool, **options: Any) -> None:
    outcome = run(model, **options)
    end(outcome, as_json=as_json)


if __name__ == "__main__":
    main()
