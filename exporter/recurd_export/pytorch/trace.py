"""Traces a hoisted model with the batch size and the number of steps left open."""

import contextlib
import io
import itertools
import re
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from recurd_export.errors import ExportError
from recurd_export.pytorch.blame import mixing_module
from recurd_export.pytorch.hoist import Hoisted
from recurd_export.pytorch.step_function import StepFunction
from recurd_export.pytorch.watch import first_line

#: Sizes that a condition on them is tried with.
_SIZES = (1, 2, 3, 4, 7, 16, 20, 31, 64, 100, 1000, 4097, 10**6)


def trace(model: nn.Module, hoisted: Hoisted | StepFunction) -> ExportedProgram:
    """The program ``(input, lengths, *states) -> (*heads, *next states)`` of a model that was hoisted.

    That of one step has no ``lengths``.

    Raises :class:`ExportError` with what the model does that cannot be traced, or that holds for some sizes only.
    """
    try:
        return _trace(hoisted, Dim("batch"), Dim("time"))
    except Exception as error:  # torch raises many types, and user code any
        first, conditions = error, _conditions(error)
    try:
        if conditions and all(map(_always_true, conditions)):
            # True for all sizes, though torch cannot tell: once more, without its insisting.
            return _trace(hoisted, Dim.DYNAMIC, Dim.DYNAMIC)
        if "specialized it to be a constant" in str(first):
            # Where Python asked for a plain number, as len(x) does, torch's compiler follows and its tracer does not.
            return _trace(hoisted, Dim("batch"), Dim("time"), strict=True)
    except Exception as error:
        raise _refusal(model, hoisted, error, _conditions(error)) from error
    raise _refusal(model, hoisted, first, conditions) from first


def _refusal(model: nn.Module, hoisted: Hoisted | StepFunction, error: Exception, conditions: list[str]) -> ExportError:
    if isinstance(error, ExportError):
        return error
    if isinstance(error, GuardOnDataDependentSymNode):  # first, as what it does for some values looks like mixing
        return ExportError("the model's forward branches on the values of tensors, which a graph cannot")
    layer = None if isinstance(hoisted, StepFunction) else mixing_module(model, hoisted.layout)
    if layer is not None:
        return ExportError(f"{layer} mixes time steps, so results would depend on how a stream is cut into chunks")
    real = [condition for condition in conditions if not _always_true(condition)]
    if real:
        return ExportError(
            f"the model's forward must do the same for every batch size and number of steps, but what it does holds "
            f"for {' and '.join(real)} only"
        )
    return ExportError(
        f"the model's forward cannot be traced for any batch size and number of steps: {first_line(error)}"
    )


def _trace(hoisted: Hoisted | StepFunction, batch: Any, time: Any, *, strict: bool = False) -> ExportedProgram:
    args, dynamic = hoisted.example(batch, time)
    with contextlib.redirect_stderr(io.StringIO()):  # a failed trace prints its graph; the error says what is wrong
        return torch.export.export(hoisted, args, dynamic_shapes=dynamic, strict=strict)


def _conditions(error: Exception) -> list[str]:
    """The conditions on sizes that a failed trace names, in our words."""
    return [
        condition.replace("L['input'].size()[0]", "batch")
        .replace("L['input'].size()[1]", "steps")
        .replace("2 <= steps and ", "")
        .replace(" and steps <= IntInfinity()", "")
        .strip(" .")
        for condition in re.findall(r"generated guard (.*)", str(error))
    ]


def _always_true(condition: str) -> bool:
    known = {"__builtins__": {}, "min": min, "max": max}
    try:
        return all(
            eval(condition, known, {"batch": batch, "steps": steps})  # an expression of torch's own making
            for batch, steps in itertools.product(_SIZES, _SIZES)
        )
    except Exception:  # an expression of a kind not seen yet: not known to be true
        return False
