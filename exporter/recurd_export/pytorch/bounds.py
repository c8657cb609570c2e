"""Makes sure that no value a client may send is an index beyond a table: a runtime fails on it, and all its streams.

The daemon refuses token ids beyond the contract's ``classes`` and lets any finite number pass. So every operation of
the traced graph that takes indices out of the input needs indices whose range is known: ids as they came, an argmax,
numbers the graph itself clamps. What is not known to be within the table is refused.
"""

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from recurd_export.errors import ExportError
from recurd_export.pytorch import convert
from recurd_export.pytorch.arguments import Arguments
from recurd_export.pytorch.layout import NO_CLASSES
from recurd_export.pytorch.step_layout import AnyLayout, Found
from recurd_export.pytorch.steps import describe_node
from recurd_export.pytorch.traced import Graph

#: Whole numbers up to here are float32 numbers too.
MAX_FLOAT_ID = 2**24

#: Operators that give some of the numbers they are given, and no others.
_MOVES = frozenset(
    {"alias", "chunk", "clone", "contiguous", "detach", "expand", "expand_as", "flatten", "last_step", "movedim"}
    | {"narrow", "permute", "repeat", "reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "t"}
    | {"transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as"}
)
#: Operators that look at the shape of their argument only.
_SHAPES = frozenset(
    {"sym_size", "sym_stride", "sym_numel"}
    | {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_empty", "new_full"}
)


class _Range(NamedTuple):
    """All a value may hold. ``plain``: it is the input's own numbers, only moved."""

    low: float
    high: float
    plain: bool = False


_ANYTHING = _Range(-math.inf, math.inf)


class _Lookup(NamedTuple):
    """An operation that takes indices from what clients send, and the number of entries it has."""

    node: fx.Node
    indices: fx.Node
    entries: Any


def settle(program: torch.export.ExportedProgram, layout: Found) -> Found:
    """The layout with the bound of its ids as the graph has it.

    Raises :class:`ExportError` for indices that may be out of range and for heads that float32 would change.
    """
    program = _without_writes(program)
    classes = _check_indices(program, layout.arguments)
    _check_casts(program, layout, classes)
    return replace(layout, arguments=replace(layout.arguments, classes=classes))


def _check_indices(program: torch.export.ExportedProgram, arguments: Arguments) -> int | None:
    """The contract's ``classes``, the ids being in range."""
    graph = Graph(program)
    lookups = list(_lookups(graph))
    is_ids = arguments.dtype == "int64"
    unbounded = _Ranges(graph, None)
    plain = [lookup for lookup in lookups if is_ids and unbounded.of(lookup.indices).plain]
    sizes = {lookup.entries for lookup in plain if isinstance(lookup.entries, int)}
    if is_ids and not sizes:
        raise ExportError(NO_CLASSES)
    if len(sizes) > 1 and arguments.step_shape:
        raise ExportError(
            f"a step has ids for embeddings of different sizes ({', '.join(map(str, sorted(sizes)))}), but the "
            f"contract has one bound for all of them (bounds per column are not supported yet); make them of one "
            f"size"
        )
    classes = min(sizes) if is_ids else None
    ranges = _Ranges(graph, classes)
    for lookup in lookups:
        found = ranges.of(lookup.indices)
        if not (isinstance(lookup.entries, int) and found.low >= 0 and found.high < lookup.entries):
            raise ExportError(_refusal(lookup, is_ids))
    return classes


def _check_casts(program: torch.export.ExportedProgram, layout: AnyLayout, classes: int | None) -> None:
    """Whole numbers that are sent as float32 must survive it."""
    graph = Graph(program)
    ranges = _Ranges(graph, classes)
    heads: Any = graph.module.graph.output_node().args[0]
    for head, node in zip(layout.heads, heads, strict=False):  # states follow
        if head.as_float and not -MAX_FLOAT_ID <= ranges.of(node).low <= ranges.of(node).high <= MAX_FLOAT_ID:
            raise ExportError(
                f"the heads are of different types, and '{head.name}' may hold whole numbers that float32 cannot; "
                f"cast the heads to one type in the forward, for example with .float()"
            )


def _without_writes(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program; where it writes into tensors, one that makes new ones instead, so that values stay as made."""
    schemas = [getattr(node.target, "_schema", None) for node in program.graph_module.graph.nodes]
    if any(schema is not None and schema.is_mutable for schema in schemas):
        with convert.quiet():
            return program.run_decompositions({})  # type: ignore[no-any-return]
    return program


def _refusal(lookup: _Lookup, is_ids: bool) -> str:
    entries = f"{lookup.entries} entries" if isinstance(lookup.entries, int) else "a table"
    advice = (
        "clamp them to its range first"
        if is_ids
        else "give the ids as an int64 input of their own, or clamp them to that range before the cast"
    )
    return (
        f"{describe_node(lookup.node)} takes indices of {entries} out of the input, and one beyond them would end the "
        f"run for every stream; {advice}"
    )


def _lookups(graph: Graph) -> Iterator[_Lookup]:
    sent = {node for name, node in graph.placeholders.items() if name != "lengths"}
    for node in graph.module.graph.nodes:
        if _name(node) not in _SHAPES and any(source in sent for source in node.all_input_nodes):
            sent.add(node)
            yield from (lookup for lookup in _indices(node) if lookup.indices in sent)
    for path, inner in graph.module.named_modules():
        if path and isinstance(inner, fx.GraphModule):  # a block of its own; whatever it takes may be the input
            yield from (_Lookup(node, lookup.indices, None) for node in inner.graph.nodes for lookup in _indices(node))


def _indices(node: fx.Node) -> Iterator[_Lookup]:
    """What an operator takes as indices, known by what its schema calls them, and of how many."""
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    for position, name in enumerate(names):
        if name not in ("index", "indices"):
            continue
        given: Any = node.args[position] if position < len(node.args) else node.kwargs.get(name)
        each = list(given) if isinstance(given, list | tuple) else [given]
        tensors = [(axis, one) for axis, one in enumerate(each) if isinstance(one, fx.Node)]
        kinds = {one: getattr(one.meta.get("val"), "dtype", torch.bool) for _, one in tensors}
        for axis, indices in tensors:
            if kinds[indices] != torch.bool:  # a mask chooses, and a plain number is not a tensor's
                yield _Lookup(node, indices, None if torch.bool in kinds.values() else _entries(node, axis))


def _entries(node: fx.Node, place: int) -> Any:
    arguments: Any = node.args
    table = arguments[0]
    shape: Any = table.meta["val"].shape if isinstance(table, fx.Node) else ()
    name = _name(node)
    if name == "embedding":
        return shape[0]
    if name in ("index", "index_put"):
        return shape[place]
    if name in ("gather", "index_select", "scatter", "scatter_add", "index_copy", "index_add"):
        return shape[arguments[1]]
    return None  # an operator that is not known here


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "_opname", "") or "")


class _Ranges:
    """Ranges of a graph's values, its input being ids below ``classes``, or with ``None`` any finite number."""

    def __init__(self, graph: Graph, classes: int | None) -> None:
        input = _Range(-math.inf, math.inf, plain=True) if classes is None else _Range(0, classes - 1)
        self._known: dict[fx.Node, _Range] = {graph.placeholders["input"]: input}
        # The input is finite, and what is only moved or clamped stays so; a result of anything else may be NaN.
        for node in graph.module.graph.nodes:
            if node not in self._known:
                self._known[node] = self._after(node)

    def of(self, node: fx.Node) -> _Range:
        """All that a node's value may hold; of one that is not known, anything."""
        return self._known.get(node, _ANYTHING)

    def _after(self, node: fx.Node) -> _Range:
        value, name = node.meta.get("val"), _name(node)
        if isinstance(value, Tensor) and value.dtype == torch.bool:
            return _Range(0, 1)
        if name in _MOVES or node.target is operator.getitem:
            source = node.args[0]
            is_reread = getattr(node.target, "_overloadname", "") == "dtype"  # the same bits as another type
            return self.of(source) if isinstance(source, fx.Node) and not is_reread else _ANYTHING
        rule = _RULES.get(name)
        return rule(node, self._known) if rule is not None and isinstance(value, Tensor) else _ANYTHING


def _cast(node: fx.Node, known: dict[fx.Node, _Range]) -> _Range:
    source: Any = node.args[0]
    low, high, plain = known.get(source, _ANYTHING)
    before, after = source.meta["val"].dtype, node.meta["val"].dtype
    if not (math.isfinite(low) and math.isfinite(high)):
        is_same = before == after or not (before.is_floating_point or after.is_floating_point)
        return _Range(low, high, plain=True) if plain and is_same else _ANYTHING
    if max(abs(low), abs(high)) > _exact(after):
        return _ANYTHING
    if after.is_floating_point:
        return _Range(math.floor(low), math.ceil(high), plain)
    return _Range(math.trunc(low), math.trunc(high), plain)


def _rounded(node: fx.Node, known: dict[fx.Node, _Range]) -> _Range:
    source: Any = node.args[0]
    low, high, plain = known.get(source, _ANYTHING)
    if not (math.isfinite(low) and math.isfinite(high)):
        return _Range(low, high, plain)
    return _Range(math.floor(low), math.ceil(high), plain)


def _exact(dtype: torch.dtype) -> float:
    if dtype.is_floating_point:
        return 2.0 / torch.finfo(dtype).eps
    return float(torch.iinfo(dtype).max)


def _clamp(node: fx.Node, known: dict[fx.Node, _Range]) -> _Range:
    """A clamp takes NaN for no number, so it bounds whole numbers, and floats only where they cannot be NaN."""
    source: Any = node.args[0]
    low, high, plain = known.get(source, _ANYTHING)
    if source.meta["val"].is_floating_point() and not (plain or (math.isfinite(low) and math.isfinite(high))):
        return _ANYTHING
    name, dtype = _name(node), node.meta["val"].dtype
    at_least: Any = _argument(node, 1, "min") if name != "clamp_max" else None
    at_most: Any = _argument(node, 2 if name != "clamp_max" else 1, "max") if name != "clamp_min" else None
    if not all(bound is None or isinstance(bound, int | float) for bound in (at_least, at_most)):
        return _ANYTHING
    if at_least is not None:
        low, high = (max(side, torch.tensor(at_least, dtype=dtype).item()) for side in (low, high))
    if at_most is not None:
        low, high = (min(side, torch.tensor(at_most, dtype=dtype).item()) for side in (low, high))
    # Floats that were bound are finite still; ids that were bound are no longer the ids that came.
    return _Range(low, high, plain and dtype.is_floating_point)


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)


def _remainder(node: fx.Node, known: dict[fx.Node, _Range]) -> _Range:
    divisor, value = node.args[1], node.meta["val"]
    if isinstance(divisor, int) and divisor > 0 and not value.is_floating_point():
        return _Range(0, divisor - 1)
    return _ANYTHING


def _add(node: fx.Node, known: dict[fx.Node, _Range]) -> _Range:
    """A number added to a value, or taken from it; far from where whole numbers overflow."""
    source, number = node.args[:2]
    value = node.meta["val"]
    if not isinstance(source, fx.Node) or not isinstance(number, int) or len(node.args) > 2 or node.kwargs:
        return _ANYTHING
    if value.is_floating_point():
        return _ANYTHING
    low, high, _ = known.get(source, _ANYTHING)
    if not -MAX_FLOAT_ID <= low <= high <= MAX_FLOAT_ID or abs(number) > MAX_FLOAT_ID:
        return _ANYTHING
    shift = number if _name(node) == "add" else -number
    is_exact = max(abs(low + shift), abs(high + shift)) <= _exact(value.dtype)
    return _Range(low + shift, high + shift) if is_exact else _ANYTHING


def _argmax(node: fx.Node, known: dict[fx.Node, _Range]) -> _Range:
    source: Any = node.args[0]
    axis = _argument(node, 1, "dim")
    size = source.meta["val"].shape[axis] if isinstance(axis, int) else None
    return _Range(0, size - 1) if isinstance(size, int) else _ANYTHING


_RULES: dict[str, Callable[[fx.Node, dict[fx.Node, _Range]], _Range]] = {
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp,
    "clip": _clamp,
    "to": _cast,
    "_to_copy": _cast,
    "type_as": _cast,
    "round": _rounded,
    "floor": _rounded,
    "ceil": _rounded,
    "trunc": _rounded,
    "remainder": _remainder,
    "add": _add,
    "sub": _add,
    "argmax": _argmax,
    "argmin": _argmax,
}
