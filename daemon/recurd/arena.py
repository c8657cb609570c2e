"""Which streams have a row of the arenas: those run lately. The others' states wait elsewhere and come back in bulk.

A slot is only needed while a stream runs, so the slots of a lane are a cache. A stream without one has its state

* nowhere, when its next step starts from the initial state;
* in the journal, when it was saved as it stands (so that it goes out without being read);
* in the host's memory (``Stream.state``) otherwise.

The device tensors themselves belong to :class:`recurd.model.Model`; this is the bookkeeping beside them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from recurd.contract import Contract
from recurd.errors import DeviceLost
from recurd.saving import Stamp
from recurd.stats import ModelStats
from recurd.streams import NO_SLOT, Stream

#: When a slot was last used that nobody has: after everybody.
_FREE = np.iinfo(np.int64).max


class Device(Protocol):
    """What a lane needs of a loaded model (:class:`recurd.model.Model`)."""

    @property
    def contract(self) -> Contract:
        """The model's description."""
        ...

    @property
    def slots(self) -> int:
        """Rows of the arenas."""
        ...

    @property
    def row_bytes(self) -> int:
        """Bytes of one stream's state."""
        ...

    def run(
        self,
        slots: npt.NDArray[np.int64],
        fresh: npt.NDArray[np.bool_],
        lengths: npt.NDArray[np.int32],
        input: npt.NDArray[Any],
    ) -> list[npt.NDArray[Any]]:
        """One tick; see :meth:`recurd.model.Model.run`."""
        ...

    @property
    def stamp(self) -> Stamp:
        """What the bits of its states depend on."""
        ...

    def rows(self, slots: npt.NDArray[np.int64]) -> list[bytes]:
        """The states of these slots."""
        ...

    def write_rows(self, slots: npt.NDArray[np.int64], rows: list[bytes]) -> None:
        """Set the states of these slots."""
        ...


class Store(Protocol):
    """Where durable streams stand (:class:`recurd.journal.Journal`)."""

    def states(self, handles: list[int]) -> list[bytes]:
        """The states of streams as they were saved last, none of them at a fresh start."""
        ...


class Slots:
    """The slots of one lane. Owned by the lane; only it says where the state of a stream is."""

    def __init__(self, device: Device, stats: ModelStats, clock: Callable[[], float]) -> None:
        self.count = device.slots
        #: Where the states are.
        self.device = device
        #: Where durable streams stand, when they do.
        self.store: Store | None = None
        self._stats = stats
        self._clock = clock
        # A stack that hands out low numbers first, so that a lightly used arena touches little memory.
        self._free = list(range(self.count - 1, -1, -1))
        self._holders: list[Stream | None] = [None] * self.count
        # Number of the tick that used a slot last.
        self._used: npt.NDArray[np.int64] = np.full(self.count, _FREE)
        self._tick = 0

    def __len__(self) -> int:
        """Slots in use."""
        return self.count - len(self._free)

    # --- ticks ---

    def admit(self, streams: list[Stream]) -> None:
        """Give a slot to every stream of the next tick, at most as many as there are slots; others go out for them.

        Raises :class:`~recurd.errors.JournalError` when a state cannot be read, and :class:`DeviceLost`.
        """
        self._tick += 1
        missing = [stream for stream in streams if stream.slot == NO_SLOT]
        if missing:
            self._used[[stream.slot for stream in streams if stream.slot != NO_SLOT]] = self._tick
            self._page_out(len(missing) - len(self._free))
            self._page_in(missing)

    def used(self, slots: npt.NDArray[np.int64]) -> None:
        """Note that the tick to come uses these slots."""
        self._used[slots] = self._tick

    def _page_out(self, count: int) -> None:
        """Take the slots of ``count`` streams that have not been run for the longest time."""
        if count <= 0:
            return
        oldest = np.argpartition(self._used, count - 1)[:count]
        streams = [stream for slot in oldest.tolist() if (stream := self._holders[slot]) is not None]
        to_read = [stream for stream in streams if not (stream.fresh or self._is_stored(stream))]
        if to_read:
            rows = self._read(to_read)
            for stream, row in zip(to_read, rows, strict=True):
                self._keep(stream, row)
        for stream in streams:
            self._release(stream)
        self._stats.paged_out += len(streams)

    def _page_in(self, streams: list[Stream]) -> None:
        begin = self._clock()
        stateful = [stream for stream in streams if not stream.fresh]
        states = self._kept(stateful)
        for stream in streams:
            slot = stream.slot = self._free.pop()
            self._holders[slot] = stream
            self._used[slot] = self._tick
        self._stats.slots_used += len(streams)
        if stateful:
            with _answering():
                self.device.write_rows(np.array([stream.slot for stream in stateful], np.int64), states)
            self._stats.paged_in += len(stateful)
            self._stats.page_in_seconds.observe(self._clock() - begin)
        for stream in streams:
            self._keep(stream, None)

    def change(self, device: Device) -> None:
        """Keep the states on another device, of as many slots, from now on; no tick may be out."""
        taken = np.array([slot for slot, stream in enumerate(self._holders) if stream is not None], np.int64)
        if len(taken):
            device.write_rows(taken, self.device.rows(taken))
        self.device = device

    # --- one stream's state ---

    def state(self, stream: Stream) -> bytes | None:
        """The state of a stream as it stands, wherever it is; ``None`` when it starts from the initial state."""
        return None if stream.fresh else self.states([stream])[0]

    def states(self, streams: list[Stream]) -> list[bytes]:
        """The states of streams none of which is fresh, in bulk."""
        here = [stream for stream in streams if stream.slot != NO_SLOT]
        if here and len(here) == len(streams):  # as of nearly every commit
            return self._read(here)
        rows = iter(self._read(here) if here else ())
        kept = iter(self._kept([stream for stream in streams if stream.slot == NO_SLOT]))
        return [next(kept if stream.slot == NO_SLOT else rows) for stream in streams]

    def _read(self, streams: list[Stream]) -> list[bytes]:
        with _answering():
            return self.device.rows(np.array([stream.slot for stream in streams], np.int64))

    def check(self) -> None:
        """After a run that raised: whether it was the input, or the device is gone. Raises :class:`DeviceLost`.

        Some errors of CUDA stay for the rest of the process; then every run would fail and nobody would look after it.
        """
        with _answering():
            self.device.rows(np.zeros(1, np.int64))

    def put(self, stream: Stream, state: bytes) -> None:
        """Give a stream, not in a tick, another state; it goes to the device with the stream's next tick."""
        self.drop(stream)
        stream.fresh = False
        self._keep(stream, state)

    def drop(self, stream: Stream) -> None:
        """Take a stream's slot and what the host has of its state: what stands in the journal, if anything, counts."""
        if stream.slot != NO_SLOT:
            self._release(stream)
        self._keep(stream, None)

    def saved(self, stream: Stream) -> None:
        """A stream stands in the journal as it is: its state need not wait in the host's memory too."""
        if self._is_stored(stream):
            self._keep(stream, None)

    def _release(self, stream: Stream) -> None:
        self._holders[stream.slot] = None
        self._used[stream.slot] = _FREE
        self._free.append(stream.slot)
        self._stats.slots_used -= 1
        stream.slot = NO_SLOT

    def _keep(self, stream: Stream, state: bytes | None) -> None:
        self._stats.host_bytes += len(state or b"") - len(stream.state or b"")
        stream.state = state

    def _kept(self, streams: list[Stream]) -> list[bytes]:
        """The states of streams that have no slot and are not fresh."""
        away = [stream.handle for stream in streams if stream.state is None]
        # Without a journal all of them are in the host's memory.
        stored = iter(self.store.states(away) if self.store is not None and away else ())
        return [next(stored) if stream.state is None else stream.state for stream in streams]

    def _is_stored(self, stream: Stream) -> bool:
        """Whether the journal holds the very state that the device does."""
        in_the_middle = bool(stream.queue and stream.queue[0].taken)
        return self.store is not None and stream.saved == stream.answered and not in_the_middle


@contextmanager
def _answering() -> Iterator[None]:
    """Reading and writing rows is what no input can make fail: where it does, the device is gone."""
    try:
        yield
    except Exception as error:
        raise DeviceLost(f"the device does not answer any more: {str(error).strip().partition(chr(10))[0]}") from error
