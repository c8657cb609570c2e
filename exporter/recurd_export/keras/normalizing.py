"""Layers that bring numbers to another scale."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recurd_export.errors import ExportError
from recurd_export.keras.arrays import as_array
from recurd_export.keras.built import Apply, Built
from recurd_export.keras.place import Place
from recurd_export.keras.shaping import of_step


def _layer_normalization(place: Place) -> Built:
    layer = place.layer
    axes = place.axes(layer.axis)
    if axes != tuple(range(-len(axes), 0)):
        raise ExportError(f"{place.label} leaves the last axis alone, which cannot be exported; normalise it too")
    if getattr(layer, "rms_scaling", False):
        raise ExportError(f"{place.label} has rms_scaling, which cannot be exported; use RMSNormalization")
    sizes = place.step()[-len(axes) :]
    scale = as_array(layer.gamma) if layer.scale else np.ones(sizes, np.float32)
    shift = as_array(layer.beta) if layer.center else np.zeros(sizes, np.float32)
    epsilon = float(layer.epsilon)

    def normalize(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.layer_norm(x, sizes, scale, shift, epsilon)

    return Built(Apply(normalize, torch.from_numpy(scale), torch.from_numpy(shift)))


def _rms_normalization(place: Place) -> Built:
    layer = place.layer
    axes, epsilon = place.axes(layer.axis), float(layer.epsilon)
    scale = _along(axes, as_array(layer.scale))

    def normalize(x: Tensor, scale: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + epsilon) * scale

    return Built(Apply(normalize, scale))


def _batch_normalization(place: Place) -> Built:
    """With the statistics of training, as Keras does at inference."""
    layer = place.layer
    axes = place.axes(layer.axis)
    spread = np.sqrt(as_array(layer.moving_variance).astype(np.float64) + layer.epsilon)
    scale = (1 / spread).astype(np.float32)
    scale = scale * as_array(layer.gamma) if layer.scale else scale
    shift = as_array(layer.beta) if layer.center else np.zeros_like(scale)
    constants = [_along(axes, value) for value in (as_array(layer.moving_mean), scale, shift)]
    return Built(Apply(lambda x, mean, scale, shift: (x - mean) * scale + shift, *constants))


def _along(axes: tuple[int, ...], value: Any) -> Tensor:
    """Numbers along axes (counted from the end) in the shape that goes with all behind the first."""
    sizes = dict(zip(axes, value.shape, strict=True))
    return torch.from_numpy(value.reshape([sizes.get(axis, 1) for axis in range(axes[0], 0)]))


def _normalization(place: Place) -> Built:
    import keras

    layer = place.layer
    least = float(keras.config.epsilon())
    mean, variance = (_spread(place, as_array(value)) for value in (layer.mean, layer.variance))
    spread = variance.sqrt().clamp(min=least)
    if layer.invert:
        return Built(Apply(lambda x, mean, spread: mean + x * spread, mean, spread))
    return Built(Apply(lambda x, mean, spread: (x - mean) / spread, mean, spread))


def _rescaling(place: Place) -> Built:
    constants = [_spread(place, np.asarray(value, np.float32)) for value in (place.layer.scale, place.layer.offset)]
    return Built(Apply(lambda x, scale, offset: x * scale + offset, *constants))


def _spread(place: Place, value: Any) -> Tensor:
    """A constant of fewer axes than the input, or as many."""
    rank = len(place.shape)
    return of_step(place, value.reshape((1,) * (rank - value.ndim) + value.shape))


BUILDERS: Mapping[str, Callable[[Place], Built]] = {
    "LayerNormalization": _layer_normalization,
    "RMSNormalization": _rms_normalization,
    "BatchNormalization": _batch_normalization,
    "Normalization": _normalization,
    "Rescaling": _rescaling,
}
