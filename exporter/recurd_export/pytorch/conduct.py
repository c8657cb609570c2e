"""How a model behaves from call to call: whether it takes any number, and always gives the same for the same."""

from typing import Any

import torch
from torch import Tensor, nn

from recurd_export.errors import ExportError
from recurd_export.pytorch import tree
from recurd_export.pytorch.arguments import BATCH, STEPS, Arguments
from recurd_export.pytorch.fresh import fresh_run
from recurd_export.pytorch.watch import ForwardError, Run, copy_of, watch


def is_choosy(model: nn.Module, x: Tensor, rest: tuple[Any, ...]) -> bool:
    """Whether the model fails, or gives NaN, on random numbers and not on the example (logarithms, ids as floats).

    Raises :class:`ExportError` for a model that gives NaN on both.
    """
    if not x.is_floating_point():
        return False
    generator = torch.Generator().manual_seed(0)
    if not _gives_nan(model, (torch.randn(x.shape, generator=generator), *rest)):
        return False
    if _gives_nan(model, (x, *rest)):
        raise ExportError("the model gives NaN, on the example and on random numbers; are its weights good?")
    return True


def _gives_nan(model: nn.Module, args: tuple[Any, ...]) -> bool:
    try:
        run = watch(copy_of(model), tree.map_leaves(args, Tensor.clone))
    except ForwardError:
        return True
    results = [tensor for _, tensor in tree.leaves(run.output)]
    results += [state for call in run.calls for state in call.left]
    return any(bool(result.isnan().any()) for result in results)


def check_repeatable(model: nn.Module, arguments: Arguments) -> None:
    """Nothing but the recurrent states may go from call to call, and nothing may be left to chance.

    Raises :class:`ExportError` that tells which of the two it is.
    """
    args = arguments.with_input(arguments.random(BATCH, STEPS, 0))
    copied = copy_of(model)
    arguments.prepare(copied, BATCH)
    first = watch(copied, tree.map_leaves(args, Tensor.clone))
    given = {c.key: c.given if c.given is not None else tuple(map(torch.zeros_like, c.left)) for c in first.calls}
    second = watch(copied, tree.map_leaves(args, Tensor.clone), lambda key, module, batch: given.get(key))
    if _same(first, second):
        return
    if _same(first, fresh_run(model, arguments, arguments.random(BATCH, STEPS, 0))):
        raise ExportError(
            "the model keeps more than the states of its recurrent layers from call to call: a second call with the "
            "same input and states gives something else"
        )
    raise ExportError(
        "the model gives something else every time, in eval mode too: it draws random numbers (dropout without "
        "training=self.training does)"
    )


def _same(one: Run, other: Run) -> bool:
    pairs = zip(tree.leaves(one.output), tree.leaves(other.output), strict=True)
    return all(a.shape == b.shape and torch.allclose(a, b, 1e-4, 1e-5, equal_nan=True) for (_, a), (_, b) in pairs)
