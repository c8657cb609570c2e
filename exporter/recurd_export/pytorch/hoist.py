"""Makes every hidden state an explicit input and output.

In a copy of the model each recurrent module's ``forward`` is replaced by one that calls the operators of
:mod:`recurd_export.pytorch.ops`, one a layer, takes its state from outside whatever initial state it is handed, and
leaves its next state there. Nothing else of the module changes, so code that asks for its sizes or weights still works.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from recurd_export.pytorch import convolutions, ops, tree
from recurd_export.pytorch.arguments import BATCH, STEPS
from recurd_export.pytorch.layout import Layout
from recurd_export.pytorch.recurrence import Recurrence, mode
from recurd_export.pytorch.watch import copy_of

#: torch's order of gates in ONNX's order.
_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN_TANH": (0,), "RNN_RELU": (0,)}


class Carried:
    """States on their way through one forward. Owned by :class:`Hoisted`; the replaced forwards read and fill it."""

    def __init__(self, lengths: Tensor, states: Mapping[str, Tensor], sizes: tuple[Any, Any] = (0, 0)) -> None:
        self.lengths = lengths
        #: Batch and steps.
        self.sizes = sizes
        self.states = states
        self.next: dict[str, Tensor] = {}
        self.calls: dict[str, int] = defaultdict(int)


class Hoisted(nn.Module):
    """``(input [batch, time, ...], lengths, *states) -> (*heads, *next states)`` around a copy of the model."""

    #: Whether it is one step instead: ``(input [batch, ...], *states) -> (*heads, *next states)``.
    one_step = False
    #: What the caller should know of it.
    note = ""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.model = copy_of(model)
        self.layout = layout
        self._carried = Carried(torch.zeros(0), {})
        by_path = defaultdict(list)
        for recurrence in layout.recurrences:
            by_path[recurrence.path].append(recurrence)
        for path, recurrences in by_path.items():
            self.replace_forward(path, recurrences)
        convolutions.replace_forwards(self, layout.convolutions)

    @property
    def carried(self) -> Carried:
        """The states of the forward that is running."""
        return self._carried

    def forward(self, input: Tensor, lengths: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        batch, steps = input.shape[:2]
        torch._check(lengths.shape[0] == batch)  # type: ignore[no-untyped-call]
        by_name = self.by_name(batch, states)
        self._carried = Carried(lengths, by_name, (batch, steps))
        heads = self.heads(input)
        return (*heads, *(self._carried.next[name] for name in by_name))

    def by_name(self, batch: Any, states: Sequence[Tensor]) -> dict[str, Tensor]:
        """The states under their names, each having so many rows."""
        for layout, state in zip(self.layout.states, states, strict=True):
            torch._check(state.shape[layout.batch_axis] == batch)  # type: ignore[no-untyped-call]
        return {layout.name: state for layout, state in zip(self.layout.states, states, strict=True)}

    def example(self, batch: Any, time: Any) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Arguments to trace it with, and which of their axes are ``batch`` and ``time``."""
        x = self.layout.arguments.random(BATCH, STEPS, 0)
        lengths = torch.full((BATCH,), STEPS, dtype=torch.int32)
        states = [state.fresh(BATCH) for state in self.layout.states]
        rows = tuple({state.batch_axis: batch} for state in self.layout.states)
        return (x, lengths, *states), {"input": {0: batch, 1: time}, "lengths": {0: batch}, "states": rows}

    def heads(self, input: Tensor) -> list[Tensor]:
        """Run the model; its heads as the contract has them."""
        batch, steps = self._carried.sizes
        return [
            head.arrange(tensor, batch, steps)
            for head, tensor in zip(self.layout.heads, self.results(input), strict=True)
        ]

    def results(self, input: Tensor) -> list[Tensor]:
        """Run the model on ``[batch, time, ...]``; its heads as it gives them."""
        arguments = self.layout.arguments
        arguments.prepare(self.model, input.shape[0])
        output = self.model(*arguments.with_input(input.clone()))  # a forward may write to its input
        found = [tensor for _, tensor in tree.leaves(output)]
        return [found[head.position] for head in self.layout.heads]

    def unfold(self, x: Tensor, time_axis: int) -> Tensor:
        """All steps of all streams as ``[batch, ..., time, ...]``, as a layer that is not recurrent is given them."""
        return x

    def fold(self, x: Tensor, time_axis: int) -> Tensor:
        """The reverse of :meth:`unfold`."""
        return x

    def last_steps(self, x: Tensor, steps: int, time_axis: int) -> Tensor:
        """Every row's last steps of ``[batch, ...]``, which has ``steps`` more than the row itself."""
        last: Tensor = ops.last_steps(x, self.carried.lengths, steps, time_axis)
        return last

    def replace_forward(self, path: str, recurrences: list[Recurrence]) -> None:
        """Have a module of the copy take its states from :attr:`carried`; ``recurrences`` are its calls, in order."""
        hoisted, module = self, pack(self.model.get_submodule(path))

        def forward(self: Any, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
            carried = hoisted.carried
            recurrence = recurrences[carried.calls[path]]
            carried.calls[path] += 1
            x = input.transpose(0, 1) if self.batch_first else input
            lasts = []
            for layer in range(self.num_layers):
                x, states = run_layer(self, recurrence, layer, x, carried)
                lasts.append(states)
            stacked = tuple(torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*lasts, strict=True))
            return x.transpose(0, 1) if self.batch_first else x, stacked if len(stacked) == 2 else stacked[0]

        module.forward = MethodType(forward, module)


def pack(module: Any) -> Any:
    """The module, with its weights beside it as ONNX has them."""
    for layer in range(getattr(module, "num_layers", 1)):
        for name, value in zip("wrb", onnx_weights(module, layer), strict=True):
            module.register_buffer(f"onnx_{name}_l{layer}", value, persistent=True)
    return module


def run_layer(
    module: Any, recurrence: Recurrence, layer: int, x: Tensor, carried: Carried
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer over time-major x: its output ``[time, batch, directions * hidden]`` and its next states."""
    names = recurrence.state_names(layer)
    given = [carried.states[name].unsqueeze(0) if recurrence.cell else carried.states[name] for name in names]
    args = [x, carried.lengths, *given]
    args += [getattr(module, f"onnx_{name}_l{layer}") for name in "wrb"]
    # What a layer does otherwise than torch's own (activations, a GRU's reset).
    options = getattr(module, "onnx_options", ())
    if recurrence.mode == "LSTM":
        y, *states = ops.lstm(*args, *options)
    elif recurrence.mode == "GRU":
        y, *states = ops.gru(*args, *options)
    else:
        y, *states = ops.rnn(*args, *(options or ("Tanh" if recurrence.mode == "RNN_TANH" else "Relu",)))
    states = [state.squeeze(0) for state in states] if recurrence.cell else states
    carried.next |= dict(zip(names, states, strict=True))
    merged = y.squeeze(1) if recurrence.directions == 1 else y.transpose(1, 2).flatten(2)
    return merged, tuple(states)


def onnx_weights(module: Any, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """W, R and B of one layer, in ONNX's gate order, each with a leading axis of directions."""
    parts: list[list[Tensor]] = [[], [], []]
    for ending in _endings(module, layer):
        w = _reorder(module, getattr(module, f"weight_ih{ending}"))
        r = _reorder(module, getattr(module, f"weight_hh{ending}"))
        if module.bias:
            biases = [getattr(module, f"bias_{kind}{ending}") for kind in ("ih", "hh")]
            b = torch.cat([_reorder(module, bias) for bias in biases])
        else:
            b = w.new_zeros(2 * len(w))
        for part, value in zip(parts, (w, r, b), strict=True):
            part.append(value)
    w, r, b = (torch.stack(part).contiguous() for part in parts)
    return w, r, b


def _endings(module: Any, layer: int) -> list[str]:
    """What the names of a layer's weights end in, one a direction."""
    if isinstance(module, nn.RNNCellBase):
        return [""]
    return [f"_l{layer}", f"_l{layer}_reverse"] if module.bidirectional else [f"_l{layer}"]


def _reorder(module: Any, weight: Tensor) -> Tensor:
    order = _GATES[mode(module)]
    gates = weight.detach().cpu().chunk(len(order))
    return torch.cat([gates[gate] for gate in order])
