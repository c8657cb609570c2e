"""A durable daemon that is killed while it works: with a real process, real clients and a disk that runs full."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import recurd
from dialogue import chunk, opening
from process import Dealer, Process, eventually
from recurd import wire
from recurd.errors import ExitCode
from recurd.journal import Journal
from recurd.wire import Type
from recurrent import Network

ROOT = Path(__file__).parents[2]
PUMP = Network()


@pytest.fixture(scope="module")
def pump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return PUMP.save(tmp_path_factory.mktemp("models") / "pump.onnx", proof=True)


def serve(folder: Path, pump: Path, journal: Path, *flags: str) -> Process:
    return Process(
        folder, pump, "--bind", f"ipc://{folder}/socket", "--metrics", "127.0.0.1:0", "--journal", journal, *flags
    )


def draw(seed: int, steps: int = 5) -> np.ndarray:
    return PUMP.draw(steps, np.random.default_rng(seed))


@pytest.mark.parametrize(("kills", "how"), [(20, []), (8, ["--stop"])])
def test_two_hundred_streams_and_twenty_kills_leave_every_bit_as_it_would_have_been(
    pump: Path, kills: int, how: list[str]
) -> None:
    command = [sys.executable, "bench/crash.py", str(pump), "--streams", "200", "--kills", str(kills), "--json", *how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["kills"] == kills
    assert outcome["records"] > 100 * kills
    wrong = {key: outcome[key] for key in ("wrong_results", "lost_results", "doubled_results", "wrong_states")}
    assert set(wrong.values()) == {0}, wrong


def test_a_client_goes_on_by_itself_over_a_restart(pump: Path, tmp_path: Path) -> None:
    with serve(tmp_path, pump, tmp_path / "journal", "--durability", "power") as first:
        first.ready()
        with recurd.connect(f"ipc://{tmp_path}/socket") as client:
            stream = client.open("s", model="pump")
            results = [stream.push(draw(1))]
            first.stop(signal.SIGKILL)
            with serve(tmp_path, pump, tmp_path / "journal", "--durability", "power") as second:
                second.ready()
                results.append(stream.push(draw(2)))
                metrics = second.get("/metrics")[1]

    whole = PUMP.run(np.concatenate([draw(1), draw(2)]))[0]["output"]
    np.testing.assert_allclose(np.concatenate(results), whole, rtol=1e-4, atol=1e-5)
    assert "streams=1" in second.log
    assert "recurd_commit_seconds_count" in metrics


def test_nobody_notices_that_a_durable_daemon_is_stopped_while_it_works(pump: Path, tmp_path: Path) -> None:
    config = tmp_path / "recurd.toml"
    config.write_text("[tick]\nrows = 1\nsteps = 1\n[limits]\nstream_credit = 8\nchunk_steps = 4096\n")
    with serve(tmp_path, pump, tmp_path / "journal", "--config", config) as first:
        first.ready()
        with recurd.connect(f"ipc://{tmp_path}/socket") as client:
            stream, other = client.open("s", model="pump"), client.open("other", model="pump")
            other.push(draw(1))
            futures = [stream.submit(draw(seed, 1200)) for seed in range(10)]
            eventually(lambda: first.metric('recurd_chunks_received_total{model="pump"}') >= 8)
            first.process.send_signal(signal.SIGTERM)
            first.expect("STOPPING=1")
            meanwhile = [other.submit(draw(2)), stream.submit(draw(10, 1200))]
            refused = 'recurd_refused_total{code="draining"}'
            eventually(lambda: first.metric(refused) >= 2)
            other_future = client.submit_many({other: draw(3)})[other]
            first.wait()
            with serve(tmp_path, pump, tmp_path / "journal", "--config", config) as second:
                second.ready()
                results = [future.result(30) for future in [*futures, meanwhile[1]]]
                others = [meanwhile[0].result(30), other_future.result(30)]
                late = client.open("late", model="pump").push(draw(1))

    whole = PUMP.run(np.concatenate([draw(seed, 1200) for seed in range(11)]))[0]["output"]
    np.testing.assert_allclose(np.concatenate(results), whole, rtol=1e-4, atol=1e-5)
    whole = PUMP.run(np.concatenate([draw(seed) for seed in (1, 2, 3)]))[0]["output"]
    np.testing.assert_allclose(np.concatenate(others), whole[5:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(late, whole[:5], rtol=1e-4, atol=1e-5)


def test_two_daemons_do_not_share_a_journal(pump: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with serve(tmp_path, pump, tmp_path / "journal") as first:
        first.ready()
        with serve(tmp_path / "other", pump, tmp_path / "journal") as second:
            assert second.wait() == ExitCode.JOURNAL
            assert "another daemon keeps its streams there" in second.log


def test_a_journal_that_is_in_use_is_not_read_through_beside_it(pump: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    command = [sys.executable, "-m", "recurd.journal", str(journal)]
    with serve(tmp_path, pump, journal) as daemon, recurd.connect(f"ipc://{tmp_path}/socket") as client:
        daemon.ready()
        stream = client.open("s")
        stream.push(draw(1))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, "another daemon keeps its streams there" in done.stderr) == (1, True)
        stream.push(draw(2))
        assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    with serve(tmp_path, pump, journal) as daemon, recurd.connect(f"ipc://{tmp_path}/socket") as client:
        daemon.ready()
        assert client.open("s", mode="resume").last_seq == 2


#: In the process that reads the journal through: waits where it begins to, and says which process it is.
HELD_UP = """
import os, sys, time
if "recurd.journal" in sys.orig_argv:
    import lmdb

    def held_up(*arguments, open=lmdb.open, **options):
        with open_file("AT.part", "w") as file:
            file.write(str(os.getpid()))
        os.rename("AT.part", "AT")
        while not os.path.exists("GO"):
            time.sleep(0.01)
        return open(*arguments, **options)

    open_file, lmdb.open = open, held_up
"""


@pytest.mark.parametrize("what", ["stop", "reader killed", "daemon killed"])
def test_whatever_ends_a_start_while_the_journal_is_checked_costs_nothing(
    pump: Path, tmp_path: Path, what: str
) -> None:
    journal, at, go = (tmp_path / name for name in ("journal", "at", "go"))
    with serve(tmp_path, pump, journal) as daemon, recurd.connect(f"ipc://{tmp_path}/socket") as client:
        daemon.ready()
        client.open("s").push(draw(1))
        daemon.stop(signal.SIGKILL)
    (tmp_path / "sitecustomize.py").write_text(HELD_UP.replace("AT", str(at)).replace("GO", str(go)))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    arguments = [pump, "--bind", f"ipc://{tmp_path}/socket", "--metrics", "", "--journal", journal]
    with Process(tmp_path, *arguments, PYTHONPATH=path) as daemon:
        eventually(at.exists)
        reader = int(at.read_text())
        if what == "stop":  # as systemd does it, to all processes of the service
            daemon.process.send_signal(signal.SIGTERM)
            os.kill(reader, signal.SIGTERM)
            go.touch()
            assert daemon.wait() == 0
            assert "event=stopped" in daemon.log
        elif what == "reader killed":
            os.kill(reader, signal.SIGKILL)
            assert daemon.wait() == ExitCode.BUG
            assert "the journal is not checked: signal 9 ended the process that read it" in daemon.log
        else:
            daemon.process.kill()
            daemon.wait()
            eventually(lambda: not _cmdline(reader))
    with serve(tmp_path, pump, journal) as daemon, recurd.connect(f"ipc://{tmp_path}/socket") as client:
        daemon.ready()
        assert client.open("s", mode="resume").last_seq == 1


def _cmdline(pid: int) -> bytes:
    """Of a process; empty for one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_a_damaged_journal_ends_the_start_with_one_sentence(pump: Path, tmp_path: Path) -> None:
    with serve(tmp_path, pump, tmp_path / "journal") as daemon:
        daemon.ready()
        with recurd.connect(f"ipc://{tmp_path}/socket") as client:
            client.open("s", model="pump").push(draw(1))
        daemon.stop(signal.SIGTERM)
    data = tmp_path / "journal" / "data.mdb"
    data.write_bytes(data.read_bytes()[:5000])

    with serve(tmp_path, pump, tmp_path / "journal") as daemon:
        assert daemon.wait() == ExitCode.JOURNAL
        assert daemon.log.rstrip().splitlines()[-1].startswith(f"recurd: {tmp_path}/journal: the journal is damaged")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB; it takes root to have one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("is_new", [True, False])
def test_a_disk_that_is_full_at_the_start_is_no_damage(
    pump: Path, small_disk: Path, tmp_path: Path, is_new: bool
) -> None:
    folder = small_disk / "journal"
    if not is_new:
        with contextlib.closing(Journal(folder, "process")):
            pass
    with (small_disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(4096)):
            pass
    with serve(tmp_path, pump, folder) as daemon:
        assert daemon.wait() == ExitCode.JOURNAL
        last = daemon.log.rstrip().splitlines()[-1]
    assert last == f"recurd: {folder}: cannot be {'opened' if is_new else 'written'}: No space left on device"
    (small_disk / "filler").unlink()
    with serve(tmp_path, pump, folder) as daemon:
        daemon.ready()


@pytest.mark.parametrize("left", [0, 4096, 8192])
def test_a_full_disk_holds_everything_up_and_loses_nothing(
    pump: Path, small_disk: Path, tmp_path: Path, left: int
) -> None:
    with serve(tmp_path, pump, small_disk / "journal") as daemon:
        daemon.ready()
        with recurd.connect(f"ipc://{tmp_path}/socket") as client:
            stream, big = client.open("s", model="pump"), client.open("big", model="pump")
            results = [stream.push(draw(1))]
            ballast = small_disk / "ballast"
            _fill(ballast)
            os.truncate(ballast, ballast.stat().st_size - left)  # room for a part of what is written
            futures = [stream.submit(draw(seed)) for seed in range(2, 12)]
            long = big.submit(draw(99, 4000))  # its result needs pages that the store does not have
            eventually(lambda: daemon.metric("recurd_journal_failures_total") > 0)
            eventually(lambda: daemon.get("/readyz")[0] == 503)
            assert not long.done()
            export = [sys.executable, "-m", "recurd", "state", "export", str(tmp_path / "f"), "--timeout", "2"]
            export += ["--endpoint", f"ipc://{tmp_path}/socket"]
            done = subprocess.run(export, capture_output=True, text=True, timeout=60, check=False)
            assert (done.returncode, "No space left on device" in done.stderr) == (1, True), done.stderr
            ballast.unlink()
            long.result(60)
            results += [future.result(60) for future in futures]
        assert "No space left on device" in daemon.log
        assert "journal_recovered" in daemon.log
        assert daemon.stop(signal.SIGTERM) == 0

    whole = PUMP.run(np.concatenate([draw(seed) for seed in range(1, 12)]))[0]["output"]
    np.testing.assert_allclose(np.concatenate(results), whole, rtol=1e-4, atol=1e-5)


def _fill(path: Path) -> None:
    with path.open("wb") as file:
        try:
            while True:
                os.write(file.fileno(), bytes(4096))
        except OSError:
            return


BROKEN = """
import os
from recurd.model import Model

def broken(method, flag):
    def call(self, *arguments):
        if os.path.exists(flag):
            raise RuntimeError("CUDA error: unspecified launch failure")
        return method(self, *arguments)
    return call

Model.run, Model.rows = broken(Model.run, "RUN"), broken(Model.rows, "ROWS")
"""


@pytest.mark.parametrize("kind", [Type.CHUNK, Type.STATE])
def test_a_run_that_raises_ends_no_daemon_but_a_device_that_is_gone_does(tmp_path: Path, kind: Type) -> None:
    """What goes wrong in a device is put into the daemon's process from outside."""
    run, rows = tmp_path / "run", tmp_path / "rows"
    (tmp_path / "sitecustomize.py").write_text(BROKEN.replace("RUN", str(run)).replace("ROWS", str(rows)))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    model = PUMP.save(tmp_path / "pump.onnx")
    arguments = [model, "--bind", "tcp://127.0.0.1:*", "--metrics", "", "--journal", tmp_path / "journal"]
    x = PUMP.draw(4, np.random.default_rng(0))
    with Process(tmp_path, *arguments, PYTHONPATH=path) as daemon, Dealer(daemon.ready().endpoint) as dealer:
        handle = dealer.handle("s")
        results = [dealer.ask(wire.frame(chunk(handle, 1, x))).output]
        run.touch()
        assert dealer.ask(wire.frame(chunk(handle, 2, x, ack=1))).code == "run_failed"
        run.unlink()
        results.append(dealer.ask(wire.frame(chunk(handle, 2, x, ack=1))).output)
        run.touch()
        rows.touch()
        last = wire.frame(chunk(handle, 3, x, ack=2))
        if kind is Type.STATE:
            last = wire.pack(Type.STATE, flags=1, handle=handle, generation=1, seq=3, ack=2)
        dealer.send(last)
        assert daemon.wait() == ExitCode.DEVICE_LOST
        assert "recurd: the device does not answer any more: CUDA error" in daemon.log
    run.unlink()
    rows.unlink()
    with Process(tmp_path, *arguments, PYTHONPATH=path) as daemon, Dealer(daemon.ready().endpoint) as dealer:
        assert dealer.ask(opening("s", mode="resume", generation=1)).body["last_seq"] == 2
        results.append(dealer.ask(wire.frame(chunk(handle, 3, x, ack=2))).output)

    np.testing.assert_allclose(np.concatenate(results), PUMP.run(np.concatenate([x] * 3))[0]["output"], rtol=1e-4)
