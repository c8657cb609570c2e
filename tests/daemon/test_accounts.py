"""Whatever happens in whatever order, what is counted is what is there: room, shares, lanes, slots, names."""

import copy
import itertools
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dialogue import Desk, Served, admin, chunk, closing, opening, reset, state
from recurd.arena import Slots
from recurd.config import Config, Tenant, override
from recurd.durable import Durable
from recurd.engine import Engine
from recurd.errors import JournalError
from recurd.model import Model
from recurd.streams import NO_SLOT, Kind, Stream
from recurd.tenants import LOCAL, Tenants
from recurd.wire import Operation, Type
from recurrent import Network

OLD = Network(learned=True, counter=True)
NEW = Network(learned=True, counter=True, seed=8)
SLOTS, STREAMS = 3, 5
TENANTS = (LOCAL, "a")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    folder = tmp_path_factory.mktemp("models")
    return [Model.load(net.save(folder / f"{net.seed}.onnx"), slots=SLOTS, threads=1) for net in (OLD, NEW)]


def check(engine: Engine, is_saved: bool = False) -> None:
    """Hold every number that is kept against what it is the number of.

    ``is_saved``: all that has happened stands in the journal, where there is one.
    """
    streams = list(engine._streams.all())
    check_room(engine, streams)
    check_lanes(engine, streams)
    check_names(engine, streams)
    for stream in streams:
        check_order(stream, is_saved)


def count(streams: list[Stream]) -> tuple[int, int, int]:
    """Records queued, their bytes, and the bytes of answers kept."""
    queued = [record.data.nbytes for stream in streams for record in stream.queue]
    return len(queued), sum(queued), sum(len(payload) for stream in streams for _, _, (_, payload) in stream.answers)


def check_room(engine: Engine, streams: list[Stream]) -> None:
    room = engine._room
    assert (room.chunks, room.bytes, room.retained) == count(streams)
    for name, share in engine._tenants._shares.items():
        own = [stream for stream in streams if stream.share is share]
        assert all(stream.tenant == name for stream in own)
        assert (share.chunks, share.bytes, share.held) == count(own)


def check_lanes(engine: Engine, streams: list[Stream]) -> None:
    lanes, due = engine._versions.turns, 0
    assert {*engine._lanes.values(), *engine._versions.former} == set(lanes) >= {stream.lane for stream in streams}
    for lane in lanes:
        own = [stream for stream in streams if stream.lane is lane]
        clones = sum(record.kind is Kind.CLONE for stream in own for record in stream.queue)
        assert (lane.streams, lane._queued_bytes) == (len(own) + clones, count(own)[1])
        due += lane._queued_bytes * lane._result_step_bytes // lane._step_bytes
        in_line = [*lane.scheduler._line, *itertools.chain(*lane.scheduler._turns._lines.values())]
        assert len(in_line) == len(set(in_line)) == len(lane.scheduler)
        assert set(in_line) == {stream for stream in own if stream.queue}
        check_slots(lane.slots, own)
    assert engine._room.due == due

    numbers = engine._stats.models["pump"]
    assert numbers.queued_chunks == engine.queued_chunks
    assert numbers.slots == SLOTS * len(lanes)
    assert numbers.slots_used == sum(stream.slot != NO_SLOT for stream in streams)
    assert numbers.host_bytes == sum(len(stream.state or b"") for stream in streams)


def check_names(engine: Engine, streams: list[Stream]) -> None:
    clones = [(s.tenant, r.data.tobytes().decode()) for s in streams for r in s.queue if r.kind is Kind.CLONE]
    assert sorted(engine._streams._reserved) == sorted(clones)
    names = [(stream.tenant, stream.name) for stream in streams]
    assert not set(names) & set(clones)
    for tenant in TENANTS:
        assert engine._streams.count(tenant) == sum(owner == tenant for owner, _ in names + clones)
    attached = sum(stream.peer is not None for stream in streams)
    assert engine._stats.streams == {"attached": attached, "detached": len(streams) - attached}
    for peer in engine._peers.all():
        assert peer.handles == {stream.handle for stream in streams if stream.peer is peer}


def check_slots(slots: Slots, own: list[Stream]) -> None:
    holders = {slot: stream for slot, stream in enumerate(slots._holders) if stream is not None}
    assert holders == {stream.slot: stream for stream in own if stream.slot != NO_SLOT}
    assert sorted([*holders, *slots._free]) == list(range(SLOTS))
    assert len(slots) == len(holders)


def check_order(stream: Stream, is_saved: bool) -> None:
    assert not stream.ended
    assert not stream.running
    assert [record.seq for record in stream.queue] == list(range(stream.answered + 1, stream.accepted + 1))
    assert [answer[0] for answer in stream.answers] == list(range(stream.acked + 1, stream.answered + 1))
    generation = stream.generation
    for record in reversed(stream.queue):
        assert record.generation == generation
        generation -= record.starts_afresh
    assert stream.saved <= stream.answered
    if stream.fresh:
        assert stream.untouched
    elif stream.slot == NO_SLOT and stream.state is None:
        # Only what stands in the journal may be nowhere else.
        assert stream.lane.slots.store is not None
        assert not is_saved or stream.saved == stream.answered


# --- what happens ---

NUMBERS = st.integers(0, STREAMS - 1)
RECORDS = st.sampled_from(["chunk", "chunk", "long", "late", "reset", "get", "put", "reset_to", "clone"])
OPENED = st.sampled_from(["open", "new", "close", "ack", "reconnect", "expire", "rights", "halt"])
RUN = st.sampled_from(["fail", "poison", "finish", "restart", "same", "end_former"])
MOVED = st.sampled_from(["gather", "lift", "release", "import", "admit", "drop"])
EVENTS = st.lists(
    st.tuples(st.one_of(RECORDS, RECORDS, st.just("tick"), OPENED, RUN, MOVED), NUMBERS), min_size=5, max_size=60
)


class World:
    """A daemon to which anything happens; what its clients know of their streams is looked up in it."""

    def __init__(self, models: list[Model], folder: Path | None, shared: bool) -> None:
        self.models = models
        config = override(
            Config(),
            {
                "tick": {"rows": 2, "steps": 6},
                "limits": {"stream_credit": 12, "streams": 8},
                "timeouts": {"stream_idle_seconds": 100.0, "peer_idle_seconds": 1000.0},
            }
            | ({"durability": {"mode": "process", "directory": str(folder)}} if folder else {}),
        )
        sections = {"a": Tenant()} if shared else {}
        self.tenants = Tenants(sections)
        self.desk = Desk({"pump": models[0]}, config, slots=SLOTS, tenants=self.tenants)
        self.durable = None
        if folder is not None:
            log = structlog.wrap_logger(None, processors=[self.desk._note])
            self.durable = Durable(config, self.desk.engine, self.desk.models, stats=self.desk.stats, log=log)
        self.operator = self.desk.connect("operator")
        self.connections = 0
        self.callers = [self.connect(tenant) for tenant in TENANTS]
        self.present = 0
        self.clones = self.groups = 0
        #: What was exported last.
        self.data, self.stamps = b"", list[Any]()
        self.fails = False
        self.commit()

    def connect(self, tenant: str) -> Any:
        self.connections += 1
        return self.desk.connect(f"c{self.connections}", tenant=tenant)

    def commit(self) -> None:
        if self.durable is None:
            self.desk.engine.replies_to_send()
            return
        commit = self.durable._journal.commit
        if self.fails:
            self.durable._journal.commit = _no_room  # type: ignore[method-assign]
        self.durable.commit(self.desk.now)
        self.durable._journal.commit = commit  # type: ignore[method-assign]
        self.desk.now += 2.0 if self.fails else 0.0
        self.durable.due()

    def happen(self, what: str, number: int) -> None:
        tenant = number % 2
        stream = self.desk.engine._streams.named(TENANTS[tenant], f"s{number}")
        getattr(self, f"_{what}", self._record)(what, number, self.callers[tenant], stream)

    def _record(self, what: str, number: int, caller: Any, stream: Any) -> None:
        if stream is None:
            self._open(what, number, caller, stream)
            return
        handle, seq, fields = stream.handle, stream.accepted + 1, {"generation": stream.generation}
        if what == "reset":
            caller.send(reset(handle, seq, **fields))
        elif what in ("chunk", "long", "late"):
            x = OLD.draw(9 if what == "long" else 2, np.random.default_rng(number))
            caller.send(chunk(handle, seq, x, code=1 if what == "late" else 0, **fields))
            if what == "late":
                self.desk.now += 0.01
        else:
            payload = b""
            if what == "clone":
                self.clones += 1
                payload = f"clone{self.clones}".encode()
            elif what != "get":
                payload = stream.lane.layout.pack(stream.lane.initial_row)
            caller.send(state(handle, seq, Operation[what.upper()], payload, **fields))

    def _open(self, what: str, number: int, caller: Any, stream: Any) -> None:
        caller.send(opening(f"s{number}", mode="new" if what == "new" else "auto"))

    _new = _open

    def _close(self, what: str, number: int, caller: Any, stream: Any) -> None:
        if stream is not None:
            caller.send(closing(stream.handle))

    def _ack(self, what: str, number: int, caller: Any, stream: Any) -> None:
        if stream is not None and stream.answered:
            caller.send(reset(stream.handle, 1, generation=stream.generation, ack=stream.answered))

    def _reconnect(self, what: str, number: int, caller: Any, stream: Any) -> None:
        self.desk.engine.disconnected(caller.routing_id)
        self.callers[number % 2] = self.connect(caller.tenant)
        if stream is not None:
            self._open("open", number, self.callers[number % 2], stream)

    def _expire(self, what: str, number: int, caller: Any, stream: Any) -> None:
        self.desk.now += 60.0
        self.operator.send(admin("groups"))

    def _tick(self, what: str, number: int, caller: Any, stream: Any) -> None:
        self.desk.tick()

    def _fail(self, what: str, number: int, caller: Any, stream: Any) -> None:
        tick = self.desk.engine.take_tick(self.desk.now)
        if tick is not None:
            self.desk.engine.fail(tick, RuntimeError("broken"), self.desk.now)

    def _poison(self, what: str, number: int, caller: Any, stream: Any) -> None:
        tick = self.desk.engine.take_tick(self.desk.now)
        if tick is not None:
            outputs = tick.lane.device.run(tick.slots, tick.fresh, tick.lengths, tick.input)
            outputs = [copy.copy(output) for output in outputs]
            outputs[0][0] = np.nan
            self.desk.engine.complete(tick, outputs, self.desk.now)

    def _finish(self, what: str, number: int, caller: Any, stream: Any) -> None:
        if len(self.desk.engine._versions.turns) < 4:
            self.present = 1 - self.present
            self._replace("restart" if what == "restart" else "finish")

    _restart = _finish

    def _same(self, what: str, number: int, caller: Any, stream: Any) -> None:
        self._replace("finish")

    def _replace(self, incompatible: Any) -> None:
        model = self.models[self.present]
        if self.durable is not None:
            self.durable.note_version("pump", model)
        self.desk.engine.replace_model("pump", Served(model, SLOTS), incompatible)  # type: ignore[arg-type]

    def _end_former(self, what: str, number: int, caller: Any, stream: Any) -> None:
        self.desk.engine.end_former()

    def _gather(self, what: str, number: int, caller: Any, stream: Any) -> None:
        self.groups += 1
        self.operator.send(admin("gather", group=f"g{self.groups}", fence=True, limit=2))
        group = self.desk.engine._fences._groups.get(f"g{self.groups}")
        if group is None:
            return
        for _ in range(20):
            self.desk.tick()
            self.commit()
        reply = self._ask("export", group=group.id, start=0, max_bytes=10**6)
        if reply is not None and reply.type == Type.REPORT:
            self.data = reply.payload[len(reply.payload) - reply.header.width :]
            lanes = self.desk.engine._versions.turns
            self.stamps = [{"model": "pump", "stamp": msgspec.structs.asdict(lane.stamp)} for lane in lanes]

    def _ask(self, command: str, data: bytes = b"", **keys: Any) -> Any:
        self.operator.take()
        self.operator.send(admin(command, data, **keys))
        replies = self.operator.take()
        return replies[-1] if replies else None

    def _group(self, what: str) -> None:
        for id in [*self.desk.engine._fences._groups][:1]:
            self._ask(what, group=id, **({"endpoint": "tcp://127.0.0.1:1"} if what == "release" else {}))

    def _lift(self, what: str, number: int, caller: Any, stream: Any) -> None:
        self._group(what)

    _release = _admit = _drop = _lift

    def _import(self, what: str, number: int, caller: Any, stream: Any) -> None:
        self.groups += 1
        self._ask(
            "import",
            bytes(self.data),
            group=f"g{self.groups}",
            stamps=self.stamps,
            accept_drift=True,
            lasting=number > 0,
        )

    def _rights(self, what: str, number: int, caller: Any, stream: Any) -> None:
        sections = {"a": Tenant(streams=("s1", "clone*") if number else ("*",))}
        self.tenants.change(sections, None)
        self.desk.engine.rights_changed()

    def _halt(self, what: str, number: int, caller: Any, stream: Any) -> None:
        self.fails = not self.fails


def _no_room(*_: Any) -> None:
    raise JournalError("no room")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS, durable=st.booleans(), shared=st.booleans())
def test_what_is_counted_is_what_is_there(
    models: list[Model],
    tmp_path_factory: pytest.TempPathFactory,
    events: list[tuple[str, int]],
    durable: bool,
    shared: bool,
) -> None:
    world = World(models, tmp_path_factory.mktemp("journal") if durable else None, shared)
    try:
        for what, number in events:
            world.happen(what, number)
            check(world.desk.engine)
            world.commit()
            check(world.desk.engine, not world.desk.engine.halted)
        world.fails = False
        world.commit()
        while world.desk.tick() is not None:
            world.commit()
        world.commit()
        check(world.desk.engine)
        assert not world.desk.engine.queued_chunks
        assert not world.desk.stats.internal_errors
    finally:
        if world.durable is not None:
            world.durable.close()
