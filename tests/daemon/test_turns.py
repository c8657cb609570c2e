"""Tenants that share a lane: however much one of them has waiting, the others have their turn."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recurd.contract import Contract, Head, Input, Source, State
from recurd.scheduler import Row, Scheduler
from recurd.streams import Chunk, Stream
from recurd.tenants import Share

CONTRACT = Contract(
    name="pump",
    input=Input(dtype="float32", shape=(1,)),
    heads=(Head(name="y", dtype="float32", shape=(1,)),),
    states=(State(name="h", output="h.next", dtype="float32", shape=(1,), batch_axis=0),),
    source=Source(framework="none"),
    weights_sha256="",
)
SHARE = Share("any", None)  # type: ignore[arg-type]  # only that there is one counts here


def stream(tenant: str, name: str, sizes: list[int]) -> Stream:
    made: Any = Stream(
        tenant=tenant,
        name=name,
        handle=0,
        lane=None,  # type: ignore[arg-type]
        generation=1,
        idle_timeout=1.0,
    )
    made.share = SHARE
    for seq, steps in enumerate(sizes, 1):
        made.queue.append(Chunk(seq, 1, 0.0, steps, np.zeros(steps, np.float32)))
    return made


def scheduler(*streams: Stream, rows: int = 4, steps: int = 16, padding: float = 0.25) -> Scheduler:
    made = Scheduler(CONTRACT, max_rows=rows, max_steps=steps, padding_ratio=padding)
    for one in streams:
        made.add(one)
    return made


def names(rows: list[Row]) -> list[str]:
    return [row.stream.name for row in rows]


def settle(line: Scheduler, rows: list[Row]) -> None:
    """What the engine does after a tick: drop what is done, put the rest back in line."""
    for row in rows:
        queue = row.stream.queue
        while queue and queue[0].taken == queue[0].steps:
            del queue[0]
        if queue:
            line.add(row.stream)


def test_tenants_take_turns_and_each_ones_streams_keep_their_order() -> None:
    line = scheduler(*[stream("a", f"a{n}", [1]) for n in range(6)], *[stream("b", f"b{n}", [1]) for n in range(2)])

    assert names(line.take(0.0)[0]) == ["a0", "b0", "a1", "b1"]
    assert names(line.take(0.0)[0]) == ["a2", "a3", "a4", "a5"]
    assert (names(line.take(0.0)[0]), len(line)) == ([], 0)


def test_more_tenants_than_rows_are_all_served_before_one_has_a_second_turn() -> None:
    line = scheduler(*[stream(t, f"{t}{n}", [1]) for t in "abcde" for n in range(3)], rows=2)

    order = [name for _ in range(8) for name in names(line.take(0.0)[0])]

    assert [order[start : start + 5] for start in (0, 5, 10)] == [[f"{t}{n}" for t in "abcde"] for n in range(3)]


def test_a_tenant_that_was_passed_over_comes_first_in_the_next_tick() -> None:
    long = [stream("a", f"a{n}", [16] * 9) for n in range(8)]
    line = scheduler(*long, stream("b", "b", [1]))

    first = line.take(0.0)[0]
    settle(line, first)

    assert "b" not in names(first)  # too short to run with rows of 16
    assert names(line.take(0.0)[0])[0] == "b"


def test_streams_of_before_the_daemon_was_shared_keep_their_place() -> None:
    old = [stream("local", f"old{n}", [1]) for n in range(3)]
    for one in old:
        one.share = None
    line = scheduler(*old, stream("b", "b", [1]), rows=2)

    assert len(line) == 4
    assert sorted(names(line.take(0.0)[0]) + names(line.take(0.0)[0])) == ["b", "old0", "old1", "old2"]


def test_a_stream_that_ends_before_its_turn_is_taken_out() -> None:
    one, two = stream("a", "a", [1]), stream("b", "b", [1])
    line = scheduler(one, two)

    line.remove(one)
    line.remove(one)

    assert (len(line), names(line.take(0.0)[0]), len(line)) == (1, ["b"], 0)


@settings(deadline=None, max_examples=25)
@given(
    steps=st.lists(st.integers(1, 200), min_size=1, max_size=20),
    single=st.integers(1, 200),
    wait=st.integers(0, 30),
    others=st.integers(0, 3),
)
def test_ten_thousand_waiting_streams_delay_anothers_single_one_by_a_few_ticks(
    steps: list[int], single: int, wait: int, others: int
) -> None:
    crowd = [stream("a", str(n), [steps[n % len(steps)]] * 2) for n in range(10_000)]
    line = scheduler(*crowd, *[stream(f"c{n}", f"c{n}", [7]) for n in range(others)], rows=8)
    for _ in range(wait):
        settle(line, line.take(0.0)[0])
    mine = stream("b", "mine", [single])

    line.add(mine)

    slices = -(-single // 16)
    for tick in range(1, 10_000):  # noqa: B007  # looked at below
        rows = line.take(0.0)[0]
        settle(line, rows)
        if not mine.queue:
            break
    # its slices, one a tick, and each may be passed over once for everybody whose turn was before
    assert tick <= slices * (2 + others)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.integers(1, 40), min_size=1, max_size=3)), max_size=40))
def test_every_chunk_of_every_tenant_is_run_once_and_none_stays(drawn: list[tuple[str, list[int]]]) -> None:
    streams = [stream(tenant, str(number), sizes) for number, (tenant, sizes) in enumerate(drawn)]
    line = scheduler(*streams)
    steps = dict.fromkeys(map(str, range(len(drawn))), 0)

    for _ in range(1000):
        rows = line.take(0.0)[0]
        if not rows:
            break
        assert len({row.stream.name for row in rows}) == len(rows)
        for row in rows:
            steps[row.stream.name] += row.steps
        settle(line, rows)

    assert steps == {str(number): sum(sizes) for number, (_, sizes) in enumerate(drawn)}
    assert len(line) == 0


@pytest.mark.parametrize(("tenant", "ahead"), [("a", 103), ("b", 2), ("c", 8)])
def test_what_a_stream_would_wait_for_counts_only_who_has_a_turn_before(tenant: str, ahead: int) -> None:
    line = scheduler(*[stream("a", f"a{n}", [1]) for n in range(100)], *[stream("c", f"c{n}", [1]) for n in range(2)])
    if tenant != "b":
        line.add(stream("b", "b", [1]))
    line.pace.seconds_per_row = 1.0
    new = stream(tenant, "new", [])

    assert 0 < line.wait_seconds(new) <= ahead
