"""What a round takes from a real socket, and what it leaves for the next one."""

import math
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import zmq

from dialogue import opening
from recurd import wire
from recurd.intake import HEARING_SECONDS, Intake


class Door:
    """A ROUTER with connections, and what an intake handed over."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._context = stack.enter_context(zmq.Context())
        self.router = self._open(zmq.ROUTER)
        self.router.bind("inproc://door")
        self.taken: list[bytes] = []
        self.now = 1.0

    def connect(self) -> zmq.Socket[bytes]:
        socket = self._open(zmq.DEALER)
        socket.connect("inproc://door")
        return socket

    def _open(self, kind: int) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._stack.enter_context(self._context.socket(kind))
        socket.linger = 0
        return socket

    def intake(self, records: int) -> Intake:
        return Intake(self.router, records, asks_users=False, unnamed="local")

    def round(self, intake: Intake) -> list[bytes]:
        self.taken = []
        intake.round(self._receive, lambda: self.now)
        return self.taken

    def _receive(self, frame: bytes, routing_id: bytes, now: float, user: str) -> int:
        assert (now, user, len(routing_id)) == (self.now, "local", 5)
        self.taken.append(frame)
        return 1


@pytest.fixture
def door() -> Iterator[Door]:
    with ExitStack() as stack:
        yield Door(stack)


def many(records: int, size: int = 0) -> bytes:
    return wire.multi([(wire.pack(wire.Type.RESET, size=size), bytes(size))] * records)


def test_a_round_ends_after_so_many_records(door: Door) -> None:
    intake, socket = door.intake(10), door.connect()
    for _ in range(25):
        socket.send(wire.frame((wire.pack(wire.Type.RESET), b"")))

    assert [len(door.round(intake)) for _ in range(4)] == [10, 10, 5, 0]


def test_a_round_has_few_messages_that_are_not_of_a_stream(door: Door) -> None:
    intake, socket = door.intake(64), door.connect()
    for _ in range(6):
        socket.send(wire.frame(wire.control(wire.Type.HELLO, {})))
    for _ in range(2):
        socket.send(b"garbage" * 10)
    assert [len(door.round(intake)) for _ in range(3)] == [4, 4, 0]


def test_what_is_too_large_for_the_rest_of_a_round_waits_for_the_next_and_nothing_overtakes_it(door: Door) -> None:
    intake, socket = door.intake(10), door.connect()
    frames = [many(3), many(4), many(4), many(1), many(200), many(2)]
    for frame in frames:
        socket.send(frame)
    rounds, held = [], []
    while frames != [frame for taken in rounds for frame in taken]:
        rounds.append(door.round(intake))
        held.append(intake.holds)
        assert len(rounds) < 10

    assert [[wire.records_in(frame) for frame in taken] for taken in rounds] == [[3, 4], [4, 1], [200], [2]]
    assert held == [True, True, False, False]


def test_large_frames_count_by_their_bytes(door: Door) -> None:
    intake, socket = door.intake(10), door.connect()
    for _ in range(4):
        socket.send(many(1, 100_000))  # as much as seven records

    assert [len(door.round(intake)) for _ in range(4)] == [1, 1, 1, 1]


def test_the_large_messages_of_one_connection_neither_go_before_nor_after_anothers_small_one_by_the_round(
    door: Door,
) -> None:
    """It comes after two of them at most, wherever it falls into a round, and the round ends behind it."""
    intake, loud, quiet = door.intake(1024), door.connect(), door.connect()
    for _ in range(12):
        loud.send(many(200))
    late = opening("late")

    def receive(frame: bytes, *_: object) -> int:
        taken.append(frame)
        if len(taken) == 2:
            quiet.send(late)
        return 1

    taken: list[bytes] = []
    intake.round(receive, lambda: 1.0)

    assert taken[-1] == late
    assert len(taken) <= 5
    assert intake.holds
    assert door.round(intake) == [many(200)] * 5  # and so many of one's own go together


@pytest.mark.parametrize("parts", [[], [b""], [b"a", b"b"]])
def test_what_is_no_message_is_handed_over_as_an_empty_one(door: Door, parts: list[bytes]) -> None:
    intake, socket = door.intake(10), door.connect()
    socket.send_multipart(parts or [b"x", b"", b"y"])

    assert door.round(intake) == [b""]


@pytest.mark.parametrize(
    ("frame", "records"),
    [
        (b"", 1),
        (bytes(47), 1),
        (opening("s"), 1),
        (many(7), 7),
        (wire.pack(wire.Type.MULTI, steps=0), 1),
        (wire.pack(wire.Type.MULTI, steps=2**32 - 1), wire.MAX_RECORDS),
    ],
)
def test_a_frame_says_how_many_records_it_carries(frame: bytes, records: int) -> None:
    assert wire.records_in(frame) == records


def test_what_was_sent_before_is_heard_when_the_socket_was_empty_and_still_is(door: Door) -> None:
    intake, socket = door.intake(10), door.connect()
    heard = []
    for second, records in enumerate((0, 0, 0, 25, 0, 0, 0, 0), start=1):
        door.now = float(second)
        for _ in range(records):
            socket.send(many(1))
        taken = door.round(intake)
        heard.append((len(taken), intake.heard_until))
    assert heard == [
        (0, -math.inf),
        (0, 1.0),
        (0, 2.0),
        (10, 2.0),
        (10, 2.0),
        (5, 3.0),
        (0, 6.0),
        (0, 7.0),
    ]
    door.now = 8.0 + HEARING_SECONDS / 2  # not believed so soon
    door.round(intake)
    assert intake.heard_until == 7.0
