"""The real command: real data, a real daemon, real files."""

import contextlib
import json
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recurd import contract
from recurd_export.demo import data, streaming
from recurd_export.demo.report import Files, judge

COMMAND = [sys.executable, "-m", "recurd", "demo", "--data", "basic-motions"]
PNG = b"\x89PNG\r\n\x1a\n"
RECORDINGS, STEPS, ROUNDS = 40, 100, 3


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "made" / "out"


@pytest.fixture(scope="module")
def demo(out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "--out", out, "--epochs", "100", "--json"], capture_output=True, text=True, timeout=110, check=False
    )


@pytest.fixture(scope="module")
def report(demo: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert demo.returncode == 0, demo.stderr
    found: dict[str, Any] = json.loads(demo.stdout)
    return found


def samples(report: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in report["metrics"])}


def processes_that_name(path: Path) -> set[int]:
    """Processes with the path on their command line."""
    found = set()
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # ended meanwhile
            if process.name.isdigit() and bytes(path) in (process / "cmdline").read_bytes():
                found.add(int(process.name))
    return found


def test_the_daemon_answers_as_the_trained_model_does(report: dict[str, Any]) -> None:
    (result,) = report["results"]

    assert result["agrees"]
    assert result["largest_difference"] <= result["allowed_difference"] <= 2e-4
    assert result["accuracy_daemon"] == pytest.approx(result["accuracy_offline"], abs=1 / RECORDINGS)
    assert result["accuracy_daemon"] >= 0.85
    assert result["step_accuracy_daemon"] >= 0.7


def test_an_answer_that_is_off_is_no_agreement(report: dict[str, Any], out: Path) -> None:
    _, described = contract.load(report["results"][0]["model"])
    motions = data.load("basic-motions")
    offline = [np.full((len(series.values), 4), 0.25, np.float32) for series in motions.test]
    script = streaming.Script(model=motions.name, stream="watch-1", order=(7, 3), cuts=((0, STEPS), (0, STEPS)))
    wrong = offline[3].copy()
    wrong[50, 1] += 1e-3

    right, off = (
        judge(
            motions,
            described,
            Files.below(out, motions.name),
            [streaming.Outcome(script, (offline[7], answer), (0.001, 0.001), 1)],
            offline,
        )
        for answer in (offline[3], wrong)
    )

    assert right.agrees
    assert not off.agrees
    assert off.largest_difference == pytest.approx(1e-3, rel=1e-3)


def test_chunks_are_ragged_and_leave_no_step_out() -> None:
    motions = data.load("basic-motions")

    scripts = streaming.write_scripts(motions, np.random.default_rng(0))

    chunks = {end - start for script in scripts for cuts in script.cuts for start, end in pairwise(cuts)}
    assert {1, 2, 7} < chunks <= set(range(1, 26))
    assert sorted(index for script in scripts for index in script.order) == sorted([*range(RECORDINGS)] * ROUNDS)
    assert {(cuts[0], cuts[-1]) for script in scripts for cuts in script.cuts} == {(0, STEPS)}


def test_every_recording_was_streamed_and_the_daemon_counted_what_was_sent(report: dict[str, Any]) -> None:
    (result,) = report["results"]
    counted = samples(report)
    label = '{model="basic-motions"}'

    assert result["recordings"] == RECORDINGS * ROUNDS
    assert result["steps"] == RECORDINGS * ROUNDS * STEPS == counted[f"recurd_steps_processed_total{label}"]
    assert result["chunks"] == counted[f"recurd_chunks_processed_total{label}"] > result["recordings"] * 4
    assert result["resets"] == result["recordings"] - result["streams"] == counted[f"recurd_resets_total{label}"]
    assert result["streams"] == counted['recurd_stream_slots{kind="used",model="basic-motions"}'] > 1
    assert report["latency_p99_seconds"] >= report["latency_p50_seconds"] > 0


def test_streams_shared_ticks(report: dict[str, Any]) -> None:
    counted = samples(report)
    label = '{model="basic-motions"}'

    assert counted[f"recurd_tick_rows_sum{label}"] > counted[f"recurd_tick_rows_count{label}"]


def test_the_files_it_names_are_there(report: dict[str, Any], out: Path) -> None:
    (result,) = report["results"]
    _, described = contract.load(result["model"])
    header, *rows = Path(result["rows"]).read_text().splitlines()

    picture = Path(result["picture"]).read_bytes()
    assert picture.startswith(PNG)
    assert len(picture) > 20_000
    assert tuple(header.split(",")) == described.input.features
    assert len(rows) == STEPS
    assert described.heads[0].labels == ("standing", "running", "walking", "badminton")
    assert '"event": "stopped"' in Path(report["log"]).read_text()
    assert {path.parent for path in map(Path, (result["model"], result["picture"], report["log"]))} == {out}


def test_progress_goes_to_standard_error_in_plain_lines(demo: subprocess.CompletedProcess[str]) -> None:
    lines = demo.stderr.splitlines()

    assert lines
    assert all(line.startswith("recurd demo: ") for line in lines), demo.stderr


def test_recordings_have_their_own_lengths_and_classes() -> None:
    vowels = data.load("japanese-vowels")

    assert (len(vowels.train), len(vowels.test), len(vowels.features)) == (270, 370, 12)
    assert len({len(series.values) for series in vowels.test}) > 10
    assert {series.label for series in vowels.train} == set(range(9))
    assert all(series.values.dtype == np.float32 and series.values.shape[1] == 12 for series in vowels.test)


def test_ctrl_c_ends_the_demo_and_its_daemon(tmp_path: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "--out", tmp_path, "--epochs", "1", "--connections", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert any("stream 12000 steps" in line for line in process.stderr)
        daemon = processes_that_name(tmp_path) - {process.pid}

        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)

    assert process.returncode == 130, errors
    assert len(daemon) == 1
    assert not processes_that_name(tmp_path)
    assert (output, errors) == ("", "")
    assert '"event": "stopped"' in (tmp_path / "daemon.log").read_text()


def test_without_its_extra_it_says_what_to_install(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['sktime'] = None; from recurd.cli import main; main()"

    done = subprocess.run(
        [sys.executable, "-c", hide, "demo", "--out", tmp_path], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "recurd: 'recurd demo' needs sktime: recurd was installed without the extras 'gpu,demo' "
        "(pip install '.[gpu,demo]' in a checkout)"
    )
    assert "Traceback" not in done.stderr
