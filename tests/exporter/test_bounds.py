"""No value that a client may send is an index beyond a table, and heads come in one type."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import recurd_export
from recurd.contract import load
from recurd_export import ExportError

IDS = torch.zeros(2, 16, dtype=torch.int64)
PAIRS = torch.zeros(2, 16, 2, dtype=torch.int64)
NUMBERS = torch.zeros(2, 16, 2)


class Net(nn.Module):
    """Embeddings of 9 and 7, what goes into the layer is what a test asks for."""

    def __init__(self, before: Any) -> None:
        super().__init__()
        self.nine, self.seven = nn.Embedding(9, 4), nn.Embedding(7, 4)
        self.also = nn.Embedding(9, 4)
        self.table = nn.Parameter(torch.randn(9, 4))
        self.rnn = nn.GRU(4, 6, batch_first=True)
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.before(self, x))[0]


def _written(net: Net, x: Tensor) -> Tensor:
    ids = x[..., 0].long().clamp(0, 8)
    ids[:, :].add_(1)
    return net.nine(ids)


SAFE: dict[str, tuple[Any, Tensor, int | None]] = {
    "ids": (lambda n, x: n.nine(x), IDS, 9),
    "one id in two embeddings": (lambda n, x: n.nine(x) + n.seven(x), IDS, 7),
    "an id and what is left of it": (lambda n, x: n.nine(x) + n.seven(x % 7), IDS, 9),
    "an id and the one after it, clamped": (lambda n, x: n.nine(x) + n.nine((x + 1).clamp(max=8)), IDS, 9),
    "columns that agree": (lambda n, x: n.nine(x[..., 0]) + n.also(x[..., 1]), PAIRS, 9),
    "numbers clamped after the cast": (lambda n, x: n.nine(x[..., 0].long().clamp(0, 8)), NUMBERS, None),
    "numbers clamped before the cast": (lambda n, x: n.nine(x[..., 0].clamp(0, 8).long()), NUMBERS, None),
    "rounded numbers": (lambda n, x: n.nine(x[..., 0].clamp(min=0).clamp(max=8).round().long()), NUMBERS, None),
    "the largest of the features": (lambda n, x: n.nine(x.argmax(-1)), NUMBERS, None),
    "a comparison": (lambda n, x: n.seven((x[..., 0] > 0).long()), NUMBERS, None),
    "a place of its own": (lambda n, x: n.nine(torch.zeros_like(x[..., 0]).long()), NUMBERS, None),
}  # fmt: skip

BEYOND = "out of the input, and one beyond them would end the run for every stream"
UNSAFE: dict[str, tuple[Any, Tensor, str]] = {
    "numbers cast to ids": (
        lambda n, x: n.nine(x[..., 0].long()),
        NUMBERS,
        f"layer 'nine' (Embedding) takes indices of 9 entries {BEYOND}; give the ids as an int64 input of their own",
    ),
    "numbers clamped too late": (lambda n, x: n.nine(x[..., 0].long().clamp(0, 9)), NUMBERS, "of 9 entries"),
    "numbers clamped on one side": (lambda n, x: n.nine(x[..., 0].long().clamp(max=8)), NUMBERS, "of 9 entries"),
    "what may be NaN, clamped": (lambda n, x: n.nine(x[..., 0].exp().clamp(0, 8).long()), NUMBERS, "of 9 entries"),
    "a table by hand": (lambda n, x: n.table[x[..., 0].long()], NUMBERS, "'index' (test_bounds.py, line"),
    "rows chosen by hand": (
        lambda n, x: n.table.index_select(0, x[..., 0].long().flatten()).view(*x.shape[:2], 4), NUMBERS, BEYOND,
    ),
    "a feature gathered": (
        lambda n, x: x.gather(2, x[..., :1].long()).expand(-1, -1, 4), NUMBERS, "takes indices of 2 entries",
    ),
    "the one after an id": (lambda n, x: n.nine(x[..., 0].long().clamp(0, 8) + 1), NUMBERS, "of 9 entries"),
    "an id times two": (
        lambda n, x: n.seven(x) + n.nine((x - 6).relu() * 3), IDS, f"{BEYOND}; clamp them to its range",
    ),
    "ids that are written to": (_written, NUMBERS, "takes indices of 9 entries"),
    "columns that do not agree": (
        lambda n, x: n.nine(x[..., 0]) + n.seven(x[..., 1]),
        PAIRS,
        "a step has ids for embeddings of different sizes (7, 9)",
    ),
    "ids without an embedding": (
        lambda n, x: nn.functional.one_hot(x, 4).float(), IDS, "nothing in the model says how many ids there are",
    ),
    "ids that are counted on": (lambda n, x: n.nine(x % 9), IDS, "let the ids go through an nn.Embedding as they come"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAFE)
def test_indices_within_their_table_are_exported(tmp_path: Path, name: str) -> None:
    before, example, classes = SAFE[name]

    report = recurd_export.export(Net(before), example, tmp_path / "m.onnx")

    assert report.contract.input.classes == classes
    assert load(tmp_path / "m.onnx")[1] == report.contract


@pytest.mark.parametrize("name", UNSAFE)
def test_indices_that_may_be_beyond_their_table_are_refused(tmp_path: Path, name: str) -> None:
    before, example, sentence = UNSAFE[name]

    with pytest.raises(ExportError) as caught:
        recurd_export.export(Net(before), example, tmp_path / "m.onnx")

    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_clamped_numbers_far_out_of_range_run(tmp_path: Path, plain_run: Any) -> None:
    model = Net(SAFE["numbers clamped before the cast"][0]).eval()
    recurd_export.export(model, NUMBERS, tmp_path / "m.onnx")
    plain = plain_run(tmp_path / "m.onnx")
    x = np.array([[[3e38, 0], [-3e38, 0], [5, 0]]], np.float32)

    heads, _ = plain.run(x, plain.initial(1))

    np.testing.assert_allclose(heads["output"], model(torch.from_numpy(x)).detach(), rtol=1e-4, atol=2e-6)


class Heads(nn.Module):
    """A float32 head and another one."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self.rnn = nn.GRU(5, 6, batch_first=True)
        self.other = other

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.rnn(x)[0]
        return {"logits": y, "other": self.other(y)}


def test_classes_beside_numbers_are_sent_as_numbers(tmp_path: Path, plain_run: Any) -> None:
    report = recurd_export.export(Heads(lambda y: y.argmax(-1)), torch.zeros(2, 16, 5), tmp_path / "m.onnx")
    plain = plain_run(tmp_path / "m.onnx")

    heads, _ = plain.run(np.random.default_rng(0).standard_normal((3, 8, 5), np.float32), plain.initial(3))

    assert [head.dtype for head in load(tmp_path / "m.onnx")[1].heads] == ["float32", "float32"]
    np.testing.assert_array_equal(heads["other"], heads["logits"].argmax(-1).astype(np.float32))
    assert "head 'other' holds whole numbers and is sent as float32, as the other heads are" in report.notes


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (lambda y: (y * 1e6).long(), "'other' may hold whole numbers that float32 cannot; cast the heads to one type"),
        (lambda y: y.double(), "different types ('logits' float32, 'other' float64), and a result has one; cast them"),
        (lambda y: y > 0, "different types ('logits' float32, 'other' bool), and a result has one; cast them"),
    ],
)
def test_heads_of_several_types_are_refused(tmp_path: Path, other: Any, sentence: str) -> None:
    with pytest.raises(ExportError) as caught:
        recurd_export.export(Heads(other), torch.zeros(2, 16, 5), tmp_path / "m.onnx")

    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
