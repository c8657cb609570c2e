"""Streams that come from another daemon, or out of a file: looked at, taken in closed, and handed over or forgotten
(:mod:`recurd.moving`)."""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from recurd import wire
from recurd.admin import Request
from recurd.config import TENANT_NAME
from recurd.errors import Code, Refused
from recurd.fences import Fences, Group, GroupId, OfGroup
from recurd.lane import Lane, states_of
from recurd.lifecycle import Lifecycle
from recurd.saving import ModelStamp, Parcel, SavedStream, Stamp, Unsaved, is_fresh
from recurd.streams import Streams

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

#: As a configuration may have it.
_MAX_IDLE_SECONDS = 1e9


class _Import(msgspec.Struct, frozen=True):
    group: GroupId
    stamps: list[ModelStamp]
    accept_drift: bool = False
    #: Keep them until it is decided about them, however long that takes.
    lasting: bool = True


class Arriving:
    """The commands for it. Owned by :class:`recurd.moving.Moving`."""

    def __init__(
        self,
        *,
        lanes: Mapping[str, Lane],
        streams: Streams,
        fences: Fences,
        unsaved: Unsaved,
        lifecycle: Lifecycle,
        log: "FilteringBoundLogger",
    ) -> None:
        self._lanes = lanes
        self._streams = streams
        self._fences = fences
        self._unsaved = unsaved
        self._lifecycle = lifecycle
        self._log = log

    def import_(self, request: Request, now: float) -> tuple[Any, bytes]:
        """Take streams in, closed to clients: all of them or none."""
        wanted = request.read(_Import)
        try:
            parcels = msgspec.msgpack.decode(request.data, type=list[Parcel]) if len(request.data) else []
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise Refused(Code.BAD_REQUEST, f"the streams cannot be read: {error}") from error
        for stamp in wanted.stamps:
            self._check_stamp(stamp.model, stamp.stamp, accept_drift=wanted.accept_drift)
        # All are looked at before the first is taken in.
        self._check_all(parcels, wanted)
        group = self._fences.get(wanted.group, now)
        fate = self._fences.fate(wanted.group)
        if fate not in ("open", "unknown") or (group is not None and not group.is_held):
            raise Refused(Code.BAD_REQUEST, f"group '{wanted.group}' was decided about before")
        if group is None:
            group = Group(wanted.group, [], is_held=True, is_lasting=wanted.lasting)
            if parcels:
                self._fences.add(group, now)
        came = sum(self._take_in(parcel, group, now) for parcel in parcels)
        for former in self._fences.held():
            if former is not group and not any(former.members()):
                self._fences.end(former, "dropped")  # all of it has come again
        return {"streams": came, "stayed": len(parcels) - came}, b""

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
                f"and --accept-drift goes on all the same",
            )

    def _check_all(self, parcels: list[Parcel], wanted: _Import) -> None:
        """Raises :class:`Refused` unless every one of them can be taken in, or is here already."""
        conflicts: dict[int, str] = {}
        checked = {(one.model, one.stamp.state_hash) for one in wanted.stamps}
        new: Counter[str] = Counter()
        on_lane: Counter[str] = Counter()
        handles, names = set(), set()
        for parcel in parcels:
            saved = parcel.stream
            if (saved.model, parcel.state_hash) not in checked:
                raise Refused(Code.BAD_REQUEST, f"stream '{saved.name}' is of model '{saved.model}', without a stamp")
            _check_parcel(parcel, self._lanes[saved.model], is_run=wanted.lasting)
            self._lifecycle.check_name(saved.name)
            self._lifecycle.check_owner(saved.tenant, saved.name, saved.model)
            if conflict := self._conflict(parcel, is_handed_over=wanted.lasting):
                conflicts[parcel.handle] = conflict
            handles.add(parcel.handle)
            names.add((saved.tenant, saved.name))
            if self._streams.named(saved.tenant, saved.name) is None:
                new[saved.tenant] += 1
                on_lane[saved.model] += 1
                lane = self._lanes[saved.model]
                self._lifecycle.check_room(lane, saved.tenant, new[saved.tenant], on_lane=on_lane[saved.model])
        if len(handles) < len(parcels) or len(names) < len(parcels):
            raise Refused(Code.BAD_REQUEST, "a stream stands there twice")
        conflicts |= self._other_states([parcel for parcel in parcels if parcel.handle not in conflicts])
        if conflicts:
            first, *others = conflicts.values()
            text = first + (f" (and so for {len(others)} more)" if others else "")
            raise Refused(Code.EXISTS, text, handles=list(conflicts))

    def _conflict(self, parcel: Parcel, *, is_handed_over: bool) -> str:
        """What keeps a stream that comes from being one that is here, or from having its place; empty: nothing.

        ``is_handed_over``: by the daemon that it was at, and is not a copy that may be there still.
        """
        saved = parcel.stream
        stream = self._streams.named(saved.tenant, saved.name)
        other = self._streams.by_handle(parcel.handle)
        if self._streams.is_reserved(saved.tenant, saved.name):
            return f"a clone that is still to be made has the name of stream '{saved.name}' of tenant '{saved.tenant}'"
        if stream is None and other is not None:
            return f"there is a stream '{other.name}' in the place of stream '{saved.name}' of tenant '{saved.tenant}'"
        if stream is None:
            return "" if is_handed_over else self._fences.may_come(saved.tenant, saved.name)
        what = _is_there(saved)
        if stream is not other or stream.lane.name != saved.model:
            return f"{what}, another one"
        is_held = stream.fence is not None and stream.fence.is_held
        leaves = stream.fence is not None and not is_held
        if leaves or stream.accepted > saved.seq or (stream.accepted < saved.seq and not is_held):
            return f"{what}, at record {stream.accepted}, and {saved.seq} comes"
        if not is_held and (stream.answered, stream.generation) != (saved.seq, saved.generation):
            return f"{what}, of generation {stream.generation} and in use"
        return ""

    def _other_states(self, parcels: list[Parcel]) -> dict[int, str]:
        """Which streams came before, and were handed over, with other states than come now; by handle, in words.

        The same number of records is not the same records.
        """
        here = [(self._streams.by_handle(parcel.handle), parcel.stream) for parcel in parcels]
        same = [(stream, saved) for stream, saved in here if stream is not None and stream.fence is None]
        states = states_of([stream for stream, _ in same if not is_fresh(stream)])
        return {
            stream.handle: f"{_is_there(saved)}, with another state after {saved.seq} records"
            for stream, saved in same
            if states.get(stream.handle) != saved.state
        }

    def _take_in(self, parcel: Parcel, group: Group, now: float) -> bool:
        """Whether it comes, and is not here already."""
        stream = self._streams.by_handle(parcel.handle)
        if stream is None:
            stream = self._lifecycle.restore(parcel.handle, parcel.stream, parcel.answers, now)
            # Nothing of it is in the journal yet.
            stream.saved = stream.apart = stream.forgotten
        elif stream.fence is None:
            return False  # it came before, and was handed over
        else:
            self._lifecycle.renew(stream, parcel.stream, parcel.answers, now)
        if parcel.stream.state is not None:
            stream.lane.slots.put(stream, parcel.stream.state)
        if stream.fence is not group:
            stream.fence = group
            group.streams.append(stream)
        self._unsaved.note(stream, parcel.stream.state)
        return True

    def admit(self, request: Request, now: float) -> tuple[Any, bytes]:
        """They are this daemon's from now on."""
        wanted = request.read(OfGroup)
        group = self._fences.get(wanted.group, now)
        streams = list(group.members()) if group is not None and group.is_held else []
        if group is not None and group.is_held:
            # As they stand now: before they are saved, a tick may be in the middle of what comes for them.
            states = states_of([stream for stream in streams if not is_fresh(stream)])
            for stream in streams:
                stream.fence = None
                stream.last_seen = now
                self._unsaved.note(stream, states.get(stream.handle))
            self._fences.end(group, "admitted")
            self._log.info("streams_arrived", streams=len(streams))
        return {"fate": self._fences.fate(wanted.group), "streams": len(streams)}, b""

    def drop(self, request: Request, now: float) -> tuple[Any, bytes]:
        """They are not."""
        wanted = request.read(OfGroup)
        group = self._fences.get(wanted.group, now)
        if group is not None and group.is_held:
            self.forget(group)
        return {"fate": self._fences.fate(wanted.group)}, b""

    def forget(self, group: Group) -> None:
        """No stream of it was ever here."""
        for stream in list(group.members()):
            self._lifecycle.forget(stream)
        self._fences.end(group, "dropped")


def _is_there(saved: SavedStream) -> str:
    return f"there is a stream '{saved.name}' of tenant '{saved.tenant}' already"


def _check_parcel(parcel: Parcel, lane: Lane, *, is_run: bool) -> None:
    """Hold a stream against what one can be. Raises :class:`Refused` (``bad_request``, ``not_finite``).

    ``is_run``: a daemon has just let go of it, so its state is whatever its model made of it.
    """
    saved = parcel.stream
    if not TENANT_NAME.fullmatch(saved.tenant):
        raise Refused(Code.BAD_REQUEST, f"'{saved.tenant}' cannot be the name of a tenant")
    # Far from where numbers end on the wire: the stream is to go on from them.
    numbers = 0 <= saved.acked <= saved.seq < 2**63 and 1 <= saved.first_generation <= saved.generation < 2**31
    if not (numbers and 0 < parcel.handle < 2**64 and 0 < saved.idle_timeout <= _MAX_IDLE_SECONDS):
        raise Refused(Code.BAD_REQUEST, f"the numbers of stream '{saved.name}' cannot be")
    if saved.state is not None and len(saved.state) != lane.row_bytes:
        raise Refused(Code.BAD_REQUEST, f"the state of stream '{saved.name}' does not have {lane.row_bytes} bytes")
    if saved.state is not None and not is_run:
        lane.check_finite(saved.state, f"the state of stream '{saved.name}'")
    if len(parcel.answers) != saved.seq - saved.acked:
        raise Refused(Code.BAD_REQUEST, f"answers of stream '{saved.name}' are missing")
    for number, (seq, generation, header, payload) in enumerate(parcel.answers, saved.acked + 1):
        if not (seq == number and 1 <= generation <= saved.generation and _is_answer(parcel, seq, header, payload)):
            raise Refused(Code.BAD_REQUEST, f"answer {seq} of stream '{saved.name}' cannot be")


def _is_answer(parcel: Parcel, seq: int, header: bytes, payload: bytes) -> bool:
    try:
        found, _ = wire.decode(header + payload)
    except Refused:
        return False
    is_cut = len(header) == wire.HEADER_BYTES  # in the right place, as it is kept
    return is_cut and found.type in _ANSWERS and (found.handle, found.seq) == (parcel.handle, seq)


#: What a record may have been answered with, and is kept for retries.
_ANSWERS = frozenset(wire.ANSWERS.values())
