"""Sessions of a foreign file, and what goes into their runs."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import GraphProto

from recurd_export import surgery
from recurd_export.adopt.foreign import Foreign, first_line
from recurd_export.adopt.roles import Roles
from recurd_export.errors import ExportError

Array = npt.NDArray[Any]


def open_as_it_is(foreign: Foreign) -> ort.InferenceSession:
    """The very file. Raises :class:`ExportError` when the runtime does not take it."""
    try:
        return ort.InferenceSession(str(foreign.path), _quiet(), providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime raises its own unexported types
        raise ExportError(f"{foreign.path}: the runtime does not take it: {first_line(error)}") from error


def open_relaxed(foreign: Foreign) -> ort.InferenceSession:
    """The model without the sizes it declares, which an example may have left behind.

    Raises :class:`ExportError` when the runtime does not take it.
    """
    relaxed = onnx.ModelProto()
    relaxed.CopyFrom(foreign.proto)
    for graph in surgery.graphs(relaxed.graph):
        _relax(graph)
    try:
        return ort.InferenceSession(relaxed.SerializeToString(), _quiet(), providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime raises its own unexported types
        raise ExportError(f"{foreign.path}: the runtime does not take it: {first_line(error)}") from error


def _quiet() -> ort.SessionOptions:
    """Options for small runs, some of which fail on purpose."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return options


def _relax(graph: GraphProto) -> None:
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            dim.Clear()


def feeds(roles: Roles, x: Array, states: Mapping[str, Array], rows: int, steps: int) -> dict[str, Array]:
    """All inputs of a run; ``x`` and the states in the model's own layout."""
    given = {roles.input.name: x, **states}
    given |= {name: constant.rows(rows) for name, constant in roles.constants.items()}
    if roles.lengths is not None:
        given[roles.lengths.name] = np.full(rows, steps, roles.lengths.dtype)
    return given
