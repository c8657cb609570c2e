"""Frames that no client would send, by the ten thousand; bench/fuzz.py throws them for as long as one likes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recurrent import Network

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "network", [Network(), Network(classes=6), Network(last=True, directions=2)], ids=["numbers", "ids", "looks ahead"]
)
def test_no_frame_troubles_the_engine_or_a_stream_beside_it(tmp_path: Path, network: Network) -> None:
    path = network.save(tmp_path / "pump.onnx")
    command = [sys.executable, "bench/fuzz.py", str(path), "--frames", "10000", "--seed", "7", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["answers"]["RESULT"] > 500  # it is not only refused
    assert {"gap", "busy", "bad_frame", "closed", "late", "DONE"} <= outcome["answers"].keys()
