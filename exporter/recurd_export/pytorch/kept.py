"""Models that keep their recurrent state in attributes from call to call.

Such an attribute is a state argument in another place: it is found by what a second call of the same copy hands to its
layers, and reset before every run, so that every run is a fresh start. So is an attribute where the model remembers
the batch size of its last call, to begin anew when it is another one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from recurd_export.errors import ExportError
from recurd_export.pytorch import tree
from recurd_export.pytorch.watch import ForwardError, Run, copy_of, tensors, watch


@dataclass(frozen=True)
class Kept:
    """An attribute as a run left it: states, every tensor ``[..., batch, hidden]``, or the batch size."""

    path: str
    attribute: str
    value: Any
    #: Whether the model begins anew by itself when the batch size is another one.
    renewed: bool = False

    def reset(self, model: nn.Module, batch: Any) -> None:
        """Make the next run, of ``batch`` rows (symbolic too), a fresh start: the model's own, or zeros."""
        module = model.get_submodule(self.path)
        rows = batch + 1 if self.renewed else batch
        value = rows if isinstance(self.value, int) else tree.map_leaves(self.value, lambda t: _zeros(t, rows))
        if self.attribute in module._buffers:
            module._buffers[self.attribute] = value  # a buffer does not take what may be no tensor while tracing
        else:
            setattr(module, self.attribute, value)


def _zeros(state: Tensor, rows: Any) -> Tensor:
    return torch.zeros(*state.shape[:-2], rows, state.shape[-1], dtype=state.dtype)


def find_kept(model: nn.Module, args: tuple[Any, ...]) -> tuple[Kept, ...]:
    """Attributes that carry a layer's state from one call into the next.

    Raises :class:`ExportError` when a state is carried, and not by an attribute.
    """
    copied = copy_of(model)
    first = watch(copied, tree.map_leaves(args, Tensor.clone))
    before = _attributes(copied)
    held = [part for _, _, value in before for part in _parts(value)]
    second = watch(copied, tree.map_leaves(args, Tensor.clone))
    carried = _carried(first, second, held)
    if not carried:
        return ()
    found = tuple(
        Kept(path, name, value)
        for path, name, value in before
        if (parts := list(tensors(value))) and all(_is_carried(part, carried) for part in parts)
    )
    held = [part for kept in found for part in _parts(kept.value)]
    if not all(_among(state, held) for state in carried):
        raise ExportError("the model keeps its state from call to call elsewhere than in attributes of its modules")
    batch = second.calls[0].batch
    found += tuple(_remembered(model, args, copied, batch))
    renewed = _renews(model, args, found, batch)
    return tuple(replace(kept, renewed=renewed) for kept in found)


def _remembered(model: nn.Module, args: tuple[Any, ...], used: nn.Module, batch: int) -> Iterator[Kept]:
    """Whole numbers that are the batch size after a call, of ``batch`` rows (as ``used`` had) and of one row more."""
    x, *rest = args
    for axis in [axis for axis, size in enumerate(x.shape[:2]) if size == batch]:
        copied = copy_of(model)
        try:
            run = watch(copied, (torch.cat([x, x.narrow(axis, 0, 1)], axis), *tree.map_leaves(rest, Tensor.clone)))
        except ForwardError:
            continue
        if run.calls and run.calls[0].batch == batch + 1:
            later = _numbers(copied)
            for place, number in _numbers(used).items():
                if number == batch and later.get(place) == batch + 1:
                    yield Kept(*place, number)
            return


def _numbers(model: nn.Module) -> dict[tuple[str, str], int]:
    """All attributes that are whole numbers, by the path of their module and their name."""
    own = ((path, name, value) for path, module in model.named_modules() for name, value in vars(module).items())
    return {(path, name): value for path, name, value in own if type(value) is int}


def _renews(model: nn.Module, args: tuple[Any, ...], found: tuple[Kept, ...], batch: int) -> bool:
    """Whether the model takes a state of a wrong batch size as a reason to begin anew."""
    copied = copy_of(model)
    for kept in found:
        replace(kept, renewed=True).reset(copied, batch)
    try:
        watch(copied, tree.map_leaves(args, Tensor.clone))
    except ForwardError:
        return False
    return True


def _attributes(model: nn.Module) -> list[tuple[str, str, Any]]:
    found = []
    for path, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}
        for name, value in (own | module._buffers).items():
            found.append((path, name, tree.map_leaves(value, lambda t: t.detach().clone())))
    return found


def _carried(first: Run, second: Run, held: list[Tensor]) -> list[Tensor]:
    """States the second call started from that are those the first call left.

    What a loop makes of a cell's state before it keeps it does not show in the first call; it is ``held`` somewhere,
    and not what the first call started from.
    """
    before = {call.key: call for call in first.calls}
    found = []
    for call in second.calls:
        earlier = before.get(call.key)
        for number, given in enumerate(call.given or ()):
            left = earlier.left[number] if earlier is not None else given.new_empty(0)
            started = earlier.given[number] if earlier is not None and earlier.given else torch.zeros_like(given)
            is_held = bool(call.taken) and _among(given, held)
            if not _among(given, [started]) and (is_held or _among(given, [left])):
                found.append(given)
    return found


def _parts(value: Any) -> Iterator[Tensor]:
    """All tensors in a nest, and the states of single cells that are stacked in one."""
    for tensor in tensors(value):
        yield tensor
        if tensor.dim() == 3:
            yield from tensor.unbind(0)


def _is_carried(part: Tensor, carried: list[Tensor]) -> bool:
    return _among(part, carried) or (part.dim() == 3 and all(_among(one, carried) for one in part.unbind(0)))


def _among(tensor: Tensor, others: list[Tensor]) -> bool:
    return any(tensor.shape == other.shape and torch.equal(tensor, other) for other in others)
