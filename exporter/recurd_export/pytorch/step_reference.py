"""A module of one step as a runner: its own forward, in a plain loop over time."""

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from recurd.contract import Contract
from recurd_export.errors import ExportError
from recurd_export.pytorch import tree
from recurd_export.pytorch.apart import apart
from recurd_export.pytorch.state import join_rows, take_row
from recurd_export.pytorch.step_layout import StepLayout
from recurd_export.pytorch.watch import copy_of, first_line

Array = npt.NDArray[Any]


class StepReference:
    """Runs the source module tick by tick; owns the states of its slots. Satisfies :class:`recurd.verify.Runner`."""

    def __init__(self, model: nn.Module, layout: StepLayout, contract: Contract, *, double: bool = False) -> None:
        """``double``: compute in float64, to see what of a difference is float32's own rounding."""
        self.contract = contract
        self._layout = layout
        copied = copy_of(model)
        self._model = copy.deepcopy(copied).double() if double else copied
        self._dtype = torch.float64 if double else torch.float32
        self._states: dict[int, dict[str, Tensor]] = {}

    def run(self, slots: Array, fresh: Array, lengths: Array, input: Array) -> list[Array]:
        """See :meth:`recurd.model.Model.run`. Rows of equal length run as one batch, others alone."""
        results: list[Array | None] = [None] * len(self.contract.heads)
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length)
            given = [self._start(int(slots[row]), bool(fresh[row])) for row in rows]
            with torch.no_grad(), apart(self._dtype == torch.float64):
                heads, left = self._run(input[rows, :length], join_rows(given, self._layout.states))
            for place, row in enumerate(rows):
                self._states[int(slots[row])] = take_row(left, self._layout.states, place)
            for number, head in enumerate(heads):
                whole = results[number]
                if whole is None:
                    whole = np.zeros((len(slots), input.shape[1], *head.shape[2:]), head.dtype)
                whole[rows, :length] = head
                results[number] = whole
        return [result for result in results if result is not None]

    def read(self, slots: Array) -> dict[str, Array]:
        """See :meth:`recurd.model.Model.read`."""
        rows = [self._states[int(slot)] for slot in slots]
        return {
            state.name: np.stack([row[state.name].squeeze(state.batch_axis).numpy() for row in rows])
            for state in self._layout.states
        }

    def _start(self, slot: int, fresh: bool) -> dict[str, Tensor]:
        if not fresh:
            return self._states[slot]
        return {state.name: self._cast(state.fresh(1)) for state in self._layout.states}

    def _run(self, x: Array, states: dict[str, Tensor]) -> tuple[list[Array], dict[str, Tensor]]:
        """Heads ``[batch, time, ...]`` and the states after the last step."""
        heads: list[list[Tensor]] = []
        names = [state.name for state in self._layout.states]
        for step in torch.from_numpy(np.ascontiguousarray(x)).unbind(1):
            args = self._layout.given(self._cast(step), [states[name] for name in names])
            try:
                output = self._model(*args)
            except Exception as error:  # a module may raise anything
                raise ExportError(f"the module's forward of one step fails: {first_line(error)}") from error
            found = [tensor for _, tensor in tree.leaves(output)]
            heads.append([head.arrange(found[head.position], len(x), 1) for head in self._layout.heads])
            states = dict(zip(names, (found[place] for place in self._layout.returned), strict=True))
        return [torch.stack(steps, 1).numpy() for steps in zip(*heads, strict=True)], states

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor
