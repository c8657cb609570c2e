"""New model files for a real daemon under load: nothing is lost, results are right on both sides, bad files change
nothing."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

import recurd
from process import Process, eventually
from recurd.contract import attach
from recurd.errors import Broken, ExitCode, Refused
from recurrent import Array, Network

OLD, NEW, THIRD = Network(), Network(seed=8), Network(seed=9)
WIDE = Network(features=4, outputs=1, seed=10)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def draw(seed: int, steps: int = 5, network: Network = OLD) -> Array:
    return network.draw(steps, np.random.default_rng(seed))


def truth(network: Network, *parts: Array) -> Array:
    return network.run(np.concatenate(parts))[0]["output"]


def put(network: Network, path: Path, **changes: Any) -> Path:
    """Write a file and move it to its place, as one should."""
    network.save(path.with_suffix(".new"), **({"proof": True} | changes))
    os.replace(path.with_suffix(".new"), path)
    return path


def serve(folder: Path, *flags: str | Path) -> Process:
    pump = folder / "pump.onnx"
    if not pump.exists():
        put(OLD, pump)
    return Process(folder, pump, "--bind", f"ipc://{folder}/socket", "--metrics", "127.0.0.1:0", *flags)


@contextlib.contextmanager
def configured(folder: Path, head: str = "") -> Iterator[tuple[Process, Path]]:
    """A daemon with the old file that reads a configuration, and the path of that."""
    put(OLD, folder / "pump.onnx")
    configuration = folder / "recurd.toml"
    configuration.write_text(head + '[[models]]\npath = "pump.onnx"\n')
    with Process(folder, "--config", configuration, "--bind", f"ipc://{folder}/socket", "--metrics", "") as daemon:
        yield daemon.ready(), configuration


def connect(folder: Path) -> recurd.Client:
    return recurd.connect(f"ipc://{folder}/socket")


def reload(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "recurd", "reload", "--endpoint", f"ipc://{folder}/socket", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def reloaded(folder: Path, *flags: str) -> dict[str, Any]:
    """The report on the one model."""
    done = reload(folder, "--json", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    (model,) = json.loads(done.stdout)["models"]
    assert isinstance(model, dict)
    return model


class Load:
    """Streams that push all the time, on a thread; what was sent and came is kept."""

    def __init__(self, folder: Path, names: list[str], mode: Any = "auto") -> None:
        self.sent: dict[str, list[Array]] = {name: [] for name in names}
        self.came: dict[str, list[Array]] = {name: [] for name in names}
        self.broken: dict[str, str] = {}
        self.rounds = 0
        self._folder, self._mode = folder, mode
        self._stop = threading.Event()
        self._failure: BaseException | None = None

    def _run(self) -> None:
        try:
            with connect(self._folder) as client:
                streams = {name: client.open(name, mode=self._mode) for name in self.sent}
                while not self._stop.is_set():
                    self._push(streams)
                    self.rounds += 1
        except BaseException as failure:
            self._failure = failure

    def _push(self, streams: dict[str, recurd.client.Stream]) -> None:
        futures = {}
        for number, (name, stream) in enumerate(streams.items()):
            for ahead in range(3):
                x = draw(1000 * self.rounds + 10 * number + ahead, 1 + (self.rounds + ahead) % 90)
                futures[name, ahead] = x, stream.submit(x)
        for (name, _), (x, future) in futures.items():
            try:
                result = future.result(30)
            except Broken as error:
                self.broken.setdefault(name, error.code.word)
                continue
            self.sent[name].append(x)
            self.came[name].append(result)
        for name in self.broken:
            streams.pop(name, None)

    @contextlib.contextmanager
    def running(self) -> Iterator["Load"]:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        try:
            self.goes_on()
            yield self
        finally:
            self.stop()
        assert self._failure is None, self._failure

    def stop(self) -> None:
        """Wait for what was sent; while there is still a daemon."""
        self._stop.set()
        self._thread.join(60)

    def goes_on(self, rounds: int = 3) -> None:
        end = self.rounds + rounds
        eventually(lambda: self._failure is not None or self.rounds >= end or self.broken)
        assert self._failure is None, self._failure

    def check(self, network: Network) -> None:
        for name, sent in self.sent.items():
            np.testing.assert_allclose(np.concatenate(self.came[name]), truth(network, *sent), **CLOSE)


NAMES = [f"s{number}" for number in range(8)]


def test_under_load_old_streams_finish_and_new_ones_get_the_new_file(tmp_path: Path) -> None:
    with serve(tmp_path) as daemon:
        daemon.ready()
        old, new = Load(tmp_path, NAMES), Load(tmp_path, [f"new-{name}" for name in NAMES])
        with old.running():
            put(NEW, tmp_path / "pump.onnx", version="2")
            model = reloaded(tmp_path)
            with new.running():
                old.goes_on()
                new.goes_on()
                info = daemon.get("/metrics")[1]
                slots = daemon.metric('recurd_stream_slots{kind="used",model="pump"}')
        counts = {key: model[key] for key in ("model", "outcome", "finishing")}

        assert (old.broken, new.broken) == ({}, {})
        old.check(OLD)
        new.check(NEW)
        assert counts == {"model": "pump", "outcome": "finish", "finishing": 8}
        assert 'recurd_model_info{device="cpu",model="pump",version="2"' in info
        assert slots == 16
        assert daemon.metric('recurd_reloads_total{outcome="finish"}') == 1
        with connect(tmp_path) as client:
            for name in NAMES:
                client.open(name, mode="resume").close()
        eventually(lambda: "version_dropped" in daemon.log)
        assert daemon.metric('recurd_stream_slots{kind="used",model="pump"}') == 8
        assert daemon.stop(signal.SIGTERM) == 0


def test_under_load_streams_keep_their_state_when_they_can(tmp_path: Path) -> None:
    with serve(tmp_path) as daemon:
        daemon.ready()
        load = Load(tmp_path, NAMES)
        with load.running():
            for version in ("2", "3"):
                put(OLD, tmp_path / "pump.onnx", version=version)
                model = reloaded(tmp_path)
                assert (model["outcome"], model["kept"]) == ("kept", 8)
                load.goes_on()
        load.check(OLD)
        assert daemon.log.count("event=model_replaced") == 2


def test_under_load_streams_end_by_choice_after_what_was_accepted(tmp_path: Path) -> None:
    with serve(tmp_path) as daemon:
        daemon.ready()
        load = Load(tmp_path, NAMES)
        with load.running():
            put(NEW, tmp_path / "pump.onnx")
            model = reloaded(tmp_path, "--incompatible", "restart")
            eventually(lambda: len(load.broken) == len(NAMES))
        load.check(OLD)  # all that was answered
        assert (model["outcome"], model["ending"]) == ("restart", 8)
        assert set(load.broken.values()) == {"reloaded"}
        again = Load(tmp_path, NAMES)
        with again.running():
            again.goes_on()
        again.check(NEW)
        assert daemon.metric('recurd_streams_ended_total{reason="reloaded"}') == 8


def test_streams_that_finish_can_be_ended_later(tmp_path: Path) -> None:
    with serve(tmp_path) as daemon:
        daemon.ready()
        with connect(tmp_path) as client:
            stream = client.open("s")
            stream.push(draw(1))
            put(NEW, tmp_path / "pump.onnx")
            assert reload(tmp_path).stdout == "pump: replaced; 1 streams finish on the former version\n"
            stream.push(draw(2))
            done = reload(tmp_path, "--incompatible", "restart")
            assert done.stdout == "pump: unchanged\n1 streams of versions replaced before end\n"
            with pytest.raises(Broken, match="reloaded"):
                stream.push(draw(3))
        eventually(lambda: "version_dropped" in daemon.log)


def test_a_state_is_never_one_of_other_weights_and_a_stream_that_went_over_has_its_own(tmp_path: Path) -> None:
    with serve(tmp_path) as daemon:
        daemon.ready()
        with connect(tmp_path) as client:
            stream, unused = client.open("s"), client.open("unused")
            stream.push(draw(1))
            old = stream.state()
            put(NEW, tmp_path / "pump.onnx")
            reloaded(tmp_path, "--incompatible", "finish")
            stream.set_state(old)  # it finishes on the former version
            np.testing.assert_allclose(stream.push(draw(2)), truth(OLD, draw(1), draw(2))[5:], **CLOSE)

            stream.reset()
            for one in (stream, client.open("later")):
                for give in (one.set_state, lambda state, one=one: one.reset(to=state)):
                    with pytest.raises(Refused, match="other weights") as refused:
                        give(old)
                    assert refused.value.code.word == "state_mismatch"
            np.testing.assert_allclose(stream.push(draw(3)), truth(NEW, draw(3)), **CLOSE)
            new = stream.state()
            assert new.state_hash == stream.contract["state_hash"] != old.state_hash
            stream.push(draw(4))
            stream.reset(to=new)
            np.testing.assert_allclose(stream.push(draw(5)), truth(NEW, draw(3), draw(5))[5:], **CLOSE)

            put(THIRD, tmp_path / "pump.onnx")
            reloaded(tmp_path, "--incompatible", "restart")
            unused.set_state(unused.state())
            np.testing.assert_allclose(unused.push(draw(6)), truth(THIRD, draw(6)), **CLOSE)
            with pytest.raises(Broken, match="reloaded"):
                stream.push(draw(7))


def test_a_client_knows_the_form_of_both_versions_also_after_it_reconnects(tmp_path: Path) -> None:
    with serve(tmp_path) as daemon:
        daemon.ready()
        with connect(tmp_path) as client:
            old = client.open("old")
            results = [old.push(draw(1))]
            put(WIDE, tmp_path / "pump.onnx")
            reloaded(tmp_path)
            wide = client.open("new")
            x = draw(1, network=WIDE)
            np.testing.assert_allclose(wide.push(x), truth(WIDE, x), **CLOSE)
            results.append(old.push(draw(2)))
            with connect(tmp_path) as other:
                taken = other.open("old", mode="resume")
                results.append(taken.push(draw(3)))
            assert client.models["pump"]["input"]["shape"] == [4]
        np.testing.assert_allclose(np.concatenate(results), truth(OLD, draw(1), draw(2), draw(3)), **CLOSE)


def test_the_memory_of_a_former_version_is_given_back(tmp_path: Path) -> None:
    wide, other = Network(hidden=64), Network(hidden=64, seed=8)  # a kilobyte a stream
    pump = put(wide, tmp_path / "pump.onnx")
    # Pages of an arena that nobody has used take no memory, but addresses.
    with serve(tmp_path, "--slots", "1000000") as daemon:
        daemon.ready()
        before = daemon.metric("process_virtual_memory_bytes")
        for network in (other, wide, other):
            put(network, pump)
            assert reloaded(tmp_path)["outcome"] == "finish"
        eventually(lambda: daemon.log.count("version_dropped") == 3)
        after = daemon.metric("process_virtual_memory_bytes")

    assert after - before < 0.7e9  # of 1.02 GB that the arena of one version takes


# --- SIGHUP, and the service manager ---


def test_a_signal_reloads_and_the_service_manager_is_told(tmp_path: Path) -> None:
    with serve(tmp_path) as daemon:
        daemon.ready()
        put(NEW, tmp_path / "pump.onnx")
        daemon.process.send_signal(signal.SIGHUP)
        told = daemon.expect("RELOADING=1")
        ready = daemon.expect("READY=1")

        assert int(told.partition("MONOTONIC_USEC=")[2]) > 0
        assert "STATUS=serving pump" in ready
        assert daemon.get("/healthz")[0] == 200
        with connect(tmp_path) as client:
            np.testing.assert_allclose(client.open("s").push(draw(1)), truth(NEW, draw(1)), **CLOSE)


def test_signals_that_come_during_a_reload_are_not_forgotten(tmp_path: Path) -> None:
    with serve(tmp_path) as daemon:
        daemon.ready()
        put(NEW, tmp_path / "pump.onnx")
        daemon.process.send_signal(signal.SIGHUP)
        daemon.expect("RELOADING=1")
        put(THIRD, tmp_path / "pump.onnx")
        for _ in range(5):
            daemon.process.send_signal(signal.SIGHUP)
        with connect(tmp_path) as client:
            number = iter(range(1000))
            eventually(
                lambda: np.allclose(client.open(f"s{next(number)}").push(draw(1)), truth(THIRD, draw(1)), **CLOSE)
            )
        eventually(lambda: daemon.log.count("event=reloaded") >= 2)


def test_the_configured_choice_counts_and_is_read_again(tmp_path: Path) -> None:
    put(OLD, tmp_path / "pump.onnx")
    configuration = tmp_path / "recurd.toml"
    text = '[[models]]\npath = "pump.onnx"\n[reload]\nincompatible = "{}"\n'
    configuration.write_text(text.format("finish"))
    flags = ["--bind", f"ipc://{tmp_path}/socket", "--metrics", ""]
    with Process(tmp_path, "--config", configuration, *flags) as daemon:
        daemon.ready()
        with connect(tmp_path) as client:
            stream = client.open("s")
            stream.push(draw(1))
            configuration.write_text(text.format("restart"))
            put(NEW, tmp_path / "pump.onnx")
            assert reloaded(tmp_path)["outcome"] == "restart"
            with pytest.raises(Broken, match="was of a version of the model that was replaced"):
                stream.push(draw(2))


def test_models_are_added_and_removed_and_a_file_of_another_path_takes_over(tmp_path: Path) -> None:
    put(OLD, tmp_path / "pump.onnx")
    put(NEW, tmp_path / "pump-2.onnx")
    put(Network(name="valve"), tmp_path / "valve.onnx")
    configuration = tmp_path / "recurd.toml"

    def configure(*paths: str) -> None:
        text = "".join(f'[[models]]\npath = "{path}"\nstream_idle_seconds = 7.0\n' for path in paths)
        configuration.write_text(text)

    configure("pump.onnx")
    with Process(tmp_path, "--config", configuration, "--bind", f"ipc://{tmp_path}/socket", "--metrics", "") as daemon:
        daemon.ready()
        with connect(tmp_path) as client:
            pump = client.open("s")
            configure("pump-2.onnx", "valve.onnx")
            report = json.loads(reload(tmp_path, "--json").stdout)["models"]
            valve = client.open("v", model="valve")
            valve.push(draw(1))
            with pytest.raises(Refused, match="at most 7"):
                client.open("w", model="valve", idle_timeout_seconds=8.0)
            with pytest.raises(Refused, match="at most 7"):
                client.open("w", model="pump", idle_timeout_seconds=8.0)
            configure("pump-2.onnx")
            removed = json.loads(reload(tmp_path, "--json").stdout)["models"]
            results = [pump.push(draw(1)), valve.push(draw(2)), client.open("t").push(draw(1))]

    assert [(model["model"], model["outcome"]) for model in report] == [("pump", "finish"), ("valve", "added")]
    assert [(model["model"], model["outcome"]) for model in removed] == [("pump", "unchanged"), ("valve", "removed")]
    assert removed[1]["finishing"] == 1
    for result, expected in zip(
        results, (truth(OLD, draw(1)), truth(OLD, draw(1), draw(2))[5:], truth(NEW, draw(1))), strict=True
    ):
        np.testing.assert_allclose(result, expected, **CLOSE)


# --- durable streams ---


def durable(folder: Path, *flags: str) -> Process:
    return serve(folder, "--journal", folder / "journal", *flags)


def test_a_copy_that_could_not_be_made_is_made_by_the_next_reload(tmp_path: Path) -> None:
    with durable(tmp_path) as daemon:
        daemon.ready()
        put(NEW, tmp_path / "pump.onnx")
        models = tmp_path / "journal" / "models"
        (former,) = models.iterdir()
        models.rename(tmp_path / "away")
        models.write_text("in the way")
        assert reloaded(tmp_path)["outcome"] == "finish"
        assert "event=version_not_kept" in daemon.log
        models.unlink()
        (tmp_path / "away").rename(models)

        assert reloaded(tmp_path)["outcome"] == "unchanged"

        assert sorted(path.suffix for path in models.iterdir()) == [".onnx", ".onnx"]
        assert former.exists()


def test_a_durable_daemon_that_is_killed_after_a_reload_goes_on_with_both_versions(tmp_path: Path) -> None:
    olds, news = Load(tmp_path, NAMES), Load(tmp_path, [f"new-{name}" for name in NAMES])
    with durable(tmp_path) as first, contextlib.ExitStack() as running:
        first.ready()
        running.enter_context(olds.running())
        put(WIDE, tmp_path / "pump.onnx")  # in between, nobody begins on it
        reloaded(tmp_path)
        put(NEW, tmp_path / "pump.onnx")
        reloaded(tmp_path)
        with news.running():
            first.stop(signal.SIGKILL)
            with durable(tmp_path) as second:
                second.ready()
                for load in (olds, news):
                    load.goes_on()
                assert second.log.count("event=former_version_loaded") == 1
                assert len(list((tmp_path / "journal" / "models").glob("*.onnx"))) == 2
                put(OLD, tmp_path / "pump.onnx")
                reloaded(tmp_path)
                second.stop(signal.SIGKILL)
                with durable(tmp_path) as third:
                    third.ready()
                    for load in (olds, news):
                        load.goes_on()
                        load.stop()
                    assert third.log.count("event=former_version_loaded") == 1

    assert (olds.broken, news.broken) == ({}, {})
    olds.check(OLD)
    news.check(NEW)


def test_a_durable_daemon_that_is_killed_after_streams_kept_their_state_goes_on(tmp_path: Path) -> None:
    load = Load(tmp_path, NAMES)
    with durable(tmp_path) as first, contextlib.ExitStack() as running:
        first.ready()
        running.enter_context(load.running())
        put(OLD, tmp_path / "pump.onnx", version="2")
        assert reloaded(tmp_path)["outcome"] == "kept"
        load.goes_on(1)
        first.stop(signal.SIGKILL)
        with durable(tmp_path) as second:
            second.ready()
            load.goes_on()
            load.stop()
    load.check(OLD)


def left_by_the_old_file(folder: Path) -> None:
    """A journal with a stream, and another file in the place of the one that it ran on."""
    with durable(folder) as daemon:
        daemon.ready()
        with connect(folder) as client:
            client.open("s").push(draw(1))
        daemon.stop(signal.SIGTERM)
    put(NEW, folder / "pump.onnx")


def test_streams_finish_on_their_version_when_the_file_was_replaced_while_the_daemon_was_down(tmp_path: Path) -> None:
    left_by_the_old_file(tmp_path)
    with durable(tmp_path) as daemon:
        daemon.ready()
        with connect(tmp_path) as client:
            results = client.open("s", mode="resume").push(draw(2)), client.open("t").push(draw(1))

    np.testing.assert_allclose(results[0], truth(OLD, draw(1), draw(2))[5:], **CLOSE)
    np.testing.assert_allclose(results[1], truth(NEW, draw(1)), **CLOSE)


def test_streams_finish_on_their_heads_over_a_restart_though_the_new_file_has_the_same_weights(tmp_path: Path) -> None:
    two_heads = Network(last=True)
    put(two_heads, tmp_path / "pump.onnx")
    with durable(tmp_path) as daemon:
        daemon.ready()
        with connect(tmp_path) as client:
            assert set(client.open("s").push(draw(1))) == {"output", "final"}
            put_with_one_head(two_heads, tmp_path / "pump.onnx")
            assert reloaded(tmp_path)["outcome"] == "finish"
        daemon.stop(signal.SIGKILL)
    with durable(tmp_path) as daemon, connect(tmp_path) as client:
        daemon.ready()
        result = client.open("s", mode="resume").push(draw(2))
        assert set(result) == {"output", "final"}
        np.testing.assert_allclose(result["output"], truth(two_heads, draw(1), draw(2))[5:], **CLOSE)
        assert isinstance(client.open("t").push(draw(1)), np.ndarray)


def put_with_one_head(network: Network, path: Path) -> None:
    """The same network, of which less is told."""
    model = network.model()
    contract = network.contract(model)
    contract = msgspec.structs.replace(contract, heads=contract.heads[:1], proof=None)
    name = contract.heads[0].name
    del model.graph.output[[output.name for output in model.graph.output].index("final")]
    proof = network.golden(network.contract(network.model()))
    golden = msgspec.structs.replace(proof.golden, outputs={name: proof.golden.outputs[name]})
    attach(model, msgspec.structs.replace(contract, proof=msgspec.structs.replace(proof, golden=golden)))
    onnx.save(model, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def test_streams_whose_version_is_not_there_any_more_are_not_gone_on_with_unless_drift_is_accepted(
    tmp_path: Path,
) -> None:
    left_by_the_old_file(tmp_path)
    (copy,) = (tmp_path / "journal" / "models").iterdir()
    copy.write_bytes(b"damaged")
    with durable(tmp_path) as daemon:
        assert daemon.wait() == ExitCode.JOURNAL
        assert "were left by another one (weights" in daemon.log
    for flags in (["--accept-drift"], []):  # then they are the new version's
        with durable(tmp_path, *flags) as daemon:
            daemon.ready()
            with connect(tmp_path) as client:
                assert client.open("s", mode="resume").fresh is False
            daemon.stop(signal.SIGTERM)


def test_a_kept_version_is_gone_on_with_though_drift_is_accepted_and_files_of_others_stay(tmp_path: Path) -> None:
    left_by_the_old_file(tmp_path)
    models = tmp_path / "journal" / "models"
    (models / "notes.txt").write_text("mine")
    (models / "lost+found").mkdir()
    with durable(tmp_path, "--accept-drift") as daemon:
        daemon.ready()
        with connect(tmp_path) as client:
            result = client.open("s", mode="resume").push(draw(2))
        assert "drift_accepted" not in daemon.log
        daemon.stop(signal.SIGTERM)
    np.testing.assert_allclose(result, truth(OLD, draw(1), draw(2))[5:], **CLOSE)
    assert {"notes.txt", "lost+found"} < {path.name for path in models.iterdir()}


def test_streams_end_after_a_start_with_another_file_where_that_is_configured(tmp_path: Path) -> None:
    left_by_the_old_file(tmp_path)
    configuration = tmp_path / "recurd.toml"
    configuration.write_text('[reload]\nincompatible = "restart"\n')
    with durable(tmp_path, "--config", str(configuration)) as daemon:
        daemon.ready()
        with connect(tmp_path) as client, pytest.raises(Broken, match="reloaded"):
            client.open("s", mode="resume")


# --- files that are not good ---


def test_a_configuration_that_cannot_be_read_changes_nothing(tmp_path: Path) -> None:
    with configured(tmp_path) as (_, configuration):
        configuration.write_text("[[models")
        put(NEW, tmp_path / "pump.onnx")
        done = reload(tmp_path)
        assert done.returncode == ExitCode.BUG
        assert "not valid TOML" in done.stderr
        with connect(tmp_path) as client:
            np.testing.assert_allclose(client.open("s").push(draw(1)), truth(OLD, draw(1)), **CLOSE)


def test_other_slots_are_no_matter_of_a_reload(tmp_path: Path) -> None:
    with configured(tmp_path, "slots = 10\n") as (_, configuration):
        configuration.write_text('slots = 20\n[[models]]\npath = "pump.onnx"\n')
        assert reloaded(tmp_path)["outcome"] == "unchanged"
        put(NEW, tmp_path / "pump.onnx")
        assert "slots: 10 at the start, 20 now" in reload(tmp_path).stdout


def test_what_takes_a_new_start_is_told(tmp_path: Path) -> None:
    with configured(tmp_path) as (daemon, configuration):
        assert reload(tmp_path).stdout == "pump: unchanged\n"
        configuration.write_text(
            'threads = 2\n[[models]]\npath = "pump.onnx"\n[limits]\nstreams = 7\n[tenants.local]\n'
        )
        told = reload(tmp_path).stdout
        assert told == "pump: unchanged\nchanged, and taken at the next start only: limits.streams\n"
        assert "needs_start=limits.streams" in daemon.log


def spoil(folder: Path, kind: str) -> str:
    """Make the file one that must not be served; what the daemon says of it."""
    path = folder / "pump.onnx"
    if kind == "missing":
        path.unlink()
        return "there is no such file"
    if kind in ("pipe", "endless"):
        path.unlink()
        os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
        return "is a pipe" if kind == "pipe" else "is no file"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
        return "not a valid ONNX model"
    if kind == "another model":
        put(NEW, path, name="valve")
        return "it holds model 'valve' now, and not 'pump'"
    proof = OLD.golden(OLD.contract(OLD.model()))
    put(NEW, path, proof=proof)
    return "does not give its golden results"


@pytest.mark.parametrize("kind", ["missing", "truncated", "another model", "wrong numbers", "pipe", "endless"])
def test_a_file_that_is_not_good_leaves_the_former_one_serving_and_says_so(tmp_path: Path, kind: str) -> None:
    with serve(tmp_path) as daemon:
        daemon.ready()
        load = Load(tmp_path, NAMES)
        with load.running():
            reason = spoil(tmp_path, kind)
            done = reload(tmp_path)
            load.goes_on()
        load.check(OLD)
        assert (done.returncode, done.stderr) == (ExitCode.CONTRACT, "")
        assert done.stdout.startswith("pump: NOT reloaded: ")
        assert reason in done.stdout
        (line,) = [line for line in daemon.log.splitlines() if "reload_failed" in line]
        assert reason in line
        daemon.expect("could not reload pump")
        daemon.process.send_signal(signal.SIGHUP)
        daemon.expect("could not reload pump")
        assert daemon.metric('recurd_reloads_total{outcome="failed"}') == 2
        put(NEW, tmp_path / "pump.onnx")
        assert reloaded(tmp_path)["outcome"] == "finish"
