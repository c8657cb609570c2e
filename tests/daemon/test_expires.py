"""Chunks that may not wait for ever: one that is not started by then has not happened, whatever is queued around it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dialogue import Caller, Desk, Reply, chunk, closing, reset
from recurd.config import Config, Durability, Limits, Tenant, Tick
from recurd.errors import Code
from recurd.model import Model
from recurd.saving import SavedStream
from recurd.wire import Type
from recurrent import Array, Network

PUMP = Network(hidden=4, layers=1)
EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-5}

OpenDesk = Callable[..., Desk]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.load(PUMP.save(tmp_path_factory.mktemp("models") / "pump.onnx"), slots=40, threads=1)


@pytest.fixture
def open_desk(model: Model) -> OpenDesk:
    return lambda **config: Desk({"pump": model}, Config(**config))


def draw(steps: int, seed: int = 0) -> Array:
    return PUMP.draw(steps, np.random.default_rng(seed))


def told(replies: list[Reply]) -> list[tuple[int, str]]:
    """What each record got: its seq, and the error's word or the message's name."""
    return [(reply.header.seq, reply.code or Type(reply.type).name) for reply in replies]


def later(caller: Caller, seconds: float) -> list[Reply]:
    """What a connection gets when its daemon comes to run something only so much later."""
    caller.desk.now += seconds
    caller.desk.run()
    return caller.take()


def test_a_chunk_that_is_started_in_time_is_run(open_desk: OpenDesk) -> None:
    caller = open_desk().connect()
    caller.send(chunk(caller.handle("s"), 1, draw(3), code=500))

    assert told(later(caller, 0.5)) == [(1, "RESULT")]


def test_a_late_chunk_is_refused_and_its_number_is_free(open_desk: OpenDesk) -> None:
    desk = open_desk()
    caller = desk.connect()
    handle, x = caller.handle("s"), draw(6)
    caller.run(chunk(handle, 1, x[:3]))
    caller.send(chunk(handle, 2, draw(5, seed=1), code=500))

    assert told(later(caller, 0.501)) == [(2, "late")]
    assert (desk.stats.refused[Code.LATE], desk.stats.models["pump"].ticks) == (1, 1)
    (reply,) = caller.run(chunk(handle, 2, x[3:]))
    np.testing.assert_allclose(reply.output, PUMP.run(x)[0]["output"][3:], **EXACT)


def test_a_stream_with_nothing_left_is_not_in_line(open_desk: OpenDesk) -> None:
    desk = open_desk()
    caller = desk.connect()
    caller.send(chunk(caller.handle("s"), 1, draw(3), code=1))
    later(caller, 1)

    assert desk.engine.queued_chunks == 0
    assert desk.engine.deadline() != 0.0


def test_what_is_queued_behind_a_late_chunk_is_refused_with_it_and_resets_have_not_happened(
    open_desk: OpenDesk,
) -> None:
    caller = open_desk().connect()
    handle = caller.handle("s")
    caller.send(
        chunk(handle, 1, draw(2), code=100),
        reset(handle, 2),
        chunk(handle, 3, draw(2), generation=2),
        reset(handle, 4, generation=2),
    )

    replies = later(caller, 1)
    assert told(replies) == [(1, "late"), (2, "gap"), (3, "gap"), (4, "gap")]
    assert [reply.body.get("expected") for reply in replies] == [None, 1, 1, 1]
    assert told(caller.run(chunk(handle, 1, draw(2), generation=1))) == [(1, "RESULT")]
    opened = caller.open("s").body
    assert (opened["generation"], opened["last_seq"]) == (1, 1)


def test_a_late_chunk_is_not_joined_behind_one_that_is_in_time(open_desk: OpenDesk) -> None:
    caller = open_desk().connect()
    handle = caller.handle("s")
    caller.send(chunk(handle, 1, draw(2)), chunk(handle, 2, draw(2), code=100), chunk(handle, 3, draw(2)))

    assert told(later(caller, 1)) == [(1, "RESULT"), (2, "late"), (3, "gap")]


def test_a_chunk_that_has_been_started_is_never_late(open_desk: OpenDesk) -> None:
    desk = open_desk(tick=Tick(steps=4))
    caller = desk.connect()
    handle, x = caller.handle("s"), draw(11)
    caller.send(chunk(handle, 1, x, code=100))
    desk.tick()

    (reply,) = later(caller, 10)
    np.testing.assert_allclose(reply.output, PUMP.run(x)[0]["output"], **EXACT)


def test_late_chunks_do_not_hold_up_the_others(open_desk: OpenDesk) -> None:
    desk = open_desk(tick=Tick(rows=2))
    caller = desk.connect()
    for number in range(30):
        caller.send(chunk(caller.handle(f"late{number}"), 1, draw(2), code=100))
    caller.send(chunk(caller.handle("s"), 1, draw(2)))
    caller.take()
    replies = later(caller, 1)
    rounds = 0
    while desk.engine.deadline() == 0.0:
        rounds += 1
        replies += later(caller, 0)

    assert sorted(told(replies)) == [(1, "RESULT")] + [(1, "late")] * 30
    assert rounds < 8


def test_a_close_waits_for_a_late_chunk_too(open_desk: OpenDesk) -> None:
    caller = open_desk().connect()
    handle = caller.handle("s")
    caller.send(chunk(handle, 1, draw(2), code=100), closing(handle, seq=9))

    assert told(later(caller, 1)) == [(1, "late"), (9, "CLOSED")]


def test_nobody_is_told_of_a_late_chunk_whose_client_is_gone(open_desk: OpenDesk) -> None:
    desk = open_desk()
    caller = desk.connect()
    caller.send(chunk(caller.handle("s"), 1, draw(2), code=100))
    desk.engine.disconnected(caller.routing_id)

    assert told(later(caller, 1)) == []
    assert desk.connect("b").open("s").body["last_seq"] == 0


def test_an_error_says_at_which_attempt_its_record_was_sent(open_desk: OpenDesk) -> None:
    caller = open_desk().connect()
    handle = caller.handle("s")
    caller.send(
        chunk(handle, 1, draw(2), code=100, flags=0x10),
        chunk(handle, 2, draw(2), flags=0x10),
        chunk(handle, 1, draw(2), code=100, flags=0x20),
    )

    assert [reply.header.flags for reply in later(caller, 1)] == [0x20, 0x10]
    assert caller.ask(chunk(handle, 7, draw(2), flags=0x30)).header.flags == 0x30


def test_the_attempt_counts_also_of_what_comes_while_nothing_can_be_saved(open_desk: OpenDesk, tmp_path: Path) -> None:
    desk = open_desk(durability=Durability(mode="process", directory=str(tmp_path)))
    caller = desk.connect()
    handle = caller.handle("s")
    caller.send(chunk(handle, 1, draw(2), code=100, flags=0x10))
    desk.engine.halt("the disk is full")
    caller.send(chunk(handle, 1, draw(2), code=100, flags=0x20), chunk(handle, 2, draw(2), flags=0x10))
    assert told(caller.take()) == [(2, "busy")]
    desk.engine.saved()

    (late,) = later(caller, 1)
    assert (late.code, late.header.flags) == ("late", 0x20)


def test_late_chunks_of_one_tenant_do_not_hold_up_another(model: Model) -> None:
    desk = Desk({"pump": model}, Config(tick=Tick(rows=2), tenants={"a": Tenant(), "b": Tenant()}))
    one, other = desk.connect("a", tenant="a"), desk.connect("b", tenant="b")
    for number in range(30):
        one.send(chunk(one.handle(f"s{number}"), 1, draw(2), code=100))
    other.send(chunk(other.handle("s"), 1, draw(2)))
    desk.now += 1
    desk.tick()

    assert told(other.take()) == [(1, "RESULT")]
    while desk.engine.deadline() == 0.0:
        desk.tick()
    assert sorted(told(one.take())) == [(1, "late")] * 30


def test_a_durable_stream_stands_in_the_journal_as_if_the_late_chunk_had_never_come(
    open_desk: OpenDesk, tmp_path: Path
) -> None:
    desk = open_desk(durability=Durability(mode="process", directory=str(tmp_path)))
    caller = desk.connect()
    handle, x = caller.handle("s"), draw(6)
    caller.run(chunk(handle, 1, x[:3]))
    desk.engine.saved()
    caller.send(chunk(handle, 2, draw(2), code=100), reset(handle, 3))

    assert told(later(caller, 1)) == [(2, "late"), (3, "gap")]
    assert desk.engine.to_save() is None
    (reply,) = caller.run(chunk(handle, 2, x[3:], ack=1))
    np.testing.assert_allclose(reply.output, PUMP.run(x)[0]["output"][3:], **EXACT)
    saving = desk.engine.to_save()
    assert saving is not None
    saved = SavedStream.of(saving.streams[0], b"")
    assert (saved.seq, saved.generation) == (2, 1)


ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("chunk"), st.integers(0, 2), st.sampled_from([0, 0, 50, 200, 400])),
        st.tuples(st.just("chunk"), st.integers(0, 2), st.sampled_from([0, 50, 200])),
        st.tuples(st.just("reset"), st.integers(0, 2), st.just(0)),
        st.tuples(st.just("tick"), st.just(0), st.just(0)),
        st.tuples(st.just("wait"), st.just(0), st.sampled_from([20, 100, 300])),
    ),
    min_size=5,
    max_size=60,
)


class Streamer:
    """One stream's client, which numbers as the protocol says: after a refusal it goes on from what is expected."""

    def __init__(self, caller: Caller, name: str) -> None:
        self.caller = caller
        self.handle = caller.handle(name)
        # what was sent and not answered; generation with it and without it; everything that has happened since a reset
        self.sent: list[tuple[int, Array | None, float]] = []
        self.generation = self.settled_generation = 1
        self.done = 0
        self.truth: list[Array] = []

    def send(self, x: Array | None, milliseconds: int = 0) -> None:
        seq, now = self.done + len(self.sent) + 1, self.caller.desk.now
        fields = {"generation": self.generation, "ack": self.done}
        if x is None:
            self.caller.send(reset(self.handle, seq, **fields))
            self.generation += 1
        else:
            self.caller.send(chunk(self.handle, seq, x, code=milliseconds, **fields))
        self.sent.append((seq, x, now + milliseconds / 1000 if milliseconds else np.inf))

    def read(self, reply: Reply) -> None:
        seq, x, starts_by = self.sent.pop(0)
        assert reply.header.seq == seq
        if reply.type == Type.ERROR:
            assert reply.code == "gap" or (reply.code == "late" and self.caller.desk.now > starts_by)
            self.generation = self.settled_generation
            return
        self.done = seq
        if x is None:
            self.truth = []
            self.settled_generation += 1
            return
        self.truth.append(x)
        whole = PUMP.run(np.concatenate(self.truth))[0]["output"]
        np.testing.assert_allclose(reply.output, whole[-len(x) :], **EXACT)


@given(acts=ACTS, steps=st.integers(1, 6), rows=st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_what_was_not_late_gives_what_one_pass_over_it_gives(
    model: Model, acts: list[tuple[str, int, int]], steps: int, rows: int
) -> None:
    limits = Limits(stream_credit=64, queued_seconds=1e9)
    desk = Desk({"pump": model}, Config(tick=Tick(rows=rows, steps=steps), limits=limits))
    caller = desk.connect()
    streams = [Streamer(caller, f"s{number}") for number in range(3)]
    by_handle = {stream.handle: stream for stream in streams}
    for index, (act, number, value) in enumerate(acts):
        if act == "chunk":
            streams[number].send(draw(1 + index % 7, seed=index), value)
        elif act == "reset":
            streams[number].send(None)
        elif act == "tick":
            desk.tick()
        else:
            desk.now += value / 1000
        for reply in caller.take():
            by_handle[reply.header.handle].read(reply)
    while desk.engine.deadline() == 0.0:
        desk.tick()
    for reply in caller.take():
        by_handle[reply.header.handle].read(reply)

    assert [stream.sent for stream in streams] == [[], [], []]
    assert desk.engine.queued_chunks == 0
    for number, stream in enumerate(streams):
        body = caller.open(f"s{number}").body
        assert (body["generation"], body["last_seq"]) == (stream.generation, stream.done)
