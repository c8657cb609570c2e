"""recurd.verify finds what was changed in a file, and knows a good one; without torch."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import recurd_export
from recurd import contract as contracts
from recurd import verify
from recurd.cli import main
from recurd.contract import Tensor
from recurd.errors import ContractError, ExitCode
from recurd.model import Model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 6, 2, batch_first=True)
        self.linear = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> Any:
        y, _ = self.rnn(x)
        return {"steps": self.linear(y), "last": y[:, -1]}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify") / "good.onnx"
    torch.manual_seed(3)
    recurd_export.export(Net(), torch.zeros(2, 8, 4), path)
    return path


@pytest.fixture
def parts(good: Path) -> tuple[onnx.ModelProto, contracts.Contract]:
    return contracts.load(good)


def _save(path: Path, model: onnx.ModelProto, contract: contracts.Contract) -> Path:
    contracts.attach(model, contract)
    onnx.save(model, path)
    return path


def _failed(path: Path) -> list[str]:
    return [check.name for check in verify.verify(path) if not check.ok]


def test_a_good_file_passes_every_check(good: Path) -> None:
    checks = verify.verify(good)

    assert [check.name for check in checks] == [
        "golden run", "alone", "ragged batch", "chunks alone", "chunks in ragged batches", "batch of equal lengths",
    ]  # fmt: skip
    assert all(check.ok for check in checks)


def test_a_changed_weight_is_found_by_its_hash(
    tmp_path: Path, parts: tuple[onnx.ModelProto, contracts.Contract]
) -> None:
    model, contract = parts
    weight = next(t for t in model.graph.initializer if t.name.endswith("onnx_w_l1"))
    weight.raw_data = b"\x01" + weight.raw_data[1:]

    with pytest.raises(ContractError, match="the weights are not those of the contract"):
        verify.verify(_save(tmp_path / "m.onnx", model, contract))


def test_a_changed_weight_with_a_matching_hash_is_found_by_the_golden_run(
    tmp_path: Path, parts: tuple[onnx.ModelProto, contracts.Contract]
) -> None:
    model, contract = parts
    weight = next(t for t in model.graph.initializer if t.name.endswith("onnx_w_l1"))
    weight.raw_data = (np.frombuffer(weight.raw_data, np.float32) * np.float32(1.001)).tobytes()
    contract = msgspec.structs.replace(contract, weights_sha256=contracts.weights_sha256(model))

    assert _failed(_save(tmp_path / "m.onnx", model, contract)) == ["golden run"]


@pytest.mark.parametrize("where", ["input", "outputs", "states"])
def test_a_changed_golden_run_is_found(
    tmp_path: Path, parts: tuple[onnx.ModelProto, contracts.Contract], where: str
) -> None:
    model, contract = parts
    proof = contract.proof
    assert proof is not None
    stored: Any = getattr(proof.golden, where)
    tensor = stored if where == "input" else stored[next(iter(stored))]
    array = tensor.array().copy()
    array.flat[0] += 1
    changed = Tensor.of(array) if where == "input" else {**stored, next(iter(stored)): Tensor.of(array)}
    golden = msgspec.structs.replace(proof.golden, **{where: changed})
    contract = msgspec.structs.replace(contract, proof=msgspec.structs.replace(proof, golden=golden))
    path = _save(tmp_path / "m.onnx", model, contract)

    assert _failed(path) == ["golden run"]
    with pytest.raises(ContractError, match=r"'good' does not give its golden results: '\S+' is off by \S+, at most"):
        verify.replay_golden(Model.load(path, slots=4))
    done = CliRunner().invoke(main, ["verify", str(path)])
    assert done.exit_code == ExitCode.CONTRACT
    assert "FAILED" in done.output


def test_lengths_that_are_not_wired_are_found(
    tmp_path: Path, parts: tuple[onnx.ModelProto, contracts.Contract]
) -> None:
    model, contract = parts
    node = next(node for node in model.graph.node if node.op_type == "LSTM")
    node.input[4] = ""

    assert "ragged batch" in _failed(_save(tmp_path / "m.onnx", model, contract))


def test_a_state_that_is_not_carried_is_found(
    tmp_path: Path, parts: tuple[onnx.ModelProto, contracts.Contract]
) -> None:
    model, contract = parts
    first, second = contract.states[0], contract.states[2]
    swapped = (
        msgspec.structs.replace(first, output=second.output), contract.states[1],
        msgspec.structs.replace(second, output=first.output), contract.states[3],
    )  # fmt: skip
    path = _save(tmp_path / "m.onnx", model, msgspec.structs.replace(contract, states=swapped))

    assert {"chunks alone", "chunks in ragged batches"} <= set(_failed(path))


def test_a_model_that_only_claims_to_be_causal_is_found(tmp_path: Path) -> None:
    path = tmp_path / "both.onnx"
    recurd_export.export(nn.GRU(4, 6, batch_first=True, bidirectional=True), torch.zeros(2, 8, 4), path)
    model, contract = contracts.load(path)

    assert _failed(path) == []
    assert set(_failed(_save(path, model, msgspec.structs.replace(contract, causal=True)))) == {
        "chunks alone", "chunks in ragged batches",
    }  # fmt: skip


def test_an_initial_value_that_was_lost_is_found(tmp_path: Path) -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(4, 6, batch_first=True)
            self.h0 = nn.Parameter(torch.ones(1, 1, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(x, self.h0.expand(1, len(x), 6).contiguous())[0]

    path = tmp_path / "m.onnx"
    recurd_export.export(Learned(), torch.zeros(2, 8, 4), path)
    model, contract = contracts.load(path)
    states = (msgspec.structs.replace(contract.states[0], initial=None),)

    assert _failed(_save(path, model, msgspec.structs.replace(contract, states=states))) == ["golden run"]


@pytest.mark.parametrize("slots", [1, 2, 3, 64])
def test_the_golden_run_is_replayed_in_as_many_slots_as_there_are(good: Path, slots: int) -> None:
    error = verify.replay_golden(Model.load(good, slots=slots))

    assert error is not None
    assert error < 1e-6


def test_a_contract_without_proof_is_held_against_itself_only(
    tmp_path: Path, parts: tuple[onnx.ModelProto, contracts.Contract]
) -> None:
    model, contract = parts
    path = _save(tmp_path / "m.onnx", model, msgspec.structs.replace(contract, proof=None))

    assert verify.verify(path)[0].name == "alone"
    assert verify.replay_golden(Model.load(path, slots=4)) is None


def test_verifying_needs_no_framework(good: Path) -> None:
    script = (
        "import sys; from recurd.verify import verify; verify(sys.argv[1])\n"
        "sys.exit(bool({'torch', 'keras', 'tensorflow', 'onnxscript'} & sys.modules.keys()))"
    )

    assert subprocess.run([sys.executable, "-c", script, str(good)], check=False).returncode == 0


def test_every_plan_takes_every_step_once_and_in_order() -> None:
    lengths = (1, 9, 4)
    for seed in range(20):
        plan = verify.chunked(lengths, np.random.default_rng(seed))
        for ticks in (plan, verify.alone(plan)):
            at = [0] * len(lengths)
            for tick in ticks:
                assert len({piece.stream for piece in tick}) == len(tick) > 0
                for piece in tick:
                    assert piece.start == at[piece.stream] < piece.stop
                    at[piece.stream] = piece.stop
            assert at == list(lengths)


def test_what_stands_beyond_a_row_is_steps_of_streams_and_no_zeros(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(Model, "run", lambda self, *tick, own=Model.run: given.append(tick) or own(self, *tick))
    lengths = (2, 7, 1)
    model = Model.load(good, slots=3)

    verify.drive(model, verify.Inputs.of(model.contract).draw(lengths, np.random.default_rng(0)), [
        [verify.Piece(row, 0, length) for row, length in enumerate(lengths)]
    ])  # fmt: skip

    ((_, _, _, rows),) = given
    assert rows.shape[:2] == (3, 7)
    assert rows.all()


@pytest.mark.parametrize(
    ("expected", "got", "ok"),
    [
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0, 2.0], [1.0, 2.0001], True),
        ([1.0, 2.0], [1.0, 2.001], False),
        ([1.0, 1e6], [1.05, 1e6], True),
        ([1.0], [float("nan")], False),
        ([float("nan")], [float("nan")], False),
        ([float("-inf"), 1.0], [float("-inf"), 1.0], True),
        ([float("-inf"), 1.0], [float("-inf"), 1.1], False),
        ([float("inf")], [1.0], False),
        ([1.0], [1.0, 1.0], False),
    ],
)
def test_a_comparison_is_bounded_by_the_largest_value_and_fails_on_nan(
    expected: list[float], got: list[float], ok: bool
) -> None:
    check = verify.compare("c", {"y": [np.array(expected)]}, {"y": [np.array(got)]}, verify.Tolerance())

    assert check.ok is ok


@pytest.mark.parametrize(
    "golden", [{"outputs": {}}, {"states": {}}, {"input": Tensor.of(np.zeros((0, 4, 3), np.float32))}]
)
def test_a_golden_run_that_is_not_the_models_own_is_one_sentence(
    tmp_path: Path, parts: tuple[onnx.ModelProto, contracts.Contract], golden: dict[str, Any]
) -> None:
    model, contract = parts
    assert contract.proof is not None
    proof = msgspec.structs.replace(contract.proof, golden=msgspec.structs.replace(contract.proof.golden, **golden))
    path = _save(tmp_path / "m.onnx", model, msgspec.structs.replace(contract, proof=proof))

    done = CliRunner().invoke(main, ["verify", str(path)])

    assert done.exit_code == ExitCode.CONTRACT
    assert "the golden run of model 'good' cannot be replayed" in done.stderr
    assert done.stderr.count("\n") == 1
