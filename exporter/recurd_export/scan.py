"""A model of one step, run over time: its graph becomes the body of an ONNX Scan that keeps the contract's rules.

Rows of a batch may have different lengths: the body runs for all of them as long as the longest one, and a row's states
stay as they are beyond its own length (``Where``, so that what a padded step makes of them, be it NaN, is thrown away).
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from recurd.contract import Contract, Head
from recurd_export import signature
from recurd_export.embed import Embedding, replace
from recurd_export.errors import ExportError


def over_time(step: ModelProto, contract: Contract) -> ModelProto:
    """The graph of docs/contract.md section 2 for a model of one step.

    ``step`` takes ``contract.input.name [batch, *shape]`` and every ``state.name`` and nothing else; it gives every
    ``head.name [batch, *shape]`` and every ``state.output``, batch axes where the contract has them. Its opsets and
    local functions are kept. In the result, heads per step are ``[batch, time, *shape]``; a head of the last step is
    the step's value at each row's own last step.

    Raises :class:`ExportError` when the step's inputs or outputs are not the contract's.
    """
    _check_signature(step, contract)
    prefix = _free_prefix(contract)
    body = GraphProto()
    body.CopyFrom(step.graph)
    embedding = Embedding(body, f"{prefix}step.")
    graph = _Builder(contract, prefix, embedding.names, body).outer()
    graph.initializer.extend(embedding.weights)
    graph.sparse_initializer.extend(embedding.sparse_weights)
    model = ModelProto(ir_version=max(step.ir_version, 8), producer_name="recurd", graph=graph)
    model.opset_import.extend(step.opset_import)
    model.functions.extend(step.functions)
    onnx.checker.check_model(model)
    return model


def _check_signature(step: ModelProto, contract: Contract) -> None:
    weights = {tensor.name for tensor in step.graph.initializer}
    sides = (
        ("inputs", step.graph.input, [contract.input.name, *(state.name for state in contract.states)]),
        ("outputs", step.graph.output, _outputs(contract)),
    )
    for side, values, expected in sides:
        found = [value.name for value in values if side == "outputs" or value.name not in weights]
        if Counter(found) != Counter(expected):
            raise ExportError(
                f"the step's {side} are {', '.join(found) or 'none'}; they must be {', '.join(expected)}, each once"
            )
    both = {value.name for value in step.graph.input} & {value.name for value in step.graph.output}
    if both:
        raise ExportError(f"'{min(both)}' is an input and an output of the step; put an Identity between the two")


def _outputs(contract: Contract) -> list[str]:
    return [head.name for head in contract.heads] + [state.output for state in contract.states]


def _free_prefix(contract: Contract) -> str:
    """A prefix no name of the contract starts with; empty in most cases."""
    names = [contract.input.name, contract.lengths, *(state.name for state in contract.states), *_outputs(contract)]
    prefixes = itertools.chain([""], (f"scan{number}." for number in itertools.count(1)))
    return next(
        prefix
        for prefix in prefixes
        if not any(name.startswith((f"{prefix}step.", f"{prefix}time.")) for name in names)
    )


class _Builder:
    """Puts the renamed step into a Scan. ``scope`` says what the step's own names have become."""

    def __init__(self, contract: Contract, prefix: str, scope: dict[str, str], body: GraphProto) -> None:
        self._contract = contract
        self._time = f"{prefix}time."
        self._scope = scope
        self._body = body
        self._weights: list[TensorProto] = []
        self._nodes: list[NodeProto] = []

    def outer(self) -> GraphProto:
        """The finished graph, without the step's own weights."""
        contract = self._contract
        per_step = [head for head in contract.heads if head.per == "step"]
        last = [head for head in contract.heads if head.per == "last"]
        mask = self._mask()
        started = [self._blank(head) for head in last]
        self._finish_body(per_step, last)
        self._node(
            "Scan",
            [*(state.name for state in contract.states), *started, contract.input.name, mask],
            [*(s.output for s in contract.states), *(h.name for h in last), *(h.name for h in per_step)],
            body=self._body,
            num_scan_inputs=2,
            scan_input_axes=[1, 1],
            scan_output_axes=[1] * len(per_step) or None,
        )
        return helper.make_graph(
            self._nodes, contract.name, signature.inputs(contract), signature.outputs(contract), self._weights
        )

    def _mask(self) -> str:
        """``[batch, time]``: whether a step is one of its row's own."""
        sizes = self._node("Shape", [self._contract.input.name], ["steps"], start=1, end=2)
        steps = self._node("Squeeze", [sizes], ["steps.scalar"])
        count = self._node("Cast", [steps], ["count"], to=TensorProto.INT32)
        zero, one = self._constant("zero", np.int32(0)), self._constant("one", np.int32(1))
        numbers = self._node("Range", [zero, count, one], ["numbers"])
        axis = self._constant("axis", np.array([1]))
        column = self._node("Unsqueeze", [self._contract.lengths, axis], ["lengths"])
        return self._node("Less", [numbers, column], ["active"])

    def _blank(self, head: Head) -> str:
        """Zeros for a head of the last step to start from; every row has a step, so none of them is ever seen."""
        rows = self._node("Shape", [self._contract.lengths], [f"{head.name}.rows"])
        sizes = self._constant(f"{head.name}.sizes", np.array(head.shape, np.int64))
        shape = self._node("Concat", [rows, sizes], [f"{head.name}.shape"], axis=0)
        zero = numpy_helper.from_array(np.zeros(1, head.dtype))
        return self._node("ConstantOfShape", [shape], [f"{head.name}.blank"], value=zero)

    def _finish_body(self, per_step: Sequence[Head], last: Sequence[Head]) -> None:
        contract, scope, body = self._contract, self._scope, self._body
        active = f"{self._time}active.now"
        nodes, self._nodes = self._nodes, []
        outputs = []
        for state in contract.states:
            kept = self._select(state.output, scope[state.name], active, state.batch_axis, len(state.shape) + 1)
            outputs.append(signature.state(state, kept))
        carried = [signature.row(head, f"{self._time}{head.name}.carried") for head in last]
        for head, before in zip(last, carried, strict=True):
            outputs.append(signature.row(head, self._select(head.name, before.name, active, 0, len(head.shape) + 1)))
        for head in per_step:
            # What a body gives must be made in it, and once; a step may give its own input, or one thing twice.
            now = self._node("Identity", [scope[head.name]], [f"{head.name}.now"])
            outputs.append(signature.row(head, now))
        body.name = f"{self._time}step"
        body.node.extend(self._nodes)
        x = signature.tensor(scope[contract.input.name], contract.input.dtype, ["batch", *contract.input.shape])
        states = [signature.state(state, scope[state.name]) for state in contract.states]
        replace(body.input, [*states, *carried, x, signature.tensor(active, "bool", ["batch"])])
        replace(body.output, outputs)
        self._nodes = nodes

    def _select(self, new: str, old: str, active: str, axis: int, rank: int) -> str:
        """The step's tensor ``new`` in rows that have this step, ``old`` in the others."""
        axes = [*range(axis), *range(axis + 1, rank)]
        mask = active
        if axes:
            mask = f"{self._time}active.{rank}.{axis}"
            if not any(mask in node.output for node in self._nodes):
                inner = self._constant(f"axes.{rank}.{axis}", np.array(axes))
                self._nodes.append(helper.make_node("Unsqueeze", [active, inner], [mask], name=mask))
        return self._node("Where", [mask, self._scope[new], old], [f"{new}.kept"])

    def _node(self, kind: str, inputs: Sequence[str], outputs: list[str], **attributes: Any) -> str:
        if kind != "Scan":
            outputs = [self._time + name for name in outputs]
        self._nodes.append(
            helper.make_node(kind, inputs, outputs, name=f"{self._time}{kind}.{outputs[0]}", **attributes)
        )
        return outputs[0]

    def _constant(self, name: str, value: Any) -> str:
        self._weights.append(numpy_helper.from_array(np.asarray(value), self._time + name))
        return self._time + name
