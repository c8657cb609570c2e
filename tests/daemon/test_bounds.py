"""What the daemon holds for clients is bounded, whatever they do, and the bounds are fair."""

import numpy as np
import pytest

from dialogue import Desk, chunk, reset
from recurd import wire
from recurd.config import Config, Limits, Tick
from recurd.model import Model
from recurd.wire import Flag, Type
from recurrent import Network

PUMP = Network()
X = PUMP.draw(16, np.random.default_rng(3))
#: Bytes of the result of X.
RESULT = 16 * PUMP.outputs * 4


@pytest.fixture(scope="module")
def pump(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.load(PUMP.save(tmp_path_factory.mktemp("bounds") / "pump.onnx"), slots=64, threads=1)


def test_results_that_nobody_acknowledges_fill_a_bounded_room(pump: Model) -> None:
    desk = Desk({"pump": pump}, Config(limits=Limits(retained_bytes=3 * RESULT, queued_bytes=10**6)))
    caller = desk.connect()
    handles = [caller.handle(f"s{number}") for number in range(7)]
    for handle in handles[:3]:
        assert caller.run(chunk(handle, 1, X))[0].type == Type.RESULT

    (refused,) = caller.run(chunk(handles[1], 2, X))
    assert refused.code == "busy"
    assert refused.body["retry_after_seconds"] > 0
    # who has none that waits to be acknowledged is let in, as long as it is not twice too much
    assert [caller.run(chunk(handle, 1, X))[0].code for handle in handles[3:]] == ["", "", "", "busy"]
    for handle in handles[2:6]:
        caller.send(chunk(handle, 1, X, ack=1))
    caller.take()
    (next_one,) = caller.run(chunk(handles[0], 2, X, ack=1))
    assert next_one.type == Type.RESULT


def test_the_results_of_what_is_queued_are_counted_before_they_are_there(pump: Model) -> None:
    desk = Desk({"pump": pump}, Config(limits=Limits(retained_bytes=3 * RESULT, stream_credit=64)))
    caller = desk.connect()
    handle = caller.handle("s")
    caller.send(*(chunk(handle, seq, X) for seq in range(1, 11)))

    assert [(reply.header.seq, reply.code) for reply in caller.take()] == [
        (7, "busy"),
        (8, "gap"),
        (9, "gap"),
        (10, "gap"),
    ]
    desk.run()
    assert len(caller.take()) == 6
    assert caller.run(chunk(handle, 7, X, ack=6))[0].type == Type.RESULT


def test_results_to_come_are_counted_over_all_models(pump: Model) -> None:
    limits = Limits(retained_bytes=3 * RESULT, stream_credit=64)
    desk = Desk({"pump": pump, "other": pump}, Config(limits=limits))
    caller = desk.connect()
    first, second = caller.handle("s"), caller.handle("t", "other")
    caller.send(*(chunk(first, seq, X) for seq in range(1, 7)), chunk(second, 1, X))

    assert [(reply.header.handle, reply.code) for reply in caller.take()] == [(second, "busy")]


def test_streams_that_end_give_the_room_of_their_results_back(pump: Model) -> None:
    desk = Desk({"pump": pump}, Config(limits=Limits(retained_bytes=2 * RESULT, queued_bytes=10**6)))
    caller = desk.connect()
    for number in range(10):
        handle = caller.handle("s", mode="new")
        assert [reply.type for reply in caller.run(chunk(handle, 1, X, generation=number + 1))] == [Type.RESULT]


def test_a_header_cannot_ask_for_more_than_a_frame_of_repeated_results_at_once(pump: Model) -> None:
    desk = Desk({"pump": pump})
    caller = desk.connect(multi=True)
    handle = caller.handle("s")
    long = PUMP.draw(4000, np.random.default_rng(4))
    assert caller.run(chunk(handle, 1, long))[0].type == Type.RESULT
    again = (wire.pack(Type.CHUNK, generation=1, handle=handle, seq=1), b"")

    caller.send(wire.multi([again] * wire.MAX_RECORDS))
    sent = caller.take()
    assert 0 < len(sent) < 20
    assert all(Flag.DUPLICATE in Flag(reply.header.flags) for reply in sent)
    assert desk.stats.send_failures["again"] == wire.MAX_RECORDS - len(sent)
    assert Flag.DUPLICATE in Flag(caller.ask(again).header.flags)


def test_streams_that_send_much_do_not_lock_out_one_that_sends_little(pump: Model) -> None:
    desk = Desk({"pump": pump}, Config(limits=Limits(queued_chunks=8, stream_credit=64), tick=Tick(rows=1)))
    caller = desk.connect()
    greedy, modest = caller.handle("greedy"), caller.handle("modest")
    caller.send(*(chunk(greedy, seq, X) for seq in range(1, 20)))
    assert {reply.code for reply in caller.take()} == {"busy", "gap"}

    caller.send(chunk(modest, 1, X))
    assert caller.take() == []
    caller.send(chunk(modest, 2, X))
    assert [reply.code for reply in caller.take()] == ["busy"]
    desk.run()
    assert sorted(reply.header.handle for reply in caller.take()) == sorted([greedy] * 8 + [modest])


def test_a_reset_takes_room_like_a_chunk(pump: Model) -> None:
    desk = Desk({"pump": pump}, Config(limits=Limits(queued_chunks=1, stream_credit=64)))
    caller = desk.connect()
    handle = caller.handle("s")
    caller.send(chunk(handle, 1, X), reset(handle, 2))
    assert [reply.code for reply in caller.take()] == ["busy"]
    desk.run()
    caller.take()
    assert caller.ask(reset(handle, 2)).type == Type.DONE


def test_a_small_chunk_does_not_keep_the_frame_it_came_in(pump: Model) -> None:
    frame = wire.multi([(wire.pack(Type.CHUNK, size=size), bytes(size)) for size in (12, 10**6)])
    outer, payload = wire.decode(frame)
    (_, small), _ = wire.decode_multi(outer, payload)
    assert type(small) is bytes
    assert len(small) == 12
