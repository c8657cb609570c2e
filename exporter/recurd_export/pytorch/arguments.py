"""Makes arguments of any batch size and number of steps out of the one example."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recurd_export.errors import ExportError
from recurd_export.pytorch import tree
from recurd_export.pytorch.kept import Kept

#: Sizes to probe with: primes, so that an axis of that size is hardly a feature axis.
BATCH, OTHER_BATCH, STEPS, OTHER_STEPS = 3, 5, 11, 13


@dataclass(frozen=True)
class Arguments:
    """The model's positional arguments: one input, then states (nests of tensors) and constants."""

    example: Tensor
    rest: tuple[Any, ...]
    #: Whether the input's first axis is time instead of batch.
    time_major: bool = False
    #: Which axis of the input is time, where the first one is batch; behind the channels in many a convolutional model.
    time_axis: int = 1
    #: Batch axis of every tensor in ``rest``, in order.
    state_axes: tuple[int, ...] = ()
    #: Attributes that hold states.
    kept: tuple[Kept, ...] = ()
    #: Whether random inputs are made of the example's steps, because the model does not take any number.
    drawn: bool = False
    #: Token ids are in ``[0, classes)``; ``None`` where not known or not token ids.
    classes: int | None = None

    @property
    def dtype(self) -> Literal["float32", "int64"]:
        """``float32`` or ``int64``."""
        return "int64" if self.example.dtype == torch.int64 else "float32"

    @property
    def step_shape(self) -> tuple[int, ...]:
        """Shape of one step."""
        return tuple(self.example.movedim(self.time_axis, 1).shape[2:])

    def with_input(self, x: Tensor) -> tuple[Any, ...]:
        """The arguments for an input ``[batch, time, ...]`` (symbolic sizes too), states being zeros."""
        axes = iter(self.state_axes)

        def zeros(state: Tensor) -> Tensor:
            shape: list[Any] = list(state.shape)
            shape[next(axes)] = x.shape[0]
            return torch.zeros(shape, dtype=x.dtype if x.is_floating_point() else state.dtype)

        return (self._arranged(x), *tree.map_leaves(self.rest, zeros))

    def _arranged(self, x: Tensor) -> Tensor:
        """An input ``[batch, time, ...]`` as the model takes it."""
        if self.time_major:
            return x.transpose(0, 1).contiguous()
        return x if self.time_axis == 1 else x.movedim(1, self.time_axis).contiguous()

    def prepare(self, model: nn.Module, batch: Any) -> None:
        """Make the next run of a copy a fresh start, where it keeps states in attributes."""
        for kept in self.kept:
            kept.reset(model, batch)

    @property
    def known(self) -> Tensor | None:
        """Steps to make inputs of, ``[n, *step_shape]``; ``None`` when normal numbers or the model's ids will do."""
        if self.drawn or (self.dtype == "int64" and self.classes is None):
            return self.example.movedim(self.time_axis, 1).flatten(0, 1)
        return None

    def random(self, batch: int, steps: int, seed: int) -> Tensor:
        """A random input ``[batch, time, ...]``: normal numbers, ids the model has, or the example's steps."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, steps, *self.step_shape)
        if self.known is not None:
            return self.known[torch.randint(len(self.known), (batch, steps), generator=generator)]
        if self.classes is not None:
            return torch.randint(self.classes, shape, generator=generator)
        return torch.randn(shape, generator=generator)


def read_example(example: Any, *, of_step: bool = False) -> tuple[Tensor, tuple[Any, ...]]:
    """The input tensor and the other arguments of an example, on the CPU. ``of_step``: without a time axis.

    Raises :class:`ExportError` for a wrong rank or element type.
    """
    axes = "[batch, ...]" if of_step else "[batch, time, ...]"
    args = tuple(example) if isinstance(example, tuple | list) else (example,)
    if not args or not isinstance(args[0], Tensor):
        found = type(args[0]).__name__ if args else "nothing"
        raise ExportError(
            f"the example must be a tensor {axes}, or a tuple of one and states; it is {found}"
            if not isinstance(example, tuple | list)
            else f"the example's first argument must be a tensor {axes}; it is {found}"
        )
    x, *rest = tree.map_leaves(args, lambda tensor: tensor.detach().cpu().clone())
    if x.dtype not in (torch.float32, torch.int64):
        raise ExportError(
            f"the example is {_dtype(x)}; an input is float32 (numbers) or int64 (token ids), so convert it with "
            f"{'.long()' if not x.is_floating_point() else '.float()'}"
        )
    if x.dim() < (1 if of_step else 2):
        raise ExportError(f"the example is of rank {x.dim()} {list(x.shape)}; it must be {axes}")
    if 0 in x.shape:
        raise ExportError(f"the example {list(x.shape)} is empty")
    return x, tuple(rest)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
