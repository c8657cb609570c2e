"""From a trained torch module to a proven contract file: read this first.

Look at the model (``layout``), make its states explicit (``hoist``), trace it (``trace``, ``rewrite``), make sure it
works step by step (``steps``) and takes no index out of range (``bounds``), convert it to ONNX (``convert``), hold the
file against the model (``recurd.verify`` with ``reference``), give it its final name (``publish``).
"""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import torch
from torch import nn

from recurd import contract as contracts
from recurd.contract import Contract, Golden, Proof
from recurd.contract import Tensor as Stored
from recurd.model import Model
from recurd.verify import (
    ATOL,
    EQUAL,
    RAGGED,
    RTOL,
    Check,
    Inputs,
    Piece,
    Tolerance,
    alone,
    check_golden,
    compare,
    describe,
    drive,
    hold_against,
    together,
)
from recurd_export.errors import ExportError
from recurd_export.publish import check_target, unpublished
from recurd_export.pytorch import bounds, convert, hoist, layout, rewrite, steps, trace
from recurd_export.pytorch.describe import Facts, describe_layer, describe_model, notes
from recurd_export.pytorch.layout import Layout
from recurd_export.pytorch.reference import Reference, returns_state_arguments
from recurd_export.report import Report
from recurd_export.session import Session

#: Rows, steps and most elements of any tensor of a golden run.
GOLDEN_LENGTHS = (6, 3, 1)
GOLDEN_ELEMENTS = 50_000
#: Float32 rounding of the model itself, measured against float64, may be this many times larger in the file.
NOISE_FACTOR = 8.0
#: A model whose rounding asks for more than this is refused.
MAX_RTOL = 0.05

#: Told the name of each stage as it begins.
Progress = Callable[[str], None]
STAGES = ("look at the model", "trace", "check time steps", "convert", "verify", "write")


def export(model: nn.Module, example: Any, path: Path, facts: Facts, progress: Progress) -> Report:
    """The whole way. Raises :class:`ExportError`; then nothing is left at ``path`` (or what was there before)."""
    started = time.monotonic()
    if not facts.name:
        raise ExportError("the model's name is empty")
    check_target(path)
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        progress(STAGES[0])
        found = layout.find(model, example)
        progress(STAGES[1])
        hoisted = hoist.Hoisted(model, found)
        with convert.quiet():
            program = trace.trace(model, hoisted)
        progress(STAGES[2])
        rewrite.settle(program)
        steps.check(program, found)
        found = bounds.settle(program, found)
        progress(STAGES[3])
        contract = describe_model(model, found, program, facts)
        proto = _convert(program, contract)
        contract = msgspec.structs.replace(contract, weights_sha256=contracts.weights_sha256(proto))
        progress(STAGES[4])
        proof, checks = _prove(model, found, contract, proto)
        contract = msgspec.structs.replace(contract, proof=proof)
        contracts.attach(proto, contract)
        progress(STAGES[5])
        with unpublished(proto, path) as temporary:
            # The very bytes that get the final name, by the daemon's own way of reading them.
            checks.append(_hold(check_golden(Model.load(temporary, slots=len(RAGGED), threads=1), proof, len(RAGGED))))
    hoisted_layers = tuple(describe_layer(recurrence) for recurrence in found.recurrences)
    return Report(
        path=path,
        contract=contract,
        hoisted=hoisted_layers,
        checks=tuple(checks),
        notes=tuple(notes(found, contract)),
        bytes=path.stat().st_size,
        seconds=time.monotonic() - started,
    )


def _convert(program: torch.export.ExportedProgram, contract: Contract) -> onnx.ModelProto:
    inputs = [contract.input.name, contract.lengths, *(state.name for state in contract.states)]
    outputs = [head.name for head in contract.heads] + [state.output for state in contract.states]
    proto = convert.to_onnx(program, inputs, outputs)
    convert.finish(proto, contract)
    return proto


def _prove(model: nn.Module, found: Layout, contract: Contract, proto: onnx.ModelProto) -> tuple[Proof, list[Check]]:
    """Hold the file's graph against the model, in a plain session and in the daemon's tick."""
    reference = Reference(model, found, contract)
    known = found.arguments.known
    inputs = Inputs(contract.input, None if known is None else known.numpy())
    tolerance = _tolerance(model, found, contract, inputs)
    session = Session(proto, contract)
    tick = Model(proto, contract, device="cpu", slots=len(RAGGED), threads=1)
    # Of the two runs the worse stands in the report and in the proof.
    checks = [
        max(map(_hold, both), key=lambda check: check.error)
        for both in zip(
            hold_against(session, reference, inputs, tolerance, np.random.default_rng(0)),
            hold_against(tick, reference, inputs, tolerance, np.random.default_rng(0)),
            strict=True,
        )
    ]
    if returns_state_arguments(found):
        checks.append(_hold(_check_passing(reference, inputs, tolerance)))
    errors = {check.name: check.error for check in checks}
    return Proof(atol=tolerance.atol, rtol=tolerance.rtol, errors=errors, golden=_golden(session, inputs)), checks


def _hold(check: Check) -> Check:
    if not check.ok:
        raise ExportError(f"the exported model is not the source model: in the check '{check.name}' {describe(check)}")
    return check


def _tolerance(model: nn.Module, found: Layout, contract: Contract, inputs: Inputs) -> Tolerance:
    """The usual bound, or a wider one where the model's own float32 rounding (against float64) asks for it.

    Raises :class:`ExportError` for a model in which rounding grows so much that nothing could be verified.
    """
    streams = inputs.draw(RAGGED, np.random.default_rng(0))
    plan = alone(together(RAGGED))
    single = drive(Reference(model, found, contract), streams, plan)
    try:
        exact = drive(Reference(model, found, contract, double=True), streams, plan)
    except ExportError:
        return Tolerance()  # its code does not run in float64
    noise = compare("rounding", exact, single, Tolerance(atol=float(np.finfo(np.float32).tiny), rtol=1.0))
    relative = NOISE_FACTOR * noise.error / noise.bound
    if not relative < MAX_RTOL and noise.error > ATOL:
        raise ExportError(
            f"float32 rounding grows to {noise.error:.1g} in '{noise.tensor}' within {max(RAGGED)} steps, so nothing "
            f"can be verified; are the recurrent weights too large?"
        )
    return Tolerance(rtol=max(RTOL, relative) if noise.error > ATOL else RTOL)


def _check_passing(reference: Reference, inputs: Inputs, tolerance: Tolerance) -> Check:
    """The model driven as its own callers do, its returned state handed back, gives what hoisted states give."""
    streams = inputs.draw(EQUAL, np.random.default_rng(1))
    cuts = (0, 4, 5, EQUAL[0])
    plan = [[Piece(stream, start, stop) for stream in range(len(EQUAL))] for start, stop in itertools.pairwise(cuts)]
    return compare(
        "state passed along", reference.pass_along(streams, cuts), drive(reference, streams, plan), tolerance
    )


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
