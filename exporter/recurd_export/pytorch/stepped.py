"""A model run one step at a time: for what no fused layer does.

The model is run with a single step. What a loop makes of a cell's state before it hands it on (a norm, a projection)
shows only when it does so, so where that is no plain recurrence the model is run with two steps: the cell's state after
the first step is what its second call is given. What only the second step gives is of no use, and is left out of the
traced graph.
"""

import contextlib
from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurd_export.pytorch.arguments import BATCH, STEPS
from recurd_export.pytorch.hoist import Carried, Hoisted
from recurd_export.pytorch.layout import Layout
from recurd_export.pytorch.recurrence import Recurrence
from recurd_export.pytorch.starts import Made, Replaced


class Stepped(Hoisted):
    """``(input [batch, ...], *states) -> (*heads, *next states)`` around a copy of the model: one step of it."""

    one_step = True
    note = "the model runs step by step (Scan), which is slower than fused layers"

    def __init__(self, model: nn.Module, layout: Layout, *, seen: bool = False) -> None:
        """``seen``: the loop itself uses the state that it hands to a cell (``h = h + cell(x, h)``)."""
        super().__init__(model, layout)
        #: By the number of steps run: which call of torch makes what the loop starts from, and for which state.
        self._starts: dict[int, dict[int, str]] = {1: {}, 2: {}}
        self._given: dict[str, Tensor] = {}
        if seen:
            self._find_starts()

    def forward(self, input: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        plain = self.layout.plain
        has_last = any(head.per == "last" for head in self.layout.heads)
        heads = self._run(input, states, 1) if plain or has_last else []
        if not plain:
            both = self._run(input, states, 2)
            heads = [heads[i] if head.per == "last" else both[i] for i, head in enumerate(self.layout.heads)]
        return (*heads, *(self.carried.next[layout.name] for layout in self.layout.states))

    def example(self, batch: Any, time: Any) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """See :meth:`Hoisted.example`."""
        (x, _, *states), dynamic = super().example(batch, time)
        return (x[:, 0], *states), {"input": {0: batch}, "states": dynamic["states"]}

    def _run(self, input: Tensor, states: tuple[Tensor, ...], steps: int) -> list[Tensor]:
        """Heads of the first of so many steps that are all the same."""
        by_name = self.by_name(input.shape[0], states)
        self._carried = Carried(torch.zeros(0), by_name, (input.shape[0], steps))
        x = torch.stack([input] * steps, 1)
        starts = {number: by_name[name] for number, name in self._starts[steps].items()}
        with Replaced(starts) if starts else contextlib.nullcontext():
            heads = self.heads(x)
        return [
            tensor.select(1, 0) if head.per == "step" else tensor
            for head, tensor in zip(self.layout.heads, heads, strict=True)
        ]

    def _find_starts(self) -> None:
        x, *states = self.example(BATCH, STEPS)[0]
        for steps in (1, 2):
            by_name = self.by_name(BATCH, states)
            self._carried = Carried(torch.zeros(0), by_name, (BATCH, steps))
            whole = torch.stack([x] * steps, 1)
            with Made() as made:
                self.heads(whole)
            numbers = {name: made.number_of(tensor) for name, tensor in self._given.items()}
            self._starts[steps] = {number: name for name, number in numbers.items() if number is not None}

    def results(self, input: Tensor) -> list[Tensor]:
        """See :meth:`Hoisted.results`."""
        return [head.restore(result) for head, result in zip(self.layout.heads, super().results(input), strict=True)]

    def last_steps(self, x: Tensor, steps: int, time_axis: int) -> Tensor:
        """See :meth:`Hoisted.last_steps`: those after the first of the steps that are run."""
        return x.narrow(time_axis, 1, steps)

    def replace_forward(self, path: str, recurrences: list[Recurrence]) -> None:
        """See :meth:`Hoisted.replace_forward`."""
        module: Any = self.model.get_submodule(path)
        of_one = self._cell if recurrences[0].cell else self._layer
        module.forward = of_one(path, module, recurrences)

    def _cell(self, path: str, module: Any, recurrences: list[Recurrence]) -> Any:
        (recurrence,), hoisted, own = recurrences, self, module.forward
        names = recurrence.state_names(0)

        def forward(self: Any, input: Tensor, hx: Any = None) -> Any:
            carried = hoisted.carried
            number = carried.calls[path]
            carried.calls[path] += 1
            if number == 0:
                if hx is not None:
                    hoisted._given |= dict(zip(names, _parts(hx), strict=True))
                left = own(input, _pair([carried.states[name] for name in names]))
                carried.next |= dict(zip(names, _parts(left), strict=True)) if recurrence.plain else {}
                return left
            if number == 1 and not recurrence.plain:
                carried.next |= dict(zip(names, _parts(hx), strict=True))
            return own(input, hx)

        return MethodType(forward, module)

    def _layer(self, path: str, module: Any, recurrences: list[Recurrence]) -> Any:
        hoisted = self

        def forward(self: Any, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
            carried = hoisted.carried
            recurrence = recurrences[carried.calls[path]]
            carried.calls[path] += 1
            names = [recurrence.state_names(layer) for layer in range(self.num_layers)]
            states = [tuple(carried.states[name].squeeze(0) for name in of_layer) for of_layer in names]
            outputs = []
            for number, x in enumerate(input.unbind(1 if self.batch_first else 0)):
                y, states = _layers(self, x, states)
                outputs.append(y)
                if number == 0:
                    for of_layer, left in zip(names, states, strict=True):
                        carried.next |= dict(zip(of_layer, (state.unsqueeze(0) for state in left), strict=True))
            return _joined(self, outputs, states)

        return MethodType(forward, module)


def unroll(module: nn.RNNBase) -> None:
    """Have a layer of one direction run by plain operators over as many steps as it is traced with."""

    def forward(self: Any, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        steps = input.unbind(1 if self.batch_first else 0)
        if hx is None:
            sizes = (self.proj_size or self.hidden_size, self.hidden_size)[: 2 if self.mode == "LSTM" else 1]
            hx = tuple(steps[0].new_zeros(self.num_layers, steps[0].shape[0], size) for size in sizes)
        states = list(zip(*(part.unbind(0) for part in _parts(hx)), strict=True))
        outputs = []
        for x in steps:
            y, states = _layers(self, x, states)
            outputs.append(y)
        return _joined(self, outputs, states)

    module.forward = MethodType(forward, module)


def _layers(
    module: nn.RNNBase, x: Tensor, states: Sequence[tuple[Tensor, ...]]
) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """One step of all layers: the last one's output, and the states of each."""
    left = []
    for layer, given in enumerate(states):
        left.append(_step(module, layer, x, given))
        x = left[-1][0]
    return x, left


def _joined(module: nn.RNNBase, outputs: list[Tensor], states: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, Any]:
    """Outputs and states as the layer itself gives them."""
    stacked = [torch.stack(parts) for parts in zip(*states, strict=True)]
    return torch.stack(outputs, 1 if module.batch_first else 0), _pair(stacked)


def _step(module: nn.RNNBase, layer: int, x: Tensor, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One step of a layer, by torch's formulas."""
    weights = [getattr(module, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh")]
    biases = [getattr(module, f"{name}_l{layer}") if module.bias else None for name in ("bias_ih", "bias_hh")]
    of_x, of_h = (F.linear(value, w, b) for value, w, b in zip((x, given[0]), weights, biases, strict=True))
    if module.mode == "LSTM":
        i, f, g, o = (of_x + of_h).chunk(4, dim=1)
        c = torch.sigmoid(f) * given[1] + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (F.linear(h, getattr(module, f"weight_hr_l{layer}")) if module.proj_size else h), c
    if module.mode == "GRU":
        (xr, xz, xn), (hr, hz, hn) = of_x.chunk(3, dim=1), of_h.chunk(3, dim=1)
        z = torch.sigmoid(xz + hz)
        return ((1 - z) * torch.tanh(xn + torch.sigmoid(xr + hr) * hn) + z * given[0],)
    return (torch.tanh(of_x + of_h) if module.mode == "RNN_TANH" else torch.relu(of_x + of_h),)


def _pair(states: list[Tensor]) -> Any:
    return tuple(states) if len(states) == 2 else states[0]


def _parts(states: Any) -> tuple[Tensor, ...]:
    return tuple(states) if isinstance(states, tuple | list) else (states,)
