"""Which rows run next, and how many steps of each.

Scheduling is continuous: a stream with queued chunks waits in one line per lane, joins the next tick that it fits and
goes to the end of the line when there is more to do; tenants that share a daemon have a line each, and their turns. No
clock: ``take`` is called when the device is idle. A chunk that may not wait for ever is looked at when the turn of its
stream has come.

Three rules shape a tick. At most ``max_steps`` steps of a stream, so that one that backfills hours does not hold up the
others: a long chunk is sliced over several ticks and its state stays in place. Queued chunks of one stream are joined
in time as far as they fit whole, and their outputs split again. And rows of similar length run together: the model
computes every row to the length of the longest, so a row is passed over (and keeps its place) when the padding would
exceed ``padding_ratio``.
Whatever the model, a tick of several rows computes at most ``max_rows * max_steps`` steps, so that it ends soon.
"""

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from recurd import config
from recurd.contract import Contract
from recurd.errors import ConfigError
from recurd.streams import Chunk, Stream
from recurd.turns import Turns

if TYPE_CHECKING:
    from recurd.arena import Device
    from recurd.lane import Lane

Array = npt.NDArray[Any]

#: What a tick still counts for the pace when the next one has been taken.
_PACE_MEMORY = 0.9
#: Streams looked at for one tick, as a multiple of its rows: bounds the work of a tick when most rows do not fit.
_LOOK_AHEAD = 4


@dataclass(slots=True)
class Row:
    """One stream's part of a tick: consecutive steps of one or several of its queued chunks."""

    stream: Stream
    #: Chunk, its first step in this row, and how many.
    parts: list[tuple[Chunk, int, int]]
    steps: int


@dataclass(slots=True)
class Tick:
    """One run of a model, ready to be handed over: what ``Model.run`` takes, and the rows to give the outputs back to.

    The arrays may have more rows, which only fill up.
    """

    model: str
    rows: list[Row]
    slots: npt.NDArray[np.int64]
    fresh: npt.NDArray[np.bool_]
    lengths: npt.NDArray[np.int32]
    input: npt.NDArray[Any]
    taken_at: float

    @property
    def lane(self) -> "Lane":
        """The lane of all its streams."""
        return self.rows[0].stream.lane


class Shape(NamedTuple):
    """The one shape of all ticks of a lane, where that is wanted: kernels of a GPU are chosen by the shape."""

    rows: int
    steps: int
    #: Slot of the rows that only fill up: one that no stream has.
    scratch: int

    @classmethod
    def of(cls, device: "Device", settings: config.Tick) -> "Shape | None":
        """``None`` where ticks are as large as they need to be. Raises :class:`ConfigError`.

        On a GPU ticks have one step: of more, kernels are chosen step by step for the rows that are long enough.
        """
        if not settings.strict:
            return None
        if not device.contract.causal:
            name = device.contract.name
            raise ConfigError(
                f"tick.strict: model '{name}' looks ahead inside a chunk, which cannot be cut to one shape"
            )
        return cls(settings.rows, settings.steps if device.stamp.device == "cpu" else 1, device.slots)

    def fill(self, slots: Array, fresh: Array, lengths: Array, input: Array) -> tuple[Array, Array, Array, Array]:
        """A tick's arrays, as ``Model.run`` takes them, filled up with steps that the model takes."""
        rows = self.rows - len(slots)
        input = np.concatenate([input, np.repeat(input[:, -1:], self.steps - input.shape[1], axis=1)], axis=1)
        return (
            np.concatenate([slots, np.full(rows, self.scratch, slots.dtype)]),
            np.concatenate([fresh, np.ones(rows, fresh.dtype)]),
            np.concatenate([lengths, np.full(rows, self.steps, lengths.dtype)]),
            np.concatenate([input, np.repeat(input[:1], rows, axis=0)]),
        )


class Pace:
    """What a row takes while there is more to do than a tick holds, which is when somebody waits. Owned by a scheduler.

    From one tick to the next, so that everything between two runs counts. Older ticks count less and less.
    """

    def __init__(self) -> None:
        #: 0 as long as no tick has left anybody in line.
        self.seconds_per_row = 0.0
        self._seconds = self._rows = 0.0
        # The tick before, when it left somebody in line; else no rows.
        self._taken_at = 0.0
        self._taken = 0

    def took(self, now: float, rows: int, *, left: bool) -> None:
        """A tick of so many rows was taken; whether streams were ``left`` in line."""
        if self._taken:
            self._seconds = _PACE_MEMORY * self._seconds + now - self._taken_at
            self._rows = _PACE_MEMORY * self._rows + self._taken
            self.seconds_per_row = self._seconds / self._rows
        self._taken_at, self._taken = now, rows if left else 0

    def ran(self, seconds: float, rows: int) -> None:
        """The run of the tick taken last took so long.

        Where it left nobody in line, what was known fades to that: a pace that is too slow keeps others out of the
        line, and would never be held against another tick.
        """
        if not self._taken and seconds < self.seconds_per_row * rows:
            self.seconds_per_row = max(seconds / rows, _PACE_MEMORY * self.seconds_per_row)
            self._seconds = self.seconds_per_row * self._rows

    def pause(self) -> None:
        """No tick will be taken for a while, for other reasons."""
        self._taken = 0


class Scheduler:
    """The line of one lane's streams that have something to run. Owned by the lane."""

    def __init__(self, contract: Contract, *, max_rows: int, max_steps: int, padding_ratio: float) -> None:
        self._max_rows = max_rows
        # A model that looks ahead inside a chunk gets it whole, in a row of its own.
        self._max_steps = max_steps if contract.causal else 2**31
        self._joins = contract.chunk_local
        self._padding_ratio = padding_ratio
        self._max_cells = max_rows * max_steps
        self._line: deque[Stream] = deque()
        # Where tenants share the daemon, their streams are here instead.
        self._turns = Turns()
        self.pace = Pace()

    def __len__(self) -> int:
        """Streams in the line."""
        return len(self._line) + len(self._turns)

    def add(self, stream: Stream) -> None:
        """Put a stream with something to run at the end of the line. It must not be in it, nor in a tick."""
        if stream.share is None:
            self._line.append(stream)
        else:
            self._turns.add(stream)

    def remove(self, stream: Stream) -> None:
        """Take a stream out of the line, when it is in it (a stream that ends before its turn; rare, so a search)."""
        if stream in self._line:
            self._line.remove(stream)
        self._turns.remove(stream)
        if not len(self):
            self.pace.pause()

    def take(self, now: float) -> tuple[list[Row], list[Stream]]:
        """The rows of the next tick, the longest waiting stream first; empty when the line is, or all were late.

        The second result are streams whose turn came too late for their oldest chunk: they are in the line no more.
        """
        rows: list[Row] = []
        late: list[Stream] = []
        passed: list[Stream] = []
        longest = total = 0
        line, most = self._line, self._max_rows * _LOOK_AHEAD
        if len(self._turns):
            line = self._in_turn(most)
        for _ in range(min(len(line), most)):
            stream = line.popleft()
            chunk = stream.queue[0]
            if chunk.starts_by < now and not chunk.taken:
                late.append(stream)
                continue
            steps = chunk.steps - chunk.taken
            if self._joins and len(stream.queue) > 1:
                steps = self._joined(stream, now)
            steps = min(steps, self._max_steps)
            together = max(longest, steps)
            total += steps
            cells = together * (len(rows) + 1)
            if rows and (cells - total > self._padding_ratio * cells or cells > self._max_cells):
                total -= steps
                passed.append(stream)
                continue
            longest = together
            rows.append(Row(stream, _cut(stream.queue, steps), steps))
            if len(rows) == self._max_rows:
                break
        line.extendleft(reversed(passed))
        if line is not self._line:
            self._turns.put_back(line, [row.stream for row in rows])
        self.pace.took(now, len(rows), left=bool(len(self)))
        return rows, late

    def wait_seconds(self, stream: Stream) -> float:
        """What a chunk that is queued now would wait to be started, as far as can be told.

        The line goes round once for every turn the stream has to take before.
        """
        ahead = len(self._line) if stream.share is None else self._turns.ahead(stream.tenant)
        turn = ahead * self.pace.seconds_per_row
        if not (turn and stream.queue):
            return turn
        left = [chunk.steps - chunk.taken for chunk in stream.queue]
        turns = sum(left) // self._max_steps if self._joins else sum(-(-steps // self._max_steps) for steps in left)
        return turn * (1 + turns)

    def _in_turn(self, most: int) -> deque[Stream]:
        """The streams that are next, so many at most, where tenants share the daemon."""
        while self._line:  # from before they did
            self._turns.add(self._line.popleft())
        return self._turns.front(most)

    def _joined(self, stream: Stream, now: float) -> int:
        """Steps the stream could run in one row, up to the next reset or chunk that is late.

        A row that finishes a chunk ends with a chunk: the state after it is one that a client knows of, and the one
        that is saved with the answers.
        """
        steps = 0
        for chunk in stream.queue:
            left = chunk.steps - chunk.taken
            if not chunk.steps or (steps and (steps + left > self._max_steps or chunk.starts_by < now)):
                break
            steps += left
        return steps


def _cut(queue: list[Chunk], steps: int) -> list[tuple[Chunk, int, int]]:
    """Take ``steps`` steps from the front of a queue (the chunks stay there until they are answered)."""
    parts = []
    for chunk in queue:
        first = chunk.taken
        count = min(steps, chunk.steps - first)
        parts.append((chunk, first, count))
        chunk.taken = first + count
        steps -= count
        if not steps:
            break
    return parts


def assemble(model: str, contract: Contract, rows: list[Row], now: float, shape: Shape | None = None) -> Tick:
    """Put rows together as arrays; their streams' pending fresh starts are taken over into the tick.

    With a ``shape`` the arrays have more rows than there are streams.
    """
    time, width = max([row.steps for row in rows]), contract.input.width
    pieces = []
    slots, fresh, lengths = [], [], []
    for row in rows:
        stream, steps = row.stream, row.steps
        for chunk, first, count in row.parts:
            pieces.append(chunk.data if count == chunk.steps else chunk.data[first * width : (first + count) * width])
        if steps < time:
            # A row is padded with its own last step: one that the model takes, which zeros need not be.
            pieces.append(np.tile(pieces[-1][-width:], time - steps))
        slots.append(stream.slot)
        lengths.append(steps)
        fresh.append(stream.fresh)
        if stream.fresh:
            row.parts[0][0].fresh = True
            stream.fresh = False
    arrays: tuple[Array, Array, Array, Array] = (
        np.array(slots, np.int64),
        np.array(fresh, np.bool_),
        np.array(lengths, np.int32),
        np.concatenate(pieces).reshape(len(rows), time, *contract.input.shape),
    )
    return Tick(model, rows, *(arrays if shape is None else shape.fill(*arrays)), taken_at=now)
