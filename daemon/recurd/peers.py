"""Connections that have said HELLO, and what is to be sent to them.

A peer is a ROUTER routing id, which says where answers go and nothing about who is there: the tenant comes from
authentication.
"""

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING

import msgspec

from recurd import wire
from recurd.errors import Broken, Refused
from recurd.stats import Stats
from recurd.tenants import Tenant

if TYPE_CHECKING:
    from recurd.fences import Group

#: Answers are joined into frames of at most this size: larger ones save nothing, and a peer that does not read holds as
#: many as its high-water mark allows.
_JOIN_BYTES = 64 * 1024

#: A longer text of an error is cut: some repeat what they are about, and nobody shall fill the memory with what he does
#: not read.
_TEXT_CHARACTERS = 4096

#: Types of the messages whose errors may travel joined with answers; 0: an error about a stream, asked by nobody.
_JOINED = frozenset({0}) | wire.RECORDS


class Peer:
    """One connection. Owned by :class:`Peers`."""

    __slots__ = (
        "again_bytes",
        "fence",
        "frames",
        "greeted",
        "handles",
        "last_seen",
        "multi",
        "records",
        "rights",
        "routing_id",
        "tenant",
        "user",
    )

    def __init__(self, routing_id: bytes, user: str, rights: Tenant, now: float) -> None:
        self.routing_id = routing_id
        #: What authentication says of it: a public key, or ``local``.
        self.user = user
        #: What its tenant may do, and the tenant's name.
        self.rights = rights
        self.tenant = rights.name
        #: Whether it has said HELLO; until then it is a stranger, forgotten as soon as it is answered.
        self.greeted = False
        #: Whether it takes MULTI frames.
        self.multi = False
        self.last_seen = now
        #: Handles of the streams attached to it.
        self.handles: set[int] = set()
        # To be sent, in order: whole frames, then records that may still be joined.
        self.frames: list[bytes] = []
        #: The group that all its streams are leaving with, or have left with.
        self.fence: Group | None = None
        #: Bytes of answers among them that were sent before.
        self.again_bytes = 0
        self.records: list[wire.Record] = []

    def seal(self, max_bytes: int) -> None:
        """Turn the waiting records into frames, joined where the peer takes that."""
        if not self.records:
            return
        if self.multi:
            self.frames += wire.multi_frames(self.records, max_bytes)
        else:
            self.frames += map(wire.frame, self.records)
        self.records = []


class Peers:
    """All peers, the longest silent first."""

    def __init__(self) -> None:
        self._by_id: OrderedDict[bytes, Peer] = OrderedDict()
        self._per_tenant: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, routing_id: bytes) -> Peer | None:
        """The peer of a routing id, when it has said HELLO."""
        return self._by_id.get(routing_id)

    def add(self, peer: Peer) -> None:
        """Remember a peer that has said HELLO."""
        peer.greeted = True
        self._by_id[peer.routing_id] = peer
        self._per_tenant[peer.tenant] += 1

    def count(self, tenant: str) -> int:
        """Peers of a tenant."""
        return self._per_tenant[tenant]

    def remove(self, peer: Peer) -> None:
        """Forget a peer."""
        del self._by_id[peer.routing_id]
        self._per_tenant[peer.tenant] -= 1

    def seen(self, peer: Peer, now: float) -> None:
        """Note that a peer is alive."""
        peer.last_seen = now
        self._by_id.move_to_end(peer.routing_id)

    def all(self) -> list[Peer]:
        """All of them, as they are now."""
        return list(self._by_id.values())

    def silent_since(self, moment: float) -> list[Peer]:
        """Peers not heard of after ``moment``."""
        silent = []
        for peer in self._by_id.values():
            if peer.last_seen > moment:
                break
            silent.append(peer)
        return silent

    def longest_silent(self) -> Peer | None:
        """The peer that was not heard of for the longest time."""
        return next(iter(self._by_id.values()), None)


class Outbox:
    """What is due to be sent, peer by peer. Owned by the engine."""

    def __init__(self, stats: Stats, *, max_message_bytes: int) -> None:
        self._stats = stats
        self._max_bytes = min(max_message_bytes, _JOIN_BYTES)
        self._waiting: list[Peer] = []
        # The error that was put out last, the type of what it answered, and its text.
        self._told: tuple[Exception | None, int] = (None, 0)
        self._text = b""

    def send(self, peer: Peer, record: wire.Record) -> None:
        """Put out the answer to a record; it may travel joined with others."""
        if not peer.records and not peer.frames:
            self._waiting.append(peer)
        peer.records.append(record)

    def send_again(self, peer: Peer, record: wire.Record) -> None:
        """Repeat an answer, unless a frame's worth of them waits already: a header asks for it, and it may be large.

        What is left out is counted, and comes when it is asked for again.
        """
        if peer.again_bytes > self._max_bytes:
            self._stats.send_failures["again"] += 1
            return
        peer.again_bytes += len(record[1])
        self.send(peer, record)

    def send_control(self, peer: Peer, record: wire.Record) -> None:
        """Put out any other message, as a frame of its own behind what is out already."""
        if not peer.records and not peer.frames:
            self._waiting.append(peer)
        peer.seal(self._max_bytes)
        peer.frames.append(wire.frame(record))

    def send_error(self, peer: Peer, header: wire.Header, error: Refused | Broken) -> None:
        """Answer the message of ``header`` with an error, and count it."""
        counts = self._stats.broken if isinstance(error, Broken) else self._stats.refused
        counts[error.code] += 1
        if self._told != (error, header.type):  # the records of a frame are often told the same
            self._told, self._text = (error, header.type), msgspec.json.encode(_body(error, header.type))
        head = wire.pack(
            wire.Type.ERROR,
            flags=header.flags & wire.ATTEMPT,
            code=error.code,
            size=len(self._text),
            generation=header.generation,
            handle=header.handle,
            seq=header.seq,
        )
        record = (head, self._text)
        if header.type in _JOINED:
            self.send(peer, record)
        else:
            self.send_control(peer, record)

    def take(self) -> list[tuple[bytes, bytes]]:
        """Routing ids and frames that have become due since the last call, in order for each routing id."""
        due = []
        for peer in self._waiting:
            peer.seal(self._max_bytes)
            due += [(peer.routing_id, frame) for frame in peer.frames]
            peer.frames, peer.again_bytes = [], 0
        self._waiting = []
        return due


def _body(error: Refused | Broken, in_reply_to: int) -> wire.Error:
    return wire.Error(
        code=error.code.word,
        text=error.text[:_TEXT_CHARACTERS],
        in_reply_to=in_reply_to,
        expected=getattr(error, "expected", None),
        retry_after_seconds=getattr(error, "retry_after_seconds", None),
        endpoint=getattr(error, "endpoint", None),
        server_key=getattr(error, "server_key", None),
        group=getattr(error, "group", None),
        handles=getattr(error, "handles", None),
        generation=error.generation,
        last_seq=getattr(error, "last_seq", None),
    )
