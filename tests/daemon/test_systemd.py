"""Notifications reach a real datagram socket, by path and by abstract address."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from recurd.systemd import Notifier

PID = 4711


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A service manager's socket and what $NOTIFY_SOCKET says of it."""
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(path if request.param == "path" else "\0" + path)
        listening.settimeout(5)
        yield listening, path if request.param == "path" else "@" + path


def test_every_notification_arrives_as_systemd_reads_it(manager: tuple[socket.socket, str]) -> None:
    listening, address = manager
    notifier = Notifier({"NOTIFY_SOCKET": address}, PID)

    notifier.ready("2 models on cpu")
    notifier.watchdog()
    notifier.status("full")
    notifier.reloading(12.5)
    notifier.stopping("3 chunks\nto go")

    assert [listening.recv(4096).decode() for _ in range(5)] == [
        "READY=1\nSTATUS=2 models on cpu",
        "WATCHDOG=1",
        "STATUS=full",
        "RELOADING=1\nMONOTONIC_USEC=12500000",
        "STOPPING=1\nSTATUS=3 chunks to go",
    ]
    notifier.close()


def test_without_a_manager_nothing_happens() -> None:
    notifier = Notifier({}, PID)

    notifier.ready("")
    notifier.close()

    assert notifier.watchdog_seconds is None


def test_a_manager_that_went_away_does_not_stop_the_work(tmp_path: Path) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}, PID)

    notifier.watchdog()
    notifier.close()


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(PID)}, 30.0),
        ({"WATCHDOG_USEC": "500000"}, 0.5),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdogs_interval_is_read_when_it_is_meant_for_this_process(
    environ: dict[str, str], seconds: float | None
) -> None:
    notifier = Notifier(environ, PID)
    notifier.close()

    assert notifier.watchdog_seconds == seconds


def test_a_manager_that_has_stopped_reading_does_not_stop_the_work(manager: tuple[socket.socket, str]) -> None:
    _, address = manager
    notifier = Notifier({"NOTIFY_SOCKET": address}, 1)
    for _ in range(2000):  # far more than its queue takes
        notifier.watchdog()
    notifier.close()
