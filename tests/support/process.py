"""The real daemon as a process that says when it is ready, and a connection that sends whatever bytes it is given."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import zmq

from dialogue import Reply, hello, opening, replies
from recurd.wire import Type

#: Nothing here takes this long; who waits it out has found a fault.
PATIENCE_SECONDS = 30.0


def eventually(condition: Callable[[], Any]) -> Any:
    """Wait until a condition holds; its value. For what nobody sends an event about."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not (value := condition()):
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.01)
    return value


class Process:
    """``python -m recurd serve`` with a service manager's socket; ``ready`` waits for its word."""

    def __init__(self, folder: Path, *arguments: str | Path, **environment: str) -> None:
        self._manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        address = f"recurd-test-{uuid.uuid4()}"
        self._manager.bind("\0" + address)
        self._manager.settimeout(0.05)
        self.notifications: list[str] = []
        self._log_path = folder / f"{address}.log"
        with self._log_path.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "recurd", "serve", "--device", "cpu", "--threads", "1", *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"NOTIFY_SOCKET": "@" + address} | environment,
            )

    def __enter__(self) -> "Process":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._manager.close()

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    def expect(self, text: str) -> str:
        """Wait for a notification that holds ``text``; a daemon that ends without it fails the test."""
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                self.notifications.append(self._manager.recv(65536).decode())
            except TimeoutError:
                assert self.process.poll() is None, f"it ended without {text}:\n{self.log}"
                assert time.monotonic() < end, f"no {text} came:\n{self.log}"
                continue
            if text in self.notifications[-1]:
                return self.notifications[-1]

    def ready(self) -> "Process":
        self.expect("READY=1")
        return self

    def _found(self, pattern: str) -> str:
        status = next(text for text in self.notifications if "READY=1" in text)
        found = re.search(pattern, status)
        assert found is not None, status
        return found[1]

    @property
    def endpoint(self) -> str:
        return self._found(r"at ([a-z]+://[^, ]+)")

    @property
    def metrics(self) -> str:
        return self._found(r"metrics at ([^ \n]+)")

    def get(self, path: str, address: str = "") -> tuple[int, str]:
        """Status and body of a page, at the address that is told once it is ready when none is given."""
        try:
            with urllib.request.urlopen(f"http://{address or self.metrics}{path}", timeout=PATIENCE_SECONDS) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metric(self, series: str) -> float:
        """The value of a series as it stands on /metrics."""
        for line in self.get("/metrics")[1].splitlines():
            if line.startswith(series + " "):
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"there is no {series}")

    def stop(self, number: int) -> int:
        """Send a signal and wait for the end; the exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        return self.process.wait(PATIENCE_SECONDS)


class Dealer:
    """A connection of raw frames."""

    def __init__(self, endpoint: str, *, greet: bool = True) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, int(PATIENCE_SECONDS * 1000))
        self.socket.setsockopt(zmq.SNDTIMEO, int(PATIENCE_SECONDS * 1000))
        self._prepare()
        self.socket.connect(endpoint)
        self._arrived: list[Reply] = []
        if greet:
            assert self.ask(hello()).type == Type.WELCOME

    def _prepare(self) -> None:
        """Set what else the socket needs before it is connected."""

    def __enter__(self) -> "Dealer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()
        self._context.term()

    def send(self, *parts: bytes) -> None:
        """Send one message of these frames."""
        self.socket.send_multipart(parts)

    def take(self) -> Reply:
        """The next answer."""
        while not self._arrived:
            self._arrived += replies(self.socket.recv())
        return self._arrived.pop(0)

    def ask(self, *parts: bytes) -> Reply:
        self.send(*parts)
        return self.take()

    def handle(self, stream: str, model: str = "pump", **options: Any) -> int:
        reply = self.ask(opening(stream, model, **options))
        assert reply.type == Type.OPENED, reply
        return reply.header.handle
