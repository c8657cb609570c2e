"""Tenants at an engine without sockets: what each may do, and how much of the daemon it may take."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dialogue import Array, Desk, chunk, closing, hello, opening, ping, reset
from recurd.config import Config, Limits, Tenant, TenantLimits
from recurd.model import Model
from recurd.tenants import LOCAL, Patterns, Tenants
from recurd.wire import Type
from recurrent import Network

PUMP = Network()
VALVE = Network(name="valve", features=2, hidden=4, layers=1, seed=3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder: Path = tmp_path_factory.mktemp("models")
    return {
        network.name: Model.load(network.save(folder / f"{network.name}.onnx"), slots=200, threads=1)
        for network in (PUMP, VALVE)
    }


OpenDesk = Callable[..., Desk]


@pytest.fixture
def open_desk(models: dict[str, Model]) -> OpenDesk:
    def open_desk(limits: Limits | None = None, users: dict[str, str] | None = None, **tenants: Tenant) -> Desk:
        config = Config(limits=limits or Limits(), tenants=tenants)
        return Desk(models, config, tenants=Tenants(tenants, users))

    return open_desk


def draw(steps: int = 2) -> Array:
    return PUMP.draw(steps, np.random.default_rng(0))


# --- rights ---


def test_whoever_has_no_section_has_the_usual_rights_and_local_all() -> None:
    tenants = Tenants()

    assert tenants.rights("gateway-7").rights == {"stream", "reset", "state"}
    assert tenants.rights(LOCAL).rights == {"stream", "reset", "state", "admin"}
    assert Tenants({LOCAL: Tenant(rights=("stream",))}).rights(LOCAL).rights == {"stream"}
    assert Tenants({LOCAL: Tenant(models=("pump",))}).rights(LOCAL).may("admin")


def test_patterns_are_globs_over_whole_names() -> None:
    patterns = Patterns(("hall-?/*", "x"))

    assert [n for n in ("hall-3/a", "hall-3/", "hall-33/a", "x", "xx", "a x", "hall-3/a\nb") if patterns.match(n)] == [
        "hall-3/a",
        "hall-3/",
        "x",
        "hall-3/a\nb",
    ]
    assert not Patterns(()).match("")


def test_a_tenant_opens_the_models_and_names_it_may_and_no_others(open_desk: OpenDesk) -> None:
    caller = open_desk(a=Tenant(models=("pump",), streams=("hall-*",))).connect(tenant="a")

    refusals = [caller.open("hall-1", "valve"), caller.open("hall-1", "none"), caller.open("cellar")]

    assert caller.open("hall-1").type == Type.OPENED
    assert [reply.code for reply in refusals] == ["forbidden"] * 3
    assert refusals[0].body["text"] == "tenant 'a' may not use model 'valve'"
    assert refusals[2].body["text"] == "tenant 'a' has streams like 'hall-*' only, not 'cellar'"


def test_a_tenant_is_told_its_rights_and_only_of_its_models(open_desk: OpenDesk) -> None:
    desk = open_desk(a=Tenant(models=("p*",), rights=("stream",)), none=Tenant(models=("x*",)))

    nothing = desk.connect("n", tenant="none").open("s", "x")
    assert (nothing.code, nothing.body["text"]) == ("unknown_model", "there is no model 'x'")
    welcome = desk.connect(tenant="a", greet=False).ask(hello()).body

    assert list(welcome["models"]) == ["pump"]
    assert (welcome["tenant"], welcome["rights"]) == ("a", ["stream"])
    unknown = desk.connect("b", tenant="a").open("s", "pumps")
    assert (unknown.code, "valve" in unknown.body["text"]) == ("unknown_model", False)


def test_without_the_right_to_reset_a_stream_is_not_started_afresh(open_desk: OpenDesk) -> None:
    caller = open_desk(a=Tenant(rights=("stream",))).connect(tenant="a")
    handle = caller.handle("s", mode="new")
    (first,) = caller.run(chunk(handle, 1, draw()))

    assert caller.ask(reset(handle, 2)).code == "forbidden"
    assert caller.open("s", mode="new").code == "forbidden"

    (second,) = caller.run(chunk(handle, 2, draw()))
    assert not second.flags
    assert not np.array_equal(first.output, second.output)


def test_without_the_right_to_stream_nothing_is_opened(open_desk: OpenDesk) -> None:
    caller = open_desk(a=Tenant(rights=("admin",))).connect(tenant="a")

    assert caller.open("s").body["text"] == "tenant 'a' has not the right 'stream'"


# --- limits ---


def test_a_tenant_has_as_many_streams_as_it_may(open_desk: OpenDesk) -> None:
    desk = open_desk(a=Tenant(limits=TenantLimits(streams=2)))
    caller = desk.connect(tenant="a")
    caller.handle("s")
    caller.handle("t")

    assert caller.open("u").code == "too_many_streams"
    assert desk.connect("b", tenant="b").open("u").type == Type.OPENED


def test_chunks_beyond_the_rate_are_refused_for_so_long_and_leave_no_trace(open_desk: OpenDesk) -> None:
    desk = open_desk(a=Tenant(limits=TenantLimits(chunks_per_second=4)))
    caller = desk.connect(tenant="a")
    handle = caller.handle("s")
    for seq in range(1, 6):  # a second's worth, and the one that is paid afterwards
        (answer,) = caller.run(chunk(handle, seq, draw(), ack=seq - 1))
        assert answer.type == Type.RESULT

    (refused,) = caller.run(chunk(handle, 6, draw(), ack=5))
    assert (refused.code, refused.body["retry_after_seconds"]) == ("limit", 0.25)
    desk.now += 0.2
    (again,) = caller.run(chunk(handle, 6, draw(), ack=5))
    assert (again.code, again.body["retry_after_seconds"]) == ("limit", pytest.approx(0.05))
    desk.now += 0.05
    (late,) = caller.run(chunk(handle, 6, draw(), ack=5))
    assert late.type == Type.RESULT


def test_over_a_long_time_exactly_the_rate_is_let_in(open_desk: OpenDesk) -> None:
    desk = open_desk(a=Tenant(limits=TenantLimits(chunks_per_second=10)))
    caller = desk.connect(tenant="a")
    handle, seq = caller.handle("s"), 1
    for _ in range(1000):
        desk.now += 0.01
        (answer,) = caller.run(chunk(handle, seq, draw(), ack=seq - 1))
        seq += answer.type == Type.RESULT

    assert 100 <= seq - 1 <= 111


def test_a_chunk_larger_than_a_seconds_bytes_is_let_in_and_paid_for(open_desk: OpenDesk) -> None:
    desk = open_desk(a=Tenant(limits=TenantLimits(bytes_per_second=100)))
    caller = desk.connect(tenant="a")
    handle = caller.handle("s")
    size = draw(100).nbytes

    (large,) = caller.run(chunk(handle, 1, draw(100)))
    (after,) = caller.run(chunk(handle, 2, draw(1)))

    assert large.type == Type.RESULT
    assert (after.code, after.body["retry_after_seconds"]) == ("limit", pytest.approx(size / 100 - 1))
    desk.now += size / 100
    assert caller.run(chunk(handle, 2, draw(1)))[0].type == Type.RESULT


def test_a_tenant_has_as_many_chunks_in_flight_as_it_may_over_all_its_streams(open_desk: OpenDesk) -> None:
    desk = open_desk(a=Tenant(limits=TenantLimits(in_flight=2)))
    caller, other = desk.connect(tenant="a"), desk.connect("b", tenant="b")
    handles = [caller.handle(name) for name in "stu"]
    caller.send(*[chunk(handle, 1, draw()) for handle in handles])

    (refused,) = caller.take()
    assert (refused.code, refused.header.handle) == ("limit", handles[2])
    (theirs,) = other.run(chunk(other.handle("s"), 1, draw()))
    assert theirs.type == Type.RESULT
    assert [reply.type for reply in caller.take()] == [Type.RESULT] * 2
    assert caller.run(chunk(handles[2], 1, draw()))[0].type == Type.RESULT


def test_a_tenant_keeps_as_many_unacknowledged_results_as_it_may(open_desk: OpenDesk) -> None:
    size = 2 * 4 * 2
    desk = open_desk(a=Tenant(limits=TenantLimits(retained_bytes=2 * size)))
    caller = desk.connect(tenant="a")
    handle = caller.handle("s")

    one, two, three = (caller.run(chunk(handle, seq, draw()))[0] for seq in (1, 2, 3))

    assert (len(one.payload), one.type, two.type, three.code) == (size, Type.RESULT, Type.RESULT, "limit")
    assert caller.run(chunk(handle, 3, draw(), ack=1))[0].type == Type.RESULT


# --- shares ---


def test_what_a_tenant_has_queued_counts_by_the_results_to_come(open_desk: OpenDesk) -> None:
    """All of it is accepted before the first result is there, and none of it is ever acknowledged."""
    desk = open_desk(Limits(retained_bytes=16 * 100, stream_credit=1000, queued_seconds=1e6), a=Tenant())
    hog, modest = desk.connect(tenant="a"), desk.connect("b", tenant="b")
    handles = [hog.handle(f"s{number}") for number in range(4)]
    hog.send(*[chunk(handle, seq, draw()) for seq in range(1, 100) for handle in handles])
    assert {reply.code for reply in hog.take()} == {"busy", "gap"}
    desk.run()
    assert len([reply for reply in hog.take() if reply.type == Type.RESULT]) <= 51

    handle = modest.handle("s")
    for seq in range(1, 40):
        (reply,) = modest.run(chunk(handle, seq, draw(), ack=seq - 1))
        assert reply.type == Type.RESULT, reply
    hog.run(*[chunk(handle, 99, draw(), ack=30) for handle in handles])
    share = desk.engine._tenants.share("a", desk.engine._room)
    assert share is not None
    assert (share.chunks, share.due) == (0, 0.0)


def test_welcome_tells_of_no_model_that_one_may_not_use(open_desk: OpenDesk) -> None:
    desk = open_desk(a=Tenant(models=("pump",)))
    desk.engine._lifecycle.announce("valve", True)
    desk.engine._lifecycle.announce("pump", True)
    welcome = desk.connect("a", tenant="a", greet=False).ask(hello()).body
    assert (list(welcome["models"]), welcome["bit_exact"]) == (["pump"], ["pump"])


def test_who_never_acknowledges_leaves_room_for_others(open_desk: OpenDesk) -> None:
    desk = open_desk(Limits(retained_bytes=16 * 100, stream_credit=1000), a=Tenant())
    hog, modest = desk.connect(tenant="a"), desk.connect("b", tenant="b")
    handle, answers = hog.handle("s"), []
    for seq in range(1, 101):
        answers += hog.run(chunk(handle, seq, draw()))

    assert {reply.code for reply in answers if reply.code} == {"busy", "gap"}
    assert sum(reply.type == Type.RESULT for reply in answers) == 50
    theirs = modest.handle("s")
    for seq in range(1, 26):  # half of what the first has left
        assert modest.run(chunk(theirs, seq, draw()))[0].type == Type.RESULT
    assert desk.connect("c", tenant="c").open("s").type == Type.OPENED


def test_however_many_tenants_send_all_they_can_the_next_one_is_let_in(open_desk: OpenDesk) -> None:
    desk = open_desk(Limits(queued_chunks=64, stream_credit=1000), a=Tenant())
    accepted = []
    for name in "abcdef":
        caller = desk.connect(name, tenant=name)
        handle = caller.handle("s")
        caller.send(*[chunk(handle, seq, draw()) for seq in range(1, 65)])
        accepted.append(64 - len(caller.take()))

    assert accepted == [32, 16, 8, 4, 2, 1]


def test_however_many_streams_tenants_open_there_is_room_for_the_next_ones(open_desk: OpenDesk) -> None:
    desk = open_desk(Limits(host_state_bytes=0), a=Tenant())
    opened = []
    for name in "abcd":
        caller = desk.connect(name, tenant=name)
        answers = [caller.open(f"s{number}") for number in range(201)]
        opened.append(sum(answer.type == Type.OPENED for answer in answers))
        assert {answer.code for answer in answers} == {"", "no_slots"}
        assert f"tenant '{name}' has {opened[-1]} streams" in answers[-1].body["text"]

    assert opened == [100, 50, 25, 13]
    caller.ask(closing(caller.open("s0").header.handle))
    assert caller.open("another").type == Type.OPENED


def test_a_rate_that_is_used_up_is_not_given_anew_when_rights_are_read_again(open_desk: OpenDesk) -> None:
    tenant = Tenant(limits=TenantLimits(chunks_per_second=2))
    desk = open_desk(a=tenant)
    caller = desk.connect(tenant="a")
    handle = caller.handle("s")
    seq = 1
    while caller.run(chunk(handle, seq, draw()))[0].type == Type.RESULT:
        seq += 1
    assert seq == 4
    for sections in ({"a": tenant}, {"a": Tenant(limits=TenantLimits(chunks_per_second=3))}):
        desk.tenants.change(sections, None)
        assert caller.run(chunk(handle, seq, draw()))[0].code == "limit"
    desk.tenants.change({"a": Tenant()}, None)
    assert caller.run(chunk(handle, seq, draw()))[0].type == Type.RESULT


def test_a_stream_that_waits_as_it_was_told_does_not_expire(open_desk: OpenDesk) -> None:
    size = draw(10).nbytes
    desk = open_desk(a=Tenant(limits=TenantLimits(bytes_per_second=size / 100)))
    caller = desk.connect(tenant="a")
    handle = caller.handle("s", idle_timeout_seconds=10)
    caller.run(chunk(handle, 1, draw(10)))
    seconds = caller.ask(chunk(handle, 2, draw(10))).body["retry_after_seconds"]
    assert seconds > 10
    for more, expired in ((seconds + 9, 0), (1, 1)):
        desk.now += more
        desk.tick()
        assert desk.stats.streams_ended["expired"] == expired


def test_a_tenant_that_is_given_a_higher_rate_does_not_wait_as_at_the_old_one(open_desk: OpenDesk) -> None:
    size = draw(10).nbytes
    desk = open_desk(a=Tenant(limits=TenantLimits(bytes_per_second=size / 1000)))
    caller = desk.connect(tenant="a")
    handle = caller.handle("s")
    caller.run(chunk(handle, 1, draw(10)))
    assert caller.ask(chunk(handle, 2, draw(10))).body["retry_after_seconds"] == pytest.approx(999)

    desk.tenants.change({"a": Tenant(limits=TenantLimits(bytes_per_second=size))}, None)
    desk.tenants.change({"a": Tenant(limits=TenantLimits(bytes_per_second=size * 10))}, None)

    assert caller.ask(chunk(handle, 2, draw(10))).body["retry_after_seconds"] == pytest.approx(0.0999)
    desk.now += 0.1
    assert caller.run(chunk(handle, 2, draw(10)))[0].type == Type.RESULT


def test_one_tenant_alone_has_all_of_it(models: dict[str, Model]) -> None:
    desk = Desk(models, Config(limits=Limits(queued_chunks=64, stream_credit=1000)))
    caller = desk.connect()
    handle = caller.handle("s")

    caller.send(*[chunk(handle, seq, draw()) for seq in range(1, 65)])

    assert caller.take() == []


def test_nothing_stays_counted_when_streams_end_or_runs_fail(open_desk: OpenDesk) -> None:
    desk = open_desk(a=Tenant(limits=TenantLimits(in_flight=4)))
    caller = desk.connect(tenant="a")
    for round in range(10):
        caller.send(opening("s", mode="new"))
        header = caller.take()[-1].header
        handle, old, new = header.handle, header.generation, header.generation + 1
        caller.run(chunk(handle, 1, draw(), generation=old))
        caller.send(
            chunk(handle, 2, draw(), generation=old),
            reset(handle, 3, generation=old),
            chunk(handle, 4, draw(), generation=new),
        )
        caller.take()
        if round % 2:
            tick = desk.engine.take_tick(desk.now)
            assert tick is not None
            desk.engine.fail(tick, RuntimeError("no"), desk.now)
            caller.take()

    caller.send(opening("s", mode="new"))
    share = desk.tenants.share("a", None)  # type: ignore[arg-type]  # it is there already
    assert share is not None
    assert (share.chunks, share.bytes, share.held) == (0, 0, 0)


# --- keys, and rights that change ---

KEYS = {"key-a": "a", "key-a2": "a", "key-b": "b"}


def test_an_unknown_key_is_forbidden_everything(open_desk: OpenDesk) -> None:
    caller = open_desk(users=KEYS).connect(tenant="key-c", greet=False)

    assert [caller.ask(message).code for message in (hello(), opening("s"))] == ["forbidden"] * 2


def test_two_keys_of_a_tenant_share_its_streams(open_desk: OpenDesk) -> None:
    desk = open_desk(users=KEYS)
    one, two = desk.connect("1", tenant="key-a"), desk.connect("2", tenant="key-a2")
    handle = one.handle("s")

    assert two.open("s").header.handle == handle
    assert one.ask(chunk(handle, 1, draw())).code == "detached"


def test_a_routing_id_that_another_tenant_takes_over_brings_nothing_with_it(open_desk: OpenDesk) -> None:
    desk = open_desk(users=KEYS)
    caller = desk.connect("1", tenant="key-a")
    handle = caller.handle("s")
    caller.send(chunk(handle, 1, draw()))

    thief = desk.connect("1", tenant="key-b", greet=False)
    assert thief.ask(chunk(handle, 2, draw())).code == "hello_required"
    thief.ask(hello())
    assert thief.run(chunk(handle, 2, draw()))[0].code == "unknown_handle"
    assert thief.open("s").header.handle != handle


def test_a_routing_id_that_a_client_chose_is_refused(open_desk: OpenDesk) -> None:
    caller = open_desk(users=KEYS).connect(tenant="key-a", greet=False)
    caller.routing_id = b"chosen"

    refused = caller.ask(hello())

    assert (refused.code, refused.body["text"]) == ("bad_request", "a client must not choose its routing id")


def test_a_key_that_is_taken_away_is_cut_at_once_and_others_stay(open_desk: OpenDesk) -> None:
    desk = open_desk(users=KEYS)
    gone, stays = desk.connect("1", tenant="key-a"), desk.connect("2", tenant="key-a2")
    handle, other = gone.handle("s"), stays.handle("t")
    gone.send(chunk(handle, 1, draw()))

    desk.tenants.change({}, {"key-a2": "a"})
    desk.engine.rights_changed()

    (told,) = gone.take()
    assert (told.code, told.header.handle, "in_reply_to" in told.body) == ("forbidden", 0, False)
    assert gone.run(chunk(handle, 2, draw()))[0].code == "forbidden"
    assert stays.run(chunk(other, 1, draw()))[0].type == Type.RESULT
    assert stays.open("s").body["last_seq"] == 1  # what was accepted before was run
    assert (desk.stats.peers, desk.stats.streams) == (1, {"attached": 2, "detached": 0})


def test_a_key_that_is_given_to_another_tenant_is_cut_and_told_so(open_desk: OpenDesk) -> None:
    desk = open_desk(users=KEYS)
    caller = desk.connect(tenant="key-a")
    caller.handle("s")

    desk.tenants.change({}, KEYS | {"key-a": "other"})
    desk.engine.rights_changed()

    (told,) = caller.take()
    assert (told.code, told.header.handle, "another tenant's now" in told.body["text"]) == ("forbidden", 0, True)
    again = desk.connect("again", tenant="key-a")
    assert again.open("s").body["fresh"]  # its own
    assert desk.stats.streams == {"attached": 1, "detached": 1}


def test_rights_that_are_taken_away_hold_for_streams_that_are_open(open_desk: OpenDesk) -> None:
    desk = open_desk(users=KEYS)
    caller = desk.connect(tenant="key-a")
    kept, lost = caller.handle("hall-1"), caller.handle("cellar")

    desk.tenants.change({"a": Tenant(streams=("hall-*",), rights=("stream",))}, KEYS)
    desk.engine.rights_changed()

    (told,) = caller.take()
    assert (told.code, told.header.handle, "in_reply_to" in told.body) == ("forbidden", lost, False)
    assert caller.ask(chunk(lost, 1, draw())).code == "forbidden"
    assert caller.ask(reset(kept, 1)).code == "forbidden"
    assert caller.run(chunk(kept, 1, draw()))[0].type == Type.RESULT
    assert desk.stats.streams == {"attached": 1, "detached": 1}


def test_limits_that_change_hold_for_what_a_tenant_has(open_desk: OpenDesk) -> None:
    desk = open_desk(users=KEYS)
    caller = desk.connect(tenant="key-a")
    handle = caller.handle("s")
    caller.send(chunk(handle, 1, draw()), chunk(handle, 2, draw()))

    desk.tenants.change({"a": Tenant(limits=TenantLimits(in_flight=2))}, KEYS)

    assert caller.ask(chunk(handle, 3, draw())).code == "limit"


def test_a_tenants_thousand_streams_delay_anothers_single_one_by_a_tick(open_desk: OpenDesk) -> None:
    desk = open_desk(a=Tenant())
    crowd, single = desk.connect(tenant="a"), desk.connect("b", tenant="b")
    for number in range(1000):
        handle = crowd.handle(str(number))
        crowd.send(chunk(handle, 1, draw()), chunk(handle, 2, draw()))
    mine = single.handle("s")
    desk.tick()

    single.send(chunk(mine, 1, draw()))
    desk.tick()

    (answer,) = single.take()
    assert answer.type == Type.RESULT


def test_a_tenant_cannot_take_all_connections(open_desk: OpenDesk) -> None:
    desk = open_desk(Limits(connections=8), a=Tenant(), b=Tenant())
    callers = [desk.connect(f"a{number}", greet=False, tenant="a") for number in range(8)]
    assert [caller.ask(hello()).code for caller in callers] == [""] * 4 + ["busy"] * 4
    desk.connect("b0", tenant="b")
    desk.connect("b1", tenant="b")

    desk.now += 16
    assert callers[0].ask(ping(1)).type == Type.PONG
    again = desk.connect("a8", tenant="a")  # in the place of one that is probably gone, of its own
    assert callers[1].ask(ping(1)).code == "hello_required"
    assert again.ask(ping(1)).type == Type.PONG
