"""What a tick may hold, for any line of streams: no clock, no model."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recurd.contract import Contract, Head, Input, Source, State
from recurd.scheduler import Row, Scheduler, assemble
from recurd.streams import Chunk, Stream

WIDTH = 2


def contract(*, causal: bool = True, per: Any = "step") -> Contract:
    return Contract(
        name="pump",
        input=Input(dtype="float32", shape=(WIDTH,)),
        heads=(Head(name="y", dtype="float32", shape=(1,), per=per),),
        states=(State(name="h", output="h.next", dtype="float32", shape=(1,), batch_axis=0),),
        causal=causal,
        source=Source(framework="none"),
        weights_sha256="",
    )


def stream(name: str, sizes: list[int], slot: int = 0) -> Stream:
    """A stream with chunks of these numbers of steps in its queue (0: a reset); every element says whose it is."""
    made: Any = Stream(
        tenant="local",
        name=name,
        handle=slot + 1,
        lane=None,  # type: ignore[arg-type]
        generation=1,
        idle_timeout=1.0,
    )
    made.slot = slot
    for seq, steps in enumerate(sizes, 1):
        data = (slot * 1000 + seq * 10 + np.arange(steps * WIDTH) / 100).astype(np.float32)
        made.queue.append(Chunk(seq, 1, 0.0, steps, data))
    return made


def scheduler(
    streams: list[Stream], *, rows: int = 8, steps: int = 64, padding: float = 1.0, **options: Any
) -> Scheduler:
    made = Scheduler(contract(**options), max_rows=rows, max_steps=steps, padding_ratio=padding)
    for one in streams:
        made.add(one)
    return made


def shape(rows: list[Row]) -> list[tuple[str, int]]:
    return [(row.stream.name, row.steps) for row in rows]


def settle(line: Scheduler, rows: list[Row]) -> None:
    """What the engine does after a tick: drop what is done, carry out resets, put the rest back in line."""
    for row in rows:
        queue = row.stream.queue
        while queue and queue[0].taken == queue[0].steps:
            del queue[0]
        if queue:
            line.add(row.stream)


def test_the_line_is_served_first_come_first_served() -> None:
    line = scheduler([stream(name, [3]) for name in "abc"], rows=2)

    assert shape(line.take(0.0)[0]) == [("a", 3), ("b", 3)]
    assert shape(line.take(0.0)[0]) == [("c", 3)]
    assert line.take(0.0)[0] == []


def test_a_long_chunk_is_sliced_and_goes_to_the_end_of_the_line() -> None:
    line = scheduler([stream("long", [10]), stream("short", [4])], rows=1, steps=4)
    order = []
    while rows := line.take(0.0)[0]:
        order += shape(rows)
        settle(line, rows)

    assert order == [("long", 4), ("short", 4), ("long", 4), ("long", 2)]


def test_joining_stops_at_a_reset_and_at_the_most_steps() -> None:
    assert shape(scheduler([stream("s", [2, 3, 0, 4])]).take(0.0)[0]) == [("s", 5)]
    assert shape(scheduler([stream("s", [2, 3, 4])], steps=6).take(0.0)[0]) == [("s", 5)]
    assert shape(scheduler([stream("s", [2, 3, 4])], steps=9).take(0.0)[0]) == [("s", 9)]


def test_a_row_that_finishes_a_chunk_ends_with_a_chunk() -> None:
    one = stream("s", [8, 3, 9])
    line = scheduler([one], steps=6)

    assert shape(line.take(0.0)[0]) == [("s", 6)]  # the first chunk, cut
    line.add(one)
    assert shape(line.take(0.0)[0]) == [("s", 5)]  # its rest and the second, whole; the third does not fit


@pytest.mark.parametrize("options", [{"causal": False}, {"per": "last"}], ids=["looks ahead", "last step"])
def test_chunks_of_a_model_whose_outputs_depend_on_the_cuts_are_never_joined(options: dict[str, Any]) -> None:
    rows = scheduler([stream("s", [2, 3])], **options).take(0.0)[0]

    assert shape(rows) == [("s", 2)]


def test_a_chunk_of_a_model_that_looks_ahead_is_never_sliced() -> None:
    assert shape(scheduler([stream("s", [100])], steps=4, causal=False).take(0.0)[0]) == [("s", 100)]


def test_rows_of_other_lengths_are_passed_over_and_keep_their_place() -> None:
    streams = [stream("a", [1]), stream("b", [50]), stream("c", [1]), stream("d", [50])]
    line = scheduler(streams, padding=0.25)

    assert shape(line.take(0.0)[0]) == [("a", 1), ("c", 1)]
    assert shape(line.take(0.0)[0]) == [("b", 50), ("d", 50)]


def test_a_stream_that_ends_leaves_the_line() -> None:
    first, second = stream("a", [1]), stream("b", [1])
    line = scheduler([first, second])
    line.remove(first)
    line.remove(first)  # it may be gone already

    assert shape(line.take(0.0)[0]) == [("b", 1)]


QUEUES = st.lists(
    st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(lambda sizes: sizes[0] > 0), min_size=1, max_size=12
)


@given(
    queues=QUEUES,
    rows=st.integers(1, 6),
    steps=st.integers(1, 12),
    padding=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    causal=st.booleans(),
    per=st.sampled_from(["step", "last"]),
)
@settings(max_examples=300, deadline=None)
def test_every_tick_keeps_the_rules_and_nothing_is_lost(
    queues: list[list[int]], rows: int, steps: int, padding: float, causal: bool, per: str
) -> None:
    streams = [stream(f"s{slot}", sizes, slot) for slot, sizes in enumerate(queues)]
    sent = {one.name: [c for c in one.queue if c.steps] for one in streams}
    line = scheduler(streams, rows=rows, steps=steps, padding=padding, causal=causal, per=per)
    waiting = list(streams)  # what the line must look like
    got: dict[str, list[np.ndarray[Any, Any]]] = {one.name: [] for one in streams}
    while waiting:
        taken = line.take(0.0)[0]
        check_rules(taken, waiting[0], rows, steps, padding, causal and per == "step", causal)
        tick = assemble("pump", contract(causal=causal), taken, now=0.0)
        for index, row in enumerate(taken):
            got[row.stream.name].append(tick.input[index, : row.steps])
            assert (tick.slots[index], tick.lengths[index]) == (row.stream.slot, row.steps)
            last = tick.input[index, row.steps - 1]
            assert (tick.input[index, row.steps :] == last).all(), "padding is a step that the model takes"
        waiting = [one for one in waiting if one not in [row.stream for row in taken]]
        for row in taken:
            while row.stream.queue and row.stream.queue[0].taken == row.stream.queue[0].steps:
                del row.stream.queue[0]
            if row.stream.queue:
                line.add(row.stream)
                waiting.append(row.stream)
    assert line.take(0.0)[0] == []
    for name, chunks in sent.items():
        expected = np.concatenate([c.data for c in chunks]).reshape(-1, WIDTH)
        np.testing.assert_array_equal(np.concatenate(got[name]), expected)


def check_rules(
    taken: list[Row], oldest: Stream, rows: int, steps: int, padding: float, joins: bool, slices: bool
) -> None:
    assert 1 <= len(taken) <= rows
    assert taken[0].stream is oldest, "the longest waiting stream is always in the next tick"
    assert len({row.stream.name for row in taken}) == len(taken), "one row a stream"
    longest = max(row.steps for row in taken)
    cells = longest * len(taken)
    assert cells - sum(row.steps for row in taken) <= padding * cells + 1e-9
    for row in taken:
        assert row.steps >= 1
        assert row.steps <= steps or not slices
        assert row.steps == sum(count for _, _, count in row.parts)
        assert all(chunk.steps for chunk, _, _ in row.parts), "a reset is no step"
        assert joins or len(row.parts) == 1
        assert slices or all((first, count) == (0, chunk.steps) for chunk, first, count in row.parts)
        seqs = [chunk.seq for chunk, _, _ in row.parts]
        assert seqs == list(range(seqs[0], seqs[0] + len(seqs))), "in order, none left out"


def test_a_fresh_start_goes_to_the_first_slice_alone() -> None:
    one = stream("s", [10])
    line = scheduler([one], steps=4)
    starts = []
    while rows := line.take(0.0)[0]:
        starts += assemble("pump", contract(), rows, now=0.0).fresh.tolist()
        settle(line, rows)

    assert starts == [True, False, False]
