"""The load generator: what it counts is what the daemon did, and it leaves nothing behind."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from recurd import wire
from recurd.dealer import Connection
from recurd.errors import Code, RecurdError, Refused, Unanswered
from recurd.fleet import Fleet
from recurd.latency import Latencies
from recurd.load import Plan, run

CONTRACT = {
    "input": {"dtype": "float32", "shape": [2]},
    "heads": [{"dtype": "float32", "shape": [3], "per": "step"}, {"dtype": "float32", "shape": [1], "per": "last"}],
}
HANDLES = [70, 50, 60]
STEPS = 4
RESULT_BYTES = (STEPS * 3 + 1) * 4
_RUNS = itertools.count()


def plan(daemon: Any, **changes: Any) -> Plan:
    """A short run with stream names of its own."""
    short = {"model": "sum", "streams": 8, "chunk_steps": 3, "seconds": 0.3, "warm_up_seconds": 0.1}
    return Plan(endpoint=daemon.endpoint, run=f"test{next(_RUNS)}", **(short | changes))


# --- against a real daemon ---


@pytest.mark.parametrize("records", [1, 5])
def test_a_closed_loop_is_answered_over_any_frames_and_connections(daemon: Any, records: int) -> None:
    report = run(plan(daemon, records=records, connections=3))

    assert report.clean
    assert report.errors == {}
    assert report.connections == 3
    assert report.chunks > 8
    assert report.steps_per_second == pytest.approx(3 * report.chunks_per_second, abs=1)
    assert report.latency_ms is not None
    assert 0 < report.latency_ms.p50 <= report.latency_ms.p99 <= report.latency_ms.p999 <= report.latency_ms.max


def test_an_open_loop_sends_what_its_schedule_says(daemon: Any) -> None:
    report = run(plan(daemon, rate=400.0, seconds=0.5, streams=3))

    assert report.clean
    # those due at the very end may be answered after it
    assert 150 <= report.chunks <= 250


def test_models_with_several_heads_are_checked_too(daemon: Any) -> None:
    report = run(plan(daemon, model="two"))

    assert report.clean
    assert report.chunks


def test_the_streams_are_closed_at_the_end(daemon: Any) -> None:
    done = plan(daemon, streams=40)
    run(done)

    with zmq.Context() as context, Connection(context, daemon.endpoint, 5.0) as connection:
        connection.hello()
        connection.send(
            wire.frame(
                wire.control(wire.Type.OPEN, wire.Open(stream=f"bench-{done.run}-39", model="sum", mode="resume"))
            )
        )
        assert connection.socket.poll(5000)
        header, _ = wire.decode(connection.socket.recv())
    assert header.code == Code.CLOSED


def test_a_stall_shows_in_the_latency_of_everything_that_was_due_meanwhile(
    own_daemon: Callable[[], Any],
) -> None:
    process = own_daemon()
    calls: list[int] = []

    def stall(fraction: float) -> None:
        if fraction > 0.3 and not calls:
            calls.append(signal.SIGSTOP)
            process.process.send_signal(signal.SIGSTOP)
        elif fraction > 0.7 and calls == [signal.SIGSTOP]:
            calls.append(signal.SIGCONT)
            process.process.send_signal(signal.SIGCONT)

    report = run(plan(process, rate=200.0, seconds=2.0, warm_up_seconds=0.0), progress=stall)

    assert calls == [signal.SIGSTOP, signal.SIGCONT]
    assert report.latency_ms is not None
    assert report.latency_ms.max > 500
    # a quarter of all chunks was due while it stood still, not the one or few a closed loop would have sent
    assert report.latency_ms.p99 > 400
    assert report.unanswered == 0


def test_a_daemon_that_falls_silent_ends_the_run_in_time(own_daemon: Callable[[], Any]) -> None:
    process = own_daemon()

    def stop(fraction: float) -> None:
        process.process.send_signal(signal.SIGSTOP)

    begin = time.monotonic()
    with pytest.raises(Unanswered, match=r"no answer from tcp://.* within 0.5 s"):
        run(plan(process, seconds=60.0, timeout_seconds=0.5), progress=stop)
    assert time.monotonic() - begin < 20


def test_a_plan_that_does_not_fit_the_daemon_is_refused_in_one_sentence(daemon: Any) -> None:
    with pytest.raises(Refused, match="no model 'pump', it serves sum, two"):
        run(plan(daemon, model="pump"))
    with pytest.raises(Refused, match=r"several models \(sum, two\); name one"):
        run(plan(daemon, model=None))
    with pytest.raises(Refused, match="at most 4096 steps"):
        run(plan(daemon, chunk_steps=5000))
    assert run(plan(daemon, streams=500)).clean  # more than there are slots


@pytest.fixture
def own_daemon(daemon: Any, sum_model: Path) -> Any:
    """Starts a daemon that a test may harm."""
    started: list[Any] = []

    def start() -> Any:
        started.append(type(daemon)(sum_model))
        return started[-1]

    yield start
    for one in started:
        one.kill()


# --- the command ---


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "recurd", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_command_starts_a_daemon_measures_it_and_stops_it(sum_model: Path) -> None:
    done = bench(
        sum_model, "--device", "cpu", "--streams", "4", "--seconds", "0.3", "--warm-up-seconds", "0.1", "--json"
    )

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["chunks"] > 0
    assert report["errors"] == {}
    assert report["daemon_cpu_seconds"] >= 0


def test_the_command_prints_its_figures_for_people(daemon: Any) -> None:
    done = bench("--endpoint", daemon.endpoint, "--model", "sum", "--seconds", "0.2", "--streams", "2")

    assert done.returncode == 0, done.stderr
    for word in ("throughput", "chunks/s", "steps/s", "p50", "p99.9", "errors       none", "retries"):
        assert word in done.stdout


def test_a_model_that_cannot_be_served_gives_the_daemons_sentence_and_exit_code(tmp_path: Path) -> None:
    done = bench(tmp_path / "none.onnx")

    assert done.returncode == 65
    assert done.stderr.startswith("recurd: ")
    assert "none.onnx" in done.stderr


@pytest.mark.parametrize(
    "arguments", [[], ["m.onnx", "--endpoint", "tcp://127.0.0.1:1"], ["--endpoint", "tcp://x:1", "--threads", "1"]]
)
def test_arguments_that_do_not_go_together_are_refused(arguments: list[str]) -> None:
    done = bench(*arguments)

    assert done.returncode == 2
    assert "--endpoint" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_the_daemon_too(sum_model: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "recurd", "bench", str(sum_model), "--device", "cpu", "--seconds", "300"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        process.communicate()
        pytest.skip("this kernel does not list a process's children")
    found = wait_for(lambda: children.read_text().split())

    process.send_signal(number)
    _, errors = process.communicate(timeout=30)

    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert not [pid for pid in found if os.path.exists(f"/proc/{pid}")]


def wait_for(condition: Callable[[], Any]) -> Any:
    """The condition's first true value."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if value := condition():
            return value
    raise AssertionError("it did not come true")


# --- the streams as arrays ---


def fleet(window: int = 1) -> Fleet:
    handles = np.array(HANDLES, np.uint64)
    return Fleet(CONTRACT, handles, np.ones(3, np.uint32), chunk_steps=STEPS, window=window, seed=1)


def result(index: int, seq: int, **changes: Any) -> wire.Record:
    fields = {"dtype": wire.Dtype.FLOAT32, "size": RESULT_BYTES, "steps": STEPS, "width": 4, "generation": 1}
    return wire.pack(wire.Type.RESULT, handle=HANDLES[index], seq=seq, **(fields | changes)), bytes(RESULT_BYTES)


def refusal(index: int, seq: int, code: Code, retry_after_seconds: float | None = None) -> wire.Record:
    body = wire.Error(code=code.word, text="", retry_after_seconds=retry_after_seconds)
    return wire.control(wire.Type.ERROR, body, code=code, generation=1, handle=HANDLES[index], seq=seq)


def send_all(streams: Fleet, due: int, now: float = 0.0) -> None:
    while len(ids := streams.ready(np.full(3, due), now)):
        streams.send(ids, 1)


@pytest.mark.parametrize("records", [1, 2, 3])
def test_frames_hold_every_streams_next_record(records: int) -> None:
    streams = fleet()

    frames = streams.send(np.array([0, 2, 1]), records)

    assert len(frames) == -(-3 // records)
    chunks = []
    for frame in frames:
        header, payload = wire.decode(frame)
        chunks += wire.decode_multi(header, payload) if header.type == wire.Type.MULTI else [(header, payload)]
    assert [header.handle for header, _ in chunks] == [70, 60, 50]
    assert {(header.type, header.seq, header.ack, header.steps, header.width) for header, _ in chunks} == {
        (3, 1, 0, 4, 2)
    }
    assert len({bytes(payload) for _, payload in chunks}) == 3
    assert all(len(payload) == STEPS * 2 * 4 for _, payload in chunks)


def test_answers_free_the_next_record_of_their_streams() -> None:
    streams = fleet()
    send_all(streams, 1)

    answers = streams.take([wire.multi([result(2, 1), result(0, 1)]), wire.frame(result(1, 1))], 1.0)

    assert answers.ids.tolist() == [2, 0, 1]
    assert answers.seqs.tolist() == [1, 1, 1]
    assert streams.answered.tolist() == [1, 1, 1]


def test_several_answers_of_one_stream_are_taken_in_order() -> None:
    streams = fleet(window=8)
    send_all(streams, 3)

    streams.take([wire.multi([result(0, 1), result(1, 1), result(0, 2)]), wire.frame(result(0, 3))], 1.0)

    assert streams.answered.tolist() == [3, 1, 0]


@pytest.mark.parametrize(
    ("records", "complaint"),
    [
        ([result(0, 2)], "result 2 of a stream came, 1 is the next"),
        ([result(0, 1), result(1, 1), result(0, 1)], "result 1 of a stream came, 2 is the next"),
        ([result(0, 1, width=3)], "width is 3, not 4"),
        ([result(0, 1, steps=5)], "steps is 5, not 4"),
        ([result(0, 1, dtype=wire.Dtype.FLOAT64)], "dtype is 4, not 1"),
        ([result(0, 1, flags=wire.Flag.DUPLICATE)], "came twice"),
        ([result(0, 1, generation=2)], "generation 2"),
        ([(wire.pack(wire.Type.RESULT, handle=71, seq=1), b"")], "not ours"),
        ([(wire.pack(wire.Type.DONE, handle=70, seq=1), b"")], "type 133"),
        ([(refusal(0, 1, Code.BUSY)[0], b"{}")], "JSON"),
    ],
)
def test_a_wrong_answer_ends_the_run(records: list[wire.Record], complaint: str) -> None:
    streams = fleet()
    send_all(streams, 1)

    with pytest.raises(RecurdError, match=complaint):
        streams.take([wire.multi([(_sized(header, payload), payload) for header, payload in records])], 1.0)


def _sized(header: bytes, payload: wire.Buffer) -> bytes:
    return header[:8] + len(payload).to_bytes(4, "little") + header[12:]


def test_a_result_for_what_was_not_sent_ends_the_run() -> None:
    with pytest.raises(RecurdError, match="not sent"):
        fleet().take([wire.frame(result(0, 1))], 1.0)


def test_refused_records_are_sent_again_when_all_in_flight_is_answered() -> None:
    streams = fleet(window=8)
    send_all(streams, 3)
    streams.take([wire.frame(result(0, 1)), wire.frame(refusal(0, 2, Code.BUSY, 0.5))], 1.0)

    assert streams.ready(np.array([4, 0, 0]), 2.0).tolist() == []  # record 3 is not answered yet
    streams.take([wire.frame(refusal(0, 3, Code.GAP))], 2.0)
    assert streams.retry_at == 2.0
    assert streams.ready(np.array([4, 0, 0]), 2.0).tolist() == [0]
    header, _ = wire.decode(streams.send(np.array([0]), 1)[0])

    assert (header.seq, header.ack) == (2, 1)
    assert streams.retries == 2
    assert dict(streams.errors) == {"busy": 1, "gap": 1}
    assert not streams.lost.any()


def test_a_retry_waits_as_long_as_the_daemon_asked() -> None:
    streams = fleet()
    send_all(streams, 1)
    streams.take([wire.frame(refusal(1, 1, Code.BUSY, 0.5))], 1.0)

    assert streams.retry_at == 1.5
    assert streams.ready(np.ones(3), 1.4).tolist() == []
    assert streams.ready(np.ones(3), 1.5).tolist() == [1]


def test_a_stream_that_ended_is_given_up_and_counted() -> None:
    streams = fleet()
    send_all(streams, 1)

    streams.take([wire.frame(refusal(1, 1, Code.EXPIRED))], 1.0)

    assert streams.lost.tolist() == [False, True, False]
    assert streams.ready(np.full(3, 9), 9.0).tolist() == []
    assert dict(streams.errors) == {"expired": 1}


# --- latencies ---


def test_percentiles_are_exact_to_one_percent() -> None:
    latencies = Latencies()
    values = np.random.default_rng(3).permutation(np.linspace(0.001, 1.0, 1000))
    for part in np.array_split(values, 7):
        latencies.add(part)

    found = latencies.milliseconds()

    assert found is not None
    assert found.p50 == pytest.approx(500, rel=0.01)
    assert found.p99 == pytest.approx(990, rel=0.01)
    assert found.p999 == pytest.approx(999, rel=0.01)
    assert found.max == 1000


def test_no_latencies_have_no_percentiles() -> None:
    latencies = Latencies()
    latencies.add(np.zeros(0))

    assert latencies.milliseconds() is None
