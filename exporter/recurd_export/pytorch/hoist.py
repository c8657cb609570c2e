"""Makes every hidden state an explicit input and output.

In a copy of the model each recurrent module's ``forward`` is replaced by one that calls the operators of
:mod:`recurd_export.pytorch.ops`, one a layer, takes its state from outside whatever initial state it is handed, and
leaves its next state there. Nothing else of the module changes, so code that asks for its sizes or weights still works.
"""

from collections import defaultdict
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from recurd_export.pytorch import ops, tree
from recurd_export.pytorch.layout import Layout
from recurd_export.pytorch.recurrence import Recurrence
from recurd_export.pytorch.watch import copy_of

#: torch's order of gates in ONNX's order.
_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN_TANH": (0,), "RNN_RELU": (0,)}


class Carried:
    """States on their way through one forward. Owned by :class:`Hoisted`; the replaced forwards read and fill it."""

    def __init__(self, lengths: Tensor, states: Mapping[str, Tensor]) -> None:
        self.lengths = lengths
        self.states = states
        self.next: dict[str, Tensor] = {}
        self.calls: dict[str, int] = defaultdict(int)


class Hoisted(nn.Module):
    """``(input [batch, time, ...], lengths, *states) -> (*heads, *next states)`` around a copy of the model."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.model = copy_of(model)
        self.layout = layout
        self._carried = Carried(torch.zeros(0), {})
        by_path = defaultdict(list)
        for recurrence in layout.recurrences:
            by_path[recurrence.path].append(recurrence)
        for path, recurrences in by_path.items():
            _replace_forward(self, path, recurrences)

    @property
    def carried(self) -> Carried:
        """The states of the forward that is running."""
        return self._carried

    def forward(self, input: Tensor, lengths: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        layouts = self.layout.states
        batch, steps = input.shape[:2]
        torch._check(lengths.shape[0] == batch)  # type: ignore[no-untyped-call]
        for layout, state in zip(layouts, states, strict=True):
            torch._check(state.shape[layout.batch_axis] == batch)  # type: ignore[no-untyped-call]
        by_name = {layout.name: state for layout, state in zip(layouts, states, strict=True)}
        self._carried = Carried(lengths, by_name)
        arguments = self.layout.arguments
        arguments.prepare(self.model, batch)
        output = self.model(*arguments.with_input(input.clone()))  # a forward may write to its input
        found = [tensor for _, tensor in tree.leaves(output)]
        heads = [head.arrange(found[head.position], batch, steps) for head in self.layout.heads]
        return (*heads, *(self._carried.next[layout.name] for layout in layouts))


def _replace_forward(hoisted: Hoisted, path: str, recurrences: list[Recurrence]) -> None:
    module = hoisted.model.get_submodule(path)
    assert isinstance(module, nn.RNNBase)
    for layer in range(module.num_layers):
        for name, value in zip("wrb", onnx_weights(module, layer), strict=True):
            module.register_buffer(f"onnx_{name}_l{layer}", value, persistent=True)

    def forward(self: Any, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        carried = hoisted.carried
        recurrence = recurrences[carried.calls[path]]
        carried.calls[path] += 1
        x = input.transpose(0, 1) if self.batch_first else input
        lasts = []
        for layer in range(self.num_layers):
            x, states = _layer(self, recurrence, layer, x, carried)
            lasts.append(states)
        stacked = tuple(torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*lasts, strict=True))
        return x.transpose(0, 1) if self.batch_first else x, stacked if len(stacked) == 2 else stacked[0]

    module.forward = MethodType(forward, module)


def _layer(
    module: Any, recurrence: Recurrence, layer: int, x: Tensor, carried: Carried
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer over time-major x: its output ``[time, batch, directions * hidden]`` and its next states."""
    names = recurrence.state_names(layer)
    args = [x, carried.lengths, *(carried.states[name] for name in names)]
    args += [getattr(module, f"onnx_{name}_l{layer}") for name in "wrb"]
    # What a layer does otherwise than torch's own (activations, a GRU's reset).
    options = getattr(module, "onnx_options", ())
    if recurrence.mode == "LSTM":
        y, *states = ops.lstm(*args, *options)
    elif recurrence.mode == "GRU":
        y, *states = ops.gru(*args, *options)
    else:
        y, *states = ops.rnn(*args, *(options or ("Tanh" if recurrence.mode == "RNN_TANH" else "Relu",)))
    carried.next |= dict(zip(names, states, strict=True))
    merged = y.squeeze(1) if recurrence.directions == 1 else y.transpose(1, 2).flatten(2)
    return merged, tuple(states)


def onnx_weights(module: nn.RNNBase, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """W, R and B of one layer, in ONNX's gate order, each with a leading axis of directions."""
    parts: list[list[Tensor]] = [[], [], []]
    for suffix in ("", "_reverse") if module.bidirectional else ("",):
        w = _reorder(module, getattr(module, f"weight_ih_l{layer}{suffix}"))
        r = _reorder(module, getattr(module, f"weight_hh_l{layer}{suffix}"))
        if module.bias:
            biases = [getattr(module, f"bias_{kind}_l{layer}{suffix}") for kind in ("ih", "hh")]
            b = torch.cat([_reorder(module, bias) for bias in biases])
        else:
            b = w.new_zeros(2 * len(w))
        for part, value in zip(parts, (w, r, b), strict=True):
            part.append(value)
    w, r, b = (torch.stack(part).contiguous() for part in parts)
    return w, r, b


def _reorder(module: nn.RNNBase, weight: Tensor) -> Tensor:
    order = _GATES[module.mode]
    gates = weight.detach().cpu().chunk(len(order))
    return torch.cat([gates[gate] for gate in order])
