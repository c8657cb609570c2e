"""Whole states, without sockets: got, put, reset to and cloned in the stream's order, whoever has a slot when."""

import hashlib
import json
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dialogue import Desk, Reply, chunk, closing, opening, reset, state
from recurd import wire
from recurd.config import Config, Tenant, Tick, override
from recurd.contract import Tensor
from recurd.lane import _has_finite_states
from recurd.layout import Layout
from recurd.model import Model
from recurd.wire import Flag, Operation, Type
from recurrent import Network, States

PUMP = Network(learned=True, counter=True)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
GET, PUT, RESET_TO, CLONE = Operation


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.load(PUMP.save(tmp_path_factory.mktemp("states") / "pump.onnx"), slots=8, threads=1)


@pytest.fixture
def desk(model: Model) -> Desk:
    return Desk({"pump": model}, Config(tick=Tick(rows=2, steps=6)), slots=2)


def layout(model: Model) -> Layout:
    return Layout(model.contract.state_hash, model.contract.states)


def payload(model: Model, states: States) -> bytes:
    return layout(model).pack(layout(model).join(states))


def draw(seed: int, steps: int) -> np.ndarray[Any, Any]:
    return PUMP.draw(steps, np.random.default_rng(seed))


def draw_states(seed: int) -> States:
    """Any state that the model could be given."""
    random = np.random.default_rng(seed)
    return {
        name: random.integers(0, 99, value.shape)
        if value.dtype == np.int64
        else random.uniform(-1, 1, value.shape).astype(np.float32)
        for name, value in PUMP.initial().items()
    }


def check_states(model: Model, reply: Reply, expected: States) -> None:
    assert reply.type == Type.STATE_OF, reply
    found = layout(model).split(layout(model).unpack(reply.payload))
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, **CLOSE, err_msg=name)


# --- the form ---


def test_the_form_of_a_state_is_as_documented(model: Model, desk: Desk) -> None:
    """Hash, then the float states, then the integer one, each as it lies in memory."""
    caller = desk.connect()
    handle = caller.handle("s")
    caller.run(chunk(handle, 1, draw(1, 4)))
    reply = caller.ask(state(handle, 2, GET))

    contract = model.contract
    digest = hashlib.sha256(
        json.dumps(
            [contract.weights_sha256, [[s.name, s.dtype, list(s.shape)] for s in contract.states]],
            separators=(",", ":"),
        ).encode()
    )
    _, states = PUMP.run(draw(1, 4))
    floats = np.frombuffer(reply.payload[32:-8], "<f4")
    expected = [states[name].ravel() for name in ("lstm.h_l0", "lstm.c_l0", "lstm.h_l1", "lstm.c_l1")]
    assert reply.payload[:32] == digest.digest()
    np.testing.assert_allclose(floats, np.concatenate(expected), **CLOSE)
    assert np.frombuffer(reply.payload[-8:], "<i8") == states["count"]
    assert contract.public()["state_hash"] == digest.hexdigest()


def test_states_as_arrays_are_checked_by_name_shape_and_type(model: Model) -> None:
    form, states = layout(model), draw_states(1)
    row = form.join(states)
    assert form.join({name: value.tolist() for name, value in states.items()}) != b""  # lists of numbers will do
    assert form.join({name: np.asfortranarray(value).astype(">f8" if name != "count" else ">i4")
                      for name, value in states.items()}) == row  # fmt: skip
    for name, value in form.split(row).items():
        assert value.flags.writeable
        np.testing.assert_array_equal(value, states[name])

    for wrong in ({}, [1.0], states | {"other": 1.0}, {n: v for n, v in states.items() if n != "count"}):
        with pytest.raises(ValueError, match=r"a state of this model is a dictionary of lstm.h_l0, .*count"):
            form.join(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"state 'count' is \[1\], not \[2\]"):
        form.join(states | {"count": np.zeros(2, np.int64)})
    with pytest.raises(ValueError, match=r"state 'lstm.h_l0' is a rectangular array"):
        form.join(states | {"lstm.h_l0": [[1.0], [1.0, 2.0]]})
    with pytest.raises(TypeError, match="state 'count' is int64, and float32 cannot be converted"):
        form.join(states | {"count": np.zeros(1, np.float32)})
    with pytest.raises(TypeError, match=r"state 'lstm.h_l0' is float32, and object cannot"):
        form.join(states | {"lstm.h_l0": np.full((1, 5), None)})


# --- in the stream's order ---

STREAMS = 5
#: Stream, what happens to it (a chunk of so many steps, or the name of something), and whether the daemon works then.
EVENTS = st.lists(
    st.tuples(
        st.integers(0, STREAMS - 1),
        st.one_of(st.integers(1, 9), st.sampled_from(["reset", "get", "put", "reset_to"])),
        st.booleans(),
    ),
    min_size=1,
    max_size=60,
)


class Streaming:
    """Streams to which anything happens, and what every answer must be."""

    def __init__(self, desk: Desk, model: Model) -> None:
        self.caller, self.model = desk.connect(), model
        self.handles = [self.caller.handle(f"s{index}") for index in range(STREAMS)]
        self.states = [PUMP.initial() for _ in self.handles]
        self.seqs, self.generations = [0] * STREAMS, [1] * STREAMS
        self.expected: dict[tuple[int, int], Any] = {}

    def send(self, number: int, index: int, event: int | str) -> None:
        self.seqs[index] += 1
        handle, seq = self.handles[index], self.seqs[index]
        fields = {"generation": self.generations[index], "ack": max(0, seq - 60)}
        if isinstance(event, int):
            x = draw(number, event)
            heads, self.states[index] = PUMP.run(x, self.states[index])
            self.expected[handle, seq] = heads["output"]
            self.caller.send(chunk(handle, seq, x, **fields))
        elif event == "reset":
            self.states[index] = PUMP.initial()
            self.caller.send(reset(handle, seq, **fields))
        elif event == "get":
            self.expected[handle, seq] = self.states[index]
            self.caller.send(state(handle, seq, GET, **fields))
        else:
            self.states[index] = draw_states(number)
            given = payload(self.model, self.states[index])
            self.caller.send(state(handle, seq, Operation[event.upper()], given, **fields))
        self.generations[index] += event in ("reset", "reset_to")

    def check(self, replies: list[Reply]) -> None:
        for reply in replies:
            assert not reply.code, reply
            place = (reply.header.handle, reply.header.seq)
            if reply.type == Type.STATE_OF and reply.payload:
                check_states(self.model, reply, self.expected.pop(place))
            elif reply.type == Type.RESULT:
                np.testing.assert_allclose(reply.output, self.expected.pop(place), **CLOSE)
        assert not self.expected


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS, slots=st.integers(1, 4), rows=st.integers(1, 4), steps=st.integers(1, 6))
def test_whatever_is_done_with_states_in_between_every_answer_is_that_of_its_place(
    model: Model, events: list[tuple[int, int | str, bool]], slots: int, rows: int, steps: int
) -> None:
    desk = Desk({"pump": model}, Config(tick=Tick(rows=rows, steps=steps)), slots=slots)
    streaming = Streaming(desk, model)
    for number, (index, event, works) in enumerate(events):
        streaming.send(number, index, event)
        if works:
            desk.tick()
    replies = streaming.caller.run()

    assert len(replies) == len(events)
    streaming.check(replies)
    streaming.caller.run(*[closing(handle) for handle in streaming.handles])
    room = desk.engine._room
    assert (desk.stats.models["pump"].host_bytes, room.chunks, room.bytes, room.retained) == (0, 0, 0, 0)


def test_a_put_leaves_the_generation_and_a_reset_to_makes_a_new_one(model: Model, desk: Desk) -> None:
    caller = desk.connect()
    handle = caller.handle("s")
    states = payload(model, draw_states(1))
    put = caller.ask(state(handle, 1, PUT, states))
    opened = caller.open("s")
    anew = caller.ask(state(handle, 2, RESET_TO, states, ack=1))
    reopened = caller.open("s")
    (late,) = caller.run(chunk(handle, 3, draw(1, 2), generation=1, ack=2))
    (result,) = caller.run(chunk(handle, 3, draw(1, 2), generation=2, ack=2))

    assert (put.type, put.header.generation, put.flags, put.payload) == (Type.STATE_OF, 1, Flag(0), b"")
    assert (opened.body["generation"], opened.body["fresh"]) == (1, False)
    assert (anew.header.generation, anew.flags) == (2, Flag(0))
    assert (reopened.body["generation"], reopened.body["last_seq"], reopened.body["fresh"]) == (2, 2, False)
    assert (late.code, late.body["expected"]) == ("stale", 3)
    assert result.flags == Flag(0)  # not from the initial state
    np.testing.assert_allclose(result.output, PUMP.run(draw(1, 2), draw_states(1))[0]["output"], **CLOSE)


def test_a_fresh_stream_has_the_initial_state(model: Model, desk: Desk) -> None:
    caller = desk.connect()
    handle = caller.handle("s")
    first = caller.ask(state(handle, 1, GET))
    caller.run(chunk(handle, 2, draw(1, 9)), reset(handle, 3))
    again = caller.ask(state(handle, 4, GET, generation=2))
    caller.ask(state(handle, 5, PUT, payload(model, draw_states(1)), generation=2))
    caller.ask(reset(handle, 6, generation=2))
    (result,) = caller.run(chunk(handle, 7, draw(1, 3), generation=3))

    for reply in (first, again):
        check_states(model, reply, PUMP.initial())
        assert reply.flags == Flag.FRESH
    assert result.flags == Flag.FRESH
    np.testing.assert_allclose(result.output, PUMP.run(draw(1, 3))[0]["output"], **CLOSE)


def test_states_travel_in_multis_and_between_chunks_that_would_be_joined(model: Model, desk: Desk) -> None:
    caller = desk.connect(multi=True)
    handle = caller.handle("s")
    records = [chunk(handle, 1, draw(1, 2)), state(handle, 2, GET), chunk(handle, 3, draw(2, 2))]
    first, got, second = caller.run(wire.multi([*records, state(handle, 4, PUT, payload(model, draw_states(1)))]))[:3]
    after, states = PUMP.run(draw(1, 2))

    check_states(model, got, states)
    np.testing.assert_allclose(first.output, after["output"], **CLOSE)
    np.testing.assert_allclose(second.output, PUMP.run(draw(2, 2), states)[0]["output"], **CLOSE)


# --- exactly once ---


def test_what_is_sent_again_is_answered_again_and_not_done_again(model: Model, desk: Desk) -> None:
    caller = desk.connect()
    handle = caller.handle("s")
    given = payload(model, draw_states(1))
    caller.run(state(handle, 1, RESET_TO, given), chunk(handle, 2, draw(1, 3), generation=2))
    got = caller.ask(state(handle, 3, GET, generation=2))
    repeated = [
        caller.ask(state(handle, 1, RESET_TO, given)),
        caller.ask(state(handle, 3, GET, generation=2)),
        caller.ask(state(handle, 4, GET, generation=2, ack=3)),
        caller.ask(state(handle, 1, RESET_TO, given, ack=3)),
        caller.ask(state(handle, 3, GET, generation=2, ack=3)),
    ]

    again, got_again, unchanged, gone, got_gone = repeated
    assert (again.type, again.header.generation, again.flags) == (Type.STATE_OF, 2, Flag.DUPLICATE)
    assert (got_again.payload, got_again.flags) == (got.payload, Flag.DUPLICATE)
    assert unchanged.payload == got.payload
    assert (gone.type, gone.header.generation, gone.flags) == (Type.STATE_OF, 2, Flag.DUPLICATE | Flag.GONE)
    assert (got_gone.header.generation, got_gone.payload, got_gone.flags) == (2, b"", Flag.DUPLICATE | Flag.GONE)


def test_a_state_is_told_to_nobody_who_asks_for_the_answer_to_a_chunk(desk: Desk) -> None:
    caller = desk.connect()
    handle = caller.handle("s")
    caller.run(chunk(handle, 1, draw(1, 3)), state(handle, 2, GET))

    answer = caller.ask(wire.frame(chunk(handle, 2, draw(1, 3))))

    assert (answer.type, answer.payload, answer.flags) == (Type.RESULT, b"", Flag.DUPLICATE | Flag.GONE)


# --- what is not taken ---


@pytest.mark.parametrize("operation", [PUT, RESET_TO])
def test_what_is_no_state_of_the_model_is_refused_and_leaves_no_trace(
    model: Model, desk: Desk, operation: Operation
) -> None:
    caller = desk.connect()
    handle = caller.handle("s")
    caller.run(chunk(handle, 1, draw(1, 3)))
    good = payload(model, draw_states(1))
    spoiled = [bytearray(good), bytearray(good)]
    spoiled[0][32:36], spoiled[1][36:40] = np.float32(np.nan).tobytes(), np.float32(-np.inf).tobytes()
    hostile = {
        b"": "state_mismatch",
        good[:31]: "state_mismatch",
        good[:32]: "state_mismatch",
        good[:-1]: "state_mismatch",
        good + b"\0": "state_mismatch",
        good + bytes(1 << 20): "state_mismatch",
        bytes(32) + good[32:]: "state_mismatch",
        good[32:]: "state_mismatch",
        bytes(spoiled[0]): "not_finite",
        bytes(spoiled[1]): "not_finite",
    }
    found = {sent: caller.ask(state(handle, 2, operation, sent)) for sent in hostile}
    got = caller.ask(state(handle, 2, GET))

    assert {sent: reply.code for sent, reply in found.items()} == hostile
    assert all(reply.body["in_reply_to"] == Type.STATE for reply in found.values())
    assert all(reply.header.seq == 2 for reply in found.values())
    check_states(model, got, PUMP.run(draw(1, 3))[1])


def test_a_model_whose_states_are_infinite_by_nature_is_given_such(model: Model) -> None:
    contract = model.contract
    infinite = msgspec.structs.replace(
        contract.states[0], initial=Tensor.of(np.full(contract.states[0].shape, -np.inf, np.float32))
    )

    assert _has_finite_states(contract)
    assert not _has_finite_states(msgspec.structs.replace(contract, states=(infinite, *contract.states[1:])))


@pytest.mark.parametrize("operation", [0, 5, 15])
def test_an_operation_that_is_not_known_is_refused(desk: Desk, operation: int) -> None:
    caller = desk.connect()
    handle = caller.handle("s")
    reply = caller.ask(state(handle, 1, operation))

    assert (reply.code, reply.body["in_reply_to"]) == ("bad_request", Type.STATE)
    assert caller.ask(state(handle, 1, GET)).type == Type.STATE_OF


def test_it_takes_the_right_to_states_and_for_a_clone_that_to_its_name(model: Model) -> None:
    tenants = {"weak": Tenant(rights=("stream", "reset")), "narrow": Tenant(streams=("a*",))}
    desk = Desk({"pump": model}, Config(tenants=tenants))
    weak, narrow = desk.connect("w", tenant="weak"), desk.connect("n", tenant="narrow")
    theirs, ours = weak.handle("s"), narrow.handle("a")
    for operation in Operation:
        assert weak.ask(state(theirs, 1, operation)).code == "forbidden"

    assert narrow.ask(state(ours, 1, CLONE, b"b")).code == "forbidden"
    assert narrow.ask(state(theirs, 1, GET)).code == "unknown_handle"
    assert narrow.ask(state(ours, 1, CLONE, b"ab")).type == Type.STATE_OF
    assert weak.run(chunk(theirs, 1, draw(1, 1)))[0].type == Type.RESULT


def test_states_that_are_asked_for_wait_within_the_bounds_of_what_waits(model: Model) -> None:
    """Each is counted as the bytes of its answer."""
    desk = Desk({"pump": model}, override(Config(), {"limits": {"queued_bytes": 10 * model.row_bytes}}))
    caller = desk.connect()
    handle = caller.handle("s")
    caller.send(chunk(handle, 1, draw(1, 1)))
    caller.send(*[state(handle, seq, GET) for seq in range(2, 40)])
    busy = [reply for reply in caller.take() if reply.code == "busy"]
    answers = caller.run()

    assert busy
    assert 5 < len(answers) < 11
    assert desk.engine._room.bytes == 0
    retained = sum(len(reply.payload) for reply in answers)
    assert desk.engine._room.retained == retained


# --- clones ---


def test_a_clone_stands_where_its_source_does_and_goes_its_own_way(model: Model, desk: Desk) -> None:
    caller = desk.connect()
    source = caller.handle("a", idle_timeout_seconds=77.0)
    before = draw(1, 9)
    caller.send(chunk(source, 1, before), state(source, 2, CLONE, b"b"), chunk(source, 3, draw(2, 4)))
    answers = caller.run()
    opened = caller.open("b", mode="resume")
    clone = opened.header.handle
    results = caller.run(chunk(clone, 1, draw(3, 4)), chunk(source, 4, draw(4, 2), ack=3))
    by_stream = {reply.header.handle: reply.output for reply in results}

    assert [reply.type for reply in answers] == [Type.RESULT, Type.STATE_OF, Type.RESULT]
    assert (answers[1].payload, answers[1].header.generation) == (b"", 1)
    assert (opened.body["generation"], opened.body["last_seq"], opened.body["fresh"]) == (1, 0, False)
    assert opened.body["idle_timeout_seconds"] == 77.0
    _, states = PUMP.run(before)
    np.testing.assert_allclose(by_stream[clone], PUMP.run(draw(3, 4), states)[0]["output"], **CLOSE)
    _, states = PUMP.run(draw(2, 4), states)
    np.testing.assert_allclose(by_stream[source], PUMP.run(draw(4, 2), states)[0]["output"], **CLOSE)


def test_a_clone_of_a_fresh_stream_is_fresh(model: Model, desk: Desk) -> None:
    caller = desk.connect()
    reply = caller.ask(state(caller.handle("a"), 1, CLONE, "größer".encode()))
    opened = caller.open("größer", mode="resume")
    (result,) = caller.run(chunk(opened.header.handle, 1, draw(1, 3)))

    assert reply.flags == Flag.FRESH
    assert opened.body["fresh"]
    assert result.flags == Flag.FRESH
    np.testing.assert_allclose(result.output, PUMP.run(draw(1, 3))[0]["output"], **CLOSE)


def test_until_its_turn_nobody_gets_the_clone_nor_its_name(desk: Desk) -> None:
    caller, other = desk.connect("a"), desk.connect("b")
    source, rival = caller.handle("a"), other.handle("r")
    caller.send(chunk(source, 1, draw(1, 20)), state(source, 2, CLONE, b"b"))
    desk.tick()
    refused = [other.open("b", mode=mode) for mode in ("auto", "new", "resume")]
    taken = [other.ask(state(rival, 1, CLONE, name)) for name in (b"b", b"a", b"r")]
    elsewhere = desk.connect("c", tenant="else").open("b")
    answers = caller.run()
    opened = other.open("b")

    assert [reply.code for reply in refused] == ["busy"] * 3
    assert all(reply.body["retry_after_seconds"] > 0 for reply in refused)
    assert [reply.code for reply in taken] == ["exists"] * 3
    assert elsewhere.type == Type.OPENED
    assert answers[-1].type == Type.STATE_OF
    assert not opened.body["fresh"]
    assert desk.stats.streams_opened == 4


@pytest.mark.parametrize("end", ["replaced", "closed"])
def test_a_clone_whose_source_ends_before_its_turn_never_was(desk: Desk, end: str) -> None:
    caller = desk.connect()
    source = caller.handle("a")
    caller.send(chunk(source, 1, draw(1, 20)), state(source, 2, CLONE, b"b"))
    desk.tick()
    if end == "replaced":
        caller.send(opening("a", mode="new"))
        assert [reply.code for reply in caller.take()] == ["replaced", "replaced", ""]
        assert caller.open("b", mode="resume").code == "unknown_stream"
    else:  # which waits for everything before
        caller.run(closing(source))
        assert caller.open("b", mode="resume").type == Type.OPENED
    assert caller.open("b").type == Type.OPENED
    assert desk.engine._streams.count("local") == len(desk.engine._streams)
    assert desk.engine._lanes["pump"].streams == len(desk.engine._streams)


def test_a_clone_whose_source_fails_before_its_turn_never_was(desk: Desk) -> None:
    caller = desk.connect()
    source = caller.handle("a")
    caller.send(chunk(source, 1, draw(1, 3)), state(source, 2, CLONE, b"b"))
    tick = desk.engine.take_tick(desk.now)
    assert tick is not None
    desk.engine.fail(tick, RuntimeError("the device is gone"), desk.now)

    assert [reply.code for reply in caller.take()] == ["failed", "failed"]
    assert caller.open("b", mode="resume").code == "unknown_stream"
    assert desk.engine._streams.count("local") == 0
    assert desk.engine._lanes["pump"].streams == 0


def test_a_clone_that_is_sent_again_is_not_made_again(desk: Desk) -> None:
    caller = desk.connect()
    source = caller.handle("a")
    first = caller.ask(state(source, 1, CLONE, b"b"))
    again = caller.ask(state(source, 1, CLONE, b"b"))
    caller.ask(closing(caller.handle("b")))
    and_again = caller.ask(state(source, 1, CLONE, b"b"))

    assert [reply.type for reply in (first, again, and_again)] == [Type.STATE_OF] * 3
    assert caller.open("b", mode="resume").code == "closed"
    opened = caller.open("b")
    assert opened.body["generation"] == 2


def test_a_clone_needs_a_name_and_room_like_any_stream(model: Model) -> None:
    desk = Desk({"pump": model}, override(Config(), {"limits": {"streams": 3, "queued_chunks": 2}}))
    caller = desk.connect()
    source = caller.handle("a")
    names = [b"", b"\xff\xfe", b"x" * 256, b"a\nb", "\ud800".encode("utf-8", "surrogatepass")]
    refused = [caller.ask(state(source, 1, CLONE, name)) for name in names]
    caller.send(chunk(source, 1, draw(1, 2)), state(source, 2, CLONE, b"b"))
    full = caller.ask(state(source, 3, CLONE, b"c"))
    desk.run()
    caller.take()
    caller.send(chunk(source, 3, draw(1, 2), ack=2), state(source, 4, CLONE, b"c", ack=2))
    beyond = caller.ask(state(source, 5, CLONE, b"d", ack=2))
    many = caller.open("e")

    assert [reply.code for reply in refused] == ["bad_name"] * len(names)
    assert full.code == "busy"
    assert caller.run()[-1].type == Type.STATE_OF
    assert (beyond.code, many.code) == ("too_many_streams", "too_many_streams")
    assert desk.engine._streams.count("local") == 3


def test_a_clone_has_no_room_where_no_stream_has(model: Model) -> None:
    desk = Desk({"pump": model}, override(Config(), {"limits": {"host_state_bytes": 0}}), slots=1)
    caller = desk.connect()

    assert caller.ask(state(caller.handle("a"), 1, CLONE, b"b")).code == "no_slots"


# --- what is told ---


def test_operations_are_counted_and_told_at_debug(model: Model, desk: Desk) -> None:
    caller = desk.connect()
    handle = caller.handle("s")
    given = payload(model, draw_states(1))
    caller.run(state(handle, 1, GET), state(handle, 2, PUT, given), state(handle, 3, RESET_TO, given))
    caller.run(state(handle, 4, CLONE, b"t", generation=2))
    events = [event for event in desk.events if event["event"] == "state_operation"]

    assert desk.stats.models["pump"].state_operations == {"get": 1, "put": 1, "reset_to": 1, "clone": 1}
    assert [event["operation"] for event in events] == ["get", "put", "reset_to", "clone"]
    assert [event["generation"] for event in events] == [1, 1, 2, 2]
    assert {event["level"] for event in events} == {"debug"}
