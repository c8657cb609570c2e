"""Streams that go to another daemon, and those that come from one: the ADMIN commands for it.

The daemons do not know each other: an operator's command (:mod:`recurd.drain`, or a file in between) takes streams here
and hands them over there, group by group (:mod:`recurd.fences` has the stages)::

    gather   take some streams as a group, closed to clients if they are to leave
    export   a page of the group: what the journal would keep of each stream, between two of its records
    release  they have arrived elsewhere: end them here, and send their clients there
    lift     they have not: as if nothing had happened
    import   take streams in, still closed to clients
    admit    they are this daemon's from now on
    drop     they are not
    redirect no stream is left here: send everybody on who asks for one
    groups   which have arrived and are not decided about
    fate     what became of a group

Every command may be given twice.
"""

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import msgspec

from recurd import wire
from recurd.admin import Command, Request
from recurd.errors import Code, Refused
from recurd.fences import Fences, Group
from recurd.lane import Lane
from recurd.lifecycle import Lifecycle
from recurd.peers import Outbox, Peers
from recurd.saving import ModelStamp, Parcel, SavedStream, Stamp, Unsaved, is_fresh
from recurd.streams import Redirect, Stream, Streams
from recurd.versions import Versions

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

#: What a stream takes in a page besides its state and its answers' data, about.
_STREAM_BYTES = 512
_ANSWER_BYTES = 96
#: As a configuration may have it.
_MAX_IDLE_SECONDS = 1e9


class _Gather(msgspec.Struct, frozen=True):
    group: str
    #: Whether they are to leave. Without it nothing changes for them.
    fence: bool = False
    #: About so many; the streams of a connection are never parted. With ``fence`` only.
    limit: int = 256
    #: Without ``fence``: only these.
    model: str | None = None
    stream: str = "*"
    tenant: str = "*"


class _Export(msgspec.Struct, frozen=True):
    group: str
    start: int
    max_bytes: int
    #: At most so many streams: others wait while a page is made, and while it is taken in.
    limit: int = 512


class _OfGroup(msgspec.Struct, frozen=True):
    group: str


class _Release(msgspec.Struct, frozen=True):
    group: str
    endpoint: str
    server_key: str | None = None


class _Import(msgspec.Struct, frozen=True):
    group: str
    stamps: list[ModelStamp]
    accept_drift: bool = False
    #: Keep them until it is decided about them, however long that takes.
    lasting: bool = True


class _Redirect(msgspec.Struct, frozen=True):
    #: ``None``: take streams again.
    endpoint: str | None = None
    server_key: str | None = None


class Moving:
    """Carries out the commands. Owned by the engine, which owns what it works on too."""

    def __init__(
        self,
        *,
        versions: Versions,
        streams: Streams,
        fences: Fences,
        peers: Peers,
        outbox: Outbox,
        unsaved: Unsaved,
        lifecycle: Lifecycle,
        log: "FilteringBoundLogger",
    ) -> None:
        self._versions = versions
        self._lanes = versions.present
        self._streams = streams
        self._fences = fences
        self._peers = peers
        self._outbox = outbox
        self._unsaved = unsaved
        self._lifecycle = lifecycle
        self._log = log

    @property
    def commands(self) -> dict[str, Command]:
        """By name."""
        return {
            "gather": self._gather,
            "export": self._export,
            "release": self._release,
            "lift": self._lift,
            "import": self._import,
            "admit": self._admit,
            "drop": self._drop,
            "redirect": self._redirect,
            "groups": self._groups,
            "fate": self._fate,
        }

    # --- away from here ---

    def _gather(self, request: Request, now: float) -> tuple[Any, bytes]:
        wanted = request.read(_Gather)
        group = self._fences.get(wanted.group, now)
        if group is None:
            streams = self._next(wanted.limit) if wanted.fence else self._like(wanted)
            group = Group(wanted.group, streams)
            if wanted.fence:
                self._close(group)
            if streams:
                self._fences.add(group, now)
        return {
            "streams": len(group.streams),
            "left": len(self._streams),
            "stamps": [ModelStamp(lane.name, lane.stamp) for lane in self._versions.turns if lane.streams],
        }, b""

    def _next(self, limit: int) -> list[Stream]:
        """The streams that leave next: those without a connection, then those of as many connections as needed.

        A client follows with all its streams at once, so they leave together. Those without a connection leave first:
        a client that has followed may ask for them.
        """
        streams = []
        for stream in self._streams.all():
            if stream.peer is None and stream.fence is None:
                streams.append(stream)
                if len(streams) >= limit:
                    return streams
        if streams:
            return streams
        for peer in self._peers.all():
            if peer.fence is None:
                streams += [self._streams.of_handle(handle) for handle in peer.handles]
            if len(streams) >= limit:
                break
        return streams

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

    def _export(self, request: Request, now: float) -> tuple[Any, bytes]:
        wanted = request.read(_Export)
        group = self._demand(wanted.group, now)
        page, following = self._page(group, wanted)
        states = _states([stream for stream in page if not is_fresh(stream)])
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

    def _release(self, request: Request, now: float) -> tuple[Any, bytes]:
        wanted = request.read(_Release)
        group = self._fences.get(wanted.group, now)
        if group is None:
            return {"fate": self._fences.fate(wanted.group)}, b""
        if group.is_held or not all(_is_settled(stream) for stream in group.members()):
            raise Refused(Code.BAD_REQUEST, f"group '{wanted.group}' has not been exported")
        group.redirect = Redirect(wanted.endpoint, wanted.server_key, group.id)
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

    def _lift(self, request: Request, now: float) -> tuple[Any, bytes]:
        wanted = request.read(_OfGroup)
        group = self._fences.get(wanted.group, now)
        if group is not None and not group.is_held:
            self._open(group)
        return {"fate": self._fences.fate(wanted.group)}, b""

    def _open(self, group: Group) -> None:
        """The streams of a group that was to leave stay."""
        for stream in group.members():
            stream.fence = None
        for peer in group.peers:
            peer.fence = None
        self._fences.end(group, "lifted")

    def _redirect(self, request: Request, now: float) -> tuple[Any, bytes]:
        wanted = request.read(_Redirect)
        left = len(self._streams)
        if wanted.endpoint is None:
            self._fences.redirect = None
        elif not left:
            self._fences.redirect = Redirect(wanted.endpoint, wanted.server_key)
            self._log.info("drained", endpoint=wanted.endpoint)
        return {"left": left}, b""

    def _groups(self, request: Request, now: float) -> tuple[Any, bytes]:
        """Groups that have arrived here, with the number of their streams."""
        return {"held": {group.id: sum(1 for _ in group.members()) for group in self._fences.held()}}, b""

    def _fate(self, request: Request, now: float) -> tuple[Any, bytes]:
        """What became of a group; asking changes nothing for it."""
        return {"fate": self._fences.fate(request.read(_OfGroup).group)}, b""

    # --- to here ---

    def _import(self, request: Request, now: float) -> tuple[Any, bytes]:
        wanted = request.read(_Import)
        try:
            parcels = msgspec.msgpack.decode(request.data, type=list[Parcel]) if len(request.data) else []
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise Refused(Code.BAD_REQUEST, f"the streams cannot be read: {error}") from error
        for stamp in wanted.stamps:
            self._check_stamp(stamp.model, stamp.stamp, accept_drift=wanted.accept_drift)
        # All are looked at before the first is taken in.
        self._check_all(parcels, wanted.stamps)
        group = self._fences.get(wanted.group, now)
        fate = self._fences.fate(wanted.group)
        if fate not in ("open", "unknown") or (group is not None and not group.is_held):
            raise Refused(Code.BAD_REQUEST, f"group '{wanted.group}' was decided about before")
        if group is None:
            group = Group(wanted.group, [], is_held=True, is_lasting=wanted.lasting)
            if parcels:
                self._fences.add(group, now)
        for parcel in parcels:
            self._take_in(parcel, group, now)
        for former in self._fences.held():
            if former is not group and not any(former.members()):
                self._fences.end(former, "dropped")  # all of it has come again
        return {"streams": len(parcels)}, b""

    def _check_stamp(self, model: str, theirs: Stamp, *, accept_drift: bool) -> None:
        lane = self._lanes.get(model)
        if lane is None:
            raise Refused(Code.UNKNOWN_MODEL, f"there is no model '{model}', only {', '.join(sorted(self._lanes))}")
        if lane.stamp.layout != theirs.layout:
            raise Refused(
                Code.WRONG_MODEL, f"the states of model '{model}' have other types or shapes here: {lane.stamp.layout}"
            )
        difference = lane.stamp.difference(theirs)
        if difference is not None and not accept_drift:
            raise Refused(
                Code.WRONG_MODEL,
                f"streams of model '{model}' were left by another one ({difference}); their results would differ, "
                f"which --accept-drift takes in its stride",
            )

    def _check_all(self, parcels: list[Parcel], stamps: list[ModelStamp]) -> None:
        """Raises :class:`Refused` unless every one of them can be taken in."""
        checked = {(one.model, one.stamp.state_hash) for one in stamps}
        new: dict[str, int] = {}
        handles, names = set(), set()
        for parcel in parcels:
            saved = parcel.stream
            if (saved.model, parcel.state_hash) not in checked:
                raise Refused(Code.BAD_REQUEST, f"stream '{saved.name}' is of model '{saved.model}', without a stamp")
            _check_parcel(parcel, self._lanes[saved.model])
            self._check_place(parcel)
            handles.add(parcel.handle)
            names.add((saved.tenant, saved.name))
            if self._streams.named(saved.tenant, saved.name) is None:
                new[saved.tenant] = new.get(saved.tenant, 0) + 1
                self._lifecycle.check_room(self._lanes[saved.model], saved.tenant, new[saved.tenant])
        if len(handles) < len(parcels) or len(names) < len(parcels):
            raise Refused(Code.BAD_REQUEST, "a stream stands there twice")

    def _check_place(self, parcel: Parcel) -> None:
        """Hold a stream that comes against those that are here. Raises :class:`Refused` (``exists``)."""
        saved = parcel.stream
        self._lifecycle.check_name(saved.name)
        stream = self._streams.named(saved.tenant, saved.name)
        other = self._streams.by_handle(parcel.handle)
        if stream is None and other is None and not self._streams.is_reserved(saved.tenant, saved.name):
            return
        what = f"there is a stream '{saved.name}' of tenant '{saved.tenant}' already"
        if stream is not other or stream is None or stream.lane.name != saved.model:
            raise Refused(Code.EXISTS, f"{what}, another one")
        is_held = stream.fence is not None and stream.fence.is_held
        leaves = stream.fence is not None and not is_held
        if leaves or stream.accepted > saved.seq or (stream.accepted < saved.seq and not is_held):
            raise Refused(Code.EXISTS, f"{what}, at record {stream.accepted}, and {saved.seq} comes")

    def _take_in(self, parcel: Parcel, group: Group, now: float) -> None:
        stream = self._streams.by_handle(parcel.handle)
        if stream is None:
            stream = self._lifecycle.restore(parcel.handle, parcel.stream, parcel.answers, now)
            # Nothing of it is in the journal yet.
            stream.saved = stream.forgotten
        elif stream.fence is None:
            return  # it came before, and was handed over
        else:
            self._lifecycle.renew(stream, parcel.stream, parcel.answers, now)
        if parcel.stream.state is not None:
            stream.lane.slots.put(stream, parcel.stream.state)
        if stream.fence is not group:
            stream.fence = group
            group.streams.append(stream)
        self._unsaved.note(stream)

    def _admit(self, request: Request, now: float) -> tuple[Any, bytes]:
        wanted = request.read(_OfGroup)
        group = self._fences.get(wanted.group, now)
        if group is not None and group.is_held:
            for stream in group.members():
                stream.fence = None
                stream.last_seen = now
                self._unsaved.note(stream)
            self._fences.end(group, "admitted")
            self._log.info("streams_arrived", streams=len(group.streams))
        return {"fate": self._fences.fate(wanted.group)}, b""

    def _drop(self, request: Request, now: float) -> tuple[Any, bytes]:
        wanted = request.read(_OfGroup)
        group = self._fences.get(wanted.group, now)
        if group is not None and group.is_held:
            self._forget(group)
        return {"fate": self._fences.fate(wanted.group)}, b""

    def _forget(self, group: Group) -> None:
        for stream in list(group.members()):
            self._lifecycle.forget(stream)
        self._fences.end(group, "dropped")

    # --- time ---

    def expire(self, now: float) -> None:
        """Let groups go whose operator is not there any more."""
        for group in self._fences.expired(now):
            self._log.warning("operator_gone", streams=len(group.streams), group=group.id)
            if group.is_held:
                self._forget(group)
            else:
                self._open(group)

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


def _states(streams: list[Stream]) -> dict[int, bytes]:
    """The states of streams none of which is fresh, by handle."""
    by_lane: dict[Lane, list[Stream]] = {}
    for stream in streams:
        by_lane.setdefault(stream.lane, []).append(stream)
    states: dict[int, bytes] = {}
    for lane, part in by_lane.items():
        states |= zip((stream.handle for stream in part), lane.slots.states(part), strict=True)
    return states


def _parcel(stream: Stream, state: bytes | None) -> Parcel:
    answers = [(seq, generation, header, bytes(payload)) for seq, generation, (header, payload) in stream.answers]
    return Parcel(stream.handle, SavedStream.of(stream, state), answers, stream.lane.stamp.state_hash)


def _check_parcel(parcel: Parcel, lane: Lane) -> None:
    """Hold a stream against what one can be. Raises :class:`Refused` (``bad_request``)."""
    saved = parcel.stream
    numbers = 0 <= saved.acked <= saved.seq < 2**63 and 1 <= saved.first_generation <= saved.generation < 2**32
    if not (numbers and 0 < parcel.handle < 2**64 and 0 < saved.idle_timeout <= _MAX_IDLE_SECONDS):
        raise Refused(Code.BAD_REQUEST, f"the numbers of stream '{saved.name}' cannot be")
    if saved.state is not None and len(saved.state) != lane.row_bytes:
        raise Refused(Code.BAD_REQUEST, f"the state of stream '{saved.name}' does not have {lane.row_bytes} bytes")
    last = saved.acked
    for seq, generation, header, payload in parcel.answers:
        if not (
            last < seq <= saved.seq and 1 <= generation <= saved.generation and _is_answer(parcel, seq, header, payload)
        ):
            raise Refused(Code.BAD_REQUEST, f"answer {seq} of stream '{saved.name}' cannot be")
        last = seq


def _is_answer(parcel: Parcel, seq: int, header: bytes, payload: bytes) -> bool:
    try:
        found, _ = wire.decode(header + payload)
    except Refused:
        return False
    return found.type in _ANSWERS and (found.handle, found.seq) == (parcel.handle, seq)


#: What a record may have been answered with, and is kept for retries.
_ANSWERS = frozenset(wire.ANSWERS.values())
