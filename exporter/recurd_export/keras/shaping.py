"""Layers that move the numbers of a step about, and leave time alone."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from recurd_export.errors import ExportError
from recurd_export.keras.built import Apply, Built
from recurd_export.keras.place import Place


def of_step(place: Place, value: Any) -> Tensor:
    """A constant of the input's rank without its axes of batch and time.

    Raises :class:`ExportError` when it is not the same at every step.
    """
    kept = len(place.shape) - place.local
    if math.prod(value.shape[:kept]) != 1:
        raise ExportError(
            f"{place.label} has numbers of its own for every step of a sequence, so results would depend on how a "
            f"stream is cut into chunks"
        )
    return torch.from_numpy(value.reshape(value.shape[kept:]))


def reshaped_step(place: Place) -> tuple[int, ...]:
    """The sizes of a step behind a Reshape. Raises :class:`ExportError` when it takes time apart."""
    target = tuple(place.layer.target_shape)
    time = place.shape[1] if place.is_timed else None
    rest = target[1:] if place.is_timed else target
    elements = place.elements
    if -1 in rest:
        known = -math.prod(rest)
        rest = tuple(elements // known if size == -1 else size for size in rest)
    if math.prod(rest) != elements or (place.is_timed and target[0] not in (-1, time)):
        raise ExportError(
            f"{place.label} makes steps of {list(target)} from {list(place.shape[1:])}, so a step would not be a step "
            f"any more; reshape the axes behind time only"
        )
    return rest


def _reshape(place: Place) -> Built:
    return _into(place, reshaped_step(place))


def _flatten(place: Place) -> Built:
    if place.is_timed:
        raise ExportError(
            f"{place.label} makes one row of all time steps, so chunks of a stream would not fit together; wrap it in "
            f"TimeDistributed to flatten each step"
        )
    return _into(place, (place.elements,))


def _into(place: Place, sizes: tuple[int, ...]) -> Built:
    local = place.local

    def reshape(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[: x.dim() - local], *sizes)

    return Built(Apply(reshape))


def _permute(place: Place) -> Built:
    dims = tuple(place.layer.dims)
    if place.is_timed and dims[0] != 1:
        raise ExportError(f"{place.label} swaps time with another axis, so a step would not be a step any more")
    order = [axis - len(place.shape) for axis in dims[place.is_timed :]]

    def permute(x: Tensor) -> Tensor:
        leading = range(x.dim() - len(order))
        return x.permute(*leading, *(x.dim() + axis for axis in order))

    return Built(Apply(permute))


BUILDERS: Mapping[str, Callable[[Place], Built]] = {"Reshape": _reshape, "Flatten": _flatten, "Permute": _permute}
