"""Streams that leave for another daemon: gathered, closed, copied, and let go of (:mod:`recurd.moving`)."""

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from recurd import wire
from recurd.admin import Request
from recurd.endings import Redirect
from recurd.errors import Code, Refused
from recurd.fences import Fences, Group, GroupId, OfGroup
from recurd.lane import states_of
from recurd.lifecycle import Lifecycle
from recurd.peers import Outbox, Peers
from recurd.saving import ModelStamp, Parcel, SavedStream, Unsaved, is_fresh
from recurd.streams import Stream, Streams
from recurd.versions import Versions

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

#: What a stream takes in a page besides its state and its answers' data, about.
_STREAM_BYTES = 512
_ANSWER_BYTES = 96
#: They are remembered with every stream that has left.
Endpoint = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
Key = Annotated[str, msgspec.Meta(max_length=64)]
#: See :class:`recurd.wire.Welcome`.
Origin = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class _Gather(msgspec.Struct, frozen=True):
    group: GroupId
    #: Whether they are to leave. Without it nothing changes for them.
    fence: bool = False
    #: About so many; the streams of a connection are never parted. With ``fence`` only.
    limit: int = 256
    #: Handles of streams that stay, with all streams of their connections. With ``fence`` only.
    staying: frozenset[int] = frozenset()
    #: Without ``fence``: only these.
    model: str | None = None
    stream: str = "*"
    tenant: str = "*"


class _Export(msgspec.Struct, frozen=True):
    group: GroupId
    start: int
    max_bytes: int
    #: At most so many streams: others wait while a page is made, and while it is taken in.
    limit: int = 512


class _Release(msgspec.Struct, frozen=True):
    group: GroupId
    endpoint: Endpoint
    server_key: Key | None = None
    origin: Origin | None = None


class Leaving:
    """The commands for it. Owned by :class:`recurd.moving.Moving`."""

    def __init__(
        self,
        *,
        streams: Streams,
        fences: Fences,
        peers: Peers,
        outbox: Outbox,
        unsaved: Unsaved,
        lifecycle: Lifecycle,
        versions: Versions,
        log: "FilteringBoundLogger",
    ) -> None:
        self._streams = streams
        self._fences = fences
        self._peers = peers
        self._outbox = outbox
        self._unsaved = unsaved
        self._lifecycle = lifecycle
        self._versions = versions
        self._log = log

    def gather(self, request: Request, now: float) -> tuple[Any, bytes]:
        """Name a group of streams; with ``fence`` they are closed to clients."""
        wanted = request.read(_Gather)
        group = self._fences.get(wanted.group, now)
        if group is None:
            streams = self._next(wanted.limit, wanted.staying) if wanted.fence else self._like(wanted)
            group = Group(wanted.group, streams)
            if wanted.fence:
                self._close(group)
            if streams:
                self._fences.add(group, now)
        is_last = wanted.fence and not group.streams
        in_no_group = sum(stream.fence is None for stream in self._streams.all()) if is_last else None
        return {
            "streams": len(group.streams),
            "left": len(self._streams),
            "in_no_group": in_no_group,
            "former": sum(stream.lane.is_former for stream in group.streams),
            "stamps": [ModelStamp(lane.name, lane.stamp) for lane in {stream.lane: None for stream in group.streams}],
        }, b""

    def _next(self, limit: int, staying: frozenset[int]) -> list[Stream]:
        """The streams that leave next: those without a connection, then those of as many connections as needed.

        A client follows with all its streams at once, so they leave together. Those without a connection leave first:
        a client that has followed may ask for them. What is on a former version of a model comes behind all others of
        its kind, and not in a group with them: it may be that the other daemon cannot have it.
        """
        present: list[Stream] = []
        former: list[Stream] = []
        for stream in self._streams.all():
            if stream.peer is None and stream.fence is None and stream.handle not in staying:
                (former if stream.lane.is_former else present).append(stream)
                if len(present) >= limit:
                    break
        if present or former:
            return present or former[:limit]
        for peer in self._peers.all():
            if peer.fence is None and staying.isdisjoint(peer.handles):
                streams = [self._streams.of_handle(handle) for handle in peer.handles]
                group = former if any(stream.lane.is_former for stream in streams) else present
                if len(group) < limit:
                    group += streams
            if len(present) >= limit:
                break
        return present or former

    def _like(self, wanted: _Gather) -> list[Stream]:
        return [
            stream
            for stream in self._streams.all()
            if (wanted.model is None or stream.lane.name == wanted.model)
            and fnmatchcase(stream.name, wanted.stream)
            and fnmatchcase(stream.tenant, wanted.tenant)
            and stream.fence is None
        ]

    def _close(self, group: Group) -> None:
        """Close a group's streams and their connections to clients; what was accepted is finished."""
        for stream in group.streams:
            stream.fence = group
            if stream.peer is not None and stream.peer.fence is None:
                stream.peer.fence = group
                group.peers.append(stream.peer)

    def export(self, request: Request, now: float) -> tuple[Any, bytes]:
        """A page of a group: what the journal would keep of each stream, between two of its records."""
        wanted = request.read(_Export)
        group = self._demand(wanted.group, now)
        page, following = self._page(group, wanted)
        states = states_of([stream for stream in page if not is_fresh(stream)])
        data = msgspec.msgpack.encode([_parcel(stream, states.get(stream.handle)) for stream in page])
        # What stands there is in the middle of something: ask again.
        waits = following < len(group.streams) and not _is_settled(group.streams[following])
        return {"streams": len(page), "next": following, "of": len(group.streams), "waits": waits}, data

    def _page(self, group: Group, wanted: _Export) -> tuple[list[Stream], int]:
        """As many streams from ``start`` on as fit, and where to go on; stops at one that is not settled."""
        page: list[Stream] = []
        max_bytes = wanted.max_bytes
        size = wire.HEADER_BYTES
        for index in range(max(0, wanted.start), len(group.streams)):
            stream = group.streams[index]
            if stream.ended:
                continue
            if not _is_settled(stream) or len(page) >= wanted.limit:
                return page, index
            size += _size(stream)
            if size > max_bytes:
                if not page:
                    raise Refused(
                        Code.BAD_REQUEST,
                        f"stream '{stream.name}' and its {len(stream.answers)} unacknowledged results do not fit in a "
                        f"message of {max_bytes} bytes",
                    )
                return page, index
            page.append(stream)
        return page, len(group.streams)

    def release(self, request: Request, now: float) -> tuple[Any, bytes]:
        """They have arrived elsewhere: end them here, and send their clients there."""
        wanted = request.read(_Release)
        group = self._fences.get(wanted.group, now)
        if group is None:
            return {"fate": self._fences.fate(wanted.group)}, b""
        if group.is_held or not all(_is_settled(stream) for stream in group.members()):
            raise Refused(Code.BAD_REQUEST, f"group '{wanted.group}' has not been exported")
        group.redirect = Redirect(wanted.endpoint, wanted.server_key, group.id, wanted.origin)
        released = list(group.members())
        for stream in released:
            peer, handle, generation = stream.peer, stream.handle, stream.generation
            self._lifecycle.end(stream, Code.MOVED, "moved", group.redirect)
            if peer is not None:
                header = wire.NO_HEADER._replace(handle=handle, generation=generation)
                self._outbox.send_error(peer, header, group.redirect.error(stream.name))
        self._fences.end(group, "released")
        self._log.info("streams_moved", streams=len(released), endpoint=wanted.endpoint)
        return {"fate": "released", "streams": len(released)}, b""

    def lift(self, request: Request, now: float) -> tuple[Any, bytes]:
        """They have not: as if nothing had happened."""
        wanted = request.read(OfGroup)
        group = self._fences.get(wanted.group, now)
        if group is not None and not group.is_held:
            self.open(group)
        return {"fate": self._fences.fate(wanted.group)}, b""

    def open(self, group: Group) -> None:
        """The streams of a group that was to leave stay."""
        for stream in group.members():
            stream.fence = None
            self._versions.stays(stream)
        for peer in group.peers:
            peer.fence = None
        self._fences.end(group, "lifted")

    def _demand(self, id: str, now: float) -> Group:
        group = self._fences.get(id, now)
        if group is None:
            raise Refused(Code.BAD_REQUEST, f"there is no group '{id}' ({self._fences.fate(id)}); gather it again")
        return group


def _is_settled(stream: Stream) -> bool:
    """Whether it stands between two records; one that is closed to clients: behind all that it has accepted."""
    if stream.ended:
        return True
    if stream.fence is not None:
        return not stream.queue and not stream.running
    return not stream.running and not (stream.queue and stream.queue[0].taken)


def _size(stream: Stream) -> int:
    answers = sum(_ANSWER_BYTES + len(payload) for _, _, (_, payload) in stream.answers)
    return _STREAM_BYTES + len(stream.name) + stream.lane.row_bytes + answers


def _parcel(stream: Stream, state: bytes | None) -> Parcel:
    answers = [(seq, generation, header, bytes(payload)) for seq, generation, (header, payload) in stream.answers]
    return Parcel(stream.handle, SavedStream.of(stream, state), answers, stream.lane.stamp.state_hash)
