"""How a foreign model lays out batch, time and the rest of its tensors: found by running it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from recurd_export.adopt.foreign import Port

Array = npt.NDArray[Any]


def order(rank: int, leading: Sequence[int]) -> list[int]:
    """The transposition that brings these axes to the front and leaves the others in their order."""
    return [*leading, *(axis for axis in range(rank) if axis not in leading)]


def inverse(permutation: Sequence[int]) -> list[int]:
    """The transposition that undoes another."""
    return [int(axis) for axis in np.argsort(permutation)]


@dataclass(frozen=True)
class InputLayout:
    """The input tensor: a batch axis, perhaps a time axis, and the axes of a step in their order."""

    port: Port
    batch_axis: int
    #: ``None`` for a model that takes one step a run and has no axis for more.
    time_axis: int | None
    #: Of one step as the model takes it, the context included.
    shape: tuple[int, ...]

    @property
    def leading(self) -> list[int]:
        """Axes of batch and, where there is one, time."""
        return [self.batch_axis] if self.time_axis is None else [self.batch_axis, self.time_axis]

    @property
    def permutation(self) -> list[int]:
        """From batch first (time second) to the model's order."""
        return inverse(order(len(self.leading) + len(self.shape), self.leading))


@dataclass(frozen=True)
class StateLayout:
    """A state tensor: ``before`` is the input, ``after`` the output with its next value, laid out alike."""

    before: Port
    after: Port
    shape: tuple[int, ...]
    batch_axis: int
    initial: Array

    def rows(self, count: int) -> Array:
        """So many rows of a fresh start, as the model takes them."""
        return np.stack([self.initial] * count, axis=self.batch_axis)


@dataclass(frozen=True)
class HeadLayout:
    """A head as one run gives it; without a time axis it is one a run."""

    port: Port
    dtype: str
    shape: tuple[int, ...]
    batch_axis: int
    time_axis: int | None

    @property
    def leading(self) -> list[int]:
        """Axes of batch and, where there is one, time."""
        return [self.batch_axis] if self.time_axis is None else [self.batch_axis, self.time_axis]


@dataclass(frozen=True)
class Layout:
    """All of it."""

    input: InputLayout
    states: tuple[StateLayout, ...]
    heads: tuple[HeadLayout, ...]
    #: Whether a run may take any number of steps.
    many_steps: bool

    @property
    def whole(self) -> bool:
        """Whether a run over many steps gives all that the runs of its steps give."""
        return self.many_steps and all(head.time_axis is not None for head in self.heads)
