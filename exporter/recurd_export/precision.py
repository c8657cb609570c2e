"""Puts a candidate into less than float32: its weights, its arithmetic, its states.

Three bounds follow from what is rounded, each relative to the largest value of a tensor. u is half a unit in the last
place: 2**-11 in float16, 2**-8 in bfloat16.

* Against the source model: 32 u in float16, 16 u with bfloat16 weights. Rounding errors of many weights average out,
  and a trained network stays an order of magnitude below; what is beyond is refused.
* The golden run, which a daemon repeats on whatever device it has: 32 u in float16, because one provider rounds at
  every step and another computes in float32 and rounds at the end; with bfloat16 weights the usual bound, because the
  graph computes in float32 with the very weights that were stored.
* The file against itself, cut and batched in any way: 16 u with float16 states, which are rounded wherever a stream is
  cut; 4 u where only the arithmetic is float16; else the usual bound.
"""

import dataclasses

import ml_dtypes
import msgspec
import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, helper, numpy_helper

from recurd.contract import Contract, State
from recurd.contract import Tensor as Stored
from recurd.verify import RTOL
from recurd_export import surgery
from recurd_export.candidate import Candidate
from recurd_export.errors import ExportError
from recurd_export.half import to_half
from recurd_export.options import Options

FLOAT16, BFLOAT16 = 2.0**-11, 2.0**-8


def reduce(candidate: Candidate, options: Options) -> Candidate:
    """The candidate in the precision of the options; as it was for float32 throughout. Raises :class:`ExportError`."""
    half_states = options.states == "float16"
    if options.precision == "float32" and not half_states:
        return candidate
    model = _copy(candidate.proto)
    if options.precision == "float16":
        to_half(model, candidate.contract, states=half_states)
    elif half_states:
        _round_states(model, candidate.contract)
    if options.precision == "bfloat16-weights":
        _round_weights(model)
    _check(model, options)
    half = options.precision == "float16" or half_states
    arithmetic = 4 * FLOAT16 if options.precision == "float16" else RTOL
    return dataclasses.replace(
        candidate,
        proto=model,
        contract=_half_states(candidate.contract) if half_states else candidate.contract,
        notes=(*candidate.notes, *_notes(options)),
        coarseness=max(candidate.coarseness, 32 * FLOAT16 if half else 0.0),
        rounded=16 * BFLOAT16 if options.precision == "bfloat16-weights" else 0.0,
        cuts=max(candidate.coarseness, 16 * FLOAT16 if half_states else arithmetic),
    )


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(onnx.inliner.inline_local_functions(model) if model.functions else model)
    return result


def _notes(options: Options) -> list[str]:
    notes = []
    if options.precision == "float16":
        notes.append("float16 is for GPUs: a CPU computes it in float32 and casts the weights in every tick")
    if options.states == "float16":
        notes.append(
            "states are rounded to float16 wherever a stream is cut, so its results depend a little on the cuts"
        )
    return notes


def _check(model: onnx.ModelProto, options: Options) -> None:
    """Whether what was made is valid."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the checker raises several types
        text = str(error).strip().split("\n")[0]
        raise ExportError(f"the model cannot be put into precision {options.precision}: {text}") from error


def _half_states(contract: Contract) -> Contract:
    return msgspec.structs.replace(contract, states=tuple(map(_half_state, contract.states)))


def _half_state(state: State) -> State:
    if state.dtype != "float32":
        return state
    initial = None if state.initial is None else Stored.of(state.initial.array().astype(np.float16))
    return msgspec.structs.replace(state, dtype="float16", initial=initial)


def _round_states(model: onnx.ModelProto, contract: Contract) -> None:
    """Float16 states around a graph that computes in float32."""
    graph, name = model.graph, surgery.unused(model.graph)
    ends = {value.name: value for value in (*graph.input, *graph.output)}
    before, after = [], []
    for state in contract.states:
        if state.dtype != "float32":
            continue
        inner, made = name(f"{state.name}.float32"), name(f"{state.output}.float32")
        surgery.rename_reads(graph, state.name, inner)
        surgery.rename_result(graph, state.output, made)
        before.append(helper.make_node("Cast", [state.name], [inner], name=f"{inner}.cast", to=TensorProto.FLOAT))
        after.append(helper.make_node("Cast", [made], [state.output], name=f"{made}.cast", to=TensorProto.FLOAT16))
        for end in (state.name, state.output):
            ends[end].type.tensor_type.elem_type = TensorProto.FLOAT16
    surgery.put_first(graph, before)
    graph.node.extend(after)


def _round_weights(model: onnx.ModelProto) -> None:
    """Store matrices, kernels and tables as bfloat16; a Cast, which runtimes fold at load, makes them float32 again.

    Vectors (biases, norms, constants) stay: they are little of the file and more sensitive.
    """
    graph, name = model.graph, surgery.unused(model.graph)
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or sum(size > 1 for size in tensor.dims) < 2:
            continue
        stored, weight = name(f"{tensor.name}.bfloat16"), tensor.name
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16), stored))
        casts.append(helper.make_node("Cast", [stored], [weight], name=f"{weight}.cast", to=TensorProto.FLOAT))
    surgery.put_first(graph, casts)
