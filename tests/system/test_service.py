"""A real Prometheus scrapes the real daemon, with the configuration that is shipped."""

import json
import os
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dialogue import chunk
from process import Dealer, Process, eventually
from recurd import wire
from recurrent import Network

DEPLOY = Path(__file__).parents[2] / "deploy"


def prometheus() -> str:
    found = shutil.which("prometheus")
    if found is None:
        assert not os.environ.get("CI"), "CI installs prometheus (.ci/run)"
        pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def query(address: str, text: str) -> list[dict[str, Any]]:
    """What Prometheus knows; nothing as long as it does not answer."""
    url = f"http://{address}/api/v1/query?" + urllib.parse.urlencode({"query": text})
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            result = json.load(answer)["data"]["result"]
    except (OSError, urllib.error.URLError):
        return []
    assert isinstance(result, list)
    return result


def test_prometheus_has_the_daemons_numbers(tmp_path: Path) -> None:
    binary, network = prometheus(), Network()
    flags = ["--bind", "tcp://127.0.0.1:0", "--metrics", "127.0.0.1:0"]
    with Process(tmp_path, network.save(tmp_path / "pump.onnx"), *flags) as daemon:
        daemon.ready()
        shipped = (DEPLOY / "prometheus.yml").read_text()
        adapted = shipped.replace("127.0.0.1:9187", daemon.metrics).replace("15s", "1s").replace("5s", "1s")
        assert daemon.metrics in adapted
        (tmp_path / "prometheus.yml").write_text(adapted)
        with Dealer(daemon.endpoint) as dealer:
            handle = dealer.handle("s")
            for seq in range(1, 4):
                dealer.ask(wire.frame(chunk(handle, seq, network.draw(2, np.random.default_rng(seq)))))
        address = f"127.0.0.1:{free_port()}"
        command = [binary, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
        with (tmp_path / "prometheus.log").open("w") as log:
            server = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
        try:
            (ticks,) = eventually(lambda: query(address, 'recurd_ticks_total{model="pump"}'))
            (up,) = query(address, 'up{job="recurd"}')
            (quantile,) = query(address, "histogram_quantile(0.99, recurd_request_seconds_bucket)")
        finally:
            server.terminate()
            server.wait(30)

    assert float(ticks["value"][1]) == 3
    assert ticks["metric"]["job"] == "recurd"
    assert up["value"][1] == "1"
    assert 0 < float(quantile["value"][1]) < 10
