"""Picks the way in which a model's recurrences become a graph, by holding each against the model."""

import itertools

import torch
from torch import Tensor, nn

from recurd_export.errors import ExportError
from recurd_export.pytorch import tree
from recurd_export.pytorch.arguments import OTHER_BATCH, STEPS
from recurd_export.pytorch.folded import Folded
from recurd_export.pytorch.fresh import run_with
from recurd_export.pytorch.hoist import Hoisted
from recurd_export.pytorch.layout import Layout

#: Far from what rounding may do, and from what is no rounding.
ATOL, RTOL = 1e-4, 1e-3


def choose(model: nn.Module, layout: Layout) -> Hoisted:
    """The model with its states made explicit.

    Raises :class:`ExportError` for a loop that carries more from step to step than its cells.
    """
    if not any(recurrence.cell for recurrence in layout.recurrences):
        return Hoisted(model, layout)
    if all(recurrence.plain for recurrence in layout.recurrences) and _agrees(Folded(model, layout), model, layout):
        return Folded(model, layout)
    raise ExportError("TODO")


def _agrees(hoisted: Hoisted, model: nn.Module, layout: Layout) -> bool:
    """Whether it gives the model's heads and final states of whole streams."""
    x = layout.arguments.random(OTHER_BATCH, STEPS, 4)
    run = run_with(model, layout.arguments, x)
    leaves = [tensor for _, tensor in tree.leaves(run.output)]
    expected = [head.arrange(leaves[head.position], OTHER_BATCH, STEPS) for head in layout.heads]
    left: dict[str, Tensor] = {}
    for recurrence, call in zip(layout.recurrences, run.calls, strict=True):
        left |= recurrence.split(call.left)
    expected += [left[state.name] for state in layout.states]
    try:
        got = hoisted(
            x, torch.full((OTHER_BATCH,), STEPS, dtype=torch.int32), *(s.fresh(OTHER_BATCH) for s in layout.states)
        )
    except Exception:  # a forward may raise anything for the one step it is given here
        return False
    return all(itertools.starmap(_same, zip(expected, got, strict=True)))


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    bound = ATOL + RTOL * float(one.abs().double().nan_to_num().max()) if one.numel() else 0.0
    return torch.allclose(one.double(), other.double(), rtol=0, atol=bound, equal_nan=True)
