"""Keras' recurrent layers as torch's: weights, gates, directions, and what the layer gives of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recurd_export.errors import ExportError
from recurd_export.keras import cells
from recurd_export.keras.activations import recurrent_activation
from recurd_export.keras.arrays import as_array, own_name
from recurd_export.keras.built import Built
from recurd_export.keras.place import Place, label

#: Keras' order of gates, in torch's.
_GATES = {"LSTMCell": (0, 1, 2, 3), "GRUCell": (1, 0, 2), "SimpleRNNCell": (0,)}
_PLAIN = {"LSTMCell": nn.LSTM, "GRUCell": nn.GRU, "SimpleRNNCell": nn.RNN}
_OTHER = {"LSTMCell": cells.LSTM, "GRUCell": cells.GRU, "SimpleRNNCell": cells.RNN}
#: What Keras' layers and torch's have in common.
_USUAL = {"LSTMCell": ("Sigmoid Tanh Tanh",), "GRUCell": ("Sigmoid Tanh", True), "SimpleRNNCell": ("Tanh",)}

_MERGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "concat": lambda one, other: torch.cat([one, other], -1),
    "sum": torch.add,
    "ave": lambda one, other: (one + other) / 2,
    "mul": torch.mul,
}

#: Layers that keep states; a Bidirectional keeps those of its two.
RECURRENT = frozenset({"LSTM", "GRU", "SimpleRNN", "RNN", "Bidirectional"})


@dataclass(frozen=True)
class Ending:
    """Of what a torch layer gives, what the Keras layer gives."""

    directions: int
    #: How two directions become one; ``None``: they stay two.
    merge: str | None
    sequences: bool
    states: bool

    def __call__(self, result: Any) -> Any:
        """The output, or a tuple of outputs and states."""
        y, left = result
        left = left if isinstance(left, tuple) else (left,)
        # The backward direction's last step is the first one: its state.
        parts = y.chunk(self.directions, -1) if self.sequences else left[0].unbind(0)
        if self.directions == 1:
            outputs = [parts[0]]
        else:
            outputs = list(parts) if self.merge is None else [_MERGES[self.merge](*parts)]
        if self.states:
            outputs += [part[direction] for direction in range(self.directions) for part in left]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @property
    def timed(self) -> tuple[bool, ...]:
        """Of every output, whether it has a time axis."""
        outputs = 2 if self.directions == 2 and self.merge is None else 1
        return (self.sequences,) * outputs + (False,) * (4 if self.states else 0)


def recurrent(place: Place) -> Built:
    """A layer of one direction or two. Raises :class:`ExportError` for what has no counterpart."""
    layer = place.layer
    halves = directions(layer)
    for half in halves:
        _check(half)
    if halves[0].go_backwards:
        raise ExportError(
            f"{place.label} goes backwards over time, so it would need a stream's end before its first step; "
            f"train it forwards, or as the backward half of a Bidirectional"
        )
    if not place.is_timed:
        raise ExportError(
            f"{place.label} runs over an axis that is not the stream's time {list(place.shape)}; only layers over the "
            f"time of the model's own input keep a stream's state"
        )
    if len(place.shape) != 3:
        raise ExportError(
            f"{place.label} is given steps of {len(place.shape) - 2} axes {list(place.shape)}; one can be"
        )
    options = _options(halves[0])
    if len(halves) == 2 and options != _options(halves[1]):
        raise ExportError(f"{place.label} has halves of different kinds, which cannot be one recurrent node")
    ending = Ending(len(halves), getattr(layer, "merge_mode", None), halves[0].return_sequences, layer.return_state)
    return Built(_module(halves, place.features, options), ending, ending.timed)


def directions(layer: Any) -> list[Any]:
    """The layers that keep states: the layer itself, or both halves of a Bidirectional."""
    return [layer.forward_layer, layer.backward_layer] if hasattr(layer, "backward_layer") else [layer]


def _check(layer: Any) -> None:
    if own_name(layer) not in RECURRENT - {"Bidirectional"}:
        raise ExportError(f"{label(layer)} is not an LSTM, GRU or SimpleRNN, so its states are not known")
    cell = own_name(layer.cell)
    if cell == "StackedRNNCells":
        raise ExportError(f"{label(layer)} has a stack of cells; make each a layer of its own (LSTM, GRU, SimpleRNN)")
    if cell not in _GATES:
        raise ExportError(
            f"{label(layer)} has a cell of its own ({type(layer.cell).__name__}), which cannot be looked into; build "
            f"the model of LSTM, GRU or SimpleRNN, or write its step in torch and export that"
        )


def _options(layer: Any) -> tuple[str, int, bool, tuple[Any, ...]]:
    """Cell, units, whether it has biases, and the operator's options."""
    cell, kind = layer.cell, own_name(layer.cell)
    f = recurrent_activation(layer, cell.activation)
    if kind == "SimpleRNNCell":
        options: tuple[Any, ...] = (f,)
    else:
        g = recurrent_activation(layer, cell.recurrent_activation)
        options = (f"{g} {f} {f}",) if kind == "LSTMCell" else (f"{g} {f}", bool(cell.reset_after))
    return kind, cell.units, cell.use_bias, options


def _module(halves: list[Any], features: int, options: tuple[str, int, bool, tuple[Any, ...]]) -> nn.Module:
    kind, units, bias, onnx_options = options
    common: dict[str, Any] = {"bias": bias, "bidirectional": len(halves) == 2, "batch_first": True}
    if onnx_options == _USUAL[kind]:
        module: nn.Module = _PLAIN[kind](features, units, **common)
    elif kind == "SimpleRNNCell" and onnx_options == ("Relu",):
        module = nn.RNN(features, units, nonlinearity="relu", **common)
    else:
        module = _OTHER[kind](features, units, onnx_options=onnx_options, **common)
    for half, suffix in zip(halves, ("", "_reverse"), strict=False):
        for name, value in _weights(half.cell, kind).items():
            with torch.no_grad():
                getattr(module, f"{name}_l0{suffix}").copy_(value)
    return module


def _weights(cell: Any, kind: str) -> dict[str, Tensor]:
    """torch's weights of one direction. Keras' GRU with ``reset_after`` has both biases, the others the first only."""
    found = {
        "weight_ih": _reorder(kind, as_array(cell.kernel).T),
        "weight_hh": _reorder(kind, as_array(cell.recurrent_kernel).T),
    }
    if cell.use_bias:
        bias = as_array(cell.bias)
        both = bias if bias.ndim == 2 else np.stack([bias, np.zeros_like(bias)])
        found |= {"bias_ih": _reorder(kind, both[0]), "bias_hh": _reorder(kind, both[1])}
    return found


def _reorder(kind: str, weight: Any) -> Tensor:
    gates = np.split(weight, len(_GATES[kind]))
    return torch.from_numpy(np.concatenate([gates[gate] for gate in _GATES[kind]]))
