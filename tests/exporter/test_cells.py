"""Cells stepped over time in a forward come out as fused layers where they are, and step by step where they are not."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recurd_export
from recurd_export import ExportError, drift

EXAMPLE = torch.zeros(2, 8, 5)


@pytest.fixture(autouse=True, scope="module")
def _short_drift() -> Iterator[None]:
    """These models run step by step in Python; the long stream has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drift, "STEPS", 100)
        yield


class Loop(nn.Module):
    """One cell of a kind, batch first, a head applied inside the loop."""

    def __init__(self, kind: str = "LSTM", **options: Any) -> None:
        super().__init__()
        self.cell = getattr(nn, f"{kind}Cell")(5, 6, **options)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        state, outputs = None, []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            outputs.append(self.head(state[0] if isinstance(state, tuple) else state))
        return torch.stack(outputs, dim=1)


class TimeMajor(Loop):
    """Steps come out of an iteration, are appended and joined, the head follows the loop."""

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = torch.zeros(x.size(1), 6), []
        for step in x:
            h = self.cell(step, h)
            outputs.append(h.unsqueeze(0))
        return self.head(torch.cat(outputs, 0))


class Written(Loop):
    """Every step is written into a tensor made before."""

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, _ = x.size()
        outputs = torch.zeros(batch, steps, 6)
        h = x.new_zeros(batch, 6)
        for t in range(steps):
            h = self.cell(x[:, t, :], h)
            outputs[:, t] = h
        return self.head(outputs)


class Characters(nn.Module):
    """Two cells a step behind an embedding, states in attributes that begin anew with another batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.first, self.second = nn.LSTMCell(5, 6), nn.GRUCell(6, 4)
        self.decode = nn.Linear(4, 11)
        self.h: Any = None

    def forward(self, ids: Tensor) -> Tensor:
        if self.h is None or self.h[2].size(0) != ids.size(1):
            self.h = [torch.zeros(ids.size(1), size) for size in (6, 6, 4)]
        h, c, g = self.h
        outputs = []
        for e in self.embedding(ids):
            h, c = self.first(e, (h, c))
            g = self.second(F.dropout(h, 0.5, self.training), g)
            outputs.append(g)
        self.h = [part.detach() for part in (h, c, g)]
        return F.log_softmax(self.decode(torch.stack(outputs)), dim=-1).view(-1, 11)


class Last(Loop):
    """Layers and a cell, of which only the last step counts."""

    def __init__(self) -> None:
        super().__init__("GRU")
        self.before = nn.LSTM(5, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h, (y, _) = None, self.before(x)
        for t in range(y.shape[1]):
            h = self.cell(y[:, t], h)
        return self.head(h)


class Passes(Loop):
    """Takes its state where one is given, begins from a learned one otherwise, and returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(2, 6))

    def forward(self, x: Tensor, state: Any = None) -> Any:
        h, c = (part.expand(len(x), -1) for part in self.start) if state is None else state
        outputs = []
        for step in x.unbind(1):
            h, c = self.cell(step, (h, c))
            outputs.append(h)
        return self.head(torch.stack(outputs, 1)), (h, c)


class Normed(Last):
    """The state is normalised before it is handed on, and kept in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.h: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.h is None or self.h.size(0) != x.size(0):
            self.h = x.new_zeros(x.size(0), 6)
        y, _ = self.before(x)
        h = self.h
        for t in range(y.shape[1]):
            h = self.norm(self.cell(y[:, t], h))
        self.h = h.detach()
        return self.head(h)


class Memory(Loop):
    """What comes out is made of c, which no fused layer gives for every step."""

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            outputs.append(self.head(state[1]))
        return torch.stack(outputs, 1)


class Zoneout(Loop):
    """The loop mixes a cell's old state with its new one."""

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = torch.zeros(len(x), 6), []
        for t in range(x.shape[1]):
            h = 0.3 * h + 0.7 * self.cell(x[:, t], h)
            outputs.append(self.head(h))
        return torch.stack(outputs, 1)


class Late(Loop):
    """What comes out is the state before the step."""

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = x.new_ones(len(x), 6), []
        for t in range(x.shape[1]):
            outputs.append(self.head(h))
            h = self.cell(x[:, t], h)
        return torch.stack(outputs, 1)


class OwnCell(nn.LSTMCell):
    """A cell with a forward of its own."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        h, c = super().forward(x, state)
        return h, c.clamp(-0.3, 0.3)


class Own(Loop):
    def __init__(self) -> None:
        super().__init__()
        self.cell = OwnCell(5, 6)


class Projected(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 6, 2, proj_size=4, **options)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class AheadAndCell(Loop):
    """A layer that looks ahead, and a cell over what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.GRU(5, 5, batch_first=True, bidirectional=True)
        self.join = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.join(self.before(x)[0]))


Call = Callable[[nn.Module, Tensor], Tensor]


def _plainly(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def _time_major(model: nn.Module, x: Tensor) -> Tensor:
    return model(x.transpose(0, 1)).transpose(0, 1)


def _forgetting(model: nn.Module, x: Tensor) -> Tensor:
    model.h = None
    return model(x)


def _characters(model: nn.Module, x: Tensor) -> Tensor:
    model.h = None
    return model(x.t()).view(x.shape[1], x.shape[0], -1).transpose(0, 1)


@dataclass(frozen=True)
class Case:
    """A model, the recurrent nodes of its file, an example, and how torch users call it on a batch-first input."""

    build: Callable[[], nn.Module]
    nodes: list[str]
    example: Any = field(default_factory=lambda: EXAMPLE)
    call: Call = _plainly
    per: str = "step"
    causal: bool = True


CASES = {
    "a cell": Case(Loop, ["LSTM"]),
    "time-major": Case(lambda: TimeMajor("GRU", bias=False), ["GRU"], torch.zeros(8, 2, 5), _time_major),
    "written per step": Case(lambda: Written("RNN", nonlinearity="relu"), ["RNN"]),
    "characters": Case(Characters, ["LSTM", "GRU"], torch.zeros(8, 2, dtype=torch.int64), _characters),
    "the last step": Case(Last, ["LSTM", "GRU"], per="last"),
    "passes its state": Case(Passes, ["LSTM"], call=lambda model, x: model(x)[0]),
    "behind a layer that looks ahead": Case(AheadAndCell, ["GRU", "LSTM"], causal=False),
    "normalised states, last step": Case(Normed, ["Scan"], call=_forgetting, per="last"),
    "c as output": Case(Memory, ["Scan"]),
    "old and new state mixed": Case(lambda: Zoneout("GRU"), ["Scan"]),
    "the state before the step": Case(lambda: Late("RNN"), ["Scan"]),
    "a cell of one's own": Case(Own, ["Scan"]),
    "projections": Case(Projected, ["Scan"], torch.zeros(8, 2, 5), _time_major),
}


@pytest.mark.parametrize("name", CASES)
def test_a_loop_gives_what_torch_gives(tmp_path: Path, plain_run: Any, name: str) -> None:
    case = CASES[name]
    model = case.build().eval()

    report = recurd_export.export(model, case.example, tmp_path / "m.onnx")

    plain = plain_run(tmp_path / "m.onnx")
    assert [n.op_type for n in plain.model.graph.node if n.op_type in ("LSTM", "GRU", "RNN", "Scan")] == case.nodes
    assert report.contract.causal is case.causal
    assert any(("Scan" if case.nodes == ["Scan"] else "fused") in note for note in report.notes)
    if isinstance(model, Passes):
        _assert_states_of(model, report)
    _assert_whole_and_padded(case, model, plain)
    if case.causal:
        _assert_chunks(case, model, plain)


def _assert_states_of(model: Passes, report: Any) -> None:
    """States of cells have no axis of layers, and may begin with what was learned."""
    h, c = report.contract.states
    assert (h.name, h.shape, h.batch_axis, c.name) == ("cell.h", (6,), 0, "cell.c")
    np.testing.assert_array_equal(c.initial_array(), model.start[1].detach().numpy())
    assert "hoisted cell (LSTM, 1 layer of 6), initial learned: cell.h, cell.c" in str(report)


def _input(case: Case, rows: int, steps: int) -> Tensor:
    if case.example.dtype == torch.int64:
        return torch.randint(11, (rows, steps))
    return torch.randn(rows, steps, 5)


def _assert_whole_and_padded(case: Case, model: nn.Module, plain: Any) -> None:
    lengths = [9, 1, 5, 2]
    x = _input(case, 4, 9)
    heads, states = plain.run(x.numpy(), plain.initial(4), lengths)
    for row, length in enumerate(lengths):
        with torch.no_grad():
            expected = case.call(model, x[row : row + 1, :length])[0]
        got = heads["output"][row, :length] if case.per == "step" else heads["output"][row]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-6)
        _, alone = plain.run(x[row : row + 1, :length].numpy(), plain.initial(1))
        for state in plain.contract["states"]:
            one, other = (
                each[state["name"]].take(place, state["batch_axis"]) for each, place in ((states, row), (alone, 0))
            )
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-6)


def _assert_chunks(case: Case, model: nn.Module, plain: Any) -> None:
    x = _input(case, 3, 12)
    with torch.no_grad():
        expected = case.call(model, x)
    heads, _ = plain.chunks(x.numpy(), [1, 2, 7])
    np.testing.assert_allclose(heads["output"], expected, rtol=1e-4, atol=2e-6)


# --- what is refused ---


class Body(Loop):
    """A loop whose body a test gives: ``(model, x, t, h, y before) -> (h, y)``."""

    def __init__(self, body: Any, **layers: nn.Module) -> None:
        super().__init__("GRU")
        self.body = body
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        h, y, outputs = x.new_zeros(len(x), 6), x.new_zeros(len(x), 6), []
        for t in range(x.shape[1]):
            h, y = self.body(self, x, t, h, y)
            outputs.append(y)
        return torch.stack(outputs, 1)


def _both(h: Tensor) -> tuple[Tensor, Tensor]:
    return h, h


class Through(Body):
    """Layers before or behind the loop."""

    def __init__(self, before: Any = None, behind: Any = None, layer: nn.Module | None = None) -> None:
        super().__init__(lambda m, x, t, h, y: _both(m.cell(x[:, t], h)))
        self.before, self.behind, self.layer = before, behind, layer

    def forward(self, x: Tensor) -> Any:
        y = super().forward(self.before(self, x) if self.before else x)
        return self.behind(self, y) if self.behind else y


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = self.decode = nn.GRUCell(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = g = x.new_zeros(len(x), 5)
        outputs = []
        for t in range(x.shape[1]):
            h = self.encode(x[:, t], h)
            g = self.decode(h, g)
            outputs.append(g)
        return torch.stack(outputs, 1)


class Unused(Loop):
    def forward(self, x: Tensor) -> Tensor:
        return x


MORE = "carries more from step to step than the states of its cells"
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a state that is never handed on": (
        lambda: Body(lambda m, x, t, h, y: (h, m.cell(x[:, t]))),
        "the loop never hands the state of layer 'cell' (GRUCell) from one step to the next",
    ),
    "a state that is reset": (
        lambda: Body(lambda m, x, t, h, y: _both(m.cell(x[:, t], h * 0 if t % 4 == 0 else h))),
        "the state of layer 'cell' (GRUCell) is reset inside the loop (in step 5 of 11)",
    ),
    "a cell called twice a step": (
        lambda: Body(lambda m, x, t, h, y: _both(m.cell(x[:, t], m.cell(x[:, t], h)))),
        "layer 'cell' (GRUCell) is called 22 times for 11 steps; a cell must be called once a step",
    ),
    "a cell called for some steps": (
        lambda: Body(lambda m, x, t, h, y: _both(m.cell(x[:, t], h) if t % 2 else h)),
        "layer 'cell' (GRUCell) is called 5 times for 11 steps",
    ),
    "a cell under two names": (
        TwoNames,
        "layer 'encode' (GRUCell) is called 22 times for 11 steps: it is 'decode' too, and one cell has one state",
    ),
    "an output fed back": (
        lambda: Body(lambda m, x, t, h, y: (g := m.cell(x[:, t] + y[:, :5], h), m.out(g)), out=nn.Linear(6, 6)),
        f"the loop in Body {MORE}",
    ),
    "a count of steps": (
        lambda: Body(lambda m, x, t, h, y: _both(m.cell(x[:, t] * (t + 1), h))),
        "write one step as a module (x, state...) -> (y, state...) and export it with step=True",
    ),
    "a loop backwards": (lambda: Body(lambda m, x, t, h, y: _both(m.cell(x[:, -1 - t], h))), MORE),
    "a mean over steps": (lambda: Through(behind=lambda m, y: y.mean(1)), MORE),
    "a branch on values": (
        lambda: Body(lambda m, x, t, h, y: _both(m.cell(x[:, t], h) if h.sum() > -1e9 else h)),
        "the model's forward branches on the values of tensors",
    ),
    "a convolution before": (
        lambda: Through(lambda m, x: m.layer(x.transpose(1, 2)).transpose(1, 2), layer=nn.Conv1d(5, 5, 3, padding=1)),
        "layer 'layer' (Conv1d) mixes time steps",
    ),
    "attention behind": (
        lambda: Through(None, lambda m, y: m.layer(y, y, y)[0], nn.MultiheadAttention(6, 1, batch_first=True)),
        "layer 'layer' (MultiheadAttention) mixes time steps",
    ),
    "states of other rows": (
        lambda: Body(lambda m, x, t, h, y: _both(m.cell(x[:, t], h - h.mean(0)))), "mixes the rows of a batch",
    ),
    "a softmax over rows": (lambda: Through(behind=lambda m, y: y.softmax(0)), "mixes the rows of a batch"),
    "a cell that is never called": (lambda: Unused(), "has recurrent layers, but its forward calls none of them"),
    "a step without a batch": (
        lambda: Body(lambda m, x, t, h, y: (h, m.cell(x[0, t]).expand(len(x), -1))),
        "layer 'cell' (GRUCell) gets an input of rank 1 [5], without a batch axis",
    ),
    "projections that look ahead": (
        lambda: Projected(batch_first=True, bidirectional=True),
        "layer 'rnn' (LSTM) looks ahead, and the model can be run step by step only",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_loop_that_cannot_be_exported_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    build, sentence = REFUSED[name]
    model = build()
    if isinstance(model, Projected):
        model.head = nn.Linear(8, 3)

    with pytest.raises(ExportError) as caught:
        recurd_export.export(model, EXAMPLE, tmp_path / "m.onnx")

    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class Outspoken(Projected):
    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("my own words", stacklevel=1)
        return super().forward(x)


def test_what_torch_says_of_projections_is_kept_from_the_user_and_what_the_model_says_is_not(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="my own words"):  # any other one is an error
        recurd_export.export(Outspoken(batch_first=True), EXAMPLE, tmp_path / "m.onnx")
