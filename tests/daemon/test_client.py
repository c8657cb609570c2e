"""The threaded client against a real daemon over a real network that is cut."""

import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

import recurd
from process import Process
from recurd import wire
from recurd.errors import Code
from recurd.signature import Signature
from recurrent import Network


@pytest.fixture
def client(daemon: Any) -> Iterator[recurd.Client]:
    with recurd.connect(daemon.endpoint, timeout_seconds=20) as client:
        yield client


@pytest.fixture
def stream(client: recurd.Client, request: pytest.FixtureRequest) -> recurd.Stream:
    return client.open(request.node.name, model="sum")


def sums(future: "Future[Any]") -> list[float]:
    result: list[float] = future.result(20).ravel().tolist()
    return result


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


# --- chunks that may not wait for ever ---


def test_a_chunk_that_is_late_is_refused_and_the_stream_goes_on_without_it(
    client: recurd.Client, stream: recurd.Stream
) -> None:
    assert stream.push([1.0], expires_seconds=20).tolist() == [[1]]  # type: ignore[union-attr]
    with pytest.raises(recurd.Refused) as late:
        stream.push([2.0], expires_seconds=1e-9)
    assert late.value.code is Code.LATE
    futures = [stream.submit([1.0], expires_seconds=seconds) for seconds in (20, 1e-9, None)]
    assert [futures[0].result(20).tolist(), futures[2].result(20).tolist()] == [[[2]], [[3]]]  # type: ignore[union-attr]
    assert isinstance(futures[1].exception(20), recurd.Refused)
    assert client.push_many({stream: [1.0]}, expires_seconds=20)[stream].tolist() == [[4]]  # type: ignore[union-attr]


@pytest.mark.parametrize("seconds", [0, -1, 66, math.nan])
def test_a_time_that_no_chunk_can_carry_is_refused_at_once(stream: recurd.Stream, seconds: float) -> None:
    with pytest.raises(ValueError, match=r"at most 65\.535"):
        stream.push([1.0], expires_seconds=seconds)
    with pytest.raises(TypeError, match="expires_seconds is a number"):
        stream.push([1.0], expires_seconds="1")  # type: ignore[arg-type]
    assert stream.push([1.0]).tolist() == [[1]]  # type: ignore[union-attr]


# --- the plain course ---


def test_a_client_knows_the_daemon_and_its_models(client: recurd.Client) -> None:
    assert sorted(client.models) == ["sum", "two"]
    assert client.models["sum"]["input"]["features"] == ["flow"]
    assert client.server.tenant == "local"


def test_results_come_for_every_step(stream: recurd.Stream) -> None:
    result = stream.push(np.array([[1], [2]], np.float32))
    assert isinstance(result, np.ndarray)
    assert (result.dtype, result.tolist()) == (np.float32, [[1], [3]])
    result += 1  # the array is ours


def test_several_heads_come_by_name_and_the_last_steps_head_without_time(client: recurd.Client) -> None:
    result = client.open("heads", model="two").push([1, 2, 3])
    assert isinstance(result, dict)
    assert {name: array.tolist() for name, array in result.items()} == {"total": [[1], [3], [6]], "last": [6]}


def test_submitted_chunks_run_in_order_far_beyond_the_credit(stream: recurd.Stream) -> None:
    futures = [stream.submit([1.0]) for _ in range(1000)]
    assert [sums(future) for future in futures] == [[n + 1.0] for n in range(1000)]
    assert stream.last_seq == 1000


def test_a_reset_takes_its_place_between_the_chunks(stream: recurd.Stream) -> None:
    assert stream.fresh
    before = stream.submit([5])
    generation = stream.generation
    stream.reset()
    assert (stream.fresh, stream.generation) == (True, generation + 1)
    after = stream.submit([1])
    assert (sums(before), sums(after)) == ([5], [1])
    assert stream.last_fresh
    stream.push([1])
    assert not stream.last_fresh
    assert not stream.fresh


def test_many_streams_are_pushed_at_once(client: recurd.Client) -> None:
    streams = [client.open(f"many {n}", model="sum") for n in range(20)]
    for total in (1, 2):
        results = client.push_many({stream: [1] for stream in streams})
        assert [results[stream].ravel().tolist() for stream in streams] == [[total]] * 20  # type: ignore[union-attr]
    for stream in streams:
        stream.close()


def test_a_stream_outlives_its_client_and_is_resumed(daemon: Any) -> None:
    with recurd.connect(daemon.endpoint) as first:
        first.open("outlives", model="sum").push([4])
    with recurd.connect(daemon.endpoint) as second:
        stream = second.open("outlives", model="sum", mode="resume")
        assert (stream.fresh, stream.last_seq) == (False, 1)
        assert stream.push([1]).tolist() == [[5]]  # type: ignore[union-attr]
        assert second.open("fresh", model="sum", mode="new").fresh


def test_a_closed_stream_is_forgotten_by_both_sides(client: recurd.Client, stream: recurd.Stream) -> None:
    last = stream.submit([1])
    stream.close()
    assert last.done()
    stream.close()
    with pytest.raises(recurd.RecurdError, match="was closed"):
        stream.push([1])
    with pytest.raises(recurd.Refused) as refusal:
        client.open(stream.name, model="sum", mode="resume")
    assert refusal.value.code in (Code.CLOSED, Code.UNKNOWN_STREAM)
    assert client.open(stream.name, model="sum").fresh


def test_many_threads_share_a_client(client: recurd.Client) -> None:
    wrong: list[Any] = []

    def work(number: int) -> None:
        stream = client.open(f"thread {number}", model="sum")
        for total in range(1, 51):
            result = stream.push([1])
            if result.tolist() != [[total]]:  # type: ignore[union-attr]
                wrong.append((number, total, result))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_a_callback_may_submit_more(stream: recurd.Stream) -> None:
    second: Future[Any] = Future()
    stream.submit([1]).add_done_callback(lambda _: second.set_result(stream.submit([2])))
    assert sums(second.result(20)) == [3]


# --- what is refused ---


def test_what_the_model_cannot_take_is_refused_before_it_is_sent(client: recurd.Client, stream: recurd.Stream) -> None:
    with pytest.raises(ValueError, match=r"\[steps, 1\] float32 .*\[2, 3\]"):
        stream.push(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="a chunk of this model"):
        stream.push(1.0)
    with pytest.raises(TypeError, match="float32"):
        stream.push(np.array([1j]))
    for nothing in (["one"], None, [None], [object()]):
        with pytest.raises(TypeError, match=r"\[steps, 1\] float32 .* holds something that is no such number"):
            stream.push(nothing)
    with pytest.raises(ValueError, match="rectangular array of numbers, and the rows of this one differ"):
        stream.push([[1], [1, 2]])
    with pytest.raises(ValueError, match="over the daemon's"):
        stream.push(np.zeros((client.server.max_message_bytes, 1)))
    with pytest.raises(ValueError, match="name one: sum, two"):
        client.open("which")
    with pytest.raises(TypeError, match="a stream's name is a string, not 17"):
        client.open(17)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a model's name is a string, not 17"):
        client.open("what", model=17)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="auto, resume, new"):
        client.open("how", model="sum", mode="maybe")  # type: ignore[arg-type]
    assert stream.push([7]).tolist() == [[7]]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("x", "code"),
    [
        ([math.nan], Code.NOT_FINITE),
        ([1e300], Code.NOT_FINITE),
        (np.zeros((0, 1)), Code.EMPTY),
        (np.zeros(5000), Code.TOO_LONG),
    ],
)
def test_what_the_daemon_refuses_fails_alone_in_the_pipeline(stream: recurd.Stream, x: Any, code: Code) -> None:
    futures = [stream.submit(chunk) for chunk in ([1], x, [1], x, x, [1])]
    refused = [future.exception(20) for future in futures]
    assert [error.code if isinstance(error, recurd.Refused) else error for error in refused] == [
        None, code, None, code, code, None,
    ]  # fmt: skip
    assert [sums(futures[n]) for n in (0, 2, 5)] == [[1], [2], [3]]
    stream.close()


def test_an_unknown_model_is_refused_by_name(client: recurd.Client) -> None:
    with pytest.raises(recurd.Refused, match="sum, two") as refusal:
        client.open("x", model="nope")
    assert refusal.value.code is Code.UNKNOWN_MODEL


def test_a_stream_is_open_once_on_a_client(client: recurd.Client, stream: recurd.Stream) -> None:
    with pytest.raises(recurd.RecurdError, match="open on this client already"):
        client.open(stream.name, model="sum")


def test_who_was_taken_over_is_told(daemon: Any, client: recurd.Client, stream: recurd.Stream) -> None:
    stream.push([1])
    with recurd.connect(daemon.endpoint) as other:
        theirs = other.open(stream.name, model="sum")
        theirs.push([2])
        with pytest.raises(recurd.Refused) as refusal:
            stream.push([3])
        assert refusal.value.code is Code.DETACHED
        assert theirs.push([3]).tolist() == [[6]]  # type: ignore[union-attr]
    again = client.open(stream.name, model="sum")
    assert again.push([1]).tolist() == [[7]]  # type: ignore[union-attr]


# --- a network that breaks ---


def test_a_cut_connection_is_made_anew_and_nothing_is_lost_or_doubled(proxy: Any) -> None:
    with recurd.connect(proxy.endpoint, timeout_seconds=30) as client:
        streams = [client.open(f"cut {n}", model="sum") for n in range(4)]
        futures: list[list[Future[Any]]] = [[] for _ in streams]
        for step in range(600):
            for stream, mine in zip(streams, futures, strict=True):
                mine.append(stream.submit([1]))
            if step % 100 == 50:
                connections = proxy.connections
                proxy.cut()
                until(lambda: proxy.connections > connections)  # noqa: B023  # done before the next step
        for mine in futures:
            assert [sums(future) for future in mine] == [[n + 1] for n in range(600)]
        for stream in streams:
            assert (stream.last_seq, stream.generation) == (600, streams[0].generation)
            stream.close()


def test_resets_and_refusals_survive_a_network_that_is_cut_again_and_again(proxy: Any) -> None:
    random = np.random.default_rng(3)
    with recurd.connect(proxy.endpoint, timeout_seconds=30) as client:
        stream = client.open("rough", model="sum")
        expected: list[float | None] = []
        futures: list[Future[Any]] = []
        total = 0.0
        stop = threading.Event()

        def cut() -> None:
            while not stop.wait(random.uniform(0.02, 0.12)):
                proxy.cut()

        cutter = threading.Thread(target=cut)
        cutter.start()
        try:
            n = 0
            while n < 500 or proxy.connections <= 5:
                n += 1
                if n % 97 == 96:
                    stream.reset()
                    total = 0.0
                value = math.nan if n % 31 == 30 else float(n % 5)
                futures.append(stream.submit([value]))
                total += 0.0 if math.isnan(value) else value
                expected.append(None if math.isnan(value) else total)
            results = [future.exception(30) or sums(future)[0] for future in futures]
        finally:
            stop.set()
            cutter.join()
        assert [None if isinstance(result, recurd.Refused) else result for result in results] == expected


def test_a_killed_daemon_breaks_its_streams_and_is_used_again_when_it_is_back(sum_model: Path, daemon: Any) -> None:
    mortal = type(daemon)(sum_model)
    with recurd.connect(mortal.endpoint, timeout_seconds=30) as client:
        stream = client.open("mortal")
        stream.push([1])
        mortal.kill()
        pending = stream.submit([1])
        mortal = type(daemon)(sum_model, port=mortal.port)
        with pytest.raises(recurd.Broken, match=r"the daemon was restarted .* stream 'mortal' is lost; open it again"):
            pending.result(30)
        with pytest.raises(recurd.Broken) as loss:
            stream.push([1])
        assert loss.value.code is Code.UNKNOWN_STREAM
        again = client.open("mortal")
        assert again.fresh
        assert again.push([5]).tolist() == [[5]]  # type: ignore[union-attr]
    mortal.stop()


def test_a_stopped_daemon_answers_what_it_took_before_it_goes(sum_model: Path, daemon: Any) -> None:
    mortal = type(daemon)(sum_model)
    with recurd.connect(mortal.endpoint, timeout_seconds=1) as client:
        stream = client.open("leaving")
        futures = [stream.submit([1]) for _ in range(100)]
        futures[0].result(20)
        mortal.stop()
        until(lambda: not client.is_connected)
        answered = [f.exception(0) is None for f in futures if f.done()]
        assert answered == sorted(answered, reverse=True)  # results, then refusals
        with pytest.raises(recurd.Unanswered, match=f"; there is no connection to {mortal.endpoint} at present$"):
            stream.push([1])


# --- time-outs, closing, and other ends ---


def test_no_daemon_is_told_in_a_sentence() -> None:
    with pytest.raises(
        recurd.Unanswered, match=r"at tcp://127\.0\.0\.1:9 within 0\.2 s; start one with 'recurd serve'"
    ):
        recurd.connect("tcp://127.0.0.1:9", timeout_seconds=0.2)


def test_who_may_not_write_to_a_socket_is_told_so(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        (tmp_path / "s").chmod(0)
        was = os.geteuid()
        if was == 0:  # who may write to anything
            os.seteuid(65_534)
        try:
            with pytest.raises(recurd.Unanswered, match=rf"within 0\.2 s; this user may not write to {tmp_path}/s"):
                recurd.connect(f"ipc://{tmp_path}/s", timeout_seconds=0.2)
        finally:
            os.seteuid(was)


@pytest.mark.parametrize(
    "endpoint", ["tcp://127.0.0.1", "127.0.0.1:7070", "tcp://:7070", "tcp://x:0", "ipc://", "udp://x:1", "nonsense", ""]
)
def test_a_wrong_address_is_told_before_anything_is_tried(endpoint: str) -> None:
    with pytest.raises(recurd.RecurdError, match=f"^'{endpoint}' is neither tcp://host:port nor ipc:///path$"):
        recurd.connect(endpoint, timeout_seconds=20)


def test_a_path_that_no_socket_can_have_is_told_before_anything_is_tried() -> None:
    with pytest.raises(recurd.RecurdError, match=r"is neither tcp://host:port nor ipc:///path$"):
        recurd.connect("ipc://a\0b", timeout_seconds=20)


def test_who_is_not_let_in_is_told_what_the_daemon_says(tmp_path: Path) -> None:
    model = Network(layers=1, learned=True).save(tmp_path / "pump.onnx", proof=True)
    settings = tmp_path / "recurd.toml"
    settings.write_text(
        f"bind = ['ipc://{tmp_path}/s']\nmetrics = ''\nmodels = [{{path = '{model}'}}]\n[limits]\nconnections = 1\n"
    )
    with Process(tmp_path, "--config", settings) as daemon:
        daemon.expect("READY=1")
        with recurd.connect(f"ipc://{tmp_path}/s"):
            said = "^the daemon did not let us in at ipc://.* within 0.3 s; the daemon said last: busy: 1 connections"
            with pytest.raises(recurd.Unanswered, match=said):
                recurd.connect(f"ipc://{tmp_path}/s", timeout_seconds=0.3)
        with recurd.connect(f"ipc://{tmp_path}/s") as client:
            assert client.is_connected


def test_an_address_that_zeromq_does_not_take_is_told_at_once() -> None:
    with pytest.raises(recurd.RecurdError, match="cannot be connected to"):
        recurd.connect("ipc:///" + "x" * 200, timeout_seconds=20)


def test_one_step_without_its_time_axis_is_told_how_to_get_it() -> None:
    input = {"dtype": "float32", "shape": [3]}
    signature = Signature({"input": input, "heads": [{"name": "y", "shape": [1]}]})
    with pytest.raises(ValueError, match=r"\[steps, 3\] float32, this one is \[3\]; one step is x\[None\]"):
        signature.payload(np.zeros(3))
    with pytest.raises(ValueError, match=r"this one is \[4\]$"):
        signature.payload(np.zeros(4))


class Mute:
    """A daemon that answers HELLO and OPEN, and records only once it was told to ``speak``: zeros and resets."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self.endpoint = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self.records: list[wire.Header] = []
        self._answered = 0
        self._peer = b""
        self._speaks = self._stop = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def speak(self) -> None:
        self._speaks = True

    def close(self) -> None:
        self._stop = True
        self._thread.join()
        self._socket.close()
        self._context.term()

    def _run(self) -> None:
        while not self._stop:
            if self._socket.poll(20):
                self._peer, frame = self._socket.recv_multipart()
                header, payload = wire.decode(frame)
                is_multi = header.type == wire.Type.MULTI
                for record in wire.decode_multi(header, payload) if is_multi else [(header, payload)]:
                    self._take(record[0])
            if self._speaks:
                for header in self.records[self._answered :]:
                    self._answer(header)

    def _take(self, header: wire.Header) -> None:
        if header.type in (wire.Type.CHUNK, wire.Type.RESET):
            self.records.append(header)
        elif header.type == wire.Type.HELLO:
            contract = {"input": {"dtype": "float32", "shape": [1]}, "heads": [{"name": "y", "shape": [1]}]}
            welcome = wire.Welcome(
                server="mute", epoch="1", tenant="local", versions=(1,), credit=4, max_message_bytes=10_000,
                max_chunk_steps=10, peer_timeout_seconds=60.0, device={}, models={"m": contract},
            )  # fmt: skip
            self._say(wire.control(wire.Type.WELCOME, welcome, seq=header.seq))
        elif header.type == wire.Type.OPEN:
            opened = wire.Opened(
                stream="s", model="m", generation=1, last_seq=0, fresh=True, credit=4, max_chunk_steps=10,
                idle_timeout_seconds=60.0,
            )  # fmt: skip
            self._say(wire.control(wire.Type.OPENED, opened, generation=1, handle=1, seq=header.seq))

    def _answer(self, header: wire.Header) -> None:
        self._answered += 1
        if header.type == wire.Type.RESET:
            done = wire.pack(wire.Type.DONE, generation=header.generation + 1, handle=1, seq=header.seq)
            self._say((done, b""))
        else:
            result = wire.pack(
                wire.Type.RESULT, dtype=1, size=4, steps=1, generation=header.generation, handle=1, seq=header.seq
            )
            self._say((result, b"\0" * 4))

    def _say(self, record: wire.Record) -> None:
        self._socket.send_multipart([self._peer, wire.frame(record)])


@pytest.fixture
def mute() -> Iterator[Mute]:
    mute = Mute()
    yield mute
    mute.close()


def test_every_call_has_its_time_out_and_the_chunk_keeps_its_place(mute: Mute) -> None:
    with recurd.connect(mute.endpoint, timeout_seconds=20, queue_limit=6) as client:
        stream = client.open("s")
        with pytest.raises(recurd.Unanswered, match=r"0\.05 s; the chunk keeps its place and must not be sent again$"):
            stream.push([1], timeout_seconds=0.05)
        with pytest.raises(recurd.Unanswered, match="the reset keeps its place"):
            stream.reset(timeout_seconds=0.05)
        with pytest.raises(TimeoutError):
            client.push_many({stream: [1]}, timeout_seconds=0.05)
        futures = [stream.submit([1]) for _ in range(3)]
        with pytest.raises(recurd.Unanswered, match="unanswered chunks"):
            stream.submit([1], timeout_seconds=0.05)
        with pytest.raises(recurd.Unanswered):
            client.submit_many({stream: [1]}, timeout_seconds=0.05)
        until(lambda: len(mute.records) == 4)  # the credit
        mute.speak()
        assert [sums(future) for future in futures] == [[0]] * 3
        assert (stream.last_seq, stream.generation) == (6, 2)
        assert not any(future.cancel() for future in futures)
        stream.push([1])
        with pytest.raises(recurd.Unanswered):
            stream.close(timeout_seconds=0.05)
        with pytest.raises(recurd.RecurdError, match="being closed"):
            stream.push([1])


def test_a_closed_client_leaves_nobody_waiting_for_room(mute: Mute) -> None:
    client = recurd.connect(mute.endpoint, timeout_seconds=600, queue_limit=1)
    stream = client.open("s")
    first = stream.submit([1])
    with ThreadPoolExecutor() as others:
        calls = [lambda: stream.push([2]), lambda: stream.submit([2]), lambda: client.push_many({stream: [2]})]
        waiting = [others.submit(call) for call in calls]
        until(lambda: all(call.running() for call in waiting))
        client.close()
        assert [str(call.exception(20)) for call in waiting] == ["the client is closed"] * 3
    assert isinstance(first.exception(), recurd.Unanswered)


def test_a_closed_client_leaves_nobody_waiting(mute: Mute) -> None:
    client = recurd.connect(mute.endpoint, timeout_seconds=60)
    stream = client.open("s")
    pending = stream.submit([1])
    failed: list[BaseException] = []

    def wait() -> None:
        try:
            stream.push([1])
        except recurd.RecurdError as error:
            failed.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    until(lambda: len(mute.records) == 2)
    client.close()
    waiting.join(20)
    assert isinstance(pending.exception(0), recurd.Unanswered)
    assert [type(error) for error in failed] == [recurd.Unanswered]
    client.close()
    for call in (lambda: stream.push([1]), lambda: client.open("x"), stream.reset, stream.close):
        with pytest.raises(recurd.RecurdError, match="the client is closed"):
            call()  # type: ignore[operator]


_SCRIPT = """
import os, signal, sys, threading, time, recurd
client = recurd.connect(sys.argv[1], timeout_seconds=60)
stream = client.open("s")
"""


def run_script(body: str, endpoint: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "error", "-c", _SCRIPT + body, endpoint]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_ctrl_c_ends_every_waiting_call(mute: Mute) -> None:
    result = run_script(
        """
def interrupted(call):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        call()
    except KeyboardInterrupt:
        print("interrupted")
interrupted(lambda: stream.push([1]))
interrupted(stream.reset)
interrupted(stream.close)
client.close()
interrupted(lambda: recurd.connect("tcp://127.0.0.1:9", timeout_seconds=60))
""",
        mute.endpoint,
    )
    assert (result.stdout, result.stderr, result.returncode) == ("interrupted\n" * 4, "", 0)


def test_a_program_that_ends_without_closing_does_not_hang(mute: Mute) -> None:
    result = run_script("stream.submit([1])", mute.endpoint)
    assert (result.stderr, result.returncode) == ("", 0)


def test_a_forked_child_is_told_and_does_not_hang(mute: Mute) -> None:
    result = run_script(
        """
child = os.fork()
if not child:
    try:
        stream.push([1])
    except recurd.RecurdError as error:
        print(error, flush=True)
    client.close()
    sys.exit(3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
client.close()
""",
        mute.endpoint,
    )
    assert result.stdout == "this client was connected before the fork; connect in the process that uses it\n3\n"
    assert (result.stderr, result.returncode) == ("", 0)


def test_the_engine_knows_no_socket_no_thread_and_no_runtime() -> None:
    """It is driven by frames and times; tests and other servers drive it without a network."""
    script = "import sys, recurd.engine; print(*sorted({'zmq', 'onnxruntime', 'lmdb'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_importing_recurd_loads_nothing_and_a_client_needs_only_zmq_numpy_and_msgspec() -> None:
    script = """
import sys, recurd
assert not {"zmq", "numpy", "onnx"} & set(sys.modules), "recurd alone"
recurd.connect
recurd.aio.connect
import recurd.cli.stream
print(*sorted({"zmq", "numpy", "msgspec", "onnx", "onnxruntime", "torch", "prometheus_client", "structlog"}
    & set(sys.modules)))
"""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.split() == ["msgspec", "numpy", "zmq"]


@pytest.mark.parametrize("seconds", [0, -1, math.inf, math.nan, "60"])
def test_an_idle_time_out_is_a_number(mute: Mute, seconds: Any) -> None:
    with (
        recurd.connect(mute.endpoint, timeout_seconds=20) as client,
        pytest.raises(ValueError, match="over 0, or None"),
    ):
        client.open("s", idle_timeout_seconds=seconds)
