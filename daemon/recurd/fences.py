"""Streams on their way from one daemon to another: closed to their clients until it is known where they are.

A *group* is streams that travel together. It goes through these stages, each of which an operator's command brings
about (:mod:`recurd.moving`)::

    here:   open --gather--> fenced --release--> gone: whoever asks is sent on
                               |  ^
                               +--+ lift, or no word from the operator: open again

    there:  arrived (held) --admit, or a client that was sent on--> open
                   |
                   +--drop--> gone without a trace

So a stream is open at one daemon at most, whoever dies when: what has arrived is not opened to anybody before its
release, which is decided by the daemon it comes from.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Annotated

import msgspec

from recurd.endings import Redirect
from recurd.errors import Code, Refused
from recurd.peers import Peer
from recurd.streams import Stream

#: A group whose operator is not heard of for so long is let go.
FENCE_SECONDS = 10.0
_RETRY_SECONDS = 0.05
#: When somebody asks again for a stream that may be on its way here: a drain that was cut off may take long to go on.
_EXPECTED_RETRY_SECONDS = 0.5
#: Streams of which it is remembered that they are not to come; others are waited for.
_MAX_ENDED = 100_000
#: Groups whose fate is remembered.
_MAX_FATES = 10_000
#: What an operator calls a group; it is remembered, logged and told to clients.
GroupId = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class OfGroup(msgspec.Struct, frozen=True):
    """Keys of a command that only names a group."""

    group: GroupId


class Group:
    """Streams that travel together. Owned by :class:`Fences`."""

    __slots__ = ("deadline", "id", "is_held", "is_lasting", "peers", "redirect", "streams")

    def __init__(self, id: str, streams: list[Stream], *, is_held: bool = False, is_lasting: bool = False) -> None:
        self.id = id
        #: In the order in which they are exported.
        self.streams = streams
        #: Connections whose streams they all are.
        self.peers: list[Peer] = []
        #: Whether they have arrived here; else they are leaving, or are only looked at.
        self.is_held = is_held
        #: Whether it stays until it is decided about, however long that takes.
        self.is_lasting = is_lasting
        #: When it is let go unless its operator says something.
        self.deadline = 0.0
        #: Where they are, once released.
        self.redirect: Redirect | None = None

    def refusal(self, name: str) -> Refused:
        """What somebody is told who asks for a stream of it, or for another one on the same connection."""
        if self.redirect is not None:
            return self.redirect.error(name)
        where = "has arrived from another daemon and waits to be handed over" if self.is_held else "is being moved"
        return Refused(Code.BUSY, f"stream '{name}' {where}", retry_after_seconds=_RETRY_SECONDS)

    def members(self) -> Iterator[Stream]:
        """Its streams that are still in it: not ended, nor opened by a client that was sent on."""
        return (stream for stream in self.streams if stream.fence is self and not stream.ended)


class Fences:
    """All groups. Owned by the engine."""

    def __init__(self) -> None:
        self._groups: dict[str, Group] = {}
        #: What became of groups that are no more: ``released``, ``lifted``, ``admitted`` or ``dropped``.
        self._fates: OrderedDict[str, str] = OrderedDict()
        #: Where every stream is that is not known here; ``None``: nobody is sent on.
        self.redirect: Redirect | None = None
        #: Daemons whose streams are coming, by origin, with the endpoint they were named by: what is not known here
        #: may be there still.
        self.expected: dict[str, str] = {}
        #: Tenants and names of streams that have ended here since: they are not there.
        self._ended: set[tuple[str, str]] = set()

    def get(self, id: str, now: float) -> Group | None:
        """A group, whose operator has just been heard of."""
        group = self._groups.get(id)
        if group is not None:
            group.deadline = now + FENCE_SECONDS
        return group

    def add(self, group: Group, now: float) -> None:
        """Begin a group; its streams and connections are closed to clients, unless they are only looked at."""
        self._groups[group.id] = group
        group.deadline = now + FENCE_SECONDS

    def end(self, group: Group, fate: str) -> None:
        """Forget a group, and remember what became of it."""
        del self._groups[group.id]
        # Streams and connections that are gone still know it; nothing else would let go of the lot of them.
        group.streams, group.peers = [], []
        self.remember(group.id, fate)

    def remember(self, id: str, fate: str) -> None:
        """Note what became of a group that is not there, or not any more."""
        self._fates[id] = fate
        while len(self._fates) > _MAX_FATES:
            self._fates.popitem(last=False)

    def fate(self, id: str) -> str:
        """What became of a group; ``open`` while it is there, ``unknown`` for one that is not remembered."""
        return "open" if id in self._groups else self._fates.get(id, "unknown")

    def held(self) -> list[Group]:
        """Those that have arrived here."""
        return [group for group in self._groups.values() if group.is_held]

    def restore(self, stream: Stream, id: str) -> None:
        """A stream out of the journal that had arrived with this group."""
        group = self._groups.get(id)
        if group is None:
            group = self._groups[id] = Group(id, [], is_held=True, is_lasting=True)
        group.streams.append(stream)
        stream.fence = group

    def expired(self, now: float) -> list[Group]:
        """Groups that nobody has said anything about for too long."""
        if not self._groups:
            return []
        return [group for group in self._groups.values() if group.deadline <= now and not group.is_lasting]

    def deadline(self) -> float | None:
        """When :meth:`expired` should be asked next."""
        return min((group.deadline for group in self._groups.values() if not group.is_lasting), default=None)

    @staticmethod
    def check(stream: Stream, released: str | None) -> bool:
        """Hold an OPEN of a stream against where it is; whether that makes a stream that has arrived this daemon's.

        ``released``: the group that the other daemon has told its client of, so it has been released there. Raises
        :class:`Refused` (``busy``).
        """
        group = stream.fence
        if group is None:
            return False
        if not (group.is_held and group.id == released):
            raise group.refusal(stream.name)
        stream.fence = None
        return True

    def expect(self, sources: dict[str, str]) -> None:
        """Streams of these daemons, endpoints by origin, are coming."""
        if sources.keys() - self.expected.keys() or not sources:
            self._ended.clear()
        self.expected = sources

    def note_end(self, tenant: str, name: str) -> None:
        """A stream has ended here."""
        if self.expected and len(self._ended) < _MAX_ENDED:
            self._ended.add((tenant, name))

    def may_come(self, tenant: str, name: str) -> str:
        """That a stream which is not here may be one that is to come, in words; empty: it is not."""
        if not self.expected or (tenant, name) in self._ended:
            return ""
        return f"stream '{name}' may be one that is to come from another daemon: a drain to this one is not finished"

    def check_new(self, name: str, peer: Peer) -> None:
        """Raises :class:`Refused` (``busy``, ``moved``) where no stream may begin on a connection."""
        if peer.fence is not None:
            raise peer.fence.refusal(name)
        if self.redirect is not None:
            raise self.redirect.error(name)
        if reason := self.may_come(peer.tenant, name):
            raise Refused(Code.BUSY, reason, retry_after_seconds=_EXPECTED_RETRY_SECONDS)
