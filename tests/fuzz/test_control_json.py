"""Control messages with JSON that no client would send: each is answered once, and nothing else comes of it."""

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from books import check_books
from dialogue import Caller, Desk, Reply, chunk
from moving import Operator
from recurd import wire
from recurd.config import Config, Tenant, override
from recurd.model import Model
from recurd.tenants import Tenants
from recurd.wire import Type
from recurrent import Network

PUMP = Network(learned=True, counter=True)
SLOTS = 3

#: What code breaks at, besides whatever comes.
NUMBERS = st.sampled_from([0, 1, -1, 255, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, 1e-300, 1e300, 0.5])
WORDS = st.sampled_from(
    [
        "",
        "pump",
        "witness",
        "s1",
        "a/b",
        "..",
        "*",
        "[",
        "\0",
        "\ud7ff",
        "ä" * 300,
        "x" * 70_000,
        "new",
        "auto",
        "resume",
    ]
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.integers(), st.floats(allow_nan=False), WORDS, st.text())
VALUES = st.recursive(
    LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(), inner, max_size=4))
)


def bodies(usual: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A message's keys as they should be, but for a few that are left out, or hold anything, or that nobody knows."""
    strange = st.dictionaries(st.sampled_from([*usual, "what"]), VALUES, max_size=2)
    gone = st.sets(st.sampled_from([*usual, "what"]), max_size=1)
    return st.builds(
        lambda new, out: {key: value for key, value in (usual | new).items() if key not in out}, strange, gone
    )


HELLOS = bodies({"client": "fuzz", "versions": [1], "multi": True})
OPENS = bodies(
    {"stream": "s1", "model": "pump", "mode": "auto", "generation": 1, "idle_timeout_seconds": 60.0, "group": "g1"}
)
GROUP = {"group": "g1"}
COMMANDS: dict[str, dict[str, Any]] = {
    "gather": GROUP | {"fence": True, "limit": 2, "staying": [1], "model": "pump", "stream": "*", "tenant": "*"},
    "export": GROUP | {"start": 0, "max_bytes": 100_000, "limit": 2},
    "release": GROUP | {"endpoint": "tcp://127.0.0.1:1", "server_key": None},
    "lift": GROUP,
    "expect": {"endpoint": None, "machine": None, "origin": "0", "is_empty": True},
    "redirect": {"endpoint": None, "server_key": None, "origin": None},
    "drained": {"endpoint": "tcp://127.0.0.1:2", "origin": None},
    "import": GROUP | {"stamps": [], "accept_drift": True, "lasting": False},
    "admit": GROUP,
    "drop": GROUP,
    "groups": {},
    "fate": GROUP,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.load(PUMP.save(tmp_path_factory.mktemp("models") / "pump.onnx"), slots=SLOTS, threads=1)


def desk(model: Model) -> Desk:
    """A daemon with two tenants, one of which may not do everything."""
    config = override(Config(), {"limits": {"streams": 5, "ended_streams": 5, "connections": 6}})
    tenants = Tenants({"a": Tenant(rights=("stream",)), "boss": Tenant(rights=("admin",))})
    return Desk({"pump": model}, config, slots=SLOTS, tenants=tenants)


def encoded(body: Any, damage: tuple[int, bytes] | None) -> bytes:
    """A body as bytes, with some put into it where it is to be ``damaged``."""
    data = msgspec.json.encode(body)
    if damage is None:
        return data
    place = damage[0] % (len(data) + 1)
    return data[:place] + damage[1] + data[place:]


NOISE = st.tuples(st.integers(0, 1000), st.one_of(st.binary(min_size=1, max_size=4), st.just(b"[" * 3000)))
DAMAGE = st.one_of(st.none(), st.none(), st.none(), NOISE)


def answered(
    caller: Caller, kind: Type, body: Any, damage: tuple[int, bytes] | None, number: int, width: int = 0
) -> Reply:
    """The one answer to a message, which says what it is for; ``width`` is what an ADMIN says of the data behind it."""
    data = encoded(body, damage)
    reply = caller.ask((wire.pack(kind, size=len(data), width=width, seq=number), data))
    assert reply.header.seq == number
    if reply.type == Type.ERROR:
        assert reply.body["in_reply_to"] == kind
        assert reply.code != "internal", reply.body
    return reply


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.tuples(st.just(Type.HELLO), HELLOS, DAMAGE), st.tuples(st.just(Type.OPEN), OPENS, DAMAGE)))
)
def test_hello_and_open_are_answered_whatever_their_json_says(
    model: Model, messages: list[tuple[Type, Any, Any]]
) -> None:
    x = PUMP.draw(3, np.random.default_rng(1))
    alone = desk(model).connect()
    handle = alone.handle("witness")
    expected = [alone.run(chunk(handle, seq, x))[0].payload for seq in (1, 2)]

    daemon = desk(model)
    witness = daemon.connect("witness")
    handle = witness.handle("witness")
    results = witness.run(chunk(handle, 1, x))
    caller = daemon.connect("fuzz", tenant="a")

    for number, (kind, body, damage) in enumerate(messages, 1):
        reply = answered(caller, kind, body, damage, number)
        assert reply.type in (Type.ERROR, {Type.HELLO: Type.WELCOME, Type.OPEN: Type.OPENED}[kind])
        check_books(daemon.engine)

    results += witness.run(chunk(handle, 2, x))
    assert [result.payload for result in results] == expected
    assert not daemon.stats.internal_errors


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(sorted(COMMANDS)).flatmap(
            lambda name: st.tuples(st.just(name), bodies(COMMANDS[name]), DAMAGE, st.integers(0, 2**32 - 1))
        ),
        max_size=12,
    )
)
def test_a_command_is_answered_whatever_its_json_says(model: Model, commands: list[tuple[str, Any, Any, int]]) -> None:
    daemon = desk(model)
    witness = daemon.connect("witness")
    handles = [witness.handle("witness"), witness.handle("s1")]
    x = PUMP.draw(3, np.random.default_rng(1))
    witness.run(*[chunk(handle, 1, x) for handle in handles])
    caller = daemon.connect("boss", tenant="boss")

    for number, (name, body, damage, data_bytes) in enumerate(commands, 1):
        # Every third lies about the data behind it.
        width = 0 if data_bytes % 3 else data_bytes
        reply = answered(caller, Type.ADMIN, body | {"command": name}, damage, number, width)
        assert reply.type in (Type.ERROR, Type.REPORT)
        check_books(daemon.engine)
    daemon.now += 1000.0  # whatever was fenced is let go
    daemon.run()
    check_books(daemon.engine)
    assert not daemon.stats.internal_errors


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_streams_that_come_from_elsewhere_are_taken_in_or_refused_whatever_they_say(
    model: Model, data: st.DataObject
) -> None:
    source = desk(model)
    client, operator = source.connect("client"), Operator(source)
    x = PUMP.draw(3, np.random.default_rng(1))
    client.run(*[chunk(client.handle(name), 1, x) for name in ("s1", "s2")])
    stamps = operator.ask("gather", group="g1")["stamps"]
    parcels = msgspec.msgpack.decode(operator.export("g1"))
    for _ in range(data.draw(st.integers(1, 3))):
        _spoil(data, parcels)
    text = msgspec.msgpack.encode(parcels)
    if not data.draw(st.integers(0, 9)):
        text = text[: -data.draw(st.integers(1, 9))] + data.draw(st.binary(max_size=4))

    target = desk(model)
    operator = Operator(target)
    reply = operator.reply("import", text, group="g1", stamps=stamps)
    check_books(target.engine)
    if reply.type == Type.REPORT:
        operator.ask("admit", group="g1")
        guest = target.connect("guest")
        for stream in list(target.engine._streams.all()):
            if stream.tenant == "local":
                opened = guest.open(stream.name)
                assert opened.type == Type.OPENED
                fields = {"generation": opened.header.generation}
                (result, *_) = guest.run(chunk(opened.header.handle, opened.body["last_seq"] + 1, x, **fields))
                assert result.type == Type.RESULT or result.code in ("run_failed", "poisoned")
        check_books(target.engine)
    else:
        assert reply.type == Type.ERROR
        assert not list(target.engine._streams.all())
    assert not target.stats.internal_errors


#: What may stand in the place of a value.
OTHERS: dict[type, st.SearchStrategy[Any]] = {
    int: st.sampled_from([0, 1, 2, 3, -1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1]),
    float: st.sampled_from([0.0, -1.0, 1e-300, 1.0, 1e300, math.nan, math.inf]),
    str: st.one_of(st.sampled_from(["", "s1", "s2", "local", "a", "pump", "\0"]), st.text(max_size=5)),
    bytes: st.one_of(st.binary(max_size=60), st.just(b""), st.none()),
    list: st.just([]),
}


def _spoil(data: st.DataObject, parcels: list[Any]) -> None:
    """Put something else into one place of a tree of lists: mostly of the kind that stands there."""
    place, index = parcels, data.draw(st.integers(0, len(parcels) - 1))
    while isinstance(place[index], list) and place[index] and data.draw(st.integers(0, 9)):
        place = place[index]
        index = data.draw(st.integers(0, len(place) - 1))
    kind = type(place[index]) if data.draw(st.integers(0, 9)) else data.draw(st.sampled_from(list(OTHERS)))
    place[index] = data.draw(OTHERS.get(kind, VALUES))
