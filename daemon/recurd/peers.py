"""Connections that have said HELLO, and what is to be sent to them.

A peer is a ROUTER routing id, which says where answers go and nothing about who is there: the tenant comes from
authentication.
"""

from collections import OrderedDict

from recurd import wire


class Peer:
    """One connection. Owned by :class:`Peers`."""

    __slots__ = ("frames", "greeted", "handles", "last_seen", "multi", "records", "routing_id", "tenant")

    def __init__(self, routing_id: bytes, tenant: str, now: float) -> None:
        self.routing_id = routing_id
        self.tenant = tenant
        #: Whether it has said HELLO; until then it is a stranger, forgotten as soon as it is answered.
        self.greeted = False
        #: Whether it takes MULTI frames.
        self.multi = False
        self.last_seen = now
        #: Handles of the streams attached to it.
        self.handles: set[int] = set()
        # To be sent, in order: whole frames, then records that may still be joined.
        self.frames: list[bytes] = []
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

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, routing_id: bytes) -> Peer | None:
        """The peer of a routing id, when it has said HELLO."""
        return self._by_id.get(routing_id)

    def add(self, peer: Peer) -> None:
        """Remember a peer that has said HELLO."""
        peer.greeted = True
        self._by_id[peer.routing_id] = peer

    def remove(self, peer: Peer) -> None:
        """Forget a peer."""
        del self._by_id[peer.routing_id]

    def seen(self, peer: Peer, now: float) -> None:
        """Note that a peer is alive."""
        peer.last_seen = now
        self._by_id.move_to_end(peer.routing_id)

    def silent_since(self, moment: float) -> list[Peer]:
        """Peers not heard of after ``moment``."""
        silent = []
        for peer in self._by_id.values():
            if peer.last_seen > moment:
                break
            silent.append(peer)
        return silent

    def longest_silent(self) -> float | None:
        """When the longest silent peer was last heard of."""
        return next(iter(self._by_id.values())).last_seen if self._by_id else None
