"""Two real daemons and clients that do not stop: streams go from one to the other, and nobody loses anything."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import recurd
from process import Process, eventually
from recurd.drain import GROUP_STREAMS, Drain, pages
from recurd.errors import Code, ExitCode, Refused, Unanswered
from recurd.keys import new
from recurd.model import Model
from recurd.remote import Remote
from recurrent import Network

PUMP = Network(layers=1, learned=True, counter=True)
STREAMS, CONNECTIONS = 200, 4
IN_FLIGHT = 3


@pytest.fixture(scope="module")
def pump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return PUMP.save(tmp_path_factory.mktemp("models") / "pump.onnx", proof=True)


@pytest.fixture
def daemons(pump: Path, tmp_path: Path) -> Iterator[tuple[Process, Process]]:
    with serve(pump, tmp_path / "a") as here, serve(pump, tmp_path / "b") as there:
        here.ready()
        there.ready()
        yield here, there


def serve(pump: Path, folder: Path, *flags: str) -> Process:
    folder.mkdir(exist_ok=True)
    return Process(folder, pump, "--bind", "tcp://127.0.0.1:*", "--metrics", "", *flags)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "recurd", *arguments]


def drain(here: str, there: str, *flags: str) -> subprocess.CompletedProcess[str]:
    arguments = command("drain", "--endpoint", here, "--to", there, "--json", *flags)
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)


def chunk(name: str, seq: int) -> np.ndarray[Any, Any]:
    draw = np.random.default_rng([*name.encode(), seq])
    return PUMP.draw(int(draw.integers(1, 12)), draw)


class Load(threading.Thread):
    """One connection whose streams push without a pause; ``results`` by stream and in order."""

    def __init__(self, endpoint: str, number: int, streams: int = STREAMS // CONNECTIONS) -> None:
        super().__init__(daemon=True)
        self._client = recurd.connect(endpoint, timeout_seconds=60)
        self._streams = [self._client.open(f"c{number}-{index}", model="pump") for index in range(streams)]
        self.results: dict[str, list[Any]] = {stream.name: [] for stream in self._streams}
        self.done = threading.Event()
        self.rounds = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.done.is_set():
                futures = []
                for more in range(IN_FLIGHT):
                    chunks = {s: chunk(s.name, len(self.results[s.name]) + more + 1) for s in self._streams}
                    futures.append(self._client.submit_many(chunks))
                for answers in futures:
                    for stream, future in answers.items():
                        self.results[stream.name].append(future.result(60))
                self.rounds += 1
        except BaseException as error:
            self.error = error

    @property
    def endpoint(self) -> str:
        return self._client.endpoint

    def go_on(self, rounds: int = 2) -> None:
        """Wait until some more chunks of every stream are answered."""
        target = self.rounds + rounds
        eventually(lambda: self.error is not None or self.rounds >= target)
        if self.error is not None:
            raise self.error

    def stop(self) -> dict[str, list[Any]]:
        self.done.set()
        self.join(60)
        self._client.close()
        if self.error is not None:
            raise self.error
        return self.results


def check(results: dict[str, list[Any]], saved: dict[str, Any], pump: Path) -> None:
    """Every result, and every final state, is that of one pass over all the stream's chunks."""
    model = Model.load(pump, slots=1, threads=1)
    slot = np.zeros(1, np.int64)
    for name, outputs in results.items():
        assert saved[name].seq == len(outputs) > 0, name
        for seq, output in enumerate(outputs, start=1):
            x = chunk(name, seq)
            (expected,) = model.run(slot, np.array([seq == 1]), np.array([len(x)], np.int32), x[None])
            assert np.array_equal(expected[0], output), (name, seq)
        assert saved[name].state == model.rows(slot)[0], name


def streams_of(endpoint: str, folder: Path) -> dict[str, Any]:
    """All streams of a daemon, as the command exports them."""
    from recurd import statefile

    file = folder / "streams.safetensors"
    done = subprocess.run(command("state", "export", str(file), "--endpoint", endpoint), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parcels, _ = statefile.read(file)
    return {parcel.stream.name: parcel.stream for parcel in parcels}


@pytest.fixture
def loads(daemons: tuple[Process, Process]) -> Iterator[list[Load]]:
    loads = [Load(daemons[0].endpoint, number) for number in range(CONNECTIONS)]
    for load in loads:
        load.start()
    for load in loads:
        load.go_on()
    yield loads
    for load in loads:
        load.done.set()
        load.join(60)
        load._client.close()


def finish(loads: list[Load]) -> dict[str, list[Any]]:
    results: dict[str, list[Any]] = {}
    for load in loads:
        load.go_on()
        results |= load.stop()
    return results


def test_clients_follow_two_hundred_streams_and_every_bit_is_as_if_nothing_had_happened(
    daemons: tuple[Process, Process], loads: list[Load], pump: Path, tmp_path: Path
) -> None:
    here, there = daemons
    with recurd.connect(here.endpoint) as client:
        client.open("detached", model="pump").push(chunk("detached", 1))
    done = drain(here.endpoint, there.endpoint)
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads(done.stdout)
    assert report["streams"] == STREAMS + 1
    assert report["longest_pause_seconds"] < 10

    results = finish(loads)
    assert {load.endpoint for load in loads} == {there.endpoint}
    saved = streams_of(there.endpoint, tmp_path)
    assert saved.keys() == {*results, "detached"}
    check(results, saved, pump)
    assert streams_of(here.endpoint, tmp_path) == {}
    with recurd.connect(here.endpoint) as client:  # whoever comes late, and whoever is new, is sent on
        late = client.open("detached", model="pump")
        assert (late.last_seq, client.endpoint) == (1, there.endpoint)
        client.open("new", model="pump")
    assert "new" in streams_of(there.endpoint, tmp_path)
    cancelled = subprocess.check_output(command("drain", "--endpoint", here.endpoint, "--cancel", "--json"))
    assert json.loads(cancelled) == {
        "endpoint": here.endpoint,
        "takes_streams": True,
        "streams": 0,
        "not_expected": [],
        "forgotten": 0,
    }
    assert here.stop(signal.SIGTERM) == 0


def test_a_drain_that_is_killed_leaves_every_stream_open_once_and_a_second_one_ends_it(
    daemons: tuple[Process, Process], loads: list[Load], pump: Path, tmp_path: Path
) -> None:
    here, there = daemons
    for kill in range(4):
        first = subprocess.Popen(command("drain", "--endpoint", here.endpoint, "--to", there.endpoint))
        with Remote(there.endpoint) as remote:  # at some moment in the middle of a group
            eventually(lambda: remote.ask("groups")[0]["held"] or first.poll() is not None)  # noqa: B023  # done here
        first.kill()
        first.wait()
        if kill == 0:
            for load in loads:
                load.go_on()
        for load in loads:
            assert load.error is None, load.error
    done = drain(here.endpoint, there.endpoint)
    assert done.returncode == 0, done.stderr

    results = finish(loads)
    saved = streams_of(there.endpoint, tmp_path)
    assert saved.keys() == results.keys()
    check(results, saved, pump)
    with Remote(there.endpoint) as remote:
        assert remote.ask("groups")[0]["held"] == {}


def test_ctrl_c_opens_at_once_what_was_on_its_way(
    daemons: tuple[Process, Process], loads: list[Load], pump: Path, tmp_path: Path
) -> None:
    here, there = daemons
    arguments = command("drain", "--endpoint", here.endpoint, "--to", there.endpoint)
    first = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    with Remote(there.endpoint) as remote:
        eventually(lambda: remote.ask("groups")[0]["held"] or first.poll() is not None)
        first.send_signal(signal.SIGINT)
        # done already, stopped, or caught by the signal while it was leaving
        _, said = first.communicate(timeout=30)
        assert first.returncode in (0, 130, -signal.SIGINT)
        if first.returncode == 130 and said:  # it was in the drain, as nearly always
            assert said.startswith("recurd: interrupted; run it again to go on")
        assert remote.ask("groups")[0]["held"] == {}
    results = finish(loads)
    saved = streams_of(here.endpoint, tmp_path)
    arrived = streams_of(there.endpoint, tmp_path)
    assert not saved.keys() & arrived.keys()
    check(results, saved | arrived, pump)


def test_a_daemon_that_dies_while_it_takes_streams_takes_none_with_it(
    daemons: tuple[Process, Process], pump: Path, tmp_path: Path
) -> None:
    here, there = daemons
    load = Load(here.endpoint, 0)
    load.start()
    load.go_on()
    first = subprocess.Popen(
        command("drain", "--endpoint", here.endpoint, "--to", there.endpoint, "--timeout", "2"),
        stderr=subprocess.PIPE,
        text=True,
    )
    there.process.send_signal(signal.SIGSTOP)  # so that it dies after it was connected to, and before it answers
    there.process.kill()
    assert first.communicate(timeout=60)[1].startswith("recurd: no answer from")
    assert first.returncode == ExitCode.DEVICE
    load.go_on()
    assert load.endpoint == here.endpoint
    with serve(pump, tmp_path / "c") as other:
        other.ready()
        assert drain(here.endpoint, other.endpoint).returncode == 0
        load.go_on()
        results = load.stop()
        check(results, streams_of(other.endpoint, tmp_path), pump)


def test_a_daemon_with_other_weights_gets_nothing_and_the_sentence_says_why(
    daemons: tuple[Process, Process], tmp_path: Path
) -> None:
    here, _ = daemons
    other = Network(layers=1, learned=True, counter=True, seed=5).save(tmp_path / "pump.onnx", proof=True)
    with serve(other, tmp_path / "c") as there, recurd.connect(here.endpoint) as client:
        there.ready()
        stream = client.open("s", model="pump")
        stream.push(chunk("s", 1))
        done = drain(here.endpoint, there.endpoint)
        assert done.returncode == ExitCode.BUG
        assert "weights" in done.stderr
        assert done.stderr.splitlines()[1:] == [f"0 streams moved to {there.endpoint}"]
        stream.push(chunk("s", 2))
        assert (client.endpoint, stream.last_seq) == (here.endpoint, 2)
        assert drain(here.endpoint, there.endpoint, "--accept-drift").returncode == 0
        stream.push(chunk("s", 3))
        assert client.endpoint == there.endpoint
    assert drain(here.endpoint, here.endpoint).returncode == ExitCode.BUG


def test_streams_go_through_a_file_and_coming_twice_they_come_once(
    daemons: tuple[Process, Process], tmp_path: Path
) -> None:
    here, there = daemons
    file = tmp_path / "some.safetensors"
    with recurd.connect(here.endpoint) as client:
        outputs = {}
        for name in ("hall-3", "hall-4", "other"):
            stream = client.open(name, model="pump")
            outputs[name] = [stream.push(chunk(name, 1))]
        done = run("state", "export", str(file), "--stream", "hall-*", "--endpoint", here.endpoint)
        assert (done.returncode, done.stdout) == (0, f"2 streams in {file}\n")
        came = f"2 streams given to {there.endpoint}\n"
        stayed = f"0 streams given to {there.endpoint}; there already, as in the file: 2\n"
        for said in (came, stayed):
            done = run("state", "import", str(file), "--endpoint", there.endpoint)
            assert (done.returncode, done.stdout) == (0, said), done.stderr
    with recurd.connect(there.endpoint) as client:
        for name in ("hall-3", "hall-4"):
            stream = client.open(name, model="pump", mode="resume")
            assert stream.last_seq == 1
            outputs[name].append(stream.push(chunk(name, 2)))
            whole = PUMP.run(np.concatenate([chunk(name, 1), chunk(name, 2)]))[0]["output"]
            np.testing.assert_allclose(np.concatenate(outputs[name]), whole, rtol=1e-4, atol=1e-5)
        with pytest.raises(Refused) as refused:
            client.open("other", model="pump", mode="resume")
        assert refused.value.code is Code.UNKNOWN_STREAM
    done = run("state", "import", str(file), "--endpoint", there.endpoint)
    assert done.returncode == ExitCode.BUG
    assert "exists: there is a stream 'hall-3' of tenant 'local' already, at record 2, and 1 comes" in done.stderr

    file.write_bytes(file.read_bytes()[:200])
    done = run("state", "import", str(file), "--endpoint", there.endpoint)
    assert (done.returncode, done.stderr.count("\n")) == (ExitCode.CONTRACT, 1)


def test_who_runs_it_decides_about_streams_that_no_drain_will(daemons: tuple[Process, Process]) -> None:
    here, there = daemons
    held = ("state", "held", "--endpoint", there.endpoint)
    assert run(*held).stdout == "no streams are held\n"
    with recurd.connect(here.endpoint) as client, Remote(here.endpoint) as source, Remote(there.endpoint) as target:
        for name in ("kept", "thrown"):
            stream = client.open(name, model="pump")
            stream.push(chunk(name, 1))
            stamps = source.ask("gather", group=name, stream=name)[0]["stamps"]
            (data,) = pages(source, name, 10**6, 10)
            target.ask("import", data, group=name, stamps=stamps)
    assert run(*held).stdout == (
        "kept  1 stream, 'kept' of tenant 'local' among them\nthrown  1 stream, 'thrown' of tenant 'local' among them\n"
    )
    assert set(msgspec.json.decode(run(*held, "--json").stdout)["held"]) == {"kept", "thrown"}
    assert run(*held, "--drop", "thrown").stdout == f"1 stream dropped at {there.endpoint}\n"
    assert run(*held, "--admit", "kept").stdout == f"1 stream admitted at {there.endpoint}\n"
    done = run(*held, "--admit", "kept")
    assert (done.returncode, done.stderr) == (
        ExitCode.BUG,
        f"recurd: {there.endpoint} holds no group 'kept', but none\n",
    )
    assert run(*held, "--admit", "a", "--drop", "b").returncode == ExitCode.USAGE
    with recurd.connect(there.endpoint) as client:
        assert client.open("kept", model="pump", mode="resume").last_seq == 1
        assert client.open("thrown", model="pump").last_seq == 0


def test_who_opens_at_the_new_daemon_what_is_still_at_the_old_one_gets_that_one_when_the_drain_goes_on(
    daemons: tuple[Process, Process], tmp_path: Path
) -> None:
    here, there = daemons

    def cut(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with recurd.connect(here.endpoint) as one, recurd.connect(here.endpoint) as other:
        for client in (one, other):  # each of them a group of its own
            streams = [client.open(f"{client is one}-{number}", model="pump") for number in range(GROUP_STREAMS)]
            client.push_many({stream: chunk(stream.name, 1) for stream in streams})
        with (
            Remote(here.endpoint) as source,
            Remote(there.endpoint) as target,
            pytest.raises(KeyboardInterrupt) as interrupt,
        ):
            Drain(source, target, progress=cut).run()
    assert f"{GROUP_STREAMS} streams moved to {there.endpoint}" in interrupt.value.__notes__
    left = min(streams_of(here.endpoint, tmp_path))
    shown = run("state", "held", "--endpoint", there.endpoint).stdout
    assert (
        f"more are to come from {here.endpoint} on {socket.gethostname()}; until then no new stream begins here"
        in shown
    )

    with recurd.connect(there.endpoint) as client, ThreadPoolExecutor() as others:
        opened = others.submit(client.open, left, model="pump")
        new = others.submit(client.open, "new", model="pump")
        with pytest.raises(Unanswered, match="may be one that is to come from another daemon"):
            client.open("another", model="pump", timeout_seconds=1)
        assert not opened.done()
        assert not new.done()
        done = drain(here.endpoint, there.endpoint)
        assert (done.returncode, done.stderr) == (0, "")
        assert (opened.result(60).last_seq, new.result(60).last_seq) == (1, 0)
        output = opened.result().push(chunk(left, 2))
    whole = PUMP.run(np.concatenate([chunk(left, 1), chunk(left, 2)]))[0]["output"]
    np.testing.assert_allclose(output, whole[len(chunk(left, 1)) :], rtol=1e-4, atol=1e-5)


def test_who_gives_a_drain_up_is_told_what_that_changes(daemons: tuple[Process, Process]) -> None:
    here, there = (daemon.endpoint for daemon in daemons)
    cancel = ("drain", "--cancel", "--endpoint", there)
    assert run(*cancel).stdout == f"{there} takes new streams as before\n"
    with Remote(there) as remote:
        for source, origin in ((here, "1"), ("tcp://other:1", "2")):
            remote.ask("expect", endpoint=source, origin=origin)
        assert run(*cancel, "--drained", here).stdout == (
            f"0 streams that had moved to {here} may begin at {there} again\n"
            f"{there} expects no more streams from {here}\n"
            f"{there} takes no new streams, as a drain from tcp://other:1 is not finished\n"
        )
        done = run("drain", "--endpoint", there, "--to", here)
        assert done.returncode == ExitCode.BUG
        assert "a drain from tcp://other:1 to this daemon is not finished: finish it first" in done.stderr
    assert run(*cancel).stdout == (
        f"{there} expects no more streams from tcp://other:1\n{there} takes new streams again\n"
    )


def test_a_stream_that_was_closed_at_the_new_daemon_begins_at_the_old_one_after_the_drain_back(
    daemons: tuple[Process, Process],
) -> None:
    here, there = daemons
    with recurd.connect(here.endpoint) as client:
        closed, kept = (client.open(name, model="pump") for name in ("closed", "kept"))
        client.push_many({stream: chunk(stream.name, 1) for stream in (closed, kept)})
        assert drain(here.endpoint, there.endpoint).returncode == 0
        closed.close()
        assert client.endpoint == there.endpoint
        kept.push(chunk("kept", 2))
        assert drain(there.endpoint, here.endpoint).returncode == 0
        kept.push(chunk("kept", 3))
        assert (client.endpoint, kept.last_seq) == (here.endpoint, 3)
        assert client.open("closed", model="pump").last_seq == 0


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60, check=False)


# --- who may, and who follows ---


async def test_the_asyncio_client_follows_too(daemons: tuple[Process, Process]) -> None:
    here, there = daemons
    async with recurd.aio.connect(here.endpoint) as client:
        stream = await client.open("s", model="pump")
        outputs = [await stream.push(chunk("s", 1))]
        drained = await asyncio.create_subprocess_exec(
            *command("drain", "--endpoint", here.endpoint, "--to", there.endpoint)
        )
        seq = 1
        while drained.returncode is None or seq < 5:
            seq += 1
            outputs.append(await stream.push(chunk("s", seq)))
            if client.endpoint == there.endpoint:
                await drained.wait()
        assert drained.returncode == 0
        assert client.endpoint == there.endpoint
    whole = PUMP.run(np.concatenate([chunk("s", one + 1) for one in range(seq)]))[0]["output"]
    np.testing.assert_allclose(np.concatenate(outputs), whole, rtol=1e-4, atol=1e-5)


def test_with_keys_it_takes_the_right_and_clients_are_told_the_key_of_the_other_daemon(
    pump: Path, tmp_path: Path
) -> None:
    clients = tmp_path / "clients"
    clients.mkdir()
    for name in ("boss", "pump-hall"):
        public, _ = new(name, tmp_path)
        (clients / public.name).write_bytes(public.read_bytes())
    for name in ("a", "b"):
        new(name, tmp_path)
        (tmp_path / f"{name}.toml").write_text(
            f'bind = ["tcp://127.0.0.1:*"]\nmetrics = ""\n[auth]\nkey = "{name}.key_secret"\nclients = "clients"\n'
            f'[tenants.boss]\nrights = ["admin"]\n[[models]]\npath = "{pump}"\n'
        )
    with (
        Process(tmp_path, "--config", tmp_path / "a.toml") as here,
        Process(tmp_path, "--config", tmp_path / "b.toml") as there,
    ):
        here.ready()
        there.ready()
        mine = {"key": tmp_path / "pump-hall.key_secret", "server_key": tmp_path / "a.key"}
        with recurd.connect(here.endpoint, **mine) as client:
            stream = client.open("s", model="pump")
            stream.push(chunk("s", 1))
            keys = ["--server-key", str(tmp_path / "a.key"), "--to-server-key", str(tmp_path / "b.key")]
            done = drain(here.endpoint, there.endpoint, "--key", str(mine["key"]), *keys)
            assert (done.returncode, "has not the right 'admin'" in done.stderr) == (ExitCode.BUG, True)
            done = drain(here.endpoint, there.endpoint, "--key", str(tmp_path / "boss.key_secret"), *keys)
            assert done.returncode == 0, done.stderr
            stream.push(chunk("s", 2))
            assert (client.endpoint, stream.last_seq, client.server.tenant) == (there.endpoint, 2, "pump-hall")


# --- with journals, whoever dies ---


def test_a_command_that_the_daemon_died_over_is_repeated_when_it_is_there_again(pump: Path, tmp_path: Path) -> None:
    with (
        durable(pump, tmp_path / "a").ready() as first,
        ThreadPoolExecutor() as others,
        Remote(f"ipc://{tmp_path}/a/socket", timeout_seconds=600) as remote,
    ):
        first.process.send_signal(signal.SIGSTOP)
        answer = others.submit(remote.ask, "groups")
        with pytest.raises(TimeoutError):
            answer.result(0.2)  # it is in the socket, and is not read
        first.process.kill()
        first.process.wait()
        with durable(pump, tmp_path / "a"):
            assert answer.result(60)[0]["held"] == {}


def durable(pump: Path, folder: Path) -> Process:
    folder.mkdir(exist_ok=True)
    flags = ("--bind", f"ipc://{folder}/socket", "--metrics", "", "--journal", str(folder / "journal"))
    return Process(folder, pump, *flags)


def test_streams_that_are_durable_no_more_are_told_of(pump: Path, tmp_path: Path) -> None:
    with durable(pump, tmp_path / "a").ready(), serve(pump, tmp_path / "b").ready() as there:
        ends = f"ipc://{tmp_path}/a/socket", there.endpoint
        said = [drain(*way).stderr for way in (ends, ends[::-1])]
    assert said == [f"recurd: {there.endpoint} keeps no journal: streams do not survive its end there\n", ""]


@pytest.mark.parametrize("victim", ["here", "there", "both"])
def test_a_daemon_with_a_journal_that_is_killed_in_the_middle_costs_nothing(
    pump: Path, tmp_path: Path, victim: str
) -> None:
    folders = {name: tmp_path / name[0] for name in ("here", "there")}
    endpoints = {name: f"ipc://{folder}/socket" for name, folder in folders.items()}
    daemons = {name: durable(pump, folder).ready() for name, folder in folders.items()}
    loads: list[Load] = []
    try:
        loads += [Load(endpoints["here"], number, streams=30) for number in range(3)]
        for load in loads:
            load.start()
        for load in loads:
            load.go_on()
        arguments = ("drain", "--endpoint", endpoints["here"], "--to", endpoints["there"], "--timeout", "2")
        first = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE)
        with Remote(endpoints["there"]) as remote:
            eventually(lambda: remote.ask("groups")[0]["held"] or first.poll() is not None)
        for name, folder in folders.items():
            if victim in (name, "both"):
                daemons[name].__exit__(None, None, None)  # kills it
                daemons[name] = durable(pump, folder).ready()
        first.communicate(timeout=60)
        done = eventually(lambda: _drained(endpoints))
        assert done["streams"] <= 90
        results = finish(loads)
        saved = streams_of(endpoints["there"], tmp_path)
        assert saved.keys() == results.keys()
        check(results, saved, pump)
        assert streams_of(endpoints["here"], tmp_path) == {}
    finally:
        for load in loads:
            load.done.set()
            load.join(60)
            load._client.close()
        for daemon in daemons.values():
            daemon.__exit__(None, None, None)


def _drained(endpoints: dict[str, str]) -> Any:
    done = drain(endpoints["here"], endpoints["there"])
    return json.loads(done.stdout) if done.returncode == 0 else None


# --- whole states ---


class Holder(threading.Thread):
    """One connection that reads, sets and clones states without a pause; the state `count` counts steps."""

    def __init__(self, endpoint: str, number: int) -> None:
        super().__init__(daemon=True)
        self._client = recurd.connect(endpoint, timeout_seconds=60)
        self._stream = self._client.open(f"holder {number}", model="pump")
        self.done = threading.Event()
        self.rounds = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.done.is_set():
                self._round()
        except BaseException as error:
            self.error = error
        self._client.close()

    def _round(self) -> None:
        count = int(self._stream.state()["count"][0])
        x = chunk(self._stream.name, self.rounds)
        answers = [self._stream.submit(x) for _ in range(IN_FLIGHT)]
        clone = self._client.clone(self._stream, f"{self._stream.name} clone {self.rounds}")
        clone.push(x[:1])
        found = [int(stream.state()["count"][0]) for stream in (clone, self._stream)]
        assert found == [count + IN_FLIGHT * len(x) + 1, count + IN_FLIGHT * len(x)]
        self._stream.reset(to=clone.state())
        clone.close()
        assert all(len(answer.result(60)) == len(x) for answer in answers)
        self.rounds += 1

    def go_on(self, rounds: int = 3) -> None:
        target = self.rounds + rounds
        eventually(lambda: self.error is not None or self.rounds >= target)
        if self.error is not None:
            raise self.error


def test_whole_states_and_clones_go_along_while_clients_hold_them(daemons: tuple[Process, Process]) -> None:
    here, there = daemons
    holders = [Holder(here.endpoint, number) for number in range(6)]
    for holder in holders:
        holder.start()
    for source, target in ((here, there), (there, here), (here, there)):
        for holder in holders:
            holder.go_on()
        done = drain(source.endpoint, target.endpoint)
        assert done.returncode == 0, done.stderr
    for holder in holders:
        holder.go_on()
        holder.done.set()
    for holder in holders:
        holder.join(60)
        assert holder.error is None
        assert holder.rounds > 9
