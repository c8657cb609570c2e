"""Character models of torch as people train them: trained a little, exported, served, and held against torch.

Every model is driven by torch as its own users do, chunk after chunk, its state kept in an attribute or handed back,
and by a running daemon as streams.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recurd
import recurd_export
from process import Process
from recurd.contract import load
from recurd_export import drift

TEXT = (
    "a state is carried from chunk to chunk, so that a long text may come in short pieces; what was read is not read "
    "again, and what is to come is not waited for. whoever cuts the text elsewhere gets the same characters. "
)
ALPHABET = sorted(set(TEXT))
IDS = torch.tensor([ALPHABET.index(character) for character in TEXT])
STEPS, ROWS = 8, 4
#: Where the streams are cut: single steps, many at once, a chunk of everything that is left.
CUTS = (0, 1, 2, 9, 30, 33, 60)


def detached(h: Any) -> Any:
    """States without what led to them."""
    return h.detach() if isinstance(h, Tensor) else tuple(map(detached, h))


class Stateful(nn.Module):
    """Time-major; the state lives in ``h``, begins anew with another batch size, is detached after every call."""

    layers, hidden = 1, 24

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.e = nn.Embedding(len(ALPHABET), 12)
        self.rnn = rnn
        self.l_out = nn.Linear(self.hidden, len(ALPHABET))
        self.init_hidden(ROWS)

    def init_hidden(self, batch: int) -> None:
        self.h: Any = torch.zeros(self.layers, batch, self.hidden)

    def forward(self, cs: Tensor) -> Tensor:
        batch = cs[0].size(0)
        if self.h.size(1) != batch:
            self.init_hidden(batch)
        output, h = self.rnn(self.e(cs), self.h)
        self.h = detached(h)
        return F.log_softmax(self.l_out(output), dim=-1).view(-1, len(ALPHABET))


class StatefulCell(Stateful):
    """A cell stepped over time."""

    def init_hidden(self, batch: int) -> None:
        self.h = torch.zeros(batch, self.hidden)

    def forward(self, cs: Tensor) -> Tensor:
        batch = cs[0].size(0)
        if self.h.size(0) != batch:
            self.init_hidden(batch)
        outputs, o = [], self.h
        for c in cs:
            o = self.rnn(self.e(c), o)
            outputs.append(o)
        output = self.l_out(torch.stack(outputs))
        self.h = detached(o)
        return F.log_softmax(output, dim=-1).view(-1, len(ALPHABET))


class StatefulLSTM(Stateful):
    """Two layers with dropout; the state is a tuple."""

    layers, hidden = 2, 512

    def init_hidden(self, batch: int) -> None:
        self.h = tuple(torch.zeros(self.layers, batch, self.hidden) for _ in range(2))

    def forward(self, cs: Tensor) -> Tensor:
        batch = cs[0].size(0)
        if self.h[0].size(1) != batch:
            self.init_hidden(batch)
        output, h = self.rnn(self.e(cs), self.h)
        self.h = detached(h)
        return F.log_softmax(self.l_out(output), dim=-1).view(-1, len(ALPHABET))


class OnDemand(nn.Module):
    """Batch first; takes a state and gives it back where the caller wants one."""

    def __init__(self, classes: int = 67) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, 256)
        self.lstm = nn.LSTM(256, 1024, batch_first=True)
        self.dense = nn.Linear(1024, classes)

    def forward(self, x: Tensor, states: Any = None, return_state: bool = False) -> Any:
        y, states = self.lstm(self.embedding(x), states)
        y = self.dense(y)
        return (y, states) if return_state else y


def train(model: nn.Module, rounds: int) -> tuple[float, float]:
    """The next character, in windows that do not overlap, the state carried on; first and last loss."""
    optimizer = torch.optim.Adam(model.parameters(), 0.01 if rounds > 1 else 0.001)
    length = len(IDS) // ROWS
    rows = IDS[: length * ROWS].view(ROWS, length)
    losses = []
    for _ in range(rounds):
        for start in range(0, length - STEPS - 1, STEPS) if rounds > 1 else (0, 0):
            x, wanted = rows[:, start : start + STEPS], rows[:, start + 1 : start + STEPS + 1]
            if isinstance(model, OnDemand):
                loss = F.cross_entropy(model(x).flatten(0, 1), wanted.flatten())
            else:
                loss = F.nll_loss(model(x.t()), wanted.t().flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses[0], losses[-1]


def build() -> dict[str, nn.Module]:
    return {
        "rnn": Stateful(nn.RNN(12, 24)),
        "cell": StatefulCell(nn.RNNCell(12, 24)),
        "gru": Stateful(nn.GRU(12, 24)),
        "lstm": StatefulLSTM(nn.LSTM(12, 512, 2, dropout=0.5)),
        "demand": OnDemand(),
    }


#: How many times the text is read in training; 1: twice the first window, for what is large.
ROUNDS = {"rnn": 6, "cell": 6, "gru": 6, "lstm": 1, "demand": 1}


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    torch.set_num_threads(1)
    torch.manual_seed(5)
    models = build()
    for name, model in models.items():
        first, last = train(model, ROUNDS[name])
        assert last < first
    return models


@pytest.fixture(scope="module")
def files(models: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All of them exported, each as its training has left it."""
    folder = tmp_path_factory.mktemp("seeds")
    files = {name: folder / f"{name}.onnx" for name in models}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drift, "STEPS", 100)  # the long stream has tests of its own
        for name, model in models.items():
            example = IDS[:32].view(4, 8) if name == "demand" else IDS[:32].view(8, 4)
            report = recurd_export.export(model, example, files[name])
            assert report.contract.input.classes == (67 if name == "demand" else len(ALPHABET))
    return files


@pytest.fixture(scope="module")
def daemon(files: dict[str, Path]) -> Iterator[Process]:
    """A daemon that serves all of them."""
    folder = files["rnn"].parent
    with Process(folder, "--bind", "tcp://127.0.0.1:0", "--metrics", "127.0.0.1:0", *files.values()) as process:
        yield process.ready()


def by_torch(model: nn.Module, rows: Tensor) -> Iterator[np.ndarray]:
    """Chunks ``[rows, steps, classes]``, the model's state being carried as its users carry it."""
    model.eval()
    states: Any = None
    if isinstance(model, Stateful):
        model.init_hidden(len(rows))
    for start, stop in itertools.pairwise(CUTS):
        chunk = rows[:, start:stop]
        with torch.no_grad():
            if isinstance(model, Stateful):
                yield model(chunk.t()).view(stop - start, len(rows), -1).transpose(0, 1).numpy()
            else:
                y, states = model(chunk, states, return_state=True)
                yield y.numpy()


@pytest.mark.parametrize("name", ROUNDS)
def test_a_served_character_model_gives_what_torch_gives_chunk_by_chunk(
    models: dict[str, nn.Module], daemon: Process, name: str
) -> None:
    rows = torch.stack([IDS.roll(-shift)[: CUTS[-1]] for shift in (0, 40, 90)])

    with recurd.connect(daemon.endpoint) as client:
        streams = [client.open(f"{name}-{row}", model=name) for row in range(len(rows))]
        for (start, stop), expected in zip(itertools.pairwise(CUTS), by_torch(models[name], rows), strict=True):
            pushed = [stream.submit(rows[row, start:stop].numpy()) for row, stream in enumerate(streams)]
            got = np.stack([future.result() for future in pushed])
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)
        streams[0].reset()
        again = streams[0].push(rows[0, : CUTS[1]].numpy())
    np.testing.assert_allclose(again, next(by_torch(models[name], rows))[0], rtol=1e-4, atol=2e-5)


def test_the_loop_over_a_cell_is_one_layer_in_the_file(files: dict[str, Path]) -> None:
    model, contract = load(files["cell"])

    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("RNN") == 1
    assert "Scan" not in kinds
    assert [state.name for state in contract.states] == ["rnn.h"]
