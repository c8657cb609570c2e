"""Which versions of the models are served: the present one of each, and former ones until their streams have ended.

A new file takes over between two ticks. Where its states are those of the file before (the contract's state hash) and
what goes in and comes out has the same form, it takes the former one's place in the lane, and streams go on from the
state they have. Otherwise it gets a lane of its own, on which streams begin from then on; those of the former one

* finish there (``finish``), or
* end as soon as they have nothing queued (``restart``): ``reloaded``.

A fresh start (a reset) takes a stream over to the present version where the form is the same: nothing of what the
former one left is needed any more.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

import msgspec

from recurd.arena import Device, Store
from recurd.lane import Lane
from recurd.stats import ModelStats, Stats
from recurd.streams import MAX_ENDS, Kind, Stream, Streams

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

#: What becomes of streams whose states the new file cannot go on with.
Incompatible = Literal["finish", "restart"]


class Takeover(msgspec.Struct, frozen=True):
    """What became of a model's streams: they kept their state, finish on the former version, or end."""

    #: Whether the states of the file before cannot be gone on with.
    is_new_version: bool = False
    kept: int = 0
    finishing: int = 0
    ending: int = 0


class Versions:
    """All lanes. Owned by the engine."""

    def __init__(
        self,
        make_lane: Callable[[str, Device, ModelStats], Lane],
        *,
        streams: Streams,
        stats: Stats,
        log: "FilteringBoundLogger",
    ) -> None:
        #: The present one of each model, by name.
        self.present: dict[str, Lane] = {}
        self.former: list[Lane] = []
        #: All of them, the one whose turn it is first.
        self.turns: deque[Lane] = deque()
        self._make_lane = make_lane
        self._streams = streams
        self._stats = stats
        self._log = log
        self._store: Store | None = None
        # Streams of lanes that are ending, to be looked at; some have ended or moved since.
        self._to_end: list[Stream] = []

    def keep_in(self, store: Store) -> None:
        """See :meth:`recurd.engine.Engine.keep_in`."""
        self._store = store
        for lane in self.turns:
            lane.slots.store = store

    # --- taking over ---

    def add(self, name: str, device: Device, idle_seconds: float | None = None) -> None:
        """Serve a model under a name that is free; ``idle_seconds`` of its streams, where not those configured."""
        lane = self.present[name] = self._make(name, device)
        lane.idle_seconds = idle_seconds or lane.idle_seconds

    def add_former(self, name: str, device: Device) -> None:
        """Serve a version of a model that no stream begins on."""
        lane = self._make(name, device)
        lane.is_former = True
        self.former.append(lane)

    def _make(self, name: str, device: Device) -> Lane:
        stats = self._stats.models.get(name) or self._stats.add_model(name, 0)
        self._count(stats, device, 1)
        lane = self._make_lane(name, device, stats)
        lane.slots.store = self._store
        self.turns.append(lane)
        return lane

    def lane_of(self, name: str, version: str) -> Lane:
        """Where a stream goes on whose state is of this version: the former one, where it is served, or the present."""
        for lane in self.former:
            if (lane.name, lane.version) == (name, version):
                return lane
        return self.present[name]

    def replace(self, name: str, device: Device, incompatible: Incompatible) -> Takeover:
        """Put a new file, with as many slots, in the place of a model; none of its ticks may be out."""
        lane = self.present[name]
        if lane.goes_on_with(device.contract):
            lane.change(device)
            return Takeover(kept=lane.streams)
        new = self._make(name, device)
        new.idle_seconds = lane.idle_seconds
        takeover = self.remove(name, incompatible)
        self.present[name] = new
        return takeover

    def remove(self, name: str, incompatible: Incompatible) -> Takeover:
        """No stream begins on this model any more."""
        lane = self.present.pop(name)
        lane.is_former = True
        self.former.append(lane)
        if incompatible == "finish":
            return Takeover(is_new_version=True, finishing=lane.streams)
        self._end(lane)
        return Takeover(is_new_version=True, ending=lane.streams)

    def end_former(self) -> int:
        """End the streams that finish on former versions; how many there are."""
        lanes = [lane for lane in self.former if not lane.is_ending]
        for lane in lanes:
            self._end(lane)
        return sum(lane.streams for lane in lanes)

    def _end(self, lane: Lane) -> None:
        lane.is_ending = True
        self._to_end += self._streams.of_lane(lane)

    # --- after that ---

    @property
    def are_due(self) -> bool:
        """Whether there are streams to be ended now."""
        return bool(self._to_end)

    def due(self) -> Iterator[Stream]:
        """Some of the streams that have nothing queued and end because of a reload; the caller ends them."""
        for _ in range(min(MAX_ENDS, len(self._to_end))):
            stream = self._to_end.pop()
            if not stream.ended and not stream.queue and self.has_to_end(stream):
                yield stream

    @staticmethod
    def has_to_end(stream: Stream) -> bool:
        """Whether a stream ends as soon as nothing is queued: not while it may live on elsewhere."""
        return stream.lane.is_ending and (stream.fence is None or stream.fence.is_held)

    def stays(self, stream: Stream) -> None:
        """A stream that was to leave for another daemon does not."""
        if stream.lane.is_ending:
            self._to_end.append(stream)

    def renew(self, stream: Stream) -> bool:
        """Take a stream that is at a fresh start, and not in line, over to the present version, if it can be."""
        former, present = stream.lane, self.present.get(stream.lane.name)
        if not former.is_former or present is None or present.contract.form != former.contract.form:
            return False
        if any(record.kind in (Kind.PUT, Kind.RESET_TO) for record in stream.queue):
            return False  # to be given a state of the former version
        former.slots.drop(stream)
        former.hand_over(stream, present)
        return True

    def drop(self) -> None:
        """Let go of former versions that have no stream any more, and of their memory."""
        for lane in [lane for lane in self.former if not lane.streams and not lane.busy]:
            self.former.remove(lane)
            self.turns.remove(lane)
            self._count(lane.stats, lane.device, -1)
            self._log.info("version_dropped", model=lane.name, version=lane.version)

    def _count(self, stats: ModelStats, device: Device, sign: int) -> None:
        stats.slots += sign * device.slots
        self._stats.state_bytes += sign * device.slots * device.row_bytes
