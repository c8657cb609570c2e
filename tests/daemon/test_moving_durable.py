"""Moving streams where they are durable: what a daemon that is killed in the middle knows when it is up again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog

from dialogue import Desk, admin, chunk, closing, opening
from moving import Operator
from recurd.config import Config, override
from recurd.durable import Durable
from recurd.model import Model
from recurd.wire import Flag, Type
from recurrent import Network

PUMP = Network(layers=1, learned=True, counter=True)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
A, B = "tcp://127.0.0.1:7070", "tcp://127.0.0.1:7071"


class Daemon(Desk):
    """A desk whose streams are durable: what callers take was committed before."""

    def __init__(self, folder: Path, model: Model, **limits: int) -> None:
        durability = {"mode": "process", "directory": str(folder / "journal")}
        config = override(Config(), {"durability": durability, "limits": limits})
        super().__init__({"pump": model}, config, epoch=folder.name.encode()[-8:].rjust(8))
        self.durable = Durable(config, self.engine, self.models, stats=self.stats, log=structlog.get_logger())
        self.durable.restore(self.now)

    def sort(self) -> None:
        self.durable.commit(self.now)
        for routing_id, frame in self.durable.due():
            self._deliver(routing_id, frame)

    def __enter__(self) -> "Daemon":
        return self

    def __exit__(self, *_: object) -> None:
        self.durable.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    path = PUMP.save(tmp_path_factory.mktemp("models") / "pump.onnx")
    return [Model.load(path, slots=4, threads=1) for _ in range(2)]


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    return tmp_path / "here", tmp_path / "there"


def draw(seed: int, steps: int = 5) -> np.ndarray[Any, Any]:
    return PUMP.draw(steps, np.random.default_rng(seed))


def test_what_has_arrived_is_still_closed_after_a_restart_and_then_handed_over(
    models: list[Model], folders: tuple[Path, Path]
) -> None:
    with Daemon(folders[0], models[0]) as here:
        caller, source = here.connect("c"), Operator(here)
        handle = caller.handle("s")
        caller.run(chunk(handle, 1, draw(1)))
        lost = caller.run(chunk(handle, 2, draw(2), ack=1))
        stamps = source.ask("gather", group="g", fence=True)["stamps"]
        data = source.export("g")
        with Daemon(folders[1], models[1]) as there:
            Operator(there).ask("import", data, group="g", stamps=stamps)
        source.ask("release", group="g", endpoint=B)

    with Daemon(folders[1], models[1]) as there:
        assert there.connect("c").open("s").code == "busy"
        assert Operator(there).ask("groups")["held"] == {"g": {"streams": 1, "tenant": "local", "stream": "s"}}
        Operator(there).ask("admit", group="g")
    with Daemon(folders[1], models[1]) as there:
        follower = there.connect("c")
        assert follower.open("s", mode="resume", generation=1).header.handle == handle
        again = follower.ask(chunk(handle, 2, draw(2)))
        assert (again.payload, bool(again.flags & Flag.DUPLICATE)) == (lost[0].payload, True)
        (last,) = follower.run(chunk(handle, 3, draw(3), ack=2))
        whole = PUMP.run(np.concatenate([draw(seed) for seed in (1, 2, 3)]))[0]["output"]
        np.testing.assert_allclose(last.output, whole[10:], **CLOSE)
        assert there.stats.models["pump"].host_bytes == 0

    with Daemon(folders[0], models[0]) as here:  # which knows who has the stream
        moved = here.connect("c").open("s")
        assert (moved.code, moved.body["endpoint"], moved.body["group"]) == ("moved", B, "g")


def test_where_a_stream_has_gone_is_known_after_a_restart_however_many_have_ended_since(
    models: list[Model], folders: tuple[Path, Path]
) -> None:
    few = {"ended_streams": 2, "streams": 3}
    with Daemon(folders[0], models[0], **few) as here, Daemon(folders[1], models[1]) as there:
        caller = here.connect("c")
        caller.run(chunk(caller.handle("s"), 1, draw(1)))
        stamps = Operator(here).ask("gather", group="g", fence=True)["stamps"]
        Operator(there).ask("import", Operator(here).export("g"), group="g", stamps=stamps)
        Operator(here).ask("release", group="g", endpoint=B)
        other = here.connect("other")
        for number in range(20):
            other.ask(closing(other.handle(f"closed {number}")))
    with Daemon(folders[0], models[0], **few) as here:
        caller = here.connect("c")
        assert caller.open("s").code == "moved"
        codes = [caller.open(f"closed {number}", mode="resume").code for number in (17, 18, 19)]
        assert codes == ["unknown_stream", "closed", "closed"]


def test_a_drained_daemon_is_drained_after_a_restart_until_that_is_taken_back(
    models: list[Model], folders: tuple[Path, Path]
) -> None:
    with Daemon(folders[0], models[0]) as here:
        caller = here.connect("c")
        caller.ask(closing(caller.handle("s")))
        Operator(here).ask("redirect", endpoint=B, server_key="k")
        assert here.engine.full
    with Daemon(folders[0], models[0]) as here:
        told = here.connect("c").open("new")  # the other daemon may have had it since
        assert (told.code, told.body["endpoint"], told.body["server_key"]) == ("moved", B, "k")
        assert here.engine.full
        Operator(here).ask("redirect")
        assert here.connect("d").open("new").type == Type.OPENED
    with Daemon(folders[0], models[0]) as here:
        assert not here.engine.full
        assert here.connect("c").open("other").type == Type.OPENED


def test_what_is_expected_is_expected_after_a_restart_until_it_has_come_or_never_will(
    models: list[Model], folders: tuple[Path, Path]
) -> None:
    def expected() -> bool:
        """A restart, and whether it still is."""
        with Daemon(folders[1], models[1]) as daemon:
            return daemon.connect().ask(opening("s", mode="resume")).code == "busy"

    assert not expected()
    for ends in (
        {"command": "drained", "endpoint": A},
        {"command": "expect"},
        {"command": "redirect", "endpoint": A, "origin": "a"},
    ):
        with Daemon(folders[1], models[1]) as there:
            Operator(there).ask("expect", endpoint=A, origin="a")
        assert expected()
        with Daemon(folders[1], models[1]) as there:
            Operator(there).ask("drained", endpoint=B)
        assert expected()
        with Daemon(folders[1], models[1]) as there:
            Operator(there).ask(**ends)
        assert not expected()


def test_a_stream_that_comes_back_is_not_taken_for_the_one_that_left(
    models: list[Model], folders: tuple[Path, Path]
) -> None:
    with Daemon(folders[0], models[0]) as here, Daemon(folders[1], models[1]) as there:
        caller = here.connect("c")
        handle = caller.handle("s")
        caller.run(chunk(handle, 1, draw(1)))
        for group, source, target in (("out", here, there), ("back", there, here)):
            stamps = Operator(source).ask("gather", group=group, fence=True)["stamps"]
            Operator(target).ask("import", Operator(source).export(group), group=group, stamps=stamps)
            Operator(source).ask("release", group=group, endpoint=B)
            Operator(target).ask("admit", group=group)
    with Daemon(folders[0], models[0]) as here:
        caller = here.connect("c")
        assert caller.open("s", mode="resume", generation=1).header.handle == handle
        (last,) = caller.run(chunk(handle, 2, draw(2), ack=1))
        np.testing.assert_allclose(last.output, PUMP.run(np.concatenate([draw(1), draw(2)]))[0]["output"][5:], **CLOSE)
    with Daemon(folders[1], models[1]) as there:
        assert there.connect("c").open("s", mode="resume").code == "moved"


def test_what_left_and_was_closed_there_may_begin_here_when_all_has_come_back(
    models: list[Model], folders: tuple[Path, Path]
) -> None:
    with Daemon(folders[0], models[0]) as here, Daemon(folders[1], models[1]) as there:
        caller, follower = here.connect("c"), there.connect("c")
        for name in ("closed", "stays"):
            caller.handle(name)
        for group, source, target, to in (("out", here, there, B), ("back", there, here, A)):
            stamps = Operator(source).ask("gather", group=group, fence=True)["stamps"]
            Operator(target).ask("import", Operator(source).export(group), group=group, stamps=stamps)
            Operator(source).ask("release", group=group, endpoint=to)
            Operator(target).ask("admit", group=group)
            if target is there:
                follower.ask(closing(follower.handle("closed")))
        assert here.connect("late").open("closed").code == "moved"
        Operator(here).ask("drained", endpoint="tcp://other:1")
        assert here.connect("late").open("closed").code == "moved"  # it went to another daemon than that
        Operator(here).ask("drained", endpoint=B)
    with Daemon(folders[0], models[0]) as here:
        caller = here.connect("c")
        assert caller.open("stays", mode="resume").type == Type.OPENED
        assert caller.open("closed", mode="resume").code == "unknown_stream"
        assert caller.open("closed").type == Type.OPENED


def test_a_second_try_puts_the_journal_to_where_the_stream_is_now(
    models: list[Model], folders: tuple[Path, Path]
) -> None:
    with Daemon(folders[0], models[0]) as here, Daemon(folders[1], models[1]) as there:
        caller = here.connect("c")
        handle = caller.handle("s")
        for group, seqs, ack in (("first", (1, 2, 3), 0), ("second", (4, 5), 2)):
            for seq in seqs:
                caller.run(chunk(handle, seq, draw(seq), ack=ack))
            stamps = Operator(here).ask("gather", group=group, fence=True)["stamps"]
            Operator(there).ask("import", Operator(here).export(group), group=group, stamps=stamps)
            if group == "first":
                Operator(here).ask("lift", group=group)
        Operator(here).ask("release", group="second", endpoint=B)
    with Daemon(folders[1], models[1]) as there:
        assert list(Operator(there).ask("groups")["held"]) == ["second"]
        Operator(there).ask("admit", group="second")
        ((_, saved, answers),) = there.durable._journal.load()
        assert (saved.acked, [seq for seq, *_ in answers]) == (2, [3, 4, 5])
        follower = there.connect("c")
        assert follower.open("s", mode="resume", generation=1).body["last_seq"] == 5
        (last,) = follower.run(chunk(handle, 6, draw(6), ack=5))
        whole = PUMP.run(np.concatenate([draw(seed) for seed in range(1, 7)]))[0]["output"]
        np.testing.assert_allclose(last.output, whole[25:], **CLOSE)


@pytest.mark.parametrize("how", ["admitted", "asked for"])
def test_a_stream_that_is_handed_over_and_run_at_once_stands_in_the_journal_as_it_came(
    models: list[Model], folders: tuple[Path, Path], how: str
) -> None:
    with Daemon(folders[0], models[0]) as here:
        caller, source = here.connect("c"), Operator(here)
        handle = caller.handle("s")
        caller.run(chunk(handle, 1, draw(1)))
        stamps = source.ask("gather", group="g", fence=True)["stamps"]
        data = source.export("g")
        source.ask("release", group="g", endpoint=B)
    with Daemon(folders[1], models[1]) as there:
        Operator(there).ask("import", data, group="g", stamps=stamps)
        operator, follower = there.connect("o"), there.connect("c")
        if how == "admitted":
            operator.send(admin("admit", group="g"))
        # All in one round, and more steps than a tick has: it is saved in the middle of the chunk.
        follower.send(opening("s", group="g"), chunk(handle, 2, draw(2, 200), ack=1))
        assert there.tick() is not None
        assert [reply.type for reply in follower.take()] == [Type.OPENED]

    with Daemon(folders[1], models[1]) as there:
        follower = there.connect("c")
        follower.open("s", mode="resume", generation=1)
        (result,) = follower.run(chunk(handle, 2, draw(2)))
        whole = PUMP.run(np.concatenate([draw(1), draw(2)]))[0]["output"]
        np.testing.assert_allclose(result.output, whole[5:], **CLOSE)


def test_what_is_dropped_is_not_in_the_journal(models: list[Model], folders: tuple[Path, Path]) -> None:
    with Daemon(folders[0], models[0]) as here, Daemon(folders[1], models[1]) as there:
        caller = here.connect("c")
        caller.run(chunk(caller.handle("s"), 1, draw(1)))
        stamps = Operator(here).ask("gather", group="g", fence=True)["stamps"]
        Operator(there).ask("import", Operator(here).export("g"), group="g", stamps=stamps)
        Operator(there).ask("drop", group="g")
    with Daemon(folders[1], models[1]) as there:
        assert there.connect("c").open("s", mode="resume").code == "unknown_stream"
        assert Operator(there).ask("groups")["held"] == {}
