"""More streams than slots on a real daemon, measured; bench/capacity.py does it with a million."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recurrent import Network

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("flags", [[], ["--journal"]], ids=["memory", "journal"])
def test_streams_by_far_more_than_slots_are_measured_and_right(tmp_path: Path, flags: list[str]) -> None:
    model = Network().save(tmp_path / "pump.onnx")
    command = [sys.executable, "bench/capacity.py", str(model), "--streams", "2000", "--slots", "100"]
    command += ["--seconds", "0.5", *flags]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    done = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)

    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "bytes per idle stream" in shown.stdout
    assert done.returncode == 0, done.stdout + done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["wrong_results"] == 0
    assert outcome["results_compared"] > 2000
    assert outcome["paged_in"] > 0.5
    assert outcome["bytes_per_idle_stream"] > 0
