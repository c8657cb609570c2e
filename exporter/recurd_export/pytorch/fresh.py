"""Runs of a model from a fresh start, with any batch size and number of steps."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from recurd_export.errors import ExportError
from recurd_export.pytorch.arguments import Arguments
from recurd_export.pytorch.convolved import Convolve
from recurd_export.pytorch.recurrence import is_plain
from recurd_export.pytorch.watch import Call, ForwardError, Inject, Run, copy_of, watch


def fresh_run(
    model: nn.Module,
    arguments: Arguments,
    x: Tensor,
    inject: Inject | None = None,
    convolve: Convolve | None = None,
    *,
    plain: bool = False,
    passages: bool = True,
) -> Run:
    """Run a copy on an input ``[batch, time, ...]``, all its states being zeros (or what ``inject`` and
    ``convolve`` give). ``plain``: every cell in a loop is known to be handed its state as it left it.
    ``passages``: see :func:`~recurd_export.pytorch.watch.watch`.

    Raises :class:`~recurd_export.pytorch.watch.ForwardError` when its forward does.
    """
    run = _run(model, arguments, x, inject, convolve, passages)
    loops = [call for call in run.calls if call.taken]
    if not loops or plain or (x.shape[1] > 1 and all(map(is_plain, loops))):
        return run
    # What a loop makes of a cell's state after a step is seen when it hands it to the next step.
    longer = _run(model, arguments, torch.cat([x, x[:, -1:]], dim=1), inject, convolve, passages)
    later = {call.key: call for call in longer.calls}
    return replace(run, calls=tuple(_handed_on(call, later.get(call.key)) for call in run.calls))


def _run(
    model: nn.Module,
    arguments: Arguments,
    x: Tensor,
    inject: Inject | None,
    convolve: Convolve | None,
    passages: bool,
) -> Run:
    copied = copy_of(model)
    arguments.prepare(copied, len(x))
    return watch(copied, arguments.with_input(x), inject, convolve, passages=passages)


def _handed_on(call: Call, longer: Call | None) -> Call:
    """The call of a cell, what is left being what a run of one more step hands to the cell in that step."""
    if not call.taken or longer is None or len(longer.taken) != len(call.taken) + 1:
        return call
    given = longer.taken[-1].given
    return replace(call, left=tuple(map(torch.zeros_like, call.left)) if given is None else given)


def run_with(model: nn.Module, arguments: Arguments, x: Tensor) -> Run:
    """As :func:`fresh_run`, but an error of the forward becomes an :class:`ExportError` that names the layer."""
    try:
        return fresh_run(model, arguments, x)
    except ForwardError as error:
        hint = ""
        if arguments.example.dim() == 2 and arguments.dtype == "float32":
            hint = "; an example of rank 2 is [batch, time], so give [batch, time, features] if it has features"
        raise ExportError(
            f"the model's forward takes the example's sizes only: with a batch of {x.shape[0]} and {x.shape[1]} steps "
            f"it fails in {error}{hint}"
        ) from error.error
