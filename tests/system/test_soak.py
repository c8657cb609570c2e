"""Clients and streams that come and go for some seconds; bench/soak.py does it for as long as one likes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recurrent import Network

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("flags", [[], ["--journal"]], ids=["memory", "journal"])
def test_nothing_is_left_of_clients_and_streams_that_come_and_go(tmp_path: Path, flags: list[str]) -> None:
    model = Network().save(tmp_path / "pump.onnx")
    command = [sys.executable, "bench/soak.py", str(model), "--minutes", "0.1", "--json", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    outcome = json.loads(done.stdout)
    assert (outcome["wrong"], outcome["lost"], outcome["left"]) == (0, 0, [])
    assert {"close", "expired", "late", "mute", "new", "reset", "result", "taken up"} <= outcome["done"].keys()
    assert max(look["slots"] for look in outcome["looks"]) > 10
