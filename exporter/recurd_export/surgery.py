"""Small operations on a contract graph that passes between front end and proof are made of.

Names are looked up in nested graphs too: a subgraph reads tensors of the graphs around it by name.
"""

import math
from collections.abc import Callable, Iterator

import onnx

#: Gives names that nothing has, each made from a wish, and no name twice.
Names = Callable[[str], str]


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, those of nested graphs included."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from nodes(inner)


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and all graphs nested in it."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from graphs(inner)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs a node runs itself (``Scan``, ``If``, ``Loop``)."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names a node needs from its own graph: its inputs, and what its nested graphs read from outside."""
    yield from filter(None, node.input)
    for inner in subgraphs(node):
        made = {value.name for value in inner.input} | {tensor.name for tensor in inner.initializer}
        made |= {name for each in inner.node for name in each.output}
        yield from (name for each in inner.node for name in reads(each) if name not in made)
        yield from (value.name for value in inner.output if value.name not in made)


def rename_reads(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Let every node that reads ``old`` read ``new``; the graph's own inputs and outputs keep their names."""
    for node in graph.node:
        rename_read(node, old, new)


def rename_read(node: onnx.NodeProto, old: str, new: str) -> None:
    """Let one node, and the graphs nested in it, read ``new`` for ``old``."""
    for position, name in enumerate(node.input):
        if name == old:
            node.input[position] = new
    for inner in subgraphs(node):
        rename_reads(inner, old, new)
        for value in inner.output:
            # A nested graph may hand a tensor from outside straight on.
            if value.name == old:
                value.name = new


def rename_result(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Let the node that makes ``old`` make ``new``, which all who read ``old`` read from now on."""
    rename_reads(graph, old, new)
    for node in graph.node:
        for position, name in enumerate(node.output):
            if name == old:
                node.output[position] = new


def put_first(graph: onnx.GraphProto, new: list[onnx.NodeProto]) -> None:
    """Let these nodes, in order, come before all others."""
    kept = list(graph.node)
    del graph.node[:]
    graph.node.extend([*new, *kept])


def drop_unread_casts(graph: onnx.GraphProto) -> None:
    """Take out casts nobody reads."""
    read = {name for node in graph.node for name in reads(node)} | {value.name for value in graph.output}
    kept = [node for node in graph.node if node.op_type != "Cast" or node.output[0] in read]
    del graph.node[:]
    graph.node.extend(kept)


def unused(graph: onnx.GraphProto) -> Names:
    """For names that nothing in the graph has."""
    taken = {name for node in nodes(graph) for name in (*node.input, *node.output, node.name)}
    for each in graphs(graph):
        taken |= {value.name for value in (*each.input, *each.output, *each.initializer)}

    def name(wish: str) -> str:
        found, count = wish, 2
        while found in taken:
            found, count = f"{wish}.{count}", count + 1
        taken.add(found)
        return found

    return name


def elements(tensor: onnx.TensorProto) -> int:
    """Numbers in a tensor."""
    return math.prod(tensor.dims)
