"""Who may enter: every stream's bookkeeping, and the rules of order (docs/protocol.md, section 4).

A stream is created by OPEN, has one state, is attached to at most one peer, and ends by CLOSE, idle
time-out or failure. How it ended is remembered for a while, so that a late record is told why instead of "unknown".
"""

import heapq
import math
from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from recurd import wire
from recurd.endings import Ended, Endings, Redirect
from recurd.errors import Broken, Code, Refused

if TYPE_CHECKING:
    from recurd.fences import Group
    from recurd.lane import Lane
    from recurd.peers import Peer
    from recurd.tenants import Share

#: Slot of a stream that has none: its state is elsewhere (recurd.arena), or there is none.
NO_SLOT = -1
#: Where they stand in a header.
_TYPE, _FLAGS = 3, 4
_NO_DATA = np.zeros(0)
#: Streams ended between two ticks, at most, where many are to be at once.
MAX_ENDS = 256
#: Ended streams that may stand in the order of expiry besides as many as live, before they are swept out of it.
_EXPIRY_SLACK = 64
#: Time-outs shorter than this come then: the clock may not tell less apart.
_LEAST_IDLE_SECONDS = 1e-3


class Kind(IntEnum):
    """What a numbered record is; those that are no chunks are carried out between chunks, and have no steps."""

    CHUNK = 0
    GET = wire.Operation.GET
    PUT = wire.Operation.PUT
    RESET_TO = wire.Operation.RESET_TO
    CLONE = wire.Operation.CLONE
    RESET = 5


class Chunk:
    """A numbered record in a stream's queue: a chunk of steps or, with no steps, what its ``kind`` says."""

    __slots__ = (
        "arrived",
        "attempt",
        "data",
        "fresh",
        "generation",
        "kind",
        "outputs",
        "seq",
        "starts_by",
        "steps",
        "taken",
    )

    def __init__(
        self,
        seq: int,
        generation: int,
        arrived: float,
        steps: int,
        data: npt.NDArray[Any] = _NO_DATA,
        kind: Kind = Kind.CHUNK,
    ) -> None:
        self.seq = seq
        self.generation = generation
        self.arrived = arrived
        self.steps = steps
        #: All steps one after another, ``[steps * width]``; without steps what came, or its answer's bytes.
        self.data = data
        self.kind = kind
        #: Attempt at which it was last sent, as its ERROR repeats it.
        self.attempt = 0
        #: When it is too late to start it.
        self.starts_by = math.inf
        #: Steps already given to a tick.
        self.taken = 0
        #: Whether its first step started from the initial state.
        self.fresh = False
        #: Outputs of the slices that have run, each a list by head; none while it runs whole, which is the rule.
        self.outputs: tuple[list[bytes], ...] = ()

    @property
    def starts_afresh(self) -> bool:
        """Whether it makes the generation one higher."""
        return self.kind in (Kind.RESET, Kind.RESET_TO)


#: A retained answer, what a duplicate of a record gets again: seq, generation and the answer itself.
Answer = tuple[int, int, wire.Record]


class Stream:
    """One stream. Owned by :class:`Streams`."""

    __slots__ = (
        "accepted",
        "acked",
        "answered",
        "answers",
        "apart",
        "closing",
        "ended",
        "fence",
        "first_generation",
        "forgotten",
        "fresh",
        "generation",
        "handle",
        "idle_timeout",
        "lane",
        "last_seen",
        "name",
        "peer",
        "queue",
        "running",
        "saved",
        "share",
        "slot",
        "state",
        "stored",
        "tenant",
        "untouched",
    )

    def __init__(
        self, *, tenant: str, name: str, handle: int, lane: "Lane", generation: int, idle_timeout: float
    ) -> None:
        self.tenant = tenant
        self.name = name
        self.handle = handle
        self.lane = lane
        # Where its state is: recurd.arena's.
        self.slot = NO_SLOT
        self.state: bytes | None = None
        self.ended = False
        self.idle_timeout = idle_timeout
        # Order. seq of the record last accepted, last answered, and last acknowledged by the client.
        self.accepted = 0
        self.answered = 0
        self.acked = 0
        #: Generation after all accepted resets; records carry it.
        self.generation = generation
        #: Generation when seq 1 was: anything older belongs to a former life of the name.
        self.first_generation = generation
        # Work. Records accepted and not answered yet, oldest first; short (at most the credit), so a list.
        self.queue: list[Chunk] = []
        #: Whether a tick holds a row of it. A stream is in the lane's line, or in a tick, or has nothing to run.
        self.running = False
        #: Whether the next step starts from the initial state.
        self.fresh = True
        #: Since the fresh start no step has been taken, and no state given.
        self.untouched = True
        self.answers: list[Answer] = []
        # In the journal (recurd.saving): seq up to which the answers are there, up to which they are there no more, and
        # up to which those between are kept apart from the stream; and what it is called there.
        self.saved = 0
        self.forgotten = 0
        self.apart = 0
        self.stored: object = None
        #: What its tenant holds of the daemon; ``None`` where nobody counts.
        self.share: Share | None = None
        # Connection.
        self.peer: Peer | None = None
        self.last_seen = 0.0
        #: The group of streams it is on its way with, from or to another daemon: closed to clients meanwhile.
        self.fence: Group | None = None
        #: Header of the CLOSE that waits for the queue to run empty; NO_HEADER when who sent it is no longer attached.
        self.closing: wire.Header | None = None

    def acknowledge(self, ack: int) -> int:
        """Forget the answers up to ``ack`` (never beyond what was answered); the bytes that they took."""
        freed = 0
        if ack > self.acked:
            self.acked = min(ack, self.answered)
            answers = self.answers
            while answers and answers[0][0] <= self.acked:
                freed += len(answers[0][2][1])
                del answers[0]
        return freed

    def is_next(self, header: wire.Header, credit: int) -> bool:
        """Whether a record is the next in order (True) or a duplicate (False). Raises :class:`Refused`."""
        seq = header.seq
        if seq == self.accepted + 1 and header.generation == self.generation and seq - self.acked <= credit:
            return True
        if seq == self.accepted + 1:
            if header.generation == self.generation:
                raise Refused(
                    Code.CREDIT,
                    f"{seq - self.acked} records would be in flight, {credit} are granted; acknowledge results",
                    expected=seq,
                    retry_after_seconds=0.0,
                )
            raise self._stale(header)
        if not 0 < seq <= self.accepted:
            raise Refused(Code.GAP, f"record {seq} came, {self.accepted + 1} is the next", expected=self.accepted + 1)
        if not self.first_generation <= header.generation <= self.generation:
            raise self._stale(header)
        return False

    def note_attempt(self, header: wire.Header) -> None:
        """A record came that may be the repetition of one that is queued, whose one answer is for the last sending."""
        if self.answered < header.seq <= self.accepted:
            self.queue[header.seq - self.answered - 1].attempt = header.flags & wire.ATTEMPT

    def _stale(self, header: wire.Header) -> Refused:
        return Refused(
            Code.STALE,
            f"generation {header.generation} is not the stream's ({self.generation})",
            expected=self.accepted + 1,
            generation=self.generation,
        )

    def retained(self, header: wire.Header) -> wire.Record | None:
        """The answer for a duplicate, or ``None`` when its one answer is still to come."""
        if header.seq > self.answered:
            return None
        for seq, generation, (first, payload) in self.answers:
            if seq == header.seq:
                if first[_TYPE] != wire.ANSWERS[wire.Type(header.type)]:
                    break  # the number of another record, a state's perhaps: not what was asked for
                if generation != header.generation and header.type == wire.Type.CHUNK:
                    raise self._stale(header)
                flags = first[_FLAGS] | wire.Flag.DUPLICATE
                return first[:_FLAGS] + bytes((flags,)) + first[_FLAGS + 1 :], payload
        return wire.pack(
            wire.ANSWERS[wire.Type(header.type)],
            flags=wire.Flag.DUPLICATE | wire.Flag.GONE,
            generation=header.generation + wire.starts_afresh(header.type, header.flags),
            handle=self.handle,
            seq=header.seq,
            ack=self.accepted,
        ), b""


def not_allowed(stream: Stream) -> Refused:
    """What a tenant is told of a stream that it had, and may not have any more."""
    return Refused(Code.FORBIDDEN, f"tenant '{stream.tenant}' may not have stream '{stream.name}' any more")


def _expires_at(stream: Stream) -> float:
    return stream.last_seen + max(stream.idle_timeout, _LEAST_IDLE_SECONDS)


class Streams:
    """All streams, by handle and by name inside a tenant, the order in which they expire, and how ended ones ended."""

    def __init__(self, first_handle: int, *, max_ended: int, max_moved: int = 0) -> None:
        self._next_handle = first_handle
        self._by_handle: dict[int, Stream] = {}
        self._by_name: dict[tuple[str, str], Stream] = {}
        #: Names that are taken for streams which are to begin later (clones); they count like streams.
        self._reserved: set[tuple[str, str]] = set()
        self._per_tenant: dict[str, int] = {}
        # Each stream stands once in the heap, with a time not later than its expiry; looked at again when that comes.
        # Ended ones are swept out when they are more than the living.
        self._expiry: list[tuple[float, int]] = []
        self._endings = Endings(max_ended=max_ended, max_moved=max_moved)

    def __len__(self) -> int:
        return len(self._by_handle)

    def count(self, tenant: str) -> int:
        """Streams of a tenant, those to come included."""
        return self._per_tenant.get(tenant, 0)

    def all_have(self, count: int) -> bool:
        """Whether every tenant that has streams has so many."""
        return bool(self._per_tenant) and min(self._per_tenant.values()) >= count

    def reserve(self, tenant: str, name: str) -> None:
        """Keep a name, which is free, for a stream to come."""
        self._reserved.add((tenant, name))
        self._per_tenant[tenant] = self._per_tenant.get(tenant, 0) + 1

    def release(self, tenant: str, name: str) -> None:
        """A name that was reserved is free again."""
        self._reserved.remove((tenant, name))
        self._count_out(tenant)

    def is_reserved(self, tenant: str, name: str) -> bool:
        """Whether a name is kept for a stream to come."""
        return (tenant, name) in self._reserved

    def _count_out(self, tenant: str) -> None:
        left = self._per_tenant[tenant] - 1
        if left:
            self._per_tenant[tenant] = left
        else:
            del self._per_tenant[tenant]

    def find(self, header: wire.Header, peer: "Peer") -> Stream:
        """The stream of a record from a peer. Raises :class:`Refused` or :class:`Broken` with why there is none."""
        stream = self._by_handle.get(header.handle)
        if stream is not None and stream.peer is peer:
            return stream
        raise self._not_found(header, peer, stream)

    def _not_found(self, header: wire.Header, peer: "Peer", stream: Stream | None) -> Refused | Broken:
        if stream is not None and stream.tenant == peer.tenant:
            if not peer.rights.may_have(stream.name, stream.lane.name):
                return not_allowed(stream)
            return Refused(Code.DETACHED, f"stream '{stream.name}' was opened on another connection since")
        ended = self._endings.of(peer.tenant, header.handle)
        if ended is not None:
            return ended.error()
        return Refused(Code.UNKNOWN_HANDLE, f"no stream has handle {header.handle} here; open it")

    def named(self, tenant: str, name: str) -> Stream | None:
        """A tenant's stream by name."""
        return self._by_name.get((tenant, name))

    def ending(self, tenant: str, name: str) -> Ended | None:
        """How the last stream of this name ended, when it is remembered."""
        return self._endings.named(tenant, name)

    def add(
        self,
        *,
        tenant: str,
        name: str,
        lane: "Lane",
        generation: int,
        idle_timeout: float,
        now: float,
        handle: int | None = None,
    ) -> Stream:
        """Start a stream, with the next free handle or its former one; the tenant has none of this name."""
        if handle is None:
            while self._next_handle in self._by_handle:  # a former daemon's may lie in its way
                self._next_handle += 1
            handle, self._next_handle = self._next_handle, self._next_handle + 1
        stream = Stream(
            tenant=tenant,
            name=name,
            handle=handle,
            lane=lane,
            generation=generation,
            idle_timeout=idle_timeout,
        )
        stream.last_seen = now
        self._by_handle[stream.handle] = self._by_name[tenant, name] = stream
        self._per_tenant[tenant] = self._per_tenant.get(tenant, 0) + 1
        self.watch(stream)
        return stream

    def watch(self, stream: Stream) -> None:
        """Put a stream into the order of expiry."""
        heapq.heappush(self._expiry, (_expires_at(stream), stream.handle))

    def of_lane(self, lane: "Lane") -> list[Stream]:
        """Streams that live on a lane (a scan of all)."""
        return [stream for stream in self._by_handle.values() if stream.lane is lane]

    def all(self) -> Iterator[Stream]:
        """All of them; none may begin or end meanwhile."""
        return iter(self._by_handle.values())

    def by_handle(self, handle: int) -> Stream | None:
        """The stream of a handle, whosever it is."""
        return self._by_handle.get(handle)

    def of_handle(self, handle: int) -> Stream:
        """A stream by its handle, which a peer holds."""
        return self._by_handle[handle]

    def detach(self, handle: int) -> None:
        """The stream's connection is gone."""
        self._by_handle[handle].peer = None

    def end(self, stream: Stream, code: Code, redirect: Redirect | None = None) -> tuple[Ended, list[int]]:
        """Forget a stream and remember how it ended. Its slot and its queue are the caller's.

        How it ended, and the handles of those of which that is forgotten.
        """
        self.forget(stream)
        ended = Ended(stream.tenant, stream.name, code, stream.generation, stream.accepted, redirect)
        return ended, self.remember(stream.handle, ended)

    def forget(self, stream: Stream) -> None:
        """Forget a stream as if it had never been."""
        stream.ended = True
        del self._by_handle[stream.handle], self._by_name[stream.tenant, stream.name]
        self._count_out(stream.tenant)
        if len(self._expiry) > 2 * len(self._by_handle) + _EXPIRY_SLACK:
            self._expiry = [entry for entry in self._expiry if entry[1] in self._by_handle]
            heapq.heapify(self._expiry)

    def remember(self, handle: int, ended: Ended) -> list[int]:
        """Remember how a stream ended, as the last one of its name; the handles of those that are forgotten for it."""
        return self._endings.add(handle, ended)

    @property
    def gone_to(self) -> Mapping[tuple[str, str | None], int]:
        """How many streams that are remembered have moved to which daemon: its endpoint and origin."""
        return self._endings.gone_to

    def forget_moved(self, endpoint: str, origin: str | None) -> list[int]:
        """Forget which streams have moved to the daemon of that endpoint or origin: their handles."""
        return self._endings.forget_moved(endpoint, origin)

    def expired(self, now: float, most: int) -> list[Stream]:
        """Streams whose idle time-out has passed, so many at most; the caller ends them.

        Amortised over records, never a scan of all.
        """
        due: list[Stream] = []
        while self._expiry and self._expiry[0][0] <= now and len(due) < most:
            _, handle = heapq.heappop(self._expiry)
            stream = self._by_handle.get(handle)
            if stream is None:
                continue
            if stream.queue or stream.fence is not None:
                stream.last_seen = max(now, stream.last_seen)
            if _expires_at(stream) <= now:
                due.append(stream)
            else:
                self.watch(stream)
        return due

    def note_wait(self, handle: int, peer: "Peer", until: float) -> None:
        """The peer of a stream was told to send a record again then."""
        stream = self._by_handle.get(handle)
        if stream is not None and stream.peer is peer:
            stream.last_seen = max(stream.last_seen, until)

    def forgive(self, seconds: float) -> None:
        """Let all idle time-outs come so much later (a scan of all streams)."""
        for stream in self._by_handle.values():
            stream.last_seen += seconds

    def deadline(self) -> float | None:
        """When :meth:`expired` should be asked next."""
        return self._expiry[0][0] if self._expiry else None
