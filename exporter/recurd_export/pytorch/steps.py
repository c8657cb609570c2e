"""Makes sure that a traced model works step by step, and names the operation that does not.

The graph is run whole and in chunks with the states carried on, and padded among others and alone; where the results
differ, the first operation whose own result differs is the one that mixes steps (or streams), whatever layer it is in,
known to us or not.
"""

import itertools
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from recurd_export.errors import ExportError
from recurd_export.pytorch.step_layout import AnyLayout
from recurd_export.pytorch.traced import Graph, NodeError

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


def check(program: torch.export.ExportedProgram, layout: AnyLayout) -> None:
    """Run the graph whole and in chunks, padded and alone; that of one step with other rows and alone.

    Raises :class:`ExportError` naming what mixes steps or rows.
    """
    graph = Graph(program)
    check_all = _check_all if graph.time is not None else _check_one_step
    try:
        # In float64, where no model is so sensitive that rounding looks like mixing.
        check_all(graph.to(torch.float64), layout)
    except RuntimeError:  # the model makes float32 tensors of its own, which do not go together with float64
        try:
            check_all(graph, layout)
        except NodeError as error:
            raise ExportError(
                f"{describe_node(error.node)} does not take every number of steps, as chunks have: {error}"
            ) from error


def _check_all(graph: Graph, layout: AnyLayout) -> None:
    _check_chunks(graph, layout)
    _check_rows(graph, layout)


def _check_chunks(graph: Graph, layout: AnyLayout) -> None:
    cuts, batch = (0, 4, 5, 11), 3
    x = layout.arguments.random(batch, cuts[-1], 10)
    states = [state.fresh(batch) for state in layout.states]
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
            f"{describe_node(node)} {_reason(node)}, so results would depend on how a stream is cut into chunks"
            f"{_advice(node)}"
        )


def _check_rows(graph: Graph, layout: AnyLayout) -> None:
    lengths = (5, 11, 8)
    x = layout.arguments.random(len(lengths), max(lengths), 11)
    states = [state.fresh(len(lengths)) for state in layout.states]
    together = graph.run(x, torch.tensor(lengths, dtype=torch.int32), states, causal=False)
    alone = [
        graph.run(
            x[row : row + 1, :length],
            torch.tensor([length], dtype=torch.int32),
            [state.fresh(1) for state in layout.states],
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
            f"{describe_node(node)} mixes the rows of a batch or reads padded steps, so a stream's results would "
            f"depend on the streams it runs with"
        )


def _check_one_step(graph: Graph, layout: AnyLayout) -> None:
    batch, steps = 3, 4
    x = layout.arguments.random(batch, steps, 12)
    states = [state.fresh(batch) for state in layout.states]
    for step in range(steps):
        together = graph.run(x[:, step], None, states, causal=True)
        alone = [_row_of_step(graph, layout, x[:, step], states, row) for row in range(batch)]
        node = _first(graph, partial(_mixes_rows, graph, together, alone))
        if node is not None:
            raise ExportError(
                f"{describe_node(node)} mixes the rows of a batch, so a stream's results would depend on the streams "
                f"it runs with"
            )
        states = [together[node.name] for node in _outputs(graph)[len(layout.heads) :]]


def _row_of_step(graph: Graph, layout: AnyLayout, x: Tensor, states: list[Tensor], row: int) -> dict[str, Any]:
    of_row = [s.narrow(found.batch_axis, row, 1) for s, found in zip(states, layout.states, strict=True)]
    return graph.run(x[row : row + 1], None, of_row, causal=True)


def _mixes_rows(graph: Graph, together: dict[str, Any], alone: list[dict[str, Any]], node: fx.Node) -> bool:
    axis = graph.axis(node, graph.batch)
    if _folded(node, graph.batch) is not None:
        return False
    whole = together[node.name]
    return any(
        _differ(whole if axis is None else whole.narrow(axis, row, 1), values[node.name])
        for row, values in enumerate(alone)
    )


def _outputs(graph: Graph) -> list[fx.Node]:
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


def _first(graph: Graph, differs: Callable[[fx.Node], bool]) -> fx.Node | None:
    """The first operation whose value differs, if that shows in an output."""
    outputs = _outputs(graph)
    if not any(differs(node) for node in outputs):
        return None
    nodes = [n for n in graph.module.graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), Tensor)]
    return next((node for node in nodes if differs(node)), outputs[0])


def _reason(node: fx.Node) -> str:
    name = _name(node)
    return next((reason for part, reason in _REASONS.items() if part in name), "mixes time steps")


def _advice(node: fx.Node) -> str:
    """What would make a convolution one that can be carried on."""
    if _name(node) not in ("conv1d", "conv2d", "conv3d"):
        return ""
    return (
        f"; an nn.C{_name(node)[1:]} can be exported when it is padded on the left only, with (kernel - 1) * dilation "
        f"constant steps"
    )


def _name(node: fx.Node) -> str:
    target: Any = node.target
    if target is operator.getitem:
        return _name(node.args[0])  # type: ignore[arg-type]
    return str(getattr(target, "_opname", None) or getattr(target, "__name__", target))


def describe_node(node: fx.Node) -> str:
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
    """``model.py, line 12: y = x.mean(1)`` from the innermost frame of the trace that is not ours."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").strip().splitlines()]
    for place, code in reversed(list(itertools.pairwise(lines))):
        if place.startswith("File ") and "/recurd_export/" not in place:
            file, number = place.split(",")[:2]
            return f"{file.removeprefix('File ').strip(chr(34)).rpartition('/')[2]}, {number.strip()}: {code}"
    return ""
