"""Finds out how a module whose forward is one step, ``(x, state...) -> (y, state...)``, uses its axes and states.

As with whole models (:mod:`recurd_export.pytorch.layout`): by running copies of it with several batch sizes.
"""

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from recurd_export.errors import ExportError
from recurd_export.pytorch import tree
from recurd_export.pytorch.arguments import BATCH, OTHER_BATCH, Arguments, read_example
from recurd_export.pytorch.conduct import is_choosy
from recurd_export.pytorch.layout import Layout, check_parameters, find_classes
from recurd_export.pytorch.outputs import HeadLayout, head_names, of_one_type
from recurd_export.pytorch.state import StateLayout, names
from recurd_export.pytorch.watch import ForwardError, Run, copy_of, tensors, watch

#: Ways of choosing the batch axes of all states that are tried at most.
_TRIES = 64


@dataclass(frozen=True)
class StepLayout:
    """All that was found out. What :class:`~recurd_export.pytorch.layout.Layout` says of a whole model."""

    #: The example's states are the initial ones; its input has one step.
    arguments: Arguments
    states: tuple[StateLayout, ...]
    heads: tuple[HeadLayout, ...]
    #: Positions, among the returned tensors, of the states' next values.
    returned: tuple[int, ...]
    causal: bool = True

    def given(self, x: Tensor, states: Sequence[Tensor]) -> tuple[Any, ...]:
        """The module's arguments for one step ``[batch, ...]``; a forward may write into its copies."""
        left = iter(states)
        return (x.clone(), *tree.map_leaves(self.arguments.rest, lambda _: next(left).clone()))

    def fresh(self, batch: int) -> list[Tensor]:
        """The states of ``batch`` rows at a fresh start."""
        return [state.fresh(batch) for state in self.states]


AnyLayout = Layout | StepLayout
#: The one or the other, where what goes in comes out.
Found = TypeVar("Found", Layout, StepLayout)


def find(model: nn.Module, example: Any) -> StepLayout:
    """Examine a module. Raises :class:`ExportError` with one sentence for all it cannot be exported with."""
    check_parameters(model)
    x, rest = read_example(example, of_step=True)
    given = list(tensors(rest))
    _check_states(x, given)
    first = _run(model, (x, *rest), "on the example")
    drawn = is_choosy(model, x, rest)
    arguments = Arguments(x.unsqueeze(1), rest, drawn=drawn, classes=find_classes(x, first))
    found = _orient(model, StepLayout(arguments, (), (), ()), _names(model, rest))
    _check_alike(found, given)
    _check_repeatable(model, found)
    return found


def _check_states(x: Tensor, states: Sequence[Tensor]) -> None:
    if not states:
        raise ExportError(
            "the example of a step must be a tuple of one step [batch, ...] and the initial values of every state"
        )
    for number, state in enumerate(states, start=1):
        if state.dtype not in (torch.float32, torch.int64):
            kind = str(state.dtype).removeprefix("torch.")
            raise ExportError(f"state {number} of the example is {kind}; a state is float32 or int64")
        if x.shape[0] not in state.shape:
            raise ExportError(
                f"state {number} of the example is {list(state.shape)}, without a batch axis of {x.shape[0]}; every "
                f"stream has states of its own, so give it one row a stream"
            )


def _orient(model: nn.Module, found: StepLayout, state_names: Sequence[str]) -> StepLayout:
    """Which axis of every state is batch: the one with which the module takes other batch sizes and gives them back."""
    states = list(tensors(found.arguments.rest))
    batch = found.arguments.example.shape[0]
    axes = [[axis for axis, size in enumerate(state.shape) if size == batch] for state in states]
    trouble: ExportError | None = None
    for chosen in itertools.islice(itertools.product(*axes), _TRIES):
        rows = [state.select(axis, 0).numpy() for state, axis in zip(states, chosen, strict=True)]
        layouts = tuple(map(StateLayout, state_names, rows, chosen))
        try:
            return _with_outputs(model, replace(found, states=layouts))
        except ExportError as error:
            trouble = trouble or error
    assert trouble is not None
    raise trouble


def _with_outputs(model: nn.Module, found: StepLayout) -> StepLayout:
    """The layout with what the module returns, for the batch axes it assumes."""
    runs = []
    for batch in (BATCH, OTHER_BATCH):
        args = found.given(found.arguments.random(batch, 1, batch)[:, 0], found.fresh(batch))
        runs.append(tree.leaves(_run(model, args, f"with a batch of {batch}").output))
    paths = [path for path, _ in runs[0]]
    if [path for path, _ in runs[1]] != paths:
        raise ExportError("what the module returns depends on the batch size")
    returned = _returned(found, paths)
    for state, place in zip(found.states, returned, strict=True):
        for batch, leaves in zip((BATCH, OTHER_BATCH), runs, strict=True):
            _check_next(state, leaves[place][1], place, batch)
    places = [place for place in range(len(paths)) if place not in returned] or [returned[0]]
    taken = {"input", "lengths", *names(found.states)}
    heads = [
        _head(name, place, *(leaves[place][1] for leaves in runs))
        for name, place in zip(head_names(_without_lead([paths[p] for p in places]), taken), places, strict=True)
    ]
    return replace(found, returned=returned, heads=of_one_type(heads, [tensor.dtype for _, tensor in runs[0]]))


def _without_lead(paths: list[tree.Path]) -> list[tree.Path]:
    """Paths without their number in ``(outputs, states)``, where keys follow."""
    return [
        path[1:] if len(path) > 1 and isinstance(path[0], int) and isinstance(path[1], str) else path for path in paths
    ]


def _returned(found: StepLayout, paths: Sequence[tree.Path]) -> tuple[int, ...]:
    """Positions of the states among the returned tensors: the last ones, in the order in which they are taken."""
    count = len(found.states)
    if len(paths) < count:
        raise ExportError(
            f"the module takes {count} state{'s' if count > 1 else ''} and returns {len(paths)} "
            f"tensor{'s' if len(paths) != 1 else ''}; it must return its outputs and then every state it takes"
        )
    places = range(len(paths) - count, len(paths))
    # Dictionaries are matched by their keys, whatever order these are in.
    given = [path for path, _ in tree.leaves(found.arguments.rest)]
    ends = {paths[place][-1]: place for place in places if paths[place] and isinstance(paths[place][-1], str)}
    keys = [path[-1] for path in given]
    if len(ends) == len(set(keys)) == count and ends.keys() == set(keys):
        return tuple(ends[key] for key in keys if isinstance(key, str))
    return tuple(places)


def _check_next(state: StateLayout, tensor: Tensor, place: int, batch: int) -> None:
    wanted = state.fresh(batch)
    if tensor.shape == wanted.shape and tensor.dtype == wanted.dtype:
        return
    kinds = [str(each.dtype).removeprefix("torch.") for each in (tensor, wanted)]
    raise ExportError(
        f"returned tensor {place + 1} ({kinds[0]} {list(tensor.shape)}) stands where the next value of state "
        f"'{state.name}' ({kinds[1]} {list(wanted.shape)}) must; return the outputs and then every state that is "
        f"taken, in the same order, type and shape"
    )


def _head(name: str, place: int, one: Tensor, other: Tensor) -> HeadLayout:
    """A head, by which axis of it changes with the batch."""
    pairs = list(zip(one.shape, other.shape, strict=False))
    grown = [axis for axis, sizes in enumerate(pairs) if sizes == (BATCH, OTHER_BATCH)]
    if one.dim() != other.dim() or len(grown) != 1 or sum(a != b for a, b in pairs) != 1:
        raise ExportError(
            f"head '{name}' has the shape {list(one.shape)} for a batch of {BATCH}; a head needs one batch axis"
        )
    return HeadLayout(name, place, "step", grown[0])


def _names(model: nn.Module, rest: tuple[Any, ...]) -> list[str]:
    """Names of the states: the forward's own names of its parameters, and keys or numbers inside of nests."""
    if isinstance(model, nn.RNNCellBase):
        return ["h", "c"][: len(list(tensors(rest)))]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds][1:]
    found: list[str] = []
    for path, _ in tree.leaves(rest):
        number = int(path[0])
        head = parameters[number] if number < len(parameters) else f"state_{number}"
        name = ".".join(map(str, (head, *path[1:])))
        while name in {"input", "lengths", *found}:
            name += "_state"
        found.append(name)
    return found


def _check_alike(found: StepLayout, given: Sequence[Tensor]) -> None:
    batch = found.arguments.example.shape[0]
    for state, tensor in zip(found.states, given, strict=True):
        if not torch.equal(state.fresh(batch), tensor):
            raise ExportError(
                f"the rows of state '{state.name}' in the example are not all the same; they are the values every "
                f"stream starts from, so they must not depend on the row"
            )


def _check_repeatable(model: nn.Module, found: StepLayout) -> None:
    args = found.given(found.arguments.random(BATCH, 1, 0)[:, 0], found.fresh(BATCH))
    copied = copy_of(model)
    first, second = (watch(copied, tree.map_leaves(args, Tensor.clone)) for _ in range(2))
    if _same(first, second):
        return
    if _same(first, watch(copy_of(model), args)):
        raise ExportError(
            "the module keeps more from call to call than the states it is given: a second call with the same step "
            "and states gives something else"
        )
    raise ExportError("the module gives something else every time, in eval mode too: it draws random numbers")


def _same(one: Run, other: Run) -> bool:
    pairs = zip(tree.leaves(one.output), tree.leaves(other.output), strict=True)
    return all(a.shape == b.shape and torch.allclose(a, b, 1e-4, 1e-5, equal_nan=True) for (_, a), (_, b) in pairs)


def _run(model: nn.Module, args: tuple[Any, ...], when: str) -> Run:
    try:
        return watch(copy_of(model), tree.map_leaves(args, Tensor.clone))
    except ForwardError as error:
        raise ExportError(f"the module's forward of one step fails {when} in {error}") from error.error
