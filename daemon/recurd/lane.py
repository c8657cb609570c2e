"""A lane: one model on one device, as the engine sees it, with its line of streams, its slots and its numbers."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from recurd import wire
from recurd.arena import Device, Slots
from recurd.config import Config, Limits
from recurd.contract import Contract
from recurd.errors import Code, Refused
from recurd.layout import Layout
from recurd.saving import Stamp, version_of
from recurd.scheduler import Scheduler, Shape
from recurd.stats import ModelStats
from recurd.streams import Chunk, Kind, Stream
from recurd.tenants import Share

#: How much longer than others the only chunk of a stream may wait: a thousand streams that send at one moment are no
#: overload.
_FIRST_PATIENCE = 4


class Room:
    """Room for queued chunks and retained answers in the whole daemon. Owned by the engine, used by its lanes."""

    def __init__(self, limits: Limits) -> None:
        self.max_chunks = limits.queued_chunks
        self.max_bytes = limits.queued_bytes
        self.max_retained = limits.retained_bytes
        self.retry_after_seconds = limits.busy_retry_seconds
        self.chunks = 0
        self.bytes = 0
        #: Bytes of the answers kept for retries.
        self.retained = 0
        #: And of the results of what is queued: they will be kept until they are acknowledged.
        self.due = 0

    @property
    def full(self) -> bool:
        """No chunk, however small, would be let in."""
        return self.chunks >= self.max_chunks

    def refusal(self, what: str) -> Refused:
        """What a chunk is told that does not fit; without numbers, which tell of others."""
        return Refused(Code.BUSY, f"too many {what}", retry_after_seconds=self.retry_after_seconds)


class Lane:
    """Owned by the engine. A stream lives on one lane; ticks of a lane never overlap."""

    def __init__(
        self,
        name: str,
        device: Device,
        *,
        config: Config,
        stats: ModelStats,
        room: Room,
        clock: Callable[[], float],
    ) -> None:
        contract = device.contract
        self.name = name
        self.contract = contract
        #: Streams of another version of the model cannot go on with this one's states, nor the other way round.
        self.version = version_of(contract.state_hash, contract.form_hash)
        #: Whether another version has taken its place: no stream begins here.
        self.is_former = False
        #: Whether its streams end as soon as they have nothing queued.
        self.is_ending = False
        self.slots = Slots(device, stats, clock)
        self.row_bytes = device.row_bytes
        #: Streams of the model, and how many there may be: as many as have room for their states. None is waited for
        #: in memory where there is a journal.
        self.streams = 0
        self._streams_of: Counter[str] = Counter()
        #: Idle time-out of its streams, and the longest that one may ask for.
        self.idle_seconds = config.timeouts.stream_idle_seconds
        for model in config.models:
            if model.name == name and model.stream_idle_seconds is not None:
                self.idle_seconds = model.stream_idle_seconds
        self._max_streams = device.slots + config.limits.host_state_bytes // device.row_bytes
        self.stats = stats
        #: The shape of every tick, where there is only one; then it costs nothing to put rows of any length together.
        self.shape = Shape.of(device, config.tick)
        self.scheduler = Scheduler(
            contract,
            max_rows=min(config.tick.rows, device.slots),
            max_steps=config.tick.steps if self.shape is None else self.shape.steps,
            padding_ratio=config.tick.padding_ratio if self.shape is None else 1.0,
        )
        self._room = room
        self._max_wait_seconds = config.limits.queued_seconds
        #: Bytes of what is queued here.
        self._queued_bytes = 0
        #: Whether a tick is out.
        self.busy = False
        self._max_steps = config.limits.chunk_steps
        self._take_form(contract)
        self._is_finite = _gives_finite(contract)
        # states
        self.layout = Layout(contract.state_hash, contract.states)
        #: What a request for a state is counted as while it waits: the bytes of its answer. Takes no memory.
        self.room_for_state = np.broadcast_to(np.uint8(0), self.layout.row_bytes)
        self._take_states(contract)

    @property
    def stamp(self) -> Stamp:
        """What the bits of its streams' states depend on."""
        return self.slots.device.stamp

    @property
    def device(self) -> Device:
        """Where its model runs."""
        return self.slots.device

    def goes_on_with(self, contract: Contract) -> bool:
        """Whether a file of this contract can go on with the states of the streams here, and with what is queued."""
        return version_of(contract.state_hash, contract.form_hash) == self.version

    def change(self, device: Device) -> None:
        """Go on with another file of the same version and form, between two ticks; the streams notice nothing."""
        self.slots.change(device)
        self.contract = device.contract
        self._is_finite = _gives_finite(device.contract)
        self._take_states(device.contract)

    def hand_over(self, stream: Stream, to: "Lane") -> None:
        """Let a stream go to another lane, with what it has queued and the room kept for its clones to come."""
        rooms = 1 + sum(record.kind is Kind.CLONE for record in stream.queue)
        size = sum(record.data.nbytes for record in stream.queue)
        for lane, sign in ((self, -1), (to, 1)):
            lane.count_streams(stream.tenant, sign * rooms)
            lane._count(sign * size)
        stream.lane = to

    @property
    def full(self) -> bool:
        """There is no room for the state of another stream."""
        return self.has_no_room(1)

    def has_no_room(self, count: int) -> bool:
        """There is none for the states of so many more streams."""
        return self.slots.store is None and self.streams + count > self._max_streams

    def count_streams(self, tenant: str, count: int) -> None:
        """So many streams of a tenant have come; negative: gone."""
        self.streams += count
        self._streams_of[tenant] += count

    def leaves_others_no_room(self, tenant: str, count: int) -> bool:
        """Whether a tenant would have more streams than there is still room for, with so many more."""
        return self.slots.store is None and self._streams_of[tenant] + count > self._max_streams - self.streams

    def enter(self, stream: Stream, chunk: Chunk) -> None:
        """Count a chunk that is about to be queued. Raises :class:`Refused` (``busy``, ``limit``) without room for it.

        The first one a stream has waiting is counted but always let in, as far as the bytes go and if its one turn in
        line will not be very late: streams that send much must not lock out those that send little. Nor must those that
        do not acknowledge their results lock out those that do.
        """
        room, size, is_first, share = self._room, chunk.data.nbytes, not stream.queue, stream.share
        if share is not None:
            share.check_limits(chunk.arrived)
        if room.chunks >= room.max_chunks and not is_first:
            raise room.refusal("chunks wait to be run")
        if room.bytes + size > room.max_bytes:
            raise room.refusal("bytes wait to be run")
        if room.retained + room.due >= room.max_retained * (1 if stream.answers else 2):
            raise room.refusal("results wait to be acknowledged")
        wait_seconds = self.scheduler.wait_seconds(stream)
        if chunk.steps and wait_seconds > self._max_wait_seconds * (_FIRST_PATIENCE if is_first else 1):
            text = f"a chunk of this stream would wait {wait_seconds:.3g} s to be run"
            # Whoever comes again before half of it is done only takes time from those who wait.
            raise Refused(Code.BUSY, text, retry_after_seconds=max(wait_seconds / 2, room.retry_after_seconds))
        if share is not None:
            share.enter(chunk, size * self._due_ratio, is_first)
        room.chunks += 1
        room.bytes += size
        self._count(size)
        self.stats.queued_chunks += 1

    def leave(self, chunks: int, size: int, share: Share | None) -> None:
        """Count queued chunks out that were answered, and their bytes."""
        if share is not None:
            share.leave(chunks, size, size * self._due_ratio)
        self._room.chunks -= chunks
        self._room.bytes -= size
        self._count(-size)
        self.stats.queued_chunks -= chunks

    def _count(self, size: int) -> None:
        """Count bytes that are queued here from now on, and the results that will come of them."""
        before = self._queued_bytes * self._result_step_bytes // self._step_bytes
        self._queued_bytes += size
        self._room.due += self._queued_bytes * self._result_step_bytes // self._step_bytes - before

    def retain(self, size: int, share: Share | None) -> None:
        """Count bytes of answers that are kept from now on; negative: not any more."""
        if share is not None:
            share.held += size
        self._room.retained += size

    def read(self, header: wire.Header, payload: wire.Buffer, is_finite: bool) -> npt.NDArray[Any]:
        """A chunk's steps, ``[steps * width]``. Raises :class:`Refused` for what the model cannot take.

        ``is_finite``: it is known already that the payload holds no NaN or infinity.
        """
        if header.dtype != self._dtype or header.width != self._width or not 0 < header.steps <= self._max_steps:
            raise self._refusal(header)
        if header.size != header.steps * self._step_bytes:
            raise Refused(
                Code.BAD_FRAME,
                f"{header.steps} steps of {self._step_bytes} bytes are announced, {header.size} bytes came",
            )
        data = np.frombuffer(payload, self._numpy_type)
        if self._classes is not None:
            if data.min() < 0 or data.max() >= self._classes:
                raise Refused(Code.OUT_OF_RANGE, f"token ids are in [0, {self._classes})")
        elif not is_finite and not wire.all_finite(data):
            raise Refused(Code.NOT_FINITE, "the chunk holds NaN or infinity")
        return data

    def _refusal(self, header: wire.Header) -> Refused:
        if header.dtype != self._dtype:
            return Refused(Code.DTYPE, f"model '{self.name}' takes {self._numpy_type.name}, not dtype {header.dtype}")
        if header.width != self._width:
            return Refused(Code.WIDTH, f"model '{self.name}' takes {self._width} elements a step, not {header.width}")
        if not header.steps:
            return Refused(Code.EMPTY, "a chunk has at least one step")
        return Refused(Code.TOO_LONG, f"a chunk has at most {self._max_steps} steps, this one {header.steps}")

    def _take_form(self, contract: Contract) -> None:
        """Input and output, which are the same in every file that may take this one's place."""
        # input
        self._dtype = int(wire.DTYPES[contract.input.dtype])
        self._numpy_type = wire.NUMPY_TYPES[wire.DTYPES[contract.input.dtype]]
        self._width = contract.input.width
        self._step_bytes = self._width * self._numpy_type.itemsize
        self._classes = contract.input.classes
        # output
        self.result_dtype = int(wire.DTYPES[contract.heads[0].dtype])
        self.result_width = sum(head.width for head in contract.heads)
        self._result_step_bytes = self.result_width * np.dtype(contract.heads[0].dtype).itemsize
        #: Bytes of results that come of a byte of a chunk.
        self._due_ratio = self._result_step_bytes / self._step_bytes
        self._heads = [(head.per == "step", head.width * np.dtype(head.dtype).itemsize) for head in contract.heads]

    def _take_states(self, contract: Contract) -> None:
        #: The state of a stream at its fresh start.
        self.initial_row = self.layout.join({state.name: state.initial_array() for state in contract.states})
        self._states_are_finite = _has_finite_states(contract)

    def read_state(self, payload: wire.Buffer) -> npt.NDArray[Any]:
        """The row of a state that is given, as bytes. Raises :class:`Refused` for what the model cannot take."""
        row = self.layout.unpack(payload)
        self.check_finite(row, "the state")
        return np.frombuffer(row, np.uint8)

    def check_finite(self, row: wire.Buffer, what: str) -> None:
        """Hold a state that is given against what the model could have made. Raises :class:`Refused`."""
        if self._states_are_finite and not self.layout.is_finite(row):
            raise Refused(Code.NOT_FINITE, f"{what} holds NaN or infinity")

    def spoiled(self, lengths: npt.NDArray[Any], outputs: list[npt.NDArray[Any]]) -> list[int]:
        """Rows of a tick whose results hold NaN or infinity; what stands beyond a row's length is not looked at."""
        if not self._is_finite or all(wire.all_finite(output) for output in outputs):
            return []
        found = set()
        for output, (per_step, _) in zip(outputs, self._heads, strict=True):
            for row, length in enumerate(lengths):
                if not wire.all_finite(np.ascontiguousarray(output[row, :length] if per_step else output[row])):
                    found.add(row)
        return sorted(found)

    def cut(self, outputs: list[bytes], time: int, row: int, start: int, count: int) -> list[bytes]:
        """``count`` steps of a row from ``start`` on, per head; of a head of the last step its one output.

        ``outputs`` are a tick's heads as bytes, rows of ``time`` steps.
        """
        pieces = []
        for output, (per_step, step_bytes) in zip(outputs, self._heads):  # noqa: B905  # strict costs more than the cut
            if per_step:
                first = (row * time + start) * step_bytes
                pieces.append(output[first : first + count * step_bytes])
            else:
                pieces.append(output[row * step_bytes : (row + 1) * step_bytes])
        return pieces

    def join(self, earlier: tuple[list[bytes], ...], last: list[bytes]) -> bytes:
        """A chunk's payload from its slices: head after head, each in order of time."""
        if not earlier:
            return last[0] if len(last) == 1 else b"".join(last)
        heads = [
            [*(slice[index] for slice in earlier if per_step), last[index]]
            for index, (per_step, _) in enumerate(self._heads)
        ]
        return b"".join([piece for head in heads for piece in head])


def states_of(streams: list[Stream]) -> dict[int, bytes]:
    """The states of streams none of which is fresh, by handle."""
    by_lane: dict[Lane, list[Stream]] = {}
    for stream in streams:
        by_lane.setdefault(stream.lane, []).append(stream)
    states: dict[int, bytes] = {}
    for lane, part in by_lane.items():
        states |= zip((stream.handle for stream in part), lane.slots.states(part), strict=True)
    return states


def _gives_finite(contract: Contract) -> bool:
    """Whether NaN and infinity in a result mean that something is wrong: not where its author got some too."""
    if contract.heads[0].dtype not in ("float32", "float64", "float16"):
        return False
    proof = contract.proof
    return proof is None or all(np.isfinite(output.array()).all() for output in proof.golden.outputs.values())


def _has_finite_states(contract: Contract) -> bool:
    """Whether NaN and infinity in a state mean that something is wrong: not where it has some by its nature."""
    values = [state.initial_array() for state in contract.states]
    if contract.proof is not None:
        values += [state.array() for state in contract.proof.golden.states.values()]
    return all(value.dtype.kind != "f" or np.isfinite(value).all() for value in values)
