"""Convolutions over time that look at no step to come: found by what they are given, carried on by their last inputs.

A model that pads a stream on the left by ``(kernel - 1) * dilation`` constant steps, or on both sides and cuts off the
end, gives every step from itself and the steps before it. In a chunk that is not the first, the steps before are not
the padding but the chunk before: they are a state.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from recurd_export.errors import ExportError
from recurd_export.pytorch.arguments import BATCH, OTHER_BATCH, OTHER_STEPS, STEPS
from recurd_export.pytorch.convolved import KINDS, Convolve, Convolved, Key
from recurd_export.pytorch.state import StateLayout
from recurd_export.pytorch.watch import Run, label

if TYPE_CHECKING:
    from recurd_export.pytorch.hoist import Hoisted

_FUNCTIONS: dict[int, Any] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


@dataclass(frozen=True)
class Convolution:
    """One call of a convolution over time whose last inputs are a state."""

    path: str
    ordinal: int
    #: What its state is named after: the path, or the class for a model that is itself the convolution.
    name: str
    kind: str
    kernel: int
    dilation: int
    #: Which axis of its input and of its result ``[batch, channels, ...]`` is time.
    time_axis: int
    #: Steps the model has put before a chunk's own in the input.
    lead: int
    #: Steps of the result before and behind the chunk's own, which the model takes off again.
    before: int
    behind: int
    #: The inputs before the first step of a stream, without the batch axis.
    initial: npt.NDArray[np.float32]

    @property
    def key(self) -> Key:
        """What is the same in every forward."""
        return self.path, self.ordinal

    @property
    def span(self) -> int:
        """How many inputs before a step its result depends on."""
        return (self.kernel - 1) * self.dilation

    @property
    def state(self) -> StateLayout:
        """Its last inputs ``[batch, channels, ..., span, ...]``."""
        return StateLayout(f"{self.name}.x", self.initial, batch_axis=0)

    def own(self, x: Tensor) -> Tensor:
        """A chunk's own steps, out of what the convolution is given."""
        return x.narrow(self.time_axis, self.lead, x.shape[self.time_axis] - self.lead)

    def join(self, steps: Tensor, state: Tensor) -> Tensor:
        """The state and the steps that follow it."""
        return torch.cat([state, steps], self.time_axis)

    def convolve(self, module: Any, joined: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the module gives for a chunk's own steps after a state (see :meth:`join`)."""
        sides = _sides(module)
        sides[self.time_axis - 2] = (0, 0)
        if any(side != (0, 0) for side in sides):
            joined = F.pad(joined, _flat(sides), "constant" if module.padding_mode == "zeros" else module.padding_mode)
        y: Tensor = _FUNCTIONS[joined.dim()](joined, weight, bias, module.stride, 0, module.dilation, module.groups)
        return y

    def surround(self, y: Tensor) -> Tensor:
        """The result with as many steps more as the model will take off again."""
        if not (self.before or self.behind):
            return y
        ends = [(0, 0)] * (y.dim() - 2)
        ends[self.time_axis - 2] = (self.before, self.behind)
        return F.pad(y, _flat(ends))

    def left(self, x: Tensor, state: Tensor | None) -> Tensor:
        """The state after a call on whole rows that began with ``state`` (``None``: with a fresh start)."""
        before = self.state.fresh(len(x)).to(x.dtype) if state is None else state
        joined = self.join(self.own(x), before)
        return joined.narrow(self.time_axis, joined.shape[self.time_axis] - self.span, self.span)


def find(runs: Sequence[Run]) -> tuple[Convolution, ...]:
    """The convolutions to be carried on. ``runs`` are those of :func:`recurd_export.pytorch.layout.find`.

    Those that look ahead, and those along other axes than time, are left alone.
    """
    found = (_examine(*calls) for calls in _same_calls(runs))
    return tuple(convolution for convolution in found if convolution is not None)


def _same_calls(runs: Sequence[Run]) -> Iterator[list[Convolved]]:
    """Each call with what it is in the other runs, where it is in all of them."""
    first, *others = ({call.key: call for call in run.convolutions} for run in runs)
    for key, call in first.items():
        if all(key in other for other in others):
            yield [call, *(other[key] for other in others)]


def _examine(call: Convolved, other_batch: Convolved, other_steps: Convolved) -> Convolution | None:
    """What one call is to be carried on with, if it is over time and looks at no step to come."""
    module = call.module
    axis = _time_axis(call.input.shape, other_batch.input.shape, other_steps.input.shape)
    if axis is None or module.stride[axis - 2] != 1:
        return None
    kernel, dilation = module.kernel_size[axis - 2], module.dilation[axis - 2]
    left, right = _sides(module)[axis - 2]
    span, lead = (kernel - 1) * dilation, call.input.shape[axis] - STEPS
    if lead < 0 or not 0 < span <= lead + left or (module.padding_mode != "zeros" and left + right > 0):
        return None
    constants = torch.cat([each.input.narrow(axis, 0, lead) for each in (call, other_batch, other_steps)])
    if not torch.allclose(constants, constants[:1].expand_as(constants), 1e-5, 1e-6):
        return None
    padded = torch.cat([constants[:1].new_zeros(_with_size(constants[:1], axis, left)), constants[:1]], axis)
    name = call.path or type(module).__name__.lower()
    return Convolution(
        path=call.path,
        ordinal=call.ordinal,
        name=f"{name}@{call.ordinal + 1}" if call.ordinal else name,
        kind=type(module).__name__,
        kernel=kernel,
        dilation=dilation,
        time_axis=axis,
        lead=lead,
        before=left + lead - span,
        behind=right,
        initial=padded.narrow(axis, left + lead - span, span)[0].to(torch.float32).numpy().copy(),
    )


def _time_axis(shape: torch.Size, other_batch: torch.Size, other_steps: torch.Size) -> int | None:
    """The axis after batch and channels that grows with the number of steps, if the first one is the batch."""
    if not len(shape) == len(other_batch) == len(other_steps) or (shape[0], other_batch[0]) != (BATCH, OTHER_BATCH):
        return None
    growing = [axis for axis in range(1, len(shape)) if other_steps[axis] != shape[axis]]
    if len(growing) != 1 or shape[0] != other_steps[0] or shape[1:] != other_batch[1:]:
        return None
    axis = growing[0]
    return axis if axis > 1 and other_steps[axis] - shape[axis] == OTHER_STEPS - STEPS else None


def _sides(module: Any) -> list[tuple[int, int]]:
    """What the module pads itself, at the front and at the end of every axis after batch and channels."""
    flat = module._reversed_padding_repeated_twice  # in torch's own order: the last axis first
    return list(zip(flat[::2], flat[1::2], strict=True))[::-1]


def _flat(sides: Sequence[tuple[int, int]]) -> list[int]:
    """The reverse: as :func:`torch.nn.functional.pad` takes it."""
    return [size for side in reversed(sides) for size in side]


def _with_size(x: Tensor, axis: int, size: int) -> tuple[int, ...]:
    return (*x.shape[:axis], size, *x.shape[axis + 1 :])


def looking_ahead(runs: Sequence[Run]) -> str | None:
    """In words: the first convolution over time, none being one that can be carried on; or ``None``."""
    for call, *others in _same_calls(runs):
        axis = _time_axis(call.input.shape, *(other.input.shape for other in others))
        if axis is not None and call.module.kernel_size[axis - 2] > 1:
            kind = next(kind for kind in KINDS if isinstance(call.module, kind)).__name__
            return (
                f"{label(call.path, call.module)} is a convolution over time, so results would depend on how a stream "
                f"is cut into chunks; an nn.{kind} can be exported when it is padded on the left only, with "
                f"(kernel - 1) * dilation constant steps"
            )
    return None


def check_sizes(calls: Sequence[Convolved]) -> None:
    """One of the convolutions must see the batch of the probes, and their steps, as it would be over time.

    Raises :class:`ExportError`.
    """
    shapes = [call.input.shape for call in calls]
    if not any(shape[0] == BATCH and any(size >= STEPS for size in shape[2:]) for shape in shapes):
        raise ExportError(
            f"{label(calls[0].path, calls[0].module)} is given {list(shapes[0])} where the model was given a batch of "
            f"{BATCH} and {STEPS} steps; each of its rows must be one stream, [batch, channels, time]"
        )


def carrying(convolutions: Sequence[Convolution], states: Mapping[str, Tensor] | None) -> Convolve:
    """Makes the source model's own convolutions start from states by name; with ``None`` from their own padding."""
    by_key = {convolution.key: convolution for convolution in convolutions}

    def convolve(key: Key, module: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        convolution = by_key.get(key)
        if states is None or convolution is None:
            return None
        joined = convolution.join(convolution.own(input), states[convolution.state.name])
        return convolution.surround(convolution.convolve(module, joined, weight, bias))

    return convolve


def left(convolutions: Sequence[Convolution], run: Run, states: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """States by name after a run of the source model that began with ``states`` (``None``: with a fresh start)."""
    calls = {call.key: call for call in run.convolutions}
    found = {}
    for convolution in convolutions:
        x, name = calls[convolution.key].input, convolution.state.name
        found[name] = convolution.left(x, None if states is None else states[name])
    return found


def replace_forwards(hoisted: "Hoisted", convolutions: Sequence[Convolution]) -> None:
    """Make the convolutions of a hoisted copy take their states from outside and leave the next ones there."""
    by_path: dict[str, dict[int, Convolution]] = defaultdict(dict)
    for convolution in convolutions:
        by_path[convolution.path][convolution.ordinal] = convolution
    for path, by_ordinal in by_path.items():
        _replace_forward(hoisted, path, by_ordinal)


def _replace_forward(hoisted: "Hoisted", path: str, by_ordinal: dict[int, Convolution]) -> None:
    module: Any = hoisted.model.get_submodule(path)
    own = module._conv_forward

    def conv_forward(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        carried = hoisted.carried
        convolution = by_ordinal.get(carried.calls[path])
        carried.calls[path] += 1
        if convolution is None:
            result: Tensor = own(input, weight, bias)
            return result
        name, axis = convolution.state.name, convolution.time_axis
        joined = convolution.join(hoisted.unfold(convolution.own(input), axis), carried.states[name])
        carried.next[name] = hoisted.last_steps(joined, convolution.span, axis)
        return convolution.surround(hoisted.fold(convolution.convolve(self, joined, weight, bias), axis))

    module._conv_forward = MethodType(conv_forward, module)
