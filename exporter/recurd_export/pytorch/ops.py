"""One opaque torch operator per ONNX recurrent layer, with ONNX's own meaning, and its translation to ONNX.

torch's exporter unrolls or freezes ``nn.LSTM`` and its kin along time; an operator it cannot look into stays one node.
Weights are in ONNX's gate order, ``lengths`` is ONNX's ``sequence_lens``. The eager implementations are written from
ONNX's formulas, not with torch's layers, so that running a traced graph in torch proves the packing of weights too.

Shapes: x ``[time, batch, in]``, lengths int32 ``[batch]``, h and c ``[directions, batch, hidden]``, w
``[directions, gates * hidden, in]``, r ``[directions, gates * hidden, hidden]``, b
``[directions, 2 * gates * hidden]``; returns y ``[time, directions, batch, hidden]`` (zero beyond a row's length) and
the states after each row's last step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: A step of one direction: (x_t @ w.T + wb, h, c, r, rb) -> (h, c).
_Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@torch.library.custom_op("recurd::lstm", mutates_args=())
def lstm(
    x: Tensor, lengths: Tensor, h: Tensor, c: Tensor, w: Tensor, r: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """ONNX LSTM; gates in order i, o, f, c."""
    return _scan(_lstm_step, x, lengths, h, c, w, r, b)


@torch.library.custom_op("recurd::gru", mutates_args=())
def gru(x: Tensor, lengths: Tensor, h: Tensor, w: Tensor, r: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """ONNX GRU with ``linear_before_reset``; gates in order z, r, h."""
    return _scan(_gru_step, x, lengths, h, h, w, r, b)[:2]


@torch.library.custom_op("recurd::rnn", mutates_args=())
def rnn(
    x: Tensor, lengths: Tensor, h: Tensor, w: Tensor, r: Tensor, b: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """ONNX RNN; ``activation`` is ``Tanh`` or ``Relu``."""
    step = _tanh_step if activation == "Tanh" else _relu_step
    return _scan(step, x, lengths, h, h, w, r, b)[:2]


@torch.library.custom_op("recurd::last_step", mutates_args=())
def last_step(x: Tensor, lengths: Tensor, batch_axis: int, time_axis: int) -> Tensor:
    """Every row's own last step: x without its time axis, taken at ``lengths - 1``."""
    rows = x.movedim((batch_axis, time_axis), (0, 1))
    last = rows[torch.arange(len(lengths)), lengths.long() - 1]
    return last.movedim(0, _batch_axis_after(batch_axis, time_axis)).contiguous()


def _batch_axis_after(batch_axis: int, time_axis: int) -> int:
    """Where the batch axis stands once the time axis is gone."""
    return batch_axis - (time_axis < batch_axis)


@lstm.register_fake
def _(x: Tensor, lengths: Tensor, h: Tensor, c: Tensor, w: Tensor, r: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return _fake_y(x, h), torch.empty_like(h), torch.empty_like(c)


@gru.register_fake
def _(x: Tensor, lengths: Tensor, h: Tensor, w: Tensor, r: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return _fake_y(x, h), torch.empty_like(h)


@rnn.register_fake
def _(x: Tensor, lengths: Tensor, h: Tensor, w: Tensor, r: Tensor, b: Tensor, activation: str) -> tuple[Tensor, ...]:
    return _fake_y(x, h), torch.empty_like(h)


@last_step.register_fake
def _(x: Tensor, lengths: Tensor, batch_axis: int, time_axis: int) -> Tensor:
    return x.new_empty([size for axis, size in enumerate(x.shape) if axis != time_axis])


def _fake_y(x: Tensor, h: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], h.shape[0], x.shape[1], h.shape[2])


def _scan(
    step: _Step, x: Tensor, lengths: Tensor, h: Tensor, c: Tensor, w: Tensor, r: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """All directions; the second one, where there is one, runs backwards from each row's own last step."""
    y = x.new_zeros(x.shape[0], h.shape[0], x.shape[1], h.shape[2])
    next_h, next_c = h.clone(), c.clone()
    for direction in range(len(h)):
        wb, rb = b[direction].chunk(2)
        gates = x @ w[direction].T + wb
        order = range(len(x)) if direction == 0 else reversed(range(len(x)))
        for t in order:
            new_h, new_c = step(gates[t], next_h[direction], next_c[direction], r[direction], rb)
            valid = (t < lengths)[:, None]
            y[t, direction] = torch.where(valid, new_h, torch.zeros_like(new_h))
            next_h[direction] = torch.where(valid, new_h, next_h[direction])
            next_c[direction] = torch.where(valid, new_c, next_c[direction])
    return y, next_h, next_c


def _lstm_step(x: Tensor, h: Tensor, c: Tensor, r: Tensor, rb: Tensor) -> tuple[Tensor, Tensor]:
    i, o, f, g = (x + h @ r.T + rb).chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru_step(x: Tensor, h: Tensor, c: Tensor, r: Tensor, rb: Tensor) -> tuple[Tensor, Tensor]:
    xz, xr, xh = x.chunk(3, dim=1)
    hz, hr, hh = (h @ r.T + rb).chunk(3, dim=1)
    z = torch.sigmoid(xz + hz)
    return (1 - z) * torch.tanh(xh + torch.sigmoid(xr + hr) * hh) + z * h, c


def _tanh_step(x: Tensor, h: Tensor, c: Tensor, r: Tensor, rb: Tensor) -> tuple[Tensor, Tensor]:
    return torch.tanh(x + h @ r.T + rb), c


def _relu_step(x: Tensor, h: Tensor, c: Tensor, r: Tensor, rb: Tensor) -> tuple[Tensor, Tensor]:
    return torch.relu(x + h @ r.T + rb), c


#: The operators above that look ahead when they have a second direction.
RECURRENT = frozenset({torch.ops.recurd.lstm.default, torch.ops.recurd.gru.default, torch.ops.recurd.rnn.default})


def forward_only(operator: Any, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Run a recurrent operator with its second direction running forwards too: the same shapes, but causal.

    With it one can tell whether the *rest* of a bidirectional model works step by step.
    """
    x, lengths, *rest = args
    tensors = [a for a in rest if isinstance(a, Tensor)]
    options = [a for a in rest if not isinstance(a, Tensor)]
    runs = [operator(x, lengths, *(tensor[d : d + 1] for tensor in tensors), *options) for d in range(len(tensors[0]))]
    return tuple(torch.cat(parts, dim=1 if i == 0 else 0) for i, parts in enumerate(zip(*runs, strict=True)))


def translations() -> dict[Any, Callable[..., Any]]:
    """The operators as ONNX nodes, for ``torch.onnx.export(custom_translation_table=...)``."""
    from onnxscript import opset18

    op: Any = opset18  # its type variables do not admit what its own functions return

    def onnx_lstm(x: Any, lengths: Any, h: Any, c: Any, w: Any, r: Any, b: Any) -> Any:
        return op.LSTM(x, w, r, b, lengths, h, c, hidden_size=r.shape[2], direction=_direction(r))

    def onnx_gru(x: Any, lengths: Any, h: Any, w: Any, r: Any, b: Any) -> Any:
        direction = _direction(r)
        return op.GRU(x, w, r, b, lengths, h, hidden_size=r.shape[2], direction=direction, linear_before_reset=1)

    def onnx_rnn(x: Any, lengths: Any, h: Any, w: Any, r: Any, b: Any, activation: str) -> Any:
        activations = [activation] * r.shape[0]
        return op.RNN(x, w, r, b, lengths, h, hidden_size=r.shape[2], direction=_direction(r), activations=activations)

    def onnx_last_step(x: Any, lengths: Any, batch_axis: int, time_axis: int) -> Any:
        rest = [axis for axis in range(len(x.shape)) if axis not in (batch_axis, time_axis)]
        rows = op.Transpose(x, perm=[batch_axis, time_axis, *rest])
        one = op.Constant(value_ints=[1])
        indices = op.Unsqueeze(op.Sub(op.Cast(lengths, to=7), one), one)
        last = op.GatherND(rows, indices, batch_dims=1)
        order = list(range(1, len(rest) + 1))
        order.insert(_batch_axis_after(batch_axis, time_axis), 0)
        return last if order == sorted(order) else op.Transpose(last, perm=order)

    return {
        torch.ops.recurd.lstm.default: onnx_lstm,
        torch.ops.recurd.gru.default: onnx_gru,
        torch.ops.recurd.rnn.default: onnx_rnn,
        torch.ops.recurd.last_step.default: onnx_last_step,
    }


def _direction(r: Any) -> str:
    return "bidirectional" if r.shape[0] == 2 else "forward"
