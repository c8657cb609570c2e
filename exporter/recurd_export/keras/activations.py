"""Keras' activations as torch functions, and as ONNX's recurrent nodes know them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recurd_export.errors import ExportError
from recurd_export.keras.place import label

Function = Callable[[Tensor], Tensor]

FUNCTIONS: dict[str, Function] = {
    "linear": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "softplus": lambda x: torch.clamp(x, min=0) + torch.log1p(torch.exp(-torch.abs(x))),
    "softsign": F.softsign,
    "sigmoid": torch.sigmoid,
    "log_sigmoid": F.logsigmoid,
    "hard_sigmoid": F.hardsigmoid,
    "hard_silu": F.hardswish,
    "hard_tanh": F.hardtanh,
    "tanh": torch.tanh,
    "tanh_shrink": F.tanhshrink,
    "exponential": torch.exp,
    "softmax": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
}

#: As ``activations`` of the operators in :mod:`recurd_export.pytorch.ops`.
_RECURRENT = {
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
    "relu": "Relu",
    "hard_sigmoid": f"HardSigmoid:{1 / 6}:0.5",
    "linear": "Affine:1:0",
    "elu": "Elu:1",
    "leaky_relu": "LeakyRelu:0.2",
    "softplus": "Softplus",
    "softsign": "Softsign",
}


def activation(layer: Any, function: Any) -> Function:
    """The torch function of a Keras activation. Raises :class:`ExportError` for one that is not Keras' own."""
    name = _name(function)
    if name not in FUNCTIONS:
        raise ExportError(
            f"{label(layer)} has the activation '{name}', which cannot be exported; those that can are "
            f"{', '.join(FUNCTIONS)}"
        )
    return FUNCTIONS[name]


def is_plain(function: Any) -> bool:
    """Whether an activation changes nothing."""
    return function is None or _name(function) == "linear"


def recurrent_activation(layer: Any, function: Any) -> str:
    """A recurrent layer's activation in ONNX's words. Raises :class:`ExportError` for one that ONNX does not know."""
    name = _name(function)
    if name not in _RECURRENT:
        raise ExportError(
            f"{label(layer)} has the activation '{name}', which ONNX's recurrent nodes do not know; train it with one "
            f"of {', '.join(_RECURRENT)}"
        )
    return _RECURRENT[name]


def _name(function: Any) -> str:
    """What Keras calls the function; a function of the user's own is called by its own name, with its module."""
    import keras

    name = str(getattr(function, "__name__", type(function).__name__))
    own = getattr(keras.activations, name, None) is function
    return name if own else f"{getattr(function, '__module__', '')}.{name}"
