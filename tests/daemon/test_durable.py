"""Durable streams without sockets: whatever is killed whenever, clients get what one pass of the model gives."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lmdb
import numpy as np
import pytest
import structlog
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dialogue import Caller, Desk, chunk, closing, opening, reset, state
from recurd import saving, wire
from recurd.config import Config, override
from recurd.durable import RETRY_SECONDS, Durable
from recurd.endings import Ended
from recurd.errors import Code, JournalError
from recurd.journal import Journal
from recurd.layout import Layout
from recurd.model import Model
from recurd.saving import Stamp
from recurd.streams import Stream
from recurd.wire import Flag, Operation, Type
from recurrent import Network, States

PUMP = Network(layers=1, learned=True, counter=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(PUMP, tmp_path_factory.mktemp("models"))


def load(network: Network, folder: Path, slots: int = 4) -> Model:
    return Model.load(network.save(folder / "pump.onnx"), slots=slots, threads=1)


def config(folder: Path, limits: dict[str, int] | None = None, **durability: Any) -> Config:
    changes = {
        "durability": {"mode": "process", "directory": str(folder / "journal")} | durability,
        "tick": {"steps": 6, "rows": 2},
        "limits": {"stream_credit": 8} | (limits or {}),
    }
    return override(Config(), changes)


class Daemon(Desk):
    """A desk whose streams are durable: what callers take was committed before."""

    def __init__(self, folder: Path, model: Model, limits: dict[str, int] | None = None, **durability: Any) -> None:
        chosen = config(folder, limits, **durability)
        super().__init__({"pump": model}, chosen)
        self.durable = Durable(chosen, self.engine, self.models, stats=self.stats, log=structlog.get_logger())
        try:
            self.restored = self.durable.restore(self.now)
        except BaseException:
            self.durable.close()
            raise

    def sort(self) -> None:
        self.durable.commit(self.now)
        for routing_id, frame in self.durable.due():
            self._deliver(routing_id, frame)

    def __enter__(self) -> "Daemon":
        return self

    def __exit__(self, *_: object) -> None:
        self.durable.close()


@pytest.fixture
def daemon(model: Model, tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path, model) as daemon:
        yield daemon


def draw(seed: int, steps: int) -> np.ndarray:
    return PUMP.draw(steps, np.random.default_rng(seed))


def expected(*parts: np.ndarray) -> np.ndarray:
    return PUMP.run(np.concatenate(parts))[0]["output"]


# --- going on ---


def test_a_stream_goes_on_where_the_last_daemon_left_it(model: Model, tmp_path: Path) -> None:
    with Daemon(tmp_path, model) as first:
        caller = first.connect()
        handle = caller.handle("s")
        (before,) = caller.run(chunk(handle, 1, draw(1, 5)))
    with Daemon(tmp_path, model) as second:
        caller = second.connect()
        opened = caller.open("s", mode="resume", generation=1)
        (after,) = caller.run(chunk(handle, 2, draw(2, 4), ack=1))

    assert opened.header.handle == handle
    assert (opened.body["last_seq"], opened.body["fresh"]) == (1, False)
    whole = expected(draw(1, 5), draw(2, 4))
    np.testing.assert_allclose(np.concatenate([before.output, after.output]), whole, rtol=1e-4, atol=1e-5)


def test_a_result_that_did_not_arrive_is_there_after_a_crash(model: Model, tmp_path: Path) -> None:
    with Daemon(tmp_path, model) as first:
        caller = first.connect()
        handle = caller.handle("s")
        caller.send(chunk(handle, 1, draw(1, 5)), chunk(handle, 2, draw(2, 3)))
        lost = caller.run()
    with Daemon(tmp_path, model) as second:
        caller = second.connect()
        caller.open("s", mode="resume")
        again = [caller.ask(chunk(handle, 1, draw(1, 5))), caller.ask(chunk(handle, 2, draw(2, 3)))]

    assert [reply.payload for reply in again] == [reply.payload for reply in lost]
    assert all(reply.flags & Flag.DUPLICATE for reply in again)


def test_a_chunk_that_was_only_partly_run_has_not_happened(model: Model, tmp_path: Path) -> None:
    """Its stream was opened, or reset, in the same round, so that it is saved while the chunk is half done."""
    with Daemon(tmp_path, model) as first:
        caller = first.connect()
        was_reset = caller.handle("reset")
        opened = was_reset + 1  # handles are counted
        caller.run(chunk(was_reset, 1, draw(2, 3)))
        caller.send(opening("opened"), chunk(opened, 1, draw(1, 20)))
        caller.send(reset(was_reset, 2), chunk(was_reset, 3, draw(3, 20), generation=2))
        tick = first.tick()
        assert tick is not None
        assert len(tick.rows) == 2
        first.sort()
    with Daemon(tmp_path, model) as second:
        caller = second.connect()
        replies = [caller.open("opened", mode="resume"), caller.open("reset", mode="resume")]
        (one,) = caller.run(chunk(opened, 1, draw(1, 20)))
        (other,) = caller.run(chunk(was_reset, 3, draw(3, 20), generation=2))

    assert [(r.body["last_seq"], r.body["generation"]) for r in replies] == [(0, 1), (2, 2)]
    assert all(reply.body["fresh"] for reply in replies)
    np.testing.assert_allclose(one.output, expected(draw(1, 20)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(other.output, expected(draw(3, 20)), rtol=1e-4, atol=1e-5)


def test_a_reset_that_was_accepted_and_not_carried_out_has_not_happened(model: Model, tmp_path: Path) -> None:
    with Daemon(tmp_path, model) as first:
        caller = first.connect()
        handle = caller.handle("s")
        caller.send(chunk(handle, 1, draw(1, 3)), chunk(handle, 2, draw(2, 9)), reset(handle, 3))
        first.tick()
        first.sort()
    with Daemon(tmp_path, model) as second:
        caller = second.connect()
        reply = caller.open("s", mode="resume")
        answers = caller.run(chunk(handle, 2, draw(2, 9)), reset(handle, 3), chunk(handle, 4, draw(3, 2), generation=2))

    assert (reply.body["last_seq"], reply.body["generation"]) == (1, 1)
    assert [answer.type for answer in answers] == [Type.RESULT, Type.DONE, Type.RESULT]
    np.testing.assert_allclose(answers[0].output, expected(draw(1, 3), draw(2, 9))[3:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(answers[2].output, expected(draw(3, 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [3, 600])
def test_ended_streams_leave_nothing_behind(model: Model, tmp_path: Path, steps: int) -> None:
    with Daemon(tmp_path, model) as first:
        caller = first.connect()
        for name in ("closed", "replaced"):
            caller.run(chunk(caller.handle(name), 1, draw(1, steps)))
        caller.handle("replaced", mode="new")
        caller.ask(closing(caller.handle("closed")))
        expiring = caller.handle("expired", idle_timeout_seconds=1.0)
        caller.run(chunk(expiring, 1, draw(1, steps)))
        first.now += 2
        first.run()
        first.sort()
    with Daemon(tmp_path, model) as second:
        reply = second.connect().open("replaced", mode="resume")

        assert second.restored == 1
        assert reply.body["last_seq"] == 0
    assert on_disk(tmp_path, b"answers") == 0
    assert on_disk(tmp_path, b"streams") == on_disk(tmp_path, b"states") == 1


def test_the_next_daemon_knows_how_streams_ended_and_forgets_the_oldest(model: Model, tmp_path: Path) -> None:
    with Daemon(tmp_path, model) as first:
        caller = first.connect()
        closed, expired = caller.handle("closed"), caller.handle("expired", idle_timeout_seconds=1.0)
        caller.run(chunk(expired, 1, draw(1, 3)))
        caller.ask(closing(closed))
        first.now += 2
        first.run()
        first.sort()
    for _ in range(2):  # it goes on knowing
        with Daemon(tmp_path, model) as second:
            caller = second.connect()
            assert caller.ask(wire.frame(chunk(expired, 2, draw(1, 3), ack=1))).body["last_seq"] == 1
            assert caller.open("expired", mode="resume").code == "expired"
            assert caller.open("closed", mode="resume").code == "closed"
    with Daemon(tmp_path, model, {"ended_streams": 3}) as third:
        caller = third.connect()
        for number in range(3, 0, -1):  # opened in another order than closed
            caller.handle(f"s{number}")
        for number in (1, 2):
            caller.ask(closing(caller.handle(f"s{number}")))
        third.sort()
    assert on_disk(tmp_path, b"endings") == 3
    with Daemon(tmp_path, model, {"ended_streams": 2}) as fourth:
        caller = fourth.connect()
        for number in (1, 2):
            assert caller.open(f"s{number}", mode="resume").code == "closed"
        assert caller.open("expired", mode="resume").code == "unknown_stream"
        caller.ask(closing(caller.handle("s3")))
    assert on_disk(tmp_path, b"endings") == 2
    with Daemon(tmp_path, model) as fifth:
        codes = [fifth.connect(f"{number}").open(f"s{number}", mode="resume").code for number in (1, 2, 3)]
        assert codes == ["unknown_stream", "closed", "closed"]


def test_an_ending_that_is_forgotten_and_told_anew_in_one_round_is_kept() -> None:
    unsaved = saving.Unsaved(durable=True)
    back, other = (
        Stream(tenant="t", name=name, handle=handle, lane=cast(Any, None), generation=1, idle_timeout=1.0)
        for handle, name in enumerate(("back", "other"), start=1)
    )
    ended = Ended("t", "s", Code.CLOSED, 1, 0)
    unsaved.end(other, ended, [back.handle])
    unsaved.end(back, ended, [])
    saved = unsaved.take()
    assert saved is not None
    assert saved.endings_gone == []
    unsaved.end(other, ended, [back.handle])
    saved = unsaved.take()
    assert saved is not None
    assert saved.endings_gone == [back.handle]


def on_disk(folder: Path, table: bytes) -> int:
    """Entries of a table."""
    with contextlib.closing(lmdb.open(str(folder / "journal"), max_dbs=5, readonly=True, lock=False)) as env:
        opened = env.open_db(table, create=False)
        with env.begin() as transaction:
            entries: int = transaction.stat(opened)["entries"]
            return entries


#: Steps of a chunk whose answer is too much to be written with every state.
LARGE = 600


def test_however_small_answers_are_only_a_few_are_written_with_every_state() -> None:
    stream = Stream(tenant="t", name="s", handle=1, lane=cast(Any, None), generation=1, idle_timeout=1.0)
    header = bytes(wire.HEADER_BYTES)
    for count in (10, 100, 100_000):  # of resets, say, that nobody acknowledges
        stream.answers = [(seq, 1, (header, b"")) for seq in range(1, count + 1)]
        assert saving.divided(stream) == ((stream.answers, []) if count == 10 else ([], stream.answers))
    stream.apart = 99_995
    beside, apart = saving.divided(stream)
    assert apart == []
    assert [seq for seq, *_ in beside] == [*range(99_996, 100_001)]


@pytest.mark.parametrize("steps", [2, LARGE])
def test_answers_that_were_acknowledged_do_not_pile_up(daemon: Daemon, tmp_path: Path, steps: int) -> None:
    caller = daemon.connect()
    handle = caller.handle("s")
    sizes = []
    for seq in range(1, 20):
        caller.run(chunk(handle, seq, draw(seq, steps), ack=seq - 1))
        with daemon.durable._journal._read() as transaction:
            sizes.append(len(daemon.durable._journal._read_state(transaction, handle)))

    daemon.durable.close()
    assert max(sizes) == sizes[-1] < 500
    assert on_disk(tmp_path, b"answers") == (0 if steps == 2 else 1)
    daemon.durable = Durable(
        config(tmp_path), daemon.engine, daemon.models, stats=daemon.stats, log=structlog.get_logger()
    )


@dataclass(frozen=True)
class Whole:
    """A STATE record: what is given, or the name of a clone."""

    operation: Operation
    states: States | None = None
    clone: str = ""

    @property
    def payload(self) -> bytes:
        return self.clone.encode() if self.states is None else packed(self.states)


def form() -> Layout:
    contract = PUMP.contract(PUMP.model())
    return Layout(contract.state_hash, contract.states)


def packed(states: States) -> bytes:
    return form().pack(form().join(states))


def draw_states(seed: int) -> States:
    random = np.random.default_rng(seed)
    drawn = {name: random.uniform(-1, 1, value.shape).astype(value.dtype) for name, value in PUMP.initial().items()}
    return drawn | {"count": random.integers(0, 99, 1)}


def check_states(payload: bytes, states: States) -> None:
    for name, found in form().split(form().unpack(payload)).items():
        np.testing.assert_allclose(found, states[name], rtol=1e-4, atol=1e-5)


#: A chunk, a reset, or something with the whole state.
Record = np.ndarray | Whole | None


class Client:
    """One stream's client as the protocol asks for: sends in order, and again what has no answer after a crash."""

    def __init__(self, name: str, origin: "tuple[Client, int] | None" = None) -> None:
        """``origin``: whose clone it is, and after how many records."""
        self.name = name
        self.origin = origin
        self.handle = 0
        self.records: list[Record] = []
        self.generations = [1]
        self.results: dict[int, bytes] = {}

    def open(self, caller: Caller, mode: str) -> None:
        reply = caller.ask(opening(self.name, mode=mode))
        assert reply.type == Type.OPENED
        assert self.handle in (0, reply.header.handle)
        assert reply.body["last_seq"] >= len(self.results)
        self.handle = reply.header.handle

    def send_again(self, caller: Caller) -> None:
        for seq in range(1, len(self.records) + 1):
            if seq not in self.results:
                self.send(caller, seq)

    def add(self, caller: Caller, record: Record) -> None:
        if len(self.records) - len(self.results) >= 8:
            return
        self.records.append(record)
        is_new = record is None or (isinstance(record, Whole) and record.operation is Operation.RESET_TO)
        self.generations.append(self.generations[-1] + is_new)
        self.send(caller, len(self.records))

    def send(self, caller: Caller, seq: int) -> None:
        record, generation = self.records[seq - 1], self.generations[seq - 1]
        ack = next(seq for seq in range(len(self.records) + 1) if seq + 1 not in self.results)
        if record is None:
            caller.send(reset(self.handle, seq, generation=generation, ack=ack))
        elif isinstance(record, Whole):
            caller.send(state(self.handle, seq, record.operation, record.payload, generation=generation, ack=ack))
        else:
            caller.send(chunk(self.handle, seq, record, generation=generation, ack=ack))

    def check(self) -> None:
        self.states_after(len(self.records))

    def states_after(self, count: int) -> States:
        """What the state must be after so many records, all of whose answers are held against the truth."""
        states = PUMP.initial() if self.origin is None else self.origin[0].states_after(self.origin[1])
        for seq, record in enumerate(self.records[:count], start=1):
            if record is None:
                states = PUMP.initial()
            elif not isinstance(record, Whole):
                heads, states = PUMP.run(record, states)
                found = np.frombuffer(self.results[seq], "<f4").reshape(len(record), -1)
                np.testing.assert_allclose(found, heads["output"], rtol=1e-4, atol=1e-5)
            elif record.operation is Operation.GET:
                check_states(self.results[seq], states)
            elif record.states is not None:
                states = record.states
        return states


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("chunk"), st.integers(0, 5), st.integers(1, 15)),
        st.tuples(st.just("reset"), st.integers(0, 5)),
        st.tuples(st.just("whole"), st.integers(0, 5), st.sampled_from(list(Operation))),
        st.tuples(st.just("tick")),
        st.tuples(st.just("fail")),
        st.tuples(st.just("take")),
        st.tuples(st.just("crash")),
    ),
    min_size=5,
    max_size=60,
)


@pytest.mark.parametrize("beside", [0, 200, 4096])
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS)
def test_whatever_is_killed_whenever_every_record_is_run_once(
    model: Model, tmp_path_factory: pytest.TempPathFactory, beside: int, actions: list[tuple[Any, ...]]
) -> None:
    """``beside``: bytes of answers that are written with every state; more of them stand apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "BESIDE_BYTES", beside)
        world = World(tmp_path_factory.mktemp("life"), model)
        for number, (action, *options) in enumerate([*actions, ("crash",)]):
            getattr(world, action)(number, *options)
        world.finish()


class World:
    """A durable daemon, three clients, and what may happen to them."""

    def __init__(self, folder: Path, model: Model) -> None:
        self.folder, self.model = folder, model
        self.clients = [Client(f"s{index}") for index in range(3)]
        self.daemon = Daemon(folder, model)
        self.caller = self.daemon.connect()
        for client in self.clients:
            client.open(self.caller, "new")

    def chunk(self, number: int, index: int, steps: int) -> None:
        self.of(index).add(self.caller, draw(number, steps))

    def reset(self, number: int, index: int) -> None:
        self.of(index).add(self.caller, None)

    def whole(self, number: int, index: int, operation: Operation) -> None:
        if operation is Operation.CLONE:
            self.of(index).add(self.caller, Whole(operation, clone=f"clone {number}"))
        else:
            states = None if operation is Operation.GET else draw_states(number)
            self.of(index).add(self.caller, Whole(operation, states))

    def of(self, index: int) -> Client:
        return self.clients[index % len(self.clients)]

    def tick(self, number: int) -> None:
        self.daemon.tick()
        self.daemon.durable.commit(self.daemon.now)

    def take(self, number: int) -> None:
        cloned = []
        for reply in self.caller.take():
            assert reply.type in (Type.RESULT, Type.DONE, Type.STATE_OF), reply
            client = next(c for c in self.clients if c.handle == reply.header.handle)
            seq, record = reply.header.seq, client.records[reply.header.seq - 1]
            if isinstance(record, Whole) and record.clone and seq not in client.results:
                cloned.append(Client(record.clone, (client, seq)))
            assert client.results.setdefault(seq, reply.payload) == reply.payload
        for client in cloned:
            client.open(self.caller, "resume")
        self.clients += cloned

    def fail(self, number: int) -> None:
        """A run raises; its clients send again what was refused."""
        self.take(number)
        if self.daemon.engine.deadline() != 0:
            return
        fail_next(self.daemon)
        refused = [reply for reply in self.caller.take() if reply.code]
        assert {reply.code for reply in refused} <= {"run_failed", "gap"}
        for client in self.clients:
            if any(reply.header.handle == client.handle for reply in refused):
                client.send_again(self.caller)

    def crash(self, number: int) -> None:
        self.daemon.durable.close()
        self.daemon = Daemon(self.folder, self.model)
        self.caller = self.daemon.connect()
        for client in self.clients:
            client.open(self.caller, "resume")
        for client in self.clients:
            client.send_again(self.caller)

    def finish(self) -> None:
        self.daemon.run()
        self.take(0)
        self.daemon.durable.close()
        with Daemon(self.folder, self.model) as last:
            caller = last.connect()
            for client in self.clients:
                client.open(caller, "resume")
                client.add(caller, Whole(Operation.GET))
                client.results[len(client.records)] = caller.take()[-1].payload
        for client in self.clients:
            client.check()


# --- whole states ---


def test_a_state_that_was_given_is_gone_back_to_when_the_next_chunk_fails_before_any_commit(daemon: Daemon) -> None:
    """It was answered, and its answer leaves with the commit behind the run that fails."""
    caller = daemon.connect()
    first, second = caller.handle("a"), caller.handle("b")
    caller.run(chunk(first, 1, draw(1, 3)))
    caller.send(state(first, 2, Operation.PUT, packed(draw_states(1)), ack=1), chunk(first, 3, draw(2, 3), ack=1))
    caller.send(state(second, 1, Operation.PUT, packed(draw_states(2))), reset(second, 2), chunk(second, 3, draw(3, 3)))
    caller.send(chunk(second, 3, draw(3, 3), generation=2))
    fail_next(daemon)
    told = caller.take()
    answers = caller.run(chunk(first, 3, draw(2, 3), ack=2), chunk(second, 3, draw(3, 3), generation=2, ack=2))

    refused = [(r.header.handle, r.header.seq) for r in told if r.code == "run_failed"]
    assert refused == [(first, 3), (second, 3)]
    by_stream = {answer.header.handle: answer.output for answer in answers}
    truth = PUMP.run(draw(2, 3), draw_states(1))[0]["output"]
    np.testing.assert_allclose(by_stream[first], truth, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_stream[second], expected(draw(3, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("operation", list(Operation))
def test_what_was_done_with_a_state_stands_while_the_next_chunk_is_half_run(
    model: Model, tmp_path: Path, operation: Operation
) -> None:
    """Its stream is saved in the middle of a chunk: with the state from before it, not with a fresh start."""
    payload = {Operation.GET: b"", Operation.CLONE: b"t"}.get(operation) or packed(draw_states(1))
    generation = 1 + (operation is Operation.RESET_TO)
    with Daemon(tmp_path, model) as first:
        caller = first.connect()
        handle = caller.handle("s")
        caller.run(chunk(handle, 1, draw(1, 3)))
        caller.send(state(handle, 2, operation, b"" if operation is Operation.GET else payload, ack=1))
        caller.send(chunk(handle, 3, draw(2, 20), generation=generation, ack=1))
        first.tick()
        first.sort()
    with Daemon(tmp_path, model) as second:
        caller = second.connect()
        opened = caller.open("s", mode="resume")
        caller.take()
        caller.send(state(handle, 3, Operation.GET, generation=generation, ack=2))
        (got,) = caller.take()

    states = PUMP.run(draw(1, 3))[1] if operation in (Operation.GET, Operation.CLONE) else draw_states(1)
    assert (opened.body["last_seq"], opened.body["generation"], opened.body["fresh"]) == (2, generation, False)
    check_states(got.payload, states)


def test_a_clone_stands_in_the_journal_with_its_answer_or_not_at_all(model: Model, tmp_path: Path) -> None:
    clone = Whole(Operation.CLONE, clone="t")
    with Daemon(tmp_path, model) as first:
        caller = first.connect()
        handle = caller.handle("s")
        caller.send(chunk(handle, 1, draw(1, 9)), state(handle, 2, clone.operation, clone.payload))
        first.tick()  # the first slice
        first.sort()
    with Daemon(tmp_path, model) as second:
        caller = second.connect()
        caller.open("s", mode="resume")
        absent = caller.open("t", mode="resume")
        answers = caller.run(chunk(handle, 1, draw(1, 9)), state(handle, 2, clone.operation, clone.payload))
    with Daemon(tmp_path, model) as third:
        caller = third.connect()
        caller.open("s", mode="resume")
        again = caller.ask(state(handle, 2, clone.operation, clone.payload))
        opened = caller.open("t", mode="resume")
        (result,) = caller.run(chunk(opened.header.handle, 1, draw(2, 4)))

        assert third.restored == 2
        assert third.stats.streams_opened == 0
    assert absent.code == "unknown_stream"
    assert [answer.type for answer in answers] == [Type.RESULT, Type.STATE_OF]
    assert (again.type, again.flags) == (Type.STATE_OF, Flag.DUPLICATE)
    assert (opened.body["last_seq"], opened.body["fresh"]) == (0, False)
    np.testing.assert_allclose(result.output, expected(draw(1, 9), draw(2, 4))[9:], rtol=1e-4, atol=1e-5)


def test_a_clone_that_is_taken_back_with_a_failed_run_can_be_asked_for_again(daemon: Daemon) -> None:
    caller = daemon.connect()
    handle = caller.handle("s")
    caller.send(chunk(handle, 1, draw(1, 3)), state(handle, 2, Operation.CLONE, b"t"))
    caller.send(state(handle, 3, Operation.RESET_TO, packed(draw_states(1))))
    fail_next(daemon)
    told = caller.take()
    free = caller.open("t", mode="resume")
    answers = caller.run(chunk(handle, 1, draw(1, 3)), state(handle, 2, Operation.CLONE, b"t"))
    opened = caller.open("t", mode="resume")

    assert [(r.header.seq, r.header.generation, r.code) for r in told] == [
        (1, 1, "run_failed"), (2, 1, "gap"), (3, 1, "gap")
    ]  # fmt: skip
    assert free.code == "unknown_stream"
    assert [answer.type for answer in answers] == [Type.RESULT, Type.STATE_OF]
    assert opened.type == Type.OPENED


def test_states_that_are_given_wait_in_memory_until_they_are_saved(daemon: Daemon) -> None:
    caller = daemon.connect()
    handles = [caller.handle(name) for name in "abc"]
    caller.send(*[state(handle, 1, Operation.PUT, packed(draw_states(handle))) for handle in handles])
    stats = daemon.stats.models["pump"]
    before = stats.host_bytes
    answers = caller.take()
    after = stats.host_bytes
    results = caller.run(*[chunk(handle, 2, draw(handle, 4), ack=1) for handle in handles])

    assert (before, after) == (3 * daemon.models["pump"].row_bytes, 0)
    assert {answer.type for answer in answers} == {Type.STATE_OF}
    for result in results:
        handle = result.header.handle
        truth = PUMP.run(draw(handle, 4), draw_states(handle))[0]["output"]
        np.testing.assert_allclose(result.output, truth, rtol=1e-4, atol=1e-5)


def test_a_state_that_cannot_be_read_for_a_client_ends_the_daemon_as_it_does_for_a_tick(daemon: Daemon) -> None:
    caller = daemon.connect()
    handles = [caller.handle(f"s{number}") for number in range(5)]
    for handle in handles:
        caller.run(chunk(handle, 1, draw(1, 3)))

    def fail(*_: Any) -> None:
        raise JournalError("the journal is damaged: stream 1 does not match its checksum")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(daemon.durable._journal, "states", fail)
        with pytest.raises(JournalError, match="is damaged"):
            caller.send(state(handles[0], 2, Operation.GET, ack=1))


# --- what is in the way ---


def test_a_folder_belongs_to_one_daemon(daemon: Daemon, model: Model, tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="another daemon keeps its streams there"):
        Daemon(tmp_path, model)


def test_more_streams_than_slots_are_gone_on_with(model: Model, tmp_path: Path) -> None:
    names, before, after = "abcdefghi", {}, {}
    with Daemon(tmp_path, model) as first:
        caller = first.connect()
        handles = {name: caller.handle(name) for name in names}
        for index, name in enumerate(names):
            (before[name],) = caller.run(chunk(handles[name], 1, draw(index, 4)))
        assert first.stats.models["pump"].paged_out == len(names) - 4
        assert not first.stats.models["pump"].host_bytes  # the journal has them
    with Daemon(tmp_path, load(PUMP, tmp_path, slots=2)) as second:
        caller = second.connect()
        assert second.restored == len(names)
        for name in names:
            caller.open(name, mode="resume")
        answers = caller.run(*[chunk(handles[name], 2, draw(9, 3), ack=1) for name in names])
        after = {answer.header.handle: answer for answer in answers}
        assert second.stats.models["pump"].paged_in == len(names)

    for index, name in enumerate(names):
        whole = np.concatenate([before[name].output, after[handles[name]].output])
        np.testing.assert_allclose(whole, expected(draw(index, 4), draw(9, 3)), rtol=1e-4, atol=1e-5)


def test_streams_of_other_weights_are_gone_on_with_only_when_that_is_said(model: Model, tmp_path: Path) -> None:
    with Daemon(tmp_path, model) as first:
        caller = first.connect()
        caller.run(chunk(caller.handle("s"), 1, draw(1, 3)))
    other = load(Network(layers=1, learned=True, counter=True, seed=8), tmp_path)

    with pytest.raises(
        JournalError, match=r"left by another one \(weights, state hash [0-9a-f]{20} then, [0-9a-f]{20} now\)"
    ):
        Daemon(tmp_path, other)
    with Daemon(tmp_path, other, accept_drift=True) as second:
        assert second.restored == 1
    with Daemon(tmp_path, other) as third:  # what was accepted once is no drift any more
        assert third.restored == 1


def test_states_of_other_shapes_are_never_gone_on_with(model: Model, tmp_path: Path) -> None:
    with Daemon(tmp_path, model) as first:
        first.connect().handle("s")
    other = load(Network(layers=2), tmp_path)

    with pytest.raises(JournalError, match="the states of model 'pump' have other types or shapes"):
        Daemon(tmp_path, other, accept_drift=True)


def test_streams_of_a_model_that_is_not_served_are_not_dropped(tmp_path: Path) -> None:
    stamp = Stamp("a", "b", "c", "d", "e")
    with contextlib.closing(Journal(tmp_path, "process")) as journal:
        journal.stamp({"pump": stamp}, accept_drift=False)
        with journal._env.begin(write=True) as transaction:
            _put_stream(journal, transaction, stamp.version)
    with (
        contextlib.closing(Journal(tmp_path, "process")) as journal,
        pytest.raises(JournalError, match="holds streams of model 'pump', which is not served"),
    ):
        journal.stamp({"valve": stamp}, accept_drift=True)


def _put_stream(journal: Journal, transaction: Any, version: str) -> None:
    import msgspec

    from recurd.journal import _entry, _Identity

    identity = _Identity("local", "s", "pump", version, 1, 60.0, "")
    transaction.put(*_entry((7).to_bytes(8), msgspec.msgpack.encode(identity)), db=journal._streams)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(JournalError, match=r"file/journal: cannot be written: Not a directory"):
        Journal(tmp_path / "file" / "journal", "process")


def filled(folder: Path, model: Model) -> Path:
    """The data file of a journal with some streams in it."""
    with Daemon(folder, model) as daemon:
        caller = daemon.connect()
        for name in "abcd":
            handle = caller.handle(name)
            for seq in range(1, 5):
                caller.run(chunk(handle, seq, draw(seq, 6)))
    return folder / "journal" / "data.mdb"


def test_a_damaged_first_page_is_called_damage(model: Model, tmp_path: Path) -> None:
    data = filled(tmp_path, model)
    content = bytearray(data.read_bytes())
    for page in (0, 4096):  # LMDB's two meta pages, by turns the valid one
        content[page + 16 : page + 20] = b"\0\0\0\0"  # MDB_MAGIC
    data.write_bytes(content)

    with pytest.raises(JournalError, match="the journal is damaged"):
        Daemon(tmp_path, model)


def test_a_truncated_journal_is_said_and_left_alone(model: Model, tmp_path: Path) -> None:
    data = filled(tmp_path, model)
    size = data.stat().st_size
    for left in (0, 100, 4096, size // 2):
        data.write_bytes(data.read_bytes()[:left])

        with pytest.raises(JournalError, match=r"damaged|cannot be opened"):
            Daemon(tmp_path, model)

        assert data.stat().st_size == left
        shutil.rmtree(tmp_path / "journal")
        data = filled(tmp_path, model)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1), flips=st.integers(1, 8))
def test_a_corrupted_journal_gives_an_error_or_what_was_written(
    model: Model, tmp_path_factory: pytest.TempPathFactory, place: float, flips: int
) -> None:
    folder = tmp_path_factory.mktemp("corrupted")
    data = filled(folder, model)
    raw = bytearray(data.read_bytes())
    whole = _contents(folder)
    start = int(place * (len(raw) - 64))
    raw[start : start + 8 * flips] = bytes(byte ^ 0x55 for byte in raw[start : start + 8 * flips])
    data.write_bytes(raw)

    with contextlib.suppress(JournalError):
        assert _contents(folder) == whole


#: Bytes of a page of LMDB that say where things are: its own head, and what the two first pages say of the store.
_HEAD_BYTES, _META_BYTES = 16, 152


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(page=st.integers(0, 15), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@example(page=0, place=144 / _META_BYTES, bit=0)  # the number of the transaction: LMDB would go on from the one before
@example(page=1, place=144 / _META_BYTES, bit=0)
@example(page=0, place=80 / _META_BYTES, bit=4)  # where the free pages are noted
@example(page=1, place=80 / _META_BYTES, bit=4)
@example(page=0, place=128 / _META_BYTES, bit=0)  # where the tables are
@example(page=1, place=128 / _META_BYTES, bit=0)
def test_a_bit_that_turned_among_what_says_where_things_are_is_never_another_state(
    model: Model, tmp_path_factory: pytest.TempPathFactory, page: int, place: float, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("turned")
    data = filled(folder, model)
    whole = _contents(folder)
    raw = bytearray(data.read_bytes())
    at = page % (len(raw) // 4096) * 4096 + int(place * (_META_BYTES if page < 2 else _HEAD_BYTES) + 1e-6)
    raw[at] ^= 1 << bit
    data.write_bytes(raw)

    try:
        with Daemon(folder, model) as daemon:
            reply = daemon.connect().open("a", mode="resume")
            assert (reply.type, reply.body["last_seq"], daemon.restored) == (Type.OPENED, 4, 4)
        assert _contents(folder) == whole
    except JournalError as error:
        found_out = str(error)
        assert found_out.startswith(f"{folder}/journal: ")


def test_a_stream_is_not_taken_for_another_when_its_key_turned(model: Model, tmp_path: Path) -> None:
    data = filled(tmp_path, model)
    with contextlib.closing(Journal(tmp_path / "journal", "process")) as journal:
        key = sorted(handle for handle, _, _ in journal.load())[-1].to_bytes(8)
    raw = data.read_bytes()
    assert key in raw
    data.write_bytes(raw.replace(key, key[:-1] + bytes([key[-1] ^ 64])))

    with pytest.raises(JournalError, match="is not what was written"):
        Daemon(tmp_path, model)


def test_a_data_file_of_before_is_found_out_by_the_number_of_commits(model: Model, tmp_path: Path) -> None:
    """Whoever puts back a copy on purpose puts back the whole folder, or takes the note away."""
    data = filled(tmp_path, model)
    before = data.read_bytes()
    with Daemon(tmp_path, model) as daemon:
        caller = daemon.connect()
        caller.run(chunk(caller.handle("e"), 1, draw(1, 6)))
    data.write_bytes(before)

    with pytest.raises(JournalError, match=r"[0-9]+ commits were made, and data\.mdb stands after [0-9]+ of them"):
        Daemon(tmp_path, model)

    (tmp_path / "journal" / "recurd.lock").unlink()
    with Daemon(tmp_path, model) as daemon:
        assert daemon.restored == 4


def test_a_data_file_that_is_missing_is_no_new_journal(model: Model, tmp_path: Path) -> None:
    filled(tmp_path, model).unlink()

    with pytest.raises(JournalError, match=r"there is a recurd\.lock, and no data\.mdb"):
        Daemon(tmp_path, model)

    note = tmp_path / "journal" / "recurd.lock"
    note.write_text("7")
    with pytest.raises(JournalError, match=r"recurd\.lock holds no number of commits"):
        Daemon(tmp_path, model)

    note.unlink()
    with Daemon(tmp_path, model) as daemon:
        assert daemon.restored == 0


def _contents(folder: Path) -> list[Any]:
    with contextlib.closing(Journal(folder / "journal", "process")) as journal:
        return list(journal.load())


# --- a run that raises ---


def test_after_a_run_that_raised_streams_are_where_their_last_answer_left_them(daemon: Daemon) -> None:
    caller = daemon.connect()
    old, new = caller.handle("old"), caller.handle("new")
    (before,) = caller.run(chunk(old, 1, draw(1, 4)))
    caller.send(chunk(old, 2, draw(2, 3), ack=1), chunk(old, 3, draw(3, 2), ack=1), reset(old, 4, ack=1))
    caller.send(chunk(new, 1, draw(4, 20)))
    slots = fail_next(daemon)
    told = caller.take()
    answers = caller.run(chunk(old, 2, draw(2, 3), ack=1), chunk(old, 3, draw(3, 2), ack=1), chunk(new, 1, draw(4, 20)))

    assert slots == 2
    assert [(r.header.handle, r.header.seq, r.code) for r in told] == [
        (old, 2, "run_failed"), (old, 3, "run_failed"), (old, 4, "gap"), (new, 1, "run_failed")
    ]  # fmt: skip
    by_stream = {handle: [a.output for a in answers if a.header.handle == handle] for handle in (old, new)}
    whole = expected(draw(1, 4), draw(2, 3), draw(3, 2))
    np.testing.assert_allclose(np.concatenate([before.output, *by_stream[old]]), whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.concatenate(by_stream[new]), expected(draw(4, 20)), rtol=1e-4, atol=1e-5)
    assert daemon.stats.streams_ended["failed"] == 0


def fail_next(daemon: Daemon) -> int:
    """Take the next tick, spoil the rows of its slots as a half-done run would, and report it as failed; its rows."""
    tick = daemon.engine.take_tick(daemon.now)
    assert tick is not None
    spoiled = {name: np.full_like(rows, 7) for name, rows in daemon.models["pump"].read(tick.slots).items()}
    daemon.models["pump"].write(tick.slots, spoiled)
    daemon.engine.fail(tick, RuntimeError("the device is gone"), daemon.now)
    return len(tick.rows)


def test_a_run_that_raises_in_the_middle_of_a_chunk_takes_back_the_whole_chunk(daemon: Daemon) -> None:
    caller = daemon.connect()
    handle = caller.handle("s")
    (before,) = caller.run(chunk(handle, 1, draw(1, 4)))
    caller.send(reset(handle, 2, ack=1), chunk(handle, 3, draw(2, 20), generation=2, ack=1))
    daemon.tick()
    daemon.sort()
    fail_next(daemon)
    *_, told = caller.take()
    (answer,) = caller.run(chunk(handle, 3, draw(2, 20), generation=2, ack=2))

    assert (told.header.seq, told.code) == (3, "run_failed")
    np.testing.assert_allclose(answer.output, expected(draw(2, 20)), rtol=1e-4, atol=1e-5)
    assert before.output.shape == (4, 2)


def test_a_result_that_is_not_finite_is_taken_back_and_touches_nobody_else(daemon: Daemon) -> None:
    caller = daemon.connect()
    good, bad = caller.handle("good"), caller.handle("bad")
    (before,) = caller.run(chunk(bad, 1, draw(1, 4)))
    caller.send(chunk(bad, 2, draw(2, 3), ack=1), chunk(good, 1, draw(3, 3)))
    tick = daemon.engine.take_tick(daemon.now)
    assert tick is not None
    outputs = daemon.models["pump"].run(tick.slots, tick.fresh, tick.lengths, tick.input)
    outputs[0][0, 2, 0] = np.nan
    daemon.engine.complete(tick, outputs, daemon.now)
    told = {reply.header.handle: reply for reply in caller.take()}
    (again,) = caller.run(chunk(bad, 2, draw(2, 3), ack=1))

    assert told[bad].code == "run_failed"
    assert "gave NaN or infinity" in told[bad].body["text"]
    (line,) = [event for event in daemon.events if event["event"] == "results_not_finite"]
    assert (line["level"], line["rows"], line["stream"], line["seq"]) == ("warning", 1, "bad", 2)
    assert daemon.stats.models["pump"].results_not_finite == 1
    np.testing.assert_allclose(told[good].output, expected(draw(3, 3)), rtol=1e-4, atol=1e-5)
    whole = expected(draw(1, 4), draw(2, 3))
    np.testing.assert_allclose(np.concatenate([before.output, again.output]), whole, rtol=1e-4, atol=1e-5)


def test_a_stream_whose_run_raised_closes_when_that_was_asked_for(daemon: Daemon) -> None:
    caller = daemon.connect()
    handle = caller.handle("s")
    caller.send(chunk(handle, 1, draw(1, 4)), closing(handle, seq=9))
    fail_next(daemon)

    assert [reply.code or reply.type for reply in caller.take()] == ["run_failed", Type.CLOSED]
    assert len(daemon.engine._streams) == 0


@pytest.mark.parametrize("name", ["data.mdb", "recurd.lock"])
def test_files_that_are_deleted_under_a_running_daemon_halt_it(daemon: Daemon, tmp_path: Path, name: str) -> None:
    caller = daemon.connect()
    handle = caller.handle("s")
    daemon.durable.look(daemon.now)
    (first,) = caller.run(chunk(handle, 1, draw(1, 3)))
    (tmp_path / "journal" / name).unlink()

    daemon.durable.look(daemon.now)

    refused = caller.ask(chunk(handle, 2, draw(2, 3), ack=1))
    assert first.type == Type.RESULT
    assert refused.code == "busy"
    assert "deleted or replaced under the running daemon" in refused.body["text"]
    assert daemon.engine.full


# --- a disk that is full ---


@contextlib.contextmanager
def full_disk(daemon: Daemon) -> Iterator[None]:
    """Meanwhile every commit fails as on a full disk."""

    def fail(*_: Any) -> None:
        raise JournalError("/srv/journal: cannot be written: No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(daemon.durable._journal, "commit", fail)
        yield


def test_while_nothing_can_be_saved_nothing_is_told_and_nothing_is_taken(daemon: Daemon) -> None:
    caller = daemon.connect()
    handle = caller.handle("s")

    with full_disk(daemon):
        assert caller.run(chunk(handle, 1, draw(1, 3))) == []
        refused = caller.ask(chunk(handle, 2, draw(2, 3)))
        also_refused = caller.ask(opening("other"))
        assert daemon.tick() is None
    assert caller.take() == []  # not tried again yet
    daemon.now += RETRY_SECONDS
    (result,) = caller.take()
    (second,) = caller.run(chunk(handle, 2, draw(2, 3), ack=1))

    assert (refused.code, also_refused.code) == ("busy", "busy")
    assert "cannot be written: No space left on device" in refused.body["text"]
    assert daemon.stats.journal_failures == 1
    found = np.concatenate([result.output, second.output])
    np.testing.assert_allclose(found, expected(draw(1, 3), draw(2, 3)), rtol=1e-4, atol=1e-5)


def test_what_is_sent_again_while_nothing_can_be_saved_is_not_refused(daemon: Daemon) -> None:
    caller = daemon.connect()
    handle = caller.handle("s")

    with full_disk(daemon):
        first = caller.run(chunk(handle, 1, draw(1, 3)))
        again = caller.run(chunk(handle, 1, draw(1, 3)))
    daemon.now += RETRY_SECONDS
    (result,) = caller.take()

    assert (first, again) == ([], [])
    assert (result.type, Flag.DUPLICATE in result.flags) == (Type.RESULT, False)


def test_who_loses_its_key_while_nothing_can_be_saved_is_not_told_what_waited(daemon: Daemon) -> None:
    daemon.tenants.change({}, {"left": "left", "right": "right"})
    left, right = daemon.connect("l", tenant="left"), daemon.connect("r", tenant="right")
    handles = [caller.handle("s") for caller in (left, right)]
    with full_disk(daemon):
        for caller, handle in zip((left, right), handles, strict=True):
            caller.send(chunk(handle, 1, draw(1, 5)))
        daemon.run()
        assert left.take() == right.take() == []
        daemon.tenants.change({}, {"right": "right"})
        daemon.durable.withhold(daemon.engine.rights_changed())
        assert [reply.code for reply in left.take()] == ["forbidden"]
    daemon.now += RETRY_SECONDS
    daemon.tick()
    daemon.sort()
    assert left.take() == []
    assert [reply.type for reply in right.take()] == [Type.RESULT]
