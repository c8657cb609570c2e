"""Results for others than their sender: real daemons, real subscribers, and what each of them may have."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import zmq

import recurd
from dialogue import chunk
from house import House, reload
from process import Dealer, Process, eventually
from recurd.keys import new
from recurd.subscriber import Subscriber
from recurrent import Network

PUMP = Network()
PUBLISH = '[publish]\nbind = ["tcp://127.0.0.1:*"]\n'


@pytest.fixture(scope="module")
def pump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return PUMP.save(tmp_path_factory.mktemp("models") / "pump.onnx", proof=True)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, pump: Path) -> Iterator[Process]:
    """One without keys, for the tests that do not harm it."""
    folder = tmp_path_factory.mktemp("open")
    (folder / "recurd.toml").write_text(PUBLISH)
    flags = ["--bind", "tcp://127.0.0.1:*", "--metrics", "127.0.0.1:0", "--config", folder / "recurd.toml"]
    with Process(folder, pump, *flags) as daemon:
        yield daemon.ready()


@pytest.fixture
def house(tmp_path: Path, pump: Path) -> House:
    return House(tmp_path, pump)


def published_at(daemon: Process) -> str:
    return daemon.log.partition("publish=")[2].split()[0]


def draw(steps: int = 3, seed: int = 0) -> np.ndarray:
    return PUMP.draw(steps, np.random.default_rng(seed))


@contextmanager
def subscribed(daemon: Process, *topics: str, probe: recurd.Stream, **keys: str) -> Iterator[Subscriber]:
    """A subscriber, once the results of ``probe``, a stream it has subscribed to, arrive."""
    with recurd.subscribe(published_at(daemon), *topics, timeout_seconds=0.05, **keys) as subscriber:

        def arrives() -> bool:
            probe.push(draw(1))
            try:
                return bool(next(subscriber))
            except recurd.Unanswered:
                return False

        eventually(arrives)
        drain(subscriber)  # what came meanwhile
        subscriber._timeout = 10.0
        yield subscriber


def drain(subscriber: Subscriber) -> None:
    """Take what there is until nothing comes any more."""
    with suppress(recurd.Unanswered):
        while True:
            next(subscriber)


# --- what is published ---


def test_results_are_published_as_their_sender_gets_them(daemon: Process) -> None:
    with recurd.connect(daemon.endpoint) as client:
        probe, stream = client.open("hall/0"), client.open("hall/1")
        with subscribed(daemon, "local/pump/hall/*", probe=probe) as subscriber:
            output = stream.push(draw(4))
            publication = next(subscriber)

            assert (publication.tenant, publication.model, publication.stream) == ("local", "pump", "hall/1")
            assert (publication.seq, publication.generation, publication.fresh) == (1, 1, True)
            np.testing.assert_array_equal(publication.result(client.models["pump"]), output)
            np.testing.assert_array_equal(publication.values.reshape(4, 2), output)


def test_a_stream_whose_name_begins_likewise_is_not_subscribed_to(daemon: Process) -> None:
    with recurd.connect(daemon.endpoint) as client:
        one, other = client.open("pump-1"), client.open("pump-17")
        with subscribed(daemon, "local/pump/pump-1", probe=one) as subscriber:
            other.push(draw())
            one.push(draw())

            assert next(subscriber).stream == "pump-1"


def test_an_answer_that_is_sent_again_is_not_published_again(daemon: Process) -> None:
    with recurd.connect(daemon.endpoint) as client, Dealer(daemon.endpoint) as dealer:
        probe, handle = client.open("again-0"), dealer.handle("again-1")
        with subscribed(daemon, "local/pump/again-*", probe=probe) as subscriber:
            for seq in (1, 1, 1, 2, 2):
                dealer.ask(b"".join(chunk(handle, seq, draw())))

            assert [next(subscriber).seq for _ in range(2)] == [1, 2]
            probe.push(draw())
            assert next(subscriber).stream == "again-0"


def test_without_subscribers_nothing_is_put_out(pump: Path, tmp_path: Path) -> None:
    (tmp_path / "recurd.toml").write_text(PUBLISH)
    flags = ["--bind", "tcp://127.0.0.1:*", "--metrics", "127.0.0.1:0", "--config", tmp_path / "recurd.toml"]
    with Process(tmp_path, pump, *flags) as daemon, recurd.connect(daemon.ready().endpoint) as client:
        stream = client.open("s")
        stream.push(draw())
        assert daemon.metric("recurd_results_published_total") == 0
        with subscribed(daemon, "local/*", probe=stream):
            assert daemon.metric("recurd_results_published_total") > 0
        count = eventually(lambda: settled(daemon, stream))
        assert daemon.metric("recurd_results_published_total") == count


def settled(daemon: Process, stream: recurd.Stream) -> float:
    """How many results were published, once a push does not add to them."""
    before = daemon.metric("recurd_results_published_total")
    stream.push(draw())
    return before if daemon.metric("recurd_results_published_total") == before else 0


def test_who_does_not_read_delays_nobody(pump: Path, tmp_path: Path) -> None:
    (tmp_path / "recurd.toml").write_text(PUBLISH + "high_water_mark = 10\n")
    flags = ["--bind", "tcp://127.0.0.1:*", "--metrics", "", "--config", tmp_path / "recurd.toml"]
    with Process(tmp_path, pump, *flags) as daemon, recurd.connect(daemon.ready().endpoint) as client:
        stream, x = client.open("s"), np.tile(draw(), (300, 1))
        with subscribed(daemon, "local/*", probe=stream) as slow, zmq.Context() as context:
            slow._socket.setsockopt(zmq.RCVHWM, 10)
            with context.socket(zmq.SUB) as deaf:
                deaf.setsockopt(zmq.LINGER, 0)
                deaf.setsockopt(zmq.RCVHWM, 1)
                deaf.setsockopt(zmq.RCVBUF, 4096)
                deaf.subscribe("local/")
                deaf.connect(published_at(daemon))
                last = stream.last_seq
                for _ in range(2000):
                    stream.push(x)
                assert stream.last_seq == last + 2000


def test_the_command_prints_json_lines(daemon: Process) -> None:
    command = [sys.executable, "-m", "recurd", "subscribe", published_at(daemon), "local/pump/cli", "--count", "2"]
    with recurd.connect(daemon.endpoint) as client:
        stream = client.open("cli")
        with subprocess.Popen([*command, "--timeout", "20"], stdout=subprocess.PIPE) as process:
            eventually(lambda: stream.push(draw(2)) is None or process.poll() is not None)
            assert process.stdout is not None
            first, second = (json.loads(line) for line in process.stdout)

    assert second["seq"] == first["seq"] + 1
    assert (first["stream"], first["steps"], len(first["values"])) == ("cli", 2, 4)
    late = subprocess.run([*command, "--timeout", "0.1"], capture_output=True, text=True, timeout=60, check=False)
    assert (late.returncode, "nothing was published at" in late.stderr) == (69, True)


# --- who may have it ---


def test_a_tenant_has_its_own_results_and_those_it_is_given(house: House) -> None:
    house.add("ab")
    house.write(PUBLISH + '[tenants.b]\nsubscribe = ["a/pump/open-*", "a/pump/exact"]\n')
    with (
        house.serve() as daemon,
        recurd.connect(daemon.ready().endpoint, **house.keys("a")) as a,
        recurd.connect(daemon.endpoint, **house.keys("b")) as b,
        recurd.connect(daemon.endpoint, **house.keys("ab")) as ab,
    ):
        names = ("open-1", "exact", "exact-not", "secret")
        streams = [a.open(name) for name in names]
        probe = b.open("probe")
        wanted = ("b/*", "a/pump/open-*", "a/pump/exact", "a/pump/exact*", "a/pump/secret", "a/*", "a*", "*", "ab/*")
        with subscribed(daemon, *wanted, probe=probe, **house.keys("b")) as subscriber:
            assert daemon.metric("recurd_subscriptions_refused_total") == 6
            for stream in (*streams, ab.open("x"), probe):
                stream.push(draw())
            got = [next(subscriber) for _ in range(3)]

            assert [(one.tenant, one.stream) for one in got] == [("a", "open-1"), ("a", "exact"), ("b", "probe")]
        assert "subscription_refused" in daemon.log
        new("stranger", house.folder)
        subscribing = recurd.subscribe(published_at(daemon), "a/*", **house.keys("stranger"))
        with subscribing as subscriber, pytest.raises(recurd.Refused, match="does not know this client's key"):
            next(subscriber)
        subscribing = recurd.subscribe(published_at(daemon), "a/*", timeout_seconds=0.5)
        with subscribing as subscriber, pytest.raises(recurd.RecurdError, match=r"wants to know who|nothing was"):
            next(subscriber)


def test_rights_that_are_taken_away_end_subscriptions_and_others_come_back(house: House) -> None:
    house.write(PUBLISH + '[tenants.b]\nsubscribe = ["a/*"]\n')
    with (
        house.serve() as daemon,
        recurd.connect(daemon.ready().endpoint, **house.keys("a")) as client,
    ):
        stream = client.open("s")
        with (
            subscribed(daemon, "a/*", probe=stream, **house.keys("a")) as mine,
            subscribed(daemon, "a/*", probe=stream, **house.keys("b")) as theirs,
        ):
            house.write(PUBLISH)
            reload(daemon)
            mine._timeout = theirs._timeout = 0.05
            drain(theirs)  # what was on its way

            def comes_back() -> bool:
                stream.push(draw())
                try:
                    return next(mine).seq == stream.last_seq
                except recurd.Unanswered:
                    return False

            eventually(comes_back)
            with pytest.raises(recurd.Unanswered):
                next(theirs)
            eventually(lambda: daemon.metric("recurd_subscriptions_refused_total") == 1)

            (house.clients / "a.key").unlink()
            reload(daemon)
            mine._timeout = 10.0
            with pytest.raises(recurd.Refused, match="does not know this client's key"):
                drain(mine)


def test_a_thousand_subscriptions_that_are_refused_fill_neither_log_nor_memory(house: House) -> None:
    house.write(PUBLISH)
    with house.serve() as daemon, zmq.Context() as context:
        daemon.ready()
        with context.socket(zmq.SUB) as socket, recurd.connect(daemon.endpoint, **house.keys("a")) as client:
            socket.linger = 0
            for option, value in house.credentials("b").options().items():
                socket.setsockopt(option, value)
            socket.connect(published_at(daemon).split(",")[0])
            for number in range(1000):
                socket.subscribe(f"a/pump/s{number}" + "x" * 200)
            eventually(lambda: daemon.metric("recurd_subscriptions_refused_total") >= 1000)
            assert 0 < daemon.log.count("subscription_refused") <= 400
            socket.subscribe("a/" + "x" * 3000)  # is closed unread
            stream = client.open("s")
            with subscribed(daemon, "a/*", probe=stream, **house.keys("a")) as subscriber:
                stream.push(draw())
                assert next(subscriber).stream == "s"


def test_who_unsubscribes_from_what_it_never_had_ends_no_subscription_of_others(house: House) -> None:
    house.write(PUBLISH)
    with house.serve() as daemon, zmq.Context() as context:
        daemon.ready()
        with context.socket(zmq.XSUB) as socket, recurd.connect(daemon.endpoint, **house.keys("a")) as client:
            stream = client.open("s")
            with subscribed(daemon, "a/*", probe=stream, **house.keys("a")) as subscriber:
                socket.linger = 0
                socket.setsockopt(zmq.ONLY_FIRST_SUBSCRIBE, 1)  # what is sent behind the first part goes as it is
                for option, value in house.credentials("b").options().items():
                    socket.setsockopt(option, value)
                socket.connect(published_at(daemon).split(",")[0])
                refused = daemon.metric("recurd_subscriptions_refused_total")
                for _ in range(3):
                    socket.send_multipart([b"\2", b"\0a/", b"\0a/pump/s\0"])
                socket.send(b"\1a/")  # is refused, when what came before has been read
                eventually(lambda: daemon.metric("recurd_subscriptions_refused_total") > refused)
                for _ in range(3):
                    stream.push(draw())
                    assert next(subscriber).stream == "s"


def test_when_the_last_of_several_users_has_gone_nothing_is_put_out(house: House) -> None:
    house.write(PUBLISH + '[tenants.b]\nsubscribe = ["a/*"]\n')
    with house.serve() as daemon:
        daemon.ready()
        with recurd.connect(daemon.endpoint, **house.keys("a")) as client:
            stream = client.open("s")
            with (
                subscribed(daemon, "a/*", probe=stream, **house.keys("a")),
                subscribed(daemon, "a/*", probe=stream, **house.keys("b")),
            ):
                pass
            assert eventually(lambda: settled(daemon, stream)) > 0
