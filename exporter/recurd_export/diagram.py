"""The nodes of a graph as SVG: one below the other in the order they run, states entering left and leaving right."""

from collections.abc import Iterator

import onnx

from recurd.contract import Contract
from recurd_export import surgery
from recurd_export.markup import Html, tag

#: Nodes drawn at most.
MOST = 48
WIDTH, ROW, BOX, EDGE = 420, 40, 24, 18
LEFT, RIGHT = 122, 298
#: Characters of a name that fit beside a box, and into it.
BESIDE, INSIDE = 20, 30
RECURRENT = ("LSTM", "GRU", "RNN", "Scan", "Loop")


def diagram(model: onnx.ModelProto, contract: Contract) -> Html:
    """The chain of nodes, cut off after the first ones with a count of the rest."""
    nodes = list(model.graph.node)
    shown = nodes[:MOST]
    made_by = {name: row for row, node in enumerate(shown) for name in node.output}
    parts = [_end(contract.input.name, 0)]
    for row, node in enumerate(shown):
        parts.extend(_arrows(node, row, made_by, contract))
        parts.extend(_node(node, row, contract))
    rest = len(nodes) - len(shown)
    heads = ", ".join(head.name for head in contract.heads)
    parts.append(_end(f"and {rest} more" if rest else heads, len(shown) + 1))
    height = ROW * (len(shown) + 2)
    label = f"The graph's {len(nodes)} nodes in the order they run"
    return tag(
        "svg", tag("title", label), *parts, viewBox=f"0 0 {WIDTH} {height}", role="img", class_="chain",
        xmlns="http://www.w3.org/2000/svg",
    )  # fmt: skip


def _top(row: int) -> float:
    return ROW * (row + 1) + (ROW - BOX) / 2


def _end(name: str, row: int) -> Html:
    """What goes in above the chain, or comes out below."""
    y = ROW * row + ROW / 2 + 4
    return tag("text", tag("title", name), _short(name, 56), x=WIDTH / 2, y=y, text_anchor="middle")


def _node(node: onnx.NodeProto, row: int, contract: Contract) -> Iterator[Html]:
    recurrent = " recurrent" if node.op_type in RECURRENT else ""
    box = tag("rect", x=LEFT, y=_top(row), width=RIGHT - LEFT, height=BOX, rx=5, class_=f"box{recurrent}")
    inner = sum(1 for graph in surgery.subgraphs(node) for _ in surgery.nodes(graph))
    name = f"{node.op_type} ({inner} nodes a step)" if inner else node.op_type
    name = f"{node.domain}.{name}" if node.domain not in ("", "ai.onnx") else name
    yield tag("g", tag("title", f"{node.name}: {', '.join(node.output)}"), box,
              tag("text", _short(name, INSIDE), x=WIDTH / 2, y=_top(row) + 16, text_anchor="middle"))  # fmt: skip
    read = set(surgery.reads(node))
    states_in = [state.name for state in contract.states if state.name in read]
    states_out = [state.output for state in contract.states if state.output in node.output]
    yield from _beside(states_in, row, x=2, anchor="start", edge=(LEFT - EDGE, LEFT))
    yield from _beside(states_out, row, x=WIDTH - 2, anchor="end", edge=(RIGHT, RIGHT + EDGE))


def _beside(names: list[str], row: int, *, x: float, anchor: str, edge: tuple[int, int]) -> Iterator[Html]:
    """Names of states next to a box, two at most, and an arrow."""
    if not names:
        return
    shown = names if len(names) <= 2 else [names[0], f"and {len(names) - 1} more"]
    middle = _top(row) + BOX / 2
    for line, name in enumerate(shown):
        y = middle + 4 + 12 * (line - (len(shown) - 1) / 2)
        text = tag("title", ", ".join(names))
        yield tag("text", text, _short(name, BESIDE), x=x, y=y, text_anchor=anchor, class_="faint", font_size=9)
    yield tag("path", d=f"M{edge[0]} {middle}H{edge[1]}m-4 -3l4 3l-4 3", class_="edge")


def _arrows(node: onnx.NodeProto, row: int, made_by: dict[str, int], contract: Contract) -> Iterator[Html]:
    """Straight from the row above, in an arc from further up."""
    sources = {made_by[name] for name in surgery.reads(node) if made_by.get(name, row) < row}
    if contract.input.name in set(surgery.reads(node)):
        sources.add(-1)
    end = _top(row)
    for source in sorted(sources):
        start = ROW * (source + 1) + (ROW + BOX) / 2 if source >= 0 else ROW * 0.75
        if source == row - 1:
            yield tag("path", d=f"M{WIDTH / 2} {start}V{end}m-3 -4l3 4l3 -4", class_="edge")
        else:
            x, bulge = RIGHT - 24, min(20 + 3 * (row - source), 60)
            path = f"M{x} {start}C{x + bulge} {start + 12} {x + bulge} {end - 12} {x} {end}m-1 -5l1 5l5 -2"
            yield tag("path", d=path, class_="edge")


def _short(name: str, most: int) -> str:
    """The name, its end in place where it is too long: states differ in their ends."""
    return name if len(name) <= most else f"…{name[-most + 1 :]}"
