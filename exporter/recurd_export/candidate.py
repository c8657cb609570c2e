"""What every front end (torch, Keras, foreign ONNX) makes out of a source model, for the rest of the pipeline."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import onnx

from recurd.contract import Contract
from recurd.verify import Check, Inputs, Runner, Tolerance
from recurd_export.report import Layer


def _no_checks(inputs: Inputs, tolerance: Tolerance) -> Iterable[Check]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A contract graph that claims to do what a source model does, and what it is to be held against."""

    #: The graph of docs/contract.md section 2, its true shapes said, nothing of the machine it was made on in it.
    proto: onnx.ModelProto
    #: Its contract, as yet without hash and proof.
    contract: Contract
    #: The source model, run by its own framework.
    reference: Runner
    #: The same in float64, which tells what of a difference is float32's own rounding; ``None`` where there is none.
    exact: Runner | None = None
    #: Where random streams come from.
    inputs: Inputs
    #: Checks only this front end can make.
    more_checks: Callable[[Inputs, Tolerance], Iterable[Check]] = _no_checks
    hoisted: tuple[Layer, ...] = ()
    #: What the caller should know and might not expect.
    notes: tuple[str, ...] = ()
    #: A bound wider than the usual one, relative to the largest value, where the graph computes more coarsely than the
    #: source does.
    coarseness: float = 0.0
    #: How much further, relative to the largest value, weights that were rounded for the file may take it away from the
    #: source; in what the file computes with them it is as exact as ever.
    rounded: float = 0.0
    #: Relative bound within which the graph alone must give the same however its streams are cut and batched; checked
    #: apart from the source where it is not 0, because the bounds above are too wide to show it.
    cuts: float = 0.0
