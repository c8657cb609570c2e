"""What every error can do."""

import pickle
import re
from pathlib import Path

import pytest

from recurd.errors import Broken, Code, Refused


@pytest.mark.parametrize(
    "error",
    [
        Refused(Code.GAP, "no", expected=3, generation=2, retry_after_seconds=0.5),
        Broken(Code.EXPIRED, "gone", generation=2, last_seq=7),
    ],
)
def test_an_error_survives_its_way_out_of_a_worker_process(error: Refused | Broken) -> None:
    again = pickle.loads(pickle.dumps(error))

    assert type(again) is type(error)
    assert (str(again), vars(again)) == (str(error), vars(error))


@pytest.mark.parametrize("page", ["operations.md", "protocol.md"])
def test_every_code_is_explained_to_operators_and_to_those_who_write_clients(page: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / page).read_text()
    assert [code.word for code in Code if not re.search(rf"^\|.*\b{code.word}\b.*\|", text, re.MULTILINE)] == []
