"""Every kind of recurrent model comes out of the exported file as it went in: whole, in chunks, ragged."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import recurd_export

BATCH_FIRST = {"batch_first": True}


class Plain(nn.Module):
    """One recurrent module and a linear layer."""

    def __init__(self, kind: str = "LSTM", **options: Any) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(5, 6, **(BATCH_FIRST | options))
        self.linear = nn.Linear(12 if options.get("bidirectional") else 6, 3)

    def forward(self, x: Tensor) -> Any:
        y, _ = self.rnn(x)
        return self.linear(y)


class Stacked(nn.Module):
    """Modules in a row with time-local layers before, between and after."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.GELU())
        self.first = nn.LSTM(7, 8, 2, batch_first=True, dropout=0.5)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.GRU(8, 6, batch_first=True)
        self.drop = nn.Dropout(0.5)
        self.third = nn.RNN(6, 5, nonlinearity="relu", batch_first=True)
        self.norm.running_mean = torch.randn(8)
        self.norm.running_var = torch.rand(8) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.first(self.before(x))
        y = self.norm(y.transpose(1, 2)).transpose(1, 2)
        y, _ = self.second(F.relu(y))
        y, _ = self.third(self.drop(y))
        return y.softmax(dim=-1)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.rnn = nn.LSTM(5, 6)
        self.linear = nn.Linear(6, 11)

    def forward(self, ids: Tensor) -> Tensor:
        y, _ = self.rnn(self.embedding(ids))
        return F.log_softmax(self.linear(y), dim=-1)


class Flattened(Tokens):
    """Steps and rows in one axis, as many training loops want it."""

    def forward(self, ids: Tensor) -> Tensor:
        y, _ = self.rnn(self.embedding(ids))
        return self.linear(y.reshape(-1, 6))


class Last(Plain):
    def __init__(self, how: str, kind: str = "LSTM", **options: Any) -> None:
        super().__init__(kind, **options)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.rnn(x)
        h = state[0] if isinstance(state, tuple) else state
        steps = x.shape[1]
        chosen = {
            "minus one, all": lambda: y[:, -1, :],
            "by size": lambda: y[:, steps - 1],
            "kept": lambda: y[:, -1:],
            "time-major": lambda: y[-1],
            "h_n": lambda: h[-1],
            "h_n squeezed": lambda: h.squeeze(0),
            "both ends": lambda: torch.cat([h[-2], h[-1]], dim=1),
            "transposed": lambda: y.transpose(0, 1)[-1],
        }[self.how]()
        return self.linear(chosen)


class Pair(NamedTuple):
    mean: Tensor
    scale: Tensor


@dataclass
class Record:
    score: Tensor
    detail: dict[str, Tensor] = field(default_factory=dict)


class Heads(nn.Module):
    def __init__(self, shape: str) -> None:
        super().__init__()
        self.rnn = nn.GRU(5, 6, batch_first=True)
        self.a, self.b = nn.Linear(6, 2), nn.Linear(6, 3)
        self.shape = shape

    def forward(self, x: Tensor) -> Any:
        y, h = self.rnn(x)
        a, b = self.a(y), self.b(y[:, -1])
        if self.shape == "tuple":
            return a, b
        if self.shape == "list with states":
            return [a, b, h]
        if self.shape == "dict":
            return {"steps": a, "input": b, "hidden": h}
        if self.shape == "classes":
            return {"logits": a, "class": a.argmax(-1)}
        return Pair(a, b) if self.shape == "named tuple" else Record(a, {"last": b})


class PassesState(nn.Module):
    """Takes its state and gives it back."""

    def __init__(self, kind: str = "LSTM", **options: Any) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(5, 6, 2, **(BATCH_FIRST | options))
        self.linear = nn.Linear(12 if options.get("bidirectional") else 6, 3)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        y, state = self.rnn(x, state)
        return self.linear(y), state


class NeedsStates(nn.Module):
    """Must be given the states of its layers, one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.LSTM(5, 6, batch_first=True), nn.GRU(6, 4, batch_first=True)

    def forward(self, x: Tensor, states: list[Any]) -> Any:
        y, first = self.one(x, states[0])
        y, second = self.two(y, states[1])
        return y, [first, second.clone()]


class Zeros(Plain):
    def forward(self, x: Tensor) -> Tensor:
        # len() makes Python ask for a plain number, which a tracer does not like.
        h = torch.zeros(self.rnn.num_layers, len(x), self.rnn.hidden_size, device=x.device)
        self.rnn.flatten_parameters()
        y, _ = self.rnn(x, (h, h.clone()))
        return self.linear(y)


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 6, 2, bidirectional=False, batch_first=True)
        self.gru = nn.GRU(6, 6, batch_first=True)
        self.h0 = nn.Parameter(torch.randn(2, 1, 6))
        self.seed = nn.Parameter(torch.randn(4))
        self.to_c = nn.Linear(4, 12)
        self.register_buffer("start", torch.full((1, 1, 6), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        c0 = torch.tanh(self.to_c(self.seed)).view(2, 1, 6)
        y, _ = self.rnn(x, (self.h0.expand(-1, batch, -1).contiguous(), c0.repeat(1, batch, 1)))
        y, _ = self.gru(y, self.start.expand(1, batch, 6).contiguous())
        return y


class Twice(nn.Module):
    """One module called twice in a forward has two states."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(5, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        y, _ = self.rnn(y)
        return y


class Residual(nn.Module):
    """Grids a step, weights tied, a list of modules, x used again."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.LSTM(6, 6, batch_first=True) for _ in range(3)])
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        batch, steps = x.shape[:2]
        y = x.reshape(batch, steps, -1)
        for layer in self.layers:
            y = y + layer(y)[0] * self.scale
        return y.view(batch, steps, 2, 3)


class Signal(nn.Module):
    """One number a step, without a feature axis."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(1, 6, batch_first=True)
        self.linear = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x.unsqueeze(-1))
        return self.linear(y).squeeze(-1)


class Squeezed(Plain):
    """squeeze() without an axis also takes a batch of one away; the exported file must not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze()


class Kept(nn.Module):
    """Keeps its state in an attribute, begins anew when the batch size changes."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 6, 2, batch_first=True)
        self.state: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.state is None or self.state[0].size(1) != x.size(0):
            self.state = tuple(torch.zeros(2, x.size(0), 6) for _ in range(2))
        y, state = self.rnn(x, self.state)
        self.state = tuple(part.detach() for part in state)
        return y


class KeptByHand(nn.Module):
    """Keeps its state in a buffer that a method of its own makes; any other batch size is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(5, 6, batch_first=True)
        self.register_buffer("hidden", torch.zeros(1, 2, 6))

    def init_hidden(self, batch: int) -> None:
        self.hidden = torch.zeros(1, batch, 6)

    def forward(self, x: Tensor) -> Tensor:
        y, h = self.rnn(x, self.hidden)
        self.hidden.copy_(h)
        return y


class KeptLearned(Kept):
    """Begins from a learned state, keeps a list of them, one a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.RNN(5, 5, batch_first=True) for _ in range(2)])
        self.start = nn.Parameter(torch.randn(1, 1, 5))
        self.state = [None, None]

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            h = self.state[number]
            if h is None or h.size(1) != x.size(0):
                h = self.start.repeat(1, x.size(0), 1)
            x, self.state[number] = layer(x, h)
        return x


class Chars(Tokens):
    """A language model as it is often written: state in an attribute, steps and rows in one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None

    def forward(self, ids: Tensor) -> Tensor:
        if self.state is None or self.state[0].size(1) != ids.size(1):
            self.state = (torch.zeros(1, ids.size(1), 6), torch.zeros(1, ids.size(1), 6))
        y, state = self.rnn(self.embedding(ids), self.state)
        self.state = tuple(part.detach() for part in state)
        return F.log_softmax(self.linear(y), dim=-1).view(-1, 11)


class Remembers(nn.Module):
    """Remembers the batch size in a number, as AWD-LSTM does, and makes its states anew, or cuts them, by it."""

    def __init__(self, kind: str, keep: Callable[[Any], Any], *, batch: int = 1, cuts: bool = False) -> None:
        super().__init__()
        self.keep, self.bs, self.cuts = keep, batch, cuts
        one = getattr(nn, kind)
        self.layers = nn.ModuleList([one(5, 6, 2, dropout=0.3), one(6, 4)])
        self.reset()

    def reset(self) -> None:
        self.states = self.keep(self._zeros(layer) for layer in self.layers)

    def _zeros(self, layer: Any) -> Any:
        parts = [torch.zeros(layer.num_layers, self.bs, layer.hidden_size) for _ in range(2)]
        return self.keep(parts) if layer.mode == "LSTM" else parts[0]

    def _each(self, states: Any, change: Callable[[Tensor], Tensor]) -> Any:
        return change(states) if isinstance(states, Tensor) else self.keep(self._each(s, change) for s in states)

    def forward(self, x: Tensor) -> Tensor:
        more = x.size(1) - self.bs
        if x.size(1) != self.bs and self.cuts:
            self.states = self._each(self.states, lambda s: F.pad(s, (0, 0, 0, more)) if more > 0 else s[:, :more])
            self.bs = x.size(1)
        elif x.size(1) != self.bs:
            self.bs = x.size(1)
            self.reset()
        states = []
        for layer, state in zip(self.layers, self.states, strict=True):
            x, state = layer(x, state)
            states.append(self._each(state, Tensor.detach))
        self.states = self.keep(states)
        return x


def _begun_anew(model: Any, x: Tensor) -> dict[str, Tensor]:
    model.bs = x.size(0)
    model.reset()
    return {"output": model(x.transpose(0, 1)).transpose(0, 1)}


def _used(model: nn.Module, batch: int = 7) -> nn.Module:
    """After training, with a state of some other batch left behind."""
    model(torch.zeros(batch, 3, 5))
    return model


class Logarithm(Plain):
    """Takes positive numbers only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.log())


Call = Callable[[nn.Module, Tensor], dict[str, Tensor]]


def _plainly(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {"output": model(x)}


def _time_major(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {"output": model(x.transpose(0, 1)).transpose(0, 1)}


def _time_major_last(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {"output": model(x.transpose(0, 1))}


def _first(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {"output": model(x)[0]}


@dataclass(frozen=True)
class Case:
    """A model, an example of what it takes, and how torch users call it on a whole batch-first input."""

    build: Callable[[], nn.Module]
    example: Any = field(default_factory=lambda: torch.zeros(2, 16, 5))
    call: Call = _plainly
    nodes: int = 1
    causal: bool = True


def _ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


ZOO: dict[str, Case] = {
    "LSTM": Case(Plain),
    "GRU of 2 layers without bias": Case(lambda: Plain("GRU", num_layers=2, bias=False), nodes=2),
    "RNN of 3 layers": Case(lambda: Plain("RNN", num_layers=3), nodes=3),
    "relu RNN both ways": Case(lambda: Plain("RNN", nonlinearity="relu", bidirectional=True), causal=False),
    "LSTM of 3 layers with dropout": Case(lambda: Plain("LSTM", num_layers=3, dropout=0.4), nodes=3),
    "LSTM both ways, 2 layers": Case(lambda: Plain("LSTM", num_layers=2, bidirectional=True), nodes=2, causal=False),
    "GRU both ways, 2 layers": Case(lambda: Plain("GRU", num_layers=2, bidirectional=True), nodes=2, causal=False),
    "time-major LSTM": Case(lambda: Plain(batch_first=False), torch.zeros(16, 2, 5), _time_major),
    "time-major GRU, square example": Case(lambda: Plain("GRU", batch_first=False), torch.zeros(4, 4, 5), _time_major),
    "the bare layer": Case(lambda: nn.LSTM(5, 6, 2, batch_first=True), call=_first, nodes=2),
    "stacked modules": Case(Stacked, nodes=4),
    "tokens": Case(Tokens, _ids(16, 2), _time_major),
    "tokens, flattened": Case(
        Flattened,
        _ids(16, 2),
        lambda m, x: {"output": m(x.transpose(0, 1)).view(x.shape[1], x.shape[0], -1).transpose(0, 1)},
    ),
    "last step": Case(lambda: Last("minus one, all", "GRU")),
    "last step by size": Case(lambda: Last("by size")),
    "last step kept": Case(lambda: Last("kept")),
    "last step transposed": Case(lambda: Last("transposed")),
    "last step, time-major": Case(
        lambda: Last("time-major", batch_first=False), torch.zeros(16, 2, 5), _time_major_last
    ),
    "last step as h_n": Case(lambda: Last("h_n", num_layers=2), nodes=2),
    "last step as h_n, time-major": Case(
        lambda: Last("h_n", "GRU", batch_first=False), torch.zeros(16, 2, 5), _time_major_last
    ),
    "last step as h_n squeezed": Case(lambda: Last("h_n squeezed")),
    "last step both ways": Case(lambda: Last("both ends", "GRU", bidirectional=True), causal=False),
    "tuple of heads": Case(
        lambda: Heads("tuple"), call=lambda m, x: dict(zip(("output_0", "output_1"), m(x), strict=True))
    ),
    "list of heads with states": Case(
        lambda: Heads("list with states"), call=lambda m, x: dict(zip(("output_0", "output_1"), m(x)[:2], strict=True))
    ),
    "dict of heads": Case(
        lambda: Heads("dict"), call=lambda m, x: {"steps": m(x)["steps"], "input_out": m(x)["input"]}
    ),
    "named tuple of heads": Case(lambda: Heads("named tuple"), call=lambda m, x: m(x)._asdict()),
    "dataclass of heads": Case(
        lambda: Heads("dataclass"), call=lambda m, x: {"score": m(x).score, "detail.last": m(x).detail["last"]}
    ),
    "heads of two types": Case(lambda: Heads("classes"), call=lambda m, x: m(x)),
    "passes its state": Case(PassesState, call=_first, nodes=2),
    "passes its state, which is in the example": Case(
        lambda: PassesState("GRU"), (torch.zeros(2, 16, 5), torch.zeros(2, 2, 6)), _first, nodes=2
    ),
    "passes two states, time-major": Case(
        lambda: PassesState(batch_first=False),
        (torch.zeros(9, 4, 5), (torch.zeros(2, 4, 6), torch.zeros(2, 4, 6))),
        lambda m, x: {"output": m(x.transpose(0, 1))[0].transpose(0, 1)},
        nodes=2,
    ),
    "needs its states": Case(
        NeedsStates,
        (torch.zeros(3, 16, 5), [(torch.zeros(1, 3, 6), torch.zeros(1, 3, 6)), torch.zeros(1, 3, 4)]),
        lambda m, x: {
            "output": m(x, [(torch.zeros(1, len(x), 6), torch.zeros(1, len(x), 6)), torch.zeros(1, len(x), 4)])[0]
        },
        nodes=2,
    ),
    "explicit zeros": Case(Zeros),
    "learned initial states": Case(Learned, nodes=3),
    "one module twice": Case(Twice, nodes=2),
    "residual": Case(Residual, torch.zeros(2, 16, 2, 3), nodes=3),
    "one number a step": Case(Signal, torch.zeros(2, 16)),
    "squeezed": Case(Squeezed, call=lambda m, x: {"output": m(x).reshape(x.shape[:2])}),
    "keeps its state": Case(lambda: _used(Kept()), call=lambda m, x: {"output": _forget(m, None)(x)}, nodes=2),
    "keeps its state in a buffer": Case(KeptByHand, call=lambda m, x: {"output": (m.init_hidden(len(x)), m(x))[1]}),
    "keeps learned states": Case(
        lambda: _used(KeptLearned()), call=lambda m, x: {"output": _forget(m, [None, None])(x)}, nodes=2
    ),
    "remembers the batch size": Case(
        lambda: _used(Remembers("LSTM", tuple)), torch.zeros(16, 2, 5), _begun_anew, nodes=3
    ),
    "remembers the example's batch size": Case(
        lambda: Remembers("GRU", list, batch=2), torch.zeros(16, 2, 5), _begun_anew, nodes=3
    ),
    "remembers the batch size, and cuts": Case(
        lambda: Remembers("RNN", list, cuts=True), torch.zeros(16, 7, 5), _begun_anew, nodes=3
    ),
    "a language model": Case(
        Chars,
        _ids(16, 2),
        lambda m, x: {"output": _forget(m, None)(x.transpose(0, 1)).view(x.shape[1], x.shape[0], -1).transpose(0, 1)},
    ),
    "weight norm": Case(lambda: _normed(Plain())),
    "takes positive numbers": Case(Logarithm, torch.rand(2, 16, 5) + 0.1),
}


def _forget(model: nn.Module, state: Any) -> nn.Module:
    model.state = state
    return model


def _normed(model: Plain) -> nn.Module:
    nn.utils.parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    return model


class Exported(NamedTuple):
    case: Case
    model: nn.Module
    report: Any
    plain: Any

    def torch_heads(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """What torch gives for whole rows of one length."""
        self.model.eval()
        with torch.no_grad():
            return {name: head.numpy() for name, head in self.case.call(self.model, torch.from_numpy(x)).items()}

    def random_input(self, batch: int, steps: int, seed: int) -> np.ndarray:
        """Input the model takes."""
        described, generator = self.plain.contract["input"], np.random.default_rng(seed)
        shape = (batch, steps, *described["shape"])
        if described["dtype"] == "int64":
            return generator.integers(0, described["classes"], shape)
        x = generator.standard_normal(shape).astype(np.float32)
        return np.abs(x) + np.float32(0.1) if isinstance(self.model, Logarithm) else x


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, plain_run: Any) -> Callable[[str], Exported]:
    """Exports a model of the zoo, once in all tests."""
    done: dict[str, Exported] = {}
    folder = tmp_path_factory.mktemp("zoo")

    def get(name: str) -> Exported:
        if name not in done:
            torch.manual_seed(7)
            case = ZOO[name]
            model = case.build()
            path = folder / f"{name.replace(' ', '_')}.onnx"
            report = recurd_export.export(model, case.example, path, name="zoo")
            done[name] = Exported(case, model, report, plain_run(path))
        return done[name]

    return get


def _assert_heads(expected: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("name", ZOO)
def test_a_whole_batch_gives_what_torch_gives(exported: Callable[[str], Exported], name: str) -> None:
    found = exported(name)
    x = found.random_input(4, 9, 1)

    heads, _ = found.plain.run(x, found.plain.initial(4))

    _assert_heads(found.torch_heads(x), heads)


@pytest.mark.parametrize("name", ZOO)
def test_padded_rows_give_what_each_gives_alone(exported: Callable[[str], Exported], name: str) -> None:
    found = exported(name)
    lengths = [9, 1, 5, 3]
    x = found.random_input(4, 9, 2)

    heads, states = found.plain.run(x, found.plain.initial(4), lengths)

    per = {head["name"]: head["per"] for head in found.plain.contract["heads"]}
    axes = {state["name"]: state["batch_axis"] for state in found.plain.contract["states"]}
    for row, steps in enumerate(lengths):
        alone = x[row : row + 1, :steps].copy()
        _, alone_states = found.plain.run(alone, found.plain.initial(1))
        expected = found.torch_heads(alone)
        got = {name: v[row : row + 1, :steps] if per[name] == "step" else v[row : row + 1] for name, v in heads.items()}
        _assert_heads({name: value.reshape(got[name].shape) for name, value in expected.items()}, got)
        for state, axis in axes.items():
            np.testing.assert_allclose(states[state].take([row], axis), alone_states[state], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if case.causal])
def test_chunks_give_what_torch_gives_for_the_whole(exported: Callable[[str], Exported], name: str) -> None:
    found = exported(name)
    x = found.random_input(3, 12, 3)

    heads, _ = found.plain.chunks(x, [1, 2, 7])

    _assert_heads(found.torch_heads(x), heads)


@pytest.mark.parametrize("name", ZOO)
def test_the_file_is_what_the_contract_promises(exported: Callable[[str], Exported], name: str) -> None:
    found = exported(name)
    model, contract = found.plain.model, found.plain.contract
    graph = model.graph
    recurrent = [node for node in graph.node if node.op_type in ("LSTM", "GRU", "RNN")]
    initializers = {tensor.name for tensor in graph.initializer}

    assert len(recurrent) == found.case.nodes
    for node in recurrent:
        assert node.input[4] == "lengths"
        assert {node.input[1], node.input[2], node.input[3]} <= initializers
    assert 17 <= model.opset_import[0].version <= 20
    assert [value.name for value in graph.input] == ["input", "lengths", *(s["name"] for s in contract["states"])]
    assert [value.name for value in graph.output] == [
        *(head["name"] for head in contract["heads"]),
        *(state["output"] for state in contract["states"]),
    ]
    symbols = {d.dim_param for v in (*graph.input, *graph.output) for d in v.type.tensor_type.shape.dim}
    assert symbols <= {"", "batch", "time"}
    assert contract["causal"] is found.case.causal
    assert not any(node.metadata_props or node.doc_string for node in graph.node)
    assert b"/site-packages/" not in model.SerializeToString()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["LSTM", "stacked modules", "last step", "learned initial states", "tokens"]),
    steps=st.integers(1, 30),
    cuts=st.sets(st.integers(1, 29), max_size=12),
    rows=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_any_cuts_give_the_same(
    exported: Callable[[str], Exported], name: str, steps: int, cuts: set[int], rows: int, seed: int
) -> None:
    found = exported(name)
    x = found.random_input(rows, steps, seed)

    heads, states = found.plain.chunks(x, sorted(cut for cut in cuts if cut < steps))
    whole, whole_states = found.plain.chunks(x, [])

    _assert_heads(whole, heads)
    _assert_heads(whole_states, states)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_bidirectional_model_carries_its_states_as_torch_does(tmp_path: Any, plain_run: Any, kind: str) -> None:
    model = PassesState(kind, bidirectional=True).eval()
    report = recurd_export.export(model, torch.zeros(2, 16, 5), tmp_path / "both.onnx")
    plain = plain_run(tmp_path / "both.onnx")
    x = torch.randn(3, 10, 5)

    states, torch_state = plain.initial(3), None
    for start, stop in ((0, 4), (4, 5), (5, 10)):
        heads, states = plain.run(x[:, start:stop].numpy(), states)
        with torch.no_grad():
            expected, torch_state = model(x[:, start:stop], torch_state)
        np.testing.assert_allclose(heads["output"], expected.numpy(), rtol=1e-4, atol=2e-6)

    assert not report.contract.causal
    assert "backward half of a chunk sees that chunk only" in str(report)


def test_states_are_named_after_their_modules(exported: Callable[[str], Exported]) -> None:
    assert [s.name for s in exported("stacked modules").report.contract.states] == [
        "first.h_l0", "first.c_l0", "first.h_l1", "first.c_l1", "second.h_l0", "third.h_l0",
    ]  # fmt: skip
    assert [s.name for s in exported("the bare layer").report.contract.states][:2] == ["lstm.h_l0", "lstm.c_l0"]
    assert [s.name for s in exported("one module twice").report.contract.states] == ["rnn.h_l0", "rnn@2.h_l0"]
    assert [s.name for s in exported("residual").report.contract.states][:2] == ["layers.0.h_l0", "layers.0.c_l0"]


def test_learned_initial_states_are_in_the_contract(exported: Callable[[str], Exported]) -> None:
    found = exported("learned initial states")
    values = {state.name: state.initial_array() for state in found.report.contract.states}

    np.testing.assert_array_equal(values["rnn.h_l1"], found.model.h0[1].detach().numpy())
    np.testing.assert_array_equal(values["gru.h_l0"], np.full((1, 6), 0.5, np.float32))
    assert [layer.initial for layer in found.report.hoisted] == ["learned", "learned"]

    kept = exported("keeps learned states")
    start = kept.model.start[0].detach().numpy()
    np.testing.assert_array_equal(kept.report.contract.states[1].initial_array(), start)


def test_the_golden_run_has_ragged_rows(exported: Callable[[str], Exported]) -> None:
    golden = exported("LSTM").report.contract.proof.golden

    assert golden.input.shape == (3, 6, 5)
    assert golden.lengths.array().tolist() == [6, 3, 1]


def test_token_ids_have_a_bound(exported: Callable[[str], Exported]) -> None:
    assert exported("tokens").report.contract.input.classes == 11


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("heads of two types", "head 'class' holds whole numbers and is sent as float32"),
        ("time-major LSTM", "the model's own input is [time, batch, ...]"),
        ("takes positive numbers", "the model does not take any number, so it was verified on steps of the example"),
        ("LSTM both ways, 2 layers", "the model looks ahead"),
    ],
)
def test_the_report_notes_what_one_might_not_expect(exported: Callable[[str], Exported], name: str, note: str) -> None:
    report = exported(name).report

    assert any(text.startswith(note) for text in report.notes)
    assert f"note    {note}" in str(report)


def test_the_report_tells_what_was_done(exported: Callable[[str], Exported]) -> None:
    text = str(exported("stacked modules").report)

    assert "hoisted first (LSTM, 2 layers of 8), initial zeros: first.h_l0, first.c_l0" in text
    assert "hoisted third (RNN_RELU, 1 layer of 5)" in text
    assert "head    output: float32 [batch, time, 5]" in text
    assert "causal  yes" in text
    assert "checked chunks in ragged batches: largest error" in text
