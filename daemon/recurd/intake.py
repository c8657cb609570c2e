"""What has come to the daemon's socket, one round's worth at a time, so that ticks and answers are never far away.

ROUTER gives frames of its connections in turn. A large one waits for the next round when it does not fit in what is
left of this one, or comes behind one of another connection: what one sends by the hundred does not stand between
another's chunk and its tick.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import zmq

from recurd import auth, wire

#: Bytes that count as much as a record: large frames take their time too.
_BYTES_A_RECORD = 16384
#: What any other message than of a stream's records, also an unreadable one, counts as: it takes some 20 to 50 us.
_CONTROL_RECORDS = 16
_OF_STREAMS = frozenset(bytes([type]) for type in (wire.Type.CHUNK, wire.Type.MULTI, wire.Type.RESET, wire.Type.STATE))
#: What costs as many records is large.
_LARGE = 128
#: An empty socket is believed after so long: when the process has stood still, its I/O thread may not have read yet
#: what came meanwhile.
HEARING_SECONDS = 0.05


class _Message(NamedTuple):
    routing_id: bytes
    frame: bytes
    user: str
    #: What it takes of a round.
    cost: int


class Intake:
    """Reads the socket, which is the server's. Owned by the server."""

    def __init__(self, socket: zmq.Socket[bytes], records: int, *, asks_users: bool, unnamed: str) -> None:
        """``records`` of a round. ``asks_users``: whether it is known of every frame whom it is from; where it is not,
        and where nobody was asked, he is ``unnamed``."""
        self._socket = socket
        self._records = records
        self._asks_users = asks_users
        self._unnamed = unnamed
        self._held: _Message | None = None
        #: What was sent until then has been handed over. It stays behind while more comes than a round takes.
        self.heard_until = -math.inf
        self._empty_at = -math.inf

    @property
    def holds(self) -> bool:
        """Whether something waits here, of which polling the socket does not tell."""
        return self._held is not None

    def round(self, receive: Callable[[bytes, bytes, float, str], int], clock: Callable[[], float]) -> None:
        """Hand over what has come, up to the bound: frame, routing id, time and user."""
        begin = clock()
        left, former = self._records, None
        while left > 0 and (message := self._held or self._take()) is not None:
            is_behind = former is not None and former != message.routing_id
            if former is not None and (message.cost > left or (is_behind and message.cost >= _LARGE)):
                self._held = message
                return
            self._held, former = None, message.routing_id
            receive(message.frame, message.routing_id, clock(), message.user)
            left -= message.cost
            if message.cost >= _LARGE:
                # libzmq looks whether others have sent something only now and then while one has more.
                self._socket.getsockopt(zmq.EVENTS)
        if left > 0 and begin >= self._empty_at + HEARING_SECONDS:
            self.heard_until, self._empty_at = self._empty_at, begin

    def _take(self) -> _Message | None:
        try:
            if self._asks_users:
                return self._of_user(*self._socket.recv_multipart(zmq.NOBLOCK, copy=False))
            return _message(self._unnamed, *self._socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return None

    def _of_user(self, routing_id: zmq.Frame, *frames: zmq.Frame) -> _Message:
        """A message, with whom it is from: the routing id does not say, as a client may take another's."""
        user = (auth.user_of(frames[-1]) if frames else "") or self._unnamed
        return _message(user, routing_id.bytes, *(frame.bytes for frame in frames))


def _message(user: str, routing_id: bytes, *frames: bytes) -> _Message:
    # Anything but exactly one frame is no message of ours; an empty one is refused as such.
    frame = frames[0] if len(frames) == 1 else b""
    records = wire.records_in(frame) if frame[3:4] in _OF_STREAMS else _CONTROL_RECORDS
    return _Message(routing_id, frame, user, records + sum(map(len, frames)) // _BYTES_A_RECORD)
