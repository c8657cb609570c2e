"""Files somebody else made, with the worst intentions: nothing in them runs, and each is refused in one sentence."""

import copy
import json
import marshal
import os
import pickle
import zipfile
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import recurd_export
from recurd import contract as contracts
from recurd.cli import main
from recurd_export import ExportError

Contract = dict[str, Any]


class Leaves:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("it-ran",))


class Names(nn.Module):
    """Heads with names that are markup for a terminal and for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=True)

    def forward(self, x: Any) -> dict[str, Any]:
        y, _ = self.rnn(x)
        return {"[/red]": y, "<script>alert(1)</script>": 2 * y}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "good.onnx"
    recurd_export.export(Names(), torch.zeros(2, 5, 3), path, report=path.with_suffix(".html"))
    return path


def _edited(good: Path, edit: Callable[[Contract], object]) -> str:
    """A copy whose contract was edited."""
    model = onnx.load(good)
    entry = next(p for p in model.metadata_props if p.key == contracts.METADATA_KEY)
    contract = copy.deepcopy(json.loads(entry.value))
    edit(contract)
    entry.value = json.dumps(contract)
    onnx.save(model, "edited.onnx")
    return "edited.onnx"


def _run(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


@pytest.mark.parametrize("ending", [".pt", ".pth", ".bin", ".ckpt", ".pkl", ".safetensors", ".keras", ".h5"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_pickle_is_not_run_whatever_it_is_called(ending: str, kind: str) -> None:
    path = Path(f"model{ending}")
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Leaves(), protocol=2))
    else:
        torch.save(Leaves(), path, _use_new_zipfile_serialization=kind == "zip")

    with pytest.raises(ExportError) as refusal:
        recurd_export.export(path, None, "m.onnx")

    assert "\n" not in str(refusal.value)
    assert not Path("it-ran").exists()


def _keras_file(config: str) -> Path:
    with zipfile.ZipFile("model.keras", "w") as archive:
        archive.writestr("metadata.json", '{"keras_version": "3.15.1", "date_saved": "2026-01-01@00:00:00"}')
        archive.writestr("config.json", config)
        archive.writestr("model.weights.h5", b"")
    return Path("model.keras")


def _layer(module: str, name: str, config: Any) -> str:
    inner = {"module": module, "class_name": name, "config": config, "registered_name": None}
    layers = {"module": "keras", "class_name": "Sequential", "config": {"layers": [inner]}, "registered_name": None}
    return json.dumps(layers)


CODE = b64encode(marshal.dumps(compile("__import__('os').mkdir('it-ran')", "x", "eval"))).decode()


@pytest.mark.parametrize(
    "config",
    [
        _layer("keras.layers", "Lambda", {"function": {"class_name": "__lambda__", "config": {"code": CODE}}}),
        _layer("keras.layers", "TorchModuleWrapper", {"module": CODE}),
        _layer("keras.layers", "TFSMLayer", {"filepath": "/etc"}),
        _layer("keras.utils", "get_file", {"origin": "file:///etc/passwd"}),
        _layer("keras.config", "enable_unsafe_deserialization", {}),
        _layer("os", "mkdir", "it-ran"),
        "[]",
        "null",
        '{"config": ' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
)
def test_a_keras_file_runs_nothing_and_is_refused_in_a_sentence(config: str) -> None:
    path = _keras_file(config)

    with pytest.raises(ExportError) as refusal:
        recurd_export.export(path, None, "m.onnx")

    assert "\n" not in str(refusal.value)
    assert not Path("it-ran").exists()


@pytest.mark.parametrize("location", ["/etc/passwd", "../../../../../../etc/passwd", "link", "/dev/zero"])
@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["adopt", "-o", "m.onnx"]])
def test_weights_are_not_read_from_files_outside(good: Path, location: str, command: list[str]) -> None:
    Path("link").symlink_to("/etc/passwd")
    model = onnx.load(good)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    Path("outside.onnx").write_bytes(model.SerializeToString())

    result = _run(command[0], "outside.onnx", *command[1:])

    assert result.exit_code in (65, 70), result.output
    assert "root:" not in result.output
    assert not Path("m.onnx").exists()


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c["states"][0].update(shape=[1, 10**14]),
        lambda c: c["states"][0].update(shape=[-1, 4]),
        lambda c: c["states"][0].update(initial={"dtype": "object", "shape": [1, 4], "data": "A" * 44}),
        lambda c: c["input"].update(shape=[10**18]),
        lambda c: c["input"].update(mean=[0, 0, 0], std=[0, 1, 1]),
        lambda c: c.update(format=10**400),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_contract_that_lies_is_refused_in_a_sentence(
    good: Path, edit: Callable[[Contract], object], command: str
) -> None:
    result = _run(command, _edited(good, edit))

    assert result.exit_code == 65, result.output
    assert result.stderr.count("\n") == 1


def test_fewer_units_than_features_can_be_read(good: Path) -> None:
    path = _edited(good, lambda c: c["input"].update(features=["a", "b", "c"], units=["bar"]))

    result = _run("inspect", path)

    assert result.exit_code == 0, result.output
    assert "0: a [bar]" in result.output


def test_names_that_are_markup_are_shown_as_they_are(good: Path) -> None:
    verified = _run("verify", _edited(good, lambda c: None))
    page = good.with_suffix(".html").read_text()

    assert verified.exit_code == 0, verified.output
    assert "[/red]" in verified.output
    assert "<script" not in page
