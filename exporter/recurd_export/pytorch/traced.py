"""A traced program, opened up: which axis of a value is batch or time, and what every node gives on real input."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from recurd_export.pytorch import ops
from recurd_export.pytorch.watch import first_line


class NodeError(RuntimeError):
    """An operation of the graph failed."""

    def __init__(self, node: fx.Node, error: Exception) -> None:
        super().__init__(first_line(error))
        self.node = node


class Graph:
    """The traced program, to be run node by node; owns nothing but references into it."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.program = program
        self.module = program.graph_module
        kinds = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
        self.dtype = torch.float32
        self.fixed: list[Tensor] = []
        self.placeholders: dict[str, fx.Node] = {}
        for node in self.module.graph.find_nodes(op="placeholder"):
            spec = kinds[node.name]
            if spec.kind == InputKind.USER_INPUT:
                self.placeholders[node.name] = node
            else:
                values: Any = {**program.state_dict, **program.constants}
                self.fixed.append(values[spec.target].detach())
        shape = self.placeholders["input"].meta["val"].shape
        self.batch = shape[0].node.expr
        #: ``None`` in the graph of one step.
        self.time = shape[1].node.expr if "lengths" in self.placeholders else None

    def axes(self, node: fx.Node, symbol: Any) -> list[int]:
        """Which axes of a node's value have the size ``symbol``."""
        value = node.meta.get("val") if symbol is not None else None
        shape = value.shape if isinstance(value, Tensor) else ()
        return [i for i, n in enumerate(shape) if isinstance(n, torch.SymInt) and n.node.expr == symbol]

    def axis(self, node: fx.Node, symbol: Any) -> int | None:
        """The one axis of that size, or ``None``."""
        axes = self.axes(node, symbol)
        return axes[0] if len(axes) == 1 else None

    def run(self, x: Tensor, lengths: Tensor | None, states: Sequence[Tensor], causal: bool) -> dict[str, Any]:
        """Values of all nodes by name. With ``causal``, second directions run forwards (see ops.forward_only).

        In the graph's own precision, which :meth:`to` changes. The graph of one step takes no ``lengths``. Raises
        :class:`NodeError`.
        """
        recorder = _Recorder(self.module, causal)
        given = () if lengths is None else (lengths,)
        with torch.no_grad():
            try:
                recorder.run(*self.fixed, _as(self.dtype, x), *given, *(_as(self.dtype, state) for state in states))
            except RuntimeError as error:
                assert recorder.node is not None
                raise NodeError(recorder.node, error) from error
        return recorder.values

    def to(self, dtype: torch.dtype) -> "Graph":
        """The same graph with other precision for weights, input and states (not for what it makes itself)."""
        other = copy.copy(self)
        other.dtype = dtype
        other.fixed = [_as(dtype, value) for value in self.fixed]
        return other


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, causal: bool) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[str, Any] = {}
        #: The one that is run.
        self.node: fx.Node | None = None
        self._causal = causal

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        self.values[n.name] = value = super().run_node(n)
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._causal and target in ops.RECURRENT:
            return ops.forward_only(target, args)
        return super().call_function(target, args, kwargs)
