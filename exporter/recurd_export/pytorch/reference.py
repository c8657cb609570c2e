"""The source model as a runner: what every check of an export is held against.

The model's own code runs, on its own torch layers. Only the states of its recurrent modules are put in and taken out by
hooks, so that it can be driven in chunks like the exported file.
"""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from recurd.contract import Contract
from recurd_export.errors import ExportError
from recurd_export.pytorch import convolutions, tree
from recurd_export.pytorch.apart import apart
from recurd_export.pytorch.arguments import Arguments
from recurd_export.pytorch.fresh import fresh_run
from recurd_export.pytorch.layout import Layout
from recurd_export.pytorch.state import join_rows, take_row
from recurd_export.pytorch.watch import ForwardError, copy_of, watch

Array = npt.NDArray[Any]
_Key = tuple[str, int]


@dataclass(frozen=True)
class _Row:
    """Results of one row: its heads, and its states by name, their batch axis being 1."""

    heads: list[Array]
    states: dict[str, Tensor]


class Reference:
    """Runs the source model tick by tick; owns the states of its slots. Satisfies :class:`recurd.verify.Runner`."""

    def __init__(self, model: nn.Module, layout: Layout, contract: Contract, *, double: bool = False) -> None:
        """``double``: compute in float64, to see what of a difference is float32's own rounding."""
        self.contract = contract
        self._layout = replace(layout, arguments=_in_float64(layout.arguments)) if double else layout
        self._recurrences = {(r.path, r.ordinal): r for r in layout.recurrences}
        self._model = copy.deepcopy(copy_of(model)).double() if double else model
        self._dtype = torch.float64 if double else torch.float32
        self._states: dict[int, dict[str, Tensor]] = {}

    def run(self, slots: Array, fresh: Array, lengths: Array, input: Array) -> list[Array]:
        """See :meth:`recurd.model.Model.run`. Rows of equal length and start run as one batch, others alone."""
        groups: dict[tuple[int, bool], list[int]] = {}
        for row in range(len(slots)):
            groups.setdefault((int(lengths[row]), bool(fresh[row])), []).append(row)
        done: dict[int, _Row] = {}
        for (length, start), rows in groups.items():
            given = None if start else [self._states[int(slots[row])] for row in rows]
            done |= zip(rows, self._run(input[rows, :length], given), strict=True)
        for row, result in done.items():
            self._states[int(slots[row])] = result.states
        return [self._stack(index, done, input.shape[1]) for index in range(len(self.contract.heads))]

    def read(self, slots: Array) -> dict[str, Array]:
        """See :meth:`recurd.model.Model.read`."""
        rows = [self._states[int(slot)] for slot in slots]
        return {
            state.name: np.stack([row[state.name].squeeze(state.batch_axis).numpy() for row in rows])
            for state in self._layout.states
        }

    def pass_along(self, streams: Sequence[Array], cuts: Sequence[int]) -> dict[str, list[Array]]:
        """Heads (as of :func:`recurd.verify.drive`) of equally long streams when the caller hands the state back.

        Only for models with :func:`returns_state_arguments`. The states of convolutions, which no caller has, are
        carried on here.
        """
        x = torch.from_numpy(np.stack(streams))
        _, *rest = self._layout.arguments.with_input(x)
        over_time, carried = self._layout.convolutions, None
        parts: list[list[Array]] = [[] for _ in self.contract.heads]
        for start, stop in itertools.pairwise(cuts):
            piece, *_ = self._layout.arguments.with_input(x[:, start:stop])
            with apart(self._dtype == torch.float64):
                run = watch(copy_of(self._model), (piece, *rest), convolve=convolutions.carrying(over_time, carried))
            carried = convolutions.left(over_time, run, carried)
            found = [leaf for _, leaf in tree.leaves(run.output)]
            left = iter([found[position] for position in self._layout.returned_states])
            rest = tree.map_leaves(rest, lambda _: next(left))  # noqa: B023  (consumed at once)
            for index, part in enumerate(parts):
                part.append(self._arranged(index, found, len(streams), stop - start))
        return {
            head.name: list(np.concatenate(part, axis=1) if head.per == "step" else part[-1])
            for head, part in zip(self.contract.heads, parts, strict=True)
        }

    def _stack(self, index: int, done: dict[int, _Row], steps: int) -> Array:
        rows = [done[row].heads[index] for row in range(len(done))]
        if self.contract.heads[index].per == "step":
            rows = [np.pad(row, [(0, steps - len(row)), *[(0, 0)] * (row.ndim - 1)]) for row in rows]
        return np.stack(rows)

    def _run(self, x: Array, given: list[dict[str, Tensor]] | None) -> list[_Row]:
        """Rows of one length in one batch, from their initial states or from given ones."""
        batch, steps = x.shape[:2]
        states = None if given is None else join_rows(given, self._layout.states)

        def inject(key: _Key, module: nn.Module, size: int) -> tuple[Tensor, ...] | None:
            return None if states is None else self._recurrences[key].join(states)

        tensor = torch.from_numpy(np.ascontiguousarray(x))
        tensor = tensor.to(self._dtype) if tensor.is_floating_point() else tensor
        try:
            convolve = convolutions.carrying(self._layout.convolutions, states)
            with apart(self._dtype == torch.float64):
                run = fresh_run(
                    self._model, self._layout.arguments, tensor, inject, convolve,
                    plain=self._layout.plain, passages=False,
                )  # fmt: skip
        except ForwardError as error:
            raise ExportError(
                f"the model's forward fails with a batch of {batch} and {steps} steps: {error}"
            ) from error
        found = [leaf for _, leaf in tree.leaves(run.output)]
        heads = [self._arranged(index, found, batch, steps) for index in range(len(self.contract.heads))]
        left = convolutions.left(self._layout.convolutions, run, states)
        for call in run.calls:
            left |= self._recurrences[call.key].split(call.left)
        return [_Row([head[row] for head in heads], take_row(left, self._layout.states, row)) for row in range(batch)]

    def _arranged(self, index: int, found: list[Tensor], batch: int, steps: int) -> Array:
        layout, head = self._layout.heads[index], self.contract.heads[index]
        shape = (batch, steps, *head.shape) if head.per == "step" else (batch, *head.shape)
        tensor = found[layout.position]
        if tensor.dim() == _rank(layout.outer is not None, shape):
            tensor = layout.arrange(tensor, batch, steps)
        if layout.as_float:
            tensor = tensor.to(torch.float32)
        # A squeeze() without an axis may have taken a batch or a time of one away.
        array: Array = tensor.reshape(shape).numpy()
        return array


def _in_float64(arguments: Arguments) -> Arguments:
    """The same, its states being float64, wherever they are."""

    def wide(state: Tensor) -> Tensor:
        return state.double() if state.is_floating_point() else state

    kept = tuple(replace(each, value=tree.map_leaves(each.value, wide)) for each in arguments.kept)
    return replace(arguments, rest=tree.map_leaves(arguments.rest, wide), kept=kept)


def returns_state_arguments(layout: Layout) -> bool:
    """Whether the model gives back a state for every state argument it takes."""
    return 0 < len(layout.arguments.state_axes) == len(layout.returned_states)


def _rank(folded: bool, shape: tuple[int, ...]) -> int:
    return len(shape) - 1 if folded else len(shape)
