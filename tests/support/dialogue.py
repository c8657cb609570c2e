"""Speaking the protocol by hand: messages as a client sends them, answers taken apart, an engine without sockets."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import structlog

from recurd import wire
from recurd.config import Config
from recurd.engine import Engine
from recurd.errors import Code
from recurd.lifecycle import Identity
from recurd.model import Model
from recurd.scheduler import Tick
from recurd.stats import Stats
from recurd.tenants import Tenants
from recurd.wire import Dtype, Flag, Type

Array = np.ndarray[Any, Any]


# --- what a client sends ---


def hello(*, multi: bool = False, seq: int = 0) -> bytes:
    return wire.frame(wire.control(Type.HELLO, {"client": "test", "multi": multi}, seq=seq))


def opening(stream: str, model: str = "pump", *, seq: int = 0, **options: Any) -> bytes:
    return wire.frame(wire.control(Type.OPEN, {"stream": stream, "model": model} | options, seq=seq))


def chunk(handle: int, seq: int, x: Array, *, generation: int = 1, ack: int = 0, **lies: int) -> wire.Record:
    """A CHUNK of ``x [steps, features]`` (or ``[steps]`` ids); ``lies`` replace fields of its header."""
    data = x.tobytes()
    truth = {
        "dtype": Dtype.INT64 if x.dtype == np.int64 else Dtype.FLOAT32,
        "size": len(data),
        "steps": len(x),
        "width": x[0].size if len(x) else 0,
    }
    fields = {"handle": handle, "seq": seq, "generation": generation, "ack": ack}
    return wire.pack(Type.CHUNK, **(truth | fields | lies)), data


def reset(handle: int, seq: int, *, generation: int = 1, ack: int = 0) -> wire.Record:
    return wire.pack(Type.RESET, handle=handle, seq=seq, generation=generation, ack=ack), b""


def state(
    handle: int, seq: int, operation: int, payload: bytes = b"", *, generation: int = 1, ack: int = 0
) -> wire.Record:
    """A STATE; ``payload`` is what its operation takes."""
    fields = {"handle": handle, "seq": seq, "generation": generation, "ack": ack}
    return wire.pack(Type.STATE, flags=operation, size=len(payload), **fields), payload


def closing(handle: int, *, seq: int = 0) -> bytes:
    return wire.pack(Type.CLOSE, handle=handle, seq=seq)


def admin(command: str, data: bytes = b"", *, seq: int = 0, **keys: Any) -> wire.Record:
    return wire.control_with_data(Type.ADMIN, {"command": command} | keys, data, seq=seq)


def ping(seq: int) -> bytes:
    return wire.pack(Type.PING, seq=seq)


# --- what it gets ---


@dataclass(frozen=True)
class Reply:
    """One message from the daemon."""

    header: wire.Header
    payload: bytes

    @property
    def type(self) -> int:
        return self.header.type

    @property
    def flags(self) -> Flag:
        return Flag(self.header.flags)

    @property
    def body(self) -> dict[str, Any]:
        body = json.loads(self.payload)
        assert isinstance(body, dict)
        return body

    @property
    def code(self) -> str:
        """The error's word; the empty one of anything that is no error."""
        if self.type != Type.ERROR:
            return ""
        assert self.body["code"] == Code(self.header.code).word
        return Code(self.header.code).word

    @property
    def output(self) -> Array:
        """A RESULT of one head that gives an output a step."""
        assert self.type == Type.RESULT, self
        return np.frombuffer(self.payload, "<f4").reshape(self.header.steps, self.header.width)


def replies(frame: bytes) -> list[Reply]:
    """The messages of a frame, a MULTI taken apart."""
    header, payload = wire.decode(frame)
    records = wire.decode_multi(header, payload) if header.type == Type.MULTI else [(header, payload)]
    return [Reply(h, bytes(p)) for h, p in records]


# --- a daemon without sockets ---


class Served:
    """A model with fewer slots than it has."""

    def __init__(self, model: Model, slots: int) -> None:
        self.contract, self.row_bytes, self.slots = model.contract, model.row_bytes, slots
        self.run, self.rows, self.write_rows = model.run, model.rows, model.write_rows
        self.stamp = model.stamp


class Desk:
    """An engine with its models, and connections to it. Time stands still unless a test moves ``now``."""

    def __init__(
        self,
        models: Mapping[str, Model],
        config: Config | None = None,
        *,
        slots: int = 0,
        tenants: Tenants | None = None,
        process_commands: Collection[str] = (),
        epoch: bytes = b"\x01\x02\x03\x04\x05\x06\x07\x08",
    ) -> None:
        self.models = models
        self.tenants = tenants or Tenants((config or Config()).tenants)
        self.stats = Stats()
        self.events: list[dict[str, Any]] = []
        self.now = 1000.0
        self.engine = Engine(
            config or Config(),
            {name: Served(model, slots or model.slots) for name, model in models.items()},
            identity=Identity(epoch, {"wanted": "cpu", "used": "cpu", "fallback": False}),
            stats=self.stats,
            clock=lambda: self.now,
            log=structlog.wrap_logger(
                None, processors=[self._note], wrapper_class=structlog.make_filtering_bound_logger(0)
            ),
            tenants=self.tenants,
            process_commands=process_commands,
        )
        self._inboxes: dict[bytes, list[Reply]] = {}

    def _note(self, logger: Any, method: str, event: Any) -> Any:
        self.events.append(dict(event) | {"level": method})
        raise structlog.DropEvent

    def connect(self, name: str = "a", *, multi: bool = False, greet: bool = True, tenant: str = "local") -> "Caller":
        # As ROUTER makes them up; b"\0" at the start is what no client can choose.
        caller = Caller(self, b"\0" + name.encode(), tenant)
        if greet:
            caller.send(hello(multi=multi))
            assert caller.take()[-1].type == Type.WELCOME
        return caller

    def tick(self) -> Tick | None:
        """Run one tick, when there is one."""
        tick = self.engine.take_tick(self.now)
        if tick is not None:
            outputs = tick.lane.device.run(tick.slots, tick.fresh, tick.lengths, tick.input)
            self.engine.complete(tick, outputs, self.now)
        return tick

    def run(self) -> None:
        """Run ticks until there is none."""
        while self.tick() is not None:
            pass

    def sort(self) -> None:
        for routing_id, frame in self.engine.replies_to_send():
            self._deliver(routing_id, frame)

    def _deliver(self, routing_id: bytes, frame: bytes) -> None:
        self._inboxes.setdefault(routing_id, []).extend(replies(frame))

    def inbox(self, routing_id: bytes) -> list[Reply]:
        self.sort()
        return self._inboxes.setdefault(routing_id, [])


class Caller:
    """One connection to a desk."""

    def __init__(self, desk: Desk, routing_id: bytes, tenant: str) -> None:
        self.desk = desk
        self.routing_id = routing_id
        self.tenant = tenant

    def send(self, *messages: bytes | wire.Record) -> None:
        for message in messages:
            frame = message if isinstance(message, bytes) else wire.frame(message)
            self.desk.engine.receive(frame, self.routing_id, self.desk.now, self.tenant)

    def take(self) -> list[Reply]:
        """What has come since the last call."""
        inbox = self.desk.inbox(self.routing_id)
        taken = inbox[:]
        inbox.clear()
        return taken

    def ask(self, message: bytes | wire.Record) -> Reply:
        """Send one message and take its one answer, which must come without a tick."""
        self.send(message)
        (reply,) = self.take()
        return reply

    def open(self, stream: str, model: str = "pump", **options: Any) -> Reply:
        return self.ask(opening(stream, model, **options))

    def run(self, *messages: bytes | wire.Record) -> list[Reply]:
        """Send messages, run all ticks, and take the answers."""
        self.send(*messages)
        self.desk.run()
        return self.take()

    def handle(self, stream: str, model: str = "pump", **options: Any) -> int:
        """Open a stream; its handle."""
        reply = self.open(stream, model, **options)
        assert reply.type == Type.OPENED, reply
        return reply.header.handle
