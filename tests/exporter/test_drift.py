"""The long run: errors as a function of time, told where they grow and refused where the file does something else."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

import recurd_export
from recurd.contract import Contract, Head, Input, Source, State
from recurd.verify import Inputs, Tolerance
from recurd_export import drift
from recurd_export.errors import ExportError
from recurd_export.report import Report

Array = npt.NDArray[Any]

CONTRACT = Contract(
    name="x",
    input=Input(dtype="float32", shape=(1,)),
    heads=(Head(name="y", dtype="float32", shape=(1,)),),
    states=(State(name="h", output="h.next", dtype="float32", shape=(1,), batch_axis=0),),
    source=Source(framework="none"),
    weights_sha256="",
)
INPUTS = Inputs(CONTRACT.input)


class Steps:
    """A model of one number, ``h = step(h, x)``, which is also its output; a runner made of a function."""

    contract = CONTRACT

    def __init__(self, step: Any, start: float = 0.5) -> None:
        self._step = step
        self._start = start
        self._states: dict[int, Any] = {}
        self.ran = 0

    def run(self, slots: Array, fresh: Array, lengths: Array, input: Array) -> list[Array]:
        out = np.zeros((*input.shape[:2], 1))
        for row, slot in enumerate(slots):
            h, count = (self._start, 0) if fresh[row] else self._states[int(slot)]
            for at in range(lengths[row]):
                h, count = self._step(h, float(input[row, at, 0]), count), count + 1
                out[row, at] = h
            self._states[int(slot)] = h, count
            self.ran += int(lengths[row])
        return [out]

    def read(self, slots: Array) -> dict[str, Array]:
        return {"h": np.array([[self._states[int(slot)][0]] for slot in slots])}


def _mean(h: float, x: float, count: int) -> float:
    return 0.9 * h + 0.1 * x


def _forgets(h: float, x: float, count: int) -> float:
    """As :func:`_mean`, but for steps nobody looked at before."""
    return _mean(h, x, count) + (0.5 if count >= 500 else 0.0)


def _chaos(h: float, x: float, count: int) -> float:
    return 3.9 * h * (1 - h)


def _chaos_in_float32(h: float, x: float, count: int) -> float:
    return float(np.float32(3.9) * np.float32(h) * (np.float32(1) - np.float32(h)))


def _measure(graph: Steps, source: Steps, **options: Any) -> drift.Drift:
    return drift.measure(graph, source, INPUTS, Tolerance(), **options)


@pytest.fixture
def _whole_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "STEPS", 10_000)


@pytest.mark.usefixtures("_whole_length")
def test_an_export_runs_ten_thousand_steps(tmp_path: Path) -> None:
    report = _export(nn.LSTM(3, 4, batch_first=True), tmp_path)
    long = report.drift

    assert (long.steps, long.fewer) == (10_000, "")
    assert {(curve.tensor, curve.kind) for curve in long.curves} == {
        ("output", "head"),
        ("lstm.h_l0", "state"),
        ("lstm.c_l0", "state"),
    }
    by_name = {curve.tensor: curve for curve in long.curves}
    assert by_name["output"].steps == tuple(range(100, 10_001, 100))
    assert by_name["lstm.c_l0"].steps == (10, 100, 1_000, 10_000)
    assert long.passes_at is None
    assert "drift   over 10,000 steps: error nearest its bound" in str(report)


def _export(model: nn.Module, tmp_path: Path, **options: Any) -> Report:
    return recurd_export.export(model, torch.zeros(2, 5, 3), tmp_path / "m.onnx", **options)


def test_the_errors_are_those_of_a_run_by_hand(tmp_path: Path) -> None:
    model = nn.GRU(3, 4, batch_first=True)
    report = _export(model, tmp_path, precision="bfloat16-weights")
    rounded = nn.GRU(3, 4, batch_first=True)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            kept = weight if weight.dim() == 1 else weight.bfloat16().float()
            rounded.get_parameter(name).copy_(kept)
        x = Inputs(report.contract.input).draw([2_000], np.random.default_rng(3))[0]
        wanted, found = (net(torch.from_numpy(x[None]))[0][0].numpy() for net in (model, rounded))
    errors = abs(found - wanted).max(axis=1).reshape(100, 20).max(axis=1)

    curve = next(curve for curve in report.drift.curves if curve.tensor == "output")

    np.testing.assert_allclose(curve.errors, errors, rtol=0, atol=1e-6)
    assert curve.largest == pytest.approx(abs(wanted).max(), rel=1e-6)


class Last(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}])
def test_heads_of_the_last_step_are_compared_at_marks(tmp_path: Path, options: dict[str, bool]) -> None:
    report = _export(Last(**options), tmp_path)

    curve = next(curve for curve in report.drift.curves if curve.kind == "head")

    assert curve.steps == (10, 100, 1_000, 2_000)
    assert 0 <= max(curve.errors) < 1e-5


def test_a_model_that_looks_ahead_is_run_by_both_in_the_same_chunks(tmp_path: Path) -> None:
    report = _export(nn.LSTM(3, 4, batch_first=True, bidirectional=True), tmp_path)

    assert not report.contract.causal
    assert report.drift.steps == 2_000
    assert report.drift.worst.worst < 1e-5


def test_a_slow_source_runs_fewer_steps_and_says_so() -> None:
    source = Steps(_mean)

    found = _measure(Steps(_mean), source, budget_seconds=1e-6)

    assert found.steps == 100
    assert source.ran < 1_000
    assert "more would take over" in found.fewer


def test_wide_heads_run_fewer_steps_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "MAX_ELEMENTS", 700)

    found = _measure(Steps(_mean), Steps(_mean))

    assert found.steps == 700
    assert found.fewer == "its heads are too wide for more"


def test_a_source_that_ends_at_some_length_is_compared_up_to_there() -> None:
    class Ends(Steps):
        def run(self, slots: Array, fresh: Array, lengths: Array, input: Array) -> list[Array]:
            if lengths.max() > 1_000:
                raise ExportError("no more places")
            return super().run(slots, fresh, lengths, input)

    found = _measure(Steps(_mean), Ends(_mean))

    assert found.steps == 1_000
    assert found.fewer == "the source fails with a stream of 2,000 steps: no more places"
    assert all(curve.steps[-1] == 1_000 for curve in found.curves)


def test_a_file_that_does_something_else_after_a_while_is_refused() -> None:
    found = _measure(Steps(_forgets), Steps(_mean))

    assert found.passes_at == 520  # the stretch that ends there holds step 501
    with pytest.raises(ExportError, match="is not the source model on long streams: over 2,000 steps 'h' comes to be"):
        drift.judge(found, Steps(_mean), Steps(_mean), INPUTS, reduced=False)


def test_rounding_that_grows_in_the_source_itself_is_told() -> None:
    found = _measure(Steps(_chaos_in_float32, 0.5 + 2**-10), Steps(_chaos_in_float32))

    (note,) = drift.judge(found, Steps(_chaos_in_float32), Steps(_chaos), INPUTS, reduced=False)

    assert note.endswith("float32 rounding grows in the source model itself")


class Echoes(Steps):
    """Gives its input back, beside a state that nobody sees; from step 500 on with something added."""

    def __init__(self, step: Any, start: float = 0.5, late: float = 0.0) -> None:
        super().__init__(step, start)
        self._late = late

    def run(self, slots: Array, fresh: Array, lengths: Array, input: Array) -> list[Array]:
        done = 0 if fresh[0] else self._states[int(slots[0])][1]
        super().run(slots, fresh, lengths, input)
        return [input + np.where(np.arange(done, done + input.shape[1]) >= 500, self._late, 0.0)[:, None]]


def test_rounding_in_one_tensor_does_not_excuse_another() -> None:
    source, exact = Echoes(_chaos_in_float32), Echoes(_chaos)
    found = _measure(Echoes(_chaos_in_float32, 0.5 + 2**-10, late=0.2), source)

    assert found.worst.tensor == "h"
    with pytest.raises(ExportError, match=r"over 2,000 steps 'y' comes to be off by 2\.0e-01 .* explains 0\.0e\+00"):
        drift.judge(found, source, exact, INPUTS, reduced=False)


class Fails(Steps):
    """A source whose code does not run in float64."""

    def run(self, slots: Array, fresh: Array, lengths: Array, input: Array) -> list[Array]:
        raise ExportError("float and double")


@pytest.mark.parametrize("exact", [None, Fails(_mean)])
def test_where_nothing_tells_rounding_from_a_mistake_both_are_said(exact: Steps | None) -> None:
    found = _measure(Steps(_forgets), Steps(_mean))

    (note,) = drift.judge(found, Steps(_mean), exact, INPUTS, reduced=False)

    assert "rounding may grow in this model, or the file does something else on long streams" in note


def test_what_a_reduced_precision_costs_is_told() -> None:
    found = _measure(Steps(_forgets), Steps(_mean))

    (note,) = drift.judge(found, Steps(_mean), Steps(_mean), INPUTS, reduced=True)

    assert "by step 520: use a higher precision if that is too much" in note


def test_nan_is_infinitely_wrong() -> None:
    found = _measure(Steps(lambda h, x, count: float("nan") if count > 1_500 else _mean(h, x, count)), Steps(_mean))

    assert found.worst.worst == float("inf")
    assert found.passes_at is not None


def test_what_drifts_within_the_bound_needs_no_words() -> None:
    assert drift.judge(_measure(Steps(_mean), Steps(_mean)), Steps(_mean), None, INPUTS, reduced=False) == []
