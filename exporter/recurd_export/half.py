"""A float32 graph in float16: weights, and all arithmetic but that of the nodes that are to stay in float32.

Every float32 tensor becomes float16 under its old name. A node that stays (its operator knows no float16, or it stands
between a float32 state and its next value) reads and makes *wide* copies, float32 under names of their own; casts are
put between the two only where somebody reads the other kind. Outputs that stay float32 are wide copies under the
output's name. onnxruntime's own converter is not used: it may give a name
twice, and what a nested graph needs it puts outside.
"""

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto, defs, helper, numpy_helper

from recurd.contract import Contract
from recurd_export import surgery
from recurd_export.errors import ExportError

_FLOAT, _HALF = TensorProto.FLOAT, TensorProto.FLOAT16
_LARGEST = float(np.finfo(np.float16).max)


def to_half(model: onnx.ModelProto, contract: Contract, *, states: bool) -> None:
    """Change the model in place; with ``states`` its float32 states too, else they stay, and with them the arithmetic
    between a state and its own next value. Input and heads stay float32.

    Raises :class:`ExportError` when the types in the graph are not known or a weight is too large.
    """
    floats, opset = _float_tensors(model), _opset(model)
    graph = model.graph
    own = {name for state in contract.states for name in (state.name, state.output)} if states else set()
    half = _Half(floats, opset, surgery.unused(graph))
    narrow = _move_ends(graph, floats, half, own)
    inner = {outer: name for name, outer in narrow.items()}
    pairs = [(inner[s.name], inner[s.output]) for s in contract.states if s.name in inner and s.output in inner]
    half.convert(graph, _recurrence(graph, pairs), narrow)
    surgery.drop_unread_casts(graph)
    for value in (*graph.input, *graph.output):
        if value.name in own and value.type.tensor_type.elem_type == _FLOAT:
            value.type.tensor_type.elem_type = _HALF


def _move_ends(graph: onnx.GraphProto, floats: set[str], half: "_Half", own: set[str]) -> dict[str, str]:
    """Give the tensors behind float32 inputs and outputs names of their own; returns them with the outer names."""
    names: dict[str, str] = {}
    for values, rename in ((graph.input, surgery.rename_reads), (graph.output, surgery.rename_result)):
        for value in values:
            if value.type.tensor_type.elem_type == _FLOAT and value.name not in own:
                inner = half.name(f"{value.name}.float16")
                rename(graph, value.name, inner)
                floats.add(inner)
                names[inner] = value.name
    return names


def _float_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of all float32 tensors, those of nested graphs included."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=False).graph
    except Exception as error:  # several types for one fact
        raise ExportError(f"the types in the graph cannot be inferred, which float16 needs: {error}") from error
    known: dict[str, int] = {}
    for graph in surgery.graphs(inferred):
        known |= {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
        known |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in surgery.nodes(model.graph):
        unknown = [name for name in node.output if name and name not in known]
        if unknown:
            raise ExportError(
                f"the type of what '{node.domain or 'ai.onnx'}' operator {node.op_type} gives is not known, "
                f"so the model cannot be put into float16; use precision float32 or bfloat16-weights"
            )
    return {name for name, kind in known.items() if kind == _FLOAT}


def _opset(model: onnx.ModelProto) -> dict[str, int]:
    return {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in model.opset_import}


def _recurrence(graph: onnx.GraphProto, states: Iterable[tuple[str, str]]) -> set[str]:
    """First outputs of the nodes between a state and its own next value: what a stream's memory goes through."""
    stay: set[str] = set()
    for state, after in states:
        ahead = {state}
        for node in graph.node:
            if ahead.intersection(surgery.reads(node)):
                ahead.update(node.output)
        behind = {after}
        for node in reversed(graph.node):
            if behind.intersection(node.output):
                behind.update(surgery.reads(node))
                if ahead.intersection(node.output):
                    stay.add(_key(node))
    return stay


def _key(node: onnx.NodeProto) -> str:
    return next(filter(None, node.output), "")


def _exact(graph: onnx.GraphProto, stay: set[str]) -> set[str]:
    """Float32 constants that are worth their bytes: vectors and numbers that only nodes which stay read.

    In a decay of 0.99 float16 would be a fortieth off what is left of a state.
    """
    small = {
        tensor.name
        for tensor in graph.initializer
        if tensor.data_type == _FLOAT and sum(size > 1 for size in tensor.dims) < 2
    }
    narrow = {name for node in graph.node if _key(node) not in stay for name in surgery.reads(node)}
    return small - narrow - {value.name for value in graph.output}


class _Half:
    """Converts graph after graph; owns what has been given new names."""

    def __init__(self, floats: set[str], opset: dict[str, int], name: "surgery.Names") -> None:
        self.name = name
        self._floats = floats
        self._opset = opset

    def convert(self, graph: onnx.GraphProto, stay: set[str], ends: dict[str, str]) -> None:
        """One graph, in place. ``ends``: wide names that are fixed, of tensors behind inputs and outputs."""
        del graph.value_info[:]
        stay = stay | {_key(node) for node in graph.node if not self._takes_half(node)}
        exact = _exact(graph, stay)
        for tensor in graph.initializer:
            if tensor.name not in exact:
                _narrow(tensor)
        inputs = {value.name for value in graph.input}
        wide = {inner: outer for inner, outer in ends.items() if outer in inputs}
        done = [_cast(outer, inner, _HALF) for inner, outer in wide.items()]
        wide |= {name: name for name in exact}
        for node in list(graph.node):
            if _key(node) in stay:
                done.extend(self._keep(node, wide, ends))
            else:
                self._flip(node)
                done.append(node)
        done.extend(_cast(inner, outer, _FLOAT) for inner, outer in ends.items() if inner not in wide)
        del graph.node[:]
        graph.node.extend(done)

    def _keep(self, node: onnx.NodeProto, wide: dict[str, str], ends: dict[str, str]) -> Iterable[onnx.NodeProto]:
        """The node as it is, on wide tensors, and the casts it needs."""
        for name in dict.fromkeys(surgery.reads(node)):
            if name not in self._floats:
                continue
            if name not in wide:
                wide[name] = ends.get(name) or self.name(f"{name}.float32")
                yield _cast(name, wide[name], _FLOAT)
            surgery.rename_read(node, name, wide[name])
        after = []
        for position, name in enumerate(node.output):
            if name in self._floats:
                wide[name] = ends.get(name) or self.name(f"{name}.float32")
                node.output[position] = wide[name]
                after.append(_cast(wide[name], name, _HALF))
        yield node
        yield from after

    def _takes_half(self, node: onnx.NodeProto) -> bool:
        """Whether the operator is defined for float16 wherever the node has float32."""
        if not any(name in self._floats for name in (*node.input, *node.output)):
            return True
        try:
            schema = defs.get_schema(node.op_type, self._opset.get(node.domain, 1), node.domain)
        except defs.SchemaError:
            return False
        sides = ((node.input, schema.inputs), (node.output, schema.outputs))
        return all(
            "tensor(float16)" in formal[min(position, len(formal) - 1)].types
            for names, formal in sides
            for position, name in enumerate(names)
            if name in self._floats
        )

    def _flip(self, node: onnx.NodeProto) -> None:
        """Let the node itself, and the graphs nested in it, be float16."""
        if node.op_type == "ConstantOfShape" and not node.attribute:
            node.attribute.append(helper.make_attribute("value", helper.make_tensor("value", _HALF, [1], [0.0])))
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "output_datatype") and attribute.i == _FLOAT:
                attribute.i = _HALF
            elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                value = attribute.f if attribute.name == "value_float" else list(attribute.floats)
                tensor = numpy_helper.from_array(np.array(value, np.float16))
                attribute.CopyFrom(helper.make_attribute("value", tensor))
            elif attribute.type == onnx.AttributeProto.TENSOR:
                _narrow(attribute.t)
        for inner in surgery.subgraphs(node):
            self.convert(inner, set(), {})
            for value in (*inner.input, *inner.output):
                if value.type.tensor_type.elem_type == _FLOAT:
                    value.type.tensor_type.elem_type = _HALF


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}.cast", to=to)


def _narrow(tensor: onnx.TensorProto) -> None:
    """A float32 tensor as float16. Constants beyond its range, as masks have them, become its largest number."""
    if tensor.data_type != _FLOAT:
        return
    values = numpy_helper.to_array(tensor)
    finite = np.abs(values, where=np.isfinite(values), out=np.zeros_like(values))
    if values.ndim > 1 and finite.max(initial=0.0) > _LARGEST:
        raise ExportError(f"weight '{tensor.name}' holds {finite.max():.3g}, float16 holds {_LARGEST:.0f} at most")
    limited = np.where(np.isfinite(values), np.clip(values, -_LARGEST, _LARGEST), values)
    tensor.CopyFrom(numpy_helper.from_array(limited.astype(np.float16), tensor.name))
