"""Models of one step, run over time by an ONNX Scan; the references are loops in numpy."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from recurd.contract import Contract, Head, Input, Source, State, Tensor, check, weights_sha256
from recurd.model import Model
from recurd.verify import EQUAL, RAGGED, Inputs, alone, chunked, drive, together
from recurd_export import ExportError
from recurd_export.scan import over_time
from recurd_export.session import Session

FEATURES, HIDDEN = 3, 4
Array = np.ndarray[Any, Any]
#: One step of one row: the step's features and the states, to the heads and the next states, in the contract's order.
Step = Callable[..., tuple[Array, ...]]


def described(
    heads: Sequence[Head], states: Sequence[State], *, shape: tuple[int, ...] = (FEATURES,), dtype: Any = "float32"
) -> Contract:
    return Contract(
        name="step",
        input=Input(dtype=dtype, shape=shape, classes=5 if dtype == "int64" else None),
        heads=tuple(heads),
        states=tuple(states),
        source=Source(framework="numpy"),
        weights_sha256="",
    )


def state(name: str, *shape: int, axis: int = 0, initial: Array | None = None, dtype: str = "float32") -> State:
    start = None if initial is None else Tensor.of(initial)
    return State(name=name, output=f"{name}.next", dtype=dtype, shape=shape, batch_axis=axis, initial=start)


def model_of(
    nodes: Sequence[onnx.NodeProto], contract: Contract, weights: dict[str, Array] | None = None, opset: int = 17
) -> onnx.ModelProto:
    """A step model; it says no shapes, as foreign files often do not."""

    def values(names: list[tuple[str, str]]) -> list[onnx.ValueInfoProto]:
        types = {name: helper.np_dtype_to_tensor_dtype(np.dtype(dtype)) for name, dtype in names}
        return [helper.make_tensor_value_info(name, element, None) for name, element in types.items()]

    graph = helper.make_graph(
        list(nodes),
        "step",
        values([("input", contract.input.dtype), *((s.name, s.dtype) for s in contract.states)]),
        values([*((h.name, h.dtype) for h in contract.heads), *((s.output, s.dtype) for s in contract.states)]),
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


class Loop:
    """The reference: a loop over rows and steps in numpy. Satisfies recurd.verify.Runner."""

    def __init__(self, step: Step, contract: Contract) -> None:
        self.contract = contract
        self._step = step
        self._states: dict[int, tuple[Array, ...]] = {}

    def run(self, slots: Array, fresh: Array, lengths: Array, input: Array) -> list[Array]:
        heads = self.contract.heads
        found = [
            np.zeros((*(input.shape[:2] if h.per == "step" else input.shape[:1]), *h.shape), h.dtype) for h in heads
        ]
        for row, slot in enumerate(slots):
            states = tuple(s.initial_array() for s in self.contract.states) if fresh[row] else self._states[int(slot)]
            for t in range(lengths[row]):
                outputs = self._step(input[row, t], *states)
                states = outputs[len(heads) :]
                for head, value, into in zip(heads, outputs, found, strict=False):
                    into[(row, t) if head.per == "step" else row] = value
            self._states[int(slot)] = states
        return found

    def read(self, slots: Array) -> dict[str, Array]:
        return {
            s.name: np.stack([self._states[int(slot)][index] for slot in slots])
            for index, s in enumerate(self.contract.states)
        }


def hold(step: onnx.ModelProto, contract: Contract, reference: Step, atol: float = 1e-5) -> onnx.ModelProto:
    """The Scan in a plain session and in the daemon's tick is the loop, and rows do not depend on each other at all."""
    proto = over_time(step, contract)
    check(proto, Contract(**{**_fields(contract), "weights_sha256": weights_sha256(proto)}))
    random = np.random.default_rng(7)
    for lengths in (RAGGED, EQUAL):
        streams = Inputs(contract.input).draw(lengths, random)
        whole, cut = together(lengths), chunked(lengths, random)
        expected = drive(Loop(reference, contract), streams, alone(whole))
        for runner in (
            Session(proto, contract),
            Model(proto, contract, device="cpu", slots=len(lengths), threads=1),
        ):
            exact = drive(runner, streams, alone(whole))
            for name, wanted in expected.items():
                for one, other in zip(wanted, exact[name], strict=True):
                    np.testing.assert_allclose(other, one, rtol=0, atol=atol, err_msg=name)
            for plan in (whole, cut, alone(cut)):
                found = drive(runner, streams, plan)
                for name, wanted in exact.items():
                    for one, other in zip(wanted, found[name], strict=True):
                        np.testing.assert_allclose(other, one, rtol=0, atol=1e-6, err_msg=name)
    return proto


def _fields(contract: Contract) -> dict[str, Any]:
    return {name: getattr(contract, name) for name in contract.__struct_fields__}


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


# --- what is right ---


def average(per: Any = "step", axis: int = 0, opset: int = 17) -> tuple[onnx.ModelProto, Contract]:
    """An exponential average, its weight an initializer; its batch axis anywhere."""
    contract = described([Head(name="mean", dtype="float32", shape=(FEATURES,), per=per)], [state("ema", 1, FEATURES)])
    nodes = [
        node("Unsqueeze", "input one", "row"),
        node("Sub", "row ema", "off"),
        node("Mul", "off rate", "part"),
        node("Add", "ema part", "ema.next"),
        node("Squeeze", "ema.next one", "mean"),
    ]
    weights = {"rate": np.array([0.1, 0.5, 0.9], np.float32), "one": np.array([1], np.int64)}
    return model_of(nodes, contract, weights, opset), contract


def average_step(x: Array, ema: Array) -> tuple[Array, ...]:
    after = ema + (x - ema) * np.array([0.1, 0.5, 0.9], np.float32)
    return after[0], after


@pytest.mark.parametrize("opset", [17, 18, 19, 20])
@pytest.mark.parametrize("per", ["step", "last"])
def test_an_exponential_average_is_the_loop_bit_by_bit(per: str, opset: int) -> None:
    proto = hold(*average(per, opset=opset), average_step, atol=0)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", opset)]


def peephole() -> tuple[onnx.ModelProto, Contract, Step]:
    random = np.random.default_rng(3)
    w = random.normal(size=(FEATURES, 4 * HIDDEN)).astype(np.float32)
    r = random.normal(size=(HIDDEN, 4 * HIDDEN)).astype(np.float32)
    b = random.normal(size=4 * HIDDEN).astype(np.float32)
    p = random.normal(size=(3, HIDDEN)).astype(np.float32)
    nodes = [
        node("MatMul", "input w", "a"),
        node("MatMul", "h r", "ah"),
        node("Add", "a ah", "a2"),
        node("Add", "a2 b", "gates"),
        node("Split", "gates", "i f g o", axis=1),
        *(node("Gather", f"p {k}", f"p{k}") for k in ("k0", "k1", "k2")),
        node("Mul", "c pk0", "ci"),
        node("Mul", "c pk1", "cf"),
        node("Add", "i ci", "i1"),
        node("Add", "f cf", "f1"),
        node("Sigmoid", "i1", "i2"),
        node("Sigmoid", "f1", "f2"),
        node("Tanh", "g", "g2"),
        node("Mul", "f2 c", "fc"),
        node("Mul", "i2 g2", "ig"),
        node("Add", "fc ig", "c.next"),
        node("Mul", "c.next pk2", "co"),
        node("Add", "o co", "o1"),
        node("Sigmoid", "o1", "o2"),
        node("Tanh", "c.next", "tc"),
        node("Mul", "o2 tc", "h.next"),
        node("Identity", "h.next", "output"),
    ]
    weights: dict[str, Array] = {"w": w, "r": r, "b": b, "p": p}
    weights |= {f"k{index}": np.array(index, np.int64) for index in range(3)}
    start = random.normal(size=HIDDEN).astype(np.float32)
    contract = described(
        [Head(name="output", dtype="float32", shape=(HIDDEN,))], [state("h", HIDDEN), state("c", HIDDEN, initial=start)]
    )

    def step(x: Array, h: Array, c: Array) -> tuple[Array, ...]:
        i, f, g, o = np.split(x @ w + h @ r + b, 4)
        c = sigmoid(f + c * p[1]) * c + sigmoid(i + c * p[0]) * np.tanh(g)
        h = sigmoid(o + c * p[2]) * np.tanh(c)
        return h, h, c

    return model_of(nodes, contract, weights), contract, step


def test_a_peephole_lstm_whose_head_is_its_state() -> None:
    step, contract, reference = peephole()
    proto = hold(step, contract, reference)
    assert {"step.w", "step.r", "step.b", "step.p"} <= {tensor.name for tensor in proto.graph.initializer}
    (body,) = [a.g for n in proto.graph.node for a in n.attribute if a.name == "body"]
    assert not body.initializer


def test_branches_inside_a_step_keep_working_and_their_weights_come_out() -> None:
    """Both branches call their weight ``w``, one gives a constant; the condition is the sum of all rows' states."""

    def branch(name: str, *nodes: onnx.NodeProto, **weights: Array) -> onnx.GraphProto:
        output = helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1, 1])  # a stale size of another batch
        initializers = [numpy_helper.from_array(value, key) for key, value in weights.items()]
        return helper.make_graph(list(nodes), name, [], [output], initializers)

    two, three = np.full((FEATURES, 1), 2, np.float32), np.full((FEATURES, 1), 3, np.float32)
    first = branch("first", node("MatMul", "input w", "out"), w=two)
    value = numpy_helper.from_array(three, "any")
    second = branch("second", node("Constant", "", "w", value=value), node("MatMul", "input w", "out"))
    fixed = branch("fixed", node("Constant", "", "out", value=numpy_helper.from_array(np.float32([[7]]), "any")))
    nodes = [
        node("Constant", "", "yes", value=numpy_helper.from_array(np.array(True), "any")),
        node("Not", "yes", "no"),
        node("If", "yes", "twice", then_branch=first, else_branch=second),
        node("If", "no", "thrice", then_branch=first, else_branch=second),
        node("If", "no", "seven", then_branch=second, else_branch=fixed),
        node("Add", "twice thrice", "five"),
        node("Add", "five seven", "sum"),
        # Folded into a constant when the branches are believed to give one row.
        node("Shape", "thrice", "sizes"),
        node("Reshape", "sum sizes", "reshaped"),
        node("Add", "reshaped total", "total.next"),
        node("Neg", "total", "output"),
    ]
    contract = described([Head(name="output", dtype="float32", shape=(1,))], [state("total", 1)])

    def step(x: Array, total: Array) -> tuple[Array, ...]:
        return -total, total + 5 * x.sum(keepdims=True) + 7

    proto = hold(model_of(nodes, contract), contract, step, atol=1e-4)
    found = [numpy_helper.to_array(tensor) for tensor in proto.graph.initializer]
    for weight in (two, three):
        assert any(value.shape == weight.shape and np.array_equal(value, weight) for value in found)


def test_a_loop_inside_a_step_keeps_working() -> None:
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            node("Mul", "carried half", "halved"),
            node("Add", "halved input", "after"),
            node("Identity", "go", "go_on"),
        ],
        "body",
        [value("i", 7, []), value("go", 9, []), value("carried", 1, [1, FEATURES])],
        [value("go_on", 9, []), value("after", 1, [1, FEATURES])],
        [numpy_helper.from_array(np.float32(0.5), "half")],
    )
    nodes = [node("Loop", "count yes h", "h.next", body=body), node("Identity", "h.next", "output")]
    contract = described([Head(name="output", dtype="float32", shape=(FEATURES,))], [state("h", FEATURES)])

    def step(x: Array, h: Array) -> tuple[Array, ...]:
        for _ in range(3):
            h = h * np.float32(0.5) + x
        return h, h

    hold(model_of(nodes, contract, {"count": np.array(3), "yes": np.array(True)}), contract, step)


def test_what_goes_in_may_come_out_as_it_is() -> None:
    """Heads that are the input and a state; states that only move on or are a weight; several layouts and types."""
    heads = [
        Head(name="echo", dtype="float32", shape=(FEATURES,)),
        Head(name="again", dtype="float32", shape=(FEATURES,), per="last"),
        Head(name="late", dtype="float32", shape=(2, FEATURES)),
    ]
    states = [
        state("a", FEATURES),
        state("b", 2, FEATURES, axis=1),
        state("n", dtype="int64", initial=np.array(40)),
        state("fixed", 2),
    ]
    contract = described(heads, states)
    nodes = [
        node("Identity", "input", "echo"),
        node("Identity", "input", "again"),
        node("Transpose", "b", "late", perm=[1, 0, 2]),
        node("Identity", "input", "a.next"),
        node("Unsqueeze", "a zero", "a1"),
        node("Slice", "b one two zero", "b1"),
        node("Concat", "b1 a1", "b.next", axis=0),
        node("Add", "n one", "n.next"),
    ]
    weights: dict[str, Array] = {"zero": np.array([0]), "one": np.array([1]), "two": np.array([2])}
    weights["fixed.next"] = np.float32([[4, 5]])

    def step(x: Array, a: Array, b: Array, n: Array, fixed: Array) -> tuple[Array, ...]:
        return x, x, b, x, np.stack([b[1], a]), n + 1, np.float32([4, 5])

    hold(model_of(nodes, contract, weights), contract, step, atol=0)


@pytest.mark.parametrize("per", ["step", "last"])
def test_token_ids_and_numbers_without_features_go_through(per: Any) -> None:
    contract = described(
        [Head(name="output", dtype="int64", shape=(), per=per)], [state("h", dtype="int64")], shape=(), dtype="int64"
    )
    nodes = [node("Add", "input h", "h.next"), node("Gather", "table input", "output")]
    table = np.array([3, 1, 4, 1, 5])
    hold(model_of(nodes, contract, {"table": table}), contract, lambda x, h: (table[x], h + x), atol=0)


def test_a_padded_step_that_gives_nan_leaves_the_state_alone() -> None:
    contract = described([Head(name="output", dtype="float32", shape=(1,))], [state("h", 1)], shape=(1,))
    nodes = [node("Sqrt", "input", "root"), node("Add", "h root", "h.next"), node("Neg", "h", "output")]
    session = Session(over_time(model_of(nodes, contract), contract), contract)
    x = np.float32([[[4], [9], [16]], [[4], [-1], [-1]]])
    slots = np.array([0, 1])
    session.run(slots, np.array([True, True]), np.array([3, 1], np.int32), x)
    np.testing.assert_array_equal(session.read(slots)["h"], [[9], [2]])


@pytest.mark.parametrize("taken", ["step.w", "time.active"])
def test_names_of_the_contract_never_clash_with_those_of_the_step(taken: str) -> None:
    contract = described([Head(name=taken, dtype="float32", shape=(FEATURES,))], [state("h", FEATURES)])
    nodes = [node("Mul", "input w", "h.next"), node("Identity", "h", taken)]
    weight = np.float32([2, 3, 4])
    hold(model_of(nodes, contract, {"w": weight}), contract, lambda x, h: (h, x * weight), atol=0)


def test_foreign_domains_and_functions_are_kept() -> None:
    contract = described([Head(name="output", dtype="float32", shape=(FEATURES,))], [state("h", FEATURES)])
    nodes = [
        helper.make_node("Gelu", ["input"], ["g"], domain="com.microsoft"),
        helper.make_node("Twice", ["g"], ["t"], domain="mine"),
        node("Add", "t h", "h.next"),
        node("Identity", "h.next", "output"),
    ]
    model = model_of(nodes, contract)
    model.opset_import.extend([helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("mine", 1)])
    opset = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("mine", "Twice", ["a"], ["b"], [node("Add", "a a", "b")], opset))
    erf = np.vectorize(math.erf)

    def step(x: Array, h: Array) -> tuple[Array, ...]:
        h = h + (x * (1 + erf(x / np.sqrt(2)))).astype(np.float32)
        return h, h

    hold(model, contract, step)


def test_what_stood_in_the_file_about_its_author_is_gone() -> None:
    step, contract, _ = peephole()
    step.graph.node[0].doc_string = step.graph.doc_string = step.graph.initializer[0].doc_string = "/home/somebody"
    step.metadata_props.add(key="a", value="/home/somebody")
    step.graph.node[0].metadata_props.add(key="a", value="/home/somebody")
    assert b"/home" not in over_time(step, contract).SerializeToString()


def test_the_step_itself_is_left_as_it_was() -> None:
    step, contract, _ = peephole()
    before = step.SerializeToString(deterministic=True)
    over_time(step, contract)
    assert step.SerializeToString(deterministic=True) == before


# --- what is refused ---


def test_a_step_with_other_inputs_or_outputs_is_refused() -> None:
    step, contract = average()
    extra = onnx.ModelProto()
    extra.CopyFrom(step)
    extra.graph.input.append(helper.make_tensor_value_info("sr", onnx.TensorProto.INT64, []))
    with pytest.raises(ExportError, match="the step's inputs are input, ema, sr; they must be input, ema, each once"):
        over_time(extra, contract)
    del step.graph.output[:]
    with pytest.raises(ExportError, match=r"the step's outputs are none; they must be mean, ema\.next, each once"):
        over_time(step, contract)


def test_an_input_that_is_an_output_is_refused() -> None:
    contract = described([Head(name="input", dtype="float32", shape=(FEATURES,))], [state("h", FEATURES)])
    step = model_of([node("Identity", "h", "h.next")], contract)
    with pytest.raises(ExportError, match="'input' is an input and an output of the step; put an Identity between"):
        over_time(step, contract)
