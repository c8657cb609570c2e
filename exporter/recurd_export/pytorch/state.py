"""One hoisted state, whatever kind of module keeps it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class StateLayout:
    """A state tensor of the exported model."""

    name: str
    #: Value at a fresh start, without the batch axis.
    initial: npt.NDArray[Any]
    #: Where the batch axis stands in the tensor.
    batch_axis: int

    @property
    def output(self) -> str:
        """Name of the next state."""
        return f"{self.name}.next"

    def fresh(self, batch: int) -> Tensor:
        """The state of ``batch`` rows at a fresh start."""
        rows = np.stack([self.initial] * batch, self.batch_axis)
        return torch.from_numpy(np.ascontiguousarray(rows))


def take_row(states: dict[str, Tensor], layouts: tuple[StateLayout, ...], row: int) -> dict[str, Tensor]:
    """One row of every state, its batch axis kept."""
    return {state.name: states[state.name].narrow(state.batch_axis, row, 1) for state in layouts}


def join_rows(rows: list[dict[str, Tensor]], layouts: tuple[StateLayout, ...]) -> dict[str, Tensor]:
    """The reverse of :func:`take_row`: rows in one batch."""
    return {state.name: torch.cat([row[state.name] for row in rows], state.batch_axis) for state in layouts}


def names(layouts: tuple[StateLayout, ...]) -> Iterator[str]:
    """All tensor names the states take."""
    for state in layouts:
        yield from (state.name, state.output)
