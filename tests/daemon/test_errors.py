"""What every error can do."""

import pickle

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
