"""Clients that do not read what they asked for, or do not say that they have: nobody else may notice."""

import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import zmq

import recurd
from dialogue import Reply, chunk, hello, opening, replies
from process import PATIENCE_SECONDS, Dealer, Process, eventually
from recurd import wire
from recurd.wire import Flag, Type
from recurrent import Array, Network

PUMP = Network(outputs=4)
STEPS = 1000
#: Bytes of a result.
RESULT = STEPS * 4 * 4
STREAMS, CHUNKS = 20, 30
X = [PUMP.draw(STEPS, np.random.default_rng(seq)) for seq in range(CHUNKS)]


@pytest.fixture(scope="module")
def pump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return PUMP.save(tmp_path_factory.mktemp("models") / "pump.onnx")


@pytest.fixture(scope="module")
def truth() -> list[Array]:
    """What any stream gets for the chunks of X."""
    whole = PUMP.run(np.concatenate(X))[0]["output"].astype(np.float32)
    return np.split(whole, CHUNKS)


@contextmanager
def serving(folder: Path, pump: Path, config: str) -> Iterator[Process]:
    (folder / "recurd.toml").write_text(config)
    flags = ["--bind", f"ipc://{folder}/socket", "--metrics", "127.0.0.1:0", "--config", folder / "recurd.toml"]
    with Process(folder, pump, *flags) as daemon:
        yield daemon.ready()


def memory(daemon: Process) -> int:
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


def latencies(stream: recurd.Stream, count: int = 150) -> list[float]:
    """Seconds that small chunks take, one after another."""
    taken = []
    for _ in range(count):
        begin = time.perf_counter()
        stream.push(X[0][:2], timeout_seconds=PATIENCE_SECONDS)
        taken.append(time.perf_counter() - begin)
    return taken


class Sluggard:
    """A connection that reads when it is told to, and keeps what came, in order, by stream."""

    def __init__(self, endpoint: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, 1)
        self.socket.setsockopt(zmq.SNDTIMEO, int(PATIENCE_SECONDS * 1000))
        self.socket.connect(endpoint)
        self.socket.send(hello())
        self.handles: list[int] = []
        self.results: dict[int, dict[int, Reply]] = {}
        assert self.read(1)[0].type == Type.WELCOME

    def __enter__(self) -> "Sluggard":
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()
        self._context.term()

    def open(self, names: list[str]) -> None:
        for name in names:
            self.socket.send(opening(name))
            (opened,) = self.read(1)
            self.handles.append(opened.header.handle)
            self.results[opened.header.handle] = {}

    def read(self, count: int) -> list[Reply]:
        """Exactly so many answers, besides PONGs."""
        found: list[Reply] = []
        while len(found) < count:
            assert self.socket.poll(PATIENCE_SECONDS * 1000), f"{count - len(found)} answers are missing"
            found += [reply for reply in replies(self.socket.recv()) if reply.type != Type.PONG]
        return found

    def read_all(self) -> None:
        """Everything that was sent before this. A PONG is lost like anything else while there is no room for it."""
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            while not self.socket.poll(200):
                assert time.monotonic() < end
                self.socket.send(wire.pack(Type.PING, seq=77))
            for reply in replies(self.socket.recv()):
                if reply.type == Type.PONG and reply.header.seq == 77:
                    return
                if reply.type == Type.RESULT:
                    self.results[reply.header.handle][reply.header.seq] = reply


def test_a_client_that_does_not_read_holds_up_nobody_and_gets_everything_when_it_does(
    pump: Path, tmp_path: Path, truth: list[Array]
) -> None:
    config = "[zeromq]\nsend_high_water_mark = 20\n[limits]\nqueued_seconds = 1000\n"
    with (
        serving(tmp_path, pump, config) as daemon,
        recurd.connect(daemon.endpoint) as client,
        Sluggard(daemon.endpoint) as slow,
    ):
        stream = client.open("quick", model="pump")
        alone = latencies(stream)
        before = memory(daemon)
        slow.open([f"slow{number}" for number in range(STREAMS)])
        for seq, x in enumerate(X, 1):
            for handle in slow.handles:
                slow.socket.send(wire.frame(chunk(handle, seq, x)))
        eventually(lambda: daemon.metric('recurd_chunks_processed_total{model="pump"}') >= STREAMS * CHUNKS + 150)
        assert daemon.metric('recurd_send_failures_total{reason="again"}') > 0

        # It goes on asking, and does not read.
        done = threading.Event()

        def ask() -> None:
            while not done.is_set():
                slow.socket.send(wire.pack(Type.CHUNK, generation=1, handle=slow.handles[0], seq=1))
                done.wait(0.001)

        asking = threading.Thread(target=ask)
        asking.start()
        beside = latencies(stream)
        done.set()
        asking.join()
        assert statistics.median(beside) < 20 * statistics.median(alone) + 0.02
        assert memory(daemon) - before < STREAMS * CHUNKS * RESULT + 20 * 256 * 1024 + 60e6

        # It wakes up, and asks for what is missing.
        slow.read_all()
        for handle, results in slow.results.items():
            for seq in range(1, CHUNKS + 1):
                if seq not in results:
                    slow.socket.send(wire.pack(Type.CHUNK, generation=1, handle=handle, seq=seq))
                    (reply,) = slow.read(1)
                    assert Flag.DUPLICATE in reply.flags
                    results[seq] = reply
        for results in slow.results.values():
            for seq, expected in enumerate(truth, 1):
                np.testing.assert_allclose(results[seq].output, expected, rtol=1e-4, atol=1e-5)


def test_a_client_that_does_not_acknowledge_is_stopped_and_others_are_not(pump: Path, tmp_path: Path) -> None:
    limits = f"retained_bytes = {40 * RESULT}\nstream_credit = 16\nqueued_seconds = 1000\n"
    with (
        serving(tmp_path, pump, f"[limits]\n{limits}") as daemon,
        recurd.connect(daemon.endpoint) as client,
        Dealer(daemon.endpoint) as greedy,
    ):
        handles = [greedy.handle(f"greedy{number}") for number in range(8)]
        taken = dict.fromkeys(handles, 0)
        refused = []
        for _ in range(20):
            for handle in handles:
                reply = greedy.ask(b"".join(chunk(handle, taken[handle] + 1, X[0])))
                taken[handle] += reply.type == Type.RESULT
                refused += [reply.code] * bool(reply.code)
        assert set(refused) == {"busy"}
        assert sum(taken.values()) == 40

        streams = [client.open(f"good{number}", model="pump") for number in range(5)]
        for stream in streams:
            latencies(stream, 20)
            futures = [stream.submit(X[0][:5]) for _ in range(20)]
            assert all(future.result(PATIENCE_SECONDS).shape == (5, 4) for future in futures)
        # and who acknowledges is served again
        for handle, seq in taken.items():
            assert greedy.ask(b"".join(chunk(handle, seq + 1, X[0], ack=seq))).type == Type.RESULT


FLOOD = """
import sys, time, zmq
from dialogue import hello, opening, replies
from recurd import wire
socket = zmq.Context().socket(zmq.DEALER)
socket.setsockopt(zmq.RCVHWM, 1)
socket.connect(sys.argv[1])
socket.send(hello(multi=True))
socket.recv()
socket.send(opening("loud"))
(opened,) = replies(socket.recv())
record = wire.pack(wire.Type.RESET, generation=1, handle=opened.header.handle, seq=9), b""
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    socket.send(wire.multi([record] * wire.MAX_RECORDS))
print("enough", flush=True)
while True:
    socket.send(wire.multi([record] * wire.MAX_RECORDS))
"""


def test_a_client_that_floods_reads_nothing_and_dies_takes_nothing_with_it(pump: Path, tmp_path: Path) -> None:
    """libzmq ended the whole process when one of its own heartbeats was due on what was left of the connection."""
    with Process(tmp_path, pump, "--bind", "tcp://127.0.0.1:*", "--metrics", "") as daemon:
        daemon.ready()
        with recurd.connect(daemon.endpoint) as client:
            stream = client.open("quiet", model="pump")
            # until shortly before a heartbeat of five seconds
            command = [sys.executable, "-c", FLOOD, daemon.endpoint, "4.3"]
            path = os.pathsep.join([str(Path(__file__).parents[1] / "support"), *sys.path])
            environment = os.environ | {"PYTHONPATH": path}
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as flood:
                assert flood.stdout is not None
                assert flood.stdout.readline() == "enough\n"
                flood.kill()
            begin = time.monotonic()
            while time.monotonic() < begin + 1.5:
                stream.push(X[0][:2], timeout_seconds=PATIENCE_SECONDS)
            assert client.server.epoch
        assert daemon.stop(signal.SIGTERM) == 0, daemon.log
