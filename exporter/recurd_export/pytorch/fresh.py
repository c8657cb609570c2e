"""Runs of a model from a fresh start, with any batch size and number of steps."""

from torch import Tensor, nn

from recurd_export.errors import ExportError
from recurd_export.pytorch.arguments import Arguments
from recurd_export.pytorch.watch import ForwardError, Inject, Run, copy_of, watch


def fresh_run(model: nn.Module, arguments: Arguments, x: Tensor, inject: Inject | None = None) -> Run:
    """Run a copy on an input ``[batch, time, ...]``, all its states being zeros (or what ``inject`` gives).

    Raises :class:`~recurd_export.pytorch.watch.ForwardError` when its forward does.
    """
    copied = copy_of(model)
    arguments.prepare(copied, len(x))
    return watch(copied, arguments.with_input(x), inject)


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
