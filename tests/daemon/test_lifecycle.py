"""How connections and streams begin and end, with the clock in the test's hand."""

import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dialogue import Caller, Desk, chunk, closing, hello, opening, ping, reset
from recurd import wire
from recurd.config import Config, Durability, Limits, Timeouts
from recurd.config import Model as ModelFile
from recurd.model import Model
from recurd.wire import Flag, Type
from recurrent import Array, Network

PUMP = Network()
VALVE = Network(name="valve", layers=1)
X: Array = PUMP.draw(4, np.random.default_rng(0))
OpenDesk = Callable[..., Desk]
#: Two layers of h and c, five float32 each.
PUMP_ROW_BYTES = 80


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("models")
    return {n.name: Model.load(n.save(folder / f"{n.name}.onnx"), slots=40, threads=1) for n in (PUMP, VALVE)}


@pytest.fixture
def open_desk(models: dict[str, Model]) -> OpenDesk:
    def open_desk(*, slots: int = 0, **config: Any) -> Desk:
        return Desk(models, Config(**config), slots=slots)

    return open_desk


def push(caller: Caller, handle: int, seq: int = 1, **options: int) -> Array:
    (reply,) = caller.run(chunk(handle, seq, X, **options))
    return reply.output


# --- connections ---


def test_hello_is_answered_with_who_the_daemon_is_and_what_it_grants(open_desk: OpenDesk) -> None:
    caller = open_desk(limits=Limits(stream_credit=7, chunk_steps=99)).connect(greet=False)

    welcome = caller.ask(hello(seq=5))

    assert (welcome.type, welcome.header.seq) == (Type.WELCOME, 5)
    body = wire.decode_body(welcome.payload, wire.Welcome)
    assert (body.credit, body.max_chunk_steps, body.tenant, body.epoch) == (7, 99, "local", "0102030405060708")
    assert sorted(body.models) == ["pump", "valve"]
    assert body.models["pump"]["states"][0]["name"] == "lstm.h_l0"
    assert body.models["pump"]["proof"] is None


@pytest.mark.parametrize("frame", [ping(3), opening("s", seq=3), closing(1, seq=3), wire.frame(chunk(1, 3, X))])
def test_anything_before_hello_is_refused_and_leaves_no_trace(open_desk: OpenDesk, frame: bytes) -> None:
    desk = open_desk()
    caller = desk.connect(greet=False)

    reply = caller.ask(frame)

    assert (reply.code, reply.header.seq) == ("hello_required", 3)
    assert (desk.stats.peers, desk.stats.streams_opened) == (0, 0)


def test_a_client_of_other_versions_is_told_which_one_is_spoken(open_desk: OpenDesk) -> None:
    caller = open_desk().connect(greet=False)

    reply = caller.ask(wire.frame(wire.control(Type.HELLO, {"versions": [2, 3]})))

    assert (reply.code, reply.body["expected"]) == ("bad_version", 1)


def test_only_who_takes_joined_frames_gets_them(open_desk: OpenDesk) -> None:
    desk = open_desk()
    for multi, frames in ((False, 3), (True, 1)):
        caller = desk.connect(f"multi {multi}", multi=multi)
        handle = caller.handle(f"stream {multi}")
        caller.send(*[chunk(handle, seq, X) for seq in (1, 2, 3)])
        desk.run()
        assert len(desk.engine.replies_to_send()) == frames


def test_connections_beyond_the_bound_are_busy_until_one_goes(open_desk: OpenDesk) -> None:
    desk = open_desk(limits=Limits(connections=2))
    first, _ = desk.connect("a"), desk.connect("b")
    late = desk.connect("c", greet=False)

    assert late.ask(hello()).code == "busy"
    assert first.ask(hello()).type == Type.WELCOME  # who is in may say it again
    desk.engine.disconnected(first.routing_id)
    assert late.ask(hello()).type == Type.WELCOME


def test_a_new_connection_takes_the_place_of_one_that_is_probably_gone(open_desk: OpenDesk) -> None:
    desk = open_desk(limits=Limits(connections=2), timeouts=Timeouts(keepalive_seconds=5, peer_idle_seconds=1000))
    gone, alive = desk.connect("a"), desk.connect("b")
    handle = gone.handle("s")
    push(gone, handle)
    desk.now += 16
    assert alive.ask(ping(1)).type == Type.PONG

    again = desk.connect("c")
    assert again.open("s", mode="resume", generation=1).body["last_seq"] == 1
    assert alive.ask(ping(2)).type == Type.PONG
    assert gone.ask(ping(1)).code == "hello_required"
    assert desk.connect("d", greet=False).ask(hello()).code == "busy"


def test_a_silent_connection_is_forgotten_and_its_streams_are_not(open_desk: OpenDesk) -> None:
    desk = open_desk(timeouts=Timeouts(peer_idle_seconds=60))
    caller, other = desk.connect("a"), desk.connect("b")
    handle = caller.handle("s")
    before = push(caller, handle)
    desk.now += 59
    assert other.ask(ping(1)).type == Type.PONG
    assert desk.engine.deadline() == desk.now + 1
    desk.now += 1
    desk.tick()

    assert caller.ask(chunk(handle, 2, X)).code == "hello_required"
    assert other.ask(ping(2)).type == Type.PONG
    assert (desk.stats.peers, desk.stats.peers_expired) == (1, 1)
    assert desk.stats.streams == {"attached": 0, "detached": 1}
    again = desk.connect("a").open("s", mode="resume", generation=1)
    assert (again.header.handle, again.body["last_seq"], again.body["fresh"]) == (handle, 1, False)
    truth = PUMP.run(np.concatenate([X, X]))[0]["output"]
    after = push(caller, handle, 2)
    np.testing.assert_allclose(np.concatenate([before, after]), truth, rtol=0, atol=1e-5)


# --- opening ---


def test_a_new_stream_starts_with_generation_one_and_nothing_accepted(open_desk: OpenDesk) -> None:
    reply = open_desk().connect().open("s", seq=12)

    assert (reply.type, reply.header.seq, reply.header.generation) == (Type.OPENED, 12, 1)
    assert {k: reply.body[k] for k in ("stream", "model", "generation", "last_seq", "fresh")} == {
        "stream": "s",
        "model": "pump",
        "generation": 1,
        "last_seq": 0,
        "fresh": True,
    }


def test_auto_resumes_and_new_starts_over(open_desk: OpenDesk) -> None:
    caller = open_desk().connect()
    handle = caller.handle("s")
    first = push(caller, handle)

    resumed = caller.open("s")
    assert (resumed.header.handle, resumed.body["last_seq"], resumed.body["fresh"]) == (handle, 1, False)
    new = caller.open("s", mode="new")

    assert new.header.handle != handle
    assert (new.body["generation"], new.body["last_seq"], new.body["fresh"]) == (2, 0, True)
    np.testing.assert_array_equal(push(caller, new.header.handle, generation=2), first)
    assert caller.ask(chunk(handle, 2, X)).code == "replaced"


def test_fresh_means_that_no_step_was_taken_nor_accepted(open_desk: OpenDesk) -> None:
    caller = open_desk().connect()
    handle = caller.handle("s")
    caller.send(chunk(handle, 1, X))
    assert caller.open("s").body["fresh"] is False
    caller.run(reset(handle, 2))
    reply = caller.open("s")
    assert (reply.body["fresh"], reply.body["generation"]) == (True, 2)


def test_an_open_acknowledges_what_its_client_has_received(open_desk: OpenDesk) -> None:
    caller = open_desk().connect()
    handle = caller.handle("s")
    push(caller, handle, 1)
    push(caller, handle, 2)

    again = wire.control(Type.OPEN, {"stream": "s", "model": "pump", "mode": "resume"})
    header = wire.pack(Type.OPEN, size=len(again[1]), ack=1)
    assert caller.ask((header, again[1])).type == Type.OPENED
    assert Flag.GONE in Flag(caller.ask(chunk(handle, 1, X)).header.flags)
    assert Flag.GONE not in Flag(caller.ask(chunk(handle, 2, X)).header.flags)


def test_resume_never_starts_anything(open_desk: OpenDesk) -> None:
    desk = open_desk()
    caller = desk.connect()
    assert caller.open("s", mode="resume").code == "unknown_stream"
    caller.run(closing(caller.handle("s")))

    assert caller.open("s", mode="resume").code == "closed"
    assert desk.stats.streams == {"attached": 0, "detached": 0}


@pytest.mark.parametrize(("generation", "code"), [(1, "stale"), (2, ""), (3, ""), (4, "stale"), (-1, "stale")])
def test_resume_with_a_generation_of_another_life_is_stale(open_desk: OpenDesk, generation: int, code: str) -> None:
    caller = open_desk().connect()
    caller.open("s")
    handle = caller.open("s", mode="new").header.handle  # generation 2
    caller.run(reset(handle, 1, generation=2))  # and 3

    assert caller.open("s", mode="resume", generation=generation).code == code


def test_the_last_open_wins_and_the_other_connection_is_told(open_desk: OpenDesk) -> None:
    desk = open_desk()
    first, second = desk.connect("a"), desk.connect("b")
    handle = first.handle("s")
    first.send(chunk(handle, 1, X))

    assert second.handle("s") == handle
    assert [reply.type for reply in second.run()] == [Type.RESULT]
    for message in (chunk(handle, 2, X), reset(handle, 2), closing(handle)):
        assert first.ask(message).code == "detached"
    assert push(second, handle, 2).shape == (4, 2)
    assert desk.stats.streams == {"attached": 1, "detached": 0}


def test_a_tenant_knows_nothing_of_anothers_streams(open_desk: OpenDesk) -> None:
    desk = open_desk()
    ours, theirs = desk.connect("a"), desk.connect("b", tenant="other")
    handle = ours.handle("s")
    expected = push(ours, handle)

    assert theirs.ask(chunk(handle, 2, X)).code == "unknown_handle"
    assert theirs.open("s", mode="resume").code == "unknown_stream"
    own = theirs.handle("s")
    assert own != handle
    np.testing.assert_array_equal(push(theirs, own), expected)
    ours.run(closing(handle))
    assert theirs.ask(chunk(handle, 2, X)).code == "unknown_handle"


@pytest.mark.parametrize(
    "name", ["", "x" * 256, "ä" * 128, "a\nb", "a\0", "\x7f", "tab\t", "a\u2028b"], ids=lambda name: ascii(name)[:20]
)
def test_a_bad_name_is_refused(open_desk: OpenDesk, name: str) -> None:
    desk = open_desk()
    caller = desk.connect()

    for mode in ("auto", "new", "resume"):
        assert caller.open(name, mode=mode).code == "bad_name"
    assert desk.stats.streams_opened == 0


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127, "Pumpe 17 / Süd", "水ポンプ", "a b", "../../etc/passwd", "{}"])
def test_any_other_name_is_a_name(open_desk: OpenDesk, name: str) -> None:
    assert open_desk().connect().open(name).body["stream"] == name


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"stream":"\xff\xfe","model":"pump"}', "bad_request"),
        (b'{"stream":"\\ud800","model":"pump"}', "bad_request"),
        (b'{"stream":"s","model":"pump","mode":"resumes"}', "bad_request"),
        (b'{"stream":"s","model":"pump","idle_timeout_seconds":0}', "bad_request"),
        (b'{"stream":"s","model":"pump","idle_timeout_seconds":-1}', "bad_request"),
        (b'{"stream":"s","model":"pump","idle_timeout_seconds":1e9}', "bad_request"),
        (b'{"stream":"s","model":"pump","idle_timeout_seconds":1e999}', "bad_request"),
        (b'{"stream":"s","model":"pump","generation":"1"}', "bad_request"),
        (b'{"stream":"s"}', "bad_request"),
        (b"", "bad_request"),
        (b'{"stream":"s","model":"pumps"}', "unknown_model"),
        (b'{"stream":"s","model":""}', "unknown_model"),
    ],
)
def test_an_open_that_is_wrong_is_refused_and_opens_nothing(open_desk: OpenDesk, body: bytes, code: str) -> None:
    desk = open_desk()
    caller = desk.connect()

    reply = caller.ask(wire.pack(Type.OPEN, size=len(body), seq=8) + body)

    assert (reply.code, reply.header.seq, reply.body["in_reply_to"]) == (code, 8, Type.OPEN)
    assert (desk.stats.streams_opened, desk.stats.internal_errors) == (0, 0)


def test_an_unknown_model_is_told_which_there_are(open_desk: OpenDesk) -> None:
    assert "pump, valve" in open_desk().connect().open("s", "pomp").body["text"]


@pytest.mark.parametrize("mode", ["auto", "resume", "new"])
def test_a_stream_of_another_model_is_refused_and_lives_on(open_desk: OpenDesk, mode: str) -> None:
    caller = open_desk().connect()
    handle = caller.handle("s", "pump")

    assert caller.open("s", "valve", mode=mode).code == "wrong_model"
    assert push(caller, handle).shape == (4, 2)


def test_when_there_is_no_room_for_a_state_a_close_makes_some(open_desk: OpenDesk) -> None:
    desk = open_desk(slots=1, limits=Limits(host_state_bytes=PUMP_ROW_BYTES))
    caller = desk.connect()
    first = caller.handle("s1")
    caller.open("s2")

    assert caller.open("s3").code == "no_slots"
    assert caller.open("s2", mode="new").type == Type.OPENED  # it has one
    assert caller.open("s3", "valve").type == Type.OPENED
    assert not desk.engine.full  # of valves there may be more
    caller.run(closing(first))
    assert caller.open("s3x").type == Type.OPENED
    while caller.open(f"s{desk.stats.streams_opened}", "valve").type == Type.OPENED:
        assert desk.stats.streams_opened < 20
    assert desk.engine.full


def test_a_tenant_has_only_as_many_streams_as_it_may(open_desk: OpenDesk) -> None:
    desk = open_desk(limits=Limits(streams=2))
    caller = desk.connect()
    first = caller.handle("s1")
    caller.open("s2", "valve")

    assert caller.open("s3").code == "too_many_streams"
    assert desk.connect("b", tenant="other").open("s3").type == Type.OPENED
    assert caller.open("s1").type == Type.OPENED
    caller.run(closing(first))
    assert caller.open("s3").type == Type.OPENED


@pytest.mark.parametrize("handle", [0, 1, 2**64 - 1])
def test_a_handle_nobody_has_is_unknown(open_desk: OpenDesk, handle: int) -> None:
    caller = open_desk().connect()
    caller.open("s")

    for message in (chunk(handle, 1, X), reset(handle, 1), closing(handle)):
        assert caller.ask(message).code == "unknown_handle"


# --- closing ---


def test_a_close_waits_for_what_was_accepted_before_it(open_desk: OpenDesk) -> None:
    desk = open_desk()
    caller = desk.connect()
    handle = caller.handle("s")
    caller.send(chunk(handle, 1, X), reset(handle, 2), closing(handle, seq=31), chunk(handle, 3, X, generation=2))

    late, result, done, closed = caller.run()

    assert late.code == "closed"
    assert (result.type, done.type) == (Type.RESULT, Type.DONE)
    assert (closed.type, closed.header.seq, closed.header.handle) == (Type.CLOSED, 31, handle)
    assert caller.ask(chunk(handle, 3, X, generation=2)).code == "closed"
    assert caller.ask(closing(handle, seq=32)).type == Type.CLOSED  # again, after its answer was lost
    assert desk.stats.streams_ended["closed"] == 1


def test_each_of_two_closes_is_answered(open_desk: OpenDesk) -> None:
    caller = open_desk().connect()
    handle = caller.handle("s")
    caller.send(chunk(handle, 1, X), closing(handle, seq=1), closing(handle, seq=2))

    answers = {reply.header.seq: reply for reply in caller.run() if reply.type != Type.RESULT}

    assert answers[1].type == Type.CLOSED
    assert answers[2].code == "closed"


def test_a_close_of_a_stream_opened_elsewhere_meanwhile_is_answered_to_who_sent_it(open_desk: OpenDesk) -> None:
    desk = open_desk()
    first, second = desk.connect("a"), desk.connect("b")
    handle = first.handle("s")
    first.send(chunk(handle, 1, X), closing(handle, seq=5))

    assert second.handle("s", seq=5) == handle
    (told,) = first.take()
    assert (told.code, told.header.seq, told.body["in_reply_to"]) == ("detached", 5, Type.CLOSE)
    assert [reply.type for reply in second.run()] == [Type.RESULT], "no CLOSED that it did not ask for"
    assert second.open("s", mode="resume").code == "closed"


def test_a_client_that_comes_back_may_close_what_it_was_closing(open_desk: OpenDesk) -> None:
    desk = open_desk()
    first, second = desk.connect("a"), desk.connect("b")
    handle = first.handle("s")
    first.send(chunk(handle, 1, X), closing(handle, seq=5))
    desk.engine.disconnected(first.routing_id)

    assert second.open("s", mode="resume", generation=1).header.handle == handle
    result, closed = second.run(closing(handle, seq=9))

    assert (result.type, closed.type, closed.header.seq) == (Type.RESULT, Type.CLOSED, 9)


def test_a_close_of_a_stream_that_is_replaced_is_answered(open_desk: OpenDesk) -> None:
    caller = open_desk().connect()
    handle = caller.handle("s")
    caller.send(chunk(handle, 1, X), closing(handle, seq=5), opening("s", mode="new", seq=6))

    answers = {(reply.body["in_reply_to"] if reply.code else 0): reply for reply in caller.take()}

    assert answers[Type.CHUNK].code == answers[Type.CLOSE].code == "replaced"
    assert answers[0].type == Type.OPENED


def test_after_a_close_the_name_starts_anew_in_the_next_generation(open_desk: OpenDesk) -> None:
    caller = open_desk().connect()
    first = push(caller, handle := caller.handle("s"))
    caller.run(closing(handle))

    again = caller.open("s")

    assert (again.body["generation"], again.body["last_seq"], again.body["fresh"]) == (2, 0, True)
    np.testing.assert_array_equal(push(caller, again.header.handle, generation=2), first)


# --- time ---


def test_an_idle_stream_expires_and_its_client_is_told_what_was_lost(open_desk: OpenDesk) -> None:
    desk = open_desk(slots=1)
    caller = desk.connect()
    reply = caller.open("s", idle_timeout_seconds=100)
    handle = reply.header.handle
    assert reply.body["idle_timeout_seconds"] == 100
    first = push(caller, handle)
    caller.run(reset(handle, 2))

    desk.now += 99.9
    caller.send(ping(1))  # keeps the connection, not the stream
    desk.tick()
    assert desk.stats.streams_ended["expired"] == 0
    desk.now += 0.1
    assert desk.engine.deadline() == desk.now
    desk.tick()
    caller.take()

    for message in (chunk(handle, 3, X, generation=2), chunk(handle, 1, X), reset(handle, 3), closing(handle)):
        late = caller.ask(message)
        assert (late.code, late.body["generation"], late.body["last_seq"]) == ("expired", 2, 2)
    resumed = caller.open("s", mode="resume", generation=2)
    assert (resumed.code, resumed.body["last_seq"]) == ("expired", 2)
    again = caller.open("s")
    assert (again.body["generation"], again.body["fresh"], again.body["last_seq"]) == (3, True, 0)
    np.testing.assert_array_equal(push(caller, again.header.handle, generation=3), first)
    (event,) = [event for event in desk.events if event["event"] == "stream_ended"]
    assert (event["reason"], event["stream"], event["last_seq"], event["level"]) == ("expired", "s", 2, "info")


def test_streams_that_expire_at_one_moment_do_not_hold_up_the_others(open_desk: OpenDesk) -> None:
    desk = open_desk(timeouts=Timeouts(peer_idle_seconds=1e6))
    caller, busy = desk.connect("c"), desk.connect("busy")
    for number in range(1000):
        caller.open(f"s{number}", idle_timeout_seconds=10)
    handle = busy.handle("busy")
    desk.now += 10
    for seq, expired in enumerate((256, 512, 768, 1000), start=1):
        assert desk.engine.deadline() == 0 or seq == 1
        busy.send(chunk(handle, seq, X))
        desk.tick()
        assert desk.stats.streams_ended["expired"] == expired
        assert [reply.header.seq for reply in busy.take()] == [seq]
    assert desk.engine.deadline() != 0
    told = [event["streams"] for event in desk.events if event["event"] == "streams_expired"]
    assert told == [256, 256, 256, 232]
    assert {event["level"] for event in desk.events if event["event"] == "stream_ended"} == {"debug"}


def test_who_may_have_been_heard_does_not_expire(open_desk: OpenDesk) -> None:
    desk = open_desk(timeouts=Timeouts(peer_idle_seconds=20))
    caller = desk.connect()
    caller.open("s", idle_timeout_seconds=10)
    begin = desk.now
    for now, heard_until in ((begin + 15, begin + 9), (begin + 39, -math.inf)):
        desk.engine.take_tick(now, heard_until)
        assert (desk.stats.streams_ended["expired"], desk.stats.peers) == (0, 1)
    desk.engine.take_tick(begin + 50, -math.inf)  # for as long as that nobody goes unheard
    assert (desk.stats.streams_ended["expired"], desk.stats.peers) == (1, 0)


def test_while_nothing_can_be_saved_no_stream_grows_idle(open_desk: OpenDesk, tmp_path: Path) -> None:
    """Its client may have tried all the time, and was refused."""
    desk = open_desk(
        durability=Durability(mode="process", directory=str(tmp_path)), timeouts=Timeouts(peer_idle_seconds=1e6)
    )
    caller = desk.connect()
    handle = caller.open("s", idle_timeout_seconds=30).header.handle
    desk.engine.saved()
    desk.now += 20
    desk.engine.halt("the disk is full")
    for _ in range(40):
        desk.now += 1
        assert caller.ask(chunk(handle, 1, X)).code == "busy"
    desk.engine.halt("the disk is full, still")
    desk.now += 1
    desk.engine.saved()
    desk.tick()
    assert desk.stats.streams_ended["expired"] == 0
    desk.now += 11
    desk.tick()
    assert desk.stats.streams_ended["expired"] == 1


def test_a_stream_is_not_ended_for_a_new_one_that_is_refused(open_desk: OpenDesk) -> None:
    desk = open_desk(slots=2, limits=Limits(host_state_bytes=0), models=(ModelFile(path="pump.onnx", name="pump"),))
    caller = desk.connect()
    handle = caller.handle("s")
    push(caller, handle)
    caller.handle("t")
    assert caller.open("u").code == "no_slots"
    assert caller.open("s", mode="new").type == Type.OPENED  # in its own place
    desk.engine._lifecycle._limits = Limits(streams=1)  # as a tenant's may become by a SIGHUP
    assert caller.open("s", mode="new").type == Type.OPENED
    assert caller.open("u").body["text"].startswith("2 streams are open, and 1 may be at most")
    assert caller.open("t", mode="resume").type == Type.OPENED


def test_a_models_own_time_out_counts_for_its_streams_only(open_desk: OpenDesk) -> None:
    models = (ModelFile(path="pump.onnx", name="pump", stream_idle_seconds=10.0), ModelFile(path="v", name="valve"))
    desk = open_desk(models=models, timeouts=Timeouts(stream_idle_seconds=100, peer_idle_seconds=1e6))
    caller = desk.connect()

    assert caller.open("p").body["idle_timeout_seconds"] == 10
    assert caller.open("v", "valve").body["idle_timeout_seconds"] == 100
    assert caller.open("q", idle_timeout_seconds=11).code == "bad_request"
    desk.now += 10
    desk.tick()
    assert (desk.stats.streams, desk.stats.streams_ended["expired"]) == ({"attached": 1, "detached": 0}, 1)


def test_every_record_keeps_a_stream_alive(open_desk: OpenDesk) -> None:
    desk = open_desk(timeouts=Timeouts(stream_idle_seconds=100, peer_idle_seconds=1e6))
    caller = desk.connect()
    handle = caller.handle("s")
    for seq in range(1, 5):
        desk.now += 99
        push(caller, handle, seq)

    assert desk.stats.streams_ended["expired"] == 0


def test_a_stream_with_work_does_not_expire_under_it(open_desk: OpenDesk) -> None:
    desk = open_desk(timeouts=Timeouts(stream_idle_seconds=10, peer_idle_seconds=1e6))
    caller = desk.connect()
    handle = caller.handle("s")
    caller.send(chunk(handle, 1, X))
    desk.now += 50  # the device was busy with others

    assert [reply.type for reply in caller.run()] == [Type.RESULT]
    desk.now += 10
    desk.tick()
    assert caller.ask(chunk(handle, 2, X)).code == "expired"


def test_streams_expire_each_in_its_time(open_desk: OpenDesk) -> None:
    desk = open_desk(timeouts=Timeouts(peer_idle_seconds=1e6))
    caller = desk.connect()
    handles = {seconds: caller.handle(f"s{seconds}", idle_timeout_seconds=seconds) for seconds in (30, 10, 20)}

    for seconds, left in ((10, [30, 20]), (20, [30]), (30, [])):
        due = desk.engine.deadline()
        assert due == 1000 + seconds
        desk.now = due
        desk.tick()
        assert desk.stats.streams == {"attached": len(left), "detached": 0}
    assert [caller.ask(chunk(handle, 1, X)).code for handle in handles.values()] == ["expired"] * 3


def test_how_streams_ended_is_remembered_within_bounds(open_desk: OpenDesk) -> None:
    caller = open_desk(limits=Limits(ended_streams=3)).connect()
    handles = []
    for n in range(5):
        handles.append(caller.handle(f"s{n}"))
        caller.run(closing(handles[-1]))

    codes = [caller.ask(chunk(handle, 1, X)).code for handle in handles]

    assert codes == ["unknown_handle"] * 2 + ["closed"] * 3
    assert caller.open("s0", mode="resume").code == "unknown_stream"
    assert caller.open("s4", mode="resume").code == "closed"


def test_streams_that_come_and_go_leave_no_memory_behind(open_desk: OpenDesk) -> None:
    desk = open_desk(limits=Limits(ended_streams=10))
    caller = desk.connect()

    def come_and_go(times: int) -> None:
        for n in range(times):
            handle = caller.handle(f"s{n % 7}")
            caller.run(closing(handle))
        desk.events.clear()

    come_and_go(2000)
    tracemalloc.start()
    come_and_go(3000)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert grown < 150_000, f"{grown / 3000:.0f} bytes a stream"


# --- shutting down ---


def test_draining_finishes_what_was_accepted_and_takes_nothing_new(open_desk: OpenDesk) -> None:
    desk = open_desk()
    caller = desk.connect()
    handle, idle = caller.handle("s"), caller.handle("idle")
    caller.send(chunk(handle, 1, X))
    desk.engine.drain()

    assert caller.ask(chunk(handle, 2, X)).code == "draining"
    assert caller.ask(reset(handle, 2)).code == "draining"
    assert caller.open("new").code == "draining"
    assert caller.open("s", mode="new").code == "draining"
    assert desk.connect("b", greet=False).ask(hello()).code == "draining"
    assert caller.open("s", mode="resume").body["last_seq"] == 1
    assert caller.ask(ping(1)).type == Type.PONG
    assert [reply.type for reply in caller.run()] == [Type.RESULT]
    assert caller.ask(chunk(handle, 1, X)).flags & Flag.DUPLICATE
    assert caller.ask(closing(idle)).type == Type.CLOSED
    assert desk.engine.queued_chunks == 0


def test_an_idle_engine_has_no_deadline_and_one_with_work_is_due(open_desk: OpenDesk) -> None:
    desk = open_desk()
    assert desk.engine.deadline() is None
    assert desk.engine.take_tick(desk.now) is None
    caller = desk.connect()
    handle = caller.handle("s")
    caller.send(chunk(handle, 1, X))
    assert desk.engine.deadline() == 0
    tick = desk.engine.take_tick(desk.now)
    assert tick is not None
    assert desk.engine.take_tick(desk.now) is None, "ticks of a lane never overlap"
    assert desk.engine.deadline() == desk.now + 120


def test_a_bug_answers_internal_and_spares_the_other_streams(
    open_desk: OpenDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recurd.streams import Stream

    desk = open_desk()
    caller = desk.connect()
    first, second = caller.handle("s1"), caller.handle("s2")
    was = Stream.is_next

    def is_next(self: Stream, header: wire.Header, credit: int) -> bool:
        if header.handle == first:
            raise ZeroDivisionError("a bug")
        return was(self, header, credit)

    monkeypatch.setattr(Stream, "is_next", is_next)

    reply = caller.ask(chunk(first, 1, X))
    assert (reply.code, "a bug" in reply.body["text"]) == ("internal", True)
    assert "ZeroDivisionError" not in reply.body["text"]
    assert desk.stats.internal_errors == 1
    assert any(event["event"] == "internal_error" for event in desk.events)
    assert push(caller, second).shape == (4, 2)


def test_large_requests_are_refused_unread_and_no_error_repeats_all_that_it_is_about(open_desk: OpenDesk) -> None:
    caller = open_desk().connect()

    assert caller.open("s", "m" * 70_000).code == "bad_request"
    unknown = caller.open("s", "m" * 60_000)
    assert unknown.code == "unknown_model"
    assert len(unknown.payload) < 5000
