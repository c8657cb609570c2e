"""The front end for torch modules.

Look at the model (``layout``), make its states explicit (``hoist``), trace it (``trace``, ``rewrite``), make sure it
works step by step (``steps``) and takes no index out of range (``bounds``), convert it to ONNX (``convert``).
"""

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from recurd.contract import Contract
from recurd.verify import EQUAL, Check, Inputs, Piece, Tolerance, compare, drive
from recurd_export import pipeline
from recurd_export.candidate import Candidate
from recurd_export.facts import Facts
from recurd_export.pytorch import bounds, convert, layout, rewrite, step_layout, steps, trace, ways
from recurd_export.pytorch.describe import (
    convolution_notes,
    describe_convolution,
    describe_layer,
    describe_model,
    describe_step,
    notes,
    step_notes,
)
from recurd_export.pytorch.hoist import Hoisted
from recurd_export.pytorch.reference import Reference, returns_state_arguments
from recurd_export.pytorch.step_function import StepFunction
from recurd_export.pytorch.step_layout import Found
from recurd_export.pytorch.step_reference import StepReference
from recurd_export.scan import over_time


def front(model: nn.Module, example: Any, *, step: bool = False) -> pipeline.FrontEnd:
    """The front end for one module, which is left as it was. ``step``: its forward is one time step."""
    candidate = _of_step if step else _candidate
    source = getattr(model, "_orig_mod", model)  # torch.compile's wrapper

    def look(facts: Facts, progress: pipeline.Progress) -> Candidate:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
            # Said once in a process, of the model as it runs here; the exported file has nothing to do with oneDNN.
            warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN", UserWarning)
            return candidate(source, example, facts, progress)

    return look


def _candidate(model: nn.Module, example: Any, facts: Facts, progress: pipeline.Progress) -> Candidate:
    progress(pipeline.LOOK)
    found = layout.find(model, example)
    progress(pipeline.TRACE)
    hoisted = ways.choose(model, found)
    program, found = _program(model, hoisted, found, progress)
    progress(pipeline.CONVERT)
    contract = describe_model(model, found, program, facts)
    reference = Reference(model, found, contract)
    known = found.arguments.known

    def check_passing(inputs: Inputs, tolerance: Tolerance) -> Iterator[Check]:
        if returns_state_arguments(found):
            yield _check_passing(reference, inputs, tolerance)

    return Candidate(
        proto=_convert(program, contract, hoisted.one_step),
        contract=contract,
        reference=reference,
        exact=Reference(model, found, contract, double=True),
        inputs=Inputs(contract.input, None if known is None else known.numpy()),
        more_checks=check_passing,
        hoisted=(*map(describe_layer, found.recurrences), *map(describe_convolution, found.convolutions)),
        notes=(*([hoisted.note] if hoisted.note else []), *notes(found, contract), *convolution_notes(found)),
    )


def _of_step(model: nn.Module, example: Any, facts: Facts, progress: pipeline.Progress) -> Candidate:
    progress(pipeline.LOOK)
    found = step_layout.find(model, example)
    progress(pipeline.TRACE)
    step = StepFunction(model, found)
    program, found = _program(model, step, found, progress)
    progress(pipeline.CONVERT)
    contract = describe_model(model, found, program, facts)
    known = found.arguments.known
    return Candidate(
        proto=_convert(program, contract, one_step=True),
        contract=contract,
        reference=StepReference(model, found, contract),
        exact=StepReference(model, found, contract, double=True),
        inputs=Inputs(contract.input, None if known is None else known.numpy()),
        hoisted=(describe_step(model, found),),
        notes=(step.note, *step_notes(model, found), *notes(found, contract)),
    )


def _program(
    model: nn.Module, hoisted: Hoisted | StepFunction, found: Found, progress: pipeline.Progress
) -> tuple[torch.export.ExportedProgram, Found]:
    """The model as a graph that works step by step, and the layout with what only the graph tells."""
    with convert.quiet():
        program = trace.trace(model, hoisted)
    progress(pipeline.STEPS)
    rewrite.settle(program)
    steps.check(program, found)
    return program, bounds.settle(program, found)


def _convert(program: torch.export.ExportedProgram, contract: Contract, one_step: bool) -> onnx.ModelProto:
    """The graph of the contract; that of one step is run over time by a Scan."""
    inputs = [contract.input.name, *([] if one_step else [contract.lengths])]
    inputs += [state.name for state in contract.states]
    outputs = [head.name for head in contract.heads] + [state.output for state in contract.states]
    proto = convert.to_onnx(program, inputs, outputs)
    proto = over_time(proto, contract) if one_step else proto
    convert.finish(proto, contract)
    return proto


def _check_passing(reference: Reference, inputs: Inputs, tolerance: Tolerance) -> Check:
    """The model driven as its own callers do, its returned state handed back, gives what hoisted states give."""
    streams = inputs.draw(EQUAL, np.random.default_rng(1))
    cuts = (0, 4, 5, EQUAL[0])
    plan = [[Piece(stream, start, stop) for stream in range(len(EQUAL))] for start, stop in itertools.pairwise(cuts)]
    return compare(
        "state passed along", reference.pass_along(streams, cuts), drive(reference, streams, plan), tolerance
    )
