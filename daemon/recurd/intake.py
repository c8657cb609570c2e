"""What has come to the daemon's socket, one round's worth at a time, so that ticks and answers are never far away.

ROUTER gives frames of its connections in turn. A frame that is too large for what is left of a round waits for the
next one: a thousand records of one connection do not stand between another's chunk and its tick.
"""

from collections.abc import Callable
from typing import NamedTuple

import zmq

from recurd import auth, wire

#: Bytes that count as much as a record: large frames take their time too.
_BYTES_A_RECORD = 16384


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

    @property
    def holds(self) -> bool:
        """Whether something waits here, of which polling the socket does not tell."""
        return self._held is not None

    def round(self, receive: Callable[[bytes, bytes, float, str], int], clock: Callable[[], float]) -> None:
        """Hand over what has come, up to the bound: frame, routing id, time and user."""
        left = self._records
        while left > 0 and (message := self._held or self._take()) is not None:
            if message.cost > left < self._records:
                self._held = message
                return
            self._held = None
            receive(message.frame, message.routing_id, clock(), message.user)
            left -= message.cost

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
    return _Message(routing_id, frame, user, wire.records_in(frame) + sum(map(len, frames)) // _BYTES_A_RECORD)
