"""Whole states through both clients, against a real daemon over a real network that is cut."""

import copy
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

import recurd
from recurd import aio
from recurd.errors import Code


@pytest.fixture
def client(daemon: Any) -> Iterator[recurd.Client]:
    with recurd.connect(daemon.endpoint, timeout_seconds=20) as client:
        yield client


@pytest.fixture
def stream(client: recurd.Client, request: pytest.FixtureRequest) -> recurd.Stream:
    return client.open(f"state {request.node.name}", model="sum")


def total(stream: recurd.Stream) -> float:
    (state,) = stream.state().values()
    return float(state.item())


def test_a_state_is_arrays_by_name_and_can_be_gone_on_from(stream: recurd.Stream) -> None:
    fresh = stream.state()
    stream.push([1.0, 2.0])
    state = stream.state()
    stream.push([100.0])
    stream.set_state(state)

    assert {name: (value.shape, value.dtype.name) for name, value in fresh.items()} == {"h": ((1, 1), "float32")}
    assert (fresh["h"].item(), state["h"].item()) == (0.0, 3.0)
    assert stream.push([1.0]).tolist() == [[4.0]]  # type: ignore[union-attr]
    assert (stream.generation, stream.last_seq) == (1, 6)
    assert stream.contract["state_hash"] == stream.contract["state_hash"].lower()


def test_a_reset_to_a_state_is_a_fresh_start_from_it(stream: recurd.Stream) -> None:
    assert stream.fresh
    stream.reset(to={"h": [[5]]})  # whole numbers keep their meaning as float32
    assert (stream.generation, stream.fresh) == (2, False)
    assert stream.push([1.0]).tolist() == [[6.0]]  # type: ignore[union-attr]
    assert not stream.last_fresh
    stream.reset()
    assert (stream.generation, stream.fresh, total(stream), stream.fresh) == (3, True, 0.0, True)


def test_states_keep_their_place_among_chunks_that_are_in_flight(stream: recurd.Stream) -> None:
    """Other threads ask for the state while one streams: every state is one that stood between two chunks."""
    found: list[float] = []
    asking = [threading.Thread(target=lambda: found.extend(total(stream) for _ in range(20))) for _ in range(3)]
    futures: list[Future[Any]] = []
    for thread in asking:
        thread.start()
    for _ in range(400):
        futures.append(stream.submit([1.0, 1.0, 1.0]))
    for thread in asking:
        thread.join()

    assert [future.result(20)[-1, 0] for future in futures] == [3.0 * (n + 1) for n in range(400)]
    assert len(found) == 60
    assert all(value % 3 == 0 for value in found)


def test_a_clone_goes_its_own_way(client: recurd.Client, stream: recurd.Stream) -> None:
    stream.push([7.0])
    futures = [stream.submit([1.0]) for _ in range(50)]
    clone = client.clone(stream, f"{stream.name} clone")
    stream.push([1000.0])

    assert futures[-1].done()
    assert (clone.model, clone.generation, clone.last_seq, clone.fresh) == ("sum", 1, 0, False)
    assert clone.push([1.0]).tolist() == [[58.0]]  # type: ignore[union-attr]
    assert (total(clone), total(stream)) == (58.0, 1057.0)


def test_a_clone_is_made_of_a_stream_not_of_a_name(client: recurd.Client, stream: recurd.Stream) -> None:
    with pytest.raises(TypeError, match=f"not of '{stream.name}'"):
        client.clone(stream.name, "clone")  # type: ignore[arg-type]


def test_clones_under_load_stand_each_in_its_place(client: recurd.Client, stream: recurd.Stream) -> None:
    others = [client.open(f"{stream.name} other {n}", model="sum") for n in range(20)]
    load = [other.submit(np.ones((50, 1))) for other in others for _ in range(5)]
    clones = []
    for number in range(20):
        stream.submit([1.0])
        clones.append(client.clone(stream, f"{stream.name} clone {number}"))

    assert [total(clone) for clone in clones] == [n + 1.0 for n in range(20)]
    assert [future.result(20)[-1, 0] for future in load] == [50.0 * (n + 1) for _ in others for n in range(5)]


def test_the_name_of_a_clone_must_be_free(client: recurd.Client, stream: recurd.Stream) -> None:
    stream.push([1.0])
    for name, code in ((stream.name, Code.EXISTS), ("", Code.BAD_NAME), ("a\nb", Code.BAD_NAME)):
        with pytest.raises(recurd.Refused) as refused:
            client.clone(stream, name)
        assert refused.value.code is code
    with pytest.raises(TypeError, match="a stream's name is a string, not 7"):
        client.clone(stream, 7)  # type: ignore[arg-type]
    assert stream.push([1.0]).tolist() == [[2.0]]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "states", [{}, {"h": [1.0]}, {"c": [[1.0]]}, {"h": [[1.0]], "c": [[1.0]]}, {"h": [[1.0, 2.0]]}]
)
def test_what_is_no_state_of_the_model_is_not_sent(stream: recurd.Stream, states: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"a state of this model is a dictionary of h|state 'h' is \[1, 1\]"):
        stream.set_state(states)
    with pytest.raises(ValueError, match=r"a state of this model is a dictionary of h|state 'h' is \[1, 1\]"):
        stream.reset(to=states)
    assert stream.last_seq == 0


@pytest.mark.parametrize("value", ["x", None, 1j])
def test_what_is_no_number_is_not_sent(stream: recurd.Stream, value: Any) -> None:
    with pytest.raises(TypeError, match=r"state 'h' is float32, and .* cannot be converted"):
        stream.set_state({"h": [[value]]})
    assert stream.last_seq == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_a_state_that_is_not_finite_is_refused_and_the_stream_goes_on(stream: recurd.Stream, value: float) -> None:
    stream.push([1.0])
    with pytest.raises(recurd.Refused) as refused:
        stream.set_state({"h": [[value]]})
    assert refused.value.code is Code.NOT_FINITE
    assert stream.push([1.0]).tolist() == [[2.0]]  # type: ignore[union-attr]


def test_a_state_of_other_weights_is_refused_whatever_its_shape(stream: recurd.Stream) -> None:
    stream.push([1.0])
    signature = stream.signature
    stream._writer.signature = type(signature)(stream.contract | {"state_hash": "00" * 32})
    with pytest.raises(recurd.Refused) as refused:
        stream.set_state({"h": [[1.0]]})
    assert refused.value.code is Code.STATE_MISMATCH
    assert total(stream) == 1.0


def test_who_was_not_told_that_a_stream_went_over_to_another_version_finds_out(stream: recurd.Stream) -> None:
    """What tells it may be lost on the way to a client that reads slowly."""
    stream.push([1.0])
    signature = stream.signature
    former = type(signature)(stream.contract | {"state_hash": "00" * 32})
    stream._writer.signature = former
    futures = [stream.submit([0.0]) for _ in range(5)]
    assert total(stream) == 1.0
    assert stream.contract == signature.contract
    assert [future.result(20).tolist() for future in futures] == [[[1.0]]] * 5

    stream._writer.signature = former
    with pytest.raises(recurd.Refused, match="state_mismatch"):  # of what is no StreamState one cannot know
        stream.set_state({"h": [[7.0]]})
    assert total(stream) == 1.0  # which waits until the stream is open again
    stream.set_state({"h": [[7.0]]})
    assert (total(stream), stream.generation) == (7.0, 1)


def test_a_state_knows_of_which_weights_it_is(stream: recurd.Stream) -> None:
    """Arrays of the same shapes from another model would be a wrong state."""
    stream.push([3.0])
    mine = stream.state()
    changed = mine | {"h": mine["h"] + 1}
    foreign = recurd.StreamState(mine, state_hash="00" * 32)

    assert mine.state_hash == stream.contract["state_hash"]
    assert ({"h": 1} | mine).state_hash == mine.state_hash
    for state in (mine, mine.copy(), copy.deepcopy(mine), pickle.loads(pickle.dumps(mine)), changed):
        stream.set_state(state)
        assert (type(state), state.state_hash) == (recurd.StreamState, mine.state_hash)
    assert total(stream) == 4.0
    for other in (foreign, foreign.copy(), copy.deepcopy(foreign), pickle.loads(pickle.dumps(foreign)), foreign | mine):
        for give in (stream.set_state, lambda state: stream.reset(to=state)):
            with pytest.raises(recurd.Refused, match=r"a state of state hash 00000000\.\.\. is not one of") as refused:
                give(other)
            assert refused.value.code is Code.STATE_MISMATCH
    assert (total(stream), stream.generation) == (4.0, 1)
    stream.set_state(dict(foreign))  # arrays, and whoever gives them knows of which weights
    assert total(stream) == 3.0


def test_states_and_clones_survive_a_network_that_is_cut(proxy: Any, request: pytest.FixtureRequest) -> None:
    with recurd.connect(proxy.endpoint, timeout_seconds=30) as client:
        stream = client.open(f"state {request.node.name}", model="sum")
        expected = 0.0
        for number in range(30):
            stream.submit([1.0])
            if number % 3 == 0:
                proxy.cut()
            expected += 1.0
            if number % 5 == 0:
                clone = client.clone(stream, f"{stream.name} {number}")
                assert total(clone) == expected
                clone.close()
            elif number % 5 == 1:
                expected = 100.0 * number
                stream.set_state({"h": [[expected]]})
            elif number % 5 == 2:
                expected = 7.0
                stream.reset(to={"h": [[expected]]})
            else:
                assert total(stream) == expected
        assert proxy.connections > 5


def test_a_daemon_that_is_too_old_for_states_says_so(stream: recurd.Stream) -> None:
    """Its contracts have no state hash."""
    contract = {key: value for key, value in stream.contract.items() if key != "state_hash"}
    stream._connection.models["sum"] = contract
    stream._session._signatures.clear()
    stream._writer.signature = type(stream.signature)(contract)
    with pytest.raises(recurd.Refused) as refused:
        stream.state()
    assert refused.value.code is Code.STATE_MISMATCH
    assert stream.push([1.0]).tolist() == [[1.0]]  # type: ignore[union-attr]


# --- asyncio ---


async def test_with_asyncio_all_of_it_is_the_same(daemon: Any) -> None:
    async with aio.connect(daemon.endpoint, timeout_seconds=20) as client:
        stream = await client.open("aio states", model="sum")
        await stream.push([1.0, 2.0])
        state = await stream.state()
        clone = await client.clone(stream, "aio states clone")
        await stream.set_state({"h": [[50.0]]})
        after = await stream.push([1.0])
        await stream.reset(to=state)
        again = await stream.push([1.0])

        assert state["h"].tolist() == [[3.0]]
        assert [np.ravel(value).tolist() for value in (after, again)] == [[51.0], [4.0]]
        assert (stream.generation, clone.last_seq, clone.fresh) == (2, 0, False)
        assert np.ravel(await clone.push([1.0])).tolist() == [4.0]
        with pytest.raises(recurd.Refused) as refused:
            await client.clone(stream, "aio states clone")
        assert refused.value.code is Code.EXISTS
        with pytest.raises(ValueError, match="a state of this model is a dictionary of h"):
            await stream.set_state({})
