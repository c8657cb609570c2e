"""How far the finished graph moves away from its source over a long stream: errors as a function of time.

Small differences may add up in a state that is carried on for hours, and what is not hoisted right may show only
beyond the longest stream of the other checks. So one stream of 10,000 steps is run by both: by the source whole, where
it is causal, and by the graph in chunks.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from recurd.contract import Contract
from recurd.verify import Inputs, Runner, Tolerance
from recurd_export.errors import ExportError

Array = npt.NDArray[Any]

STEPS = 10_000
#: Where states, and heads of the last step, are compared: the source gives them at the end of a run only.
MARKS = (10, 100, 1_000)
#: Points of a curve, for heads that give something at every step.
STRETCHES = 100
#: Steps of a chunk; fewer where states are rounded at every cut, as a live stream has it.
CHUNK_STEPS, SHORT_CHUNK_STEPS = 100, 16
#: Source and graph, one after the other, run fewer steps where they would take longer.
BUDGET_SECONDS = 4.0
#: Elements of all heads over the whole run.
MAX_ELEMENTS = 2**25
#: The source's own rounding may be this many times larger in the file.
NOISE_FACTOR = 8.0


class Curve(msgspec.Struct, frozen=True):
    """One tensor's errors over time."""

    tensor: str
    kind: Literal["head", "state"]
    #: For heads of every step the last step of each stretch, and the largest error in it; else single steps.
    steps: tuple[int, ...]
    errors: tuple[float, ...]
    #: Largest absolute value the source gave.
    largest: float
    #: What the other checks allow.
    bound: float

    @property
    def worst(self) -> float:
        """The largest error."""
        return max(self.errors)

    @property
    def passes_at(self) -> int | None:
        """The step by which the error is beyond the bound, ``None`` when it never is."""
        beyond = (step for step, error in zip(self.steps, self.errors, strict=True) if not error <= self.bound)
        return next(beyond, None)


class Drift(msgspec.Struct, frozen=True):
    """Errors over one long stream."""

    steps: int
    #: The graph's; the source of a causal model ran whole.
    chunk_steps: int
    curves: tuple[Curve, ...]
    #: Why there are not as many steps as usual; else empty.
    fewer: str = ""

    @property
    def worst(self) -> Curve:
        """The curve that came nearest to its bound, or went furthest beyond it."""
        return max(self.curves, key=lambda curve: curve.worst / curve.bound)

    @property
    def passes_at(self) -> int | None:
        """The step by which the first tensor is beyond its bound, ``None`` when none ever is."""
        return min((curve.passes_at for curve in self.curves if curve.passes_at is not None), default=None)


@dataclass(frozen=True)
class _Trace:
    """What a runner gave: heads of every step ``[steps, *shape]``, and at each mark the other heads and the states."""

    heads: dict[str, Array]
    marks: dict[int, dict[str, Array]]


def measure(
    graph: Runner, source: Runner, inputs: Inputs, tolerance: Tolerance, budget_seconds: float = BUDGET_SECONDS
) -> Drift:
    """Run both over a long random stream. Raises :class:`ExportError` when the source fails at once."""
    contract = graph.contract
    chunk = SHORT_CHUNK_STEPS if any(state.dtype == "float16" for state in contract.states) else CHUNK_STEPS
    stream = _stream(contract, inputs)
    expected, steps, fewer = _settle(graph, source, stream, chunk, budget_seconds)
    cuts = _cuts(steps, chunk)
    try:
        whole = _follow(source, stream, [steps] if contract.causal else cuts)
        expected = _Trace(whole.heads, expected.marks | whole.marks)
    except (ExportError, MemoryError) as error:
        fewer = f"the source fails with a stream of {steps:,} steps: {error}"
        steps = max(expected.marks)
    got = _follow(graph, stream, _cuts(steps, chunk))
    curves = (*_head_curves(expected, got, tolerance), *_mark_curves(contract, expected, got, tolerance))
    return Drift(steps, chunk, curves, fewer)


def _stream(contract: Contract, inputs: Inputs) -> Array:
    """As many random steps as the long run may have; the same ones every time."""
    width = sum(head.width for head in contract.heads)
    return inputs.draw([max(MARKS[0], min(STEPS, MAX_ELEMENTS // max(1, width)))], np.random.default_rng(3))[0]


def _settle(graph: Runner, source: Runner, stream: Array, chunk: int, budget: float) -> tuple[_Trace, int, str]:
    """The source's short runs, and how many steps the long one may have."""
    asked, causal = len(stream), graph.contract.causal
    heads: dict[str, Array] = {}
    marks: dict[int, dict[str, Array]] = {}
    seconds = 0.0
    for mark in (mark for mark in MARKS if mark < asked):
        if mark > MARKS[1] and seconds * mark > budget / 2:
            break
        began = time.perf_counter()
        trace = _follow(source, stream, [mark] if causal else _cuts(mark, chunk))
        seconds = (time.perf_counter() - began) / mark
        heads, marks = trace.heads, marks | trace.marks
    began = time.perf_counter()
    _follow(graph, stream, _cuts(min(asked, MARKS[1]), chunk))
    seconds += (time.perf_counter() - began) / MARKS[1]
    steps = min(asked, max(MARKS[1], int(budget / seconds) // 100 * 100))
    fewer = "" if asked == STEPS else "its heads are too wide for more"
    return _Trace(heads, marks), steps, fewer if steps == asked else f"more would take over {budget:.0f} s"


def _cuts(steps: int, chunk: int) -> list[int]:
    """Where a chunk ends: regularly, at every mark, and at the end."""
    return sorted({*range(chunk, steps, chunk), *(mark for mark in MARKS if mark < steps), steps})


def _follow(runner: Runner, stream: Array, cuts: Sequence[int]) -> _Trace:
    """One stream from its initial state, a chunk up to every cut; looked at where a mark or the end is."""
    heads = runner.contract.heads
    slots = np.zeros(1, np.int64)
    parts: dict[str, list[Array]] = {head.name: [] for head in heads if head.per == "step"}
    marks: dict[int, dict[str, Array]] = {}
    start = 0
    for stop in cuts:
        piece = np.ascontiguousarray(stream[None, start:stop])
        outputs = runner.run(slots, np.array([start == 0]), np.array([stop - start], np.int32), piece)
        results = dict(zip([head.name for head in heads], outputs, strict=True))
        for name, part in parts.items():
            part.append(results[name][0, : stop - start])
        if stop in MARKS or stop == cuts[-1]:
            last = {name: value[0] for name, value in results.items() if name not in parts}
            states = runner.read(slots)
            marks[stop] = last | {state.name: states[state.name][0] for state in runner.contract.states}
        start = stop
    return _Trace({name: np.concatenate(part) for name, part in parts.items()}, marks)


def _head_curves(expected: _Trace, got: _Trace, tolerance: Tolerance) -> Iterable[Curve]:
    for name, wanted in expected.heads.items():
        steps = len(wanted)
        starts = np.unique(np.linspace(0, steps, STRETCHES, endpoint=False).astype(int))
        errors = _errors(wanted, got.heads[name][:steps]).reshape(steps, -1).max(axis=1, initial=0.0)
        ends = (*starts[1:].tolist(), steps)
        yield _curve(name, "head", ends, np.maximum.reduceat(errors, starts).tolist(), [wanted], tolerance)


def _mark_curves(contract: Contract, expected: _Trace, got: _Trace, tolerance: Tolerance) -> Iterable[Curve]:
    steps = sorted(expected.marks.keys() & got.marks.keys())
    states = {state.name for state in contract.states}
    for name in expected.marks[steps[0]]:
        wanted = [expected.marks[step][name] for step in steps]
        errors = [
            float(_errors(value, got.marks[step][name]).max(initial=0.0))
            for step, value in zip(steps, wanted, strict=True)
        ]
        yield _curve(name, "state" if name in states else "head", tuple(steps), errors, wanted, tolerance)


def _curve(
    name: str,
    kind: Literal["head", "state"],
    steps: tuple[int, ...],
    errors: list[float],
    wanted: list[Array],
    tolerance: Tolerance,
) -> Curve:
    largest = max(float(np.abs(value, dtype=np.float64).max(initial=0.0, where=np.isfinite(value))) for value in wanted)
    return Curve(name, kind, steps, tuple(errors), largest, tolerance.atol + tolerance.rtol * largest)


def _errors(wanted: Array, found: Array) -> Array:
    """Absolute differences; equal infinities are equal, and NaN is infinitely wrong."""
    wide, other = wanted.astype(np.float64), found.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.where(wide == other, 0.0, np.abs(wide - other))
    return np.nan_to_num(difference, nan=np.inf, posinf=np.inf)


def judge(drift: Drift, source: Runner, exact: Runner | None, inputs: Inputs, *, reduced: bool) -> list[str]:
    """What the caller is to be told of the drift.

    Beyond the bound a reduced precision is told of, and so is rounding that grows in the source as well, measured
    against its float64 run. Raises :class:`ExportError` where it does not: then the graph does something else.
    """
    if drift.passes_at is None:
        return []
    told = _told(drift, drift.worst)
    if reduced:
        return [f"{told}: use a higher precision if that is too much"]
    noise = None if exact is None else _noise(source, exact, inputs, drift)
    if noise is None:
        return [f"{told}: rounding may grow in this model, or the file does something else on long streams"]
    for curve in sorted(drift.curves, key=lambda curve: curve.worst / curve.bound, reverse=True):
        if curve.worst > NOISE_FACTOR * noise[curve.tensor] + curve.bound:
            raise ExportError(
                f"the exported model is not the source model on long streams: {_told(drift, curve)}, "
                f"while float32 rounding in the source explains {noise[curve.tensor]:.1e}"
            )
    return [f"{told}: float32 rounding grows in the source model itself"]


def _told(drift: Drift, curve: Curve) -> str:
    return (
        f"over {drift.steps:,} steps '{curve.tensor}' comes to be off by {curve.worst:.1e} ({_share(curve)} of its "
        f"largest value), where {curve.bound:.1e} is allowed; a bound is passed by step {drift.passes_at:,}"
    )


def _noise(source: Runner, exact: Runner, inputs: Inputs, drift: Drift) -> dict[str, float] | None:
    """By tensor, how far the source's own rounding takes it on the same stream; ``None`` where float64 does not run."""
    contract = source.contract
    stream = _stream(contract, inputs)[: drift.steps]
    cuts = _cuts(drift.steps, drift.steps if contract.causal else drift.chunk_steps)
    try:
        expected, got = _follow(exact, stream, cuts), _follow(source, stream, cuts)
    except ExportError:  # its code does not run in float64
        return None
    curves = (*_head_curves(expected, got, Tolerance()), *_mark_curves(contract, expected, got, Tolerance()))
    return {curve.tensor: curve.worst for curve in curves}


def _share(curve: Curve) -> str:
    return f"{curve.worst / curve.largest:.1%}" if curve.largest and np.isfinite(curve.worst) else "all"
