"""Rewrites a traced program where its tracing says less than the contract needs.

A choice of the last step (``out[:, -1]``) becomes a choice of each row's own last valid step. A ``squeeze()`` that
would also take a batch or a time of one away takes only axes that are always one. What is stacked only for one of its
parts to be selected is not stacked.
"""

from typing import Any, cast

import torch
from torch import fx

from recurd_export.pytorch.traced import Graph


def settle(program: torch.export.ExportedProgram) -> None:
    """All rewrites, in place."""
    graph = Graph(program)
    if not any(_writes(node) for node in graph.module.graph.nodes):
        for node in list(graph.module.graph.nodes):
            _take_from_stack(graph, node)
    for node in list(graph.module.graph.nodes):
        _settle_squeeze(graph, node)
        _pick_last_step(graph, node)
    graph.module.graph.eliminate_dead_code()
    graph.module.recompile()


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _take_from_stack(graph: Graph, node: fx.Node) -> None:
    """What is stacked and selected again is taken as it is; then the rest of the stack may be of no use."""
    aten = torch.ops.aten
    if node.target is not aten.select.int:
        return
    source, selected, index = cast(tuple[fx.Node, int, Any], node.args)
    while source.target is aten.slice.Tensor and _sizes(source) == _sizes(cast(fx.Node, source.args[0])):
        source = cast(fx.Node, source.args[0])  # all of it, as ``x[:, 0]`` begins with
    if source.target is not aten.stack.default or not isinstance(index, int):
        return
    parts, axis = cast(tuple[list[fx.Node], int], (*source.args, 0)[:2])
    rank = source.meta["val"].dim()
    if selected % rank == axis % rank:
        node.replace_all_uses_with(parts[index])
        graph.module.graph.erase_node(node)


def _sizes(node: fx.Node) -> list[str]:
    """The sizes of a value as formulas; as numbers they would be compared for the traced sizes only."""
    return [str(size) for size in node.meta["val"].shape]


def _settle_squeeze(graph: Graph, node: fx.Node) -> None:
    aten = torch.ops.aten
    if node.target not in (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims):
        return
    source: Any = node.args[0]
    shape = source.meta["val"].shape
    asked: Any = node.args[1] if len(node.args) > 1 else range(len(shape))
    axes = {axis % len(shape) for axis in ([asked] if isinstance(asked, int) else asked)}
    always = sorted(axis for axis in axes if isinstance(shape[axis], int) and shape[axis] == 1)
    with graph.module.graph.inserting_before(node):
        settled = graph.module.graph.call_function(aten.squeeze.dims, (source, always))
    settled.meta = dict(node.meta)
    node.replace_all_uses_with(settled)
    graph.module.graph.erase_node(node)


def _pick_last_step(graph: Graph, node: fx.Node) -> None:
    keep = _picks_last(graph, node)
    source: Any = node.args[0] if keep is not None else None
    batch_axis = graph.axis(source, graph.batch) if source is not None else None
    if batch_axis is None:
        return
    time_axis: Any = graph.axis(source, graph.time)
    with graph.module.graph.inserting_before(node):
        args = (source, graph.placeholders["lengths"], batch_axis, time_axis)
        last = graph.module.graph.call_function(torch.ops.recurd.last_step.default, args)
        last.meta = {**node.meta, "val": node.meta["val"].squeeze(time_axis) if keep else node.meta["val"]}
        if keep:
            last = graph.module.graph.call_function(torch.ops.aten.unsqueeze.default, (last, time_axis))
            last.meta = dict(node.meta)
    node.replace_all_uses_with(last)
    graph.module.graph.erase_node(node)


def _picks_last(graph: Graph, node: fx.Node) -> bool | None:
    """Whether a node picks the last step: ``True`` when it keeps the axis (``[:, -1:]``), ``None`` when it does not."""
    aten = torch.ops.aten
    if node.target not in (aten.select.int, aten.slice.Tensor, aten.narrow.default):
        return None
    source, axis, start, *end = (*node.args, *([0] * (2 - len(node.args))))[:4]
    if not isinstance(source, fx.Node) or graph.axis(source, graph.time) != axis % source.meta["val"].dim():
        return None
    time = source.meta["val"].shape[axis]
    if not _is_last(start, time):
        return None
    if node.target is aten.select.int:
        return False
    if node.target is aten.narrow.default:
        return True if end[0] == 1 else None
    return True if not end or end[0] is None or _is_end(end[0], time) else None


def _value(index: Any) -> Any:
    return index.meta["val"] if isinstance(index, fx.Node) else index


def _is_last(index: Any, time: torch.SymInt) -> bool:
    index = _value(index)
    return index == -1 if isinstance(index, int) else _same(index, time - 1)


def _is_end(index: Any, time: torch.SymInt) -> bool:
    index = _value(index)
    return index >= 2**62 if isinstance(index, int) else _same(index, time)


def _same(index: Any, size: torch.SymInt) -> bool:
    """Whether two sizes are the same formula; as a condition they would be compared for the traced sizes only."""
    return isinstance(index, torch.SymInt) and bool(index.node.expr - size.node.expr == 0)
