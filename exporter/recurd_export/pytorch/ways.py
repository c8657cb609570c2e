"""Picks the way in which a model's recurrences become a graph, by holding each against the model."""

import itertools

import torch
from torch import Tensor, nn

from recurd_export.errors import ExportError
from recurd_export.pytorch import convolutions, tree
from recurd_export.pytorch.arguments import OTHER_BATCH, STEPS
from recurd_export.pytorch.blame import mixing_module
from recurd_export.pytorch.folded import Folded
from recurd_export.pytorch.fresh import run_with
from recurd_export.pytorch.hoist import Hoisted
from recurd_export.pytorch.layout import Layout
from recurd_export.pytorch.stepped import Stepped
from recurd_export.pytorch.watch import label

#: Far from what rounding may do, and from what is no rounding.
ATOL, RTOL = 1e-4, 1e-3


def choose(model: nn.Module, layout: Layout) -> Hoisted:
    """The model with its states made explicit.

    Raises :class:`ExportError` for a loop that carries more from step to step than its cells.
    """
    projected = any(getattr(model.get_submodule(r.path), "proj_size", 0) for r in layout.recurrences)
    if not projected and not any(recurrence.cell for recurrence in layout.recurrences):
        return Hoisted(model, layout)
    if layout.plain and not projected and _agrees(Folded(model, layout), model, layout):
        return Folded(model, layout)
    if not layout.causal:
        raise ExportError(_looks_ahead(model, layout))
    for seen in (False, True):
        try:
            hoisted = Stepped(model, layout, seen=seen)
        except Exception:  # a forward may raise anything for the one step it is given here
            continue
        if _agrees(hoisted, model, layout):
            return hoisted
    layer = mixing_module(model, layout)
    if layer is not None:
        raise ExportError(f"{layer} mixes time steps, so results would depend on how a stream is cut into chunks")
    raise ExportError(
        f"the loop in {type(model).__name__} carries more from step to step than the states of its cells, or does not "
        f"do the same in every step (an output fed back into the input, a count or a mean of steps, a loop backwards); "
        f"write one step as a module (x, state...) -> (y, state...) and export it with step=True"
    )


def _looks_ahead(model: nn.Module, layout: Layout) -> str:
    both = next(r for r in layout.recurrences if r.directions == 2)
    return (
        f"{label(both.path, model.get_submodule(both.path))} looks ahead, and the model can be run step by step only, "
        f"as it has a projection (proj_size) or a cell whose state is changed before it is handed on"
    )


def _agrees(hoisted: Hoisted, model: nn.Module, layout: Layout) -> bool:
    """Whether it gives the model's heads and final states of whole streams."""
    x = layout.arguments.random(OTHER_BATCH, STEPS, 4)
    run = run_with(model, layout.arguments, x)
    leaves = [tensor for _, tensor in tree.leaves(run.output)]
    expected = [head.arrange(leaves[head.position], OTHER_BATCH, STEPS) for head in layout.heads]
    left = convolutions.left(layout.convolutions, run, None)
    for recurrence, call in zip(layout.recurrences, run.calls, strict=True):
        left |= recurrence.split(call.left)
    expected += [left[state.name] for state in layout.states]
    try:
        got = _drive(hoisted, x)
    except Exception:  # a forward may raise anything for the one step it is given here
        return False
    return all(itertools.starmap(_same, zip(expected, got, strict=True)))


def _drive(hoisted: Hoisted, x: Tensor) -> list[Tensor]:
    """Heads and final states of whole streams ``[batch, time, ...]``."""
    batch, steps = x.shape[:2]
    states = [state.fresh(batch) for state in hoisted.layout.states]
    if not hoisted.one_step:
        return list(hoisted(x, torch.full((batch,), steps, dtype=torch.int32), *states))
    heads: list[list[Tensor]] = []
    for step in x.unbind(1):
        results = list(hoisted(step, *states))
        states = results[len(hoisted.layout.heads) :]
        heads.append(results[: len(hoisted.layout.heads)])
    joined = [
        torch.stack(tensors, 1) if head.per == "step" else tensors[-1]
        for head, tensors in zip(hoisted.layout.heads, zip(*heads, strict=True), strict=True)
    ]
    return [*joined, *states]


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    bound = ATOL + RTOL * float(one.abs().double().nan_to_num().max()) if one.numel() else 0.0
    return torch.allclose(one.double(), other.double(), rtol=0, atol=bound, equal_nan=True)
