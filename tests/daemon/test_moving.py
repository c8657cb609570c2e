"""Streams that go from one daemon to another: open at one of them at most, whoever goes away when."""

import contextlib
import gc
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dialogue import Caller, Desk, chunk, closing, hello, opening, reset, state
from moving import Operator
from recurd.config import Auth, Config, Tenant, override
from recurd.drain import Drain, DrainError, Report
from recurd.errors import Code, Refused, Unanswered
from recurd.fences import FENCE_SECONDS
from recurd.model import Model
from recurd.saving import Parcel
from recurd.streams import Stream
from recurd.tenants import Tenants
from recurd.wire import Flag, Operation, Type
from recurrent import Network

PUMP = Network(layers=1, learned=True, counter=True)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
A, B = "tcp://a.example:7070", "tcp://b.example:7070"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.load(PUMP.save(tmp_path_factory.mktemp("models") / "pump.onnx"), slots=8, threads=1)


@pytest.fixture
def here(model: Model) -> Desk:
    return Desk({"pump": model}, override(Config(), {"tick": {"steps": 6}}))


@pytest.fixture
def there(tmp_path: Path) -> Desk:
    return Desk({"pump": Model.load(PUMP.save(tmp_path / "pump.onnx"), slots=8, threads=1)}, epoch=b"otherone")


def draw(seed: int, steps: int) -> np.ndarray[Any, Any]:
    return PUMP.draw(steps, np.random.default_rng(seed))


def move(here: Desk, there: Desk, group: str = "g", upto: str = "admit") -> Any:
    """The steps of a move, up to one of them; the group's report and its streams."""
    source, target = Operator(here), Operator(there)
    report = source.ask("gather", group=group, fence=True)
    data = source.export(group)
    for step in ("import", "release", "admit"):
        if step == "import":
            target.ask("import", data, group=group, stamps=report["stamps"])
        elif step == "release":
            source.ask("release", group=group, endpoint=B)
        else:
            target.ask("admit", group=group)
        if step == upto:
            break
    return report


def names(desk: Desk) -> set[str]:
    return {stream.name for stream in desk.engine._streams.all()}


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def living() -> int:
    # Not isinstance: what others have left in the memory may do anything when it is asked for its class.
    return sum(type(thing) is Stream for thing in gc.get_objects())


# --- the way of a stream ---


def test_a_stream_goes_on_elsewhere_with_its_number_its_state_and_what_it_was_not_told(here: Desk, there: Desk) -> None:
    caller = here.connect("c")
    handle = caller.handle("s")
    caller.run(chunk(handle, 1, draw(1, 5)), reset(handle, 2))
    lost = caller.run(chunk(handle, 3, draw(2, 4), generation=2, ack=1))
    move(here, there)

    (told,) = caller.take()
    assert (told.type, told.code, told.header.handle, told.header.seq) == (Type.ERROR, "moved", handle, 0)
    assert (told.body["endpoint"], told.body["group"]) == (B, "g")
    assert "in_reply_to" not in told.body
    for message in (chunk(handle, 4, draw(3, 3), generation=2), opening("s"), opening("s", mode="resume")):
        assert caller.ask(message).code == "moved"

    follower = there.connect("c")
    opened = follower.open("s", mode="resume", generation=2, group="g")
    assert (opened.header.handle, opened.body["last_seq"], opened.body["generation"]) == (handle, 3, 2)
    again = follower.ask(chunk(handle, 3, draw(2, 4), generation=2))
    assert (again.payload, bool(again.flags & Flag.DUPLICATE)) == (lost[-1].payload, True)
    (last,) = follower.run(chunk(handle, 4, draw(3, 3), generation=2, ack=3))
    whole = PUMP.run(np.concatenate([draw(2, 4), draw(3, 3)]))[0]["output"]
    np.testing.assert_allclose(last.output, whole[4:], **CLOSE)
    assert (names(here), names(there)) == (set(), {"s"})
    assert here.stats.streams_ended["moved"] == 1


def test_what_was_accepted_is_finished_before_a_stream_leaves_and_what_comes_then_is_told_to_wait(
    here: Desk, there: Desk
) -> None:
    caller, source = here.connect("c"), Operator(here)
    handle = caller.handle("s")
    caller.send(chunk(handle, 1, draw(1, 20)), chunk(handle, 2, draw(2, 3)))
    here.tick()  # a part of the first
    source.ask("gather", group="g", fence=True)
    busy = caller.ask(chunk(handle, 3, draw(3, 2)))
    assert (busy.code, busy.body["retry_after_seconds"] > 0) == ("busy", True)
    for message in (opening("s", mode="resume"), opening("s", mode="new"), opening("other"), closing(handle)):
        assert caller.ask(message).code == "busy"
    assert source.ask("export", group="g", start=0, max_bytes=10**6) == {
        "streams": 0,
        "next": 0,
        "of": 1,
        "waits": True,
    }
    assert source.reply("release", group="g", endpoint=B).code == "bad_request"

    assert [reply.header.seq for reply in caller.run()] == [1, 2]
    move(here, there)
    follower = there.connect("c")
    follower.open("s", mode="resume", generation=1)
    (last,) = follower.run(chunk(handle, 3, draw(3, 2), ack=2))
    whole = PUMP.run(np.concatenate([draw(1, 20), draw(2, 3), draw(3, 2)]))[0]["output"]
    np.testing.assert_allclose(last.output, whole[23:], **CLOSE)


@pytest.mark.usefixtures("no_collection")
def test_streams_that_have_left_or_not_come_are_let_go_at_once(here: Desk, there: Desk) -> None:
    """The daemon does not look for garbage among what has lived for a while."""
    before = living()
    for caller, name in ((here.connect("c"), "s"), (here.connect("d"), "t")):
        caller.run(chunk(caller.handle(name), 1, draw(1, 5)))
    move(here, there, "g", upto="import")
    Operator(there).ask("drop", group="g")
    assert living() == before + 2
    Operator(here).ask("release", group="g", endpoint=B)

    assert living() == before


def test_all_streams_of_a_connection_leave_together_and_those_without_one_leave_first(here: Desk) -> None:
    many, one, gone = here.connect("many"), here.connect("one"), here.connect("gone")
    for index in range(5):
        many.handle(f"m{index}")
    one.handle("o")
    gone.handle("g")
    here.engine.disconnected(gone.routing_id)
    source = Operator(here)

    sizes = []
    for group in "abcd":
        sizes.append(source.ask("gather", group=group, fence=True, limit=2)["streams"])
        source.ask("release", group=group, endpoint=B)
    assert sizes == [1, 5, 1, 0]
    assert source.ask("redirect", endpoint=B) == {"left": 0}
    assert here.connect("late").open("new").code == "moved"
    assert here.engine.full
    source.ask("redirect")
    assert here.connect("later").open("new").type == Type.OPENED


def test_a_daemon_with_streams_left_is_not_redirected(here: Desk) -> None:
    here.connect("c").handle("s")
    assert Operator(here).ask("redirect", endpoint=B) == {"left": 1}
    assert here.connect("late").open("new").type == Type.OPENED


# --- somebody goes away ---


def test_without_a_word_from_the_operator_a_stream_goes_on_as_if_nothing_had_happened(here: Desk, there: Desk) -> None:
    caller = here.connect("c")
    handle = caller.handle("s")
    caller.run(chunk(handle, 1, draw(1, 5)))
    move(here, there, upto="import")
    assert there.connect("x").open("s").code == "busy"

    here.now = there.now = here.now + FENCE_SECONDS
    deadline = here.engine.deadline()
    assert deadline is not None
    assert deadline <= here.now
    assert there.connect("y").open("s", group="other").code == "busy"
    (reply,) = caller.run(chunk(handle, 2, draw(2, 3), ack=1)) or caller.run(chunk(handle, 2, draw(2, 3), ack=1))
    if reply.code:  # it came before the tick in which the group was let go
        (reply,) = caller.run(chunk(handle, 2, draw(2, 3), ack=1))
    assert reply.type == Type.RESULT
    assert Operator(here).ask("release", group="g", endpoint=B) == {"fate": "lifted"}

    move(here, there, "second")  # what had arrived with the first is replaced
    follower = there.connect("z")
    assert follower.open("s").body["last_seq"] == 2
    assert Operator(there).ask("groups")["held"] == {}


def test_who_was_sent_on_finds_the_stream_though_the_operator_died_before_handing_it_over(
    here: Desk, there: Desk
) -> None:
    caller = here.connect("c")
    handle = caller.handle("s")
    caller.handle("t")
    caller.run(chunk(handle, 1, draw(1, 5)))
    move(here, there, upto="release")
    there.now += 10 * FENCE_SECONDS
    there.tick()

    assert there.connect("x").open("s").code == "busy"
    assert there.connect("c").open("s", mode="resume", generation=1, group="g").type == Type.OPENED
    target = Operator(there)
    assert target.ask("groups")["held"] == {"g": {"streams": 1, "tenant": "local", "stream": "t"}}
    assert target.ask("drop", group="g") == {"fate": "dropped"}
    assert names(there) == {"s"}
    assert Operator(here).ask("lift", group="g") == {"fate": "released"}


def test_a_group_is_lifted_and_dropped_and_nothing_is_left_of_it_there(here: Desk, there: Desk) -> None:
    caller = here.connect("c")
    handle = caller.handle("s")
    caller.run(chunk(handle, 1, draw(1, 5)))
    move(here, there, upto="import")
    assert Operator(here).ask("lift", group="g") == {"fate": "lifted"}
    assert Operator(there).ask("drop", group="g") == {"fate": "dropped"}
    assert caller.run(chunk(handle, 2, draw(2, 3)))[0].type == Type.RESULT
    assert (names(there), there.stats.streams["detached"]) == (set(), 0)
    assert there.stats.models["pump"].host_bytes == 0
    assert there.connect("x").open("s", mode="resume").code == "unknown_stream"
    assert Operator(there).reply("import", group="g", stamps=[]).code == "bad_request"
    for name in ("", "g" * 65):  # it would be remembered and logged
        assert Operator(there).reply("import", group=name, stamps=[]).code == "bad_request"
        assert Operator(here).reply("gather", group=name).code == "bad_request"


def test_streams_that_were_to_come_out_of_a_file_are_forgotten_when_its_reader_dies(here: Desk, there: Desk) -> None:
    here.connect("c").handle("s")
    source, target = Operator(here), Operator(there)
    stamps = source.ask("gather", group="g")["stamps"]
    target.ask("import", source.export("g"), group="g", stamps=stamps, lasting=False)
    assert names(there) == {"s"}
    there.now += FENCE_SECONDS
    there.tick()
    assert names(there) == set()


# --- a look without moving ---


def test_streams_are_looked_at_between_two_records_and_go_on(here: Desk, there: Desk) -> None:
    caller, source = here.connect("c"), Operator(here)
    handle = caller.handle("s")
    caller.handle("other")
    caller.send(chunk(handle, 1, draw(1, 6)), chunk(handle, 2, draw(2, 20)))
    here.tick()
    report = source.ask("gather", group="g", stream="s*")
    assert report["streams"] == 1
    (parcel,) = msgspec.msgpack.decode(source.export("g"), type=list[Parcel])
    assert (parcel.stream.seq, parcel.stream.name) == (1, "s")
    here.tick()
    assert source.ask("export", group="g", start=0, max_bytes=10**6)["waits"]
    assert len(caller.run()) == 2

    Operator(there).ask("import", source.export("g"), group="g", stamps=report["stamps"])
    Operator(there).ask("admit", group="g")
    follower = there.connect("c")
    assert follower.open("s").body["last_seq"] == 2
    (there_too,) = follower.run(chunk(handle, 3, draw(3, 3), ack=2))
    (here_too,) = caller.run(chunk(handle, 3, draw(3, 3), ack=2))
    np.testing.assert_allclose(there_too.output, here_too.output, **CLOSE)


def test_pages_are_as_large_as_a_message_may_be(here: Desk) -> None:
    caller, source = here.connect("c"), Operator(here)
    for index in range(10):
        caller.run(chunk(caller.handle(f"s{index}"), 1, draw(index, 3)))
    source.ask("gather", group="g")
    start, found = 0, []
    while start < 10:
        report = source.ask("export", group="g", start=start, max_bytes=3000)
        page = msgspec.msgpack.decode(source.export("g", start=start, max_bytes=3000), type=list[Parcel])
        assert 0 < len(page) < 5
        found += page
        start = report["next"]
    assert [parcel.stream.name for parcel in found] == [f"s{index}" for index in range(10)]
    assert source.reply("export", group="g", start=0, max_bytes=500).code == "bad_request"


# --- what is not taken in ---


def test_what_is_there_already_is_not_replaced(here: Desk, there: Desk) -> None:
    caller, source, target = here.connect("c"), Operator(here), Operator(there)
    handle = caller.handle("s")
    caller.run(chunk(handle, 1, draw(1, 5)))
    other = there.connect("c")
    others = other.handle("s")
    stamps = source.ask("gather", group="g")["stamps"]
    data = source.export("g")
    refused = target.reply("import", data, group="g", stamps=stamps)
    assert (refused.code, "'s' of tenant 'local'" in refused.body["text"]) == ("exists", True)
    assert refused.body["handles"] == [handle]

    other.run(closing(others))
    for group in ("g", "h"):  # twice the same is once
        target.ask("import", data, group=group, stamps=stamps)
        target.ask("admit", group=group)
    follower = there.connect("d")
    assert follower.open("s").body["last_seq"] == 1
    follower.run(chunk(handle, 2, draw(2, 3)))
    assert target.reply("import", data, group="i", stamps=stamps).code == "exists"
    caller.run(chunk(handle, 2, draw(2, 3)), chunk(handle, 3, draw(2, 3)))
    source.ask("gather", group="later")
    assert target.reply("import", source.export("later"), group="j", stamps=stamps).code == "exists"


def test_streams_of_two_tenants_keep_apart(here: Desk, there: Desk) -> None:
    there.tenants.change({}, {"left": "left", "right": "right"})
    for tenant in ("left", "right"):
        caller = here.connect(tenant, tenant=tenant)
        caller.run(chunk(caller.handle("s"), 1, draw(len(tenant), 5)))
        if tenant == "left":
            caller.run(chunk(caller.handle("s"), 2, draw(0, 5)))
    move(here, there)
    assert there.connect("l", tenant="left").open("s", mode="resume").body["last_seq"] == 2
    assert there.connect("r", tenant="right").open("s", mode="resume").body["last_seq"] == 1
    there.tenants.change({}, {"other": "other"})
    assert there.connect("o", tenant="other").open("s", mode="resume").code == "unknown_stream"
    assert here.connect("o", tenant="other").open("s", mode="resume").code == "unknown_stream"


def test_streams_do_not_come_to_where_their_clients_may_not(here: Desk, there: Desk) -> None:
    caller = here.connect(tenant="left")
    caller.run(chunk(caller.handle("s"), 1, draw(1, 5)))
    drain = Drain(At(here, A), At(there, B))  # type: ignore[arg-type]
    with pytest.raises(DrainError, match="tenant 'left' has no key here: nobody could go on with stream 's'"):
        drain.run()
    for section in (Tenant(streams=("pump-*",)), Tenant(models=("fan",)), Tenant(rights=("admin",))):
        there.tenants.change({"left": section}, {"left": "left"})
        with pytest.raises(DrainError, match=r"tenant 'left' (has|may)"):
            drain.run()
    assert (names(here), names(there)) == ({"s"}, set())
    there.tenants.change({}, {"left": "left"})
    drain.run()
    assert (names(here), names(there)) == (set(), {"s"})


def test_as_many_records_are_not_the_same_records(here: Desk, there: Desk) -> None:
    caller, source, target = here.connect("c"), Operator(here), Operator(there)
    handle = caller.handle("s")
    caller.run(chunk(handle, 1, draw(1, 5)))
    stamps = source.ask("gather", group="g")["stamps"]
    target.ask("import", source.export("g"), group="g", stamps=stamps)
    target.ask("admit", group="g")
    follower = there.connect("d")
    follower.handle("s")
    for at, seed in ((caller, 2), (follower, 3)):
        at.run(chunk(handle, 2, draw(seed, 4)))
    source.ask("gather", group="h")
    refused = target.reply("import", source.export("h"), group="h", stamps=stamps)
    assert (refused.code, "with another state after 2 records" in refused.body["text"]) == ("exists", True)
    for at in (caller, follower):
        at.run(reset(handle, 3), chunk(handle, 4, draw(4, 3), generation=2))
    source.ask("gather", group="i")
    assert target.ask("import", source.export("i"), group="i", stamps=stamps) == {"streams": 0, "stayed": 1}
    caller.run(reset(handle, 5, generation=2), chunk(handle, 6, draw(4, 3), generation=3))
    follower.run(chunk(handle, 5, draw(5, 3), generation=2), chunk(handle, 6, draw(5, 3), generation=2))
    source.ask("gather", group="j")
    assert target.reply("import", source.export("j"), group="j", stamps=stamps).code == "exists"


def test_a_state_out_of_a_file_is_finite(here: Desk, there: Desk) -> None:
    (first, second), stamps = parcels(here)
    assert second.stream.state is not None
    for number in (np.nan, np.inf):
        state = np.frombuffer(second.stream.state, np.uint8).copy()
        state[:4] = np.frombuffer(np.float32(number).tobytes(), np.uint8)
        bad = msgspec.structs.replace(second, stream=msgspec.structs.replace(second.stream, state=state.tobytes()))
        data = msgspec.msgpack.encode([first, bad])
        reply = Operator(there).reply("import", data, group="g", stamps=stamps, lasting=False)
        assert (reply.code, "stream 'b' holds NaN" in reply.body["text"]) == ("not_finite", True)
        assert names(there) == set()


def test_streams_of_other_weights_are_taken_in_only_when_that_is_said(here: Desk, tmp_path: Path) -> None:
    other = Network(layers=1, learned=True, counter=True, seed=1)
    there = Desk({"pump": Model.load(other.save(tmp_path / "pump.onnx"), slots=4, threads=1)}, epoch=b"otherone")
    caller, source, target = here.connect("c"), Operator(here), Operator(there)
    caller.run(chunk(caller.handle("s"), 1, draw(1, 5)))
    stamps = source.ask("gather", group="g")["stamps"]
    refused = target.reply("import", source.export("g"), group="g", stamps=stamps)
    assert (refused.code, "weights" in refused.body["text"]) == ("wrong_model", True)
    target.ask("import", source.export("g"), group="g", stamps=stamps, accept_drift=True)
    assert target.reply("import", group="h", stamps=[{**stamps[0], "model": "fan"}]).code == "unknown_model"
    stamps[0]["stamp"]["layout"] = "h float32 [1, 1]"
    assert target.reply("import", group="h", stamps=stamps, accept_drift=True).code == "wrong_model"


@pytest.mark.parametrize("field", ["state_hash", "runtime", "device"])
def test_a_stamp_that_says_nothing_is_not_taken_for_the_same(here: Desk, there: Desk, field: str) -> None:
    here.connect("c").handle("s")
    (stamp,) = Operator(here).ask("gather", group="g")["stamps"]
    stamp["stamp"][field] = ""
    assert Operator(there).reply("import", group="g", stamps=[stamp]).code == "wrong_model"
    stamp["stamp"] |= {field: Operator(here).ask("gather", group="h")["stamps"][0]["stamp"][field], "form": ""}
    assert Operator(there).reply("import", group="g", stamps=[stamp]).code == ""  # of a journal that did not note it


def parcels(here: Desk) -> tuple[list[Parcel], Any]:
    caller, source = here.connect("c"), Operator(here)
    for name in "ab":
        caller.run(chunk(caller.handle(name), 1, draw(1, 5)))
    stamps = source.ask("gather", group="g")["stamps"]
    return msgspec.msgpack.decode(source.export("g"), type=list[Parcel]), stamps


@pytest.mark.parametrize(
    "change",
    [
        {"state": b"xyz"},
        {"acked": 7},
        {"seq": 2**40},
        {"seq": -1},
        {"generation": 0},
        {"generation": 2**40},
        {"generation": 2**32 - 1},
        {"tenant": ""},
        {"tenant": "../a\n"},
        {"idle_timeout": -1.0},
        {"idle_timeout": float("inf")},
        {"idle_timeout": float("nan")},
        {"name": "\x00"},
        {"name": "a"},
        {"model": "fan"},
    ],
    ids=str,
)
def test_a_stream_that_cannot_be_leaves_no_trace(here: Desk, there: Desk, change: dict[str, Any]) -> None:
    (first, second), stamps = parcels(here)
    bad = msgspec.structs.replace(second, stream=msgspec.structs.replace(second.stream, **change))
    reply = Operator(there).reply("import", msgspec.msgpack.encode([first, bad]), group="g", stamps=stamps)
    assert reply.code in ("bad_request", "bad_name")
    assert names(there) == set()


def test_answers_that_cannot_be_and_bytes_that_are_none_leave_no_trace(here: Desk, there: Desk) -> None:
    (first, second), stamps = parcels(here)
    ((seq, generation, header, payload),) = second.answers
    for answers in (
        [(2, generation, header, payload)],
        [(seq, 9, header, payload)],
        [(seq, generation, b"", payload)],
        [(seq, generation, header + payload, b"")],
        [(seq, generation, header[:9], header[9:] + payload)],
    ):
        bad = msgspec.msgpack.encode([first, msgspec.structs.replace(second, answers=answers)])
        assert Operator(there).reply("import", bad, group="g", stamps=stamps).code == "bad_request"
    whole = msgspec.msgpack.encode([first, second])
    for data in (whole[:-3], b"\xff" * 100, msgspec.msgpack.encode([first, first]), b"\x91" * 5000):
        assert Operator(there).reply("import", data, group="g", stamps=stamps).code == "bad_request"
    assert names(there) == set()


def test_there_must_be_room_for_all_of_them(here: Desk, model: Model) -> None:
    (first, second), stamps = parcels(here)
    for limits, code in (({"streams": 1}, "too_many_streams"), ({"host_state_bytes": 0}, "no_slots")):
        there = Desk({"pump": model}, override(Config(), {"limits": limits}), slots=1)
        reply = Operator(there).reply("import", msgspec.msgpack.encode([first, second]), group="g", stamps=stamps)
        assert (reply.code, names(there)) == (code, set())


def test_a_stream_that_is_leaving_does_not_expire(here: Desk) -> None:
    here.connect("c").handle("s", idle_timeout_seconds=5)
    Operator(here).ask("gather", group="g", fence=True)
    here.now += 6
    here.tick()
    assert names(here) == {"s"}
    here.now += 20  # the operator is gone, and the stream goes on to be idle
    here.tick()
    here.now += 6
    here.tick()
    assert names(here) == set()


# --- whole states ---


def test_answers_about_states_move_with_their_stream_and_a_clone_with_its_source(here: Desk, there: Desk) -> None:
    caller, source = here.connect("c"), Operator(here)
    handle = caller.handle("s")
    caller.send(chunk(handle, 1, draw(1, 20)), state(handle, 2, Operation.GET), state(handle, 3, Operation.CLONE, b"t"))
    here.tick()  # a part of the chunk
    source.ask("gather", group="g", fence=True)
    answers = caller.run()
    assert caller.open("t", mode="resume").code == "busy"
    move(here, there)

    assert (names(here), names(there)) == (set(), {"s", "t"})
    follower = there.connect("c")
    follower.open("s", mode="resume", group="g")
    again = follower.ask(state(handle, 2, Operation.GET))
    clone = follower.open("t", mode="resume", group="g")
    (result,) = follower.run(chunk(clone.header.handle, 1, draw(2, 3)))
    assert (again.payload, again.flags) == (answers[1].payload, Flag.DUPLICATE)
    whole = PUMP.run(np.concatenate([draw(1, 20), draw(2, 3)]))[0]["output"]
    np.testing.assert_allclose(result.output, whole[20:], **CLOSE)


def test_no_stream_arrives_under_the_name_of_a_clone_to_come(here: Desk, there: Desk) -> None:
    caller, rival = here.connect("c"), there.connect("c")
    caller.run(chunk(caller.handle("t"), 1, draw(1, 3)))
    handle = rival.handle("s")
    rival.send(chunk(handle, 1, draw(1, 20)), state(handle, 2, Operation.CLONE, b"t"))
    report = Operator(here).ask("gather", group="g", fence=True)
    parcels = Operator(here).export("g")
    reply = Operator(there).reply("import", parcels, group="g", stamps=report["stamps"])

    assert reply.code == "exists"
    assert [reply.code for reply in rival.run()] == ["", ""]
    assert names(there) == {"s", "t"}


def test_a_clone_does_not_take_the_name_of_a_stream_that_has_moved(here: Desk, there: Desk) -> None:
    caller, other = here.connect("c"), here.connect("d")
    caller.handle("t")
    move(here, there)
    handle = other.handle("s")

    refused = other.ask(state(handle, 1, Operation.CLONE, b"t"))
    assert (refused.code, refused.body["text"]) == ("exists", f"there is a stream 't' already, at {B}")
    assert "endpoint" not in refused.body  # where its client would go


_ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False), st.text(max_size=5), st.just([])
)
_KEYS = st.dictionaries(
    st.sampled_from(
        [
            "group",
            "fence",
            "limit",
            "model",
            "stream",
            "tenant",
            "start",
            "max_bytes",
            "endpoint",
            "server_key",
            "lasting",
            "staying",
            "is_empty",
            "origin",
        ]
    ),
    st.one_of(_ANYTHING, st.sampled_from(["g", "h", "*", "[", 0, 1, 10**6, True])),
)
_ORDERS = st.sampled_from(
    [
        "gather",
        "export",
        "release",
        "lift",
        "import",
        "admit",
        "drop",
        "redirect",
        "expect",
        "drained",
        "groups",
        "fate",
    ]
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(orders=st.lists(st.tuples(_ORDERS, _KEYS, st.binary(max_size=20)), max_size=20))
def test_whatever_is_commanded_nothing_breaks(model: Model, orders: list[tuple[str, dict[str, Any], bytes]]) -> None:
    desk = Desk({"pump": model})
    caller, operator = desk.connect("c"), Operator(desk)
    handle = caller.handle("s")
    caller.run(chunk(handle, 1, draw(1, 5)))
    for command, keys, data in orders:
        reply = operator.reply(command, data, **({"group": "g", "endpoint": B, "stamps": []} | keys))
        assert reply.code != "internal"
        desk.now += 1
        desk.run()
    assert desk.stats.internal_errors == 0


def test_the_room_for_states_is_one_for_all_tenants_that_arrive_together(model: Model, tmp_path: Path) -> None:
    tenants = {"a": {}, "b": {}}
    here = Desk({"pump": model}, override(Config(auth=Auth(key="k")), {"tenants": tenants}))
    for name in tenants:
        for number in range(2):
            here.connect(f"{name}{number}", tenant=name).handle(f"s{number}")
    boss = Operator(here)
    there = Desk(
        {"pump": Model.load(PUMP.save(tmp_path / "pump.onnx"), slots=3, threads=1)},
        override(Config(), {"limits": {"host_state_bytes": 0}}),
        tenants=Tenants({}, {name: name for name in tenants}),
    )
    report = boss.ask("gather", group="g")
    data = boss.export("g")
    assert report["streams"] == 4
    assert Operator(there).reply("import", data, group="g", stamps=report["stamps"]).code == "no_slots"
    assert not names(there)


def test_where_streams_have_gone_is_known_however_many_ends_are_remembered(model: Model, there: Desk) -> None:
    here = Desk({"pump": model}, override(Config(), {"limits": {"ended_streams": 2, "streams": 8}}))
    caller = here.connect()
    handles = [caller.handle(f"s{number}") for number in range(6)]
    move(here, there)
    caller.take()
    other = here.connect("other")
    for number in range(5):
        other.ask(closing(other.handle(f"closed {number}")))
    for number, handle in enumerate(handles):
        assert caller.open(f"s{number}").code == "moved"
        assert caller.ask(chunk(handle, 1, draw(1, 2))).code == "moved"


def test_streams_of_a_former_version_keep_only_themselves_from_moving(here: Desk, there: Desk, tmp_path: Path) -> None:
    one, other = here.connect("one"), here.connect("other")
    one.run(chunk(one.handle("old"), 1, draw(1, 2)))
    new = Network(layers=1, learned=True, counter=True, seed=8).save(tmp_path / "new.onnx")
    for desk in (here, there):
        desk.engine.replace_model("pump", Model.load(new, slots=8, threads=1), "finish")
    other.take()
    other.handle("new")
    third = here.connect("third")
    third.handle("newer")
    here.engine.disconnected(other.routing_id)
    with pytest.raises(DrainError, match="weights") as failure:
        Drain(At(here, A), At(there, B)).run()  # type: ignore[arg-type]
    assert failure.value.__notes__[0].startswith("1 of them finish on a former version")
    assert (names(here), names(there)) == ({"old"}, {"new", "newer"})


@pytest.mark.parametrize("leaves", [True, False])
def test_a_reload_that_ends_streams_does_not_end_those_that_are_about_to_leave(
    here: Desk, there: Desk, tmp_path: Path, leaves: bool
) -> None:
    caller, source = here.connect("c"), Operator(here)
    handle = caller.handle("s")
    caller.run(chunk(handle, 1, draw(1, 3)))
    move(here, there, upto="import")
    new = Network(layers=1, learned=True, counter=True, seed=8).save(tmp_path / "new.onnx")
    here.engine.replace_model("pump", Model.load(new, slots=8, threads=1), "restart")
    here.run()
    assert names(here) == {"s"}
    if leaves:
        source.ask("release", group="g", endpoint=B)
        assert [reply.code for reply in caller.take()] == ["", "moved"]  # behind the unasked WELCOME
    else:
        source.ask("lift", group="g")
        here.run()
        caller.take()
        assert caller.ask(chunk(handle, 2, draw(1, 3))).code == "reloaded"
    assert names(here) == set()
    assert here.engine.deadline() != 0


# --- the command, when answers to it are lost ---


class At:
    """A connection of the command to a desk, on which one answer is lost after what was asked for is done."""

    def __init__(self, desk: Desk, endpoint: str, lost: str = "") -> None:
        self.endpoint = endpoint
        self.lost = lost
        self._desk, self._operator = desk, Operator(desk)
        who = desk.connect("who", greet=False)
        who.send(hello())
        origin = who.take()[-1].body["origin"]
        self.welcome = SimpleNamespace(epoch=origin, origin=origin, max_message_bytes=1 << 20)

    def ask(self, command: str, data: bytes = b"", **keys: Any) -> tuple[dict[str, Any], bytes]:
        reply = self._operator.reply(command, data, **keys)
        if reply.type == Type.ERROR:
            raise Refused(Code(reply.header.code), reply.body["text"], handles=reply.body.get("handles"))
        if command == self.lost:
            self.lost = ""
            raise Unanswered(f"no answer from {self.endpoint} within 1 s")
        cut = len(reply.payload) - reply.header.width
        return msgspec.json.decode(reply.payload[:cut]), reply.payload[cut:]


@pytest.mark.parametrize("command", ["gather", "export", "import", "release", "admit"])
def test_what_has_moved_is_told_whichever_answer_is_lost(here: Desk, there: Desk, command: str) -> None:
    """One half is told by the command that fails, the other by the one after it."""
    callers = [here.connect(f"c{number}") for number in range(3)]
    for number, caller in enumerate(callers):
        caller.run(chunk(caller.handle(f"s{number}"), 1, draw(1, 3)))
    loser = here if command in ("gather", "export", "release") else there
    source, target = (At(desk, end, command if desk is loser else "") for desk, end in ((here, A), (there, B)))
    with pytest.raises(Unanswered, match="no answer from") as failure:
        Drain(source, target).run()  # type: ignore[arg-type]
    told, *marked = failure.value.__notes__
    assert len(marked) == (command in ("release", "admit"))
    moved = int(told.split()[0])
    assert moved == len(names(there))
    assert names(here) | names(there) == {"s0", "s1", "s2"}

    report = Drain(source, target).run()  # type: ignore[arg-type]

    assert moved + report.settled + report.streams == 3
    assert (names(here), names(there)) == (set(), {"s0", "s1", "s2"})


def test_streams_whose_clients_follow_before_they_are_admitted_have_moved_too(here: Desk, there: Desk) -> None:
    caller = here.connect("c")
    for name in ("s", "t"):
        caller.handle(name)

    class Source(At):
        def ask(self, command: str, data: bytes = b"", **keys: Any) -> tuple[dict[str, Any], bytes]:
            answer = super().ask(command, data, **keys)
            if command == "release":
                opened = there.connect("c").open("s", mode="resume", generation=1, group=keys["group"])
                assert opened.type == Type.OPENED
            return answer

    report = Drain(Source(here, A), At(there, B)).run()  # type: ignore[arg-type]

    assert (report.streams, names(there)) == (2, {"s", "t"})


def test_streams_that_a_drain_left_undecided_are_told_by_the_next_one(here: Desk, there: Desk) -> None:
    caller = here.connect()
    for number in range(3):
        caller.handle(f"s{number}")
    move(here, there, upto="release")  # and whoever moved them died

    report = Drain(At(here, A), At(there, B)).run()  # type: ignore[arg-type]

    assert (report.settled, report.streams, report.undecided) == (3, 0, 0)
    assert names(there) == {"s0", "s1", "s2"}


def test_streams_that_were_undecided_and_came_again_are_decided(here: Desk, there: Desk) -> None:
    here.connect().handle("s")
    move(here, there, upto="import")
    Operator(here).ask("lift", group="g")
    here.engine._fences._fates.clear()  # as by a restart

    report = Drain(At(here, A), At(there, B)).run()  # type: ignore[arg-type]

    assert (report.streams, report.undecided) == (1, 0)
    assert there.connect("c").open("s", mode="resume", generation=1).type == Type.OPENED


def test_streams_of_a_drain_that_is_not_remembered_are_told_and_left(here: Desk, there: Desk, model: Model) -> None:
    here.connect().handle("s")
    move(here, there, upto="import")
    another = Desk({"pump": model}, epoch=b"thethird")

    report = Drain(At(another, A), At(there, B)).run()  # type: ignore[arg-type]

    assert (report.streams, report.undecided) == (0, 1)
    assert there.connect("c").open("s").code == "busy"
    Operator(there).ask("drop", group="g")
    assert there.connect("d").open("s").type == Type.OPENED


# --- until all have come ---


class Cut(At):
    """A connection that is lost for good before a command is given the so manieth time."""

    def __init__(self, desk: Desk, endpoint: str, command: str, times: int) -> None:
        super().__init__(desk, endpoint)
        self._command, self._times = command, times

    def ask(self, command: str, data: bytes = b"", **keys: Any) -> tuple[dict[str, Any], bytes]:
        self._times -= command == self._command
        if self._times <= 0:
            raise Unanswered(f"no answer from {self.endpoint} within 1 s")
        return super().ask(command, data, **keys)


def half_drained(here: Desk, there: Desk) -> Caller:
    """``left`` has come, ``stays`` has not: the connection that has it here."""
    left, stays = here.connect("left"), here.connect("stays")
    for seed, (caller, name) in enumerate(((left, "left"), (stays, "stays"))):
        caller.run(chunk(caller.handle(name), 1, draw(seed, 3)))
    here.engine.disconnected(left.routing_id)
    with pytest.raises(Unanswered) as failure:
        Drain(Cut(here, A, "gather", 2), At(there, B)).run()  # type: ignore[arg-type]
    assert (names(here), names(there)) == ({"stays"}, {"left"})
    assert "until this drain is finished" in failure.value.__notes__[-1]
    return stays


def drain(source: Desk, target: Desk, *endpoints: str) -> Report:
    """As the command does it, at A and B unless they are called otherwise."""
    here, there = endpoints or (A, B)
    return Drain(At(source, here), At(target, there)).run()  # type: ignore[arg-type]


def test_no_stream_begins_a_second_time_where_a_drain_that_was_cut_off_has_brought_others(
    here: Desk, there: Desk
) -> None:
    stays = half_drained(here, there)
    caller = there.connect("c")
    for mode in ("auto", "resume", "new"):
        busy = caller.ask(opening("stays", mode=mode))
        assert (busy.code, busy.body["retry_after_seconds"] > 0) == ("busy", True)
        assert "a drain to this one is not finished" in busy.body["text"]
    assert there.stats.drains_unfinished == 1
    stays.run(chunk(stays.handle("stays"), 2, draw(3, 3)))

    report = drain(here, there)

    assert (report.streams, report.expected, there.stats.drains_unfinished) == (1, [], 0)
    assert caller.open("stays").body["last_seq"] == 2
    assert caller.open("new").body["fresh"]


def test_streams_that_are_there_go_on_while_more_are_to_come(here: Desk, there: Desk) -> None:
    half_drained(here, there)
    caller = there.connect("c")
    opened = caller.open("left")
    handle = opened.header.handle
    assert opened.body["last_seq"] == 1
    refused = caller.ask(state(handle, 2, Operation.CLONE, b"stays"))
    assert (refused.code, "retry_after_seconds" in refused.body) == ("exists", False)
    assert caller.run(chunk(handle, 2, draw(4, 3)))[0].type == Type.RESULT
    caller.ask(closing(handle))
    assert caller.open("left", mode="resume").code == "closed"  # it is not elsewhere
    assert caller.open("left").body["fresh"]


def test_a_copy_out_of_a_file_is_not_taken_for_one_that_is_to_come(here: Desk, there: Desk) -> None:
    half_drained(here, there)
    source, target = Operator(here), Operator(there)
    stamps = source.ask("gather", group="g")["stamps"]
    data = source.export("g")
    refused = target.reply("import", data, group="g", stamps=stamps, lasting=False)
    assert (refused.code, "may be one that is to come" in refused.body["text"]) == ("exists", True)
    target.ask("expect")
    assert target.ask("import", data, group="g", stamps=stamps, lasting=False) == {"streams": 1, "stayed": 0}


def test_daemons_are_told_apart_however_their_addresses_are_spelled(here: Desk, there: Desk, model: Model) -> None:
    half_drained(here, there)
    third = Desk({"pump": model}, epoch=b"thethird")
    third.connect("c").handle("third")

    assert drain(third, there, A, B).expected == [A]  # as the other one is called where that was said

    assert there.connect("c").open("stays").code == "busy"
    assert drain(here, there, "tcp://localhost:7070", B).expected == []
    assert there.connect("c").open("stays").body["last_seq"] == 1
    assert there.connect("c").open("third").type == Type.OPENED
    there.connect("d").ask(closing(there.connect("d").open("stays").header.handle))
    drain(there, here, "tcp://localhost:7071", A)
    assert here.connect("c").open("stays").body["fresh"]  # closed over there


def test_who_runs_it_may_say_that_nothing_more_comes(here: Desk, there: Desk) -> None:
    half_drained(here, there)
    operator, caller = Operator(there), there.connect("c")
    (origin,) = operator.ask("groups")["expected"]
    third = {"endpoint": "tcp://127.0.0.1:1", "machine": "third", "origin": "3"}
    for _ in range(2):
        named = "tcp://127.0.0.1:1 on third"
        assert operator.ask("expect", **third) == {"expected": {origin: A, "3": named}}
        operator.ask("drained", endpoint="tcp://127.0.0.1:1")
        assert operator.ask("groups")["expected"] == {origin: A}
    operator.ask("expect", **third)
    operator.ask("drained", endpoint=A)
    assert caller.open("new").code == "busy"
    assert operator.ask("expect") == {"expected": {}}
    assert caller.open("new").body["fresh"]


def test_a_daemon_that_more_is_to_come_to_is_not_drained_elsewhere(here: Desk, there: Desk, model: Model) -> None:
    half_drained(here, there)
    third = Desk({"pump": model}, epoch=b"thethird")
    with pytest.raises(Refused, match=f"a drain from {A} to this daemon is not finished"):
        drain(there, third, B, "tcp://third:1")
    assert (names(there), names(third)) == ({"left"}, set())

    drain(there, here, B, A)  # back to where the others are

    assert (names(here), names(there)) == ({"left", "stays"}, set())
    assert there.connect("c").open("new").code == "moved"
    assert here.connect("c").open("new").body["fresh"]


def test_a_drain_back_that_is_refused_leaves_everybody_where_he_is(here: Desk, there: Desk, tmp_path: Path) -> None:
    here.connect("c").handle("s")
    drain(here, there)
    new = Network(layers=1, learned=True, counter=True, seed=8).save(tmp_path / "new.onnx")
    here.engine.replace_model("pump", Model.load(new, slots=8, threads=1), "finish")
    with pytest.raises(DrainError, match="weights"):
        drain(there, here, B, A)
    assert here.connect("d").open("n").code == "moved"
    assert there.connect("c").open("s").type == Type.OPENED


@pytest.mark.parametrize("command", ["gather", "export"])
def test_a_drain_that_brought_nothing_leaves_no_mark(here: Desk, there: Desk, command: str) -> None:
    here.connect("c").handle("s")
    with pytest.raises(Unanswered):
        Drain(Cut(here, A, command, 1), At(there, B)).run()  # type: ignore[arg-type]
    assert there.connect("c").open("new").body["fresh"]


def test_two_streams_of_one_name_keep_only_themselves_and_their_connections_from_moving(
    here: Desk, there: Desk
) -> None:
    gone, stays, other = here.connect("gone"), here.connect("stays"), here.connect("other")
    for caller, name in ((gone, "x"), (gone, "y"), (stays, "p"), (stays, "q"), (other, "z")):
        caller.handle(name)
    here.engine.disconnected(gone.routing_id)
    theirs = there.connect("theirs")
    handles = {name: theirs.handle(name) for name in ("x", "p")}

    with pytest.raises(DrainError, match="2 streams cannot move") as failure:
        drain(here, there)

    told = next(note for note in failure.value.__notes__ if "in the place of 'x', 'p'" in note)
    assert f"they stay at {A}, with all streams of connections that have one" in told
    assert (names(here), names(there)) == ({"x", "p", "q"}, {"y", "z", "x", "p"})
    (reply,) = stays.run(chunk(stays.handle("q"), 1, draw(1, 3)))  # it is open to its client
    assert reply.type == Type.RESULT
    theirs.ask(closing(handles["x"]))
    stays.ask(closing(stays.handle("p")))
    assert drain(here, there).streams == 2
    assert (names(here), names(there)) == (set(), {"x", "y", "p", "q", "z"})


def test_a_daemon_that_lets_nobody_stay_is_not_asked_for_ever(here: Desk, there: Desk) -> None:
    class Former(At):
        def ask(self, command: str, data: bytes = b"", **keys: Any) -> tuple[dict[str, Any], bytes]:
            return super().ask(command, data, **{key: value for key, value in keys.items() if key != "staying"})

    here.connect("c").handle("x")
    there.connect("c").handle("x")
    with pytest.raises(DrainError, match="another one"):
        Drain(Former(here, A), At(there, B)).run()  # type: ignore[arg-type]


# --- whatever is cut off ---


class Severed(At):
    """A connection that is lost for good with the so manieth command, before or after it is carried out."""

    def __init__(self, desk: Desk, endpoint: str, commands: int, *, is_done: bool) -> None:
        super().__init__(desk, endpoint)
        self._left, self._is_done = commands, is_done

    def ask(self, command: str, data: bytes = b"", **keys: Any) -> tuple[dict[str, Any], bytes]:
        self._left -= 1
        if self._left < 0 or (self._left == 0 and not self._is_done):
            raise Unanswered("cut off")
        answer = super().ask(command, data, **keys)
        if self._left == 0:
            raise Unanswered("cut off")
        return answer


class Site:
    """Three daemons, and clients that know where their streams were last, or one of the daemons that have had some."""

    def __init__(self, model: Model) -> None:
        self.desks = {f"tcp://{name}:1": Desk({"pump": model}, epoch=name.encode() * 8) for name in ("a", "b", "c")}
        self._known = ["tcp://a:1"]
        self._at: dict[str, str] = {}
        self._numbers = itertools.count()

    def drain(self, source: str, target: str, cuts: tuple[int, int], is_done: bool) -> None:
        ends = ((source, cuts[0]), (target, cuts[1]))
        connections = [Severed(self.desks[end], end, cut, is_done=is_done) for end, cut in ends]
        with contextlib.suppress(DrainError, Refused, Unanswered):
            Drain(*connections, timeout_seconds=0.01).run()  # type: ignore[arg-type]
        for desk in self.desks.values():
            desk.now += 2 * FENCE_SECONDS
            desk.run()
        if self._open_at(target) and target not in self._known:
            self._known.append(target)

    def open(self, name: str, number: int, *, stays: bool, closes: bool) -> None:
        """As a client does it: where it was last, or at a daemon that is known; it follows."""
        at = self._at.get(name, self._known[0]) if number < 0 else self._known[number % len(self._known)]
        group = {}
        for _ in range(6):
            caller = self.desks[at].connect(f"c{next(self._numbers)}")
            reply = caller.ask(opening(name, **group))
            if reply.code != "moved":
                break
            at, group = reply.body["endpoint"], {"group": reply.body["group"]} if "group" in reply.body else {}
        assert reply.code in ("", "busy")
        if reply.type == Type.OPENED:
            self._at[name] = at
            if closes:
                caller.ask(closing(reply.header.handle))
        if not stays:
            self.desks[at].engine.disconnected(caller.routing_id)

    def check(self) -> None:
        """No stream is open at two daemons."""
        open_ = [name for end in self.desks for name in self._open_at(end)]
        assert len(open_) == len(set(open_)), open_

    def _open_at(self, end: str) -> list[str]:
        streams = self.desks[end].engine._streams.all()
        return [stream.name for stream in streams if stream.fence is None or not stream.fence.is_held]


_CUTS = st.one_of(st.just(1000), st.integers(1, 16))
_ACTS = st.one_of(
    st.tuples(st.just("open"), st.sampled_from("xyz"), st.integers(-1, 2), st.booleans(), st.booleans()),
    st.tuples(
        st.just("drain"),
        st.permutations(["tcp://a:1", "tcp://b:1", "tcp://c:1"]),
        st.tuples(_CUTS, _CUTS),
        st.booleans(),
    ),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(acts=st.lists(_ACTS, max_size=16), streams=st.integers(1, 2))
def test_however_drains_are_cut_off_a_stream_is_open_once_and_nobody_is_sent_in_a_circle(
    model: Model, monkeypatch: pytest.MonkeyPatch, acts: list[tuple[Any, ...]], streams: int
) -> None:
    for name, value in {"GROUP_STREAMS": streams, "FENCE_SECONDS": 0.01, "_POLL_SECONDS": 0.0001}.items():
        monkeypatch.setattr(f"recurd.drain.{name}", value)
    site = Site(model)
    for kind, *act in acts:
        if kind == "drain":
            (source, target, _), cuts, is_done = act
            site.drain(source, target, cuts, is_done)
        else:
            name, number, stays, closes = act
            site.open(name, number, stays=stays, closes=closes)
        site.check()
