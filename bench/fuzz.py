"""Throws frames at the engine that no client would send, beside a stream that must not notice anything.

Frames are made by the seed: valid ones, valid ones with bits, bytes, fields or JSON values changed, cut, glued
together, sent twice or out of turn, and plain noise, from several connections and tenants. After every few the model
runs and what the daemon answers is read as a client reads it. Nothing may raise, nothing may be reported as a bug, no
bound may be passed, and the witness gets what it got alone. At the end all connections go, and nothing may be left.

    python bench/fuzz.py pump.onnx --frames 1000000
"""

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import structlog

from outcome import end
from recurd import wire
from recurd.config import Config, override
from recurd.engine import Engine
from recurd.errors import Code
from recurd.layout import Layout
from recurd.lifecycle import Identity
from recurd.model import Model
from recurd.stats import Stats
from recurd.verify import Inputs
from recurd.wire import Type
from witness import Witness

CONNECTIONS = 12
TENANTS = 3
#: Frames between two runs of the model.
BURST = 48
LIMITS = {
    "streams": 40,
    "stream_credit": 6,
    "queued_chunks": 200,
    "queued_bytes": 100_000,
    "retained_bytes": 400_000,
    "chunk_steps": 40,
    "message_bytes": 65_536,
    "connections": 8,
    "ended_streams": 30,
}
#: Codes that say that a handle is of no use any more.
ENDINGS = frozenset({"closed", "expired", "replaced", "unknown_handle", "detached"})
#: Numbers at which code breaks.
EDGES = (0, 1, 2, 3, 7, 40, 41, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
WORDS = ("", "s", "pump", "auto", "new", "resume", "\x00", "\ud800", "ä" * 200, "a" * 70_000, "../..", "witness", "NaN")


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it; the last three must be 0 and empty."""

    frames: int
    seconds: float
    answers: dict[str, int]
    internal_errors: int
    wrong_witness: int
    broken_bounds: list[str]

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not (self.internal_errors or self.wrong_witness or self.broken_bounds)


class Maker:
    """Makes frames out of a seed and of what the daemon has answered so far."""

    def __init__(self, model: Model, name: str, seed: int) -> None:
        self.random = random.Random(seed)
        self._name = name
        self._contract = model.contract
        self._draw = np.random.default_rng(seed)
        self._inputs = Inputs.of(model.contract)
        self._layout = Layout(model.contract.state_hash, model.contract.states)
        #: By connection: handle -> next seq and generation, as the daemon told.
        self.known: list[dict[int, list[int]]] = [{} for _ in range(CONNECTIONS)]
        #: Connections that were told to say HELLO.
        self.strangers = set(range(CONNECTIONS))
        self._peer = 0
        self._sent: list[bytes] = [b""]
        self._kinds: list[Callable[[], bytes]] = [self._hello, self._open, self._close, self._ping]
        self._kinds += [self._chunk] * 8 + [self._reset] + [self._multi] * 3

    def frame(self, peer: int) -> bytes:
        """The next one of a connection."""
        self._peer = peer
        draw = self.random.random()
        if peer in self.strangers and draw < 0.7:
            self.strangers.discard(peer)
            return wire.frame(wire.control(Type.HELLO, wire.Hello(multi=draw < 0.4)))
        if draw < 0.05:
            return self.random.randbytes(self.random.choice((0, 1, 47, 48, 49, 200)))
        if draw < 0.10:
            return self.random.choice(self._sent)
        frame = self.random.choice(self._kinds)()
        self._sent.append(frame)
        if len(self._sent) > 50:
            del self._sent[self.random.randrange(50)]
        return self._spoil(frame) if draw < 0.4 else frame

    def _spoil(self, frame: bytes) -> bytes:
        spoiled = bytearray(frame)
        for _ in range(self.random.choice((1, 1, 2, 5))):
            kind = self.random.randrange(6)
            place = self.random.randrange(len(spoiled) + 1)
            if kind == 0 and spoiled:
                spoiled[place % len(spoiled)] ^= 1 << self.random.randrange(8)
            elif kind == 1:
                del spoiled[place:]
            elif kind == 2:
                spoiled[place:place] = self.random.randbytes(self.random.randrange(1, 9))
            elif kind == 3:
                spoiled += self.random.choice(self._sent)
            else:
                offset, size = self.random.choice(
                    ((3, 1), (5, 1), (8, 4), (12, 4), (16, 4), (20, 4), (24, 8), (32, 8), (40, 8))
                )
                value = self.random.choice(EDGES) % (1 << 8 * size)
                if len(spoiled) >= offset + size:
                    spoiled[offset : offset + size] = value.to_bytes(size, "little")
        return bytes(spoiled)

    def _control(self, kind: Type, body: dict[str, Any], **fields: int) -> bytes:
        for key in list(body):
            if self.random.random() < 0.15:
                body[key] = self._value()
        if self.random.random() < 0.1:
            body[self.random.choice(WORDS)] = self._value()
        data = msgspec.json.encode({_safe(key): value for key, value in body.items()})
        if self.random.random() < 0.03:
            data = b"[" * self.random.choice((10, 5000)) + data
        return wire.pack(kind, size=len(data), seq=self.random.randrange(9), **fields) + data

    def _value(self, depth: int = 0) -> Any:
        kind = self.random.randrange(7 if depth < 3 else 5)
        if kind == 5:
            return [self._value(depth + 1) for _ in range(self.random.randrange(4))]
        if kind == 6:
            return {_safe(self.random.choice(WORDS)): self._value(depth + 1) for _ in range(self.random.randrange(4))}
        return (None, True, self.random.choice(EDGES), -self.random.random() * 1e300, _safe(self.random.choice(WORDS)))[
            kind
        ]

    def _hello(self) -> bytes:
        return self._control(Type.HELLO, {"client": "fuzz", "versions": [1], "multi": self.random.random() < 0.5})

    def _open(self) -> bytes:
        body = {"stream": f"s{self.random.randrange(60)}", "model": self._name}
        body["mode"] = self.random.choice(("auto", "auto", "new", "resume"))
        return self._control(Type.OPEN, body)

    def _close(self) -> bytes:
        return wire.pack(Type.CLOSE, handle=self._handle())

    def _ping(self) -> bytes:
        return wire.pack(Type.PING, seq=self.random.randrange(2**64))

    def _handle(self) -> int:
        """Mostly one of its own."""
        peer = self._peer if self.random.random() < 0.95 else self.random.randrange(CONNECTIONS)
        known = list(self.known[peer])
        return self.random.choice(known) if known else 0

    def _record(self) -> wire.Record:
        handle = self._handle()
        state = self.known[self._peer].setdefault(handle, [1, 1])
        seq, generation = state
        state[0] += 1
        ack = max(0, seq - self.random.randrange(1, 8))
        if self.random.random() < 0.1:
            state[1] += 1
            return wire.pack(Type.RESET, handle=handle, seq=seq, generation=generation, ack=ack), b""
        if self.random.random() < 0.1:
            order = self.random.choice((*wire.Operation, self.random.randrange(256)))
            state[1] += order == wire.Operation.RESET_TO
            data = self._order(order)
            fields = {"handle": handle, "seq": seq, "generation": generation, "ack": ack, "flags": order}
            return wire.pack(Type.STATE, size=len(data), **fields), data
        (x,) = self._inputs.draw([self.random.choice((1, 1, 2, 5, 40))], self._draw)
        if x.dtype == np.float32 and self.random.random() < 0.02:
            x.flat[0] = self.random.choice((np.nan, np.inf, 1e38))
        fields = {"handle": handle, "seq": seq, "generation": generation, "ack": ack, "steps": len(x)}
        fields |= {
            "code": self.random.choice((0, 0, 0, 0, 0, 0, 0, 20, 100, 100)),
            "flags": self.random.choice((0, 0x10, 0xFF)),
        }
        dtype = wire.DTYPES[x.dtype.name]
        data = x.tobytes()
        return wire.pack(Type.CHUNK, dtype=dtype, size=len(data), width=x[0].size, **fields), data

    def _order(self, order: int) -> bytes:
        """What a STATE carries: mostly what its operation takes."""
        draw = self.random.random()
        if draw < 0.1:
            return self.random.randbytes(self.random.choice((0, 1, 31, 32, 33, 2000)))
        if order == wire.Operation.CLONE:
            name = self.random.choice((f"s{self.random.randrange(60)}", f"c{self.random.randrange(60)}", *WORDS))
            return name.encode("utf-8", "surrogatepass")
        row = bytearray(self._layout.row_bytes)
        if draw < 0.2:
            row[:] = self.random.randbytes(len(row))  # NaN and infinity among it
        elif draw < 0.25:
            del row[self.random.randrange(len(row)) :]
        return self._layout.pack(bytes(row))

    def _chunk(self) -> bytes:
        return wire.frame(self._record())

    _reset = _chunk

    def _multi(self) -> bytes:
        return wire.multi([self._record() for _ in range(self.random.randrange(1, 20))])


def _safe(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


class Fuzz:
    """The engine under fire. Owns it, the witness and the counts."""

    def __init__(self, path: Path, seed: int) -> None:
        model = Model.load(path, slots=24, threads=1)
        self._name = model.contract.name
        self._model = model
        self._alone = Witness(Model.load(path, slots=1, threads=1))
        self._config = override(Config(), {"limits": LIMITS, "tick": {"rows": 8, "steps": 16}})
        self._stats = Stats()
        self._bugs: list[dict[str, Any]] = []
        self._engine = Engine(
            self._config,
            {self._name: model},
            identity=Identity(bytes(range(8)), {}),
            stats=self._stats,
            clock=lambda: self._now,
            log=structlog.wrap_logger(
                None, processors=[self._note], wrapper_class=structlog.make_filtering_bound_logger(40)
            ),
        )
        self._maker = Maker(model, self._name, seed)
        self._draw = np.random.default_rng(seed + 1)
        self._now = 1000.0
        self.answers: Counter[str] = Counter()
        self.wrong_witness = 0
        self.broken: list[str] = []
        self._witness = 0
        self._witness_seq = 0
        self._start_witness()

    def _note(self, logger: Any, method: str, event: Any) -> Any:
        self._bugs.append(dict(event))
        raise structlog.DropEvent

    def _start_witness(self) -> None:
        """Connect it, for the first time or after a silence that made the daemon forget its connection."""
        self._send(b"\0witness", wire.frame(wire.control(Type.HELLO, wire.Hello(client="witness"))), tenant="witness")
        opening = wire.Open(stream="witness", model=self._name, mode="resume" if self._witness else "new")
        self._send(b"\0witness", wire.frame(wire.control(Type.OPEN, opening)), tenant="witness")
        self._witness = wire.decode(self._take()[-1][1])[0].handle

    def _send(self, routing_id: bytes, frame: bytes, tenant: str) -> None:
        self._engine.receive(frame, routing_id, self._now, tenant)

    def _take(self) -> list[tuple[bytes, bytes]]:
        return self._engine.replies_to_send()

    def run(self, frames: int) -> None:
        """The whole of it."""
        for number in range(0, frames, BURST):
            for _ in range(min(BURST, frames - number)):
                peer = self._maker.random.randrange(CONNECTIONS)
                self._now += 0.001
                self._send(b"\0peer%d" % peer, self._maker.frame(peer), tenant=f"t{peer % TENANTS}")
            self._run_and_read()  # so that there is room for the witness
            self._look_at_witness()
            if self._maker.random.random() < 0.02:
                self._engine.disconnected(b"\0peer%d" % self._maker.random.randrange(CONNECTIONS))
            if self._maker.random.random() < 0.005:
                self._now += self._maker.random.choice((100, 10_000))
                self._run_and_read()
                self._start_witness()
            self._check_bounds()
        self._end()

    def _look_at_witness(self) -> None:
        """One more chunk of the witness gives what it gives alone."""
        self._witness_seq += 1
        (x,) = Inputs.of(self._model.contract).draw([3], self._draw)
        data = x.tobytes()
        header = wire.pack(
            Type.CHUNK,
            dtype=wire.DTYPES[x.dtype.name],
            size=len(data),
            steps=3,
            width=x[0].size,
            generation=1,
            handle=self._witness,
            seq=self._witness_seq,
            ack=self._witness_seq - 1,
        )
        self._send(b"\0witness", header + data, tenant="witness")
        found = self._run_and_read()
        self.wrong_witness += found != [self._alone.run(x)]

    def _run_and_read(self) -> list[bytes]:
        """Run all ticks and read all answers as clients do; those of the witness."""
        while (tick := self._engine.take_tick(self._now)) is not None:
            outputs = self._model.run(tick.slots, tick.fresh, tick.lengths, tick.input)
            self._engine.complete(tick, outputs, self._now)
        found = []
        for routing_id, frame in self._take():
            header, payload = wire.decode(frame)
            records = wire.decode_multi(header, payload) if header.type == Type.MULTI else [(header, payload)]
            for one, part in records:
                self._learn(routing_id, one, bytes(part))
                if routing_id == b"\0witness":
                    found.append(bytes(part))
        return found

    def _learn(self, routing_id: bytes, header: wire.Header, payload: bytes) -> None:
        word = Code(header.code).word if header.type == Type.ERROR else Type(header.type).name
        self.answers[word] += 1
        if routing_id == b"\0witness":
            return
        peer = int(routing_id.removeprefix(b"\0peer"))
        known = self._maker.known[peer]
        if word == "OPENED":
            opened = msgspec.json.decode(payload, type=wire.Opened)
            known[header.handle] = [opened.last_seq + 1, opened.generation]
        elif word == "hello_required":
            self._maker.strangers.add(peer)
        elif header.type == Type.ERROR and header.handle in known:
            error = msgspec.json.decode(payload, type=wire.Error)
            if error.expected is not None:
                known[header.handle] = [error.expected, error.generation or known[header.handle][1]]
            elif word in ENDINGS and self._maker.random.random() < 0.5:
                del known[header.handle]

    def _check_bounds(self) -> None:
        engine, limits = self._engine, self._config.limits
        room = engine._room
        bounds = {
            "connections": (len(engine._peers), limits.connections),
            "queued_chunks": (room.chunks, limits.queued_chunks + self._model.slots),
            "queued_bytes": (room.bytes, limits.queued_bytes),
            "retained_bytes": (room.retained, 2 * limits.retained_bytes + limits.message_bytes),
            "slots": (len(engine._lanes[self._name].slots), self._model.slots),
            "streams of a tenant": (max(engine._streams._per_tenant.values(), default=0), limits.streams),
        }
        self.broken += [f"{name}: {found} > {most}" for name, (found, most) in bounds.items() if found > most]

    def _end(self) -> None:
        """Everybody goes; after the idle time-out nothing is left."""
        for peer in range(CONNECTIONS):
            self._engine.disconnected(b"\0peer%d" % peer)
        self._engine.disconnected(b"\0witness")
        self._now += 10 * self._config.timeouts.stream_idle_seconds
        self._run_and_read()
        engine = self._engine
        left = {
            "streams": len(engine._streams),
            "names": len(engine._streams._per_tenant),
            "streams of the model": engine._lanes[self._name].streams,
            "bytes of states": self._stats.models[self._name].host_bytes,
            "slots": len(engine._lanes[self._name].slots),
            "queued chunks": engine._room.chunks,
            "queued bytes": engine._room.bytes,
            "retained bytes": engine._room.retained,
            "connections": len(engine._peers),
            "attached streams": self._stats.streams["attached"],
            "detached streams": self._stats.streams["detached"],
        }
        self.broken += [f"{name} left: {count}" for name, count in left.items() if count]

    @property
    def bugs(self) -> list[dict[str, Any]]:
        """What the engine logged as an error."""
        return self._bugs


def run(path: Path, frames: int, seed: int) -> Outcome:
    """Throw so many frames."""
    begin = time.monotonic()
    fuzz = Fuzz(path, seed)
    fuzz.run(frames)
    for bug in fuzz.bugs[:3]:
        click.echo(bug, err=True)
    return Outcome(
        frames=frames,
        seconds=round(time.monotonic() - begin, 1),
        answers=dict(fuzz.answers.most_common()),
        internal_errors=len(fuzz.bugs),
        wrong_witness=fuzz.wrong_witness,
        broken_bounds=fuzz.broken[:20],
    )


@click.command(help=(__doc__ or "").replace("\n\n", "\n\n\b\n"))
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--frames", type=click.IntRange(1), default=100_000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(model: Path, frames: int, seed: int, as_json: bool) -> None:
    outcome = run(model, frames, seed)
    end(outcome, as_json=as_json)


if __name__ == "__main__":
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    main()
