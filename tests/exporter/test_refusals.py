"""What cannot be exported is refused in one sentence that names the layer and the reason, and no file is left."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recurd_export
from recurd.errors import ExitCode, StartError
from recurd_export import ExportError

EXAMPLE = torch.ones(2, 16, 5)
CUT = "so results would depend on how a stream is cut"


class Net(nn.Module):
    """A recurrent layer, ``before`` and ``after`` it whatever a test asks for; ``layer`` is at their hands."""

    def __init__(self, before: Any = None, after: Any = None, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 6, batch_first=True)
        self.layer = layer
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Any:
        if self.before:
            x = self.before(self, x)
        y, _ = self.rnn(x)
        return self.after(self, y) if self.after else y


class Clashing(nn.Module):
    """A layer is called twice, and another one is named as its second call."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(5, 5, batch_first=True)
        self.add_module("rnn@2", nn.GRU(5, 5, batch_first=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule("rnn@2")(self.rnn(self.rnn(x)[0])[0])[0]  # type: ignore[no-any-return]


def _over_time(net: Net, x: Tensor) -> Tensor:
    return net.layer(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[misc]


def _itself(net: Net, x: Tensor) -> Any:
    return net.layer(x, x, x)[0] if isinstance(net.layer, nn.MultiheadAttention) else net.layer(x)  # type: ignore[misc]


MIXING: dict[str, tuple[nn.Module, str]] = {
    "convolution that keeps the steps": (
        Net(_over_time, layer=nn.Conv1d(5, 5, 3, padding=1)),
        f"layer 'layer' (Conv1d) is a convolution over time, {CUT}",
    ),
    "convolution after": (
        Net(None, _over_time, nn.Conv1d(6, 6, 5, padding=2)),
        f"layer 'layer' (Conv1d) is a convolution over time, {CUT}",
    ),
    "convolution inside a block": (
        Net(_over_time, layer=nn.Sequential(nn.ReLU(), nn.Conv1d(5, 5, 3, padding=1))),
        f"layer 'layer.1' (Conv1d) is a convolution over time, {CUT}",
    ),
    "convolution that shortens": (
        Net(_over_time, layer=nn.Conv1d(5, 5, 3)),
        "layer 'layer' (Conv1d) changes the number of time steps ([3, 5, 11] into [3, 5, 9])",
    ),
    "strided convolution after": (
        Net(None, _over_time, nn.Conv1d(6, 6, 1, stride=2)),
        "layer 'layer' (Conv1d) changes the number of time steps ([3, 6, 11] into [3, 6, 6])",
    ),
    "attention": (
        Net(None, _itself, nn.MultiheadAttention(6, 2, batch_first=True)),
        "layer 'layer' (MultiheadAttention)",
    ),
    "a transformer layer": (
        Net(None, _itself, nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)),
        "layer 'layer.self_attn' (MultiheadAttention)",
    ),
    "instance normalisation": (
        Net(None, _over_time, nn.InstanceNorm1d(6)),
        f"layer 'layer' (InstanceNorm1d) normalises over time, {CUT}",
    ),
    "group normalisation": (
        Net(None, _over_time, nn.GroupNorm(2, 6)), "layer 'layer' (GroupNorm) normalises over time",
    ),
    "batch normalisation of steps": (Net(None, _itself, nn.BatchNorm1d(16)), "fails in layer 'layer' (BatchNorm1d)"),
    "layer normalisation of steps": (Net(None, _itself, nn.LayerNorm((16, 6))), "fails in layer 'layer' (LayerNorm)"),
    "linear over steps": (Net(None, _over_time, nn.Linear(16, 16)), "fails in layer 'layer' (Linear)"),
    "pooling": (Net(None, _over_time, nn.MaxPool1d(3, 1, 1)), "layer 'layer' (MaxPool1d)"),
    "pooling to one": (Net(None, _over_time, nn.AdaptiveAvgPool1d(1)), "layer 'layer' (AdaptiveAvgPool1d)"),
    "mean": (Net(None, lambda net, y: y.mean(1)), "'mean' (test_refusals.py"),
    "sum": (Net(None, lambda net, y: y.sum(1)), "'sum' (test_refusals.py"),
    "maximum": (Net(None, lambda net, y: y.max(1).values), "takes a maximum over time"),
    "running sum": (Net(None, lambda net, y: y.cumsum(1)), f"accumulates over time, {CUT}"),
    "softmax over steps": (Net(None, lambda net, y: y.softmax(1)), f"is a softmax over time, {CUT}"),
    "flip": (Net(None, lambda net, y: y.flip(1)), "turns time round"),
    "first step": (Net(None, lambda net, y: y[:, 0]), "picks one step (only the last one can be picked)"),
    "a step that is the last for one length": (
        Net(None, lambda net, y: y[:, y.shape[1] - 1 - y.shape[1] // 12]), "mixes the rows of a batch",
    ),
    "steps but the first": (Net(lambda net, x: x[:, 1:]), "runs over a batch of 3 and 10 steps"),
    "every other step": (Net(lambda net, x: x[:, ::2]), "runs over a batch of 3 and 6 steps"),
    "last step added to all": (Net(None, lambda net, y: y + y[:, -1:]), f"mixes time steps, {CUT}"),
    "positions": (
        Net(lambda net, x: x + torch.arange(x.shape[1])[None, :, None]),
        "counts the steps from the start of what it is given",
    ),
    "a table of positions": (
        Net(lambda net, x: x + torch.zeros(50, 5)[: x.shape[1]]), "what it does holds for steps <= 50 only",
    ),
    "softmax over the batch": (Net(None, lambda net, y: y.softmax(0)), "mixes the rows of a batch"),
    "batch statistics": (
        Net(None, lambda net, y: y - y.mean((0, 2), keepdim=True)), "mixes the rows of a batch",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_steps_or_streams_is_named(tmp_path: Path, name: str) -> None:
    model, sentence = MIXING[name]

    with pytest.raises(ExportError) as caught:
        recurd_export.export(model, EXAMPLE, tmp_path / "m.onnx")

    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class Subclass(nn.LSTM):
    def forward(self, x: Tensor, hx: Any = None) -> Any:
        return super().forward(x, hx)


class Loop(Net):
    def forward(self, x: Tensor) -> Tensor:
        state, parts = None, []
        for t in range(x.shape[1]):
            y, state = self.rnn(x[:, t : t + 1], state)
            parts.append(y)
        return torch.cat(parts, 1)


class Decoder(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.GRU(5, 6, batch_first=True), nn.GRU(5, 6, batch_first=True)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        _, h = self.encoder(x)
        return self.decoder(x, torch.randn(1, len(x), 6) if self.how == "random" else h)[0]


class TakesState(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.rnn = nn.GRU(5, 6, batch_first=True)
        self.project = nn.Linear(6, 6)
        self.how = how

    def forward(self, x: Tensor, h: Tensor) -> Any:
        y, h = self.rnn(x, self.project(h) if self.how == "projected" else h)
        return y, h * 0.5


@dataclass
class Record:
    output: Tensor


class Keeps(Net):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.count = 0
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "count":
            self.count += 1
            return self.rnn(x)[0] + self.count
        if self.what == "in a record":
            self.count += 1
            return Record(self.rnn(x)[0] + self.count)  # type: ignore[return-value]
        if self.what == "dropout":
            return nn.functional.dropout(self.rnn(x)[0], 0.5)
        self.mean.mul_(0.9).add_(0.1 * x.mean((0, 1)))
        return self.rnn(x - self.mean)[0]


def _after(function: Callable[[Tensor], Any]) -> Net:
    return Net(None, lambda net, y: function(y))


def _raise(y: Tensor) -> Any:
    raise ZeroDivisionError("my own words\nand more")


def _poisoned() -> Net:
    net = Net()
    net.rnn.weight_ih_l0.data.fill_(float("nan"))
    return net


def _locked() -> Net:
    net = Net()
    net.lock = threading.Lock()
    return net


def _chaotic() -> nn.Module:
    model = nn.RNN(5, 64, batch_first=True)
    model.weight_hh_l0.data.normal_(0, 3)
    return model


OTHERS: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "no recurrent layer": (
        lambda: nn.Sequential(nn.Linear(5, 6)),
        EXAMPLE,
        "no recurrent layer (nn.LSTM, nn.GRU, nn.RNN), no cell and no convolution over time was found in Sequential;",
    ),
    "a cell beside a layer": (
        lambda: Net(lambda net, x: x + net.layer(x[:, 0])[:, None], layer=nn.RNNCell(5, 5)),
        EXAMPLE,
        "layer 'layer' (RNNCell) is called once for 11 steps; a cell must be called once a step",
    ),
    "a layer that is never called": (
        lambda: _Unused(),
        EXAMPLE,
        "_Unused has recurrent layers, but its forward calls none of them",
    ),
    "a subclass": (
        lambda: nn.Sequential(Subclass(5, 6, batch_first=True)),
        EXAMPLE,
        "layer '0' (Subclass) is a subclass of nn.LSTM with a forward of its own",
    ),
    "a loop over steps": (Loop, EXAMPLE, "layer 'rnn' (LSTM) is called once for every time step"),
    "double precision": (lambda: Net().double(), EXAMPLE, "parameter 'rnn.weight_ih_l0' is float64"),
    "packed sequences": (
        lambda: Net(lambda net, x: nn.utils.rnn.pack_sequence(list(x))),
        EXAMPLE,
        "layer 'rnn' (LSTM) is given a PackedSequence",
    ),
    "a state from another layer": (
        lambda: Decoder("encoded"),
        EXAMPLE,
        "the initial state of layer 'decoder' (GRU) depends on the input",
    ),
    "a random state": (
        lambda: Decoder("random"),
        EXAMPLE,
        "the initial state of layer 'decoder' (GRU) is drawn at random",
    ),
    "a projected state": (
        lambda: TakesState("projected"),
        (EXAMPLE, torch.zeros(1, 2, 6)),
        "argument 2 [1, 2, 6] is not the state of a recurrent layer, or does not reach it unchanged",
    ),
    "a state that is changed before it is given back": (
        lambda: TakesState("halved"),
        (EXAMPLE, torch.zeros(1, 2, 6)),
        "returned tensor 2 [1, 3, 6] has the shape of a state argument, but is not the state as the recurrent layers",
    ),
    "two inputs": (
        lambda: TakesState("halved"),
        (EXAMPLE, torch.zeros(2, 16, 5)),
        "the model's forward fails on the example in layer 'rnn' (GRU): RuntimeError",
    ),
    "axes mixed up": (
        lambda: Net(None, lambda net, y: net.layer(y)[0], nn.GRU(6, 6)),
        EXAMPLE,
        "the layers do not agree which axis is time: layer 'rnn' (LSTM) and layer 'layer' (GRU) (is batch_first=True",
    ),
    "memory beside the state": (lambda: Keeps("mean"), EXAMPLE, "keeps more than the states of its recurrent layers"),
    "a counter": (lambda: Keeps("count"), EXAMPLE, "keeps more than the states of its recurrent layers"),
    "a counter in a record": (lambda: Keeps("in a record"), EXAMPLE, "keeps more than the states of its recurrent"),
    "dropout in eval mode": (lambda: Keeps("dropout"), EXAMPLE, "the model gives something else every time"),
    "a failing forward": (
        lambda: _after(_raise),
        EXAMPLE,
        "the model's forward fails on the example in the model itself (Net): ZeroDivisionError: my own words",
    ),
    "a branch on values": (
        lambda: _after(lambda y: y if y.sum() > 0 else -y),
        EXAMPLE,
        "the model's forward branches on the values of tensors",
    ),
    "a branch on values before a layer, which then seems to mix steps": (
        lambda: Net(lambda net, x: x * 2 if x.sum() > 0 else x, lambda net, y: net.layer(y), nn.Linear(6, 1)),
        EXAMPLE,
        "the model's forward branches on the values of tensors",
    ),
    "two states of one name": (
        Clashing,
        EXAMPLE,
        "two calls of layers are both named 'rnn@2', as the second call of a layer 'x' is named 'x@2'; give the layer",
    ),
    "a branch on sizes": (
        lambda: _after(lambda y: y if y.shape[1] < 13 else -y),
        EXAMPLE,
        "must do the same for every batch size and number of steps, but what it does holds for steps <= 12 only",
    ),
    "an operator ONNX lacks": (
        lambda: _after(torch.special.bessel_j0),
        EXAMPLE,
        "the model uses torch's 'prims.bessel_j0.default', which cannot be converted to ONNX",
    ),
    "nothing returned": (lambda: _after(lambda y: {}), EXAMPLE, "the model returns no tensor"),
    "a number returned": (lambda: _after(lambda y: (y, 3.0)), EXAMPLE, "the model takes or returns a float where"),
    "a constant returned": (
        lambda: _after(lambda y: (y, torch.ones(4))),
        EXAMPLE,
        "head 'output_1' has the shape [4] for a batch of 3 and 11 steps; a head needs one batch axis",
    ),
    "a head of bool": (
        lambda: _after(lambda y: y > 0),
        EXAMPLE,
        "head 'output' is bool; a head must be one of float32",
    ),
    "NaN weights": (_poisoned, EXAMPLE, "the model gives NaN, on the example and on random numbers"),
    "a lock inside": (_locked, EXAMPLE, "Net cannot be copied, and the original is not to be touched"),
    "chaos": (_chaotic, EXAMPLE, "float32 rounding grows to"),
    "an example without time": (Net, torch.ones(16), "the example is of rank 1 [16]; it must be [batch, time, ...]"),
    "an example without batch": (
        Net,
        torch.ones(16, 5),
        "layer 'rnn' (LSTM) gets an input of rank 2 [16, 5], without a batch axis",
    ),
    "an example of float64": (
        Net,
        EXAMPLE.double(),
        "the example is float64; an input is float32 (numbers) or int64 (token ids), so convert it with .float()",
    ),
    "an example of int32": (Net, EXAMPLE.int(), "so convert it with .long()"),
    "an example of another width": (
        Net,
        torch.ones(2, 16, 4),
        "the example is float32 [2, 16, 4], but layer 'rnn' (LSTM) takes 5 features a step",
    ),
    "numbers for token ids": (
        lambda: nn.Sequential(nn.Embedding(7, 5), nn.LSTM(5, 6)),
        torch.ones(2, 16),
        "the example is float32 [2, 16], but layer '0' (Embedding) takes token ids",
    ),
    "no tensor at all": (Net, [[1.0]], "the example's first argument must be a tensor [batch, time, ...]; it is list"),
    "an empty example": (Net, torch.ones(2, 0, 5), "the example [2, 0, 5] is empty"),
}


class _Unused(Net):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_exported_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    build, example, sentence = OTHERS[name]

    with pytest.raises(ExportError) as caught:
        recurd_export.export(build(), example, tmp_path / "m.onnx")

    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_export_error_has_an_exit_code_of_its_own() -> None:
    assert issubclass(ExportError, StartError)
    assert ExportError.exit_code is ExitCode.EXPORT


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"features": ["a", "b"]}, "2 features are named, but a step of the input has 5"),
        ({"units": ["m"]}, "1 units are named, but a step of the input has 5"),
        ({"labels": {"output": ["a"]}}, "1 labels are given for head 'output', which has 6 elements"),
        ({"labels": {"nothing": ["a"]}}, "labels are given for 'nothing', but the heads are output"),
        ({"name": ""}, "the model's name is empty"),
    ],
)
def test_facts_that_do_not_fit_the_model_are_refused(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ExportError, match=sentence):
        recurd_export.export(Net(), EXAMPLE, tmp_path / "m.onnx", **options)

    assert list(tmp_path.iterdir()) == []
