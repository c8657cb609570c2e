"""A real daemon process on ports of its own, for as long as the demo needs it."""

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from recurd.errors import RecurdError

#: Time for the daemon to import, load and replay, on a slow machine; and to stop.
_START_SECONDS = 90.0
_STOP_SECONDS = 15.0
#: How often it is looked whether the process still lives.
_LOOK_SECONDS = 0.2


class Daemon(NamedTuple):
    """Where a running daemon is reached."""

    endpoint: str
    metrics_url: str


class _Line(msgspec.Struct):
    """What is read of a log line in JSON."""

    event: str = ""
    bind: str = ""
    metrics: str = ""


@contextmanager
def serving(models: Sequence[Path], log: Path, *, device: str) -> Iterator[Daemon]:
    """Start ``recurd serve`` with model files on loopback, stop it at the end; it logs to ``log``.

    Raises :class:`RecurdError` when it does not become ready, and when it does not stop as asked.
    """
    with (
        tempfile.TemporaryDirectory(prefix="recurd-demo-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices,
    ):
        address = f"{folder}/notify"
        notices.bind(address)
        process = _start(models, log, device, address)
        try:
            _wait_until_ready(process, notices, log)
            yield _find(log)
        finally:
            status = _stop(process)
    if status != 0:
        raise RecurdError(f"the daemon ended with exit code {status}; its log is {log}")


def scrape(daemon: Daemon) -> list[str]:
    """The samples at /metrics, without comments."""
    with urllib.request.urlopen(daemon.metrics_url, timeout=10) as response:
        text: str = response.read().decode()
    return [line for line in text.splitlines() if not line.startswith("#")]


def device(samples: Sequence[str]) -> str:
    """The device the models run on, from the sample ``recurd_model_info``."""
    info = next(line for line in samples if line.startswith("recurd_model_info{"))
    return info.partition('device="')[2].partition('"')[0]


def _start(models: Sequence[Path], log: Path, device: str, notify: str) -> subprocess.Popen[bytes]:
    options = ["--bind", "tcp://127.0.0.1:0", "--metrics", "127.0.0.1:0", "--device", device, "--log-format", "json"]
    command = [sys.executable, "-m", "recurd", "serve", *map(str, models), *options]
    with log.open("wb") as output:
        # Its own process group: Ctrl-C is for the demo, which then stops the daemon as a service manager would.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "NOTIFY_SOCKET": notify},
            process_group=0,
        )


def _wait_until_ready(process: subprocess.Popen[bytes], notices: socket.socket, log: Path) -> None:
    """Wait for READY=1, as systemd does."""
    notices.settimeout(_LOOK_SECONDS)
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        try:
            if b"READY=1" in notices.recv(4096).splitlines():
                return
        except TimeoutError:
            if process.poll() is not None:
                break
    else:
        raise RecurdError(f"the daemon was not ready within {_START_SECONDS:g} s; its log is {log}")
    last = log.read_text(errors="replace").strip().rpartition("\n")[2].removeprefix("recurd: ")
    raise RecurdError(f"the daemon did not start (exit code {process.returncode}): {last}")


def _find(log: Path) -> Daemon:
    """The addresses, from the log's line 'ready', which is written before READY=1 is sent."""
    for line in log.read_bytes().splitlines():
        if line.startswith(b"{"):
            ready = msgspec.json.decode(line, type=_Line)
            if ready.event == "ready":
                return Daemon(ready.bind, f"http://{ready.metrics}/metrics")
    raise RecurdError(f"the daemon did not say where it listens; its log is {log}")


def _stop(process: subprocess.Popen[bytes]) -> int:
    """Ask it to stop, make it stop; the exit status."""
    process.terminate()
    try:
        return process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
