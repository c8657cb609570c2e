"""Whether a model's results depend on who shares its tick: found out at the start, told to clients."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dialogue import hello
from process import Dealer, Process
from recurd.model import Model
from recurd.verify import is_bit_exact
from recurrent import Network


class Mixing:
    """A model whose results depend, in their last bit, on one circumstance of the tick."""

    def __init__(self, model: Model, circumstance: str) -> None:
        self._model = model
        self._circumstance = circumstance
        self.contract = model.contract
        self.slots = model.slots
        self.read = model.read

    def run(self, slots: Any, fresh: Any, lengths: Any, input: Any) -> Any:
        outputs = self._model.run(slots, fresh, lengths, input)
        disturbed = {"rows": len(slots) > 100, "cuts": not fresh.all(), "nothing": False}[self._circumstance]
        return [np.nextafter(output, np.float32(np.inf)) if disturbed else output for output in outputs]


@pytest.mark.parametrize(("circumstance", "expected"), [("rows", False), ("cuts", False), ("nothing", True)])
def test_one_bit_that_depends_on_the_tick_is_found(tmp_path: Path, circumstance: str, expected: bool) -> None:
    model = Model.load(Network().save(tmp_path / "pump.onnx"), slots=128, threads=1)

    assert is_bit_exact(Mixing(model, circumstance), 128) is expected  # type: ignore[arg-type]


def test_clients_are_told_which_models_are_bit_exact(tmp_path: Path) -> None:
    path = Network().save(tmp_path / "pump.onnx", proof=True)
    with (
        Process(tmp_path, path, "--bind", "tcp://127.0.0.1:0", "--metrics", "") as daemon,
        Dealer(daemon.ready().endpoint, greet=False) as dealer,
    ):
        welcome = dealer.ask(hello()).body

    assert (welcome["bit_exact"], welcome["durability"]) == (["pump"], "off")
