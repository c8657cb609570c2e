"""Contract models made by hand, without any framework, and the same networks in numpy to hold results against."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from recurd import contract as c

Array = np.ndarray[Any, Any]
States = dict[str, Array]


@dataclass(frozen=True, kw_only=True)
class Network:
    """An LSTM of some layers and a linear layer behind it, in all the variations that a contract can describe.

    ``batch_axis`` is that of every state tensor, ``learned`` gives initial values that are not zero, ``counter`` adds a
    state of another dtype that counts steps, ``last`` a head of the last step, ``classes`` makes the input token ids.
    ``spread`` is the standard deviation of the LSTM's weights: beyond ``1 / sqrt(hidden)`` rounding grows step by step.
    """

    name: str = "pump"
    features: int = 3
    hidden: int = 5
    outputs: int = 2
    layers: int = 2
    directions: int = 1
    batch_axis: int = 1
    learned: bool = False
    counter: bool = False
    last: bool = False
    classes: int | None = None
    seed: int = 7
    spread: float = 0.6

    # --- weights ---

    @property
    def weights(self) -> dict[str, Array]:
        random, h, d = np.random.default_rng(self.seed), self.hidden, self.directions
        weights = {}
        for layer in range(self.layers):
            width = self.features if layer == 0 else d * h
            for name, shape in {"W": (d, 4 * h, width), "R": (d, 4 * h, h), "B": (d, 8 * h)}.items():
                weights[f"{name}{layer}"] = random.normal(0, self.spread, shape).astype(np.float32)
        weights["V"] = random.normal(0, 1, (d * h, self.outputs)).astype(np.float32)
        weights["b"] = random.normal(0, 1, self.outputs).astype(np.float32)
        if self.classes is not None:
            weights["table"] = random.normal(0, 1, (self.classes, self.features)).astype(np.float32)
        return weights

    def initial(self) -> States:
        """States of a fresh start, without batch."""
        random = np.random.default_rng(self.seed + 1)
        shape = (self.directions, self.hidden)
        names = [f"lstm.{kind}_l{layer}" for layer in range(self.layers) for kind in "hc"]
        states: States = {n: random.normal(0, self.learned, shape).astype(np.float32) for n in names}
        if self.counter:
            states["count"] = np.array([40 * self.learned], np.int64)
        return states

    # --- the truth ---

    def run(self, x: Array, states: States | None = None) -> tuple[dict[str, Array], States]:
        """Heads by name and next states after all steps of one stream, ``x [steps, features]`` (or ``[steps]`` ids)."""
        weights = {name: value.astype(np.float64) for name, value in self.weights.items()}
        states = dict(self.initial() if states is None else states)
        steps = len(x)
        y = weights["table"][x] if self.classes is not None else x.astype(np.float64)
        for layer in range(self.layers):
            of_layer = [weights[f"{name}{layer}"] for name in "WRB"]
            h, c = states[f"lstm.h_l{layer}"].copy(), states[f"lstm.c_l{layer}"].copy()
            ways = []
            for way in range(self.directions):
                out, h[way], c[way] = _lstm(y[:: -1 if way else 1], *[w[way] for w in of_layer], h[way], c[way])
                ways.append(out[:: -1 if way else 1])
            y = np.concatenate(ways, axis=1)
            states[f"lstm.h_l{layer}"], states[f"lstm.c_l{layer}"] = h, c
        if self.counter:
            states["count"] = states["count"] + steps
        heads = {"output": y @ weights["V"] + weights["b"]}
        if self.last:
            heads["final"] = states[f"lstm.h_l{self.layers - 1}"].ravel()
        return heads, states

    # --- the file ---

    def draw(self, steps: int, random: np.random.Generator) -> Array:
        """Random input."""
        if self.classes is not None:
            return random.integers(0, self.classes, steps)
        return random.standard_normal((steps, self.features), np.float32)

    def contract(self, model: onnx.ModelProto) -> c.Contract:
        states = tuple(
            c.State(
                name=name,
                output=f"{name}.next",
                dtype=value.dtype.name,
                shape=value.shape,
                batch_axis=0 if name == "count" else self.batch_axis,
                initial=c.Tensor.of(value) if self.learned else None,
            )
            for name, value in self.initial().items()
        )
        heads = [c.Head(name="output", dtype="float32", shape=(self.outputs,))]
        if self.last:
            heads.append(c.Head(name="final", dtype="float32", shape=(self.directions * self.hidden,), per="last"))
        dtype, shape = ("float32", (self.features,)) if self.classes is None else ("int64", ())
        return c.Contract(
            name=self.name,
            input=c.Input(dtype=dtype, shape=shape, classes=self.classes),
            heads=tuple(heads),
            states=states,
            causal=self.directions == 1,
            source=c.Source(framework="numpy"),
            weights_sha256=c.weights_sha256(model),
        )

    def golden(self, contract: c.Contract, lengths: tuple[int, ...] = (4, 2)) -> c.Proof:
        """A proof with a golden run as it must come out."""
        random = np.random.default_rng(0)
        x = np.stack([self.draw(max(lengths), random) for _ in lengths])
        runs = [self.run(x[row, :length]) for row, length in enumerate(lengths)]
        outputs = {}
        for head in contract.heads:
            rows = [heads[head.name] for heads, _ in runs]
            if head.per == "step":
                rows = [np.pad(row, [(0, max(lengths) - len(row)), (0, 0)]) for row in rows]
            outputs[head.name] = c.Tensor.of(np.stack(rows).astype(np.float32))
        states = {
            s.name: c.Tensor.of(np.stack([states[s.name] for _, states in runs], axis=s.batch_axis).astype(s.dtype))
            for s in contract.states
        }
        golden = c.Golden(
            input=c.Tensor.of(x), lengths=c.Tensor.of(np.array(lengths, np.int32)), outputs=outputs, states=states
        )
        return c.Proof(atol=1e-5, rtol=1e-5, errors={}, golden=golden)

    def model(self) -> onnx.ModelProto:
        """The ONNX model, without its contract."""
        build = _Graph(self)
        for name, value in self.weights.items():
            build.constant(name, value)
        build.layers()
        return build.finish()

    def save(self, path: Path, **changes: Any) -> Path:
        """Write the contract file; ``changes`` replace fields of the contract, ``proof=True`` adds a true one."""
        model = self.model()
        contract = self.contract(model)
        if changes.get("proof") is True:
            changes["proof"] = self.golden(contract)
        import msgspec

        c.attach(model, msgspec.structs.replace(contract, **changes))
        onnx.save(model, path)
        return path


def _lstm(x: Array, w: Array, r: Array, b: Array, h: Array, c: Array) -> tuple[Array, Array, Array]:
    """ONNX's LSTM, one direction: gates in the order i, o, f, c."""
    out = []
    bias = b[: len(b) // 2] + b[len(b) // 2 :]
    for step in x:
        i, o, f, g = np.split(w @ step + r @ h + bias, 4)
        c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
        h = _sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.array(out).reshape(len(x), len(h)), h, c


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


class _Graph:
    """Collects the nodes of a network."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs = [helper.make_tensor_value_info("lengths", TensorProto.INT32, ["batch"])]
        self.results: list[onnx.ValueInfoProto] = []

    def constant(self, name: str, value: Array) -> str:
        self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def node(self, kind: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, list(outputs), **attributes))
        return outputs[0]

    def state(self, name: str, value: Array) -> None:
        axis = 0 if name == "count" else self.network.batch_axis
        shape: list[int | str] = list(value.shape)
        shape.insert(axis, "batch")
        element = helper.np_dtype_to_tensor_dtype(value.dtype)
        self.inputs.append(helper.make_tensor_value_info(name, element, shape))
        self.results.append(helper.make_tensor_value_info(f"{name}.next", element, shape))

    def layers(self) -> None:
        n = self.network
        ids = n.classes is not None
        shape = ["batch", "time"] if ids else ["batch", "time", n.features]
        self.inputs.insert(0, helper.make_tensor_value_info("input", TensorProto.INT64 if ids else 1, shape))
        x = self.node("Gather", ["table", "input"], "embedded") if ids else "input"
        x = self.node("Transpose", [x], "x", perm=[1, 0, 2])
        merged = self.constant("merged", np.array([0, 0, n.directions * n.hidden], np.int64))
        # between the layout of the states and [directions, batch, hidden]
        there, back = {0: ([1, 0, 2],) * 2, 1: ([0, 1, 2],) * 2, 2: ([0, 2, 1],) * 2}[n.batch_axis]
        for layer in range(n.layers):
            h, c = (self.node("Transpose", [f"lstm.{kind}_l{layer}"], f"{kind}{layer}.in", perm=there) for kind in "hc")
            weights = [f"{name}{layer}" for name in "WRB"]
            outputs = [f"y{layer}", f"h{layer}.out", f"c{layer}.out"]
            direction = "bidirectional" if n.directions == 2 else "forward"
            self.node("LSTM", [x, *weights, "lengths", h, c], *outputs, hidden_size=n.hidden, direction=direction)
            for kind in "hc":
                self.node("Transpose", [f"{kind}{layer}.out"], f"lstm.{kind}_l{layer}.next", perm=back)
            x = self.node("Transpose", [f"y{layer}"], f"y{layer}.t", perm=[0, 2, 1, 3])
            x = self.node("Reshape", [x, merged], f"y{layer}.m")
        x = self.node("Transpose", [x], "rows", perm=[1, 0, 2])
        x = self.node("MatMul", [x, "V"], "product")
        self.node("Add", [x, "b"], "output")

    def finish(self) -> onnx.ModelProto:
        n = self.network
        heads = [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", "time", n.outputs])]
        if n.last:
            width = n.directions * n.hidden
            shape = self.constant("flat", np.array([-1, width], np.int64))
            final = self.node("Transpose", [f"h{n.layers - 1}.out"], "final.t", perm=[1, 0, 2])
            self.node("Reshape", [final, shape], "final")
            heads.append(helper.make_tensor_value_info("final", TensorProto.FLOAT, ["batch", width]))
        if n.counter:
            steps = self.node("Cast", ["lengths"], "steps", to=TensorProto.INT64)
            column = self.node("Unsqueeze", [steps, self.constant("axis", np.array([1]))], "column")
            self.node("Add", ["count", column], "count.next")
        for name, value in n.initial().items():
            self.state(name, value)
        graph = helper.make_graph(self.nodes, n.name, self.inputs, [*heads, *self.results], self.initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
