"""The commands export, verify and inspect, from the shell's side."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result

from recurd.cli import main
from recurd.errors import ExitCode

FACTORIES = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.before = nn.Linear(5, 4)
        self.rnn = kind(4, 6, batch_first=True)

    def forward(self, x):
        return self.rnn(self.before(x))[0]

class Chars(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.rnn = nn.GRU(4, 6, batch_first=True)

    def forward(self, ids):
        return self.rnn(self.embedding(ids))[0]

class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.RNNCell(5, 6)

    def forward(self, x):
        h = torch.zeros(x.size(0), 6)
        out = []
        for step in x.unbind(1):
            h = self.cell(step, h)
            out.append(h)
        return torch.stack(out, 1)

def with_example():
    return Net(), torch.zeros(3, 7, 5)

def other():
    return Net(nn.GRU)

def fails():
    raise RuntimeError("no such luck")

def number():
    return 3

def plain():
    return nn.Sequential(nn.Linear(2, 2))

def convolution():
    return nn.Sequential(nn.Conv1d(2, 2, 1), nn.LSTM(2, 2))

ready = Net()
bare = nn.GRU(5, 6, batch_first=True)
text = "not a factory"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A current directory with a module of factories, named so that no test sees another's."""
    module = f"factories_{abs(hash(request.node.name))}"
    (tmp_path / f"{module}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("MODULE", module)
    return tmp_path


def _run(folder: Path, *args: str) -> Result:
    module = next(folder.glob("factories_*.py")).stem
    return CliRunner().invoke(main, [arg.replace("MODULE", module) for arg in args])


def _net(folder: Path, name: str = "Net") -> Any:
    space: dict[str, Any] = {}
    exec(FACTORIES, space)
    return space[name]()


def test_export_verify_and_inspect_follow_each_other(folder: Path) -> None:
    torch.save(_net(folder).state_dict(), "w.pt")

    exported = _run(
        folder, "export", "MODULE:Net", "--weights", "w.pt", "--out", "pump.onnx", "--features", "a, b,c,d,e",
        "--units", "m,m,m,s,s", "--sample-rate-hz", "50", "--model-version", "7",
    )  # fmt: skip
    assert exported.exit_code == 0, exported.output
    assert "exported 'pump' to pump.onnx" in exported.output
    assert "hoisted rnn (LSTM, 1 layer of 6), initial zeros: rnn.h_l0, rnn.c_l0" in exported.output

    verified = _run(folder, "verify", "pump.onnx")
    assert verified.exit_code == 0
    assert verified.output.count(" ok") == 6
    assert "golden run" in verified.output

    shown = _run(folder, "inspect", "pump.onnx")
    assert shown.exit_code == 0
    for text in (
        "pump, version 7",
        "float32 [batch, time, 5], 50 Hz",
        "1: b [m]",
        "rnn.c_l0: float32 [1, batch, 6]",
        "12 elements, 48 bytes a",
    ):
        assert text in shown.output


def test_the_same_in_json(folder: Path) -> None:
    report = json.loads(_run(folder, "export", "MODULE:Net", "-o", "m.onnx", "--json").output)
    checks = json.loads(_run(folder, "verify", "m.onnx", "--json").output)
    contract = json.loads(_run(folder, "inspect", "m.onnx", "--json").output)

    assert report["contract"] == contract
    assert report["hoisted"][0]["states"] == ["rnn.h_l0", "rnn.c_l0"]
    assert [check["ok"] for check in checks] == [True] * 6
    assert contract["proof"]["golden"]["input"]["shape"] == [3, 6, 5]


def test_the_weights_are_the_ones_in_the_file(folder: Path) -> None:
    weights = _net(folder).state_dict()
    torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}, "epoch": 3}, "a.pt")
    safetensors.torch.save_file(weights, "b.safetensors")

    hashes = []
    for file in ("a.pt", "b.safetensors"):
        assert _run(folder, "export", "MODULE:Net", "--weights", file, "-o", "m.onnx").exit_code == 0
        hashes.append(json.loads(_run(folder, "inspect", "m.onnx", "--json").output)["weights_sha256"])

    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    ("target", "options", "shape"),
    [
        ("with_example", [], "float32 [batch, time, 5]"),
        ("ready", [], "float32 [batch, time, 5]"),
        ("bare", [], "float32 [batch, time, 5]"),
        ("Loop", [], "float32 [batch, time, 5]"),
        ("Chars", [], "int64 [batch, time]"),
        ("Chars", ["--example", "2,8", "--dtype", "int64"], "int64 [batch, time]"),
        ("Net", ["--example", "4,4,5"], "float32 [batch, time, 5]"),
    ],
)
def test_an_example_is_taken_or_guessed(folder: Path, target: str, options: list[str], shape: str) -> None:
    done = _run(folder, "export", f"MODULE:{target}", "-o", "m.onnx", *options)

    assert done.exit_code == 0, done.output
    assert f"input   {shape}" in done.output


#: Of the sentences below, those about the command line itself.
USAGE = ("does not name", "names a file", "there is no module", "has no 'missing'", "is a str", "cannot be read")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["mine.py:make"], "'mine.py:make' names a file, not a module; write mine:make"),
        (["MODULE"], "does not name a factory; write package.module:factory"),
        (["nowhere.at.all:f"], "there is no module 'nowhere' (looked in "),
        (["MODULE:missing"], "has no 'missing'"),
        (["MODULE:text"], "is a str, not a factory of modules"),
        (["MODULE:fails"], "failed: RuntimeError: no such luck"),
        (["MODULE:number"], "gives an int; it must give a torch.nn.Module, or one and an example"),
        (["MODULE:plain"], "no cell and no convolution over time was found in Sequential"),
        (["MODULE:convolution"], "no example is given, and it cannot be guessed from layer '0' (Conv1d)"),
        (["MODULE:Net", "--weights", "none.pt"], "none.pt: cannot be read: No such file or directory"),
        (["MODULE:Net", "--weights", "noise.pt"], "noise.pt: is not a file of weights"),
        (["MODULE:Net", "--weights", "noise.safetensors"], "noise.safetensors: is not a file of weights"),
        (["MODULE:Net", "--weights", "whole.pt"], "whole.pt: holds more than weights, which is not loaded because"),
        (["MODULE:Net", "--weights", "list.pt"], "list.pt: holds no state dict"),
        (["MODULE:other", "--weights", "w.pt"], "'rnn.weight_ih_l0' is [24, 4], the model's is [18, 4]"),
        (["MODULE:Chars", "--weights", "w.pt"], "does not fit Chars: missing embedding.weight; unexpected before.bias"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder: Path, args: list[str], sentence: str) -> None:
    net = _net(folder)
    torch.save(net.state_dict(), "w.pt")
    torch.save([1, 2], "list.pt")
    torch.save(torch.nn.Linear(1, 1), "whole.pt")
    Path("noise.pt").write_bytes(b"noise" * 100)
    Path("noise.safetensors").write_bytes(b"noise" * 100)

    done = _run(folder, "export", *args, "-o", "m.onnx")

    assert sentence in done.output
    is_usage = any(text in sentence for text in USAGE)
    assert done.exit_code == (ExitCode.USAGE if is_usage else ExitCode.EXPORT)
    assert done.output.count("\n") == 1
    assert not Path("m.onnx").exists()


def test_wrong_usage_is_told_apart(folder: Path) -> None:
    assert _run(folder, "export", "MODULE:Net").exit_code == ExitCode.USAGE
    assert _run(folder, "export", "MODULE:Net", "-o", "m.onnx", "--example", "2,x").exit_code == ExitCode.USAGE


@pytest.mark.parametrize("command", ["export", "verify", "inspect"])
def test_help_has_examples_and_needs_no_framework(command: str) -> None:
    script = (
        "import sys\nfrom recurd.cli import main\n"
        "try:\n    main(['COMMAND', '--help'])\nfinally:\n    assert 'torch' not in sys.modules\n"
    ).replace("COMMAND", command)

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert "Examples:" in done.stdout
    assert f"recurd {command} pump" in done.stdout


def test_a_missing_or_broken_file_is_one_line_and_its_exit_code(folder: Path) -> None:
    Path("broken.onnx").write_bytes(b"not a model")
    for command in ("verify", "inspect"):
        for file, text in (("none.onnx", "there is no such file"), ("broken.onnx", "not a valid ONNX model")):
            done = _run(folder, command, file)

            assert text in done.output
            assert done.output.count("\n") == 1
            assert done.exit_code == ExitCode.CONTRACT


def test_nothing_but_the_report_is_printed_when_there_is_no_terminal(folder: Path) -> None:
    module = next(folder.glob("factories_*.py")).stem
    script = (
        "import torch, warnings; warnings.simplefilter('error'); from recurd.cli import main\n"
        f"main(['export', '{module}:Net', '--out', 'm.onnx'])"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("exported 'm' to m.onnx")
