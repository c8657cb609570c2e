"""Where in a model a layer stands: the sizes of what goes in, and whether its second axis is the stream's time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recurd_export.errors import ExportError

Shape = tuple[int | None, ...]


def label(layer: Any) -> str:
    """``layer 'lstm' (LSTM)``; for an operation of ``keras.ops``, ``operation 'add' (Add)``."""
    kind = "layer" if hasattr(layer, "get_weights") else "operation"
    return f"{kind} '{layer.name}' ({type(layer).__name__})"


@dataclass(frozen=True)
class Place:
    """What a layer is called with, as Keras sees it; axes of torch count from the end, so that more may stand before.

    Inside a TimeDistributed a layer sees ``[batch, ...]`` where the tensor has time as well.
    """

    layer: Any
    #: Of every input, batch first.
    shapes: tuple[Shape, ...]
    #: Of every input, whether axis 1 is the stream's time.
    timed: tuple[bool, ...]

    @property
    def shape(self) -> Shape:
        """Of the first input."""
        return self.shapes[0]

    @property
    def is_timed(self) -> bool:
        """Whether any input has a time axis."""
        return any(self.timed)

    @property
    def label(self) -> str:
        """The layer as error texts name it."""
        return label(self.layer)

    @property
    def local(self) -> int:
        """Number of axes of one step (or of one row, where there is no time)."""
        return len(self.shape) - 1 - self.is_timed

    def axis(self, axis: int) -> int:
        """An axis of Keras, counted from the end. Raises :class:`ExportError` when it is batch or time."""
        rank = len(self.shape)
        found = axis if axis < 0 else axis - rank
        if rank + found == 0:
            raise ExportError(f"{self.label} works along the batch, so a stream's results would depend on others")
        if self.is_timed and rank + found == 1:
            raise ExportError(
                f"{self.label} works along time, so results would depend on how a stream is cut into chunks"
            )
        return found

    def axes(self, axes: int | Sequence[int]) -> tuple[int, ...]:
        """Several of them, in order."""
        return tuple(sorted(self.axis(axis) for axis in ([axes] if isinstance(axes, int) else axes)))

    @property
    def features(self) -> int:
        """Size of the last axis. Raises :class:`ExportError` when the model leaves it open."""
        size = self.shape[-1]
        if size is None:
            raise ExportError(f"{self.label} is given a last axis of no fixed size; give the model's Input one")
        return size

    def step(self) -> tuple[int, ...]:
        """The sizes of one step (or row). Raises :class:`ExportError` when the model leaves one open."""
        sizes = self.shape[len(self.shape) - self.local :]
        if any(size is None for size in sizes):
            raise ExportError(f"{self.label} is given axes of no fixed size besides batch and time {list(self.shape)}")
        return tuple(size for size in sizes if size is not None)

    @property
    def elements(self) -> int:
        """Numbers of one step (or row)."""
        return math.prod(self.step())
