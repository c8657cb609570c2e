"""Models and weights out of files: what is loaded, what is run, and what is said of everything else."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from torch import nn

import recurd_export
from recurd.cli import main
from recurd_export import ExportError
from recurd_export.pytorch.files import load_weights

MODULE = """
from pathlib import Path

import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0])

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.rnn = nn.GRU(4, 4, batch_first=True)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.rnn(self.embedding(ids))[0])

class Leaves:
    def __reduce__(self):
        return (Path("it-ran").touch, ())
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module below the current directory with models to store."""
    (tmp_path / "stored_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    import stored_models  # type: ignore[import-not-found]

    yield stored_models
    del sys.modules["stored_models"]


def _run(*args: str) -> Result:
    return CliRunner().invoke(main, ["export", *args, "--out", "m.onnx"])


def test_a_whole_module_is_exported_from_its_file_when_the_file_is_trusted(module: Any) -> None:
    torch.save(module.Net(), "net.pt")

    result = _run("net.pt", "--trust-pickle", "--labels", "output=low, high", "--json")

    assert result.exit_code == 0, result.output
    contract = json.loads(result.stdout)["contract"]
    assert contract["source"]["model"] == "stored_models.Net"
    assert contract["heads"][0]["labels"] == ["low", "high"]


def test_a_checkpoint_that_holds_a_module_is_taken_too(module: Any, tmp_path: Path) -> None:
    torch.save({"model": module.Net(), "epoch": 7}, "net.pt")

    report = recurd_export.export("net.pt", None, tmp_path / "m.onnx", trust_pickle=True)

    assert report.contract.input.shape == (3,)


def test_code_in_a_file_is_run_only_for_those_who_trust_it(module: Any) -> None:
    torch.save(module.Leaves(), "net.pt")

    refused = _run("net.pt")
    assert not Path("it-ran").exists()
    trusted = _run("net.pt", "--trust-pickle")

    assert refused.exit_code == 2
    assert "loading one runs code that is in the file; say --trust-pickle if you trust" in refused.stderr
    assert Path("it-ran").exists()
    assert trusted.exit_code == 70
    assert "holds a NoneType, not a torch.nn.Module" in trusted.stderr


def test_the_help_says_what_trust_means() -> None:
    text = " ".join(CliRunner().invoke(main, ["export", "--help"]).output.split())

    assert "RUNS code that is in the file. Only for files you trust" in text


def _script(module: Any) -> None:
    with pytest.warns(DeprecationWarning, match="jit"):
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), "net.pt")


def _exported(module: Any) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), "net.pt")


@pytest.mark.parametrize(
    ("store", "args", "sentence"),
    [
        (lambda m: torch.save(m.Net().state_dict(), "net.pt"), ["net.pt"], "holds weights only; name what builds"),
        (
            lambda m: safetensors.torch.save_file(m.Net().state_dict(), "net.safetensors"),
            ["net.safetensors"],
            "name what builds the model: recurd export package.module:factory --weights net.safetensors",
        ),
        (lambda m: Path("net.pt").write_bytes(b"nothing"), ["net.pt"], "net.pt: is not a file of weights"),
        (lambda m: Path("net.pt").write_bytes(b"nothing"), ["net.pt", "--trust-pickle"], "not a file of a torch model"),
        (lambda m: Path("net.pt").write_bytes(b""), ["net.pt"], "net.pt: is not a file of weights\n"),
        (lambda m: Path("net.pt").write_bytes(b"h\x65" * 20), ["net.pt"], "net.pt: is not a file of weights\n"),
        (lambda m: None, ["net.pt"], "net.pt: cannot be read: No such file or directory"),
        (lambda m: None, ["net.pt", "--trust-pickle"], "net.pt: cannot be read: No such file or directory"),
        (lambda m: torch.save([1, 2], "net.pt"), ["net.pt", "--trust-pickle"], "holds a list, not a torch.nn.Module"),
        (_script, ["net.pt", "--trust-pickle"], "is a TorchScript archive, in which the states cannot be told apart"),
        (_exported, ["net.pt"], "is a torch.export archive"),
        (lambda m: None, ["net.onnx"], "an ONNX file is not exported but adopted: recurd adopt net.onnx"),
        (lambda m: torch.save(m.Net(), "net.pt"), ["net.pt", "--weights", "w.pt"], "brings its own weights"),
        (lambda m: None, ["net.keras", "--example", "1,2,3"], "says itself what its input is"),
        (lambda m: None, ["a:b", "--labels", "output"], "write --labels output=low,high"),
    ],
)
def test_what_cannot_be_taken_from_a_file_is_said_in_one_sentence(
    module: Any, store: Any, args: list[str], sentence: str
) -> None:
    store(module)

    result = _run(*args)

    assert result.exit_code in (2, 70), result.output
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert not Path("m.onnx").exists()


def test_a_class_that_is_nowhere_to_be_found_is_named(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(module.Net(), "net.pt")
    Path("stored_models.py").write_text("")
    monkeypatch.delattr(module, "Net")

    result = _run("net.pt", "--trust-pickle")

    assert result.exit_code == 70
    assert "the class of its model cannot be imported here" in result.stderr
    assert "Net" in result.stderr


def test_tied_weights_that_safetensors_stores_once_fit(module: Any) -> None:
    source, target = module.Tied(), module.Tied()
    safetensors.torch.save_model(source, "tied.safetensors")

    load_weights(target, Path("tied.safetensors"))

    assert torch.equal(target.head.weight, source.embedding.weight)


def test_weights_that_are_missing_are_missing_though_others_are_tied(module: Any) -> None:
    weights = module.Tied().state_dict()
    safetensors.torch.save_file({k: v for k, v in weights.items() if "weight" not in k}, "w.safetensors")

    with pytest.raises(ExportError, match=r"missing embedding\.weight, head\.weight, rnn\.weight_hh_l0"):
        load_weights(module.Tied(), Path("w.safetensors"))


@pytest.mark.parametrize(
    ("thing", "kind"), [(3, "an int"), (nn.LSTM, "a type"), ({"a": 1}, "a dict"), (object(), "an object")]
)
def test_what_is_no_model_is_said(tmp_path: Path, thing: Any, kind: str) -> None:
    with pytest.raises(
        ExportError, match=rf"there is no way to export {kind}; give a torch\.nn\.Module, a Keras model"
    ):
        recurd_export.export(thing, None, tmp_path / "m.onnx")


def test_a_path_without_a_known_ending_is_said(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"is no file of a model by its name; those are \.bin"):
        recurd_export.export(tmp_path / "model.txt", None, tmp_path / "m.onnx")
