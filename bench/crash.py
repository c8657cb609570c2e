"""Kills a durable daemon again and again while clients stream, and holds all they got against a run without a crash.

Every stream sends chunks of random lengths, now and then a reset or something with its whole state: it is asked for,
set, started from, or cloned. The daemon is killed with SIGKILL at random moments of their work and started again; the
clients go on by themselves. At the end every result, every state that was told, those of the clones, and every final
state in the journal must be bit for bit what the model gives when each stream runs alone. On a GPU that holds with
--strict; without it, for models of float32 alone, a --tolerance can be given.

    python bench/crash.py pump.onnx --kills 20
    python bench/crash.py pump.onnx --kills 20 --stop   # every other time it is stopped (SIGTERM) instead
    python bench/crash.py pump.onnx --seconds 3600 --mode power
    python bench/crash.py pump.onnx --device cuda --strict
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import click
import msgspec
import numpy as np
import numpy.typing as npt

import recurd
from outcome import end
from recurd.config import Tick
from recurd.contract import Contract
from recurd.journal import Journal
from recurd.model import Model, resolve_device
from recurd.scheduler import Shape
from recurd.verify import Filled, Inputs
from witness import Witness, result_bytes

Array = npt.NDArray[Any]

States = dict[str, Array]

#: Steps of the longest chunk, records a stream has in flight, and one record in so many is no chunk.
MAX_STEPS = 20
IN_FLIGHT = 4
ORDER_EVERY = 16
#: What is no chunk.
ORDERS = ("reset", "reset", "get", "put", "reset to", "clone")
#: Answers that come between two kills, at most.
MAX_ANSWERS = 1000
READY_SECONDS = 60.0


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What was found; everything but the counts must be 0."""

    kills: int
    streams: int
    records: int
    seconds: float
    wrong_results: int
    lost_results: int
    doubled_results: int
    wrong_states: int

    @property
    def ok(self) -> bool:
        """Whether nothing was lost, doubled or wrong."""
        return not (self.wrong_results or self.lost_results or self.doubled_results or self.wrong_states)


class Script:
    """What one stream sends: the same at every reading."""

    def __init__(self, contract: Contract, seed: int, stream: int) -> None:
        self._contract = contract
        self._inputs = Inputs.of(contract)
        self._seed = (seed, stream)

    def record(self, seq: int) -> Array | str:
        """The chunk with this seq (from 1), or one of :data:`ORDERS`."""
        draw = np.random.default_rng((*self._seed, seq))
        if seq > 1 and draw.integers(ORDER_EVERY) == 0:
            return str(draw.choice(ORDERS))
        return self._inputs.draw([int(draw.integers(1, MAX_STEPS + 1))], draw)[0]

    def states(self, seq: int) -> States:
        """The states that the order with this seq gives."""
        draw = np.random.default_rng((*self._seed, seq, 1))
        return {
            state.name: draw.uniform(-1, 1, state.shape).astype(state.dtype)
            if np.dtype(state.dtype).kind == "f"
            else draw.integers(0, 9, state.shape).astype(state.dtype)
            for state in self._contract.states
        }


class Daemon:
    """``recurd serve`` on a socket of its own, killed and started again. Owns the process."""

    def __init__(self, model: Path, folder: Path, mode: str, streams: int, device: str, tick: Tick) -> None:
        self.journal = folder / "journal"
        self.endpoint = f"ipc://{folder}/socket"
        self._command = [sys.executable, "-m", "recurd", "serve", str(model), "--bind", self.endpoint, "--metrics", ""]
        self._command += ["--device", device, "--threads", "1", "--slots", str(streams), "--log-format", "json"]
        settings = folder / "recurd.toml"
        strict = str(tick.strict).lower()
        settings.write_text(f"[tick]\nstrict = {strict}\nrows = {tick.rows}\nsteps = {tick.steps}\n")
        self._command += ["--config", str(settings)]
        self._command += ["--journal", str(self.journal), "--durability", mode]
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it is ready."""
        with self._log.open("ab") as log:
            begin = log.tell()
            self._process = subprocess.Popen(self._command, stderr=log)
        end = time.monotonic() + READY_SECONDS
        while b'"event":"ready"' not in self._log.read_bytes()[begin:].replace(b" ", b""):
            if self._process.poll() is not None or time.monotonic() > end:
                raise click.ClickException(f"the daemon did not start:\n{self._log.read_text()}")
            time.sleep(0.005)

    def end(self, number: signal.Signals) -> None:
        """Send a signal and wait for the end."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
            self._process.wait()


class Client:
    """All streams over one connection. Owns what was answered: by stream, results in order of seq."""

    def __init__(self, endpoint: str, scripts: list[Script], model: str) -> None:
        self._scripts = scripts
        self.answered = threading.Semaphore(0)
        self.answers: list[list[Any]] = [[] for _ in scripts]
        self._client = recurd.connect(endpoint, timeout_seconds=READY_SECONDS)
        self._streams = [self._client.open(f"s{number}", model=model) for number in range(len(scripts))]
        self._sent = [0] * len(scripts)
        self._waiting: list[deque[Future[Any]]] = [deque() for _ in scripts]

    def stream_until(self, done: threading.Event) -> None:
        """Send and collect; when ``done`` is set, send no more and wait for what is out."""
        while not done.is_set():
            for number, waiting in enumerate(self._waiting):
                while len(waiting) < IN_FLIGHT:
                    self._submit(number)
                self._collect(number, wait=len(waiting) >= IN_FLIGHT and number == 0)
        for number in range(len(self._scripts)):
            while self._waiting[number]:
                self._collect(number, wait=True)
        self._client.close()

    def _submit(self, number: int) -> None:
        self._sent[number] += 1
        record = self._scripts[number].record(self._sent[number])
        if isinstance(record, str):
            answered: Future[Any] = Future()
            answered.set_result(self._carry_out(record, number))
            self._waiting[number].append(answered)
        else:
            self._waiting[number].append(self._streams[number].submit(record))

    def _carry_out(self, order: str, number: int) -> States | None:
        stream, seq = self._streams[number], self._sent[number]
        if order == "get":
            return stream.state()
        if order == "clone":
            clone = self._client.clone(stream, f"clone {number} {seq}")
            states = clone.state()
            clone.close()
            return states
        if order == "put":
            stream.set_state(self._scripts[number].states(seq))
        else:
            stream.reset(to=self._scripts[number].states(seq) if order == "reset to" else None)
        return None

    def _collect(self, number: int, *, wait: bool) -> None:
        waiting = self._waiting[number]
        while waiting and (wait or waiting[0].done()):
            self.answers[number].append(waiting.popleft().result(READY_SECONDS))
            self.answered.release()
            wait = False


def run(
    model: Path,
    *,
    streams: int,
    kills: int,
    seconds: float | None,
    mode: Literal["process", "power"],
    seed: int,
    device: str = "cpu",
    strict: bool = False,
    stop: bool = False,
    tolerance: float = 0.0,
) -> Outcome:
    """The whole of it."""
    signals = (signal.SIGKILL, signal.SIGTERM) if stop else (signal.SIGKILL,)
    tick = Tick(rows=64, steps=MAX_STEPS, strict=True) if strict else Tick()
    reference = Model.load(model, slots=1, threads=1, device=resolve_device(device)[0])
    shape = Shape.of(reference, tick)
    runner = reference if shape is None else Filled(reference, shape)
    scripts = [Script(reference.contract, seed, number) for number in range(streams)]
    begin = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        _ended(Daemon(model, Path(folder), mode, streams, device, tick)) as daemon,
    ):
        daemon.start()
        client = Client(daemon.endpoint, scripts, reference.contract.name)
        done = threading.Event()
        until = begin + seconds if seconds else None
        killer = Killer(daemon, client.answered, done, kills=kills, signals=signals, until=until, seed=seed)
        killer.start()
        client.stream_until(done)
        killer.join()
        if killer.error is not None:
            raise killer.error
        daemon.end(signal.SIGTERM)
        journal = Journal(daemon.journal, mode)
        stored = {saved.name: saved for _, saved, _ in journal.load()}
        journal.close()
    counts: Counter[str] = Counter()
    for number, script in enumerate(scripts):
        witness = Witness(reference, runner=runner)
        counts += _compare(witness, script, client.answers[number], stored[f"s{number}"], tolerance)
    return Outcome(
        kills=killer.count,
        streams=streams,
        records=sum(map(len, client.answers)),
        seconds=round(time.monotonic() - begin, 1),
        wrong_results=counts["wrong"],
        lost_results=counts["lost"],
        doubled_results=counts["doubled"],
        wrong_states=counts["state"],
    )


class Killer(threading.Thread):
    """Ends the daemon at random moments, a random number of answers after it has come up, and starts it again.

    By ``signals`` in turns.
    """

    def __init__(
        self,
        daemon: Daemon,
        answered: threading.Semaphore,
        done: threading.Event,
        *,
        kills: int,
        signals: tuple[signal.Signals, ...],
        until: float | None,
        seed: int,
    ) -> None:
        super().__init__(daemon=True)
        self._answered = answered
        self._daemon = daemon
        self._done = done
        self._kills = kills
        self._signals = signals
        self._until = until
        self._random = random.Random(seed)
        self.count = 0
        self.error: Exception | None = None

    def run(self) -> None:
        """See the class."""
        try:
            while self.count < self._kills if self._until is None else time.monotonic() < self._until:
                self._wait_for_work()
                time.sleep(self._random.uniform(0, 0.02))
                self._daemon.end(self._signals[self.count % len(self._signals)])
                self.count += 1
                self._daemon.start()
        except Exception as error:  # told by the main thread
            self.error = error
        finally:
            self._done.set()

    def _wait_for_work(self) -> None:
        while self._answered.acquire(blocking=False):
            pass
        for _ in range(self._random.randrange(1, MAX_ANSWERS)):
            if not self._answered.acquire(timeout=READY_SECONDS):
                raise click.ClickException("the clients get no answers any more")


def _compare(witness: Witness, script: Script, answers: list[Any], stored: Any, tolerance: float) -> Counter[str]:
    """Hold one stream's answers, and its state in the journal, against the model run alone."""
    counts: Counter[str] = Counter()
    for seq, answer in enumerate(answers, start=1):
        record = script.record(seq)
        if not isinstance(record, str):
            counts["wrong"] += _differ(witness.run(record), result_bytes(answer), tolerance)
        elif record == "reset":
            witness.reset()
        elif record in ("put", "reset to"):
            witness.put(script.states(seq))
        else:
            counts["wrong"] += _differ(result_bytes(witness.states), result_bytes(answer), tolerance)
    counts["lost"] += max(0, len(answers) - stored.seq)
    counts["doubled"] += max(0, stored.seq - len(answers))
    counts["state"] += _differ(witness.state, stored.state, tolerance)
    return counts


def _differ(wanted: bytes | None, found: bytes | None, tolerance: float) -> bool:
    if wanted == found:
        return False
    if not tolerance or wanted is None or found is None or len(wanted) != len(found):
        return True
    return not np.allclose(np.frombuffer(found, "<f4"), np.frombuffer(wanted, "<f4"), rtol=tolerance, atol=tolerance)


@contextlib.contextmanager
def _ended(daemon: Daemon) -> Iterator[Daemon]:
    try:
        yield daemon
    finally:
        daemon.end(signal.SIGKILL)


@click.command(help=(__doc__ or "").replace("\n\n", "\n\n\b\n"))
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--streams", type=click.IntRange(1), default=200, show_default=True)
@click.option("--kills", type=click.IntRange(0), default=20, show_default=True)
@click.option("--seconds", type=float, help="Kill for this long instead of so many times.")
@click.option("--mode", type=click.Choice(["process", "power"]), default="process", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="Of the daemon, and of what it is held against.")
@click.option("--stop", is_flag=True, help="End it by SIGTERM every other time, while its clients go on.")
@click.option("--strict", is_flag=True, help="Every tick in one shape.")
@click.option("--tolerance", type=float, default=0.0, help="Instead of equal bits.")
@click.option("--json", "as_json", is_flag=True)
def main(model: Path, as_json: bool, **options: Any) -> None:
    outcome = run(model, **options)
    end(outcome, as_json=as_json)


if __name__ == "__main__":
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    main()
