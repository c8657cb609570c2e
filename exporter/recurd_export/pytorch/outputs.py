"""Finds out what a model returns: which tensors are states, and where the heads have batch and time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recurd_export.errors import ExportError
from recurd_export.pytorch import tree
from recurd_export.pytorch.arguments import BATCH, OTHER_BATCH, OTHER_STEPS, STEPS, Arguments
from recurd_export.pytorch.fresh import run_with
from recurd_export.pytorch.watch import Run, shape_changer, tensors

#: What a returned state may differ from the state by.
ATOL, RTOL = 1e-6, 1e-5


@dataclass(frozen=True)
class HeadLayout:
    """Where a head stands in what the model returns, and its axes there."""

    name: str
    position: int
    per: Literal["step", "last"]
    batch_axis: int
    time_axis: int | None = None
    #: With steps and rows in one axis (at ``batch_axis``): which of the two runs slower.
    outer: Literal["batch", "time"] | None = None
    #: Whole numbers that are sent as float32, because other heads are and a result has one type.
    as_float: bool = False
    #: Number of axes, as the model gives it.
    rank: int = 0

    def restore(self, tensor: Tensor) -> Tensor:
        """The head of one step, whose time axis a ``squeeze()`` may have taken away."""
        if self.time_axis is not None and tensor.dim() == self.rank - 1:
            return tensor.unsqueeze(self.time_axis)
        return tensor

    def arrange(self, tensor: Tensor, batch: Any, steps: Any) -> Tensor:
        """The head as ``[batch, time, ...]``, or ``[batch, ...]`` for the last step."""
        return self._ordered(tensor.to(torch.float32) if self.as_float else tensor, batch, steps)

    def _ordered(self, tensor: Tensor, batch: Any, steps: Any) -> Tensor:
        if self.outer is not None:
            sizes = (batch, steps) if self.outer == "batch" else (steps, batch)
            shape = (*tensor.shape[: self.batch_axis], *sizes, *tensor.shape[self.batch_axis + 1 :])
            axes = (self.batch_axis, self.batch_axis + 1)
            return tensor.reshape(shape).movedim(axes if self.outer == "batch" else axes[::-1], (0, 1))
        if self.time_axis is None:
            return tensor.movedim(self.batch_axis, 0)
        return tensor.movedim((self.batch_axis, self.time_axis), (0, 1))


def find_outputs(
    model: nn.Module, arguments: Arguments, runs: Sequence[Run], taken: set[str]
) -> tuple[tuple[HeadLayout, ...], tuple[int, ...]]:
    found = [tree.leaves(run.output) for run in runs]
    paths = [path for path, _ in found[0]]
    if not paths:
        raise ExportError("the model returns no tensor")
    if any([path for path, _ in other] != paths for other in found[1:]):
        raise ExportError("what the model returns depends on the input or its length")
    states = _returned_states(arguments, runs[0], [tensor for _, tensor in found[0]])
    _check_states_returned(arguments, states, [tensor for _, tensor in found[0]])
    if len(states) == len(paths):
        states = ()  # a model that gives nothing but its states means them as its output
    positions = [position for position in range(len(paths)) if position not in states]
    names = head_names([paths[position] for position in positions], taken)
    heads = []
    for name, position in zip(names, positions, strict=True):
        tensors = [leaves[position][1] for leaves in found]
        head = _axes(name, position, [tuple(tensor.shape) for tensor in tensors], runs[0])
        heads.append(_order(model, arguments, head, tensors[0]) if head.outer else head)
    return of_one_type(heads, [tensor.dtype for _, tensor in found[0]]), states


def of_one_type(heads: Sequence[HeadLayout], dtypes: Sequence[torch.dtype]) -> tuple[HeadLayout, ...]:
    """The heads, whole numbers beside float32 being sent as float32. Raises :class:`ExportError` for other mixtures."""
    kinds = {dtypes[head.position] for head in heads}
    if len(kinds) == 1:
        return tuple(heads)
    whole = {kind for kind in kinds if not kind.is_floating_point and not kind.is_complex}
    if kinds - whole != {torch.float32} or torch.bool in whole:
        each = ", ".join(f"'{head.name}' {str(dtypes[head.position]).removeprefix('torch.')}" for head in heads)
        raise ExportError(
            f"the heads are of different types ({each}), and a result has one; cast them to one type in the forward, "
            f"for example with .float()"
        )
    return tuple(replace(head, as_float=dtypes[head.position] in whole) for head in heads)


def _returned_states(arguments: Arguments, run: Run, tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Positions of returned tensors that are states: equal to a layer's, or an argument's new value."""
    left = [state for call in run.calls for state in call.left]
    shapes = _argument_shapes(arguments)
    values = torch.cat([state.flatten() for state in left] or [torch.zeros(0)])
    return tuple(
        position
        for position, tensor in enumerate(tensors)
        if tensor.dtype == torch.float32
        and (
            any(tensor.shape == state.shape and torch.allclose(tensor, state, RTOL, ATOL) for state in left)
            or (tensor.shape in shapes and _all_among(tensor, values))
        )
    )


def _all_among(tensor: Tensor, values: Tensor) -> bool:
    """Whether every element is one of the values but for rounding (a loop's states may come from another run)."""
    ordered, wanted = values.sort().values, tensor.flatten()
    places = torch.searchsorted(ordered, wanted)
    nearest = [ordered[(places + shift).clamp(0, len(ordered) - 1)] for shift in (-1, 0)]
    off = torch.minimum(*((wanted - near).abs() for near in nearest))
    return bool((off <= ATOL + RTOL * wanted.abs()).all())


def _argument_shapes(arguments: Arguments) -> list[torch.Size]:
    _, *rest = arguments.with_input(arguments.random(BATCH, 1, 0))
    return [state.shape for state in tensors(rest)]


def _check_states_returned(arguments: Arguments, states: Sequence[int], tensors: Sequence[Tensor]) -> None:
    """A model that takes states must give them back as its layers leave them, if it gives back anything like them."""
    shapes = _argument_shapes(arguments)
    if len(states) >= len(shapes):
        return
    for position, tensor in enumerate(tensors):
        if position not in states and tensor.shape in shapes:
            raise ExportError(
                f"returned tensor {position + 1} {list(tensor.shape)} has the shape of a state argument, but is not "
                f"the state as the recurrent layers leave it; states must be passed on unchanged"
            )


def head_names(paths: Sequence[tree.Path], taken: set[str]) -> list[str]:
    """Head names: dictionary keys and field names, else ``output``, ``output_1``, ..."""
    names: list[str] = []
    for number, path in enumerate(paths):
        keys = [str(part) for part in path] if any(isinstance(part, str) for part in path) else []
        name = ".".join(keys) or ("output" if len(paths) == 1 else f"output_{number}")
        while name in taken | {"input", "lengths", *names}:
            name += "_out"
        names.append(name)
    return names


def _axes(name: str, position: int, shapes: Sequence[tuple[int, ...]], run: Run) -> HeadLayout:
    """Find batch and time by what changes with which size. ``shapes`` are those of the three runs of :func:`find`."""
    if len({len(shape) for shape in shapes}) != 1:
        raise ExportError(f"the rank of head '{name}' depends on the input's sizes: {[list(s) for s in shapes]}")
    roles = {
        (BATCH, OTHER_BATCH, BATCH): "batch",
        (STEPS, STEPS, OTHER_STEPS): "time",
        (BATCH * STEPS, OTHER_BATCH * STEPS, BATCH * OTHER_STEPS): "both",
    }
    axes: dict[str, list[int]] = {"batch": [], "time": [], "both": [], "other": []}
    for axis, sizes in enumerate(zip(*shapes, strict=True)):
        if len(set(sizes)) > 1:
            axes[roles.get(sizes, "other")].append(axis)
    batch, time, both = axes["batch"], axes["time"], axes["both"]
    if not axes["other"] and (len(batch), len(time), len(both)) == (1, 1, 0):
        return HeadLayout(name, position, "step", batch[0], time[0], rank=len(shapes[0]))
    if not axes["other"] and (len(batch), len(time), len(both)) == (1, 0, 0):
        return HeadLayout(name, position, "last", batch[0], rank=len(shapes[0]))
    if not axes["other"] and (len(batch), len(time), len(both)) == (0, 0, 1):
        return HeadLayout(name, position, "step", both[0], outer="batch", rank=len(shapes[0]))
    changer = shape_changer(run, STEPS)
    if changer is not None:
        raise ExportError(changer)
    raise ExportError(
        f"head '{name}' has the shape {list(shapes[0])} for a batch of {BATCH} and {STEPS} steps; a head needs one "
        f"batch axis, and one time axis of as many steps as the input or none (its last step)"
    )


def _order(model: nn.Module, arguments: Arguments, head: HeadLayout, tensor: Tensor) -> HeadLayout:
    """Whether rows or steps run slower in an axis that holds both: compare with one row alone."""
    x = arguments.random(BATCH, STEPS, 0)
    alone = tree.leaves(run_with(model, arguments, x[:1]).output)[head.position][1]
    for outer in ("batch", "time"):
        candidate = replace(head, outer=outer)
        row = candidate.arrange(tensor, BATCH, STEPS)[:1]
        if torch.allclose(row, candidate.arrange(alone, 1, STEPS), 1e-4, 1e-5):
            return candidate
    raise ExportError(f"head '{head.name}' is {list(tensor.shape)}, and its rows are not those of single streams")
