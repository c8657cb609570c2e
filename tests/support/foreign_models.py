"""ONNX files as others make them, written by hand, and the loop their authors would run them in."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

Array = np.ndarray[Any, Any]
#: What a file declares of an axis.
Size = int | str | None
FEATURES, HIDDEN, OUTPUTS = 3, 4, 2


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    """A node; names are separated by spaces, ``-`` stands for an input that is left out."""
    return helper.make_node(
        kind, ["" if name == "-" else name for name in inputs.split()], outputs.split(), **attributes
    )


def port(name: str, shape: Sequence[Size] | None, dtype: str = "float32") -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: Mapping[str, Array] | None = None,
    opset: int = 17,
) -> Path:
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()]
    graph = helper.make_graph(list(nodes), "main_graph", list(inputs), list(outputs), initializers)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8, producer_name="somebody"
    )
    onnx.save(model, path)
    return path


def lstm_weights(features: int = FEATURES) -> dict[str, Array]:
    random = np.random.default_rng(5)
    shapes = {
        "W": (1, 4 * HIDDEN, features),
        "R": (1, 4 * HIDDEN, HIDDEN),
        "B": (1, 8 * HIDDEN),
        "V": (HIDDEN, OUTPUTS),
    }
    weights: dict[str, Array] = {
        name: random.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()
    }
    return weights | {"one": np.array([1]), "zero": np.array([0])}


def lstm_file(
    path: Path,
    *,
    batch: Size = "batch",
    time: Size = "time",
    time_major: bool = False,
    names: Sequence[str] = ("x", "h0", "c0", "y", "hn", "cn"),
    said: bool = True,
    opset: int = 17,
    lengths: str = "-",
    more: Sequence[onnx.NodeProto] = (),
    y: Sequence[Size] | None = None,
) -> Path:
    """One LSTM and a linear layer behind it, as torch.onnx.export leaves them.

    ``more`` nodes stand for the linear layer; they may use ``before`` and make ``y``. ``said``: outputs declare shapes.
    """
    x, h, c, head, hn, cn = names
    if time_major:
        around = [node("Identity", x, "sequence"), node("Squeeze", "Y one", "before")]
        axes: list[Size] = [time, batch]
    else:
        around = [
            node("Transpose", x, "sequence", perm=[1, 0, 2]),
            node("Squeeze", "Y one", "major"),
            node("Transpose", "major", "before", perm=[1, 0, 2]),
        ]
        axes = [batch, time]
    recurrent = node("LSTM", f"sequence W R B {lengths} {h} {c}", f"Y {hn} {cn}", hidden_size=HIDDEN)
    behind = list(more) or [node("MatMul", "before V", head)]
    inputs = [port(x, [*axes, FEATURES]), port(h, [1, batch, HIDDEN]), port(c, [1, batch, HIDDEN])]
    shape = [*axes, OUTPUTS] if y is None else y
    outputs = [
        port(head, shape if said else None),
        *(port(name, [1, batch, HIDDEN] if said else None) for name in (hn, cn)),
    ]
    return save(path, [around[0], recurrent, *around[1:], *behind], inputs, outputs, lstm_weights(), opset)


class Original:
    """A foreign file run as its author would: one stream, one run after the other, the states carried by hand."""

    def __init__(self, path: Path, states: Mapping[str, str], **constants: Any) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._states = dict(states)
        self._constants = constants
        self.states: dict[str, Array] = {}

    def start(self, **states: Array) -> "Original":
        self.states = dict(states)
        return self

    def run(self, **inputs: Array) -> dict[str, Array]:
        """All outputs of one run by name."""
        names = [output.name for output in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(names, inputs | self._constants | self.states), strict=True))
        self.states = {before: found[after] for before, after in self._states.items()}
        return found
