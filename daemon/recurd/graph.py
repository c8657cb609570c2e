"""Wraps a contract model into the graph of a tick: state is read from and written to arenas, by slot.

The wrapped graph takes ``slots [rows]``, ``fresh [rows]`` bool, the model's own ``lengths`` and ``input``, and one
arena ``[slots, width]`` per state dtype; it gives the heads and the arenas again. Inside, per arena::

    Gather(arena, slots) -> Where(fresh, initial, gathered) -> Split -> the model's states
    the model's next states -> Concat -> scatter into the arena

All states of one dtype share an arena (their columns side by side), so that a tick has one gather and one scatter
however many layers a model has: on a GPU every one of them is a kernel launch. The caller binds each arena's buffer
as input *and* as output, which makes the scatter in place and its cost independent of the number of slots. This is
only right as long as the Gather is the arena's one reader and the scatter depends on it; :func:`wrap` builds it so
and nothing may be added.

This module knows onnx, not onnxruntime: it builds graphs and never runs them.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from recurd.contract import Contract, State
from recurd.errors import ContractError

SLOTS = "recurd.slots"
FRESH = "recurd.fresh"
ROWS = "recurd.rows"

#: Which operator writes rows back. CPU: ScatterND copies whole rows (26 times faster there). CUDA: ScatterND gives a
#: whole row to a single thread, so ScatterElements, which spreads over elements.
Scatter = Literal["rows", "elements"]


@dataclass(frozen=True)
class Arena:
    """Layout of one arena: the states of one dtype, side by side in the contract's order."""

    dtype: str
    states: tuple[State, ...]

    @property
    def name(self) -> str:
        """Input name in the wrapped graph; the output is ``name + ".next"``."""
        return f"recurd.arena.{self.dtype}"

    @property
    def width(self) -> int:
        """Elements of a row."""
        return sum(state.width for state in self.states)

    def initial_row(self) -> npt.NDArray[Any]:
        """The row of a stream at its fresh start, ``[1, width]``."""
        return np.concatenate([state.initial_array().ravel() for state in self.states])[None]

    def split(self, rows: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Rows ``[n, width]`` as states by name, each ``[n, *state.shape]`` (views)."""
        ends = np.cumsum([state.width for state in self.states])[:-1]
        pieces = np.split(rows, ends, axis=1)
        return {s.name: p.reshape(len(rows), *s.shape) for s, p in zip(self.states, pieces, strict=True)}

    def join(self, states: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """The reverse of :meth:`split`; states of other dtypes are ignored."""
        return np.concatenate([states[s.name].reshape(len(states[s.name]), -1) for s in self.states], axis=1)


def arenas(contract: Contract) -> tuple[Arena, ...]:
    """The arenas a contract needs, one per state dtype, in order of first appearance."""
    dtypes = dict.fromkeys(state.dtype for state in contract.states)
    return tuple(Arena(dtype, tuple(s for s in contract.states if s.dtype == dtype)) for dtype in dtypes)


def wrap(model: onnx.ModelProto, contract: Contract, scatter: Scatter) -> onnx.ModelProto:
    """The tick's graph for a contract model, as a new model. Raises :class:`ContractError` where it cannot be built."""
    opset = _opset(model)
    if opset < 17:
        raise ContractError(f"the model uses opset {opset}; recurd needs 17 or later")
    wrapped = onnx.ModelProto()
    wrapped.CopyFrom(model)
    del wrapped.metadata_props[:]
    graph = wrapped.graph
    _refuse_own_names(graph)
    # Exporters leave static shapes behind that are wrong for other batches; the runtime infers them itself.
    del graph.value_info[:]
    states_in = {state.name for state in contract.states}
    states_out = {state.output for state in contract.states}
    _keep(graph.input, lambda value: value.name not in states_in)
    _keep(graph.output, lambda value: value.name not in states_out)

    builder = _Builder(graph)
    rows_column = builder.column(SLOTS, "slots")
    fresh_column = builder.column(FRESH, "fresh")
    for arena in arenas(contract):
        builder.gather(arena, fresh_column)
    before = builder.take()
    for arena in arenas(contract):
        builder.scatter(arena, rows_column, scatter)
    after = builder.take()
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.input.insert(0, helper.make_tensor_value_info(SLOTS, TensorProto.INT64, [ROWS]))
    graph.input.insert(1, helper.make_tensor_value_info(FRESH, TensorProto.BOOL, [ROWS]))
    onnx.checker.check_model(wrapped)
    return wrapped


def row_reader(arena: Arena) -> onnx.ModelProto:
    """A graph ``(arena, slots) -> rows [n, width]``."""
    nodes = [helper.make_node("Gather", [arena.name, SLOTS], [ROWS], name="recurd.read", axis=0)]
    return _row_model(arena, nodes, inputs=[], output=_rows_info(arena, ROWS, "n"))


def row_writer(arena: Arena, scatter: Scatter) -> onnx.ModelProto:
    """A graph ``(arena, slots, rows [n, width]) -> arena``, in place when the arena is bound on both sides."""
    graph = onnx.GraphProto()
    builder = _Builder(graph)
    column = builder.column(SLOTS, "slots")
    builder.write(arena, column, ROWS, scatter)
    nodes = builder.nodes
    model = _row_model(
        arena, nodes, inputs=[_rows_info(arena, ROWS, "n")], output=_rows_info(arena, f"{arena.name}.next", "slots")
    )
    model.graph.initializer.extend(graph.initializer)
    return model


class _Builder:
    """Collects nodes and initializers of the wrapping, all named ``recurd.*`` so that placement can be checked by
    name."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.nodes: list[onnx.NodeProto] = []

    def gather(self, arena: Arena, fresh_column: str) -> None:
        """From an arena to the model's state inputs; declares the arena as input."""
        prefix = arena.name
        self.graph.input.append(_rows_info(arena, prefix, "slots"))
        initial = self.constant(f"{prefix}.initial", arena.initial_row())
        self.node("Gather", [prefix, SLOTS], f"{prefix}.gathered", axis=0)
        # Where, not a product with zero: zero times NaN is NaN.
        self.node("Where", [fresh_column, initial, f"{prefix}.gathered"], f"{prefix}.started")
        widths = self.constant(f"{prefix}.widths", np.array([s.width for s in arena.states], np.int64))
        pieces = [f"{prefix}.{state.name}" for state in arena.states]
        self.nodes.append(
            helper.make_node("Split", [f"{prefix}.started", widths], pieces, name=f"{prefix}.split", axis=1)
        )
        for state, piece in zip(arena.states, pieces, strict=True):
            self.to_state(state, piece)

    def scatter(self, arena: Arena, rows_column: str, scatter: Scatter) -> None:
        """From the model's next states back into the arena; declares the arena as output."""
        prefix = arena.name
        pieces = [self.from_state(state, f"{prefix}.{state.output}") for state in arena.states]
        self.node("Concat", pieces, f"{prefix}.rows", axis=1)
        self.write(arena, rows_column, f"{prefix}.rows", scatter)
        self.graph.output.append(_rows_info(arena, f"{prefix}.next", "slots"))

    def write(self, arena: Arena, rows_column: str, rows: str, scatter: Scatter) -> None:
        """The scatter itself: ``rows`` into the arena at the slots of ``rows_column [n, 1]``."""
        target = f"{arena.name}.next"
        if scatter == "rows":
            self.node("ScatterND", [arena.name, rows_column, rows], target)
            return
        # ScatterElements wants an index for every element. Adding zeros broadcasts without a shape computation, which
        # the runtime would put on the CPU.
        zeros = self.constant(f"{arena.name}.zeros", np.zeros((1, arena.width), np.int64))
        self.node("Add", [rows_column, zeros], f"{arena.name}.indices")
        self.node("ScatterElements", [arena.name, f"{arena.name}.indices", rows], target, axis=0)

    def to_state(self, state: State, piece: str) -> None:
        """``[rows, width]`` to the model's layout, with the batch axis where the model has it."""
        axis, shape = state.batch_axis, list(state.shape)
        if all(size == 1 for size in shape[:axis]):
            self.reshape(piece, [*shape[:axis], -1, *shape[axis:]], state.name)
            return
        self.reshape(piece, [-1, *shape], f"{piece}.batched")
        order = [*range(1, axis + 1), 0, *range(axis + 1, len(shape) + 1)]
        self.node("Transpose", [f"{piece}.batched"], state.name, perm=order)

    def from_state(self, state: State, piece: str) -> str:
        """The model's layout back to ``[rows, width]``."""
        axis, source = state.batch_axis, state.output
        if not all(size == 1 for size in state.shape[:axis]):
            order = [axis, *range(axis), *range(axis + 1, len(state.shape) + 1)]
            self.node("Transpose", [source], f"{piece}.batched", perm=order)
            source = f"{piece}.batched"
        return self.reshape(source, [-1, state.width], f"{piece}.flat")

    def reshape(self, source: str, shape: list[int], target: str) -> str:
        """A reshape to a constant shape with one open axis."""
        self.node("Reshape", [source, self.constant(f"{target}.shape", np.array(shape, np.int64))], target)
        return target

    def column(self, source: str, name: str) -> str:
        """``[rows]`` as ``[rows, 1]``."""
        axis = self.constant(f"recurd.{name}.axis", np.array([1], np.int64))
        return self.node("Unsqueeze", [source, axis], f"recurd.{name}.column")

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"recurd.node.{output}", **attributes))
        return output

    def constant(self, name: str, value: npt.NDArray[Any]) -> str:
        name = name if name.startswith("recurd.") else f"recurd.{name}"
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def take(self) -> list[onnx.NodeProto]:
        """The nodes collected since the last call."""
        nodes, self.nodes = self.nodes, []
        return nodes


def _opset(model: onnx.ModelProto) -> int:
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)


def _refuse_own_names(graph: onnx.GraphProto) -> None:
    names = {name for node in graph.node for name in (*node.input, *node.output)}
    names |= {value.name for value in (*graph.input, *graph.initializer)}
    taken = sorted(name for name in names if name.startswith("recurd."))
    if taken:
        raise ContractError(f"tensor names that start with 'recurd.' are recurd's own; the model uses {taken[0]!r}")


def _keep(values: Any, wanted: Any) -> None:
    kept = [value for value in values if wanted(value)]
    del values[:]
    values.extend(kept)


def _rows_info(arena: Arena, name: str, rows: str) -> onnx.ValueInfoProto:
    element = helper.np_dtype_to_tensor_dtype(np.dtype(arena.dtype))
    return helper.make_tensor_value_info(name, element, [rows, arena.width])


def _row_model(
    arena: Arena, nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], output: onnx.ValueInfoProto
) -> onnx.ModelProto:
    slots = helper.make_tensor_value_info(SLOTS, TensorProto.INT64, ["n"])
    graph = helper.make_graph(nodes, "recurd", [_rows_info(arena, arena.name, "slots"), slots, *inputs], [output])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
