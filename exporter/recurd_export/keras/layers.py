"""Every Keras layer that can be exported, as a torch module that works the same on each step."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurd_export.errors import ExportError
from recurd_export.keras import normalizing, shaping
from recurd_export.keras.activations import activation
from recurd_export.keras.arrays import as_array, own_name
from recurd_export.keras.built import Apply, Built
from recurd_export.keras.place import Place
from recurd_export.keras.recurrent import RECURRENT, recurrent

Builder = Callable[[Place], Built]

_ADVICE = "build the model of Keras' own layers, or write it in torch and export that"

#: Layers whose reason deserves a better word than that they are not known.
_REASONS = {
    "Masking": "leaves out steps by their value, and the exported file leaves out none: which steps are real is told "
    "by the length of each chunk; remove the layer and send real steps only",
    "Lambda": "is code that is not looked into; use Keras' own layers for what it does",
    "Conv1D": "looks at several steps at once, and its last inputs are carried on for torch models only; write it in "
    "torch and export that",
    "RepeatVector": "makes time steps of one, so chunks of a stream would not fit together",
    "Attention": "looks at every step of a sequence, so results would depend on how a stream is cut into chunks",
    "MultiHeadAttention": "looks at every step of a sequence, so results would depend on how a stream is cut into "
    "chunks",
    "ConvLSTM1D": "is not an LSTM, GRU or SimpleRNN, so its states are not known",
    "ConvLSTM2D": "is not an LSTM, GRU or SimpleRNN, so its states are not known",
}


def build(place: Place) -> Built:
    """The layer at a place as torch. Raises :class:`ExportError` for one that cannot be exported."""
    name = own_name(place.layer)
    builder = _BUILDERS.get(name)
    if builder is None:
        raise ExportError(_refusal(place, name))
    if name not in _MERGES and len(place.shapes) != 1:
        given = "its initial state by another layer" if name in RECURRENT else f"{len(place.shapes)} inputs"
        fix = "; a stream's state starts from zeros and is carried on from chunk to chunk" if name in RECURRENT else ""
        raise ExportError(f"{place.label} is given {given}, which cannot be exported{fix}")
    return builder(place)


def _refusal(place: Place, name: str) -> str:
    if name in _REASONS:
        return f"{place.label} {_REASONS[name]}"
    if place.is_timed and "Pooling" in name:
        return f"{place.label} pools over time, so results would depend on how a stream is cut into chunks"
    if "." in name:
        return f"{place.label} is a layer of your own, whose code cannot be looked into; {_ADVICE}"
    return f"{place.label} cannot be exported; {_ADVICE}"


def _identity(place: Place) -> Built:
    return Built(nn.Identity())


def _activation(place: Place) -> Built:
    return Built(Apply(_function(place, place.layer.activation)))


def _function(place: Place, function: Any) -> Callable[[Tensor], Tensor]:
    """A layer's activation, which may be a layer without weights itself."""
    if own_name(function) in ("ReLU", "LeakyReLU", "ELU", "Softmax"):
        return build(Place(function, place.shapes, place.timed)).module
    return activation(place.layer, function)


def _dense(place: Place) -> Built:
    layer = place.layer
    linear = nn.Linear(place.features, layer.units, bias=layer.use_bias)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(as_array(layer.kernel).T))
        if layer.use_bias:
            linear.bias.copy_(torch.from_numpy(as_array(layer.bias)))
    return Built(linear, _function(place, layer.activation))


def _embedding(place: Place) -> Built:
    layer = place.layer
    if layer.mask_zero:
        raise ExportError(
            f"{place.label} has mask_zero=True, which leaves out steps of id 0, and the exported file leaves out none: "
            f"which steps are real is told by the length of each chunk; train it without and send real steps only"
        )
    return Built(nn.Embedding(layer.input_dim, layer.output_dim, _weight=torch.from_numpy(as_array(layer.embeddings))))


def _relu(place: Place) -> Built:
    layer = place.layer
    slope, most, least = layer.negative_slope, layer.max_value, layer.threshold

    def relu(x: Tensor) -> Tensor:
        y = F.relu(x) if not least else torch.where(x > least, x, torch.zeros_like(x))
        y = y if most is None else y.clamp(0, most)
        return y - slope * F.relu(least - x) if slope else y

    return Built(Apply(relu))


def _leaky_relu(place: Place) -> Built:
    slope = float(place.layer.negative_slope)
    return Built(Apply(lambda x: F.leaky_relu(x, slope)))


def _elu(place: Place) -> Built:
    alpha = float(place.layer.alpha)
    return Built(Apply(lambda x: F.elu(x, alpha)))


def _prelu(place: Place) -> Built:
    alpha = shaping.of_step(place, as_array(place.layer.alpha)[None])
    return Built(Apply(lambda x, alpha: torch.where(x > 0, x, alpha * x), alpha))


def _softmax(place: Place) -> Built:
    axes = place.axes(place.layer.axis)
    if len(axes) != 1:
        raise ExportError(f"{place.label} works along several axes, which cannot be exported; give it one")
    return Built(Apply(lambda x: F.softmax(x, axes[0])))


def _merge(function: Callable[..., Tensor]) -> Builder:
    def builder(place: Place) -> Built:
        if len({len(shape) for shape in place.shapes}) != 1 or len(set(place.timed)) != 1:
            raise ExportError(
                f"{place.label} joins something that has time steps with something that has none, or axes of different "
                f"meaning {[list(shape) for shape in place.shapes]}; give it inputs of one form"
            )
        return Built(Apply(function))

    return builder


def _fold(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def fold(first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = function(first, other)
        return first

    return fold


def _average(*values: Tensor) -> Tensor:
    return _fold(torch.add)(*values) / len(values)


def _concatenate(place: Place) -> Built:
    axis = place.axis(place.layer.axis)
    return _merge(lambda *values: torch.cat(values, axis))(place)


_MERGES: Mapping[str, Builder] = {
    "Add": _merge(_fold(torch.add)),
    "Subtract": _merge(torch.sub),
    "Multiply": _merge(_fold(torch.mul)),
    "Average": _merge(_average),
    "Maximum": _merge(_fold(torch.maximum)),
    "Minimum": _merge(_fold(torch.minimum)),
    "Concatenate": _concatenate,
}

_BUILDERS: Mapping[str, Builder] = {
    **dict.fromkeys(RECURRENT, recurrent),
    **dict.fromkeys(
        ("Identity", "ActivityRegularization", "Dropout", "SpatialDropout1D", "SpatialDropout2D", "AlphaDropout"),
        _identity,
    ),
    **dict.fromkeys(("GaussianNoise", "GaussianDropout"), _identity),
    "Dense": _dense,
    "Embedding": _embedding,
    "Activation": _activation,
    "ReLU": _relu,
    "LeakyReLU": _leaky_relu,
    "ELU": _elu,
    "PReLU": _prelu,
    "Softmax": _softmax,
    **normalizing.BUILDERS,
    **shaping.BUILDERS,
    **_MERGES,
}
