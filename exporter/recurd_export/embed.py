"""Puts a graph inside another: its names get a prefix, and its weights are taken out of it and of the graphs inside it.

Weights stand in the outermost graph, where the contract's hash covers them; the bodies of If, Loop and Scan see the
names around them.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from onnx import GraphProto, NodeProto, SparseTensorProto, TensorProto, helper

from recurd_export import surgery


class Embedding:
    """A graph that is to stand inside another, renamed in place; owns the weights that were in it."""

    def __init__(self, graph: GraphProto, prefix: str) -> None:
        #: The weights, under their new names: to be put into the outermost graph.
        self.weights: list[TensorProto] = []
        self.sparse_weights: list[SparseTensorProto] = []
        self._prefix = prefix
        # The two branches of an If may use one name for two things, which the outer graph must not.
        self._defined = Counter(_definitions(graph))
        #: The new name of everything in the graph.
        self.names = self._graph(graph, {})

    def _graph(self, graph: GraphProto, outer: dict[str, str]) -> dict[str, str]:
        """Rename in place; ``outer`` are the new names of what is visible around it. Gives all names visible inside."""
        scope = dict(outer)
        self._hoist(graph, scope)
        for value in graph.input:
            scope[value.name] = self._prefix + value.name
            value.name = scope[value.name]
        for name in itertools.chain.from_iterable(node.output for node in graph.node):
            scope[name] = self._prefix + name if name else ""
        for node in graph.node:
            self._node(node, scope)
        del graph.value_info[:]  # says sizes that need not be those of other batches
        del graph.quantization_annotation[:]
        graph.doc_string = ""
        return scope

    def _hoist(self, graph: GraphProto, scope: dict[str, str]) -> None:
        weights = _weights(graph)
        for tensor in graph.initializer:
            self._take(tensor, tensor.name, scope)
        for sparse in graph.sparse_initializer:
            scope[sparse.values.name] = self._unique(sparse.values.name)
            sparse.values.name = scope[sparse.values.name]
            self.sparse_weights.append(sparse)
        kept = []
        for node in graph.node:
            if node.op_type == "Constant" and not node.domain and node.attribute[0].name == "value":
                self._take(node.attribute[0].t, node.output[0], scope)
            else:
                kept.append(node)
        replace(graph.node, kept)
        replace(graph.input, [value for value in graph.input if value.name not in weights])
        del graph.initializer[:]
        del graph.sparse_initializer[:]

    def _take(self, tensor: TensorProto, name: str, scope: dict[str, str]) -> None:
        taken = TensorProto()
        taken.CopyFrom(tensor)
        taken.name = scope[name] = self._unique(name)
        taken.doc_string = ""
        self.weights.append(taken)

    def _unique(self, name: str) -> str:
        if self._defined[name] == 1:
            return self._prefix + name
        wanted = next(f"{name}@{number}" for number in itertools.count(1) if not self._defined[f"{name}@{number}"])
        self._defined[wanted] = 1
        return self._prefix + wanted

    def _node(self, node: NodeProto, scope: dict[str, str]) -> None:
        node.name = self._prefix + node.name if node.name else ""
        node.doc_string = ""
        del node.metadata_props[:]
        replace(node.input, [scope[name] if name else "" for name in node.input])
        replace(node.output, [scope[name] for name in node.output])
        for inner in surgery.subgraphs(node):
            self._inner(inner, scope)

    def _inner(self, graph: GraphProto, outer: dict[str, str]) -> None:
        """A graph inside: as :meth:`_graph`, and each of its outputs must still be made by one of its own nodes."""
        scope = self._graph(graph, outer)
        made = {name for node in graph.node for name in node.output} | {value.name for value in graph.input}
        for value in graph.output:
            value.name, name = self._prefix + value.name, scope[value.name]
            if name not in made:
                value.name = self._unique("out")
                graph.node.append(helper.make_node("Identity", [name], [value.name]))
        for value in (*graph.input, *graph.output):
            for dim in value.type.tensor_type.shape.dim:
                dim.Clear()


def _weights(graph: GraphProto) -> set[str]:
    return {tensor.name for tensor in graph.initializer} | {sparse.values.name for sparse in graph.sparse_initializer}


def _definitions(graph: GraphProto) -> Iterator[str]:
    """Every name that is given to something, here and in the graphs inside, as often as that happens."""
    yield from _weights(graph) | {value.name for value in graph.input}
    for node in graph.node:
        yield from node.output
        for inner in surgery.subgraphs(node):
            yield from _definitions(inner)


def replace(repeated: Any, values: Iterable[Any]) -> None:
    """Set a repeated field of a message."""
    values = list(values)
    del repeated[:]
    repeated.extend(values)
