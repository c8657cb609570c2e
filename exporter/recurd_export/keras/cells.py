"""Recurrent layers that torch does not have: other activations, and a GRU that resets before its product."""

from typing import Any

import torch
from torch import Tensor, nn

from recurd_export.pytorch import hoist


class LSTM(nn.LSTM):
    """An LSTM of other activations. ``onnx_options`` go to the operator as they are."""

    def __init__(self, *args: Any, onnx_options: tuple[Any, ...], **options: Any) -> None:
        super().__init__(*args, **options)
        self.onnx_options = onnx_options

    def forward(self, input: Tensor, hx: Any = None) -> Any:  # type: ignore[override]
        """As torch's own."""
        return _run(self, torch.ops.recurd.lstm, input, hx, 2)


class GRU(nn.GRU):
    """A GRU of other activations, or with ``reset_after=False``."""

    def __init__(self, *args: Any, onnx_options: tuple[Any, ...], **options: Any) -> None:
        super().__init__(*args, **options)
        self.onnx_options = onnx_options

    def forward(self, input: Tensor, hx: Any = None) -> Any:  # type: ignore[override]
        """As torch's own."""
        return _run(self, torch.ops.recurd.gru, input, hx, 1)


class RNN(nn.RNN):
    """A simple recurrent layer of another activation."""

    def __init__(self, *args: Any, onnx_options: tuple[Any, ...], **options: Any) -> None:
        super().__init__(*args, **options)
        self.onnx_options = onnx_options

    def forward(self, input: Tensor, hx: Any = None) -> Any:  # type: ignore[override]
        """As torch's own."""
        return _run(self, torch.ops.recurd.rnn, input, hx, 1)


def _run(module: Any, operator: Any, input: Tensor, hx: Any, parts: int) -> Any:
    """One layer, batch first, by the operator's own formulas."""
    directions = 2 if module.bidirectional else 1
    zeros = input.new_zeros(directions, input.shape[0], module.hidden_size)
    states = (zeros,) * parts if hx is None else hx if isinstance(hx, tuple) else (hx,)
    lengths = torch.full((input.shape[0],), input.shape[1], dtype=torch.int32)
    weights = [weight.to(input.dtype) for weight in hoist.onnx_weights(module, 0)]
    y, *left = operator(input.transpose(0, 1), lengths, *states, *weights, *module.onnx_options)
    merged = y.transpose(1, 2).flatten(2).transpose(0, 1)
    return merged, tuple(left) if parts == 2 else left[0]
