"""Runs a foreign model with other numbers of rows and steps, and so finds how it lays out batch and time."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from recurd_export import surgery
from recurd_export.adopt.foreign import Foreign, Port, first_line
from recurd_export.adopt.hypotheses import CANNOT_SHARE, Hypothesis, hypotheses
from recurd_export.adopt.layout import HeadLayout, Layout, StateLayout
from recurd_export.adopt.roles import Roles
from recurd_export.adopt.running import feeds, open_relaxed
from recurd_export.adopt.settings import Adoption
from recurd_export.adopt.values import initial_values
from recurd_export.errors import ExportError

Array = npt.NDArray[Any]
#: Rows and steps of the runs; two numbers that nothing else in a model is likely to be.
ROWS, STEPS = 3, 5
#: Hypotheses that are tried at most; what is declared puts the right one among the first.
MOST = 500
#: Two runs agree when they differ by less of the largest value; layouts that are wrong differ by far more.
CLOSE = 1e-3
QUANTISED = "; dynamic quantisation scales by the whole batch, so adopt the model as it was before it was quantised"


class _Stage(IntEnum):
    """How far a hypothesis got; of those that failed, the one that got furthest is told of."""

    RUN = 0
    BATCH = 1
    STATE = 2
    HEAD = 3
    ROWS = 4
    VALUES = 5
    TIME = 6


class _Failed(Exception):
    """A hypothesis does not hold."""

    def __init__(self, stage: _Stage, sentence: str) -> None:
        super().__init__(sentence)
        self.stage = stage


def find(foreign: Foreign, roles: Roles, adoption: Adoption, known: Array | None = None) -> Layout:
    """The first layout that holds; ``known`` are steps ``[n, *shape]`` for a model that does not take any number.

    Raises :class:`ExportError` that says how far the likeliest ones got.
    """
    session = open_relaxed(foreign)
    furthest: _Failed | None = None
    for hypothesis in itertools.islice(hypotheses(roles, adoption), MOST):
        states = initial_values(roles, hypothesis, adoption)
        try:
            return _Probe(session, roles, adoption, hypothesis, states, known).layout()
        except _Failed as failed:
            if furthest is None or failed.stage > furthest.stage:
                furthest = failed
    assert furthest is not None
    quantised = any(node.op_type.startswith("DynamicQuantize") for node in surgery.nodes(foreign.proto.graph))
    why = QUANTISED if quantised and furthest.stage is _Stage.ROWS else ""
    raise ExportError(f"{foreign.path}: {furthest}{why}") from furthest


@dataclass(frozen=True)
class _Probe:
    """One hypothesis, put to the test."""

    session: ort.InferenceSession
    roles: Roles
    adoption: Adoption
    hypothesis: Hypothesis
    states: tuple[StateLayout, ...]
    known: Array | None

    def layout(self) -> Layout:
        """The layout, when the hypothesis holds. Raises :class:`_Failed`."""
        one = self._first_run(1, _Stage.RUN, "the model does not run with one step of one stream")
        many = self._first_run(ROWS, _Stage.BATCH, f"the batch axis is fixed to 1: {ROWS} rows do not run")
        heads = [self._head(port, one[port.name], many[port.name]) for port in self.roles.heads]
        self._check_repeats(many)
        self._check_rows(heads)
        self._check_values(many)
        steps = self._find_time(heads)
        if steps is None:
            heads = [self._like_input(head, many[head.port.name]) for head in heads]
        return Layout(self.hypothesis.input, self.states, tuple(steps or heads), many_steps=steps is not None)

    def _first_run(self, rows: int, stage: _Stage, sentence: str) -> dict[str, Array]:
        try:
            found = self._run(self._draw(rows, 1), self._fresh(rows))
        except Exception as error:  # the runtime raises its own unexported types
            why = (
                f" ({first_line(error)}), {CANNOT_SHARE}"
                if stage is _Stage.BATCH
                else f": {first_line(error)}{self._hint()}"
            )
            raise _Failed(stage, sentence + why) from error
        for state in self.states:
            before, after = state.rows(rows), found[state.after.name]
            if before.shape != after.shape or before.dtype != after.dtype:
                raise _Failed(
                    _Stage.STATE,
                    f"the state '{state.before.name}' is {before.dtype} {list(before.shape)} and its next value "
                    f"'{state.after.name}' {after.dtype} {list(after.shape)}; a state keeps its type and shape",
                )
        return found

    def _hint(self) -> str:
        if self.adoption.step_shape is not None or self.adoption.classes is not None:
            return ""
        return "; if a step is larger, give its shape with --step-shape"

    # --- running ---

    def _draw(self, rows: int, steps: int) -> Array:
        """Random input ``[rows, steps, *shape]``, the same for the same sizes."""
        layout = self.hypothesis.input
        random = np.random.default_rng([rows, steps])
        shape = (rows, steps, *layout.shape)
        if self.known is not None:
            return self._draw_known(shape, random).astype(layout.port.dtype)
        if layout.port.dtype.startswith("float"):
            return random.standard_normal(shape).astype(layout.port.dtype)
        ids = random.integers(0, self.adoption.classes or 1, shape).astype(layout.port.dtype)
        ids.flat[0] = (self.adoption.classes or 1) - 1  # the one that a smaller table does not have
        return ids

    def _draw_known(self, shape: tuple[int, ...], random: np.random.Generator) -> Array:
        assert self.known is not None
        drawn = [self.known[random.integers(0, len(self.known), shape[:2])] for _ in range(2)]
        context = self.adoption.context
        return np.concatenate([drawn[0][..., -context:], drawn[1]], axis=-1) if context else drawn[0]

    def _fresh(self, rows: int) -> dict[str, Array]:
        return {state.before.name: state.rows(rows) for state in self.states}

    def _run(self, x: Array, states: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs of one run; ``x [rows, steps, *shape]``."""
        rows, steps = x.shape[:2]
        layout = self.hypothesis.input
        arranged = x[:, 0] if layout.time_axis is None else x
        arranged = np.ascontiguousarray(arranged.transpose(layout.permutation))
        names = [port.name for port in self.roles.heads] + [state.after.name for state in self.states]
        found = self.session.run(names, feeds(self.roles, arranged, states, rows, steps))
        return dict(zip(names, found, strict=True))

    def _steps(self, x: Array) -> list[dict[str, Array]]:
        """The outputs of one run a step, the states carried on."""
        states, found = self._fresh(len(x)), []
        for step in range(x.shape[1]):
            found.append(self._run(x[:, step : step + 1], states))
            states = {state.before.name: found[-1][state.after.name] for state in self.states}
        return found

    # --- what is found ---

    def _head(self, port: Port, one: Array, many: Array) -> HeadLayout:
        axes = [axis for axis, sizes in enumerate(zip(one.shape, many.shape, strict=False)) if sizes[0] != sizes[1]]
        if one.ndim != many.ndim or len(axes) != 1 or many.shape[axes[0]] != ROWS * one.shape[axes[0]]:
            raise _Failed(
                _Stage.HEAD,
                f"the output '{port.name}' is {list(one.shape)} with one row and {list(many.shape)} with {ROWS}, so "
                f"no row has its own; leave it out by naming the others with --head",
            )
        shape = tuple(np.delete(one.shape, axes[0]).tolist())
        return HeadLayout(port, one.dtype.name, shape, axes[0], None)

    def _check_rows(self, heads: Sequence[HeadLayout]) -> None:
        """Two steps of several rows give what the rows give alone."""
        x = self._draw(ROWS, 2)
        axes = {head.port.name: head.batch_axis for head in heads}
        axes |= {state.after.name: state.batch_axis for state in self.states}
        together = self._steps(x)
        for row in range(ROWS):
            for mine, all_rows in zip(self._steps(x[row : row + 1]), together, strict=True):
                for name, axis in axes.items():
                    if not _close(mine[name].take(0, axis), all_rows[name].take(row, axis)):
                        sentence = (
                            f"what a row gives in '{name}' depends on the other rows, so streams cannot share a tick"
                        )
                        raise _Failed(_Stage.ROWS, sentence)

    def _check_repeats(self, first: dict[str, Array]) -> None:
        again = self._run(self._draw(ROWS, 1), self._fresh(ROWS))
        for name, value in first.items():
            if not np.array_equal(value, again[name], equal_nan=value.dtype.kind == "f"):
                raise _Failed(
                    _Stage.VALUES,
                    f"the same input gives another '{name}' the next time, so the model draws random numbers (dropout "
                    f"in training mode?) and nothing about it can be verified",
                )

    def _check_values(self, many: dict[str, Array]) -> None:
        for name, value in many.items():
            if value.dtype.kind == "f" and np.isnan(value).any():
                raise _Failed(
                    _Stage.VALUES,
                    f"random numbers make the model give NaN in '{name}'; give steps it takes, in a .npy file "
                    f"[steps, ...], with --example",
                )

    def _find_time(self, heads: Sequence[HeadLayout]) -> list[HeadLayout] | None:
        """The heads with their time axes, when runs of many steps are runs of their steps; ``None`` for one step."""
        layout = self.hypothesis.input
        if layout.time_axis is None or self.adoption.context:
            return None
        x = self._draw(2, STEPS)
        try:
            whole = self._run(x, self._fresh(2))
        except Exception:  # the axis is there for one step only
            return None
        steps = self._steps(x)
        found = [self._with_time(head, whole[head.port.name], steps[0][head.port.name]) for head in heads]
        if self._agree(found, whole, steps):
            return found
        declared = (layout.port.dims or ())[layout.time_axis]
        if declared == 1:
            return None  # the file says itself that a run is one step
        raise _Failed(
            _Stage.TIME,
            f"{STEPS} steps at once do not give what they give one by one, so the model mixes steps along axis "
            f"{layout.time_axis} of '{layout.port.name}' and cannot be cut into chunks; if a run is meant to take "
            f"windows of a fixed size, give that with --step-shape",
        )

    def _like_input(self, head: HeadLayout, one: Array) -> HeadLayout:
        """The head without the axis that is time's in an input of the same layout, where a run is one step."""
        input = self.hypothesis.input
        alike = one.ndim == len(input.leading) + len(input.shape) and head.batch_axis == input.batch_axis
        if input.time_axis is None or not alike or one.shape[input.time_axis] != 1:
            return head
        shape = tuple(np.delete(one.shape, input.leading).tolist())
        return HeadLayout(head.port, head.dtype, shape, head.batch_axis, input.time_axis)

    def _with_time(self, head: HeadLayout, whole: Array, one: Array) -> HeadLayout:
        """The head with the axis that grows with the number of steps, if there is one and the rest stays."""
        if whole.ndim == one.ndim:
            grown = [axis for axis in range(one.ndim) if whole.shape[axis] != one.shape[axis]]
            if len(grown) == 1 and one.shape[grown[0]] == 1 and whole.shape[grown[0]] == STEPS:
                shape = tuple(size for axis, size in enumerate(one.shape) if axis not in (head.batch_axis, grown[0]))
                return HeadLayout(head.port, head.dtype, shape, head.batch_axis, grown[0])
        return head

    def _agree(self, heads: Sequence[HeadLayout], whole: dict[str, Array], steps: Sequence[dict[str, Array]]) -> bool:
        for state in self.states:
            if not _close(whole[state.after.name], steps[-1][state.after.name]):
                return False
        for head in heads:
            name = head.port.name
            if head.time_axis is not None:
                if not _close(whole[name], np.concatenate([step[name] for step in steps], axis=head.time_axis)):
                    return False
            elif whole[name].shape == steps[-1][name].shape and not _close(whole[name], steps[-1][name]):
                return False
        return True


def _close(one: Array, other: Array) -> bool:
    if one.shape != other.shape:
        return False
    a, b = one.astype(np.float64), other.astype(np.float64)
    scale = float(np.abs(a).max(initial=0.0, where=np.isfinite(a)))
    return bool(np.allclose(a, b, rtol=0, atol=CLOSE * scale + np.finfo(np.float32).tiny, equal_nan=True))
