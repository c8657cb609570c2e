"""What is done with a stream's state as a whole: RESET, and STATE get, put, reset-to and clone.

These are records of their stream like chunks: numbered, queued behind the chunks before them, answered once, and the
answer retained. They are carried out when their turn comes and touch no device: a state that is given waits in the
host's memory for the stream's next tick (:class:`recurd.arena.Slots`).
"""

from typing import TYPE_CHECKING

import numpy as np

from recurd import wire
from recurd.errors import Code, Refused
from recurd.lifecycle import Lifecycle, name_of
from recurd.peers import Peer
from recurd.streams import Chunk, Kind, Stream
from recurd.versions import Versions

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger


def kind_of(header: wire.Header) -> Kind:
    """What a RESET or STATE asks for. Raises :class:`Refused` (``bad_request``) for an operation that is not known."""
    if header.type == wire.Type.RESET:
        return Kind.RESET
    try:
        return Kind(wire.Operation(header.flags & wire.OPERATION))
    except ValueError:
        number = header.flags & wire.OPERATION
        raise Refused(Code.BAD_REQUEST, f"operation {number} of a STATE is not known here") from None


class States:
    """Reads and carries out what is no chunk. Owned by the engine; holds nothing of its own."""

    def __init__(self, lifecycle: Lifecycle, versions: Versions, log: "FilteringBoundLogger") -> None:
        self._lifecycle = lifecycle
        self._versions = versions
        self._log = log

    def read(
        self, kind: Kind, header: wire.Header, payload: wire.Buffer, stream: Stream, peer: Peer, now: float
    ) -> Chunk:
        """The record of a message that was admitted. Raises :class:`Refused` for what cannot be carried out."""
        record = Chunk(header.seq, header.generation, now, 0, kind=kind)
        if kind is Kind.GET:
            record.data = stream.lane.room_for_state
        elif kind in (Kind.PUT, Kind.RESET_TO):
            record.data = stream.lane.read_state(payload)
        elif kind is Kind.CLONE:
            record.data = np.frombuffer(payload, np.uint8)
            self._lifecycle.check_clone(stream, name_of(record), peer)
        record.generation += record.starts_afresh
        return record

    def accepted(self, stream: Stream, record: Chunk) -> None:
        """A record was queued: what holds from then on."""
        stream.generation += record.starts_afresh
        if record.kind is Kind.CLONE:
            self._lifecycle.reserve(stream, name_of(record))

    def carry_out(self, stream: Stream, record: Chunk, now: float) -> tuple[wire.Record, bytes | None]:
        """Do what the oldest record asks for: its answer, and the stream's state where that is known.

        Raises :class:`~recurd.errors.JournalError` when a state cannot be read.
        """
        kind, lane = record.kind, stream.lane
        payload = b""
        if kind is Kind.RESET:
            lane.stats.resets += 1
            stream.fresh = stream.untouched = True
            if self._versions.renew(stream):
                self._lifecycle.went_over(stream)
            return self._answer(stream, record), None
        if kind in (Kind.PUT, Kind.RESET_TO):
            state: bytes | None = record.data.tobytes()
            assert state is not None  # bytes are
            lane.slots.put(stream, state)
            stream.untouched = False
        else:
            state = lane.slots.state(stream)
            if kind is Kind.GET:
                payload = lane.layout.pack(lane.initial_row if state is None else state)
            else:
                self._lifecycle.clone(stream, name_of(record), state, now)
        operation = wire.Operation(kind)
        lane.stats.state_operations[operation.word] += 1
        self._log.debug(
            "state_operation",
            operation=operation.word,
            stream=stream.name,
            model=lane.name,
            tenant=stream.tenant,
            generation=record.generation,
            seq=record.seq,
        )
        return self._answer(stream, record, payload), state

    def _answer(self, stream: Stream, record: Chunk, payload: bytes = b"") -> wire.Record:
        header = wire.pack(
            wire.Type.DONE if record.kind is Kind.RESET else wire.Type.STATE_OF,
            flags=wire.Flag.FRESH if stream.fresh else 0,
            size=len(payload),
            generation=record.generation,
            handle=stream.handle,
            seq=record.seq,
            ack=stream.accepted,
        )
        return header, payload
