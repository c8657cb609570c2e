"""``recurd serve`` as a process: start, health, shutdown, and every way in which it cannot start."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import recurd
from dialogue import Reply, chunk, hello, opening, ping
from process import Dealer, Process, eventually
from recurd import wire
from recurd.errors import Code, ExitCode
from recurd.wire import Type
from recurrent import Network

PUMP = Network()
#: Work for long enough that a signal comes while it is under way: one step a tick.
SLOW = "[tick]\nrows = 1\nsteps = 1\n[limits]\nstream_credit = 64\nchunk_steps = 4096\n"


@pytest.fixture(scope="module")
def pump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return PUMP.save(tmp_path_factory.mktemp("models") / "pump.onnx", proof=True)


def serve(folder: Path, *arguments: str | Path, config: str = "", **environment: str) -> Process:
    (folder / "recurd.toml").write_text(config)
    flags = ["--bind", "tcp://127.0.0.1:0", "--metrics", "127.0.0.1:0", "--config", folder / "recurd.toml"]
    return Process(folder, *flags, *arguments, **environment)


def draw(steps: int) -> np.ndarray:
    return PUMP.draw(steps, np.random.default_rng(0))


def queue_work(daemon: Process, chunks: int, steps: int) -> tuple[Dealer, int]:
    """A connection whose stream has so many chunks accepted."""
    dealer = Dealer(daemon.endpoint)
    handle = dealer.handle("s")
    dealer.send(wire.multi([chunk(handle, seq, draw(steps)) for seq in range(1, chunks + 1)]))
    eventually(lambda: daemon.metric('recurd_chunks_received_total{model="pump"}') >= chunks)
    return dealer, handle


# --- time ---


@pytest.mark.parametrize("journal", [False, True])
async def test_streams_whose_clients_were_there_all_the_time_outlive_a_standstill(
    pump: Path, tmp_path: Path, journal: bool
) -> None:
    flags = ["--journal", tmp_path / "journal"] if journal else []
    with serve(tmp_path, pump, *flags) as daemon:
        async with recurd.aio.connect(daemon.ready().endpoint) as client:
            names = [f"s{number}" for number in range(3000)]
            streams = await asyncio.gather(*[client.open(name, idle_timeout_seconds=2) for name in ["idle", *names]])
            idle = streams.pop(0)
            await client.push_many({stream: draw(1) for stream in streams})
            futures = await client.submit_many({stream: draw(1) for stream in streams})  # more than one round reads
            await asyncio.wait(futures.values(), return_when=asyncio.FIRST_COMPLETED)
            daemon.process.send_signal(signal.SIGSTOP)  # some are answered; their client waits for the others
            assert (await asyncio.wait(futures.values(), timeout=3))[1]
            daemon.process.send_signal(signal.SIGCONT)
            results = await asyncio.gather(*futures.values())
            assert [len(result) for result in results] == [1] * len(streams)
            await client.push_many({stream: draw(1) for stream in streams})
            assert "event=stood_still" in daemon.log
            expired = 'recurd_streams_ended_total{reason="expired"}'
            await asyncio.to_thread(eventually, lambda: daemon.metric(expired) >= 1)
            with pytest.raises(recurd.Broken) as broken:
                await idle.push(draw(1))
            assert broken.value.code is Code.EXPIRED


# --- shutdown ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_accepted_is_answered_before_the_end_and_nothing_new_is_taken(
    pump: Path, tmp_path: Path, number: int
) -> None:
    with serve(tmp_path, pump, config=SLOW) as daemon:
        dealer, handle = queue_work(daemon.ready(), chunks=10, steps=1200)
        with dealer, Dealer(daemon.endpoint) as other:
            daemon.process.send_signal(number)
            daemon.expect("STOPPING=1")
            for frame in (opening("new"), hello()):
                other.send(frame)
            dealer.send(wire.frame(chunk(handle, 11, draw(1))))
            with Dealer(daemon.endpoint, greet=False) as stranger:
                refusals = [other.take(), stranger.ask(hello())]
            page = daemon.get("/readyz")
            answers = [dealer.take() for _ in range(11)]
            assert daemon.wait() == ExitCode.OK

    assert page == (503, "draining: the daemon is shutting down\n")
    assert [reply.code for reply in refusals] == ["draining", "draining"]
    assert [reply.code for reply in answers if reply.code] == ["draining"]
    results = [reply.output for reply in answers if reply.type == Type.RESULT]
    truth = PUMP.run(np.concatenate([draw(1200)] * 10))[0]["output"]
    np.testing.assert_allclose(np.concatenate(results), truth, rtol=0, atol=1e-5)
    assert "event=stopped" in daemon.log
    assert "dropped_chunks=0" in daemon.log


def test_an_idle_daemon_stops_at_once(pump: Path, tmp_path: Path) -> None:
    with serve(tmp_path, pump) as daemon:
        assert daemon.ready().stop(signal.SIGTERM) == ExitCode.OK
    assert "Traceback" not in daemon.log


def test_the_second_signal_ends_it_with_work_undone(pump: Path, tmp_path: Path) -> None:
    with serve(tmp_path, pump, config=SLOW + "[timeouts]\nshutdown_seconds = 1e6\n") as daemon:
        dealer, _ = queue_work(daemon.ready(), chunks=60, steps=4000)
        with dealer:
            daemon.process.send_signal(signal.SIGINT)
            daemon.expect("STOPPING=1")
            assert daemon.stop(signal.SIGINT) == ExitCode.OK
    assert "event=stopping_at_once" in daemon.log
    assert "dropped_chunks=0" not in daemon.log


def test_the_shutdown_ends_when_its_time_is_over(pump: Path, tmp_path: Path) -> None:
    with serve(tmp_path, pump, config=SLOW + "[timeouts]\nshutdown_seconds = 0.2\n") as daemon:
        dealer, _ = queue_work(daemon.ready(), chunks=60, steps=4000)
        with dealer:
            assert daemon.stop(signal.SIGTERM) == ExitCode.OK
    assert "dropped_chunks=0" not in daemon.log


# --- health ---


def test_ready_then_full_then_ready_again(pump: Path, tmp_path: Path) -> None:
    with serve(tmp_path, pump, "--slots", "2", config="[limits]\nhost_state_bytes = 0\n") as daemon:
        daemon.ready()
        assert daemon.get("/readyz") == (200, "ready\n")
        with Dealer(daemon.endpoint) as dealer:
            handles = [dealer.handle(name) for name in "ab"]
            for handle in handles:
                dealer.ask(wire.frame(chunk(handle, 1, np.ones((1, 3), np.float32))))
            assert dealer.ask(opening("c")).code == "no_slots"
            status, text = daemon.get("/readyz")  # as soon as the last one is told
            assert (status, text.partition(":")[0]) == (503, "full")
            assert daemon.get("/healthz") == (200, "ok\n")
            assert daemon.metric('recurd_stream_slots{kind="used",model="pump"}') == 2
            dealer.ask(wire.pack(Type.CLOSE, handle=handles[0]))
            assert daemon.get("/readyz") == (200, "ready\n")


def test_while_models_are_loaded_it_is_healthy_and_not_ready(pump: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "slow.onnx"
    os.mkfifo(pipe)  # a model file that takes its time
    address = f"127.0.0.1:{_free_port()}"

    def page(path: str) -> tuple[int, str] | None:
        try:
            return daemon.get(path, address)
        except OSError:
            return None  # not yet bound

    with serve(tmp_path, pipe, "--metrics", address) as daemon:
        assert eventually(lambda: page("/readyz")) == (503, "loading: models are being loaded\n")
        assert page("/healthz") == (200, "ok\n")
        pipe.write_bytes(pump.read_bytes())
        daemon.ready()
        assert page("/readyz") == (200, "ready\n")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_the_watchdog_is_fed_while_the_daemon_is_idle(pump: Path, tmp_path: Path) -> None:
    with serve(tmp_path, pump, WATCHDOG_USEC="300000") as daemon:
        daemon.ready()
        for _ in range(5):
            daemon.expect("WATCHDOG=1")


def test_what_is_counted_is_seen(pump: Path, tmp_path: Path) -> None:
    with serve(tmp_path, pump) as daemon:
        with Dealer(daemon.ready().endpoint) as dealer:
            handle = dealer.handle("s")
            for seq in (1, 2):
                assert dealer.ask(wire.frame(chunk(handle, seq, draw(5)))).type == Type.RESULT
        assert daemon.metric('recurd_chunks_processed_total{model="pump"}') == 2
        assert daemon.metric('recurd_steps_processed_total{model="pump"}') == 10
        assert daemon.metric('recurd_ticks_total{model="pump"}') == 2
        assert daemon.metric('recurd_streams{state="attached"}') == 1
        assert daemon.metric("recurd_device_fallback") == 0


# --- where it listens ---


def answers(reply: Reply) -> bool:
    return reply.type == Type.PONG


def test_it_serves_over_ipc_and_tcp_at_once(pump: Path, tmp_path: Path) -> None:
    path = tmp_path / "recurd.sock"
    with serve(tmp_path, pump, "--bind", f"ipc://{path}") as daemon:
        daemon.ready()
        for endpoint in (daemon.endpoint, f"ipc://{path}"):
            with Dealer(endpoint) as dealer:
                assert answers(dealer.ask(ping(1)))
        handle = None
        for endpoint in (daemon.endpoint, f"ipc://{path}"):  # one daemon: the stream is the same
            with Dealer(endpoint) as dealer:
                handle = handle or dealer.handle("s")
                assert dealer.handle("s") == handle


def refused(process: Process) -> tuple[int, str]:
    """Exit status and the last line of a daemon that does not start; it is one sentence and no traceback."""
    status = process.wait()
    *_, last = process.log.splitlines()
    assert "Traceback" not in process.log
    assert last.startswith("recurd: "), last
    return status, last


def test_an_ipc_path_that_is_served_is_not_taken_away(pump: Path, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path / 'recurd.sock'}"
    with serve(tmp_path, pump, "--bind", endpoint) as first:
        first.ready()
        with serve(tmp_path, pump, "--bind", endpoint) as second:
            status, text = refused(second)
        assert status == ExitCode.ADDRESS
        assert "another process serves it" in text
        with Dealer(endpoint) as dealer:
            assert answers(dealer.ask(ping(1)))
        assert first.stop(signal.SIGTERM) == 0
    with serve(tmp_path, pump, "--bind", endpoint) as third:  # what a crash leaves behind does not matter
        third.ready().process.kill()
        third.wait()
    with serve(tmp_path, pump, "--bind", endpoint) as fourth, Dealer(endpoint) as dealer:
        fourth.ready()
        assert answers(dealer.ask(ping(1)))


@pytest.mark.parametrize("flag", ["--bind", "--metrics"])
def test_an_address_in_use_is_told(pump: Path, tmp_path: Path, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with serve(tmp_path, pump, flag, f"tcp://{address}" if flag == "--bind" else address) as daemon:
            status, text = refused(daemon)
    assert status == ExitCode.ADDRESS
    assert address in text
    assert "in use" in text


def test_an_ipc_path_in_a_folder_that_is_not_there_is_told(pump: Path, tmp_path: Path) -> None:
    with serve(tmp_path, pump, "--bind", f"ipc://{tmp_path}/nowhere/s") as daemon:
        status, text = refused(daemon)
    assert status == ExitCode.ADDRESS
    assert "No such file" in text


# --- what it cannot start with ---


def test_a_model_that_is_not_there_is_told(tmp_path: Path) -> None:
    with serve(tmp_path, tmp_path / "missing.onnx") as daemon:
        status, text = refused(daemon)
    assert status == ExitCode.CONTRACT
    assert "missing.onnx: there is no such file" in text


def test_a_broken_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with serve(tmp_path, tmp_path / "broken.onnx") as daemon:
        status, text = refused(daemon)
    assert status == ExitCode.CONTRACT
    assert "broken.onnx: not a valid ONNX model" in text


@pytest.mark.parametrize("flags", [[], ["--check"]])
def test_a_model_that_no_longer_gives_its_golden_results_is_told_with_the_numbers(
    tmp_path: Path, flags: list[str]
) -> None:
    other = Network(seed=8)
    contract = PUMP.contract(PUMP.model())
    path = other.save(tmp_path / "pump.onnx", proof=PUMP.golden(contract))
    with serve(tmp_path, path, *flags) as daemon:
        status, text = refused(daemon)
    assert status == ExitCode.CONTRACT
    assert "is off by" in text
    assert "is allowed" in text


def test_two_models_of_one_name_are_told(pump: Path, tmp_path: Path) -> None:
    copy = PUMP.save(tmp_path / "copy.onnx")
    with serve(tmp_path, pump, copy) as daemon:
        status, text = refused(daemon)
    assert status == ExitCode.CONFIG
    assert "'pump'" in text


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("colour = 1", "colour: there is no such key"),
        ("slots = 0", "slots: expected"),
        ("[limits]\nstreams = 'many'", "limits.streams"),
        ("slots =", "not valid TOML"),
    ],
)
def test_a_wrong_configuration_is_told_by_its_key(pump: Path, tmp_path: Path, config: str, words: str) -> None:
    with serve(tmp_path, pump, config=config) as daemon:
        status, text = refused(daemon)
    assert status == ExitCode.CONFIG
    assert words in text


def test_a_gpu_that_cannot_be_had_is_told(pump: Path, tmp_path: Path) -> None:
    from recurd.model import resolve_device

    if resolve_device("auto")[1] is None:
        pytest.skip("there is a GPU here")
    with serve(tmp_path, pump, "--device", "cuda") as daemon:
        status, text = refused(daemon)
    assert status == ExitCode.DEVICE
    assert "'cuda' cannot be had" in text
    with serve(tmp_path, pump, "--device", "auto") as daemon:
        daemon.ready()
        assert "event=device_fallback" in daemon.log
        assert daemon.metric("recurd_device_fallback") == 1
        with Dealer(daemon.endpoint, greet=False) as dealer:
            device = dealer.ask(hello()).body["device"]
    assert device == {"wanted": "auto", "used": "cpu", "fallback": True}


# --- what it brings along ---


def test_serving_loads_no_framework(pump: Path, tmp_path: Path) -> None:
    """The daemon's machine needs no torch, keras or tensorflow, and pays for none that is there."""
    code = """
import signal, socket, sys, threading
from recurd.cli import main
from recurd.config import Config, Model
from recurd import server, aio, client, verify

class Stop(server.Server):
    def _announce(self):
        super()._announce()
        signal.raise_signal(signal.SIGTERM)

server.Server = Stop
settings = Config(bind=("tcp://127.0.0.1:0",), metrics="127.0.0.1:0", device="cpu", models=(Model(path=sys.argv[1]),))
status = server.serve(lambda: settings)
heavy = {"torch", "keras", "tensorflow", "jax", "onnxscript", "recurd_export"} & set(sys.modules)
print(status, *sorted(heavy))
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(pump)], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )

    assert result.stdout == "0\n", result.stdout + result.stderr


def test_sighup_changes_tenants_at_once_and_what_cannot_be_read_changes_nothing(pump: Path, tmp_path: Path) -> None:
    file = tmp_path / "recurd.toml"
    settings = f'bind = ["tcp://127.0.0.1:*"]\nmetrics = ""\n[[models]]\npath = "{pump}"\n'
    file.write_text(settings)
    with Process(tmp_path, "--config", file) as daemon, Dealer(daemon.ready().endpoint) as dealer:
        handle = dealer.handle("hall-1")

        file.write_text(settings + '[tenants.local]\nstreams = ["hall-*"]\nrights = ["stream"]\n')
        daemon.process.send_signal(signal.SIGHUP)
        eventually(lambda: "configuration_read" in daemon.log)
        assert dealer.ask(opening("cellar")).code == "forbidden"
        assert dealer.ask(wire.pack(Type.RESET, handle=handle, seq=1, generation=1)).code == "forbidden"

        file.write_text(settings + "[tenants.local]\nstreams = 1\n")
        daemon.process.send_signal(signal.SIGHUP)
        eventually(lambda: "reload_failed" in daemon.log)
        assert "tenants.local.streams: expected `array`, got `int`" in daemon.log
        assert dealer.ask(opening("cellar")).code == "forbidden"
        assert daemon.stop(signal.SIGTERM) == 0


def test_a_hangup_before_it_is_ready_ends_no_start(pump: Path, tmp_path: Path) -> None:
    with serve(tmp_path, pump) as daemon:
        handled = Path(f"/proc/{daemon.process.pid}/status")
        hangup = 1 << (signal.SIGHUP - 1)

        def is_taken() -> bool:
            masks = dict(line.split(":\t") for line in handled.read_text().splitlines() if line.startswith("Sig"))
            return bool((int(masks["SigIgn"], 16) | int(masks["SigCgt"], 16)) & hangup)

        eventually(is_taken)
        daemon.process.send_signal(signal.SIGHUP)
        assert daemon.ready().get("/readyz")[0] == 200
