"""Telling the service manager how the daemon is: datagrams to ``$NOTIFY_SOCKET`` (man sd_notify).

The environment is an argument. Without ``$NOTIFY_SOCKET`` nothing is sent.
"""

import socket
from collections.abc import Mapping
from contextlib import suppress


class Notifier:
    """The way to the service manager; owns one datagram socket for the process's life."""

    def __init__(self, environ: Mapping[str, str], pid: int) -> None:
        path = environ.get("NOTIFY_SOCKET", "")
        # '@' stands for the zero byte that an abstract address starts with
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        # A manager that has stopped reading must not stop the loop that tells it.
        self._socket.setblocking(False)
        self.watchdog_seconds = _watchdog_seconds(environ, pid)

    def ready(self, status: str) -> None:
        """Models are loaded and sockets bound; also the end of :meth:`reloading`."""
        self._send("READY=1", f"STATUS={status}")

    def status(self, text: str) -> None:
        """One line for ``systemctl status``."""
        self._send(f"STATUS={text}")

    def watchdog(self) -> None:
        """There has been progress. Due more often than every ``watchdog_seconds``; half of it is usual."""
        self._send("WATCHDOG=1")

    def reloading(self, now: float) -> None:
        """The configuration is read again; ``now`` is CLOCK_MONOTONIC in seconds. :meth:`ready` must follow."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={int(now * 1e6)}")

    def stopping(self, status: str) -> None:
        """The daemon was asked to stop and is finishing what it accepted."""
        self._send("STOPPING=1", f"STATUS={status}")

    def close(self) -> None:
        """Close the socket; the notifier is not used afterwards."""
        self._socket.close()

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        # Nobody listening is the manager's trouble: it notices silence by its own time-outs, and work goes on.
        with suppress(OSError):
            self._socket.sendto("\n".join(line.replace("\n", " ") for line in lines).encode(), self._address)


def _watchdog_seconds(environ: Mapping[str, str], pid: int) -> float | None:
    """Longest time between two :meth:`Notifier.watchdog`, or ``None`` when nobody watches this process."""
    microseconds = environ.get("WATCHDOG_USEC", "")
    watched = environ.get("WATCHDOG_PID", str(pid))
    if not microseconds.isdecimal() or int(microseconds) == 0 or watched != str(pid):
        return None
    return int(microseconds) / 1e6
