"""Clients and streams come and go for as long as one likes, and at the end nothing may be left of them.

    python bench/soak.py pump.onnx --minutes 10
    python bench/soak.py pump.onnx --minutes 600 --journal

A real daemon on loopback. Clients connect, open streams or take up those they left, push, pipeline, reset, let chunks
be late, close, open anew, and vanish without a word with chunks under way; others say HELLO, send and never read.
Idle time-outs are short, so that what is left behind expires. Every result is compared, bit by bit, with the model run
alone, and every stream that is taken up must be where it was left, or expired and not before its time. Once a minute a
line says how the daemon is; at the end, when all clients are gone and all time-outs passed, its memory, slots, streams,
connections and open files must be back where they were after the first tenth. Exits with 1 otherwise.
"""

import asyncio
import contextlib
import os
import random
import tempfile
import time
import urllib.request
from collections import Counter, deque
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import numpy.typing as npt
import zmq

from outcome import end, memory, say
from recurd import aio, child, wire
from recurd.dealer import Connection
from recurd.errors import BREAKING, Code, RecurdError, Refused
from recurd.model import Model
from recurd.verify import Inputs
from witness import Witness, result_bytes

Array = npt.NDArray[Any]

ACTORS, STREAMS_EACH = 12, 12
MAX_STEPS = 20
IDLE_SECONDS, PEER_SECONDS = 2.0, 4.0
#: Longest wait for any answer.
ANSWER_SECONDS = 60.0
#: What the daemon's memory may grow by after the first tenth: the allocator's and the metrics' own.
GROWTH_BYTES = 24e6
CONFIG = f"""
[timeouts]
stream_idle_seconds = {IDLE_SECONDS}
peer_idle_seconds = {PEER_SECONDS}
keepalive_seconds = 1
[limits]
ended_streams = 1000
"""


class Look(msgspec.Struct, frozen=True):
    """How the daemon is at one moment."""

    minute: float
    bytes: int
    slots: int
    streams: int
    peers: int
    files: int

    def line(self) -> str:
        """For people."""
        return (
            f"{self.minute:7.1f} min  {self.bytes / 1e6:7.1f} MB  {self.slots:5} slots used  {self.streams:5} streams  "
            f"{self.peers:4} connections  {self.files:4} files"
        )


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What was found; ``wrong``, ``lost`` and ``left`` must be 0 and empty."""

    minutes: float
    done: dict[str, int]
    wrong: int
    lost: int
    looks: list[Look]
    left: list[str]

    @property
    def ok(self) -> bool:
        """Whether every result was right and nothing is left."""
        return not (self.wrong or self.lost or self.left) and self.done["result"] > 0


class Daemon:
    """A running daemon, looked at from outside."""

    def __init__(self, process: child.Child) -> None:
        self.endpoint = process.endpoint
        self._process = process
        self._begin = time.monotonic()

    def look(self) -> Look:
        """How it is now."""
        with urllib.request.urlopen(f"http://{self._process.metrics}/metrics", timeout=ANSWER_SECONDS) as answer:
            lines = [line.rpartition(" ") for line in answer.read().decode().splitlines() if line[0] != "#"]
        values = {series: float(value) for series, _, value in lines}

        def total(name: str, part: str = "") -> int:
            return int(sum(value for series, value in values.items() if series.startswith(name) and part in series))

        pid = self._process.pid
        return Look(
            minute=round((time.monotonic() - self._begin) / 60, 2),
            bytes=memory(pid),
            slots=total("recurd_stream_slots{", 'kind="used"'),
            streams=total("recurd_streams{"),
            peers=total("recurd_peers", "recurd_peers") - total("recurd_peers_expired"),
            files=len(os.listdir(f"/proc/{pid}/fd")),
        )


class Counts:
    """What happened, counted by all."""

    def __init__(self) -> None:
        self.done: Counter[str] = Counter()
        self.wrong = 0
        self.lost = 0

    def lose(self, text: str) -> None:
        """Something is not as it was left."""
        self.lost += 1
        say(text)


class Life:
    """A name under which streams live, one after another, and what the present one must give."""

    def __init__(self, name: str, witness: Witness, inputs: Inputs, counts: Counts, seed: int) -> None:
        self.name = name
        self._witness = witness
        self._inputs = inputs
        self._counts = counts
        self._random = random.Random(seed)
        self._draw = np.random.default_rng(seed)
        self._stream: aio.Stream | None = None
        # as it was left: its handle, which names one life, how far it was, when the last record that was answered was
        # handed in, and what was under way
        self._handle = self._seq = 0
        self._touched_at = 0.0
        self._under_way: deque[tuple[Array, asyncio.Future[Any], float]] = deque()

    async def open(self, client: aio.Client) -> None:
        """Take it up where it was left, or start afresh where it has expired meanwhile."""
        anew = self._random.random() < 0.1
        begin = time.monotonic()
        stream = self._stream = await client.open(self.name, mode="new" if anew else "auto")
        if stream._writer.handle != self._handle:
            idle = time.monotonic() - self._touched_at  # at least what the daemon counted
            if not anew and self._handle and idle < IDLE_SECONDS:
                self._counts.lose(f"{self.name} started afresh {idle:.2f} s after its last record")
            self._counts.done["new" if anew or not self._handle else "expired"] += 1
            self._witness.reset()
        else:
            self._counts.done["taken up"] += 1
            accepted = stream.last_seq - self._seq
            if not 0 <= accepted <= len(self._under_way):
                self._counts.lose(f"{self.name} is at {stream.last_seq}, it was left at {self._seq}")
            for x, _, _ in list(self._under_way)[:accepted]:
                self._witness.run(x)
        self._under_way.clear()
        self._touched_at = begin

    async def act(self) -> None:
        """Do something with it."""
        draw = self._random.random()
        if draw < 0.5:
            await self._push(self._random.randrange(1, 12))
        elif draw < 0.6:
            await self._push(3, expires_seconds=self._random.choice((0.001, 0.005, 0.02)))
        elif draw < 0.75:
            await self._settle()
            begin = time.monotonic()
            await self.stream.reset()
            self._touched_at = begin
            self._witness.reset()
            self._counts.done["reset"] += 1
        elif draw < 0.9:
            await self._submit(self._random.randrange(1, 6))
        else:
            await self._settle()

    @property
    def stream(self) -> aio.Stream:
        assert self._stream is not None  # acted on only when it is open
        return self._stream

    def leave(self) -> None:
        """Its client vanishes."""
        if self._stream is not None:
            with contextlib.suppress(RecurdError):  # it ended, which the next opening tells
                while self._under_way and self._under_way[0][1].done():
                    self._take()
            for _, future, _ in self._under_way:
                future.add_done_callback(asyncio.Future.exception)  # nobody asks for it otherwise
            self._handle, self._seq = self._stream._writer.handle, self._stream.last_seq
            self._stream = None

    async def close(self) -> None:
        """Close it for good."""
        await self._settle()
        await self.stream.close()
        self._stream, self._handle = None, 0
        self._counts.done["close"] += 1

    async def _push(self, count: int, expires_seconds: float | None = None) -> None:
        await self._settle()
        await self._submit(count, expires_seconds)
        await self._settle()

    async def _submit(self, count: int, expires_seconds: float | None = None) -> None:
        for x in self._inputs.draw(self._draw.integers(1, MAX_STEPS + 1, count).tolist(), self._draw):
            begin = time.monotonic()
            self._under_way.append((x, await self.stream.submit(x, expires_seconds=expires_seconds), begin))

    async def _settle(self) -> None:
        """Wait for everything under way, and compare it."""
        while self._under_way:
            await asyncio.wait([self._under_way[0][1]])
            self._take()

    def _take(self) -> None:
        """Compare what came for the oldest chunk under way."""
        x, future, begin = self._under_way[0]
        error = future.exception()
        if error is None:
            self._counts.done["result"] += 1
            self._counts.wrong += self._witness.run(x) != result_bytes(future.result())
            self._touched_at = begin
        elif isinstance(error, Refused) and error.code is Code.LATE:
            self._counts.done["late"] += 1
        else:
            raise error
        self._under_way.popleft()


class Actor:
    """One client after another over the same streams."""

    def __init__(self, number: int, daemon: Daemon, lives: list[Life], counts: Counts) -> None:
        self._daemon = daemon
        self._lives = lives
        self._counts = counts
        self._random = random.Random(number)

    async def run(self, until: float) -> None:
        """Until so late."""
        while time.monotonic() < until:
            lives = self._random.sample(self._lives, self._random.randrange(1, len(self._lives) + 1))
            async with aio.connect(self._daemon.endpoint, timeout_seconds=ANSWER_SECONDS) as client:
                self._counts.done["client"] += 1
                try:
                    await self._use(client, lives, until)
                finally:
                    for life in lives:
                        life.leave()  # and the client is closed with what is under way
            if self._random.random() < 0.3:
                await asyncio.sleep(self._random.uniform(0, 1.5 * IDLE_SECONDS))

    async def _use(self, client: aio.Client, lives: list[Life], until: float) -> None:
        for life in lives:
            await life.open(client)
        for _ in range(self._random.randrange(1, 60)):
            life = self._random.choice(lives)
            try:
                await life.act()
            except RecurdError as error:
                if getattr(error, "code", None) not in BREAKING | {Code.UNKNOWN_HANDLE}:
                    raise
                # The others kept us from it for longer than its time-out.
                self._counts.done["expired in use"] += 1
                break
            if time.monotonic() > until:
                break
            await asyncio.sleep(self._random.uniform(0, 0.01))
        for life in lives:
            if life._stream is not None and life.stream._writer.error is None and self._random.random() < 0.3:
                with contextlib.suppress(RecurdError):
                    await life.close()


async def mutes(daemon: Daemon, model: str, until: float, counts: Counts) -> None:
    """Connections that say HELLO, open streams, send, never read, and are gone some seconds later."""
    chooser = random.Random(-1)
    with zmq.Context() as context:
        number = 0
        while time.monotonic() < until:
            with Connection(context, daemon.endpoint, ANSWER_SECONDS) as connection:
                for record in (
                    wire.control(wire.Type.HELLO, wire.Hello(multi=True)),
                    *(wire.control(wire.Type.OPEN, wire.Open(stream=f"mute{n}", model=model)) for n in range(3)),
                ):
                    connection.send(wire.frame(record))
                for _ in range(200):
                    connection.send(wire.pack(wire.Type.PING, seq=number))
                number += 1
                counts.done["mute"] += 1
                await asyncio.sleep(chooser.uniform(0.1, 2 * PEER_SECONDS))


async def soak(daemon: Daemon, model: Model, seconds: float, counts: Counts, looks: list[Look]) -> None:
    """All of it, until the last client is gone."""
    begin, inputs = time.monotonic(), Inputs.of(model.contract)
    until = begin + seconds
    lives = [
        Life(f"s{number}", Witness(model, number), inputs, counts, number) for number in range(ACTORS * STREAMS_EACH)
    ]
    async with asyncio.TaskGroup() as group:
        for number in range(ACTORS):
            part = lives[number * STREAMS_EACH : (number + 1) * STREAMS_EACH]
            group.create_task(Actor(number, daemon, part, counts).run(until))
        group.create_task(mutes(daemon, model.contract.name, until, counts))
        step = min(60.0, seconds / 10)
        for number in range(1, int(seconds / step) + 1):
            await asyncio.sleep(begin + number * step - time.monotonic())
            looks.append(await asyncio.to_thread(daemon.look))
            say(looks[-1].line())


def settled(daemon: Daemon, base: Look, first: Look) -> tuple[Look, list[str]]:
    """The last look, when all time-outs have passed, and what is not as it was."""
    end_at = time.monotonic() + 10 * max(IDLE_SECONDS, PEER_SECONDS)
    while True:
        last = daemon.look()
        left = [
            f"{name}: {getattr(last, name)}, at the beginning {getattr(base, name)}"
            for name in ("slots", "streams", "peers", "files")
            if getattr(last, name) > getattr(base, name)
        ]
        if last.bytes > first.bytes + GROWTH_BYTES:
            left.append(f"bytes: {last.bytes:,}, after the first tenth {first.bytes:,}")
        if not left or time.monotonic() > end_at:
            return last, left
        time.sleep(0.2)


def run(path: Path, *, minutes: float, journal: bool) -> Outcome:
    """The whole of it."""
    model = Model.load(path, slots=ACTORS * STREAMS_EACH, threads=1)
    counts, looks = Counts(), list[Look]()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = folder / "recurd.toml"
        config.write_text(CONFIG)
        # fewer slots than streams, so that states come and go too
        arguments = [str(path), "--config", str(config), "--device", "cpu", "--threads", "1", "--slots", "64"]
        arguments += ["--journal", str(folder / "journal")] if journal else []
        daemon = Daemon(stack.enter_context(child.serving(arguments, metrics="127.0.0.1:0")))
        base = daemon.look()
        say(base.line())
        asyncio.run(soak(daemon, model, 60 * minutes, counts, looks))
        last, left = settled(daemon, base, looks[0])
        say(last.line())
    done = dict(sorted(counts.done.items()))
    looks = [base, *looks, last]
    return Outcome(minutes=minutes, done=done, wrong=counts.wrong, lost=counts.lost, looks=looks, left=left)


@click.command(help=(__doc__ or "").replace("\n\n", "\n\n\b\n"))
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--minutes", type=float, default=10.0, show_default=True)
@click.option("--journal", is_flag=True, help="Keep the streams in a journal.")
@click.option("--json", "as_json", is_flag=True)
def main(model: Path, minutes: float, journal: bool, as_json: bool) -> None:
    end(run(model, minutes=minutes, journal=journal), as_json=as_json)


if __name__ == "__main__":
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    main()
