"""A client's records of one stream: what waits, and what is in flight under which number.

A record gets its number when it is sent, not before. So what the daemon has not accepted is simply put back in front of
what waits, and is numbered again when its turn comes::

    add -> waiting -> in flight (numbered) -> answered
              ^            |
              +- put back -+   a record before it was refused, or it is itself to come again later
"""

import math
from collections import deque
from collections.abc import Iterator
from typing import Any

from recurd import wire
from recurd.signature import Payload


class Record:
    """A chunk, reset or STATE on its way. ``generation`` is set with its number, and ``sent`` counts the times it went
    out under that."""

    __slots__ = ("generation", "payload", "sent", "seq", "starts_by", "token")

    def __init__(self, token: Any, payload: Payload, starts_by: float = math.inf) -> None:
        """``starts_by``: when it is too late for the daemon to start it."""
        self.token = token
        self.payload = payload
        self.starts_by = starts_by
        self.generation = 0
        #: The number it has, or had last: put back, it mostly gets the same again.
        self.seq = 0
        self.sent = 0

    @property
    def attempt(self) -> int:
        """The flags that tell the last time it went out from those before."""
        return self.sent << 4 & wire.ATTEMPT


class Backlog:
    """All records of one stream that are not answered. Owned by its writer."""

    def __init__(self) -> None:
        self.waiting: deque[Record] = deque()
        self.in_flight: dict[int, Record] = {}  # by seq, which is also their order
        #: Number and generation of the record that is sent next.
        self.next_seq = 1
        self.next_generation = 0
        #: Number and generation up to which everything is answered (plain attributes, for readers on other threads).
        self.last_seq = 0
        self.generation = 0
        #: Numbers for which an error is on its way. Nothing may be sent before it came: it would be taken for the
        #: error of whatever goes out under that number next.
        self.errors_to_come: set[int] = set()
        #: What was in flight has to be sent again.
        self.resend = False
        #: Records that were late before they could go out.
        self.late: list[Record] = []

    def start(self, last_seq: int, generation: int) -> None:
        """Number on from what the daemon knows of the stream."""
        self.next_seq, self.next_generation = last_seq + 1, generation
        self._note_answered()

    def generation_after(self, seq: int) -> int | None:
        """The generation a stream must have that has taken our records up to ``seq`` and no others.

        ``None`` when it cannot have stopped there: we have seen the answer to a later one, or never sent so many.
        """
        if seq + 1 == self.next_seq:
            return self.next_generation
        record = self.in_flight.get(seq + 1)
        return None if record is None else record.generation

    def to_send(self, window: int, now: float) -> Iterator[tuple[int, Record]]:
        """Take what may go out now, with its numbers: what has to go again, then waiting ones that are not late.

        Never more than ``window`` records are in flight. Sends nothing while errors are to come. What goes again does
        so however late it is: the daemon may have it, and then it has its place.
        """
        if self.errors_to_come:
            return
        if self.resend:
            self.resend = False
            yield from self.in_flight.items()
        while self.waiting and self.next_seq - self.last_seq <= window:
            record = self.waiting.popleft()
            if record.starts_by <= now:
                self.late.append(record)
                continue
            seq, record.generation = self.next_seq, self.next_generation
            if record.seq != seq:
                record.seq, record.sent = seq, 0
            self.in_flight[seq] = record
            self.next_seq += 1
            self.next_generation += record.payload.starts_afresh
            yield seq, record

    def drop_late(self, now: float) -> float:
        """Take out what waits and is late; when the next of those that wait will be."""
        if self.waiting and min(record.starts_by for record in self.waiting) <= now:
            self.late += [record for record in self.waiting if record.starts_by <= now]
            self.waiting = deque(record for record in self.waiting if record.starts_by > now)
        return min((record.starts_by for record in self.waiting), default=math.inf)

    def answered(self, seq: int) -> None:
        """Forget a record that has its answer."""
        del self.in_flight[seq]
        self._note_answered()

    def _note_answered(self) -> None:
        for seq, record in self.in_flight.items():
            self.last_seq, self.generation = seq - 1, record.generation
            return
        self.last_seq, self.generation = self.next_seq - 1, self.next_generation

    def put_back(self, first: int, refused: int) -> None:
        """Record ``refused`` was, and the daemon waits for number ``first``, which must be in flight.

        It and all after it go back in front of what waits. Errors are on their way for those sent after ``refused``.
        """
        back = [seq for seq in self.in_flight if seq >= first]
        self.errors_to_come.update(seq for seq in back if seq > refused)
        self.next_seq, self.next_generation = first, self.in_flight[first].generation
        records = [self.in_flight.pop(seq) for seq in back]
        self.waiting.extendleft(reversed(records))

    def forget_answers(self) -> None:
        """What is on its way to us will not come: everything in flight has to be sent again."""
        self.errors_to_come.clear()
        self.resend = bool(self.in_flight)

    def clear(self) -> list[Record]:
        """Drop everything; the records, in order."""
        records = [*self.in_flight.values(), *self.waiting]
        self.in_flight.clear()
        self.waiting.clear()
        self.errors_to_come.clear()
        return records
