"""The data path without sockets: whatever clients do, results are those of one pass, each record answered once."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pytest

from dialogue import Caller, Desk, Reply, chunk, closing, opening, ping, reset
from recurd import wire
from recurd.config import Config, Limits, Tick
from recurd.contract import Tensor
from recurd.model import Model
from recurd.wire import Flag, Type
from recurrent import Array, Network, States

PUMP = Network()
VALVE = Network(name="valve", features=2, hidden=4, layers=1, learned=True, counter=True, seed=3)
WORDS = Network(name="words", classes=6, layers=1)
LAST = Network(name="last", last=True, layers=1)
BOTH = Network(name="both", directions=2, layers=1)
EXACT = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("models")
    return {
        network.name: Model.load(network.save(folder / f"{network.name}.onnx"), slots=40, threads=1)
        for network in (PUMP, VALVE, WORDS, LAST, BOTH)
    }


OpenDesk = Callable[..., Desk]


@pytest.fixture
def open_desk(models: dict[str, Model]) -> OpenDesk:
    def open_desk(*names: str, slots: int = 0, **config: object) -> Desk:
        return Desk({name: models[name] for name in names or ("pump",)}, Config(**config), slots=slots)

    return open_desk


def draw(network: Network, steps: int, seed: int = 0) -> Array:
    return network.draw(steps, np.random.default_rng(seed))


# --- one stream ---


def test_a_chunk_is_answered_with_what_one_pass_gives(open_desk: OpenDesk) -> None:
    caller = open_desk().connect()
    handle, x = caller.handle("s"), draw(PUMP, 9)

    (reply,) = caller.run(chunk(handle, 1, x))

    np.testing.assert_allclose(reply.output, PUMP.run(x)[0]["output"], **EXACT)
    assert reply.header[7:] == (9, 2, 1, handle, 1, 1)
    assert reply.flags == Flag.FRESH


def test_chunks_go_on_from_the_state_and_only_the_first_is_fresh(open_desk: OpenDesk) -> None:
    caller = open_desk().connect()
    handle, x = caller.handle("s"), draw(PUMP, 10)
    truth = PUMP.run(x)[0]["output"]

    for seq, cut in enumerate((slice(0, 1), slice(1, 7), slice(7, 10)), 1):
        (reply,) = caller.run(chunk(handle, seq, x[cut]))
        np.testing.assert_allclose(reply.output, truth[cut], **EXACT)
        assert reply.flags == (Flag.FRESH if seq == 1 else 0)


def test_a_long_chunk_is_sliced_and_its_answer_is_whole(open_desk: OpenDesk) -> None:
    desk = open_desk(tick=Tick(steps=4))
    caller = desk.connect()
    handle, x = caller.handle("s"), draw(PUMP, 11)

    (reply,) = caller.run(chunk(handle, 1, x))

    assert desk.stats.models["pump"].ticks == 3
    np.testing.assert_allclose(reply.output, PUMP.run(x)[0]["output"], **EXACT)
    assert reply.flags == Flag.FRESH


def test_queued_chunks_are_joined_and_their_answers_split_again(open_desk: OpenDesk) -> None:
    desk = open_desk()
    caller = desk.connect()
    handle, x = caller.handle("s"), draw(PUMP, 10)

    answers = caller.run(*[chunk(handle, seq, x[seq - 1 : seq]) for seq in range(1, 11)])

    assert desk.stats.models["pump"].ticks == 1
    assert [reply.header.seq for reply in answers] == list(range(1, 11))
    np.testing.assert_allclose(np.concatenate([r.output for r in answers]), PUMP.run(x)[0]["output"], **EXACT)
    assert [bool(reply.flags & Flag.FRESH) for reply in answers] == [True] + [False] * 9


def test_a_reset_takes_its_place_among_the_chunks(open_desk: OpenDesk) -> None:
    caller = open_desk().connect()
    handle, x = caller.handle("s"), draw(PUMP, 6)

    before, done, after = caller.run(chunk(handle, 1, x), reset(handle, 2), chunk(handle, 3, x, generation=2))

    assert (done.type, done.header.seq, done.header.generation, done.payload) == (Type.DONE, 2, 2, b"")
    assert (before.header.generation, after.header.generation) == (1, 2)
    assert after.flags == before.flags == Flag.FRESH
    np.testing.assert_array_equal(after.output, before.output)


def test_resets_in_a_row_each_count(open_desk: OpenDesk) -> None:
    caller = open_desk().connect()
    handle, x = caller.handle("s"), draw(PUMP, 3)

    *resets, result = caller.run(
        *[reset(handle, n, generation=n) for n in (1, 2, 3)], chunk(handle, 4, x, generation=4)
    )

    assert [(r.type, r.header.generation) for r in resets] == [(Type.DONE, 2), (Type.DONE, 3), (Type.DONE, 4)]
    np.testing.assert_allclose(result.output, PUMP.run(x)[0]["output"], **EXACT)


def test_a_head_of_the_last_step_gives_one_output_a_chunk_however_it_is_sliced(open_desk: OpenDesk) -> None:
    caller = open_desk("last", tick=Tick(steps=3)).connect()
    handle, x = caller.handle("s", "last"), draw(LAST, 8)

    first, second = caller.run(chunk(handle, 1, x[:7]), chunk(handle, 2, x[7:]))

    for reply, end in ((first, 7), (second, 8)):
        truth = LAST.run(x[:end])[0]
        steps = reply.header.steps
        values = np.frombuffer(reply.payload, "<f4")
        np.testing.assert_allclose(values[: 2 * steps].reshape(-1, 2), truth["output"][end - steps :], **EXACT)
        np.testing.assert_allclose(values[2 * steps :], truth["final"], **EXACT)


def test_a_model_that_looks_ahead_gets_its_chunks_whole_and_apart(open_desk: OpenDesk) -> None:
    desk = open_desk("both", tick=Tick(steps=2))
    caller = desk.connect()
    handle, x = caller.handle("s", "both"), draw(BOTH, 9)

    answers = caller.run(chunk(handle, 1, x[:5]), chunk(handle, 2, x[5:]))

    first, states = BOTH.run(x[:5])
    second, _ = BOTH.run(x[5:], states)
    np.testing.assert_allclose(answers[0].output, first["output"], **EXACT)
    np.testing.assert_allclose(answers[1].output, second["output"], **EXACT)
    assert desk.stats.models["both"].ticks == 2


def test_token_ids_are_served_and_those_the_model_lacks_are_refused(open_desk: OpenDesk) -> None:
    caller = open_desk("words").connect()
    handle, ids = caller.handle("s", "words"), draw(WORDS, 7)

    for wrong in (-1, 6, 2**62):
        assert caller.ask(chunk(handle, 1, np.array([1, wrong]))).code == "out_of_range"
    (reply,) = caller.run(chunk(handle, 1, ids))

    np.testing.assert_allclose(reply.output, WORDS.run(ids)[0]["output"], **EXACT)


def test_several_models_take_turns(open_desk: OpenDesk) -> None:
    desk = open_desk("pump", "valve", tick=Tick(steps=1))
    caller = desk.connect()
    handles = {name: caller.handle("s-" + name, name) for name in ("pump", "valve")}
    inputs = {"pump": draw(PUMP, 5), "valve": draw(VALVE, 5)}
    caller.send(*[chunk(handles[name], 1, inputs[name]) for name in handles])

    turns = [desk.tick() for _ in range(4)]

    assert sorted(tick.model for tick in turns if tick) == ["pump", "pump", "valve", "valve"]


# --- order, and exactly once ---


def test_a_duplicate_gets_the_retained_answer_with_a_flag_and_runs_nothing(open_desk: OpenDesk) -> None:
    desk = open_desk()
    caller = desk.connect()
    handle, x = caller.handle("s"), draw(PUMP, 4)
    first, done = caller.run(chunk(handle, 1, x), reset(handle, 2))

    again, done_again = caller.run(chunk(handle, 1, x), reset(handle, 2))

    assert (again.payload, again.flags) == (first.payload, Flag.FRESH | Flag.DUPLICATE)
    assert done_again.header == done.header._replace(flags=Flag.FRESH | Flag.DUPLICATE)
    assert (desk.stats.models["pump"].ticks, desk.stats.duplicates) == (1, 2)


def test_a_duplicate_of_a_record_under_way_is_answered_once(open_desk: OpenDesk) -> None:
    caller = open_desk().connect()
    handle, x = caller.handle("s"), draw(PUMP, 4)

    assert len(caller.run(*[chunk(handle, 1, x)] * 3)) == 1


def test_an_acknowledged_answer_is_gone_and_says_so(open_desk: OpenDesk) -> None:
    caller = open_desk().connect()
    handle, x = caller.handle("s"), draw(PUMP, 2)
    caller.run(chunk(handle, 1, x), reset(handle, 2), chunk(handle, 3, x, generation=2))
    caller.run(chunk(handle, 4, x, generation=2, ack=3))

    result, done, kept = caller.run(chunk(handle, 1, x), reset(handle, 2), chunk(handle, 4, x, generation=2))

    for reply, kind in ((result, Type.RESULT), (done, Type.DONE)):
        assert (reply.type, reply.flags, reply.payload) == (kind, Flag.DUPLICATE | Flag.GONE, b"")
    assert done.header.generation == 2  # of a DONE, the new one
    assert kept.flags == Flag.DUPLICATE


@pytest.mark.parametrize("seq", [0, 3, 2**64 - 1])
def test_a_gap_is_told_with_the_number_that_is_expected(open_desk: OpenDesk, seq: int) -> None:
    caller = open_desk().connect()
    handle, x = caller.handle("s"), draw(PUMP, 2)
    caller.run(chunk(handle, 1, x))

    for record in (chunk(handle, seq, x), reset(handle, seq)):
        reply = caller.ask(record)
        assert (reply.code, reply.body["expected"], reply.header.seq) == ("gap", 2, seq)


def test_what_follows_a_refused_reset_is_a_gap(open_desk: OpenDesk) -> None:
    """A pipeline of a bad chunk, a reset and a chunk of the generation after it: all may be sent again."""
    caller = open_desk().connect()
    handle, x = caller.handle("s"), draw(PUMP, 2)
    bad = np.full_like(x, np.nan)

    answers = caller.run(chunk(handle, 1, bad), reset(handle, 2), chunk(handle, 3, x, generation=2))

    assert [reply.code for reply in answers] == ["not_finite", "gap", "gap"]


@pytest.mark.parametrize("generation", [0, 1, 3, 2**32 - 1])
def test_a_wrong_generation_is_stale_and_is_told_the_right_one(open_desk: OpenDesk, generation: int) -> None:
    caller = open_desk().connect()
    handle, x = caller.handle("s"), draw(PUMP, 2)
    caller.run(reset(handle, 1))

    for record in (chunk(handle, 2, x, generation=generation), reset(handle, 2, generation=generation)):
        reply = caller.ask(record)
        assert (reply.code, reply.body["generation"], reply.body["expected"]) == ("stale", 2, 2)
    assert caller.run(chunk(handle, 2, x, generation=2))[0].type == Type.RESULT


@pytest.mark.parametrize("generation", [0, 1, 4, 9])
def test_a_repeated_record_of_a_generation_the_stream_never_had_is_stale(open_desk: OpenDesk, generation: int) -> None:
    caller = open_desk().connect()
    caller.open("s")
    handle, x = caller.open("s", mode="new").header.handle, draw(PUMP, 2)  # its life begins with generation 2
    caller.run(reset(handle, 1, generation=2))
    caller.send(chunk(handle, 2, x, generation=3))

    for record in (reset(handle, 1, generation=generation), chunk(handle, 2, x, generation=generation)):
        assert caller.ask(record).code == "stale"


def test_more_in_flight_than_the_credit_is_refused_until_answers_are_acknowledged(open_desk: OpenDesk) -> None:
    caller = open_desk(limits=Limits(stream_credit=3)).connect()
    handle, x = caller.handle("s"), draw(PUMP, 1)
    assert len(caller.run(*[chunk(handle, seq, x) for seq in (1, 2, 3)])) == 3

    assert caller.ask(chunk(handle, 4, x)).code == "credit"
    assert caller.ask(reset(handle, 4, ack=0)).code == "credit"
    assert caller.run(chunk(handle, 4, x, ack=1))[0].type == Type.RESULT


def test_an_acknowledgement_of_what_never_was_frees_no_more_than_was_answered(open_desk: OpenDesk) -> None:
    caller = open_desk(limits=Limits(stream_credit=2)).connect()
    handle, x = caller.handle("s"), draw(PUMP, 1)
    caller.run(chunk(handle, 1, x))

    caller.send(chunk(handle, 2, x, ack=2**64 - 1), chunk(handle, 3, x, ack=2**64 - 1))

    assert caller.ask(chunk(handle, 4, x, ack=2**64 - 1)).code == "credit"


def test_answers_are_retained_up_to_the_credit_and_no_further(open_desk: OpenDesk) -> None:
    caller = open_desk(limits=Limits(stream_credit=4)).connect()
    handle, x = caller.handle("s"), draw(PUMP, 1)
    for seq in range(1, 21):
        caller.run(chunk(handle, seq, x, ack=max(0, seq - 4)))

    again = caller.run(*[chunk(handle, seq, x) for seq in range(1, 21)])

    assert [bool(reply.flags & Flag.GONE) for reply in again] == [True] * 16 + [False] * 4


# --- refusals leave no trace ---


def bad_records(handle: int, x: Array) -> dict[str, wire.Record]:
    poisoned = {name: x.copy() for name in ("nan", "inf")}
    poisoned["nan"][-1, -1], poisoned["inf"][0, 0] = np.nan, -np.inf
    wide = np.zeros((2, 4), np.float32)
    return {
        "width": chunk(handle, 1, wide),
        "dtype": chunk(handle, 1, x.astype(np.int64)),
        "empty": chunk(handle, 1, x[:0], width=3),
        "too_long": chunk(handle, 1, np.zeros((9, 3), np.float32)),
        "not_finite": chunk(handle, 1, poisoned["nan"]),
        "not_finite ": chunk(handle, 1, poisoned["inf"]),
        "bad_frame": chunk(handle, 1, x, steps=len(x) + 1),
        "bad_frame ": chunk(handle, 1, x, steps=len(x) - 1),
        "gap": chunk(handle, 2, x),
        "stale": chunk(handle, 1, x, generation=2),
    }


@pytest.mark.parametrize("joined", [False, True])
def test_a_refused_chunk_leaves_no_trace(open_desk: OpenDesk, joined: bool) -> None:
    desk = open_desk(limits=Limits(chunk_steps=8))
    caller = desk.connect()
    handle, x = caller.handle("s"), draw(PUMP, 6)

    for code, record in bad_records(handle, x).items():
        reply = caller.ask(wire.multi([record]) if joined else record)
        assert reply.code == code.strip()
        assert (reply.header.handle, reply.header.seq) == (handle, record[0][32])
        assert desk.engine.queued_chunks == 0
    (result,) = caller.run(chunk(handle, 1, x))

    np.testing.assert_allclose(result.output, PUMP.run(x)[0]["output"], **EXACT)
    assert result.flags == Flag.FRESH


def test_a_nan_is_found_wherever_its_neighbours_put_it(open_desk: OpenDesk) -> None:
    """Records of a size no element has shift what stands behind them; their total looks even again."""
    desk = open_desk()
    caller = desk.connect()
    handle, x = caller.handle("s"), draw(PUMP, 2)
    poisoned = x.copy()
    poisoned[0, 1] = np.nan
    odd = wire.pack(Type.CHUNK, size=2, handle=1), b"\0\0"

    caller.send(wire.multi([odd, chunk(handle, 1, poisoned), odd]))
    codes = [reply.code for reply in caller.run()]

    assert codes == ["unknown_handle", "not_finite", "unknown_handle"]


def test_a_chunk_behind_one_of_an_odd_size_is_read_as_it_was_sent(open_desk: OpenDesk) -> None:
    caller = open_desk().connect()
    handle, x = caller.handle("s"), draw(PUMP, 5)
    odd = wire.pack(Type.CHUNK, size=3, handle=1), b"\x01\x02\x03"

    caller.send(wire.multi([odd, chunk(handle, 1, x)]))
    refused, result = caller.run()

    assert refused.code == "unknown_handle"
    np.testing.assert_allclose(result.output, PUMP.run(x)[0]["output"], **EXACT)


def test_one_bad_record_in_a_frame_does_not_concern_the_others(open_desk: OpenDesk) -> None:
    caller = open_desk().connect(multi=True)
    handles, x = [caller.handle(f"s{n}") for n in range(3)], draw(PUMP, 4)
    records = [chunk(handles[0], 1, x), chunk(handles[1], 1, np.full_like(x, np.inf)), chunk(handles[2], 1, x)]

    answers = {reply.header.handle: reply for reply in caller.run(wire.multi(records))}

    assert answers[handles[1]].code == "not_finite"
    for handle in (handles[0], handles[2]):
        np.testing.assert_allclose(answers[handle].output, PUMP.run(x)[0]["output"], **EXACT)


@pytest.mark.parametrize(
    ("limits", "fits"), [(Limits(queued_chunks=2), 2), (Limits(queued_bytes=3 * 12 + 5), 3)], ids=["chunks", "bytes"]
)
def test_a_full_daemon_is_busy_and_takes_the_same_record_later(open_desk: OpenDesk, limits: Limits, fits: int) -> None:
    desk = open_desk(limits=limits)
    caller = desk.connect()
    handle, x = caller.handle("s"), draw(PUMP, 1)
    caller.send(*[chunk(handle, seq, x) for seq in range(1, fits + 1)])
    assert caller.take() == []

    reply = caller.ask(chunk(handle, fits + 1, x))
    assert (reply.code, reply.body["retry_after_seconds"]) == ("busy", 0.05)
    assert len(caller.run()) == fits

    assert caller.run(chunk(handle, fits + 1, x))[0].type == Type.RESULT
    assert desk.engine.queued_chunks == 0


def test_full_of_chunks_also_means_no_room_for_a_reset_and_no_harm_by_it(open_desk: OpenDesk) -> None:
    caller = open_desk(limits=Limits(queued_chunks=1)).connect()
    handle, x = caller.handle("s"), draw(PUMP, 1)
    caller.send(chunk(handle, 1, x))

    assert caller.ask(reset(handle, 2)).code == "busy"
    caller.run()
    assert caller.run(chunk(handle, 2, x))[0].flags == 0


@pytest.mark.parametrize("type", [0, 10, Type.WELCOME, Type.RESULT, Type.ERROR, 255])
def test_a_type_that_is_not_a_clients_is_unknown(open_desk: OpenDesk, type: int) -> None:
    assert open_desk().connect().ask(wire.pack(type, seq=5)).code == "unknown_type"


def test_a_frame_that_cannot_be_read_is_answered_with_zeros(open_desk: OpenDesk) -> None:
    caller = open_desk().connect()

    for frame in (b"", b"RC", b"XX" + ping(4)[2:], ping(4) + b"x"):
        reply = caller.ask(frame)
        assert reply.code == "bad_frame"
        assert reply.header[8:] == (0, 0, 0, 0, 0)


def test_a_ping_is_answered_by_its_number_behind_what_was_answered_before(open_desk: OpenDesk) -> None:
    caller = open_desk().connect(multi=True)
    handle, x = caller.handle("s"), draw(PUMP, 1)
    caller.send(chunk(handle, 1, x))
    caller.desk.run()

    caller.send(ping(77))

    assert [(reply.type, reply.header.seq) for reply in caller.take()] == [(Type.RESULT, 1), (Type.PONG, 77)]


# --- a run that fails ---


def test_a_failed_tick_ends_exactly_its_streams(open_desk: OpenDesk) -> None:
    desk = open_desk(tick=Tick(rows=2), slots=4)
    caller = desk.connect()
    handles, x = [caller.handle(f"s{n}") for n in range(4)], draw(PUMP, 3)
    caller.send(*[chunk(handle, 1, x) for handle in handles], chunk(handles[0], 2, x))
    tick = desk.engine.take_tick(desk.now)
    assert tick is not None

    desk.engine.fail(tick, RuntimeError("the device is gone"), desk.now)
    answers = caller.run()

    assert [(r.code, r.header.handle, r.header.seq) for r in answers if r.code] == [
        ("failed", handles[0], 1),
        ("failed", handles[0], 2),
        ("failed", handles[1], 1),
    ]
    assert [r.header.handle for r in answers if not r.code] == handles[2:]
    assert caller.ask(chunk(handles[1], 1, x)).code == "failed"
    assert desk.stats.streams_ended["failed"] == 2
    assert desk.engine.queued_chunks == 0
    for name in ("s0", "new"):  # their slots are free again
        assert caller.open(name).type == Type.OPENED


def test_a_close_that_waits_for_a_tick_that_fails_is_answered_too(open_desk: OpenDesk) -> None:
    desk = open_desk()
    caller = desk.connect()
    handle = caller.handle("s")
    caller.send(chunk(handle, 1, draw(PUMP, 3)), closing(handle, seq=9))
    tick = desk.engine.take_tick(desk.now)
    assert tick is not None

    desk.engine.fail(tick, RuntimeError("the device is gone"), desk.now)

    lost, close = caller.take()
    assert (lost.code, lost.header.seq) == ("failed", 1)
    assert (close.code, close.header.seq, close.body["in_reply_to"]) == ("failed", 9, Type.CLOSE)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_result_that_is_not_finite_ends_that_stream_alone(open_desk: OpenDesk, value: float) -> None:
    desk = open_desk()
    caller = desk.connect()
    handles = [caller.handle(f"s{n}") for n in range(3)]
    caller.send(*[chunk(handle, 1, draw(PUMP, steps)) for handle, steps in zip(handles, (3, 2, 3), strict=True)])
    tick = desk.engine.take_tick(desk.now)
    assert tick is not None
    outputs = desk.models["pump"].run(tick.slots, tick.fresh, tick.lengths, tick.input)
    rows = {row.stream.name: index for index, row in enumerate(tick.rows)}
    outputs[0][rows["s0"], 1, 1] = value
    outputs[0][rows["s1"], 2, 0] = value  # beyond its length: means nothing

    desk.engine.complete(tick, outputs, desk.now)

    answers = {reply.header.handle: reply for reply in caller.take()}
    assert [answers[handle].code for handle in handles] == ["poisoned", "", ""]
    assert caller.ask(chunk(handles[0], 2, draw(PUMP, 1))).code == "poisoned"
    assert desk.stats.streams_ended["poisoned"] == 1


def test_a_model_that_gave_its_author_infinity_may_give_it_to_clients(tmp_path: Path) -> None:
    path = PUMP.save(tmp_path / "pump.onnx", proof=True)
    model = Model.load(path, slots=4, threads=1)
    proof = model.contract.proof
    assert proof is not None
    output = proof.golden.outputs["output"].array().copy()
    output[0, 0, 0] = -np.inf
    golden = msgspec.structs.replace(proof.golden, outputs={"output": Tensor.of(output)})
    model.contract = msgspec.structs.replace(model.contract, proof=msgspec.structs.replace(proof, golden=golden))
    desk = Desk({"pump": model})
    caller = desk.connect()
    caller.send(chunk(caller.handle("s"), 1, draw(PUMP, 3)))
    tick = desk.engine.take_tick(desk.now)
    assert tick is not None

    desk.engine.complete(tick, [np.full((1, 3, 2), -np.inf, np.float32)], desk.now)

    (reply,) = caller.take()
    assert np.isneginf(reply.output).all()


def test_the_state_of_a_slot_is_never_the_next_streams(open_desk: OpenDesk) -> None:
    desk = open_desk(slots=1)
    caller = desk.connect()
    x = draw(PUMP, 4)
    for life in range(3):
        handle = caller.handle(f"s{life}")
        (result,) = caller.run(chunk(handle, 1, x))
        np.testing.assert_allclose(result.output, PUMP.run(x)[0]["output"], **EXACT)
        caller.run(closing(handle))


def test_a_stream_replaced_while_its_tick_is_out_shares_nothing_with_its_successor(open_desk: OpenDesk) -> None:
    desk = open_desk(slots=1)
    caller = desk.connect()
    handle, x = caller.handle("s"), draw(PUMP, 4)
    caller.send(chunk(handle, 1, x))
    tick = desk.engine.take_tick(desk.now)
    assert tick is not None
    outputs = desk.models["pump"].run(tick.slots, tick.fresh, tick.lengths, tick.input)

    caller.send(opening("s", mode="new"))
    replaced, opened = caller.take()
    second = opened.header.handle
    desk.engine.complete(tick, outputs, desk.now)
    (result,) = caller.run(chunk(second, 1, x, generation=2))

    assert (replaced.code, replaced.header.seq) == ("replaced", 1)
    np.testing.assert_allclose(result.output, PUMP.run(x)[0]["output"], **EXACT)
    assert desk.engine.queued_chunks == 0


# --- random interleavings ---


@dataclass
class Plan:
    """One stream's life: what it will send, what one pass gives, and what has come back."""

    name: str
    network: Network
    truth: dict[int, tuple[int, Array | None, bool]] = field(default_factory=dict)
    records: list[tuple[int, int, Array | None]] = field(default_factory=list)
    answers: dict[int, Reply] = field(default_factory=dict)
    caller: Caller | None = None
    handle: int = 0
    sent: int = 0
    generation: int = 1
    state: States = field(default_factory=dict)

    @property
    def done(self) -> int:
        """seq up to which everything is answered."""
        return next((n for n in range(1, len(self.records) + 2) if n not in self.answers), 1) - 1

    def write(self, r: random.Random) -> None:
        seq, generation = 0, 1
        for _ in range(r.randint(1, 3)):
            x = self.network.draw(r.randint(1, 30), np.random.default_rng(r.getrandbits(32)))
            heads, self.state = self.network.run(x)
            place = 0
            while place < len(x):
                seq += 1
                steps = min(r.choice((1, 1, 3, 12)), len(x) - place)
                self.records.append((seq, generation, x[place : place + steps]))
                self.truth[seq] = (generation, heads["output"][place : place + steps], place == 0)
                place += steps
            if r.random() < 0.7:
                seq += 1
                self.records.append((seq, generation, None))
                generation += 1
                self.truth[seq] = (generation, None, True)
                self.state = self.network.initial()
            else:
                break

    def record(self, index: int, ack: int) -> wire.Record:
        seq, generation, x = self.records[index]
        if x is None:
            return reset(self.handle, seq, generation=generation, ack=ack)
        return chunk(self.handle, seq, x, generation=generation, ack=ack)

    def note(self, reply: Reply) -> None:
        """Hold an answer against the truth."""
        assert not reply.code, reply
        generation, expected, fresh = self.truth[reply.header.seq]
        if reply.header.seq in self.answers:
            assert reply.flags & Flag.DUPLICATE, "answered twice"
        if reply.flags & Flag.GONE:
            assert reply.header.seq in self.answers, "gone and never seen"
            return
        assert (reply.header.generation, bool(reply.flags & Flag.FRESH)) == (generation, fresh)
        if expected is None:
            assert reply.type == Type.DONE
        else:
            np.testing.assert_allclose(reply.output, expected, **EXACT)
        self.answers[reply.header.seq] = reply


class Interleaving:
    """Clients that send in any order, lose answers, come back on other connections and send again."""

    def __init__(self, models: dict[str, Model], seed: int) -> None:
        self.random = r = random.Random(seed)
        tick = Tick(rows=r.choice((1, 2, 16)), steps=r.choice((1, 4, 64)), padding_ratio=r.choice((0.0, 0.25, 1.0)))
        # time goes at random here, and says nothing about the pace
        self.desk = Desk(models, Config(tick=tick, limits=Limits(stream_credit=64, queued_seconds=1e9)), slots=8)
        self.plans = [Plan(f"s{n}", r.choice((PUMP, VALVE))) for n in range(r.randint(1, 8))]
        self.peers = 0
        for plan in self.plans:
            plan.write(r)
        self.callers = [self.connect() for _ in range(2)]
        for plan in self.plans:
            self.attach(plan, r.choice(self.callers), "auto")

    def connect(self) -> Caller:
        self.peers += 1
        return self.desk.connect(f"peer{self.peers}", multi=self.random.random() < 0.5)

    def attach(self, plan: Plan, caller: Caller, mode: str) -> None:
        self.collect()
        generation = self.random.choice((None, plan.generation)) if mode == "resume" else None
        reply = caller.open(plan.name, plan.network.name, mode=mode, generation=generation)
        assert reply.type == Type.OPENED, reply
        assert reply.body["last_seq"] == plan.sent, "the daemon remembers what it accepted"
        plan.caller, plan.handle = caller, reply.header.handle

    def collect(self) -> None:
        for caller in self.callers:
            for reply in caller.take():
                (plan,) = [p for p in self.plans if p.handle == reply.header.handle]
                plan.note(reply)

    def send(self) -> None:
        """Some next records of some streams of one connection, in one frame or several, some of them twice."""
        r = self.random
        caller = r.choice(self.callers)
        records = []
        for _ in range(r.randint(1, 8)):
            plan = r.choice(self.plans)
            if plan.caller is caller and plan.sent < len(plan.records):
                records.append(plan.record(plan.sent, ack=r.choice((0, plan.done))))
                plan.sent += 1
                records += records[-1:] * (r.random() < 0.1)
        if records and r.random() < 0.5:
            caller.send(wire.multi(records))
        else:
            caller.send(*records)

    def lose(self) -> None:
        """A connection breaks: what was under way is lost, its streams resume elsewhere and send again."""
        index = self.random.randrange(len(self.callers))
        lost, self.callers[index] = self.callers[index], self.connect()
        if self.random.random() < 0.5:
            lost.take()  # on the way when it broke
            self.desk.engine.disconnected(lost.routing_id)
        for plan in [plan for plan in self.plans if plan.caller is lost]:
            self.attach(plan, self.callers[index], self.random.choice(("auto", "resume")))
            self.callers[index].send(*[plan.record(n, ack=plan.done) for n in range(plan.done, plan.sent)])

    def play(self) -> None:
        while any(plan.done < len(plan.records) for plan in self.plans):
            self.desk.now += self.random.random() / 100
            act = self.random.random()
            if act < 0.5:
                self.send()
            elif act < 0.53:
                self.lose()
            else:
                self.desk.tick()
            self.collect()


@pytest.mark.parametrize("seed", range(40))
def test_any_interleaving_gives_what_one_pass_gives(models: dict[str, Model], seed: int) -> None:
    play = Interleaving({name: models[name] for name in ("pump", "valve")}, seed)
    play.play()

    assert play.desk.engine.queued_chunks == 0
    assert all(stats.queued_chunks == 0 for stats in play.desk.stats.models.values())
    assert play.desk.stats.internal_errors == 0
    for plan in play.plans:
        assert plan.answers.keys() == plan.truth.keys()
    check_final_states(play)


def check_final_states(play: Interleaving) -> None:
    """Go on with one more chunk each: only the right state gives the right output."""
    for plan in play.plans:
        assert plan.caller is not None
        x = draw(plan.network, 5, seed=99)
        generation = plan.truth[len(plan.records)][0]
        (reply,) = plan.caller.run(
            chunk(plan.handle, len(plan.records) + 1, x, generation=generation, ack=len(plan.records))
        )
        expected, _ = plan.network.run(x, plan.state)
        np.testing.assert_allclose(reply.output, expected["output"], **EXACT)


def test_the_truth_of_these_tests_is_torchs(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    lstm = torch.nn.LSTM(PUMP.features, PUMP.hidden, PUMP.layers)
    order = [0, 2, 3, 1]  # ONNX has the gates i o f c, torch i f g o
    with torch.no_grad():
        for layer in range(PUMP.layers):
            w, r, b = (PUMP.weights[f"{name}{layer}"][0] for name in "WRB")
            parts = {"weight_ih": w, "weight_hh": r, "bias_ih": b[: len(b) // 2], "bias_hh": b[len(b) // 2 :]}
            for name, value in parts.items():
                gates = np.concatenate([np.split(value, 4)[gate] for gate in order])
                getattr(lstm, f"{name}_l{layer}").copy_(torch.from_numpy(gates))
        x = draw(PUMP, 20)
        y, _ = lstm(torch.from_numpy(x))

    truth = y.numpy() @ PUMP.weights["V"] + PUMP.weights["b"]
    np.testing.assert_allclose(PUMP.run(x)[0]["output"], truth, **EXACT)
