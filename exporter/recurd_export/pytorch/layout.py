"""Finds out how a model uses its axes and states, by running copies of it with several sizes.

What torch code does is easier and safer to see in what it gives than in how it is written: an axis that grows with the
number of steps is time, a returned tensor that equals a layer's state is a state, an initial state that never changes
is a constant.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from recurd_export.errors import ExportError
from recurd_export.pytorch import tree
from recurd_export.pytorch.arguments import BATCH, OTHER_BATCH, OTHER_STEPS, STEPS, Arguments, read_example
from recurd_export.pytorch.conduct import check_repeatable, is_choosy
from recurd_export.pytorch.convolutions import Convolution, check_sizes, looking_ahead
from recurd_export.pytorch.convolutions import find as find_convolutions
from recurd_export.pytorch.convolved import KINDS
from recurd_export.pytorch.fresh import run_with
from recurd_export.pytorch.kept import find_kept
from recurd_export.pytorch.loops import calls_trouble, check_loops
from recurd_export.pytorch.outputs import HeadLayout, find_outputs
from recurd_export.pytorch.recurrence import Recurrence
from recurd_export.pytorch.recurrence import recurrences as find_recurrences
from recurd_export.pytorch.state import StateLayout, names
from recurd_export.pytorch.watch import (
    Call,
    ForwardError,
    Run,
    copy_of,
    first_line,
    label,
    shape_changer,
    tensors,
    watch,
)

NO_CLASSES = (
    "the input is int64, and nothing in the model says how many ids there are; let the ids go through an nn.Embedding "
    "as they come, or make an input of numbers float32"
)

_CLASSES: dict[str, type[nn.RNNBase]] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN_TANH": nn.RNN, "RNN_RELU": nn.RNN}


@dataclass(frozen=True)
class Layout:
    """All that was found out."""

    arguments: Arguments
    recurrences: tuple[Recurrence, ...]
    #: Convolutions over time that look at no step to come.
    convolutions: tuple[Convolution, ...]
    heads: tuple[HeadLayout, ...]
    #: Positions, among the returned tensors, of states.
    returned_states: tuple[int, ...]

    @property
    def states(self) -> tuple[StateLayout, ...]:
        """All states, in the contract's order."""
        carried = (convolution.state for convolution in self.convolutions)
        return (*(state for recurrence in self.recurrences for state in recurrence.states), *carried)

    @property
    def plain(self) -> bool:
        """Whether every cell in a loop is handed its state as it left it."""
        return all(recurrence.plain for recurrence in self.recurrences)

    @property
    def causal(self) -> bool:
        """Whether no layer looks ahead."""
        return all(recurrence.directions == 1 for recurrence in self.recurrences)


def find(model: nn.Module, example: Any) -> Layout:
    """Examine a model. Raises :class:`ExportError` with one sentence for all it cannot be exported with."""
    check_modules(model)
    x, rest = read_example(example)
    first = _first_run(model, x, rest)
    _check_state_arguments(model, x, rest)
    drawn = is_choosy(model, x, rest)
    # Zeros leave some states as they are, which then does not show where they are kept.
    probe = (
        x if drawn or not x.is_floating_point() else torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    )
    kept = find_kept(model, (probe, *rest))
    arguments = Arguments(x, rest, kept=kept, drawn=drawn, classes=find_classes(x, first))
    batch = first.calls[0].batch if first.calls else first.convolutions[0].input.shape[0]
    arguments, run = _orient(model, arguments, batch)
    check_repeatable(model, arguments)
    runs = [
        run,
        run_with(model, arguments, arguments.random(OTHER_BATCH, STEPS, 1)),
        run_with(model, arguments, arguments.random(BATCH, OTHER_STEPS, 2)),
    ]
    _check_steady(runs)
    check_loops(run)
    recurrences = find_recurrences([run.calls for run in runs], lambda call: _unsteady(model, arguments, call))
    convolutions = find_convolutions(runs)
    taken = _taken(recurrences, convolutions)
    heads, states = find_outputs(model, arguments, runs, taken)
    if not (recurrences or convolutions):
        raise ExportError(looking_ahead(runs) or no_state(model))
    return Layout(arguments, recurrences, convolutions, heads, states)


def _taken(recurrences: Sequence[Recurrence], convolutions: Sequence[Convolution]) -> set[str]:
    """All tensor names the states take. Raises :class:`ExportError` where two states have one name."""
    calls: list[tuple[str, tuple[StateLayout, ...]]] = [(one.name, one.states) for one in recurrences]
    calls += [(one.name, (one.state,)) for one in convolutions]
    taken: set[str] = set()
    for name, states in calls:
        own = set(names(states))
        if own & taken:
            raise ExportError(
                f"two calls of layers are both named '{name}', as the second call of a layer 'x' is named 'x@2'; "
                f"give the layer with an @ in its name another one"
            )
        taken |= own
    return taken


def check_modules(model: nn.Module) -> None:
    """Refuse, with :class:`ExportError`, models without a recurrent layer or with one that cannot be exported."""
    layers = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.RNNBase)]
    if not layers and not any(isinstance(m, (nn.RNNCellBase, *KINDS)) for m in model.modules()):
        raise ExportError(no_state(model))
    for path, module in layers:
        if type(module).forward is not _CLASSES[module.mode].forward and not hasattr(module, "onnx_options"):
            raise ExportError(
                f"{label(path, module)} is a subclass of nn.{_CLASSES[module.mode].__name__} with a forward of its "
                f"own, which cannot be looked into; keep the layer as an attribute instead"
            )
    check_parameters(model)


def check_parameters(model: nn.Module) -> None:
    """Refuse, with :class:`ExportError`, weights of another type than float32."""
    for path, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise ExportError(f"parameter '{path}' is {kind}; a model is exported in float32, so call .float() on it")


def no_state(model: nn.Module) -> str:
    """In words: nothing in a model goes from step to step."""
    return (
        f"no recurrent layer (nn.LSTM, nn.GRU, nn.RNN), no cell and no convolution over time was found in "
        f"{type(model).__name__}; a module whose forward is one step, (x, state...) -> (y, state...), is exported "
        f"with step=True"
    )


def _first_run(model: nn.Module, x: Tensor, rest: tuple[Any, ...]) -> Run:
    try:
        run = watch(copy_of(model), (x.clone(), *rest))
    except ForwardError as error:
        raise ExportError(_example_trouble(x, error)) from error.error
    if not (run.calls or run.convolutions):
        raise ExportError(f"{type(model).__name__} has recurrent layers, but its forward calls none of them")
    return run


def _example_trouble(x: Tensor, error: ForwardError) -> str:
    what = f"the example is {str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
    if isinstance(error.module, nn.Embedding) and x.is_floating_point():
        return f"{what}, but {error.layer} takes token ids: give an int64 tensor [batch, time]"
    if isinstance(error.module, nn.RNNBase) and error.module.input_size != x.shape[-1]:
        return f"{what}, but {error.layer} takes {error.module.input_size} features a step: {first_line(error.error)}"
    return f"the model's forward fails on the example in {error}"


def _orient(model: nn.Module, arguments: Arguments, batch: int) -> tuple[Arguments, Run]:
    """Which axis of the input is time and which axis of every state argument is batch, and a run that shows it.

    ``batch`` is the example's, as its first recurrent layer saw it.
    """
    states = list(tensors(arguments.rest))
    axes = [_batch_axes(state, batch) for state in states]
    if not all(axes):
        raise ExportError(
            f"the example's arguments after the first must be states with a batch axis of {batch}, but one is "
            f"{next(list(s.shape) for s, a in zip(states, axes, strict=True) if not a)}"
        )
    trouble: ExportError | None = None
    for state_axes in itertools.islice(itertools.product(*axes), 16):
        for candidate in _time_axes(replace(arguments, state_axes=state_axes), batch):
            try:
                run = run_with(model, candidate, candidate.random(BATCH, STEPS, 0))
                _check_sizes(model, run)
                if not run.calls:  # a convolution takes any number of steps along the one axis that is time
                    run_with(model, candidate, candidate.random(BATCH, OTHER_STEPS, 0))
            except ExportError as error:
                trouble = trouble or error
            else:
                return candidate, run
    assert trouble is not None
    raise trouble


def _time_axes(arguments: Arguments, batch: int) -> Iterator[Arguments]:
    """The arguments with every axis of the input that may be time, the likeliest first."""
    shape = arguments.example.shape
    time_major_first = shape[0] != batch == shape[1]
    for time_major in (time_major_first, not time_major_first):
        yield replace(arguments, time_major=time_major)
    for axis in range(2, len(shape)):
        yield replace(arguments, time_axis=axis)


def _batch_axes(state: Tensor, batch: int) -> list[int]:
    """Axes of a state argument that may be the batch, the likeliest (the one before the last) first."""
    return sorted((axis for axis, size in enumerate(state.shape) if size == batch), key=lambda a: a != state.dim() - 2)


def find_classes(x: Tensor, run: Run) -> int | None:
    """How many ids there are, as far as a run shows it (``bounds`` reads it from the graph)."""
    if x.is_floating_point():
        return None
    if not run.lookups:
        raise ExportError(NO_CLASSES)
    return min((size for size, ids in run.lookups if bool(torch.isin(ids, x).all())), default=None)


def _check_sizes(model: nn.Module, run: Run) -> None:
    """Every recurrent layer must see the model's own batch and steps."""
    seen = {(call.batch, call.steps): call for call in run.calls}
    if not seen:
        check_sizes(run.convolutions)
    if not seen or seen.keys() == {(BATCH, STEPS)}:
        return
    if {(BATCH, STEPS), (STEPS, BATCH)} <= seen.keys():
        raise ExportError(
            f"the layers do not agree which axis is time: {seen[BATCH, STEPS].label} and "
            f"{seen[STEPS, BATCH].label} (is batch_first=True missing in one of them?)"
        )
    call = next(c for c in run.calls if (c.batch, c.steps) != (BATCH, STEPS))
    if call.taken and call.batch == BATCH:
        raise ExportError(calls_trouble(model, call))
    if call.steps == 1 and sum(c.path == call.path for c in run.calls) >= STEPS:
        raise ExportError(f"{call.label} is called once for every time step; call it once over the whole sequence")
    changer = shape_changer(run, STEPS)
    if changer is not None:
        raise ExportError(changer)
    raise ExportError(
        f"{call.label} runs over a batch of {call.batch} and {call.steps} steps where the model was given a batch of "
        f"{BATCH} and {STEPS} steps; each of its rows must be one stream"
    )


def _check_state_arguments(model: nn.Module, x: Tensor, rest: tuple[Any, ...]) -> None:
    """State arguments must reach the layers unchanged: then the state given back is the state to carry on."""
    generator = torch.Generator().manual_seed(0)
    rest = tree.map_leaves(rest, lambda state: torch.randn(state.shape, generator=generator))
    given = list(tensors(rest))
    if not given:
        return
    run = watch(copy_of(model), (x.clone(), *rest))
    taken = [(call, tensor) for call in run.calls for tensor in call.given or ()]
    everything = torch.cat([tensor.flatten() for _, tensor in taken] or [torch.zeros(0)])
    for number, state in enumerate(given, start=1):
        if not torch.isin(state, everything).all():
            raise ExportError(
                f"argument {number + 1} {list(state.shape)} is not the state of a recurrent layer, or does not reach "
                f"it unchanged; the model must take one input and the states of its recurrent layers"
            )
    sources = torch.cat([state.flatten() for state in given])
    for call, tensor in taken:
        found = torch.isin(tensor, sources)
        if found.any() and not found.all():
            raise ExportError(f"{call.label} gets an initial state that is only in part the state the model was given")


def _check_steady(runs: Sequence[Run]) -> None:
    first, *others = runs
    for other in others:
        if [call.key for call in other.calls] != [call.key for call in first.calls]:
            raise ExportError("the recurrent layers the model calls depend on the input or its length")


def _unsteady(model: nn.Module, arguments: Arguments, call: Call) -> str:
    x = arguments.random(BATCH, STEPS, 0)
    again = next(c for c in run_with(model, arguments, x).calls if c.key == call.key)
    same = call.given is not None and again.given is not None and all(map(torch.equal, call.given, again.given))
    why = "depends on the input" if same else "is drawn at random"
    return (
        f"the initial state of {call.label} {why}; a stream's state can start from zeros or from constant or learned "
        f"values only"
    )
