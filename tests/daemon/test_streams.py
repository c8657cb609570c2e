"""The streams' book, where the engine does not show it: expiry and memory of endings under many names."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recurd.endings import Redirect
from recurd.errors import Broken, Code, Refused
from recurd.streams import Stream, Streams


def add(streams: Streams, name: str, now: float = 0.0, idle: float = 10.0, tenant: str = "local") -> Stream:
    return streams.add(
        tenant=tenant,
        name=name,
        lane=None,  # type: ignore[arg-type]
        generation=1,
        idle_timeout=idle,
        now=now,
    )


def test_streams_are_counted_by_tenant() -> None:
    streams = Streams(1, max_ended=10)
    ours = add(streams, "s")
    add(streams, "s", tenant="other")

    assert (len(streams), streams.count("local"), streams.count("other")) == (2, 1, 1)
    assert streams.all_have(1)
    second = add(streams, "t")
    assert not streams.all_have(2)  # the other one may have more
    streams.end(second, Code.CLOSED)
    streams.end(ours, Code.CLOSED)
    assert (len(streams), streams.count("local"), streams.named("local", "s")) == (1, 0, None)
    assert streams.named("other", "s") is not None


@pytest.mark.parametrize(
    ("code", "kind"),
    [(Code.CLOSED, Refused), (Code.EXPIRED, Broken), (Code.FAILED, Broken), (Code.REPLACED, Broken)],
)
def test_an_ending_is_told_in_words_with_its_code(code: Code, kind: type[Exception]) -> None:
    streams = Streams(1, max_ended=10)
    ended, _ = streams.end(add(streams, "pump-17"), code)

    error = ended.error()
    assert isinstance(error, kind)
    assert error.code is code
    assert "pump-17" in str(error)


def test_the_memory_of_a_name_is_its_last_life() -> None:
    streams = Streams(1, max_ended=2)
    for code in (Code.CLOSED, Code.EXPIRED, Code.FAILED):
        streams.end(add(streams, "s"), code)

    ending = streams.ending("local", "s")
    assert ending is not None
    assert ending.code is Code.FAILED


def test_one_tenants_endings_do_not_displace_anothers() -> None:
    streams = Streams(1, max_ended=12)

    def end(tenant: str, count: int) -> None:
        for number in range(count):
            streams.end(add(streams, f"{tenant}{number}", tenant=tenant), Code.CLOSED)

    def known(tenant: str, count: int) -> list[int]:
        return [number for number in range(count) if streams.ending(tenant, f"{tenant}{number}") is not None]

    end("a", 100)
    assert known("a", 100) == list(range(88, 100))
    end("b", 4)
    assert (known("a", 100), known("b", 4)) == (list(range(92, 100)), [0, 1, 2, 3])
    end("a", 50)
    assert known("b", 4) == [0, 1, 2, 3]
    end("c", 50)
    assert (len(known("a", 100)), known("b", 4), known("c", 50)) == (4, [0, 1, 2, 3], [46, 47, 48, 49])


def test_where_a_tenants_streams_have_gone_is_known_however_many_tenants_there_are() -> None:
    streams = Streams(1, max_ended=2, max_moved=4)
    to = Redirect("tcp://b:1")
    for number in range(4):
        for tenant in ("a", "b", "c", "d"):
            streams.end(add(streams, f"s{number}", tenant=tenant), Code.MOVED, to)
    endings = [streams.ending(tenant, f"s{number}") for tenant in ("a", "b", "c", "d") for number in range(4)]
    assert [ending.redirect for ending in endings if ending is not None] == [to] * 16
    oldest = streams.end(add(streams, "s4", tenant="a"), Code.MOVED, Redirect("tcp://c:1"))[1]
    assert (len(oldest), streams.ending("a", "s0")) == (1, None)

    assert len(streams.forget_moved("tcp://b:1", None)) == 15
    assert [streams.ending(tenant, "s3") for tenant in ("a", "b")] == [None, None]
    assert streams.ending("a", "s4") is not None


def test_without_any_memory_of_endings_all_is_simply_unknown() -> None:
    streams = Streams(1, max_ended=0)
    stream = add(streams, "s")
    ended, forgotten = streams.end(stream, Code.EXPIRED)
    assert (ended.code, forgotten) == (Code.EXPIRED, [stream.handle])
    assert streams.ending("local", "s") is None


@given(
    st.lists(
        st.tuples(st.sampled_from(["open", "record", "close", "wait"]), st.integers(0, 9), st.integers(1, 30)),
        max_size=120,
    )
)
@settings(max_examples=200, deadline=None)
def test_streams_expire_exactly_when_they_were_idle_for_their_time_out(
    acts: list[tuple[str, int, int]],
) -> None:
    streams, now = Streams(1, max_ended=5), 0.0
    alive: dict[str, Stream] = {}
    for act, number, seconds in acts:
        name = f"s{number}"
        if act == "open" and name not in alive:
            alive[name] = add(streams, name, now, float(seconds))
        elif act == "record" and name in alive:
            alive[name].last_seen = now
        elif act == "close" and name in alive:
            streams.end(alive.pop(name), Code.CLOSED)
        elif act == "wait":
            now += seconds / 3
        due = {n for n, s in alive.items() if s.last_seen + s.idle_timeout <= now}
        expired = streams.expired(now, 100)
        assert {s.name for s in expired} == due
        for s in expired:
            streams.end(alive.pop(s.name), Code.EXPIRED)
        times = [s.last_seen + s.idle_timeout for s in alive.values()]
        deadline = streams.deadline()
        assert not times or (deadline is not None and deadline <= min(times)), "never asked too late"
        assert len(streams) == len(alive)
