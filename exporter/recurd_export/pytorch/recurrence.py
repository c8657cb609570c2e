"""What a model's recurrent modules do in one forward: their states, and the values these start from."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from recurd_export.errors import ExportError
from recurd_export.pytorch.state import StateLayout
from recurd_export.pytorch.watch import Call

#: Told a call whose initial state is not always the same; says why that is.
Why = Callable[[Call], str]


@dataclass(frozen=True)
class Recurrence:
    """One call of a recurrent module (a stack of layers with a state each), or a cell in a loop over time."""

    path: str
    ordinal: int
    #: What its states are named after: the path, or the class for a model that is itself the layer.
    name: str
    #: ``LSTM``, ``GRU``, ``RNN_TANH`` or ``RNN_RELU``.
    mode: str
    layers: int
    directions: int
    hidden: int
    #: Initial values ``[layers, directions, hidden]`` of h (and c); of a cell ``[hidden]``.
    initial: tuple[npt.NDArray[np.float32], ...]
    cell: bool = False
    #: Of a cell: whether every step starts from the very state the step before has left.
    plain: bool = True

    @property
    def learned(self) -> bool:
        """Whether a stream starts from anything but zeros."""
        return any(value.any() for value in self.initial)

    def state_names(self, layer: int) -> tuple[str, ...]:
        """Names of one layer's states: h (and c)."""
        ending = "" if self.cell else f"_l{layer}"
        return tuple(f"{self.name}.{letter}{ending}" for letter in ("h", "c")[: len(self.initial)])

    @property
    def states(self) -> tuple[StateLayout, ...]:
        """Its states, layer by layer, each ``[directions, batch, hidden]``; of a cell ``[batch, hidden]``."""
        if self.cell:
            named = zip(self.state_names(0), self.initial, strict=True)
            return tuple(StateLayout(name, value, batch_axis=0) for name, value in named)
        return tuple(
            StateLayout(name, value[layer], batch_axis=1)
            for layer in range(self.layers)
            for name, value in zip(self.state_names(layer), self.initial, strict=True)
        )

    def split(self, parts: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """States by name out of torch's own ``[layers * directions, batch, hidden]``: h (and c)."""
        if self.cell:
            return dict(zip(self.state_names(0), parts, strict=True))
        return {
            name: part.reshape(self.layers, self.directions, *part.shape[1:])[layer]
            for layer in range(self.layers)
            for name, part in zip(self.state_names(layer), parts, strict=True)
        }

    def join(self, states: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The reverse of :meth:`split`."""
        by_layer = [[states[name] for name in self.state_names(layer)] for layer in range(self.layers)]
        if self.cell:
            return tuple(by_layer[0])
        return tuple(torch.cat(parts) for parts in zip(*by_layer, strict=True))


def mode(module: Any) -> str:
    """``LSTM``, ``GRU``, ``RNN_TANH`` or ``RNN_RELU``."""
    if isinstance(module, nn.RNNCell):
        return f"RNN_{module.nonlinearity.upper()}"
    if isinstance(module, nn.RNNCellBase):
        return "LSTM" if isinstance(module, nn.LSTMCell) else "GRU"
    return str(module.mode)


def is_plain(call: Call) -> bool:
    """Whether every step of a cell starts from the very state the step before has left."""
    return all(
        later.given is not None and all(map(torch.equal, later.given, earlier.left))
        for earlier, later in itertools.pairwise(call.taken)
    )


def recurrences(runs: Sequence[Sequence[Call]], why: Why) -> tuple[Recurrence, ...]:
    """Those that the same calls of several runs show.

    Raises :class:`ExportError` where an initial state is not the same in every run and row, for the reason ``why``.
    """
    found = []
    for calls in zip(*runs, strict=True):
        call, module = calls[0], calls[0].module
        name = call.path or type(module).__name__.lower()
        is_cell = isinstance(module, nn.RNNCellBase)
        found.append(
            Recurrence(
                call.path,
                call.ordinal,
                f"{name}@{call.ordinal + 1}" if call.ordinal else name,
                mode(module),
                1 if is_cell else module.num_layers,
                2 if not is_cell and module.bidirectional else 1,
                module.hidden_size,
                _initial(calls, why),
                is_cell,
                all(map(is_plain, calls)),
            )
        )
    return tuple(found)


def _initial(calls: Sequence[Call], why: Why) -> tuple[npt.NDArray[np.float32], ...]:
    """Initial values of h (and c), which must be the same in every run and row."""
    call, module = calls[0], calls[0].module
    shapes = [_shape(module, part) for part in call.left]
    if all(c.given is None for c in calls):
        return tuple(np.zeros(shape, np.float32) for shape in shapes)
    values = []
    for part, shape in enumerate(shapes):
        # Batch is the axis before the last, of cells as of layers.
        columns = torch.cat([c.given[part].detach() for c in calls if c.given is not None], dim=-2)
        value = columns[..., :1, :]
        if any(c.given is None for c in calls) or not torch.allclose(columns, value.expand_as(columns), 1e-5, 1e-6):
            raise ExportError(why(call))
        values.append(value.reshape(shape).to(torch.float32).numpy().copy())
    return tuple(values)


def _shape(module: Any, state: Tensor) -> tuple[int, ...]:
    if isinstance(module, nn.RNNCellBase):
        return (state.shape[-1],)
    return (module.num_layers, 2 if module.bidirectional else 1, state.shape[-1])
