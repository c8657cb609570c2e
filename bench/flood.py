"""One tenant floods a daemon, another goes on pushing: by how much does it wait longer?

    python bench/flood.py pump.onnx
    python bench/flood.py pump.onnx --rounds 5 --journal

Both have keys, and each is a process of its own. The quiet one pushes ``--steps`` steps every ``--every`` milliseconds
and times each push, first alone, then beside each flood:

    long     a client of ours submits chunks of 512 steps to 200 streams as fast as it can
    short    the same with chunks of 16 steps
    deaf     256 chunks a message, each of a stream of its own, all with a number that is not the next (`gap`)
    bounded  the same with the right number, by a tenant that may send one chunk a second (`limit`)

The last two are no clients of ours: they send on whatever they are told.

Milliseconds are medians over the rounds. Exits with 1 when a push was not answered.
"""

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import numpy as np
import zmq

import recurd
from outcome import end, say
from recurd import child, keys, wire
from recurd.dealer import Connection
from recurd.errors import RecurdError

KINDS = ("long", "short", "deaf", "bounded")
STREAMS = 200
#: How long a flood goes on before the quiet one begins.
SETTLE_SECONDS = 2.0
QUIET, LOUD, BOUNDED = "quiet", "loud", "bounded"
#: Seconds after which a push counts as not answered.
PUSH_SECONDS = 30.0


class Times(msgspec.Struct, frozen=True):
    """The quiet one's pushes in milliseconds, and what the flood got in a second."""

    p50_ms: float
    p99_ms: float
    longest_ms: float
    accepted: float = 0.0
    refused: float = 0.0


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured."""

    rounds: int
    pushes: int
    alone: Times
    long: Times
    short: Times
    deaf: Times
    bounded: Times
    unanswered: int

    @property
    def ok(self) -> bool:
        """Whether every push of the quiet one was answered."""
        return not self.unanswered


# --- a flood, in a process of its own ---


def flood(kind: str, endpoint: str, folder: Path) -> None:
    """Until the process is ended."""
    tenant = BOUNDED if kind == "bounded" else LOUD
    secret, server = folder / f"{tenant}.key_secret", folder / "server.key"
    if kind in ("deaf", "bounded"):
        _deaf(endpoint, keys.read_credentials(secret, server), seq=1 if kind == "bounded" else 2)
    else:
        _submit(endpoint, secret, server, 512 if kind == "long" else 16)


def _submit(endpoint: str, secret: Path, server: Path, steps: int) -> None:
    run = secrets.token_hex(4)
    with recurd.connect(endpoint, key=secret, server_key=server, timeout_seconds=PUSH_SECONDS) as client:
        streams = [client.open(f"{run}-{number}") for number in range(STREAMS)]
        chunk = np.zeros((steps, *streams[0].signature.shape), np.float32)
        while True:
            for stream in streams:
                with contextlib.suppress(RecurdError):
                    stream.submit(chunk)


def _deaf(endpoint: str, credentials: keys.Credentials | None, seq: int) -> None:
    """Sends one chunk of every stream over and over, which is refused, and does not care."""
    with zmq.Context() as context, Connection(context, endpoint, PUSH_SECONDS, credentials) as connection:
        welcome = connection.hello()
        name, contract = next(iter(welcome.models.items()))
        width = int(np.prod(contract["input"]["shape"], dtype=np.int64))
        dtype = wire.DTYPES[contract["input"]["dtype"]]
        data = np.zeros(width, wire.NUMPY_TYPES[dtype]).tobytes()
        opened: list[wire.Header] = []
        run = secrets.token_hex(4)
        connection.open([f"{run}-{number}" for number in range(wire.MAX_RECORDS)], name, opened)
        fields = {"dtype": dtype, "size": len(data), "steps": 1, "width": width, "generation": 1, "seq": seq}
        frame = wire.multi([(wire.pack(wire.Type.CHUNK, handle=one.handle, **fields), data) for one in opened])
        while True:
            connection.send(frame)
            for _ in connection.receive():
                pass


# --- the quiet one, and the whole ---


class Quiet:
    """Pushes and times. Owns its stream."""

    def __init__(self, stream: recurd.Stream, metrics: str, steps: int, every: float, pushes: int) -> None:
        self._stream = stream
        self._metrics = metrics
        self._chunk = np.zeros((steps, *stream.signature.shape), np.float32)
        self._every = every
        self._pushes = pushes
        self.unanswered = 0

    def measure(self) -> Times:
        """One series of pushes."""
        before, begin = self._counts(), time.monotonic()
        taken = []
        for _ in range(self._pushes):
            start = time.perf_counter()
            try:
                self._stream.push(self._chunk, timeout_seconds=PUSH_SECONDS)
            except RecurdError as error:
                say(f"  a push failed: {error}")
                self.unanswered += 1
            taken.append(1000 * (time.perf_counter() - start))
            time.sleep(self._every)
        seconds = time.monotonic() - begin
        accepted, refused = ((now - then) / seconds for now, then in zip(self._counts(), before, strict=True))
        p50, p99, longest = np.percentile(taken, [50, 99, 100]).tolist()
        return Times(p50, p99, longest, accepted - self._pushes / seconds, refused)

    def settle(self) -> None:
        """Wait until the daemon has nothing to do but this one's pushes."""
        counts = None
        while counts != (counts := self._counts()):
            time.sleep(0.3)

    def _counts(self) -> tuple[float, float]:
        """Chunks answered, and records refused, by all tenants."""
        with urllib.request.urlopen(f"http://{self._metrics}/metrics", timeout=PUSH_SECONDS) as page:
            lines = page.read().decode().splitlines()
        totals = [
            sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))
            for name in ("recurd_chunks_processed_total{", "recurd_refused_total{")
        ]
        return totals[0], totals[1]


@contextlib.contextmanager
def _flooding(kind: str, endpoint: str, folder: Path, quiet: Quiet) -> Iterator[None]:
    command = [sys.executable, __file__, str(folder), "--flood", kind, "--endpoint", endpoint]
    with subprocess.Popen(command) as process:
        try:
            time.sleep(SETTLE_SECONDS)
            assert process.poll() is None, "the flood has ended"
            yield
        finally:
            process.kill()
    # What it left in the sockets is none of the next series.
    quiet.settle()


def run(model: Path, *, rounds: int, pushes: int, steps: int, every: float, journal: bool, threads: int) -> Outcome:
    """The whole of it."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in ("server", QUIET, LOUD, BOUNDED):
            keys.new(name, folder)
        (folder / "clients").mkdir()
        for name in (QUIET, LOUD, BOUNDED):
            os.link(folder / f"{name}.key", folder / "clients" / f"{name}.key")
        config = folder / "recurd.toml"
        config.write_text(
            '[auth]\nkey = "server.key_secret"\nclients = "clients"\n'
            f"[tenants.{BOUNDED}.limits]\nchunks_per_second = 1\n"
        )
        arguments = [str(model), "--config", str(config), "--threads", str(threads), "--device", "cpu"]
        arguments += ["--journal", str(folder / "journal")] if journal else []
        daemon = stack.enter_context(child.serving(arguments, metrics="127.0.0.1:0"))
        client = stack.enter_context(
            recurd.connect(
                daemon.endpoint,
                key=folder / f"{QUIET}.key_secret",
                server_key=folder / "server.key",
                timeout_seconds=PUSH_SECONDS,
            )
        )
        quiet = Quiet(client.open("quiet"), daemon.metrics, steps, every, pushes)
        quiet.measure()  # to warm up
        found: dict[str, list[Times]] = {"alone": [], **{kind: [] for kind in KINDS}}
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            found["alone"].append(quiet.measure())
            for kind in KINDS:
                with _flooding(kind, daemon.endpoint, folder, quiet):
                    found[kind].append(quiet.measure())
        return Outcome(
            rounds=rounds,
            pushes=pushes,
            unanswered=quiet.unanswered,
            **{kind: _median(times) for kind, times in found.items()},
        )


def _median(times: list[Times]) -> Times:
    columns = zip(*(msgspec.structs.astuple(one) for one in times), strict=True)
    return Times(*(round(float(np.median(column)), 2) for column in columns))


@click.command(help=__doc__.partition("\n")[0] if __doc__ else "")
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--pushes", type=click.IntRange(1), default=300, show_default=True, help="Of the quiet one, a series.")
@click.option("--steps", type=click.IntRange(1), default=4, show_default=True, help="Of each push.")
@click.option("--every", type=click.FloatRange(0), default=10.0, show_default=True, help="Milliseconds between them.")
@click.option("--journal", is_flag=True, help="With durable streams (process).")
@click.option("--threads", type=click.IntRange(0), default=1, show_default=True, help="Of the model's run.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--flood", "kind", type=click.Choice(KINDS), hidden=True)
@click.option("--endpoint", hidden=True)
def main(
    model: Path,
    rounds: int,
    pushes: int,
    steps: int,
    every: float,
    journal: bool,
    threads: int,
    as_json: bool,
    kind: str | None,
    endpoint: str | None,
) -> None:
    """The command."""
    if kind is not None and endpoint is not None:
        flood(kind, endpoint, model)
        return
    outcome = run(
        model, rounds=rounds, pushes=pushes, steps=steps, every=every / 1000, journal=journal, threads=threads
    )
    end(outcome, as_json=as_json)


if __name__ == "__main__":
    main()
