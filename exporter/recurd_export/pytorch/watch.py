"""Runs a copy of the model once and records what its recurrent modules were given and gave.

The caller's module is never run, hooked or written to: every run has a fresh copy that shares the parameters (which no
forward writes) and copies everything else (which stateful models do write).
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from recurd_export.errors import ExportError
from recurd_export.pytorch.convolved import ConvolutionRecorder, Convolve, Convolved


@dataclass(frozen=True)
class Passage:
    """One call of a module that called no other: shapes of what went in, and what came out."""

    layer: str
    recurrent: bool
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Call:
    """One call of a recurrent module, or all calls of a cell, within one forward."""

    path: str
    #: The module's own calls in this forward are numbered from 0.
    ordinal: int
    module: Any
    batch: int
    #: Of a cell the number of its calls.
    steps: int
    #: Initial state as given: ``(h,)`` or ``(h, c)``, each ``[layers * directions, batch, hidden]``; of a cell
    #: ``[batch, hidden]``; ``None``: zeros.
    given: tuple[Tensor, ...] | None
    #: State afterwards, as given.
    left: tuple[Tensor, ...]
    #: The single calls of a cell.
    taken: tuple["Call", ...] = ()

    @property
    def key(self) -> tuple[str, int]:
        """What is the same in every forward."""
        return self.path, self.ordinal

    @property
    def label(self) -> str:
        """The layer as error texts name it."""
        return label(self.path, self.module)


@dataclass(frozen=True)
class Run:
    """One forward: what it returned and what happened inside."""

    output: Any
    calls: tuple[Call, ...]
    passages: tuple[Passage, ...]
    #: Number of embeddings and ids of every ``nn.Embedding`` that ran.
    lookups: tuple[tuple[int, Tensor], ...]
    convolutions: tuple[Convolved, ...]


class ForwardError(Exception):
    """The model's forward raised; ``layer`` names the module it was in, ``error`` is what it raised."""

    def __init__(self, layer: str, error: Exception, module: nn.Module) -> None:
        super().__init__(f"{layer}: {type(error).__name__}: {first_line(error)}")
        self.layer = layer
        self.error = error
        self.module = module


#: Called before a recurrent module runs, and before a cell's first call: ``(call key, module, batch)`` -> its initial
#: states, ``None``: as they are.
Inject = Callable[[tuple[str, int], nn.Module, int], tuple[Tensor, ...] | None]


def label(path: str, module: nn.Module) -> str:
    """``'decoder.lstm' (LSTM)``; for the model itself just its class."""
    kind = type(module).__name__
    return f"layer '{path}' ({kind})" if path else f"the model itself ({kind})"


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def copy_of(model: nn.Module) -> nn.Module:
    """A copy in eval mode, on the CPU, that shares the parameters (those that are there already) and nothing else."""
    memo: dict[int, Any] = {id(p): p if p.is_cpu else nn.Parameter(p.detach().cpu()) for p in model.parameters()}
    for module in model.modules():
        # Stateful models keep tensors with a graph behind them, which deepcopy refuses.
        for value in vars(module).values():
            for tensor in tensors(value):
                if id(tensor) not in memo:
                    memo[id(tensor)] = tensor.detach().cpu().clone()
    try:
        return copy.deepcopy(model, memo).eval()
    except Exception as error:  # what a module holds may refuse to be copied in any way
        raise ExportError(
            f"{type(model).__name__} cannot be copied, and the original is not to be touched: {first_line(error)}"
        ) from error


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)


def watch(
    copied: nn.Module,
    args: tuple[Any, ...],
    inject: Inject | None = None,
    convolve: Convolve | None = None,
    *,
    passages: bool = True,
) -> Run:
    """Run a copy (see :func:`copy_of`) once, without gradients.

    Without ``passages`` only what recurrent modules and convolutions do is noted down, which is faster.
    Raises :class:`ForwardError` when the forward raises, :class:`ExportError` for what no recurrent layer may get here.
    """
    recorder = _Recorder(copied, inject, passages)
    convolutions = ConvolutionRecorder(copied, convolve)
    try:
        with torch.no_grad():
            output = copied(*args)
    except ExportError:
        raise
    except Exception as error:  # a model may raise anything
        path, module = recorder.active[-1] if recorder.active else ("", copied)
        raise ForwardError(label(path, module), error, module) from error
    finally:
        recorder.remove()
        convolutions.remove()
    seen = tuple(recorder.passages), tuple(recorder.lookups), tuple(convolutions.calls)
    return Run(output, _joined(recorder.calls), *seen)


def _joined(calls: list[Call]) -> tuple[Call, ...]:
    """The calls, those of every cell being one, where its first was."""
    taken: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        if isinstance(call.module, nn.RNNCellBase):
            taken[call.path].append(call)
    return tuple(
        replace(call, steps=len(parts), left=parts[-1].left, taken=tuple(parts)) if parts else call
        for call in calls
        if not (parts := taken.get(call.path, [])) or call is parts[0]
    )


def shape_changer(run: Run, steps: int) -> str | None:
    """In words: the first layer that was given something of ``steps`` steps and gave something without; or ``None``.

    One that adds steps which are taken off again, as padding is, does not count.
    """
    for number, passage in enumerate(run.passages):
        results = [list(output.shape) for output in passage.outputs]
        if results and any(steps in shape for shape in passage.inputs) and not any(steps in shape for shape in results):
            later = (shape for other in run.passages[number + 1 :] for shape in other.inputs)
            if _grows(passage.inputs[0], results[0], steps) and any(steps in shape for shape in later):
                continue
            return (
                f"{passage.layer} changes the number of time steps ({list(passage.inputs[0])} into {results[0]}), so "
                f"chunks of a stream would not fit together"
            )
    for call in run.convolutions:
        stride, shape = call.module.stride[0], call.input.shape
        # Of padded steps, in rows that are streams; not along the features of single steps.
        if isinstance(call.module, nn.Conv1d) and stride > 1 and shape[0] < steps <= shape[2]:
            return (
                f"{label(call.path, call.module)} gives one step for every {stride} (stride={stride}), so chunks of a "
                f"stream would not fit together"
            )
    return None


def _grows(before: Sequence[int], after: Sequence[int], steps: int) -> bool:
    return any(was == steps < now for was, now in zip(before, after, strict=False))


class _Recorder:
    """Hooks on every module of one copy, for one forward."""

    def __init__(self, model: nn.Module, inject: Inject | None, passages: bool) -> None:
        self.calls: list[Call] = []
        self.passages: list[Passage] = []
        self.lookups: list[tuple[int, Tensor]] = []
        #: Modules entered and not yet left, innermost last.
        self.active: list[tuple[str, nn.Module]] = []
        #: Of each of them, and before them of the whole: whether it has called a module.
        self._has_inner = [False]
        self._inject = inject
        self._given: list[tuple[Tensor, ...] | None] = []
        self._ordinals: dict[str, int] = defaultdict(int)
        self._handles = []
        for path, module in model.named_modules():
            is_recurrent = isinstance(module, nn.RNNBase | nn.RNNCellBase)
            if not (passages or is_recurrent):
                continue
            enter = self._enter(path, is_recurrent)
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave(path), with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, path: str, recurrent: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.active.append((path, module))
            self._has_inner[-1] = True
            self._has_inner.append(False)
            return self._enter_recurrent(path, module, args, kwargs) if recurrent else None

        return hook

    def _enter_recurrent(self, path: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = dict(zip(("input", "hx"), args, strict=False)) | kwargs
        x, hx = arguments.get("input"), arguments.get("hx")
        _check_input(path, module, x)
        is_cell, ordinal = isinstance(module, nn.RNNCellBase), self._ordinals[path]
        if self._inject is not None and x is not None and not (is_cell and ordinal):
            batch = x.shape[0 if is_cell or module.batch_first else 1]
            states = self._inject((path, ordinal), module, batch)
            if states is not None:
                hx = states if len(states) == 2 else states[0]
        self._given.append(None if hx is None else _as_tuple(hx))
        return (x, hx), {}

    def _leave(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.active.pop()
            has_inner = self._has_inner.pop()
            if isinstance(module, nn.RNNBase | nn.RNNCellBase):
                self._note(path, module, args[0], output)
            if isinstance(module, nn.Embedding):
                self.lookups.append((module.num_embeddings, args[0]))
            if not has_inner:
                shapes = tuple(tuple(t.shape) for t in tensors(args))
                given = tuple(t.detach().clone() for t in tensors(output))
                recurrent = isinstance(module, nn.RNNBase | nn.RNNCellBase)
                self.passages.append(Passage(label(path, module), recurrent, shapes, given))

        return hook

    def _note(self, path: str, module: Any, x: Tensor, output: Any) -> None:
        ordinal = self._ordinals[path]
        self._ordinals[path] += 1
        if isinstance(module, nn.RNNCellBase):
            ordinal, batch, steps, left = 0, x.shape[0], 1, _as_tuple(output)
        else:
            batch, steps = x.shape[:2] if module.batch_first else (x.shape[1], x.shape[0])
            left = _as_tuple(output[1])
        self.calls.append(Call(path, ordinal, module, batch, steps, self._given.pop(), left))


def _as_tuple(states: Any) -> tuple[Tensor, ...]:
    # Clones: the model may write into them later.
    return tuple(s.detach().clone() for s in (states if isinstance(states, tuple | list) else (states,)))


def _check_input(path: str, module: nn.Module, x: Any) -> None:
    if isinstance(x, PackedSequence):
        raise ExportError(
            f"{label(path, module)} is given a PackedSequence; ragged lengths are part of the contract already, so "
            f"pass the padded tensor"
        )
    if isinstance(x, Tensor) and x.dim() == (1 if isinstance(module, nn.RNNCellBase) else 2):
        raise ExportError(
            f"{label(path, module)} gets an input of rank {x.dim()} {list(x.shape)}, without a batch axis; give an "
            f"example of "
            f"[batch, time, ...]"
        )
