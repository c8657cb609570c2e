"""Cells in a loop over time, as fused layers.

The model is run with one step and ``batch * time`` rows, so its loop runs once, whatever the number of steps, and all
it does beside its recurrent modules is done to every step of every row at once. Only those modules see which rows are
steps of one stream: there they are unfolded to ``[time, batch, ...]``, and a cell becomes the layer it is a step of.

That is right where a cell's state is handed on as it is, and nothing else goes from step to step, which is found out by
holding it against the model (:mod:`recurd_export.pytorch.ways`).
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor

from recurd_export.pytorch import ops
from recurd_export.pytorch.hoist import Carried, Hoisted, pack, run_layer
from recurd_export.pytorch.outputs import HeadLayout
from recurd_export.pytorch.recurrence import Recurrence


class Folded(Hoisted):
    """As :class:`Hoisted`, for models in which every cell in a loop is a plain recurrence."""

    note = "the loop over time runs fused: a cell is a layer in the file"

    def heads(self, input: Tensor) -> list[Tensor]:
        """See :meth:`Hoisted.heads`."""
        batch, steps = self.carried.sizes
        results = self.results(input.reshape(batch * steps, 1, *input.shape[2:]))
        return [self._unfold(head, tensor) for head, tensor in zip(self.layout.heads, results, strict=True)]

    def _unfold(self, head: HeadLayout, tensor: Tensor) -> Tensor:
        """A head of ``batch * time`` rows and one step as the contract has it."""
        batch, steps = self.carried.sizes
        tensor = head.restore(tensor.to(torch.float32) if head.as_float else tensor)
        rows = tensor.movedim(head.batch_axis, 0)
        if head.time_axis is not None:
            rows = tensor.movedim((head.batch_axis, head.time_axis), (0, 1)).squeeze(1)
        unfolded = rows.reshape(batch, steps, *rows.shape[1:])
        return unfolded if head.per == "step" else ops.last_step(unfolded, self.carried.lengths, 0, 1)

    def unfold(self, x: Tensor, time_axis: int) -> Tensor:
        """See :meth:`Hoisted.unfold`."""
        rows = x.squeeze(time_axis)
        return rows.reshape(*self.carried.sizes, *rows.shape[1:]).movedim(1, time_axis)

    def fold(self, x: Tensor, time_axis: int) -> Tensor:
        """See :meth:`Hoisted.fold`."""
        batch, steps = self.carried.sizes
        rows = x.movedim(time_axis, 1)
        return rows.reshape(batch * steps, *rows.shape[2:]).unsqueeze(time_axis)

    def replace_forward(self, path: str, recurrences: list[Recurrence]) -> None:
        """See :meth:`Hoisted.replace_forward`."""
        hoisted, module = self, pack(self.model.get_submodule(path))

        def of_cell(self: Any, input: Tensor, hx: Any = None) -> Any:
            y, _ = run_layer(self, recurrences[0], 0, _unfold(input, hoisted.carried), hoisted.carried)
            h = _fold(y, hoisted.carried)
            return h if len(recurrences[0].initial) == 1 else (h, _unknown(h))

        def of_layer(self: Any, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
            carried = hoisted.carried
            recurrence = recurrences[carried.calls[path]]
            carried.calls[path] += 1
            time_axis = 1 if self.batch_first else 0
            x = _unfold(input.squeeze(time_axis), carried)
            lefts: list[Tensor] = []
            for layer in range(self.num_layers):
                x, _ = run_layer(self, recurrence, layer, x, carried)
                forwards, *backwards = _fold(x, carried).chunk(recurrence.directions, dim=-1)
                lefts += [forwards, *map(_unknown, backwards)]
            h = torch.stack(lefts)
            output = _fold(x, carried).unsqueeze(time_axis)
            return output, h if len(recurrence.initial) == 1 else (h, _unknown(h))

        module.forward = MethodType(of_cell if recurrences[0].cell else of_layer, module)


def _unfold(rows: Tensor, carried: Carried) -> Tensor:
    """``[batch * time, ...]`` as ``[time, batch, ...]``."""
    return rows.reshape(*carried.sizes, *rows.shape[1:]).transpose(0, 1)


def _fold(x: Tensor, carried: Carried) -> Tensor:
    """The reverse of :func:`_unfold`."""
    batch, steps = carried.sizes
    return x.transpose(0, 1).reshape(batch * steps, *x.shape[2:])


def _unknown(like: Tensor) -> Tensor:
    """In the place of what no fused layer gives for every step; NaN shows wherever it is made use of."""
    return torch.full_like(like, torch.nan)
