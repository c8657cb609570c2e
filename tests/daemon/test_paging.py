"""More streams than slots: whoever is run when, every stream's results are those of one pass of the model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dialogue import Desk, chunk, closing, reset
from recurd.config import Config, Tick
from recurd.model import Model
from recurrent import Network

PUMP = Network(learned=True, counter=True)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.load(PUMP.save(tmp_path_factory.mktemp("paging") / "pump.onnx"), slots=8, threads=1)


def draw(seed: int, steps: int) -> np.ndarray[Any, Any]:
    return PUMP.draw(steps, np.random.default_rng(seed))


def host_bytes(desk: Desk) -> int:
    return desk.stats.models["pump"].host_bytes


STREAMS = 7
#: What happens to a stream: so many steps are pushed (0: a reset), and whether the daemon works before the next.
EVENTS = st.lists(st.tuples(st.integers(0, STREAMS - 1), st.integers(0, 9), st.booleans()), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS, slots=st.integers(1, 4), rows=st.integers(1, 4), steps=st.integers(1, 6))
def test_any_interleaving_over_few_slots_gives_what_one_pass_gives(
    model: Model, events: list[tuple[int, int, bool]], slots: int, rows: int, steps: int
) -> None:
    desk = Desk({"pump": model}, Config(tick=Tick(rows=rows, steps=steps)), slots=slots)
    caller = desk.connect()
    handles = [caller.handle(f"s{index}") for index in range(STREAMS)]
    sent: list[list[list[np.ndarray[Any, Any]]]] = [[[]] for _ in handles]
    seqs, results = [0] * STREAMS, dict[int, list[Any]]()
    for number, (index, count, works) in enumerate(events):
        seqs[index] += 1
        fields = {"generation": len(sent[index]), "ack": max(0, seqs[index] - 60)}
        if count:
            x = draw(number, count)
            sent[index][-1].append(x)
            caller.send(chunk(handles[index], seqs[index], x, **fields))
        else:
            sent[index].append([])
            caller.send(reset(handles[index], seqs[index], **fields))
        if works:
            desk.tick()
    for reply in caller.run():
        assert not reply.code, reply
        if reply.payload:
            results.setdefault(reply.header.handle, []).append(reply.output)

    for handle, lives in zip(handles, sent, strict=True):
        expected = [PUMP.run(np.concatenate(chunks))[0]["output"] for chunks in lives if chunks]
        if expected:
            np.testing.assert_allclose(np.concatenate(results[handle]), np.concatenate(expected), **CLOSE)
    assert len(desk.engine._lanes["pump"].slots) <= slots


def test_a_state_in_the_hosts_memory_is_let_go_when_it_is_back_or_not_needed_any_more(model: Model) -> None:
    desk = Desk({"pump": model}, slots=1)
    caller = desk.connect()
    first, second, third = (caller.handle(name) for name in "abc")
    for handle in (first, second, third):
        caller.run(chunk(handle, 1, draw(1, 3)))
    assert host_bytes(desk) == 2 * model.row_bytes

    caller.run(closing(first))
    assert host_bytes(desk) == model.row_bytes
    caller.run(chunk(second, 2, draw(2, 3), ack=1))  # for which the third goes out
    assert host_bytes(desk) == model.row_bytes
    caller.run(reset(third, 2, ack=1))
    caller.run(chunk(third, 3, draw(3, 3), generation=2, ack=2))
    assert host_bytes(desk) == model.row_bytes
    stats = desk.stats.models["pump"]
    assert (stats.paged_out, stats.paged_in, stats.slots_used) == (4, 1, 1)
    assert stats.page_in_seconds.count == 1


def test_those_run_lately_stay(model: Model) -> None:
    desk = Desk({"pump": model}, Config(tick=Tick(rows=1)), slots=3)
    caller = desk.connect()
    handles = [caller.handle(f"s{index}") for index in range(4)]
    for handle in handles[:3]:
        caller.run(chunk(handle, 1, draw(1, 3)))
    caller.run(chunk(handles[0], 2, draw(2, 3), ack=1))  # so that the second was not run for the longest time
    caller.run(chunk(handles[3], 1, draw(1, 3)))

    streams = [desk.engine._streams._by_handle[handle] for handle in handles]
    assert [stream.slot >= 0 for stream in streams] == [True, False, True, True]


def test_a_model_without_room_for_all_rows_of_a_tick_runs_fewer(model: Model, tmp_path: Path) -> None:
    desk = Desk({"pump": model}, slots=2)
    caller = desk.connect()
    handles = [caller.handle(f"s{index}") for index in range(5)]
    answers = caller.run(*[chunk(handle, 1, draw(1, 4)) for handle in handles])

    assert desk.stats.models["pump"].rows.sum == 5
    assert desk.stats.models["pump"].ticks == 3
    for answer in answers:
        np.testing.assert_allclose(answer.output, PUMP.run(draw(1, 4))[0]["output"], **CLOSE)
