"""Shows that a model does what its contract promises: the one place that knows how to cut, pad and compare.

Without any framework: :func:`verify` replays the golden run and holds a model against itself (whole stream = any
chunking = ragged batch = alone). The exporter holds the same runs against the source model. The daemon replays the
golden run at start (:func:`replay_golden`).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from recurd.contract import Contract, Input, Proof
from recurd.errors import ContractError

if TYPE_CHECKING:
    from recurd.model import Model
    from recurd.scheduler import Shape

Array = npt.NDArray[Any]

#: Steps of the streams that are compared, made to have a single step, odd lengths, and several chunks each.
RAGGED = (1, 2, 7, 19, 12)
EQUAL = (13, 13, 13)
#: Bound where a contract has no proof: absolute, and relative to the largest value compared.
ATOL, RTOL = 1e-5, 1e-4


class Runner(Protocol):
    """What can be verified: :class:`recurd.model.Model`, or anything that keeps states by slot as it does."""

    @property
    def contract(self) -> Contract:
        """What it promises."""

    def run(self, slots: Array, fresh: Array, lengths: Array, input: Array) -> list[Array]:
        """One tick; see :meth:`recurd.model.Model.run`."""

    def read(self, slots: Array) -> dict[str, Array]:
        """States by name, batch first; see :meth:`recurd.model.Model.read`."""


class Check(msgspec.Struct, frozen=True):
    """One comparison: the largest absolute error found and the bound it had to stay under."""

    name: str
    error: float
    bound: float
    #: Which tensor came nearest to its bound (or went furthest over it).
    tensor: str

    @property
    def ok(self) -> bool:
        """Whether it held; NaN does not."""
        return self.error <= self.bound


class Piece(NamedTuple):
    """Steps ``[start, stop)`` of one stream, a row of a tick."""

    stream: int
    start: int
    stop: int


#: Ticks, each of pieces of distinct streams; the pieces of a stream come in order and leave nothing out.
Plan = list[list[Piece]]


class Tolerance(NamedTuple):
    """Bound of a comparison: absolute, plus relative to the largest value compared."""

    atol: float = ATOL
    rtol: float = RTOL


def together(lengths: Sequence[int]) -> Plan:
    """All streams whole, in one tick."""
    return sliced(lengths, max(lengths))


def sliced(lengths: Sequence[int], steps: int) -> Plan:
    """All streams together, so many steps of each a tick."""
    return [
        [Piece(stream, start, min(start + steps, length)) for stream, length in enumerate(lengths) if start < length]
        for start in range(0, max(lengths), steps)
    ]


def alone(plan: Plan) -> Plan:
    """The same pieces, every one in a tick of its own."""
    return [[piece] for tick in plan for piece in tick]


def chunked(lengths: Sequence[int], random: np.random.Generator, steps: int = 6) -> Plan:
    """Streams cut at random, to at most so many steps; in every tick a random choice of the streams advances."""
    left = dict.fromkeys(range(len(lengths)), 0)
    plan: Plan = []
    while left:
        chosen = [stream for stream in left if random.random() < 0.7] or list(left)[:1]
        tick = []
        for stream in chosen:
            start = left.pop(stream)
            stop = min(lengths[stream], start + int(random.integers(1, steps + 1)))
            tick.append(Piece(stream, start, stop))
            if stop < lengths[stream]:
                left[stream] = stop
        plan.append(tick)
    return plan


class Inputs(NamedTuple):
    """Where random streams come from."""

    input: Input
    #: Steps ``[n, *shape]`` to choose from, for a model that does not take any number; else ``None``.
    known: Array | None = None

    @classmethod
    def of(cls, contract: Contract) -> "Inputs":
        """Steps of the golden run, which the model is known to take, where there is one."""
        if contract.proof is None or contract.input.classes is not None:
            return cls(contract.input)
        return cls(contract.input, contract.proof.golden.input.array().reshape(-1, *contract.input.shape))

    def draw(self, lengths: Sequence[int], random: np.random.Generator) -> list[Array]:
        """Random input of every stream, ``[steps, *shape]``.

        Known steps, ids the model has, or normal numbers: of the mean and deviation the model expects, where it says.
        """
        if self.known is not None:
            return [self.known[random.integers(0, len(self.known), length)] for length in lengths]
        shapes = [(length, *self.input.shape) for length in lengths]
        if self.input.dtype == "int64":
            return [random.integers(0, self.input.classes or 1, shape, np.int64) for shape in shapes]
        drawn = [random.standard_normal(shape, np.float32) for shape in shapes]
        if not self.input.std:
            return drawn
        mean, std = (np.reshape(values, self.input.shape) for values in (self.input.mean, self.input.std))
        return [(mean + std * stream).astype(np.float32) for stream in drawn]


def drive(runner: Runner, streams: Sequence[Array], plan: Plan) -> dict[str, list[Array]]:
    """Run a plan from the initial states.

    Returns per head one array a stream: all its steps, or, of a head that gives one output a chunk, the last chunk's.
    Under the states' names follow the final states of all streams, one array a stream. Rows are padded with steps of
    any stream.
    """
    heads = runner.contract.heads
    parts: dict[str, list[list[Array]]] = {head.name: [[] for _ in streams] for head in heads}
    padding = np.concatenate(list(streams))
    for tick in plan:
        outputs = runner.run(*_rows(streams, tick, padding))
        for head, output in zip(heads, outputs, strict=True):
            for row, piece in enumerate(tick):
                steps = piece.stop - piece.start
                parts[head.name][piece.stream].append(output[row, :steps] if head.per == "step" else output[row])
    results = {
        head.name: [np.concatenate(p) if head.per == "step" else p[-1] for p in parts[head.name]] for head in heads
    }
    states = runner.read(np.arange(len(streams), dtype=np.int64))
    return results | {state.name: list(states[state.name]) for state in runner.contract.states}


def _rows(streams: Sequence[Array], tick: list[Piece], padding: Array) -> tuple[Array, Array, Array, Array]:
    """A tick as :meth:`Runner.run` takes it; a stream's slot is its number. ``padding`` are steps the model takes."""
    lengths = np.array([piece.stop - piece.start for piece in tick], np.int32)
    rows = np.resize(padding, (len(tick), int(lengths.max()), *padding.shape[1:]))
    for row, piece in enumerate(tick):
        rows[row, : lengths[row]] = streams[piece.stream][piece.start : piece.stop]
    slots = np.array([piece.stream for piece in tick], np.int64)
    return slots, np.array([piece.start == 0 for piece in tick]), lengths, rows


def compare(
    name: str, expected: Mapping[str, Sequence[Array]], got: Mapping[str, Sequence[Array]], tolerance: Tolerance
) -> Check:
    """Hold results (as of :func:`drive`) against each other; the check tells of the tensor that did worst."""
    checks = [_compare_tensor(name, tensor, expected[tensor], got[tensor], tolerance) for tensor in expected]
    return max(checks, key=lambda check: np.nan_to_num(check.error / check.bound, nan=np.inf))


def _compare_tensor(
    name: str, tensor: str, expected: Sequence[Array], got: Sequence[Array], tolerance: Tolerance
) -> Check:
    worst = largest = 0.0
    for wanted, found in zip(expected, got, strict=True):
        if wanted.shape != found.shape:
            return Check(name, float("nan"), tolerance.atol, tensor)
        wanted, found = wanted.astype(np.float64), found.astype(np.float64)
        with np.errstate(invalid="ignore"):
            error = np.where(wanted == found, 0.0, np.abs(wanted - found))  # equal infinities are equal
        worst = float(np.maximum(worst, error.max(initial=0.0)))
        largest = max(largest, float(np.abs(wanted).max(initial=0.0, where=np.isfinite(wanted))))
    return Check(name, worst, tolerance.atol + tolerance.rtol * largest, tensor)


def hold_against(
    runner: Runner, reference: Runner, inputs: Inputs, tolerance: Tolerance, random: np.random.Generator
) -> Iterator[Check]:
    """Run ``runner`` in every way a daemon may, and ``reference`` with each stream whole and alone.

    The two may be one and the same. A model that looks ahead inside a chunk depends on the cuts, so there the reference
    is given the same chunks, each alone.
    """
    contract = runner.contract
    streams = inputs.draw(RAGGED, random)
    cut = chunked(RAGGED, random)
    whole = drive(reference, streams, alone(together(RAGGED)))
    by_cut = whole if contract.causal else drive(reference, streams, alone(cut))
    yield compare("alone", whole, drive(runner, streams, alone(together(RAGGED))), tolerance)
    yield compare("ragged batch", whole, drive(runner, streams, together(RAGGED)), tolerance)
    yield compare("chunks alone", by_cut, drive(runner, streams, alone(cut)), tolerance)
    yield compare("chunks in ragged batches", by_cut, drive(runner, streams, cut), tolerance)
    streams = inputs.draw(EQUAL, random)
    whole = drive(reference, streams, together(EQUAL))
    yield compare("batch of equal lengths", whole, drive(runner, streams, together(EQUAL)), tolerance)


def check_golden(runner: Runner, proof: Proof, slots: int) -> Check:
    """Replay the golden run, in ticks of at most ``slots`` rows."""
    golden = proof.golden
    rows, lengths = golden.input.array(), golden.lengths.array()
    if not len(rows):
        raise ValueError("it is empty")
    heads = runner.contract.heads
    per_step = {head.name for head in heads if head.per == "step"}
    expected: dict[str, list[Array]] = {name: [] for name in (*golden.outputs, *golden.states)}
    got: dict[str, list[Array]] = {name: [] for name in expected}
    axes = {state.name: state.batch_axis for state in runner.contract.states}
    for start in range(0, len(rows), slots):
        part = slice(start, start + slots)
        count = len(rows[part])
        ids = np.arange(count, dtype=np.int64)
        outputs = runner.run(ids, np.ones(count, bool), lengths[part].astype(np.int32), rows[part].copy())
        states = runner.read(ids)
        for row in range(count):
            steps = lengths[start + row]
            for head, output in zip(heads, outputs, strict=True):
                cut = slice(0, steps) if head.name in per_step else ...
                expected[head.name].append(golden.outputs[head.name].array()[start + row][cut])
                got[head.name].append(output[row][cut])
            for name, axis in axes.items():
                expected[name].append(golden.states[name].array().take(start + row, axis))
                got[name].append(states[name][row])
    return compare("golden run", expected, got, Tolerance(proof.atol, proof.rtol))


def replay_golden(model: "Model") -> float | None:
    """Replay the golden run on a model no stream uses yet; the largest error, ``None`` when the contract has no proof.

    Raises :class:`ContractError` with the numbers when the results are not those of the proof. The slots used are left
    with states in them; a fresh start clears a slot anyway.
    """
    proof = model.contract.proof
    if proof is None:
        return None
    check = _golden_check(model, proof)
    if not check.ok:
        raise ContractError(f"model '{model.contract.name}' does not give its golden results: {describe(check)}")
    return check.error


def _golden_check(model: "Model", proof: Proof) -> Check:
    try:
        return check_golden(model, proof, model.slots)
    except Exception as error:  # whatever a proof that is not the model's own makes numpy and the runtime raise
        text = str(error).strip().split("\n")[0]
        name = model.contract.name
        raise ContractError(f"the golden run of model '{name}' cannot be replayed: {text or type(error)}") from error


class Filled:
    """A model whose every tick has one shape."""

    def __init__(self, model: "Model", shape: "Shape") -> None:
        self._model = model
        self._shape = shape
        self.contract = model.contract
        self.read = model.read

    def run(self, slots: Array, fresh: Array, lengths: Array, input: Array) -> list[Array]:
        """One tick; see :class:`Runner`."""
        rows, time = input.shape[:2]
        outputs = self._model.run(*self._shape.fill(slots, fresh, lengths, input))
        heads = zip(self.contract.heads, outputs, strict=True)
        return [output[:rows, :time] if head.per == "step" else output[:rows] for head, output in heads]


def is_bit_exact(model: "Model", rows: int, shape: "Shape | None" = None) -> bool:
    """Whether results and states are the same bit for bit alone, in a tick of ``rows`` rows, and however cut.

    ``shape`` is that of all ticks, where there is only one. Tried, not proven, on a model that no stream uses yet; its
    slots are left with states in them.
    """
    longest = max(RAGGED) if shape is None else shape.steps
    lengths = [RAGGED[row % len(RAGGED)] for row in range(min(rows, model.slots))]
    few = lengths[: len(RAGGED)]
    runner: Runner = model if shape is None else Filled(model, shape)
    random = np.random.default_rng(0)
    streams = Inputs.of(model.contract).draw(lengths, random)
    try:
        single = drive(runner, streams[: len(few)], alone(sliced(few, longest)))
        others = [drive(runner, streams, sliced(lengths, longest))]
        if model.contract.causal:
            others.append(drive(runner, streams[: len(few)], chunked(few, random, min(6, longest))))
    except Exception:  # it does not take any number, and brings no golden run with steps that it takes
        return False
    return all(
        mine.tobytes() == theirs.tobytes()
        for other in others
        for name in single
        for mine, theirs in zip(single[name], other[name], strict=False)
    )


def describe(check: Check) -> str:
    """A failed check in words, with its numbers."""
    return f"'{check.tensor}' is off by {check.error:.3g}, at most {check.bound:.3g} is allowed"


def verify(path: str | Path, device: str = "cpu", seed: int = 0) -> list[Check]:
    """All checks of a contract file that need no framework.

    Raises :class:`ContractError` or :class:`~recurd.errors.DeviceError` when it cannot be run at all.
    """
    from recurd.model import Model  # brings onnxruntime; those who drive their own runner do without

    slots = max(len(RAGGED), len(EQUAL))
    model = Model.load(path, device=device, slots=slots)
    proof = model.contract.proof
    checks = [] if proof is None else [_golden_check(model, proof)]
    tolerance = Tolerance() if proof is None else Tolerance(proof.atol, proof.rtol)
    inputs = Inputs.of(model.contract)
    return checks + list(hold_against(model, model, inputs, tolerance, np.random.default_rng(seed)))
