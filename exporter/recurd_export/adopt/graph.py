"""Puts a foreign file's own graph inside a contract graph: as one step, or as a whole that takes ``lengths``."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from recurd.contract import Contract
from recurd_export import signature, surgery
from recurd_export.adopt.foreign import Foreign, Port
from recurd_export.adopt.layout import HeadLayout, Layout, order
from recurd_export.adopt.roles import Constant, Roles
from recurd_export.embed import Embedding

RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
#: Where they take the rows' lengths.
SEQUENCE_LENS = 4
LAST = np.iinfo(np.int64).max


def step_model(foreign: Foreign, roles: Roles, layout: Layout, contract: Contract) -> ModelProto:
    """One step as :func:`recurd_export.scan.over_time` takes it: batch first, no time, the context a state."""
    frame = _Frame(foreign.proto, roles, contract)
    x, axis = contract.input.name, len(layout.input.shape)
    if len(contract.states) > len(layout.states):
        context = contract.states[-1]
        x = frame.node("Concat", [context.name, x], axis=axis)
        bounds = [frame.constant(np.array([value])) for value in (-context.shape[-1], LAST, axis)]
        frame.node("Slice", [x, *bounds], context.output)
    if roles.lengths is not None:
        rows = frame.node("Shape", [contract.input.name], start=0, end=1)
        one = numpy_helper.from_array(np.ones(1, roles.lengths.dtype))
        frame.node("ConstantOfShape", [rows], frame.inside(roles.lengths.name), value=one)
    if layout.input.time_axis is not None:
        x = frame.node("Unsqueeze", [x, frame.constant(np.array([1]))])
    frame.enter(x, layout)
    for head, described in zip(layout.heads, contract.heads, strict=True):
        value = frame.head(head)
        if head.time_axis is not None:
            value = frame.node("Squeeze", [value, frame.constant(np.array([1]))])
        frame.node("Identity", [value], described.name)
    inputs = [signature.tensor(contract.input.name, contract.input.dtype, ["batch", *contract.input.shape])]
    inputs += [signature.state(state, state.name) for state in contract.states]
    outputs = [signature.row(head, head.name) for head in contract.heads]
    outputs += [signature.state(state, state.output) for state in contract.states]
    return frame.model(inputs, outputs)


def whole_model(foreign: Foreign, roles: Roles, layout: Layout, contract: Contract) -> ModelProto | None:
    """The graph as it is, told how long every row is; ``None`` where there is nothing to tell it to.

    It is told by its own input for that, or by that of its recurrent nodes, if all of them have it free. Whether the
    rest of the graph heeds a row's end must be found by running.
    """
    proto, lengths = (foreign.proto, roles.lengths) if roles.lengths is not None else _with_lengths(foreign.proto)
    if lengths is None or not layout.whole:
        return None
    frame = _Frame(proto, roles, contract)
    element = helper.np_dtype_to_tensor_dtype(np.dtype(lengths.dtype))
    frame.node("Cast", [contract.lengths], frame.inside(lengths.name), to=element)
    frame.enter(contract.input.name, layout)
    for head, described in zip(layout.heads, contract.heads, strict=True):
        frame.node("Identity", [frame.head(head)], described.name)
    return frame.model(signature.inputs(contract), signature.outputs(contract))


def _with_lengths(proto: ModelProto) -> tuple[ModelProto, Port | None]:
    """The model with an input for lengths to all of its recurrent nodes; none where one cannot have it."""
    wired = ModelProto()
    wired.CopyFrom(proto)
    found = [node for node in wired.graph.node if node.op_type in RECURRENT and not node.domain]
    if not found or len(found) < sum(
        node.op_type in RECURRENT and not node.domain for node in surgery.nodes(proto.graph)
    ):
        return proto, None  # some are inside a branch or a loop
    names = {name for node in wired.graph.node for name in (*node.input, *node.output)}
    names |= {value.name for value in wired.graph.input}
    free = (f"lengths{number}" for number in itertools.count() if f"lengths{number}" not in names)
    port = Port(next(free), "int32", (None,))
    for node in found:
        if len(node.input) > SEQUENCE_LENS and node.input[SEQUENCE_LENS]:
            return proto, None  # it is told something already, which may depend on the input
        node.input.extend([""] * (SEQUENCE_LENS + 1 - len(node.input)))
        node.input[SEQUENCE_LENS] = port.name
    wired.graph.input.append(signature.tensor(port.name, port.dtype, ["batch"]))
    return wired, port


class _Frame:
    """A graph around the foreign one, whose names all get a prefix. Batch and time come in and go out in front."""

    def __init__(self, proto: ModelProto, roles: Roles, contract: Contract) -> None:
        self._contract = contract
        self._proto = proto
        taken = [contract.input.name, *(head.name for head in contract.heads)]
        taken += [name for state in contract.states for name in (state.name, state.output)]
        prefixes = itertools.chain(["model."], (f"model{number}." for number in itertools.count(1)))
        prefix = next(p for p in prefixes if not any(name.startswith(p) for name in taken))
        self._graph = GraphProto()
        self._graph.CopyFrom(proto.graph)
        self._embedding = Embedding(self._graph, prefix)
        # Of names with two dots there are none among the embedded ones but those that have a dot themselves.
        self._names = (f"{prefix}.{number}" for number in itertools.count())
        self._weights: list[TensorProto] = []
        self._before: list[NodeProto] = []
        self._after: list[NodeProto] = []
        self._nodes = self._before
        for name, constant in roles.constants.items():
            self._give(self.inside(name), constant)

    def _give(self, name: str, constant: Constant) -> None:
        if constant.batch_axis is None:
            self._weights.append(numpy_helper.from_array(constant.value, name))
            return
        rows = self.node("Shape", [self._contract.input.name], start=0, end=1)
        sizes = [self.constant(np.array([size])) for size in constant.value.shape]
        sizes[constant.batch_axis] = rows
        self.node("Expand", [self.constant(constant.value), self.node("Concat", sizes, axis=0)], name)

    def inside(self, name: str) -> str:
        """What a name of the file's own graph is called now."""
        return self._embedding.names[name]

    def node(self, kind: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        """Add a node, before the file's own graph until :meth:`enter` was called, and after it from then on."""
        output = next(self._names) if output is None else output
        self._nodes.append(helper.make_node(kind, list(inputs), [output], name=f"{output}.{kind}", **attributes))
        return output

    def constant(self, value: Any) -> str:
        """The name of a new weight."""
        self._weights.append(numpy_helper.from_array(value, next(self._names)))
        return self._weights[-1].name

    def enter(self, x: str, layout: Layout) -> None:
        """Bring ``x`` (batch, perhaps time, first) and the states in, and the next states out."""
        port = layout.input.port
        if port.dtype != self._contract.input.dtype:
            x = self.node("Cast", [x], to=helper.np_dtype_to_tensor_dtype(np.dtype(port.dtype)))
        self.node("Transpose", [x], self.inside(port.name), perm=layout.input.permutation)
        pairs = list(zip(layout.states, self._contract.states, strict=False))
        for mine, state in pairs:
            self.node("Identity", [state.name], self.inside(mine.before.name))
        self._nodes = self._after
        for mine, state in pairs:
            self.node("Identity", [self.inside(mine.after.name)], state.output)

    def head(self, head: HeadLayout) -> str:
        """One of the file's outputs, with batch (and time) in front."""
        name, rank = self.inside(head.port.name), len(head.leading) + len(head.shape)
        return self.node("Transpose", [name], perm=order(rank, head.leading))

    def model(self, inputs: list[ValueInfoProto], outputs: list[ValueInfoProto]) -> ModelProto:
        """The finished model."""
        content = [*self._before, *self._graph.node, *self._after]
        weights = [*self._weights, *self._embedding.weights]
        graph = helper.make_graph(content, self._contract.name, inputs, outputs, weights)
        graph.sparse_initializer.extend(self._embedding.sparse_weights)
        model = ModelProto(ir_version=max(self._proto.ir_version, 8), producer_name="recurd", graph=graph)
        model.opset_import.extend(self._proto.opset_import)
        onnx.checker.check_model(model)
        return model
