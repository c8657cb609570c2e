"""Whatever happens in whatever order, what is counted is what is there: room, shares, lanes, slots, names."""

import copy
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from books import check_books
from dialogue import Desk, Served, admin, chunk, closing, opening, reset, state
from recurd.config import Config, Tenant, override
from recurd.durable import Durable
from recurd.errors import JournalError
from recurd.model import Model
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
            check_books(world.desk.engine)
            world.commit()
            check_books(world.desk.engine, not world.desk.engine.halted)
        world.fails = False
        world.commit()
        while world.desk.tick() is not None:
            world.commit()
        world.commit()
        check_books(world.desk.engine)
        assert not world.desk.engine.queued_chunks
        assert not world.desk.stats.internal_errors
    finally:
        if world.durable is not None:
            world.durable.close()
