"""Makes sure that a traced model works step by step, and names the operation that does not.

Two things are done to the graph. A choice of the last step (``out[:, -1]``) becomes a choice of each row's own last
valid step. Then the graph is run whole and in chunks with the states carried on, and padded among others and alone;
where the results differ, the first operation whose own result differs is the one that mixes steps (or streams),
whatever layer it is in, known to us or not.
"""

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from recurd_export.errors import ExportError
from recurd_export.pytorch import ops
from recurd_export.pytorch.layout import Layout

#: What two runs may differ by: absolute, and relative to the largest value compared.
ATOL, RTOL = 1e-5, 1e-4

_REASONS = {
    "conv": "is a convolution over time",
    "attention": "is attention over time",
    "softmax": "is a softmax over time",
    "bmm": "multiplies along time, as attention does",
    "matmul": "multiplies along time, as attention does",
    "norm": "normalises over time",
    "pool": "pools over time",
    "cumsum": "accumulates over time",
    "cumprod": "accumulates over time",
    "cummax": "accumulates over time",
    "mean": "averages over time",
    "sum": "sums over time",
    "max": "takes a maximum over time",
    "min": "takes a minimum over time",
    "var": "takes statistics over time",
    "std": "takes statistics over time",
    "flip": "turns time round",
    "roll": "shifts along time",
    "arange": "counts the steps from the start of what it is given",
    "select": "picks one step (only the last one can be picked)",
    "slice": "cuts a part out of time (only the last step can be picked)",
}


class _Graph:
    """The traced program, to be run node by node; owns nothing but references into it."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.program = program
        self.module = program.graph_module
        kinds = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
        self.fixed: list[Tensor] = []
        self.placeholders: dict[str, fx.Node] = {}
        for node in self.module.graph.find_nodes(op="placeholder"):
            spec = kinds[node.name]
            if spec.kind == InputKind.USER_INPUT:
                self.placeholders[node.name] = node
            else:
                values: Any = {**program.state_dict, **program.constants}
                self.fixed.append(values[spec.target].detach())
        self.batch, self.time = (size.node.expr for size in self.placeholders["input"].meta["val"].shape[:2])

    def axes(self, node: fx.Node, symbol: Any) -> list[int]:
        """Which axes of a node's value have the size ``symbol``."""
        value = node.meta.get("val")
        shape = value.shape if isinstance(value, Tensor) else ()
        return [i for i, n in enumerate(shape) if isinstance(n, torch.SymInt) and n.node.expr == symbol]

    def axis(self, node: fx.Node, symbol: Any) -> int | None:
        """The one axis of that size, or ``None``."""
        axes = self.axes(node, symbol)
        return axes[0] if len(axes) == 1 else None

    def run(self, x: Tensor, lengths: Tensor, states: Sequence[Tensor], causal: bool) -> dict[str, Any]:
        """Values of all nodes by name. With ``causal``, second directions run forwards (see ops.forward_only)."""
        recorder = _Recorder(self.module, causal)
        with torch.no_grad():
            recorder.run(*self.fixed, x, lengths, *states)
        return recorder.values


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, causal: bool) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[str, Any] = {}
        self._causal = causal

    def run_node(self, n: fx.Node) -> Any:
        self.values[n.name] = value = super().run_node(n)
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._causal and target in ops.RECURRENT:
            return ops.forward_only(target, args)
        return super().call_function(target, args, kwargs)


def pick_last_steps(program: torch.export.ExportedProgram) -> None:
    """Replace every choice of the last step on the time axis by a choice of each row's own last step, in place."""
    graph = _Graph(program)
    lengths = graph.placeholders["lengths"]
    for node in list(graph.module.graph.nodes):
        keep = _picks_last(graph, node)
        if keep is None:
            continue
        source = node.args[0]
        time_axis, batch_axis = graph.axis(source, graph.time), graph.axis(source, graph.batch)
        if batch_axis is None:
            continue
        with graph.module.graph.inserting_before(node):
            args = (source, lengths, batch_axis, time_axis)
            last = graph.module.graph.call_function(torch.ops.recurd.last_step.default, args)
            last.meta = {**node.meta, "val": node.meta["val"].squeeze(time_axis) if keep else node.meta["val"]}
            if keep:
                last = graph.module.graph.call_function(torch.ops.aten.unsqueeze.default, (last, time_axis))
                last.meta = dict(node.meta)
        node.replace_all_uses_with(last)
        graph.module.graph.erase_node(node)
    graph.module.graph.eliminate_dead_code()
    graph.module.recompile()


def _picks_last(graph: _Graph, node: fx.Node) -> bool | None:
    """Whether a node picks the last step: ``True`` when it keeps the axis (``[:, -1:]``), ``None`` when it does not."""
    if node.target not in (torch.ops.aten.select.int, torch.ops.aten.slice.Tensor):
        return None
    source, axis, start, *end = (*node.args, *([0] * (2 - len(node.args))))[:4]
    if not isinstance(source, fx.Node) or graph.axis(source, graph.time) != axis % source.meta["val"].dim():
        return None
    time = source.meta["val"].shape[axis]
    if not _is_last(start, time):
        return None
    if node.target is torch.ops.aten.select.int:
        return False
    return True if not end or end[0] is None or _is_end(end[0], time) else None


def _value(index: Any) -> Any:
    return index.meta["val"] if isinstance(index, fx.Node) else index


def _is_last(index: Any, time: torch.SymInt) -> bool:
    index = _value(index)
    return index == -1 if isinstance(index, int) else isinstance(index, torch.SymInt) and bool(index == time - 1)


def _is_end(index: Any, time: torch.SymInt) -> bool:
    index = _value(index)
    return index >= 2**62 if isinstance(index, int) else isinstance(index, torch.SymInt) and bool(index == time)


def check(program: torch.export.ExportedProgram, layout: Layout) -> None:
    """Run the graph whole and in chunks, padded and alone. Raises :class:`ExportError` naming what mixes steps."""
    graph = _Graph(program)
    states = [
        torch.from_numpy(value[layer])[:, None]
        for r in layout.recurrences
        for layer in range(r.layers)
        for value in r.initial
    ]
    _check_chunks(graph, layout, states)
    _check_rows(graph, layout, states)


def _check_chunks(graph: _Graph, layout: Layout, initial: Sequence[Tensor]) -> None:
    cuts, batch = (0, 4, 5, 11), 3
    x = layout.arguments.random(batch, cuts[-1], 10)
    states = [state.expand(-1, batch, -1).contiguous() for state in initial]
    whole = graph.run(x, torch.full((batch,), cuts[-1], dtype=torch.int32), states, causal=True)
    chunks = []
    for start, stop in itertools.pairwise(cuts):
        values = graph.run(x[:, start:stop], torch.full((batch,), stop - start, dtype=torch.int32), states, causal=True)
        states = [values[node.name] for node in _outputs(graph)[len(layout.heads) :]]
        chunks.append(values)

    def differs(node: fx.Node) -> bool:
        if len(graph.axes(node, graph.time)) > 1:
            return True  # every step with every other, as attention does
        axis = graph.axis(node, graph.time)
        parts = [values[node.name] for values in chunks]
        if axis is None:
            return _folded(node, graph.time) is None and _differ(whole[node.name], parts[-1])
        return _differ(whole[node.name], torch.cat(parts, axis))

    node = _first(graph, differs)
    if node is not None:
        raise ExportError(
            f"{_describe(node)} {_reason(node)}, so results would depend on how a stream is cut into chunks"
        )


def _check_rows(graph: _Graph, layout: Layout, initial: Sequence[Tensor]) -> None:
    lengths = (5, 11, 8)
    x = layout.arguments.random(len(lengths), max(lengths), 11)
    states = [state.expand(-1, len(lengths), -1).contiguous() for state in initial]
    together = graph.run(x, torch.tensor(lengths, dtype=torch.int32), states, causal=False)
    alone = [
        graph.run(
            x[row : row + 1, :length],
            torch.tensor([length], dtype=torch.int32),
            [state[:, row : row + 1] for state in states],
            causal=False,
        )
        for row, length in enumerate(lengths)
    ]

    def differs(node: fx.Node) -> bool:
        batch_axis, time_axis = graph.axis(node, graph.batch), graph.axis(node, graph.time)
        if _folded(node, graph.time) is not None or _folded(node, graph.batch) is not None:
            return False
        for row, length in enumerate(lengths):
            value = together[node.name]
            if batch_axis is not None:
                value = value.narrow(batch_axis, row, 1)
            if time_axis is not None:
                value = value.narrow(time_axis, 0, length)
            if _differ(value, alone[row][node.name]):
                return True
        return False

    node = _first(graph, differs)
    if node is not None:
        raise ExportError(
            f"{_describe(node)} mixes the rows of a batch or reads padded steps, so a stream's results would depend on "
            f"the streams it runs with"
        )


def _outputs(graph: _Graph) -> list[fx.Node]:
    return list(graph.module.graph.output_node().args[0])


def _folded(node: fx.Node, symbol: Any) -> Any:
    """The size of an axis that mixes ``symbol`` with something else (as after a reshape), or ``None``."""
    for size in node.meta["val"].shape:
        if isinstance(size, torch.SymInt) and size.node.expr != symbol and symbol in size.node.expr.free_symbols:
            return size
    return None


def _differ(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return True
    if not one.is_floating_point():
        return not torch.equal(one, other)
    bound = ATOL + RTOL * float(one.abs().nan_to_num().max()) if one.numel() else 0.0
    return not torch.allclose(one, other, rtol=0, atol=bound, equal_nan=True)


def _first(graph: _Graph, differs: Callable[[fx.Node], bool]) -> fx.Node | None:
    """The first operation whose value differs, if that shows in an output."""
    outputs = _outputs(graph)
    if not any(differs(node) for node in outputs):
        return None
    nodes = [n for n in graph.module.graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), Tensor)]
    return next((node for node in nodes if differs(node)), outputs[0])


def _reason(node: fx.Node) -> str:
    name = _name(node)
    return next((reason for part, reason in _REASONS.items() if part in name), "mixes time steps")


def _name(node: fx.Node) -> str:
    target: Any = node.target
    if target is operator.getitem:
        return _name(node.args[0])  # type: ignore[arg-type]
    return str(getattr(target, "_opname", None) or getattr(target, "__name__", target))


def _describe(node: fx.Node) -> str:
    """The innermost layer a node belongs to, or the operator and the line of the model's own code."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = stack[-1] if stack else ("", "")
    kind = kind if isinstance(kind, str) else kind.__name__
    line = _source_line(node)
    path = path.removeprefix("model").removeprefix(".")
    if kind.startswith("torch.nn.") and path:
        return f"layer '{path}' ({kind.rpartition('.')[2]})"
    where = f" in layer '{path}'" if path else ""
    return f"'{_name(node)}'{where}{f' ({line})' if line else ''}"


def _source_line(node: fx.Node) -> str:
    """``model.py, line 12: y = x.mean(1)`` from the innermost frame of the trace."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").strip().splitlines()]
    for place, code in reversed(list(itertools.pairwise(lines))):
        if place.startswith("File "):
            file, number = place.split(",")[:2]
            return f"{file.removeprefix('File ').strip(chr(34)).rpartition('/')[2]}, {number.strip()}: {code}"
    return ""
