"""What export leaves alone: the caller's module, its files, its process."""

import copy
import logging
import os
import random
import stat
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import recurd_export
from recurd_export import ExportError, pipeline
from recurd_export.pytorch import convert


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 6, 2, batch_first=True, dropout=0.5)
        self.norm = nn.BatchNorm1d(6)
        self.linear = nn.Linear(6, 2)
        self.state: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y, self.state = self.rnn(x)
        return self.linear(self.norm(y.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("training", [True, False])
def test_the_module_is_left_as_it_was(tmp_path: Path, training: bool) -> None:
    model = Net().train(training)
    model.rnn.eval()
    model(torch.randn(2, 4, 5)).sum().backward()
    seen: list[str] = []
    model.linear.register_forward_hook(lambda *_: seen.append("hook"))
    example = torch.randn(2, 16, 5)
    model.linear.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict()), [p.grad for p in model.parameters()], dict(vars(model))
    gradients = [None if g is None else g.clone() for g in before[1]]
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    kept = example.clone()

    recurd_export.export(model, example, tmp_path / "m.onnx")

    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), model.state_dict().values(), strict=True))
    assert list(before[0]) == list(model.state_dict())
    assert [p.grad for p in model.parameters()] == before[1]
    for now, then in zip(before[1], gradients, strict=True):
        assert now is then is None or torch.equal(now, then)
    assert [module.training for module in model.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert [p.requires_grad for p in model.parameters()] == flags
    assert vars(model).keys() == before[2].keys()
    assert model.state is before[2]["state"]
    assert "forward" not in vars(model.rnn)
    assert torch.equal(example, kept)


class Noise(nn.Module):
    """Draws numbers, in eval mode too, and then makes nothing of them."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=True)
        self.sigma = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x + self.sigma * torch.randn_like(x))[0]


@pytest.mark.parametrize("model", [nn.GRU(3, 4, 2, batch_first=True, dropout=0.5), Noise()])
def test_the_state_of_the_random_generators_is_left_as_it_was(tmp_path: Path, model: nn.Module) -> None:
    before, numpy_before, python_before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    recurd_export.export(model, torch.zeros(1, 2, 3), tmp_path / "m.onnx")

    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()
    assert random.getstate() == python_before


def test_export_works_in_inference_mode(tmp_path: Path) -> None:
    with torch.inference_mode():
        recurd_export.export(Net(), torch.zeros(1, 2, 5), tmp_path / "m.onnx")

    assert (tmp_path / "m.onnx").exists()


def test_modes_of_the_process_are_left_as_they_were(tmp_path: Path) -> None:
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = logger.level, torch.is_grad_enabled(), torch.get_num_threads(), list(warnings.filters), sys.stderr

    recurd_export.export(nn.GRU(3, 4, batch_first=True), torch.zeros(1, 2, 3), tmp_path / "m.onnx")

    after = logger.level, torch.is_grad_enabled(), torch.get_num_threads(), list(warnings.filters), sys.stderr
    assert after == before


def test_a_model_that_writes_to_its_input_does_not_write_to_the_example(tmp_path: Path) -> None:
    class Doubles(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    example = torch.ones(2, 4, 5)

    recurd_export.export(Doubles(), example, tmp_path / "m.onnx")

    assert torch.equal(example, torch.ones(2, 4, 5))


def test_exports_in_one_process_do_not_disturb_each_other(tmp_path: Path, plain_run: Any) -> None:
    model = nn.LSTM(3, 4, batch_first=True).eval()
    for number in range(2):
        path = tmp_path / f"m{number}.onnx"
        recurd_export.export(model, torch.zeros(2, 5 + number, 3), path, name="m")
        plain = plain_run(path)
        x = torch.randn(4, 9, 3)
        with torch.no_grad():
            np.testing.assert_allclose(plain.run(x.numpy(), plain.initial(4))[0]["output"], model(x)[0], atol=1e-6)

    assert len({(tmp_path / f"m{number}.onnx").read_bytes() for number in range(2)}) == 1


def test_importing_the_exporter_imports_no_torch() -> None:
    script = "import sys, recurd_export; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_file_is_readable_by_others_as_any_file_is(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    (tmp_path / "other").touch()

    recurd_export.export(nn.GRU(3, 4, batch_first=True), torch.zeros(1, 2, 3), path)

    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_a_file_that_was_there_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    reader = path.open("rb")

    recurd_export.export(nn.GRU(3, 4, batch_first=True), torch.zeros(1, 2, 3), path)

    assert reader.read() == b"old"  # who had it open keeps the old one
    assert path.stat().st_size > 1000
    reader.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16-weights"])
def test_a_failed_check_leaves_the_file_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """A wrong translation to ONNX is found out, told with its numbers, and nothing is written.

    Also where the file is to be in a precision whose own rounding is larger than what is wrong.
    """
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def spoiled(*args: Any) -> Any:
        model = to_onnx(*args)
        for tensor in model.graph.initializer:
            if tensor.name.endswith("onnx_r_l0"):
                values = np.frombuffer(tensor.raw_data, np.float32) * np.float32(1.01)
                tensor.raw_data = values.tobytes()
        return model

    to_onnx = convert.to_onnx
    monkeypatch.setattr(convert, "to_onnx", spoiled)

    with pytest.raises(ExportError, match=r"in the check 'alone' '\S+' is off by 0\.00\d+, at most \S+e-05 is"):
        recurd_export.export(nn.GRU(3, 4, batch_first=True), torch.zeros(1, 2, 3), path, precision=precision)

    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"]


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(stage: str) -> None:
        if stage == pipeline.STAGES[-1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recurd_export.export(
            nn.GRU(3, 4, batch_first=True), torch.zeros(1, 2, 3), tmp_path / "m.onnx", progress=interrupt
        )

    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_missing_or_closed_is_one_sentence(tmp_path: Path) -> None:
    model, example = nn.GRU(3, 4, batch_first=True), torch.zeros(1, 2, 3)

    with pytest.raises(ExportError, match=r"none/m\.onnx: cannot be written: there is no directory"):
        recurd_export.export(model, example, tmp_path / "none" / "m.onnx")
    with pytest.raises(ExportError, match="it is a directory"):
        recurd_export.export(model, example, tmp_path)
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(ExportError, match="Permission denied"):
            recurd_export.export(model, example, tmp_path / "m.onnx")


def test_a_contract_beside_the_file_that_would_be_taken_instead_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.contract.json").write_text("{}")

    with pytest.raises(ExportError, match=r"the contract in m\.contract\.json beside it would be taken instead"):
        recurd_export.export(nn.GRU(3, 4, batch_first=True), torch.zeros(1, 2, 3), tmp_path / "m.onnx")


def test_progress_names_every_stage_in_order(tmp_path: Path) -> None:
    told: list[str] = []

    recurd_export.export(
        nn.GRU(3, 4, batch_first=True), torch.zeros(1, 2, 3), tmp_path / "m.onnx", progress=told.append
    )

    assert told == [stage for stage in pipeline.STAGES if stage != pipeline.LOAD]


def test_a_models_name_has_no_slash(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="the model's name 'hall/pump' holds a '/'"):
        recurd_export.export(
            nn.GRU(3, 4, batch_first=True), torch.zeros(1, 2, 3), tmp_path / "m.onnx", name="hall/pump"
        )


@pytest.mark.parametrize("facts", [{"name": "pump\n"}, {"version": "\x1b[31m1"}, {"features": ["a", "b\x07", "c"]}])
def test_names_that_no_terminal_should_be_sent_are_refused(tmp_path: Path, facts: Any) -> None:
    with pytest.raises(ExportError, match="holds characters that cannot be printed"):
        recurd_export.export(nn.GRU(3, 4, batch_first=True), torch.zeros(1, 2, 3), tmp_path / "m.onnx", **facts)

    assert list(tmp_path.iterdir()) == []
