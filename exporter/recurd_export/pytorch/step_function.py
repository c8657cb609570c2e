"""A module whose forward is one step, ready to be traced."""

from typing import Any

import torch
from torch import Tensor, nn

from recurd_export.pytorch import tree
from recurd_export.pytorch.arguments import BATCH
from recurd_export.pytorch.step_layout import StepLayout
from recurd_export.pytorch.stepped import unroll
from recurd_export.pytorch.watch import copy_of


class StepFunction(nn.Module):
    """``(input [batch, ...], *states) -> (*heads, *next states)`` around a copy of the module."""

    one_step = True
    note = "the module is one step, so the file runs step by step (Scan)"

    def __init__(self, model: nn.Module, layout: StepLayout) -> None:
        super().__init__()
        self.model = copy_of(model)
        self.layout = layout
        for module in self.model.modules():
            if isinstance(module, nn.RNNBase) and not module.bidirectional:
                unroll(module)

    def forward(self, input: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        batch = input.shape[0]
        for layout, state in zip(self.layout.states, states, strict=True):
            torch._check(state.shape[layout.batch_axis] == batch)  # type: ignore[no-untyped-call]
        found = [tensor for _, tensor in tree.leaves(self.model(*self.layout.given(input, states)))]
        heads = [head.arrange(found[head.position], batch, 1) for head in self.layout.heads]
        return (*heads, *(found[place] for place in self.layout.returned))

    def example(self, batch: Any, time: Any) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Arguments to trace it with, and which of their axes is ``batch``."""
        x = self.layout.arguments.random(BATCH, 1, 0)[:, 0]
        rows = tuple({state.batch_axis: batch} for state in self.layout.states)
        return (x, *self.layout.fresh(BATCH)), {"input": {0: batch}, "states": rows}
