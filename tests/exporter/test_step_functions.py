"""Modules whose forward is one step, with states of their own, run over time as they do in a loop of torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recurd_export
from recurd_export import ExportError, drift

zeros = torch.zeros


@pytest.fixture(autouse=True, scope="module")
def _short_drift() -> Iterator[None]:
    """These models run step by step in Python; the long stream has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drift, "STEPS", 100)
        yield


class Peephole(nn.Module):
    """An LSTM whose gates see c; h begins with a learned value."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(5 + 4, 16)
        self.peep = nn.Parameter(torch.randn(3, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        i, f, o, g = self.gates(torch.cat([x, h], -1)).chunk(4, -1)
        i, f = torch.sigmoid(i + self.peep[0] * c), torch.sigmoid(f + self.peep[1] * c)
        c = f * c + i * torch.tanh(g)
        h = torch.sigmoid(o + self.peep[2] * c) * torch.tanh(c)
        return self.head(h), h, c


class LayerNormed(nn.Module):
    """A layer-norm LSTM with a projected state, two heads, states in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.of_x, self.of_h = nn.Linear(5, 24, bias=False), nn.Linear(3, 24, bias=False)
        self.norms = nn.ModuleList([nn.LayerNorm(24), nn.LayerNorm(24), nn.LayerNorm(6)])
        self.project = nn.Linear(6, 3)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Any:
        h, c = state
        i, f, o, g = (self.norms[0](self.of_x(x)) + self.norms[1](self.of_h(h))).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = self.project(torch.sigmoid(o) * torch.tanh(self.norms[2](c)))
        return {"logits": h, "class": h.argmax(-1)}, (h, c)


class MinGRU(nn.Module):
    """The state's next value is also the head; the state is written to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.candidate = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        z = torch.sigmoid(self.gate(x))
        return h.mul_(1 - z).add_(z * self.candidate(x))


class Diagonal(nn.Module):
    """A linear recurrence of several modes a channel (S4D) over token ids; its states are [modes, batch, channels]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.rate, self.turn = nn.Parameter(-torch.rand(3, 1, 4)), nn.Parameter(torch.randn(3, 1, 4))
        self.mix = nn.Linear(4, 9)

    def forward(self, ids: Tensor, real: Tensor, imaginary: Tensor) -> Any:
        u, size = self.embedding(ids), torch.exp(self.rate)
        cos, sin = size * torch.cos(self.turn), size * torch.sin(self.turn)
        real, imaginary = cos * real - sin * imaginary + u, sin * real + cos * imaginary
        return F.log_softmax(self.mix(real.sum(0)), -1), real, imaginary


class Normaliser(nn.Module):
    """Numbers are normalised by what has come so far: a count, a mean, squares, given back in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.GRUCell(5, 3)

    def forward(self, x: Tensor, state: dict[str, Tensor]) -> Any:
        count = state["count"] + 1
        seen = count.unsqueeze(-1).float()
        away = x - state["mean"]
        mean = state["mean"] + away / seen
        squares = state["squares"] + away * (x - mean)
        y = (x - mean) / torch.sqrt(squares / seen + 1e-2)
        h = self.head(y, state["h"])
        return (h, y), {"squares": squares, "mean": mean, "h": h, "count": count}


class Layers(nn.Module):
    """A layer of torch's own, one step at a time, time-major, with a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 6, 2, proj_size=3)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        y, (h, c) = self.rnn(x[None], (h, c))
        return y[0], h, c


@dataclass(frozen=True)
class Case:
    """A module, the example of it, and its states' names."""

    build: Callable[[], nn.Module]
    example: tuple[Any, ...]
    states: list[str]


COUNTED = {"mean": zeros(4, 5), "squares": zeros(4, 5), "count": zeros(4, dtype=torch.int64), "h": zeros(4, 3)}
CASES = {
    "peephole LSTM": Case(Peephole, (zeros(2, 5), zeros(2, 4) + 0.5, zeros(2, 4)), ["h", "c"]),
    "layer-norm LSTM": Case(LayerNormed, (zeros(3, 5), (zeros(3, 3), zeros(3, 6))), ["state.0", "state.1"]),
    "minGRU": Case(MinGRU, (zeros(4, 5), zeros(4, 4)), ["h"]),
    "diagonal": Case(Diagonal, (zeros(3, dtype=torch.int64), *[zeros(3, 3, 4)] * 2), ["real", "imaginary"]),
    "normaliser": Case(Normaliser, (zeros(4, 5), COUNTED), ["state.mean", "state.squares", "state.count", "state.h"]),
    "torch's own layers": Case(Layers, (zeros(2, 5), zeros(2, 2, 3), zeros(2, 2, 6)), ["h", "c"]),
    "LSTMCell": Case(lambda: nn.LSTMCell(5, 6), (zeros(2, 5), (zeros(2, 6), zeros(2, 6))), ["h", "c"]),
}


def _looped(model: nn.Module, x: Tensor, states: list[Tensor], keys: list[str] | None, structure: Any) -> Tensor:
    """The first head over time, by torch, in a plain loop; states in the order of the example."""
    outputs = []
    for step in x.unbind(1):
        left = iter([state.clone() for state in states])
        rest = structure(left)
        result = model(step, *rest)
        output, states = _split(result, len(states), keys)
        outputs.append(output)
    return torch.stack(outputs, 1)


def _split(result: Any, count: int, keys: list[str] | None) -> tuple[Tensor, list[Tensor]]:
    flat = list(_flat(result))
    if keys is not None:
        return flat[0], [result[1][key] for key in keys]
    return flat[0], flat[-count:]


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _flat(item)


def _structure(example: tuple[Any, ...]) -> Callable[[Iterator[Tensor]], list[Any]]:
    def build(value: Any, left: Iterator[Tensor]) -> Any:
        if isinstance(value, Tensor):
            return next(left)
        if isinstance(value, dict):
            return {key: build(item, left) for key, item in value.items()}
        return tuple(build(item, left) for item in value)

    return lambda left: [build(value, left) for value in example[1:]]


class Exported(NamedTuple):
    case: Case
    model: nn.Module
    report: Any
    plain: Any


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, plain_run: Any) -> Callable[[str], Exported]:
    """Exports a module, once in all tests."""
    done: dict[str, Exported] = {}
    folder = tmp_path_factory.mktemp("steps")

    def get(name: str) -> Exported:
        if name not in done:
            torch.manual_seed(7)
            case, path = CASES[name], folder / f"{len(done)}.onnx"
            model = case.build()
            report = recurd_export.export(model, case.example, path, step=True)
            done[name] = Exported(case, model, report, plain_run(path))
        return done[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_a_step_over_time_gives_what_a_loop_gives(exported: Callable[[str], Exported], name: str) -> None:
    case, model, report, plain = exported(name)

    assert model.training
    model.eval()
    assert [state["name"] for state in plain.contract["states"]] == case.states
    assert report.contract.chunk_local
    assert any("(Scan)" in note for note in report.notes)
    first = report.contract.heads[0].name
    lengths = [8, 1, 5]
    x = _input(case, 3, 8)
    heads, states = plain.run(x.numpy(), plain.initial(3), lengths)
    for row, length in enumerate(lengths):
        with torch.no_grad():
            expected = _expected(case, model, x[row : row + 1, :length])[0]
        np.testing.assert_allclose(heads[first][row, :length], expected, rtol=1e-4, atol=2e-6)
        _, alone = plain.run(x[row : row + 1, :length].numpy(), plain.initial(1))
        for state in plain.contract["states"]:
            together = states[state["name"]].take(row, state["batch_axis"])
            np.testing.assert_allclose(
                together, alone[state["name"]].take(0, state["batch_axis"]), rtol=1e-4, atol=2e-6
            )
    chunks, _ = plain.chunks(x.numpy(), [1, 2, 6])
    with torch.no_grad():
        np.testing.assert_allclose(chunks[first], _expected(case, model, x), rtol=1e-4, atol=2e-6)


def _input(case: Case, rows: int, steps: int) -> Tensor:
    is_ids = case.example[0].dtype == torch.int64
    return torch.randint(9, (rows, steps)) if is_ids else torch.randn(rows, steps, 5)


def _expected(case: Case, model: nn.Module, x: Tensor) -> Tensor:
    axis = 1 if case.build in (Diagonal, Layers) else 0
    states = [
        state.narrow(axis, 0, 1).expand(*[-1] * axis, len(x), *[-1] * (state.dim() - axis - 1))
        for state in _flat(case.example[1:])
    ]
    keys = list(COUNTED) if case.build is Normaliser else None
    return _looped(model, x, states, keys, _structure(case.example))


def test_states_keep_their_types_and_counts_go_on_over_chunks(exported: Callable[[str], Exported]) -> None:
    case, _, report, plain = exported("normaliser")

    _, states = plain.chunks(_input(case, 2, 7).numpy(), [3, 4])

    assert [state.dtype for state in report.contract.states] == ["float32", "float32", "int64", "float32"]
    assert [state.shape for state in report.contract.states] == [(5,), (5,), (), (3,)]
    assert states["state.count"].tolist() == [7, 7]
    assert [head.name for head in report.contract.heads] == ["output_0", "output_1"]


def test_heads_and_initial_values_are_those_of_the_module(exported: Callable[[str], Exported]) -> None:
    report = exported("layer-norm LSTM").report

    assert [head.name for head in report.contract.heads] == ["logits", "class"]
    assert "head 'class' holds whole numbers and is sent as float32" in str(report)
    report = exported("peephole LSTM").report
    assert [state.initial is None for state in report.contract.states] == [False, True]
    assert "hoisted Peephole (step, 1 layer of 8), initial learned: h, c" in str(report)


# --- what is refused ---


class Step(nn.Module):
    """A step that a test gives, with a cell and an embedding at hand."""

    def __init__(self, step: Any) -> None:
        super().__init__()
        self.cell, self.table = nn.GRUCell(5, 4), nn.Embedding(6, 4)
        self.step = step
        self.count = 0

    def forward(self, x: Tensor, h: Tensor) -> Any:
        return self.step(self, x, h)


class TwoStates(Step):
    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:  # type: ignore[override]
        return self.step(self, x, h, c)


def _counting(model: Step, x: Tensor, h: Tensor) -> Any:
    model.count += 1
    return x * model.count, h


X, H = zeros(2, 5), zeros(2, 4)
REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "a state nobody returns": (
        lambda: TwoStates(lambda m, x, h, c: x), (X, H, H),
        "the module takes 2 states and returns 1 tensor; it must return its outputs and then every state it takes",
    ),
    "one of two states that is not returned": (
        lambda: TwoStates(lambda m, x, h, c: (x, h)), (X, H, H),
        "returned tensor 1 (float32 [3, 5]) stands where the next value of state 'h' (float32 [3, 4]) must",
    ),
    "a state of another shape": (
        lambda: Step(lambda m, x, h: (x, torch.cat([h, h], 1))), (X, H),
        "returned tensor 2 (float32 [3, 8]) stands where the next value of state 'h' (float32 [3, 4]) must",
    ),
    "a state of another type": (
        lambda: Step(lambda m, x, h: (x, h.long())), (X, H), "returned tensor 2 (int64 [3, 4]) stands where",
    ),
    "a state that is a number": (
        lambda: Step(lambda m, x, h: (x, h + 1)), (X, torch.tensor(0.0)),
        "state 1 of the example is [], without a batch axis of 2; every stream has states of its own",
    ),
    "a state of float64": (
        lambda: Step(lambda m, x, h: (x, h)), (X, H.double()),
        "state 1 of the example is float64; a state is float32 or int64",
    ),
    "states that depend on the row": (
        lambda: Step(lambda m, x, h: (x, h)), (X, torch.arange(2.0)[:, None].repeat(1, 4)),
        "the rows of state 'h' in the example are not all the same",
    ),
    "no states": (
        lambda: Step(lambda m, x, h: (x, h)), X,
        "the example of a step must be a tuple of one step [batch, ...] and the initial values of every state",
    ),
    "rows that are mixed": (
        lambda: Step(lambda m, x, h: (x, m.cell(x, h - h.mean(0)))), (X, H), "mixes the rows of a batch",
    ),
    "a branch on values": (
        lambda: Step(lambda m, x, h: (x, m.cell(x, h) if x.sum() > -1e9 else h)), (X, H),
        "the model's forward branches on the values of tensors",
    ),
    "a branch on the batch size": (
        lambda: Step(lambda m, x, h: (x, m.cell(x, h) if len(x) < 4 else h)), (X, H),
        "must do the same for every batch size and number of steps",
    ),
    "memory of its own": (lambda: Step(_counting), (X, H), "keeps more from call to call than the states it is given"),
    "chance": (
        lambda: Step(lambda m, x, h: (x, F.dropout(m.cell(x, h), 0.5))), (X, H),
        "the module gives something else every time",
    ),
    "a head without a batch": (
        lambda: Step(lambda m, x, h: (x.sum(), h)), (X, H), "head 'output' has the shape [] for a batch of 3",
    ),
    "indices out of the input": (
        lambda: Step(lambda m, x, h: (m.table(x[:, 0].long()), h)), (X, H),
        "layer 'table' (Embedding) takes indices of 6 entries out of the input",
    ),
    "indices out of a state": (
        lambda: Step(lambda m, x, h: (m.table(h), h + 1)), (X, zeros(2, dtype=torch.int64)),
        "layer 'table' (Embedding) takes indices of 6 entries out of the input",
    ),
    "a failing forward": (
        lambda: Step(lambda m, x, h: (x @ h, h)), (X, H),
        "the module's forward of one step fails on the example in the model itself (Step): RuntimeError",
    ),
    "double precision": (lambda: Step(None).double(), (X, H), "parameter 'cell.weight_ih' is float64"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_step_that_cannot_be_exported_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    build, example, sentence = REFUSED[name]

    with pytest.raises(ExportError) as caught:
        recurd_export.export(build(), example, tmp_path / "m.onnx", step=True)

    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class Cell(nn.Module):
    """An LSTM cell that returns as many tensors as it takes states: ``what`` of them."""

    def __init__(self, what: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.cell, self.what = nn.LSTMCell(5, 4), what

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        return self.what(*self.cell(x, (h, c)))


def test_a_step_that_returns_no_more_than_its_states_is_told_how_it_was_read(tmp_path: Path) -> None:
    read = "the module returns as many tensors as it takes states, so all were taken for the next 'h' and 'c' and the"

    def notes(model: nn.Module, *states: Any) -> list[str]:
        report = recurd_export.export(model, (X, *states), tmp_path / "m.onnx", step=True)
        return [note for note in report.notes if note.startswith("the module returns")]

    short = notes(Cell(lambda h, c: (h + 1, h)), H, H)
    assert [note[: len(read)] for note in short] == [read]
    assert notes(Cell(lambda h, c: (h + 1, h, c)), H, H) == []
    assert notes(nn.GRUCell(5, 4), H) == []


def test_a_step_needs_an_example(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="the module of one step needs an example"):
        recurd_export.export(nn.GRUCell(5, 4), None, tmp_path / "m.onnx", step=True)


def test_a_module_of_one_step_is_pointed_to_where_whole_models_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"found in MinGRU; a module whose forward is one step.*step=True"):
        recurd_export.export(MinGRU(), torch.zeros(2, 8, 5), tmp_path / "m.onnx")


def test_the_command_line_takes_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from recurd_export.cli import export

    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def build():\n    return nn.GRUCell(3, 4), (torch.zeros(2, 3), torch.zeros(2, 4))\n"
        "def bare():\n    return nn.GRUCell(3, 4)\n"
    )
    monkeypatch.chdir(tmp_path)

    done = CliRunner().invoke(export, ["mine:build", "--step", "--out", "m.onnx"])
    refused = CliRunner().invoke(export, ["mine:bare", "--step", "--out", "n.onnx"])

    assert done.exit_code == 0, done.output
    assert "hoisted GRUCell (step, 1 layer of 4), initial zeros: h" in done.output
    assert "--step needs a factory that gives the module and an example" in str(refused.exception)
