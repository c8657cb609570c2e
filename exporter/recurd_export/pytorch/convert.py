"""A traced program to a plain ONNX model: one fused node a layer, weights inside, batch and time free."""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import onnx
import torch
from onnx import helper

from recurd.contract import Contract
from recurd_export.errors import ExportError
from recurd_export.pytorch import ops
from recurd_export.pytorch.watch import first_line

OPSET = 18
#: protobuf's limit, less room for the contract.
MAX_BYTES = 2**31 - 2**24


def to_onnx(program: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
    """Convert. Raises :class:`ExportError` for operators ONNX does not have and for weights beyond protobuf's limit."""
    weights = sum(t.numel() * t.element_size() for t in program.state_dict.values() if isinstance(t, torch.Tensor))
    if weights > MAX_BYTES:
        raise ExportError(f"the weights take {weights / 2**30:.1f} GiB; an ONNX file with weights inside holds 2 GiB")
    try:
        with quiet():
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=list(outputs),
                custom_translation_table=ops.translations(),
                verbose=False,
            )
    except Exception as error:  # the converter raises many types; the cause says what it could not do
        raise ExportError(_unconvertible(error)) from error
    assert converted is not None
    return converted.model_proto


def _unconvertible(error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        found = re.search(r"\[target=torch\.ops\.([\w.]+)\]", str(cause))
        if found:
            return f"the model uses torch's '{found[1]}', which cannot be converted to ONNX"
        cause = cause.__cause__
    return f"the model cannot be converted to ONNX: {first_line(cause)}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep to ourselves what torch's exporter says about itself: no user of ours can act on it."""
    loggers = [
        logging.getLogger("torch.onnx._internal.exporter._registration"),  # "torchvision is not installed"
        logging.getLogger("torch.fx.experimental.symbolic_shapes"),  # of branches on values, which are refused
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)`", FutureWarning)
            # Said of states kept in attributes, which are hoisted, and of weights computed anew at every call.
            warnings.filterwarnings("ignore", "The tensor attributes? .* assigned during export", UserWarning)
            # Said of our own noting down of the next states.
            warnings.filterwarnings("ignore", "While compiling, we found certain side effects", UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def finish(model: onnx.ModelProto, contract: Contract) -> None:
    """Say the true shapes, keep the outputs apart, and leave nothing of the machine the model was exported on."""
    graph = model.graph
    graph.name = contract.name
    del graph.value_info[:]
    del graph.metadata_props[:]
    model.producer_name, model.producer_version = "recurd", ""
    for node in graph.node:
        # Stack traces of the exporting machine, and several times the size of the graph.
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*graph.input, *graph.output, *graph.initializer):
        del value.metadata_props[:]
    shapes = _shapes(contract)
    for value in (*graph.input, *graph.output):
        element = value.type.tensor_type.elem_type
        value.CopyFrom(helper.make_tensor_value_info(value.name, element, shapes[value.name]))


def _shapes(contract: Contract) -> dict[str, Sequence[Any]]:
    shapes: dict[str, Sequence[Any]] = {
        contract.input.name: ("batch", "time", *contract.input.shape),
        contract.lengths: ("batch",),
    }
    for head in contract.heads:
        shapes[head.name] = ("batch", "time", *head.shape) if head.per == "step" else ("batch", *head.shape)
    for state in contract.states:
        shape = (*state.shape[: state.batch_axis], "batch", *state.shape[state.batch_axis :])
        shapes[state.name] = shapes[state.output] = shape
    return shapes
