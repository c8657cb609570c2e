"""Holds a candidate against its source model, in a plain session and in the daemon's tick, and records the proof."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import numpy as np

from recurd.contract import Golden, Proof
from recurd.contract import Tensor as Stored
from recurd.errors import ContractError
from recurd.model import Model
from recurd.verify import (
    ATOL,
    RAGGED,
    RTOL,
    Check,
    Inputs,
    Tolerance,
    alone,
    compare,
    describe,
    drive,
    hold_against,
    together,
)
from recurd_export.candidate import Candidate
from recurd_export.drift import Drift, judge, measure
from recurd_export.errors import ExportError
from recurd_export.session import Session

#: Rows, steps and most elements of any tensor of a golden run.
GOLDEN_LENGTHS = (6, 3, 1)
GOLDEN_ELEMENTS = 50_000
#: Float32 rounding of the model itself, measured against float64, may be this many times larger in the file.
NOISE_FACTOR = 8.0
#: A model whose rounding asks for more than this is refused.
MAX_RTOL = 0.05


@dataclass(frozen=True)
class Proven:
    """A candidate whose checks held: what the file is to carry of them, and how far it is from its source over time."""

    proof: Proof
    checks: tuple[Check, ...]
    drift: Drift
    #: What the caller should know of the drift.
    notes: tuple[str, ...]


def check_unreduced(candidate: Candidate) -> None:
    """Hold a candidate in float32 against its source before its precision is reduced: what follows is far less strict.

    Raises :class:`ExportError`.
    """
    with _refusing():
        session = Session(candidate.proto, candidate.contract)
    tolerance = _tolerance(candidate)
    for check in hold_against(session, candidate.reference, candidate.inputs, tolerance, np.random.default_rng(0)):
        hold(check)


def prove(candidate: Candidate, progress: Callable[[str], None]) -> Proven:
    """Every check of a candidate.

    Raises :class:`ExportError` when one does not hold.
    """
    own = _tolerance(candidate)
    tolerance = Tolerance(own.atol, max(own.rtol, candidate.rounded))
    inputs = candidate.inputs
    with _refusing():
        session = Session(candidate.proto, candidate.contract)
        tick = Model(candidate.proto, candidate.contract, device="cpu", slots=len(RAGGED), threads=1)
    # Of the two runs the worse stands in the report and in the proof.
    checks = [
        max(map(hold, both), key=lambda check: check.error)
        for both in zip(
            hold_against(session, candidate.reference, inputs, tolerance, np.random.default_rng(0)),
            hold_against(tick, candidate.reference, inputs, tolerance, np.random.default_rng(0)),
            strict=True,
        )
    ]
    checks += map(hold, candidate.more_checks(inputs, tolerance))
    if candidate.cuts:
        checks.append(hold(_against_itself(tick, candidate, own)))
    errors = {check.name: check.error for check in checks}
    proof = Proof(atol=own.atol, rtol=own.rtol, errors=errors, golden=_golden(session, inputs))
    progress("long run")
    drift = measure(tick, candidate.reference, inputs, tolerance)
    reduced = candidate.cuts > 0
    notes = judge(drift, candidate.reference, candidate.exact, inputs, reduced=reduced)
    return Proven(proof, tuple(checks), drift, tuple(notes))


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn what loading a graph that cannot be run raises into an :class:`ExportError`."""
    try:
        yield
    except ContractError as error:
        raise ExportError(str(error)) from error
    except Exception as error:  # the runtime raises its own unexported types
        text = str(error).strip().split("\n")[0]
        raise ExportError(f"the runtime does not run the exported graph: {text or type(error).__name__}") from error


def _against_itself(tick: Model, candidate: Candidate, own: Tolerance) -> Check:
    """The worst that cutting and batching do to the graph's own results."""
    widened = own.rtol > max(RTOL, candidate.coarseness)  # rounding grows in the model itself
    tolerance = Tolerance(own.atol, max(candidate.cuts, own.rtol) if widened else candidate.cuts)
    found = hold_against(tick, tick, candidate.inputs, tolerance, np.random.default_rng(0))
    worst = max(found, key=lambda check: np.nan_to_num(check.error / check.bound, nan=np.inf))
    return msgspec.structs.replace(worst, name="against itself")


def hold(check: Check) -> Check:
    """The check, if it held. Raises :class:`ExportError`."""
    if not check.ok:
        raise ExportError(f"the exported model is not the source model: in the check '{check.name}' {describe(check)}")
    return check


def _tolerance(candidate: Candidate) -> Tolerance:
    """The usual bound, or a wider one where the model's own float32 rounding (against float64) asks for it.

    Raises :class:`ExportError` for a model in which rounding grows so much that nothing could be verified.
    """
    usual = max(RTOL, candidate.coarseness)
    if candidate.exact is None:
        return Tolerance(rtol=usual)
    streams = candidate.inputs.draw(RAGGED, np.random.default_rng(0))
    plan = alone(together(RAGGED))
    single = drive(candidate.reference, streams, plan)
    try:
        exact = drive(candidate.exact, streams, plan)
    except ExportError:
        return Tolerance(rtol=usual)  # its code does not run in float64
    noise = compare("rounding", exact, single, Tolerance(atol=float(np.finfo(np.float32).tiny), rtol=1.0))
    relative = NOISE_FACTOR * noise.error / noise.bound
    if not relative < MAX_RTOL and noise.error > ATOL:
        raise ExportError(
            f"float32 rounding grows to {noise.error:.1g} in '{noise.tensor}' within {max(RAGGED)} steps, so nothing "
            f"can be verified; are the recurrent weights too large?"
        )
    return Tolerance(rtol=max(usual, relative) if noise.error > ATOL else usual)


def _golden(session: Session, inputs: Inputs) -> Golden:
    """A short ragged run of the plain file, small enough to live in it."""
    contract = session.contract
    widest = max(contract.input.width, *(h.width for h in contract.heads), *(s.width for s in contract.states))
    steps = max(1, GOLDEN_ELEMENTS // widest // len(GOLDEN_LENGTHS))
    lengths = np.array([min(length, steps) for length in GOLDEN_LENGTHS], np.int32)
    rows = len(lengths)
    x = np.stack(inputs.draw([int(lengths.max())] * rows, np.random.default_rng(2)))
    slots = np.arange(rows, dtype=np.int64)
    outputs = session.run(slots, np.ones(rows, bool), lengths, x)
    states = session.read(slots)
    return Golden(
        input=Stored.of(x),
        lengths=Stored.of(lengths),
        outputs={h.name: Stored.of(output) for h, output in zip(contract.heads, outputs, strict=True)},
        states={s.name: Stored.of(np.moveaxis(states[s.name], 0, s.batch_axis)) for s in contract.states},
    )
