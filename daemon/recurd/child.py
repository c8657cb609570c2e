"""A daemon as a child process on loopback: for commands that bring their own (``recurd bench``)."""

import contextlib
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from threading import Thread
from types import FrameType
from typing import IO, Any

import msgspec

from recurd.errors import StartError

#: Longer than the daemon's own limit for finishing what it accepted.
_STOP_SECONDS = 15.0
_KEPT_LINES = 20


class Child:
    """A running daemon. ``endpoint`` is the address it bound, ``metrics`` that of /metrics ("off" for none)."""

    def __init__(self, process: subprocess.Popen[str], endpoint: str, metrics: str) -> None:
        self._process = process
        self.endpoint = endpoint
        self.metrics = metrics

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def cpu_seconds(self) -> float | None:
        """CPU time it has used so far, of all its threads; ``None`` where the system does not tell."""
        return cpu_seconds(self.pid)


def cpu_seconds(pid: int) -> float | None:
    """CPU time a process has used so far; ``None`` where the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class _Line(msgspec.Struct):
    """What is looked for in the daemon's log."""

    event: str = ""
    bind: str = ""
    metrics: str = ""


@contextlib.contextmanager
def serving(arguments: Sequence[str], *, metrics: str = "") -> Iterator[Child]:
    """``recurd serve`` with these arguments on a free loopback port, ready when this returns, stopped at the end.

    SIGTERM to this process is a KeyboardInterrupt meanwhile, as Ctrl-C is. To be called on the main thread. Raises
    :class:`StartError` with the child's own sentence and exit code when it does not start.
    """
    command = [sys.executable, "-m", "recurd", "serve", *arguments, "--bind", "tcp://127.0.0.1:*", "--metrics", metrics]
    command += ["--log-format", "json", "--log-level", "info"]
    environ = {key: value for key, value in os.environ.items() if key not in ("NOTIFY_SOCKET", "JOURNAL_STREAM")}
    lines: deque[str] = deque(maxlen=_KEPT_LINES)
    with _Interrupts() as interrupts:
        # In a process group of its own, so that Ctrl-C reaches it through us, after the streams are closed.
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ, process_group=0)
        assert process.stderr is not None
        with process.stderr as stderr:
            try:
                interrupts.release()
                ready = _await_ready(process, stderr, lines)
                # Read on, or a talkative daemon would block on its full pipe.
                reader = Thread(target=lines.extend, args=(stderr,), daemon=True)
                reader.start()
                yield Child(process, ready.bind, ready.metrics)
            finally:
                interrupts.hold()
                _stop(process)
            reader.join(_STOP_SECONDS)


def _await_ready(process: subprocess.Popen[str], stderr: IO[str], lines: deque[str]) -> _Line:
    for line in stderr:
        lines.append(line.strip())
        with contextlib.suppress(msgspec.DecodeError):
            found = msgspec.json.decode(line, type=_Line)
            if found.event == "ready":
                return found
    code = process.wait()
    said = next((line.removeprefix("recurd: ") for line in reversed(lines) if line.startswith("recurd: ")), None)
    error = StartError(said or "\n".join([f"the daemon did not start, it ended with status {code}", *lines]))
    error.exit_code = code  # type: ignore[assignment]  # an instance's, the child's own
    raise error


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class _Interrupts:
    """SIGINT and SIGTERM as KeyboardInterrupt, held back while a child is being started or stopped.

    Otherwise one that comes in between would leave the child behind.
    """

    def __init__(self) -> None:
        self._held = True
        self._noted = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_Interrupts":
        self._former = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def hold(self) -> None:
        """Note signals from now on."""
        self._held = True

    def release(self) -> None:
        """Raise for a signal that was noted, and for those to come."""
        self._held = False
        if self._noted:
            raise KeyboardInterrupt

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._held:
            raise KeyboardInterrupt
        self._noted = True
