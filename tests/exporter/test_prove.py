"""The proof itself: whatever runs the file wrongly is found, whichever of the two it is, and nothing is left out."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from recurd.model import Model
from recurd.verify import EQUAL, drive, together
from recurd_export.candidate import Candidate
from recurd_export.errors import ExportError
from recurd_export.facts import Facts
from recurd_export.prove import prove
from recurd_export.pytorch.front import front
from recurd_export.session import Session


@pytest.fixture(scope="module")
def candidate() -> Candidate:
    torch.manual_seed(4)
    return front(nn.GRU(3, 4, batch_first=True), torch.zeros(2, 5, 3))(Facts(name="net"), lambda stage: None)


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


def test_a_source_that_says_nothing_of_a_state_is_an_error_and_no_agreement(
    candidate: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidate.reference, "read", lambda slots: {})
    streams = candidate.inputs.draw(EQUAL, np.random.default_rng(0))

    with pytest.raises(KeyError, match=r"gru\.h_l0"):
        drive(candidate.reference, streams, together(EQUAL))
