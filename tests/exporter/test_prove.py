"""The proof itself: whatever runs the file wrongly is found, whichever of the two it is, and nothing is left out."""

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

import recurd_export
from recurd.contract import Tensor
from recurd.model import Model
from recurd.verify import EQUAL, RAGGED, Check, chunked, drive, together
from recurd_export import pipeline
from recurd_export.candidate import Candidate
from recurd_export.errors import ExportError
from recurd_export.facts import Facts
from recurd_export.pipeline import FrontEnd
from recurd_export.prove import prove
from recurd_export.pytorch.front import front
from recurd_export.session import Session


@pytest.fixture(scope="module")
def candidate() -> Candidate:
    torch.manual_seed(4)
    return front(nn.GRU(3, 4, batch_first=True), torch.zeros(2, 5, 3))(Facts(name="net"), lambda stage: None)


class Starts(nn.Module):
    """Makes its initial state itself, as most examples do."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x, torch.zeros(1, x.shape[0], 4))[0]


class Keeps(Starts):
    """Keeps its state."""

    def __init__(self) -> None:
        super().__init__()
        self.h = torch.zeros(1, 2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.h.shape[1] != x.shape[0]:
            self.h = torch.zeros(1, x.shape[0], 4)
        y, self.h = self.rnn(x, self.h)
        return y


class Takes(nn.Module):
    """Takes ids and its state."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 3)
        self.rnn = nn.GRU(3, 4, batch_first=True)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rnn(self.table(x), h)


IDS = torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("model", "example"),
    [(Starts(), torch.zeros(2, 5, 3)), (Keeps(), torch.zeros(2, 5, 3)), (Takes(), (IDS, torch.zeros(1, 2, 4)))],
)
def test_a_source_runs_in_float64_wherever_its_states_come_from(model: nn.Module, example: Any) -> None:
    made = front(model, example)(Facts(name="net"), lambda stage: None)
    streams = made.inputs.draw(EQUAL, np.random.default_rng(0))
    assert made.exact is not None

    wanted, found = (drive(runner, streams, together(EQUAL)) for runner in (made.reference, made.exact))

    for name, rows in wanted.items():
        assert found[name][0].dtype == np.float64
        np.testing.assert_allclose(np.stack(found[name]), np.stack(rows), rtol=0, atol=1e-6)
        assert not np.array_equal(np.stack(found[name]), np.stack(rows))
    assert torch.get_default_dtype() == torch.float32


def _larger(found: Any) -> Any:
    return {key: value * 1.01 for key, value in found.items()} if isinstance(found, dict) else [x * 1.01 for x in found]


@pytest.mark.parametrize("method", ["run", "read"])
@pytest.mark.parametrize("runner", [Session, Model])
def test_the_plain_file_and_the_daemons_tick_are_both_held_against_the_source(
    candidate: Candidate, monkeypatch: pytest.MonkeyPatch, runner: type[Any], method: str
) -> None:
    own = getattr(runner, method)
    monkeypatch.setattr(runner, method, lambda self, *given: _larger(own(self, *given)))
    tensor = "output" if method == "run" else "gru.h_l0"

    with pytest.raises(ExportError, match=f"in the check 'alone' '{tensor}' is off by"):
        prove(candidate, lambda stage: None)


def test_a_front_ends_own_check_that_fails_is_refused(candidate: Candidate) -> None:
    failed = dataclasses.replace(candidate, more_checks=lambda inputs, tolerance: [Check("own", 2.0, 1.0, "output")])

    with pytest.raises(ExportError, match="in the check 'own' 'output' is off by 2, at most 1 is allowed"):
        prove(failed, lambda stage: None)


def test_a_model_that_looks_ahead_is_held_against_the_source_in_the_same_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = front(nn.GRU(3, 4, batch_first=True, bidirectional=True), torch.zeros(2, 5, 3))
    made = both(Facts(name="net"), lambda stage: None)
    own = Model.run
    monkeypatch.setattr(Model, "run", lambda *given: own(*given) if given[2].all() else _larger(own(*given)))

    with pytest.raises(ExportError, match="in the check 'chunks alone' 'output' is off by"):
        prove(made, lambda stage: None)


class Sums(nn.Module):
    """One step of a running sum."""

    def forward(self, x: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x - total, total + x


@pytest.mark.parametrize(
    "source",
    [
        front(nn.LSTM(3, 4, 2, batch_first=True), torch.zeros(2, 5, 3)),
        front(Sums(), (torch.zeros(2, 3), torch.ones(2, 3)), step=True),
    ],
)
def test_a_source_goes_on_where_a_chunk_ended(source: FrontEnd) -> None:
    made = source(Facts(name="net"), lambda stage: None)
    random = np.random.default_rng(0)
    streams = made.inputs.draw(RAGGED, random)

    whole, cut = (drive(made.reference, streams, plan) for plan in (together(RAGGED), chunked(RAGGED, random)))

    for name, rows in whole.items():
        for one, other in zip(rows, cut[name], strict=True):
            np.testing.assert_allclose(other, one, rtol=0, atol=1e-5)


def test_a_coarse_file_that_depends_on_who_shares_its_batch_is_refused(
    candidate: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Model.run
    monkeypatch.setattr(Model, "run", lambda *given: _larger(own(*given)) if len(given[1]) > 1 else own(*given))
    coarse = dataclasses.replace(candidate, coarseness=0.02, cuts=1e-3)

    with pytest.raises(ExportError, match="in the check 'against itself' 'output' is off by"):
        prove(coarse, lambda stage: None)


def test_a_file_that_does_not_repeat_its_golden_run_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(*given: Any) -> Any:
        proven = prove(*given)
        golden = proven.proof.golden
        outputs = {"output": Tensor.of(golden.outputs["output"].array() + np.float32(0.01))}
        proof = msgspec.structs.replace(proven.proof, golden=msgspec.structs.replace(golden, outputs=outputs))
        return dataclasses.replace(proven, proof=proof)

    monkeypatch.setattr(pipeline, "prove", spoiled)

    with pytest.raises(ExportError, match=r"in the check 'golden run' 'output' is off by 0\.01"):
        recurd_export.export(nn.GRU(3, 4, batch_first=True), torch.zeros(2, 5, 3), tmp_path / "m.onnx")

    assert list(tmp_path.iterdir()) == []


def test_a_source_that_says_nothing_of_a_state_is_an_error_and_no_agreement(
    candidate: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidate.reference, "read", lambda slots: {})
    streams = candidate.inputs.draw(EQUAL, np.random.default_rng(0))

    with pytest.raises(KeyError, match=r"gru\.h_l0"):
        drive(candidate.reference, streams, together(EQUAL))
