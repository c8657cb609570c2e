"""One opaque torch operator per ONNX recurrent layer, with ONNX's own meaning, and its translation to ONNX.

torch's exporter unrolls or freezes ``nn.LSTM`` and its kin along time; an operator it cannot look into stays one node.
Weights are in ONNX's gate order, ``lengths`` is ONNX's ``sequence_lens``. The eager implementations are written from
ONNX's formulas, not with torch's layers, so that running a traced graph in torch proves the packing of weights too.

Shapes: x ``[time, batch, in]``, lengths int32 ``[batch]``, h and c ``[directions, batch, hidden]``, w
``[directions, gates * hidden, in]``, r ``[directions, gates * hidden, hidden]``, b
``[directions, 2 * gates * hidden]``; returns y ``[time, directions, batch, hidden]`` (zero beyond a row's length) and
the states after each row's last step. ``activations`` are ONNX's names, their parameters behind colons
(``HardSigmoid:0.2:0.5 Tanh Tanh``), for one direction: the other has the same.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

#: A step of one direction: (x_t @ w.T + wb, h, c, r, rb) -> (h, c).
_Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
_Function = Callable[[Tensor], Tensor]

#: What torch's own layers do.
LSTM_ACTIVATIONS, GRU_ACTIVATIONS = "Sigmoid Tanh Tanh", "Sigmoid Tanh"


@torch.library.custom_op("recurd::lstm", mutates_args=())
def lstm(
    x: Tensor,
    lengths: Tensor,
    h: Tensor,
    c: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor,
    activations: str = LSTM_ACTIVATIONS,
) -> tuple[Tensor, Tensor, Tensor]:
    """ONNX LSTM; gates in order i, o, f, c; activations of the gates, the candidate and the output."""
    return _scan(partial(_lstm_step, _functions(activations)), x, lengths, h, c, w, r, b)


@torch.library.custom_op("recurd::gru", mutates_args=())
def gru(
    x: Tensor,
    lengths: Tensor,
    h: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor,
    activations: str = GRU_ACTIVATIONS,
    linear_before_reset: bool = True,
) -> tuple[Tensor, Tensor]:
    """ONNX GRU; gates in order z, r, h; activations of the gates and the candidate."""
    step = _gru_step if linear_before_reset else _gru_reset_first_step
    return _scan(partial(step, _functions(activations)), x, lengths, h, h, w, r, b)[:2]


@torch.library.custom_op("recurd::rnn", mutates_args=())
def rnn(
    x: Tensor, lengths: Tensor, h: Tensor, w: Tensor, r: Tensor, b: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """ONNX RNN."""
    return _scan(partial(_rnn_step, _functions(activation)), x, lengths, h, h, w, r, b)[:2]


@torch.library.custom_op("recurd::last_step", mutates_args=())
def last_step(x: Tensor, lengths: Tensor, batch_axis: int, time_axis: int) -> Tensor:
    """Every row's own last step: x without its time axis, taken at ``lengths - 1``."""
    rows = x.movedim((batch_axis, time_axis), (0, 1))
    last = rows[torch.arange(len(lengths)), lengths.long() - 1]
    return last.movedim(0, _batch_axis_after(batch_axis, time_axis)).contiguous()


def _batch_axis_after(batch_axis: int, time_axis: int) -> int:
    """Where the batch axis stands once the time axis is gone."""
    return batch_axis - (time_axis < batch_axis)


@torch.library.custom_op("recurd::last_steps", mutates_args=())
def last_steps(x: Tensor, lengths: Tensor, steps: int, time_axis: int) -> Tensor:
    """Every row's own last ``steps`` steps of x ``[batch, ...]``, which has ``steps`` more than ``lengths`` counts."""
    return torch.stack([row.narrow(time_axis - 1, int(n), steps) for row, n in zip(x, lengths, strict=True)])


@lstm.register_fake
def _(x: Tensor, lengths: Tensor, h: Tensor, c: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, ...]:
    return _fake_y(x, h), torch.empty_like(h), torch.empty_like(c)


@gru.register_fake
def _(x: Tensor, lengths: Tensor, h: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, ...]:
    return _fake_y(x, h), torch.empty_like(h)


@rnn.register_fake
def _(x: Tensor, lengths: Tensor, h: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, ...]:
    return _fake_y(x, h), torch.empty_like(h)


@last_step.register_fake
def _(x: Tensor, lengths: Tensor, batch_axis: int, time_axis: int) -> Tensor:
    return x.new_empty([size for axis, size in enumerate(x.shape) if axis != time_axis])


@last_steps.register_fake
def _(x: Tensor, lengths: Tensor, steps: int, time_axis: int) -> Tensor:
    return x.new_empty([steps if axis == time_axis else size for axis, size in enumerate(x.shape)])


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


def _functions(activations: str) -> list[_Function]:
    return [_function(*word.split(":")) for word in activations.split()]


def _function(name: str, *parameters: str) -> _Function:
    """An activation by ONNX's formula."""
    numbers = [float(parameter) for parameter in parameters]
    return lambda x: _ACTIVATIONS[name](x, *numbers)


_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "Relu": torch.relu,
    "HardSigmoid": lambda x, alpha, beta: torch.clamp(alpha * x + beta, 0, 1),
    "Affine": lambda x, alpha, beta: alpha * x + beta,
    "Elu": lambda x, alpha: torch.where(x >= 0, x, alpha * (torch.exp(x.clamp(max=0)) - 1)),
    "LeakyRelu": lambda x, alpha: torch.where(x >= 0, x, alpha * x),
    "Softplus": lambda x: x.clamp(min=0) + torch.log1p(torch.exp(-x.abs())),
    "Softsign": lambda x: x / (1 + x.abs()),
}


def _lstm_step(fs: list[_Function], x: Tensor, h: Tensor, c: Tensor, r: Tensor, rb: Tensor) -> tuple[Tensor, Tensor]:
    gate, candidate, output = fs
    i, o, f, g = (x + h @ r.T + rb).chunk(4, dim=1)
    c = gate(f) * c + gate(i) * candidate(g)
    return gate(o) * output(c), c


def _gru_step(fs: list[_Function], x: Tensor, h: Tensor, c: Tensor, r: Tensor, rb: Tensor) -> tuple[Tensor, Tensor]:
    gate, candidate = fs
    xz, xr, xh = x.chunk(3, dim=1)
    hz, hr, hh = (h @ r.T + rb).chunk(3, dim=1)
    z = gate(xz + hz)
    return (1 - z) * candidate(xh + gate(xr + hr) * hh) + z * h, c


def _gru_reset_first_step(
    fs: list[_Function], x: Tensor, h: Tensor, c: Tensor, r: Tensor, rb: Tensor
) -> tuple[Tensor, Tensor]:
    gate, candidate = fs
    xz, xr, xh = x.chunk(3, dim=1)
    rz, rr, rh = r.chunk(3)
    bz, br, bh = rb.chunk(3)
    z, reset = gate(xz + h @ rz.T + bz), gate(xr + h @ rr.T + br)
    return (1 - z) * candidate(xh + (reset * h) @ rh.T + bh) + z * h, c


def _rnn_step(fs: list[_Function], x: Tensor, h: Tensor, c: Tensor, r: Tensor, rb: Tensor) -> tuple[Tensor, Tensor]:
    return fs[0](x + h @ r.T + rb), c


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

    def onnx_lstm(
        x: Any, lengths: Any, h: Any, c: Any, w: Any, r: Any, b: Any, activations: str = LSTM_ACTIVATIONS
    ) -> Any:
        options = _options(r, activations, LSTM_ACTIVATIONS)
        return op.LSTM(x, w, r, b, lengths, h, c, **options)

    def onnx_gru(
        x: Any,
        lengths: Any,
        h: Any,
        w: Any,
        r: Any,
        b: Any,
        activations: str = GRU_ACTIVATIONS,
        linear_before_reset: bool = True,
    ) -> Any:
        options = _options(r, activations, GRU_ACTIVATIONS)
        return op.GRU(x, w, r, b, lengths, h, linear_before_reset=int(linear_before_reset), **options)

    def onnx_rnn(x: Any, lengths: Any, h: Any, w: Any, r: Any, b: Any, activation: str) -> Any:
        return op.RNN(x, w, r, b, lengths, h, **_options(r, activation, ""))

    def onnx_last_step(x: Any, lengths: Any, batch_axis: int, time_axis: int) -> Any:
        rest = [axis for axis in range(len(x.shape)) if axis not in (batch_axis, time_axis)]
        rows = op.Transpose(x, perm=[batch_axis, time_axis, *rest])
        one = op.Constant(value_ints=[1])
        indices = op.Unsqueeze(op.Sub(op.Cast(lengths, to=7), one), one)
        last = op.GatherND(rows, indices, batch_dims=1)
        order = list(range(1, len(rest) + 1))
        order.insert(_batch_axis_after(batch_axis, time_axis), 0)
        return last if order == sorted(order) else op.Transpose(last, perm=order)

    def onnx_last_steps(x: Any, lengths: Any, steps: int, time_axis: int) -> Any:
        sizes = [1 if axis == 0 else steps if axis == time_axis else int(x.shape[axis]) for axis in range(len(x.shape))]
        column = [-1 if axis == 0 else 1 for axis in range(len(sizes))]
        first = op.Reshape(op.Cast(lengths, to=7), op.Constant(value_ints=column))
        own = [size if axis == time_axis else 1 for axis, size in enumerate(sizes)]
        after = op.Reshape(op.Constant(value_ints=list(range(steps))), op.Constant(value_ints=own))
        indices = op.Expand(op.Add(first, after), op.Constant(value_ints=sizes))
        return op.GatherElements(x, indices, axis=time_axis)

    return {
        torch.ops.recurd.lstm.default: onnx_lstm,
        torch.ops.recurd.gru.default: onnx_gru,
        torch.ops.recurd.rnn.default: onnx_rnn,
        torch.ops.recurd.last_step.default: onnx_last_step,
        torch.ops.recurd.last_steps.default: onnx_last_steps,
    }


def _options(r: Any, activations: str, usual: str) -> dict[str, Any]:
    """The node's attributes; activations are named only where they are not the usual ones."""
    directions = r.shape[0]
    options = {"hidden_size": r.shape[2], "direction": "bidirectional" if directions == 2 else "forward"}
    if activations == usual:
        return options
    words: Sequence[list[str]] = [word.split(":") for word in activations.split()] * directions
    options["activations"] = [name for name, *_ in words]
    for key, place in (("activation_alpha", 1), ("activation_beta", 2)):
        # Only of the functions that take one, in their order.
        numbers = [float(word[place]) for word in words if len(word) > place]
        options |= {key: numbers} if numbers else {}
    return options
