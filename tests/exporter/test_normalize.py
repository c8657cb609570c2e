"""Normalisation in the graph: clients send raw values, and the file does what the model does with prepared ones."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import recurd_export
from recurd.cli import main
from recurd.contract import Contract, Head, Input, Source, State
from recurd.errors import ContractError, ExitCode
from recurd.model import Model
from recurd.verify import Inputs, verify
from recurd_export import normalize
from recurd_export.errors import ExportError

#: A pressure in pascal, which float32 holds to 1/128, among others.
MEAN, STD = [101_325.123, -3.0, 0.02], [12.5, 400.0, 0.001]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 6, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


def _raw(rows: int, steps: int) -> np.ndarray:
    return (np.random.default_rng(5).normal(size=(rows, steps, 3)) * STD + MEAN).astype(np.float32)


def _served(path: Path, x: np.ndarray) -> np.ndarray:
    """What the daemon's model gives for whole streams, in chunks of 4 steps."""
    model = Model.load(path, slots=len(x), threads=1)
    slots = np.arange(len(x))
    parts = []
    for start in range(0, x.shape[1], 4):
        piece = np.ascontiguousarray(x[:, start : start + 4])
        lengths = np.full(len(x), piece.shape[1], np.int32)
        parts += model.run(slots, np.full(len(x), start == 0), lengths, piece)
    return np.concatenate(parts, axis=1)


def _expected(net: nn.Module, prepared: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return net(torch.from_numpy(prepared.astype(np.float32))).numpy()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(1)
    return Net()


@pytest.fixture(scope="module")
def path(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("normalize") / "pump.onnx"
    recurd_export.export(net, torch.zeros(1, 5, 3), target, normalize=(MEAN, np.array(STD)))
    return target


def test_the_served_file_gives_for_raw_values_what_the_model_gives_for_normalised_ones(
    net: nn.Module, path: Path
) -> None:
    x = _raw(3, 10)

    found = _served(path, x)

    np.testing.assert_allclose(found, _expected(net, (x.astype(np.float64) - MEAN) / STD), rtol=0, atol=2e-6)


def test_the_contract_says_mean_and_deviation(path: Path) -> None:
    contract = Model.load(path, slots=1).contract

    assert (list(contract.input.mean), list(contract.input.std)) == (MEAN, STD)
    assert contract.public()["input"]["mean"] == tuple(MEAN) or contract.public()["input"]["mean"] == MEAN


def test_the_file_verifies_itself_on_input_as_the_model_expects_it(path: Path) -> None:
    checks = verify(path)
    contract = Model.load(path, slots=1).contract

    assert all(check.ok for check in checks)
    assert contract.proof is not None
    drawn = contract.proof.golden.input.array().reshape(-1, 3)
    assert (abs(drawn.mean(axis=0) - MEAN) < STD).all()
    assert len(np.unique(drawn)) == drawn.size


def test_single_numbers_hold_for_every_feature(net: nn.Module, tmp_path: Path) -> None:
    report = recurd_export.export(net, torch.zeros(1, 5, 3), tmp_path / "m.onnx", normalize=(2, 0.5))
    x = np.random.default_rng(6).normal(2, 0.5, (2, 5, 3)).astype(np.float32)

    assert report.contract.input.std == (0.5, 0.5, 0.5)
    assert "normalised in the graph" in str(report)
    np.testing.assert_allclose(_served(report.path, x), _expected(net, (x - 2) / 0.5), rtol=0, atol=1e-6)


def test_an_example_of_prepared_values_becomes_raw_ones_to_verify_with(tmp_path: Path) -> None:
    class Logarithm(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.log(x))

    report = recurd_export.export(
        Logarithm(), torch.rand(2, 8, 3) + 1, tmp_path / "m.onnx", normalize=([10, 20, 30], [2, 2, 2])
    )

    assert report.contract.proof is not None
    raw = report.contract.proof.golden.input.array()
    assert (raw >= [12, 22, 32]).all()
    assert (raw <= [14, 24, 34]).all()


def _standard(**options: Any) -> Callable[[Any], Any]:
    return lambda module: module.StandardScaler(**options)


@pytest.mark.parametrize(
    "make",
    [
        _standard(),
        _standard(with_mean=False),
        _standard(with_std=False),
        _standard(with_mean=False, with_std=False),
        lambda module: module.RobustScaler(),
        lambda module: module.RobustScaler(with_centering=False),
        lambda module: module.RobustScaler(with_scaling=False),
        lambda module: module.MinMaxScaler(feature_range=(-1, 3)),
        lambda module: module.MaxAbsScaler(),
    ],
)
def test_a_fitted_scaler_does_in_the_graph_what_it_does_in_scikit_learn(make: Callable[[Any], Any]) -> None:
    scaler = make(pytest.importorskip("sklearn.preprocessing"))
    x = _raw(1, 50)[0]
    scaler.fit(x)
    input = Input(dtype="float32", shape=(3,))

    found = normalize.parse(scaler).shaped(input).apply(x)

    wanted = scaler.transform(x.astype(np.float64))
    np.testing.assert_allclose(found, wanted, rtol=3e-7, atol=3e-7)


def test_a_standard_scaler_goes_into_the_file(net: nn.Module, tmp_path: Path) -> None:
    scaler = pytest.importorskip("sklearn.preprocessing").StandardScaler().fit(_raw(1, 200)[0])
    x = _raw(2, 6)

    recurd_export.export(net, torch.zeros(1, 5, 3), tmp_path / "m.onnx", normalize=scaler)

    prepared = scaler.transform(x.reshape(-1, 3).astype(np.float64)).reshape(x.shape)
    np.testing.assert_allclose(_served(tmp_path / "m.onnx", x), _expected(net, prepared), rtol=0, atol=2e-6)


_Unfitted = type("StandardScaler", (), {"fit": None, "transform": None})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (([0, 0, 0], [1, 0, 1]), "a std is zero or negative"),
        ((0, -1), "a std is zero or negative"),
        ((0, 1e-60), "a std is zero or negative"),
        (([0, float("nan"), 0], 1), "the mean is not finite"),
        ((0, float("inf")), "the std is not finite"),
        ((0, 1e60), "the std is not finite"),
        (([0, 0], [1, 1]), r"a mean of shape \[2\], but a step of the input is \[3\]"),
        ((0, [1, 1, 1, 1]), r"a std of shape \[4\], but a step of the input is \[3\]"),
        (("a", "b"), "must be numbers or arrays"),
        ("mean", r"takes a pair \(mean, std\)"),
        (3, r"takes a pair \(mean, std\)"),
        ((1, 2, 3), r"takes a pair \(mean, std\)"),
        (_Unfitted(), "this StandardScaler is not fitted"),
        (SimpleNamespace(fit=0, transform=0, scale_=1, min_=0, clip=True), "clips, which is not put into the graph"),
    ],
)
def test_what_cannot_be_put_into_the_graph_is_said(net: nn.Module, tmp_path: Path, given: Any, words: str) -> None:
    with pytest.raises(ExportError, match=words) as caught:
        recurd_export.export(net, torch.zeros(1, 5, 3), tmp_path / "m.onnx", normalize=given)

    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_token_ids_are_not_normalised(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(7, 3), nn.LSTM(3, 4, batch_first=True))

    with pytest.raises(ExportError, match="takes token ids, which cannot be normalised"):
        recurd_export.export(model, torch.zeros(1, 5, dtype=torch.int64), tmp_path / "m.onnx", normalize=(0, 1))


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [
        ((0.0,), (1.0, 1.0), "1 means and 2 deviations for 2 float32s"),
        ((0.0, 0.0), (1.0, 0.0), "deviations finite and positive"),
        ((0.0, float("inf")), (1.0, 1.0), "deviations finite and positive"),
    ],
)
def test_a_contract_with_a_normalisation_that_cannot_be_is_refused(
    mean: tuple[float, ...], std: tuple[float, ...], words: str
) -> None:
    from recurd import contract as contracts

    described = Contract(
        name="x",
        input=Input(dtype="float32", shape=(2,), mean=mean, std=std),
        heads=(Head(name="y", dtype="float32", shape=(1,)),),
        states=(State(name="h", output="h.next", dtype="float32", shape=(1,), batch_axis=0),),
        source=Source(framework="none"),
        weights_sha256="",
    )
    import onnx

    with pytest.raises(ContractError, match=words):
        contracts.check(onnx.ModelProto(), described)


def test_random_input_has_the_mean_and_deviation_of_the_contract() -> None:
    input = Input(dtype="float32", shape=(2, 2), mean=(1.0, 10.0, 100.0, 1000.0), std=(1.0, 2.0, 3.0, 4.0))

    (drawn,) = Inputs(input).draw([4000], np.random.default_rng(0))

    assert drawn.shape == (4000, 2, 2)
    assert drawn.dtype == np.float32
    np.testing.assert_allclose(drawn.mean(axis=0).ravel(), input.mean, atol=0.3)
    np.testing.assert_allclose(drawn.std(axis=0).ravel(), input.std, rtol=0.1)


FACTORY = "from torch import nn\ndef make():\n    return nn.GRU(3, 4, batch_first=True)\n"


def _command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None) -> Any:
    (tmp_path / "normalized_factory.py").write_text(FACTORY)
    if text is not None:
        (tmp_path / "scale.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    arguments = ["export", "normalized_factory:make", "--normalize", "scale.json", "--out", "m.onnx"]
    return CliRunner().invoke(main, arguments)


def test_the_command_takes_mean_and_deviation_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = _command(tmp_path, monkeypatch, json.dumps({"mean": MEAN, "std": STD}))

    assert result.exit_code == 0, result.output
    assert Model.load(tmp_path / "m.onnx", slots=1).contract.input.mean == tuple(MEAN)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "scale.json: cannot be read: No such file"),
        ("mean = 3", 'scale.json: is not JSON of the form {"mean": [...], "std": [...]}'),
        ("[1, 2]", "scale.json: is not JSON of the form"),
        ('{"mean": [0, 0, 0]}', "scale.json: is not JSON of the form"),
        ('{"mean": 0, "std": "wide"}', "must be numbers or arrays"),
    ],
)
def test_a_file_that_says_neither_mean_nor_deviation_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, words: str
) -> None:
    result = _command(tmp_path, monkeypatch, text)

    assert result.exit_code == ExitCode.USAGE
    assert words in result.output
