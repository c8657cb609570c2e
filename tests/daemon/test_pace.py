"""Overload without a clock: what is accepted waits no longer than it may, and the daemon is never idle meanwhile."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dialogue import Caller, Desk, Reply, chunk, opening, reset
from recurd.config import Config, Limits, Tick
from recurd.model import Model
from recurd.scheduler import Pace
from recurd.wire import Type
from recurrent import Network

PUMP = Network(hidden=4, layers=1)
X = PUMP.draw(4, np.random.default_rng(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.load(PUMP.save(tmp_path_factory.mktemp("models") / "pump.onnx"), slots=200, threads=1)


# --- the pace ---


def test_nothing_is_known_of_the_pace_while_nobody_waits() -> None:
    pace = Pace()
    for now in range(100):
        pace.took(float(now), 5, left=False)

    assert pace.seconds_per_row == 0


def test_the_time_after_a_tick_that_left_nobody_in_line_does_not_count() -> None:
    pace = Pace()
    pace.took(0.0, 10, left=True)
    pace.took(1.0, 10, left=False)
    pace.took(1000.0, 10, left=True)
    pace.took(1001.0, 10, left=True)

    assert pace.seconds_per_row == pytest.approx(0.1)


def test_a_pause_does_not_count() -> None:
    pace = Pace()
    pace.took(0.0, 10, left=True)
    pace.pause()
    pace.took(60.0, 10, left=True)
    pace.took(61.0, 10, left=True)

    assert pace.seconds_per_row == pytest.approx(0.1)


def test_while_nobody_waits_the_pace_fades_to_that_of_the_runs() -> None:
    pace = Pace()
    pace.took(0.0, 10, left=True)
    pace.took(600.0, 10, left=False)
    for _ in range(100):
        pace.took(1000.0, 10, left=False)
        pace.ran(1.0, 10)

    assert pace.seconds_per_row == pytest.approx(0.1)


@given(st.lists(st.tuples(st.floats(1e-4, 10), st.integers(1, 1000)), min_size=1, max_size=50))
def test_the_pace_lies_between_the_slowest_and_the_fastest_tick(ticks: list[tuple[float, int]]) -> None:
    pace, now = Pace(), 0.0
    for seconds, rows in ticks:
        pace.took(now, rows, left=True)
        now += seconds
    pace.took(now, 1, left=True)

    each = [seconds / rows for seconds, rows in ticks]
    assert min(each) * 0.999 <= pace.seconds_per_row <= max(each) * 1.001


@given(st.floats(1e-3, 10), st.floats(1e-3, 10))
def test_the_pace_follows_another_one_within_fifty_ticks(before: float, after: float) -> None:
    pace, now = Pace(), 0.0
    for number in range(100):
        pace.took(now, 10, left=True)
        now += before if number < 50 else after
    pace.took(now, 10, left=True)

    assert pace.seconds_per_row == pytest.approx(after / 10, rel=0.2, abs=0.006 * before)


# --- who is let in ---


class Pump:
    """Streams that send, each so many chunks a round, and a device that takes ``tick_seconds`` for any tick."""

    def __init__(self, model: Model, streams: int, *, rows: int = 4, queued_seconds: float = 0.8) -> None:
        limits = Limits(queued_seconds=queued_seconds, stream_credit=1000, busy_retry_seconds=0.01)
        self.desk = Desk({"pump": model}, Config(limits=limits, tick=Tick(rows=rows, steps=8)))
        self.caller: Caller = self.desk.connect()
        self.handles = [self.caller.handle(f"s{number}") for number in range(streams)]
        self.seqs = dict.fromkeys(self.handles, 1)
        self.accepted: dict[tuple[int, int], float] = {}
        self.waits: list[float] = []
        self.refused: list[Reply] = []

    def send(self, handle: int) -> bool:
        """One more chunk of a stream; whether it was taken."""
        seq = self.seqs[handle]
        self.caller.send(chunk(handle, seq, X, ack=seq - 1))
        answers = self.caller.take()
        self.refused += answers
        if not answers:
            self.accepted[handle, seq] = self.desk.now
            self.seqs[handle] += 1
        return not answers

    def tick(self, seconds: float) -> int:
        """One tick; the number of chunks it answered."""
        tick = self.desk.engine.take_tick(self.desk.now)
        if tick is None:
            self.desk.now += seconds
            return 0
        started = self.desk.now
        outputs = self.desk.models["pump"].run(tick.slots, tick.fresh, tick.lengths, tick.input)
        self.desk.now += seconds
        self.desk.engine.complete(tick, outputs, self.desk.now)
        replies = self.caller.take()
        for reply in replies:
            assert reply.type == Type.RESULT
            self.waits.append(started - self.accepted.pop((reply.header.handle, reply.header.seq)))
        return len(replies)


def test_a_chunk_that_would_wait_too_long_is_refused_with_a_time_to_come_again(model: Model) -> None:
    pump = Pump(model, 40)
    for _ in range(8):
        for handle in pump.handles:
            pump.send(handle)
        pump.tick(0.05)  # ten ticks for a round: half a second

    busy = [reply.body for reply in pump.refused]
    assert busy
    assert {body["code"] for body in busy} == {"busy"}
    assert all(0.01 <= body["retry_after_seconds"] <= 2 for body in busy)
    assert "to be run" in busy[0]["text"]


def test_who_has_nothing_waiting_is_let_in_where_others_are_not(model: Model) -> None:
    pump = Pump(model, 40)
    for _ in range(20):
        for handle in pump.handles[:30]:
            pump.send(handle)
        pump.tick(0.05)

    assert not pump.send(pump.handles[0])
    assert pump.send(pump.handles[39])


def test_a_line_that_is_too_long_even_for_one_turn_lets_nobody_in(model: Model) -> None:
    pump = Pump(model, 120, queued_seconds=0.2)
    for handle in pump.handles[:100]:
        pump.send(handle)
    pump.tick(0.1)
    pump.tick(0.1)

    assert not pump.send(pump.handles[110])  # 92 rows at 25 ms, and 0.8 s at most
    while pump.desk.engine.queued_chunks > 30:
        pump.tick(0.1)
    assert pump.send(pump.handles[110])


def test_one_tick_that_took_very_long_keeps_nobody_out_for_ever(model: Model) -> None:
    pump = Pump(model, 40)
    for handle in pump.handles[:5]:
        pump.send(handle)
    pump.tick(60)
    pump.tick(0.01)

    for _ in range(120):
        pump.tick(0.01)
        let_in = [pump.send(handle) for handle in pump.handles[:20]]
        while pump.desk.engine.queued_chunks:
            pump.tick(0.01)
    assert all(let_in)


def test_the_time_after_the_last_in_line_has_ended_does_not_count(model: Model) -> None:
    pump = Pump(model, 5)
    for handle in pump.handles:
        pump.send(handle)
    pump.tick(0.01)
    pump.caller.send(opening("s4", mode="new"))
    pump.caller.take()
    pump.desk.now += 3600
    for handle in pump.handles[:4]:
        pump.send(handle)
    pump.tick(0.01)

    assert pump.desk.engine._lanes["pump"].scheduler.pace.seconds_per_row == 0


def test_a_reset_needs_no_turn_and_is_let_in(model: Model) -> None:
    pump = Pump(model, 120, queued_seconds=0.2)
    for handle in pump.handles[:100]:
        pump.send(handle)
    pump.tick(0.1)
    pump.tick(0.1)
    pump.caller.send(reset(pump.handles[110], 1))

    assert [reply.type for reply in pump.caller.take()] == [Type.DONE]


@given(
    streams=st.integers(5, 60),
    each=st.integers(1, 6),
    tick_seconds=st.floats(0.001, 0.2),
    bound=st.floats(0.2, 2.0),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_whatever_is_offered_the_accepted_waits_within_bounds_and_no_tick_is_idle(
    model: Model, streams: int, each: int, tick_seconds: float, bound: float, seed: int
) -> None:
    pump, random = Pump(model, streams, queued_seconds=bound), np.random.default_rng(seed)
    for round_number in range(40):
        for place, handle in enumerate(random.permutation(pump.handles).tolist()):
            # In every round somebody sends: a tick after a round in which nobody does is idle by right.
            for _ in range(max(int(random.integers(0, 2 * each + 1)), place == 0)):
                if not pump.send(handle):
                    break
        idle = not pump.tick(tick_seconds)
        assert not idle or not round_number or not pump.refused
    while pump.desk.engine.queued_chunks:
        assert pump.tick(tick_seconds)

    # One round of those that came before the pace was known, and the turn that a chunk may share with others.
    first_round = (streams / 4 + 2) * 2 * each * tick_seconds
    assert max(pump.waits, default=0) <= 4 * bound + first_round + 2 * tick_seconds
    assert pump.send(pump.handles[0])  # at once after
