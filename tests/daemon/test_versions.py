"""A model's file is replaced while streams run: no record is lost, and every life of a stream is one version's."""

import weakref
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dialogue import Caller, Desk, Reply, Served, chunk, closing, opening, reset, state
from recurd import contract as contracts
from recurd.config import Config, Durability, Limits, Tick
from recurd.layout import Layout
from recurd.model import Model
from recurd.saving import SavedStream
from recurd.signature import Signature
from recurd.wire import Flag, Operation, Type
from recurrent import Array, Network, States

OLD = Network(learned=True, counter=True)
NEW = Network(learned=True, counter=True, seed=8)
WIDE = Network(learned=True, counter=True, features=4, outputs=1, seed=9)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("versions")
    files = {name: network.save(folder / f"{name}.onnx") for name, network in (("old", OLD), ("new", NEW))}
    files["wide"] = WIDE.save(folder / "wide.onnx")
    files["twice"] = save_twice(folder / "twice.onnx")
    return files


def save_twice(path: Path) -> Path:
    """The old weights and states, and a graph whose results are twice as large."""
    model = OLD.model()
    (last,) = [node for node in model.graph.node if "output" in node.output]
    last.output[0] = "once"
    model.graph.node.append(onnx.helper.make_node("Add", ["once", "once"], ["output"]))
    contracts.attach(model, msgspec.structs.replace(OLD.contract(model), version="2"))
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def models(files: dict[str, Path]) -> dict[str, Model]:
    loaded = {name: Model.load(path, slots=8, threads=1) for name, path in files.items()}
    # Two of each, so that a version may follow itself.
    return loaded | {f"{name} again": Model.load(path, slots=8, threads=1) for name, path in files.items()}


def open_desk(models: dict[str, Model], *, slots: int = 8, **config: Any) -> Desk:
    return Desk({"pump": models["old"]}, Config(**config), slots=slots)


def draw(seed: int, steps: int = 5, network: Network = OLD) -> Array:
    return network.draw(steps, np.random.default_rng(seed))


def truth(network: Network, *parts: Array) -> Array:
    return network.run(np.concatenate(parts))[0]["output"]


def replace(desk: Desk, model: Model, incompatible: str = "finish", slots: int = 8) -> dict[str, int]:
    takeover = desk.engine.replace_model("pump", Served(model, slots), incompatible)  # type: ignore[arg-type]
    counts = msgspec.structs.asdict(takeover)
    assert counts.pop("is_new_version") == (counts["kept"] == 0)
    return {key: count for key, count in counts.items() if count}


def welcomes(replies: list[Reply]) -> list[Reply]:
    return [reply for reply in replies if reply.type == Type.WELCOME]


def answers(caller: Caller) -> list[Reply]:
    """All that came but what nobody asked for."""
    return [reply for reply in caller.take() if reply.type not in (Type.WELCOME, Type.OPENED) or reply.header.seq]


# --- the states can be gone on with ---


def test_streams_keep_their_state_when_the_new_file_can_go_on_with_it(models: dict[str, Model]) -> None:
    desk = open_desk(models)
    caller = desk.connect()
    handle = caller.handle("s")
    caller.run(chunk(handle, 1, draw(1)))

    assert replace(desk, models["twice"]) == {"kept": 1}

    (_, after) = caller.run(chunk(handle, 2, draw(2)))
    np.testing.assert_allclose(after.output, 2 * truth(OLD, draw(1), draw(2))[5:], **CLOSE)
    assert not after.flags


def test_queue_numbers_slices_and_retained_answers_stay(models: dict[str, Model]) -> None:
    desk = open_desk(models, tick=Tick(steps=4))
    caller = desk.connect()
    handle = caller.handle("s")
    (first,) = caller.run(chunk(handle, 1, draw(1)))
    caller.send(chunk(handle, 2, draw(2, 10)), reset(handle, 3), chunk(handle, 4, draw(3), generation=2))
    desk.tick()  # four of the ten steps

    assert replace(desk, models["old again"]) == {"kept": 1}
    assert desk.stats.models["pump"].queued_chunks == 3
    caller.send(chunk(handle, 1, draw(1)))  # again
    desk.run()
    again, *rest = answers(caller)

    assert (again.payload, again.flags) == (first.payload, Flag.DUPLICATE | Flag.FRESH)
    assert [(reply.type, reply.header.seq, reply.header.generation) for reply in rest] == [
        (Type.RESULT, 2, 1),
        (Type.DONE, 3, 2),
        (Type.RESULT, 4, 2),
    ]
    np.testing.assert_allclose(rest[0].output, truth(OLD, draw(1), draw(2, 10))[5:], **CLOSE)
    np.testing.assert_allclose(rest[2].output, truth(OLD, draw(3)), **CLOSE)


STREAMS = 5
#: What happens to a stream: so many steps are pushed (0: a reset, -1: the file is replaced), and whether the daemon
#: works before the next.
EVENTS = st.lists(st.tuples(st.integers(0, STREAMS - 1), st.integers(-1, 9), st.booleans()), min_size=1, max_size=60)


class Run:
    """Streams that push and reset, and a file that is replaced again and again by those of ``files`` in turn."""

    def __init__(self, desk: Desk, files: list[Model], incompatible: str, slots: int) -> None:
        self.desk, self.caller = desk, desk.connect()
        self.files, self.incompatible, self.slots = files, incompatible, slots
        self.handles = [self.caller.handle(f"s{index}") for index in range(STREAMS)]
        self.sent: list[list[list[Array]]] = [[[]] for _ in self.handles]
        self.seqs = [0] * STREAMS

    def event(self, number: int, index: int, count: int, works: bool) -> None:
        if count < 0:
            model = self.files[0]
            self.files.append(self.files.pop(0))
            replace(self.desk, model, self.incompatible, self.slots)
        else:
            self.push(number, index, count)
        if works:
            self.desk.tick()

    def push(self, number: int, index: int, count: int) -> None:
        self.seqs[index] += 1
        lives = self.sent[index]
        fields = {"generation": len(lives), "ack": max(0, self.seqs[index] - 60)}
        if count:
            x = draw(number, count)
            lives[-1].append(x)
            self.caller.send(chunk(self.handles[index], self.seqs[index], x, **fields))
        else:
            lives.append([])
            self.caller.send(reset(self.handles[index], self.seqs[index], **fields))

    def lives(self) -> list[tuple[Array, Array]]:
        """What was sent in every life of a stream, and what came."""
        self.desk.run()
        results: dict[tuple[int, int], list[Array]] = {}
        seen = dict.fromkeys(self.handles, 0)
        for reply in answers(self.caller):
            assert not reply.code, reply
            header = reply.header
            assert header.seq == seen[header.handle] + 1
            seen[header.handle] = header.seq
            if reply.type == Type.RESULT:
                results.setdefault((header.handle, header.generation), []).append(reply.output)
        assert list(seen.values()) == self.seqs
        return [
            (np.concatenate(chunks), np.concatenate(results[handle, generation]))
            for handle, lives in zip(self.handles, self.sent, strict=True)
            for generation, chunks in enumerate(lives, 1)
            if chunks
        ]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS, slots=st.integers(1, 8), rows=st.integers(1, 4), steps=st.integers(1, 6))
def test_any_interleaving_with_files_of_equal_states_gives_what_one_pass_gives(
    models: dict[str, Model], events: list[tuple[int, int, bool]], slots: int, rows: int, steps: int
) -> None:
    desk = open_desk(models, slots=slots, tick=Tick(rows=rows, steps=steps))
    run = Run(desk, [models["old again"], models["old"]], "restart", slots)
    for number, event in enumerate(events):
        run.event(number, *event)

    for sent, came in run.lives():
        np.testing.assert_allclose(came, truth(OLD, sent), **CLOSE)
    assert desk.stats.models["pump"].slots == slots


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS, slots=st.integers(1, 8), rows=st.integers(1, 4), steps=st.integers(1, 6))
def test_any_interleaving_with_other_weights_runs_every_life_by_one_version(
    models: dict[str, Model], events: list[tuple[int, int, bool]], slots: int, rows: int, steps: int
) -> None:
    desk = open_desk(models, slots=slots, tick=Tick(rows=rows, steps=steps))
    # Each version once: a model's arenas belong to one lane.
    run = Run(desk, [models["new"], models["old again"], models["new again"]], "finish", slots)
    reloads = 0
    for number, (index, count, works) in enumerate(events):
        reloads += count < 0
        if count >= 0 or reloads <= 3:
            run.event(number, index, count, works)

    for sent, came in run.lives():
        by_old, by_new = truth(OLD, sent), truth(NEW, sent)
        assert np.allclose(came, by_old, **CLOSE) or np.allclose(came, by_new, **CLOSE)
    stats = desk.stats.models["pump"]
    assert stats.queued_chunks == 0
    assert stats.slots == slots * len(desk.engine._turns)
    assert stats.slots_used == sum(len(lane.slots) for lane in desk.engine._turns)


# --- they cannot: finish ---


def test_streams_finish_on_the_former_version_and_new_ones_get_the_new_one(models: dict[str, Model]) -> None:
    desk = open_desk(models)
    caller = desk.connect()
    old = caller.handle("old")
    caller.run(chunk(old, 1, draw(1)))
    caller.send(chunk(old, 2, draw(2)))  # queued when the file is replaced

    assert replace(desk, models["new"]) == {"finishing": 1}
    caller.send(opening("new", seq=1), chunk(old, 3, draw(3)))
    (opened,) = answers(caller)
    new = opened.header.handle
    caller.send(chunk(new, 1, draw(1)))
    desk.run()

    results = {(reply.header.handle, reply.header.seq): reply.output for reply in answers(caller)}
    whole = truth(OLD, draw(1), draw(2), draw(3))
    np.testing.assert_allclose(np.concatenate([results[old, 2], results[old, 3]]), whole[5:], **CLOSE)
    np.testing.assert_allclose(results[new, 1], truth(NEW, draw(1)), **CLOSE)


def test_a_former_version_and_its_memory_go_with_its_last_stream(models: dict[str, Model]) -> None:
    former = Served(models["old"], 4)
    desk = open_desk(models)
    desk.engine.remove_model("pump")
    desk.run()
    desk.engine.add_model("pump", former)
    caller, gone = desk.connect(), weakref.ref(former)
    first, second = caller.handle("a"), caller.handle("b")
    caller.run(chunk(first, 1, draw(1)), chunk(second, 1, draw(1)))
    del former

    replace(desk, models["new"], slots=8)
    stats = desk.stats.models["pump"]
    assert (stats.slots, stats.slots_used, desk.stats.state_bytes) == (12, 2, 12 * models["old"].row_bytes)
    caller.run(closing(first))
    assert gone() is not None
    caller.run(closing(second))

    assert gone() is None  # by counting: the collector of garbage does not look at what a daemon has
    assert (stats.slots, stats.slots_used, desk.stats.state_bytes) == (8, 0, 8 * models["old"].row_bytes)
    assert [event["event"] for event in desk.events].count("version_dropped") == 2


def test_a_reset_takes_a_stream_over_to_the_new_version(models: dict[str, Model]) -> None:
    desk = open_desk(models)
    caller = desk.connect()
    handle = caller.handle("s")
    caller.run(chunk(handle, 1, draw(1)))
    caller.send(chunk(handle, 2, draw(2)), reset(handle, 3), chunk(handle, 4, draw(4), generation=2))

    replace(desk, models["new"])
    desk.run()
    two, _, four = answers(caller)

    np.testing.assert_allclose(two.output, truth(OLD, draw(1), draw(2))[5:], **CLOSE)
    np.testing.assert_allclose(four.output, truth(NEW, draw(4)), **CLOSE)
    desk.run()
    assert len(desk.engine._turns) == 1


def test_a_reset_stays_on_the_former_version_when_the_new_one_takes_something_else(models: dict[str, Model]) -> None:
    desk = open_desk(models)
    caller = desk.connect()
    handle = caller.handle("s")
    caller.run(chunk(handle, 1, draw(1)))

    replace(desk, models["wide"])
    caller.run(reset(handle, 2))
    (three,) = caller.run(chunk(handle, 3, draw(3), generation=2))

    np.testing.assert_allclose(three.output, truth(OLD, draw(3)), **CLOSE)


def test_a_stream_that_is_opened_new_gets_the_new_version(models: dict[str, Model]) -> None:
    desk = open_desk(models)
    caller = desk.connect()
    caller.run(chunk(caller.handle("s"), 1, draw(1)))
    replace(desk, models["wide"])
    caller.take()

    opened = caller.open("s", mode="new")
    x = draw(1, network=WIDE)
    (answer,) = caller.run(chunk(opened.header.handle, 1, x, generation=2))

    assert (opened.body["generation"], "contract" in opened.body) == (2, False)
    np.testing.assert_allclose(answer.output, truth(WIDE, x), **CLOSE)
    desk.run()
    assert len(desk.engine._turns) == 1


def test_everybody_is_told_the_new_contract_and_a_stream_of_a_former_version_its_own(models: dict[str, Model]) -> None:
    desk = open_desk(models)
    caller, stranger = desk.connect(), desk.connect("b", greet=False)
    handle = caller.handle("s")
    replace(desk, models["wide"])

    (told,) = caller.take()
    assert (told.type, told.header.seq) == (Type.WELCOME, 0)
    assert Signature(told.body["models"]["pump"]).width == 4
    assert stranger.take() == []
    other = desk.connect("c")
    opened = other.open("s", mode="resume")
    assert opened.header.handle == handle
    assert Signature(opened.body["contract"]).width == 3
    (answer,) = other.run(chunk(handle, 1, draw(1)))
    np.testing.assert_allclose(answer.output, truth(OLD, draw(1)), **CLOSE)


def test_three_versions_run_beside_each_other(models: dict[str, Model]) -> None:
    desk = open_desk(models)
    caller = desk.connect()
    handles = [caller.handle("old")]
    for name in ("new", "wide"):
        caller.run(*[chunk(handle, 1, draw(1)) for handle in handles])
        replace(desk, models[name])
        caller.take()
        handles.append(caller.handle(name))
    caller.send(chunk(handles[2], 1, draw(1, network=WIDE)))
    caller.send(*[chunk(handle, 2, draw(2)) for handle in handles[:2]])
    caller.send(chunk(handles[1], 1, draw(1)), chunk(handles[1], 2, draw(2)))
    desk.run()

    results = {(reply.header.handle, reply.header.seq): reply.output for reply in answers(caller) if not reply.code}
    np.testing.assert_allclose(results[handles[0], 2], truth(OLD, draw(1), draw(2))[5:], **CLOSE)
    np.testing.assert_allclose(results[handles[1], 2], truth(NEW, draw(1), draw(2))[5:], **CLOSE)
    np.testing.assert_allclose(results[handles[2], 1], truth(WIDE, draw(1, network=WIDE)), **CLOSE)


# --- they cannot: restart ---


def test_streams_end_after_what_they_have_accepted_is_answered(models: dict[str, Model]) -> None:
    desk = open_desk(models, tick=Tick(steps=4))
    caller = desk.connect()
    busy, idle = caller.handle("busy"), caller.handle("idle")
    caller.run(chunk(busy, 1, draw(1)), chunk(idle, 1, draw(1)))
    caller.send(chunk(busy, 2, draw(2, 10)))
    desk.tick()

    assert replace(desk, models["new"], "restart") == {"ending": 2}
    caller.send(chunk(busy, 3, draw(3)), chunk(idle, 2, draw(2)))
    told, *refused = caller.take()
    assert told.type == Type.WELCOME
    assert [(reply.code, reply.header.seq) for reply in refused] == [("busy", 3), ("busy", 2)]
    (two,) = caller.run()
    np.testing.assert_allclose(two.output, truth(OLD, draw(1), draw(2, 10))[5:], **CLOSE)

    ends = [caller.ask(chunk(busy, 3, draw(3))), caller.ask(chunk(idle, 2, draw(2)))]
    assert [(reply.code, reply.body["last_seq"]) for reply in ends] == [("reloaded", 2), ("reloaded", 1)]
    assert caller.open("busy", mode="resume").code == "reloaded"
    opened = caller.open("busy")
    assert (opened.body["generation"], opened.body["fresh"]) == (2, True)
    (fresh,) = caller.run(chunk(opened.header.handle, 1, draw(1), generation=2))
    np.testing.assert_allclose(fresh.output, truth(NEW, draw(1)), **CLOSE)
    assert desk.stats.streams_ended["reloaded"] == 2
    desk.run()
    assert len(desk.engine._turns) == 1


def test_a_stream_that_has_no_state_to_lose_goes_over(models: dict[str, Model]) -> None:
    """One that has taken no step yet, and one with a reset behind all that it was."""
    desk = open_desk(models)
    caller = desk.connect()
    untouched, was_reset = caller.handle("untouched"), caller.handle("reset")
    caller.run(chunk(was_reset, 1, draw(1)))
    caller.send(chunk(was_reset, 2, draw(2)), reset(was_reset, 3), chunk(was_reset, 4, draw(4), generation=2))

    replace(desk, models["new"], "restart")
    desk.run()
    caller.send(chunk(untouched, 1, draw(1)))
    desk.run()

    results = {(reply.header.handle, reply.header.seq): reply for reply in answers(caller)}
    assert [reply.code for reply in results.values() if reply.code] == []
    np.testing.assert_allclose(results[was_reset, 4].output, truth(NEW, draw(4)), **CLOSE)
    np.testing.assert_allclose(results[untouched, 1].output, truth(NEW, draw(1)), **CLOSE)


def test_a_stream_that_has_no_state_to_lose_goes_over_when_its_first_chunk_is_late_too(
    models: dict[str, Model],
) -> None:
    desk = open_desk(models)
    caller = desk.connect()
    handle = caller.handle("s")
    caller.send(chunk(handle, 1, draw(1), code=1))
    desk.now += 1
    replace(desk, models["new"], "restart")
    desk.run()
    assert [reply.code for reply in answers(caller)] == ["late"]

    (result,) = caller.run(chunk(handle, 1, draw(2)))
    np.testing.assert_allclose(result.output, truth(NEW, draw(2)), **CLOSE)


def test_thousands_of_streams_end_piece_by_piece(models: dict[str, Model]) -> None:
    desk = open_desk(models, limits=Limits(streams=2000))
    caller = desk.connect()
    handles = [caller.handle(f"s{number}") for number in range(700)]
    for start in range(0, 700, 50):
        caller.run(*[chunk(handle, 1, draw(1, 1)) for handle in handles[start : start + 50]])

    replace(desk, models["new"], "restart")
    left = []
    while desk.engine.deadline() == 0.0:
        desk.engine.take_tick(desk.now)
        left.append(len(desk.engine._streams))

    assert left[-1] == 0
    assert max(np.diff([700, *left])) <= 0
    assert len([count for count in left if count]) >= 2
    assert [event["level"] for event in desk.events if event["event"] == "stream_ended"] == ["debug"] * 700


def test_a_stream_that_is_being_closed_is_closed(models: dict[str, Model]) -> None:
    desk = open_desk(models)
    caller = desk.connect()
    handle = caller.handle("s")
    caller.send(chunk(handle, 1, draw(1)), closing(handle, seq=9))

    replace(desk, models["new"], "restart")
    desk.run()

    assert [reply.type for reply in answers(caller)] == [Type.RESULT, Type.CLOSED]


# --- models come and go ---


def test_a_model_that_is_served_no_more_keeps_its_streams_until_they_end(models: dict[str, Model]) -> None:
    desk = open_desk(models)
    caller = desk.connect()
    handle = caller.handle("s")
    desk.engine.add_model("wide", Served(models["wide"], 8))
    desk.engine.remove_model("pump")

    assert [list(reply.body["models"]) for reply in caller.take()] == [["pump", "wide"], ["wide"]]
    assert caller.open("t").code == "unknown_model"
    assert "contract" in caller.open("s", mode="resume").body
    (answer,) = caller.run(chunk(handle, 1, draw(1)))
    np.testing.assert_allclose(answer.output, truth(OLD, draw(1)), **CLOSE)
    caller.run(closing(handle))
    assert caller.open("s").code == "unknown_model"
    assert caller.open("s", "wide").type == Type.OPENED


# --- whole states ---


def drawn_states(seed: int) -> States:
    random = np.random.default_rng(seed)
    states = {name: random.uniform(-1, 1, value.shape).astype(value.dtype) for name, value in OLD.initial().items()}
    return states | {"count": random.integers(0, 99, 1)}


def packed(model: Model, seed: int) -> bytes:
    layout = Layout(model.contract.state_hash, model.contract.states)
    return layout.pack(layout.join(drawn_states(seed)))


def test_a_stream_that_waits_for_a_state_of_the_former_version_stays_there(models: dict[str, Model]) -> None:
    """It was taken before the file was replaced; the reset in front of it would move the stream."""
    desk = open_desk(models)
    caller = desk.connect()
    handle = caller.handle("s")
    caller.send(chunk(handle, 1, draw(1)), reset(handle, 2))
    caller.send(state(handle, 3, Operation.PUT, packed(models["old"], 1), generation=2))
    replace(desk, models["new"])
    caller.send(chunk(handle, 4, draw(2), generation=2))
    desk.run()
    first, done, put, second = answers(caller)
    mismatch = caller.ask(state(handle, 5, Operation.PUT, packed(models["new"], 1), generation=2))
    caller.run(reset(handle, 5, generation=2))
    taken = caller.ask(state(handle, 6, Operation.PUT, packed(models["new"], 1), generation=3))

    assert [reply.type for reply in (first, done, put)] == [Type.RESULT, Type.DONE, Type.STATE_OF]
    np.testing.assert_allclose(second.output, OLD.run(draw(2), drawn_states(1))[0]["output"], **CLOSE)
    assert (mismatch.code, taken.type) == ("state_mismatch", Type.STATE_OF)


def test_who_uses_a_stream_is_told_before_the_answer_that_it_goes_by_another_version(models: dict[str, Model]) -> None:
    desk = open_desk(models)
    caller = desk.connect()
    handle = caller.handle("s")
    caller.run(chunk(handle, 1, draw(1)))
    replace(desk, models["new"])
    caller.take()
    caller.send(chunk(handle, 2, draw(1)), reset(handle, 3), chunk(handle, 4, draw(1), generation=2))
    desk.run()
    result, told, done, _ = caller.take()

    assert [reply.type for reply in (result, told, done)] == [Type.RESULT, Type.OPENED, Type.DONE]
    assert (told.header.seq, told.header.handle, told.header.generation) == (0, handle, 2)
    assert (told.body["stream"], told.body["model"], "contract" in told.body) == ("s", "pump", False)
    caller.send(reset(handle, 5, generation=2))
    assert [reply.type for reply in caller.take()] == [Type.DONE]  # it stays where it is


def test_a_stream_that_waits_for_nothing_and_goes_over_is_told_to_who_uses_it(models: dict[str, Model]) -> None:
    desk = open_desk(models)
    caller, gone = desk.connect(), desk.connect("gone")
    handle = caller.handle("s")
    gone.handle("t")
    desk.engine.disconnected(gone.routing_id)
    replace(desk, models["new"], "restart")
    desk.run()

    assert [(reply.type, reply.header.seq) for reply in caller.take()] == [(Type.WELCOME, 0), (Type.OPENED, 0)]
    assert not gone.take()
    assert caller.ask(state(handle, 1, Operation.PUT, packed(models["new"], 1))).type == Type.STATE_OF


def test_a_durable_stream_that_goes_over_unused_is_saved_with_its_new_version(
    models: dict[str, Model], tmp_path: Path
) -> None:
    desk = open_desk(models, durability=Durability(mode="process", directory=str(tmp_path)))
    desk.connect().handle("s")
    desk.engine.saved()
    replace(desk, models["new"], "restart")
    desk.run()

    saving = desk.engine.to_save()
    assert saving is not None
    assert [SavedStream.of(stream, None).version for stream in saving.streams] == [models["new"].stamp.version]


@pytest.mark.parametrize("incompatible", ["finish", "restart"])
def test_a_clone_lives_and_ends_with_the_version_of_its_source(models: dict[str, Model], incompatible: str) -> None:
    desk = open_desk(models)
    caller = desk.connect()
    handle = caller.handle("s")
    caller.send(chunk(handle, 1, draw(1, 3)), state(handle, 2, Operation.CLONE, b"t"))
    replace(desk, models["new"], incompatible)
    desk.run()
    told = [reply.code for reply in answers(caller)]
    opened = caller.open("t", mode="resume")

    if incompatible == "restart":
        assert (told, opened.code) == (["", ""], "reloaded")
        assert not desk.engine._versions.former
        return
    (result,) = caller.run(chunk(opened.header.handle, 1, draw(2)))
    assert opened.body["contract"]["state_hash"] == models["old"].contract.state_hash
    np.testing.assert_allclose(result.output, truth(OLD, draw(1, 3), draw(2))[3:], **CLOSE)
    for name in (handle, opened.header.handle):
        caller.run(closing(name))
    desk.run()
    assert not desk.engine._versions.former


def test_a_stream_goes_over_with_what_it_has_queued_and_the_clones_it_will_have(models: dict[str, Model]) -> None:
    desk = open_desk(models)
    caller = desk.connect()
    handle = caller.handle("s")
    caller.send(chunk(handle, 1, draw(1)), reset(handle, 2), state(handle, 3, Operation.CLONE, b"t", generation=2))
    caller.send(chunk(handle, 4, draw(2), generation=2))
    replace(desk, models["new"])
    desk.run()
    *_, result = answers(caller)
    desk.tick()

    np.testing.assert_allclose(result.output, truth(NEW, draw(2)), **CLOSE)
    assert not desk.engine._versions.former
    assert desk.engine._lanes["pump"].streams == 2
    assert desk.engine._room.due == 0


def test_a_device_that_cannot_take_the_states_changes_nothing(models: dict[str, Model]) -> None:
    desk = open_desk(models)
    caller = desk.connect()
    handle = caller.handle("s")
    caller.run(chunk(handle, 1, draw(1)))
    broken = Served(models["twice"], 8)

    def fail(*arguments: Any) -> None:
        raise MemoryError("no room")

    broken.write_rows = fail  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        desk.engine.replace_model("pump", broken)

    (after,) = caller.run(chunk(handle, 2, draw(2)))
    np.testing.assert_allclose(after.output, truth(OLD, draw(1), draw(2))[5:], **CLOSE)
