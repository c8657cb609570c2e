"""Less than float32: what is rounded, by how much the file is off, and that streams stay independent of one another."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import recurd_export
from recurd.contract import Contract, Head, Input, Source, State
from recurd.model import DISABLED_OPTIMIZERS, Model
from recurd.verify import verify
from recurd_export.errors import ExportError
from recurd_export.half import to_half
from recurd_export.report import Report


class Net(nn.Module):
    """Two layers, a start that was learned, and a linear layer behind a transposition."""

    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.linspace(-1, 1, hidden).repeat(2, 1, 1))
        self.rnn = nn.GRU(3, hidden, 2)
        self.head = nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x.transpose(0, 1), self.start.expand(-1, x.shape[0], -1).contiguous())
        return self.head(y.transpose(0, 1))


class Choice(NamedTuple):
    """A choice of precisions, what the states are then, and how much a result may be off: from torch, by its cuts.

    ``refused``: from where on, relative to the largest value, what cuts do is refused.
    """

    options: dict[str, str]
    states: str
    error: float
    by_cuts: float
    refused: float


CHOICES = {
    "float16": Choice({"precision": "float16"}, "float16", 4e-3, 4e-3, 8e-3),
    "float16, float32 states": Choice(
        {"precision": "float16", "state_precision": "float32"}, "float32", 4e-3, 6e-4, 2e-3
    ),
    "float16 states": Choice({"state_precision": "float16"}, "float16", 4e-3, 4e-3, 8e-3),
    "bfloat16 weights": Choice({"precision": "bfloat16-weights"}, "float32", 2e-2, 2e-6, 1e-4),
    "bfloat16 weights, float16 states": Choice(
        {"precision": "bfloat16-weights", "state_precision": "float16"}, "float16", 2e-2, 4e-3, 8e-3
    ),
}


class Exported(NamedTuple):
    """A file, and what it should be."""

    report: Report
    choice: Choice


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(3)
    return Net()


@pytest.fixture(scope="module", params=list(CHOICES))
def exported(request: pytest.FixtureRequest, net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    choice = CHOICES[request.param]
    path = tmp_path_factory.mktemp("precision") / "m.onnx"
    return Exported(recurd_export.export(net, torch.zeros(2, 5, 3), path, **choice.options), choice)  # type: ignore[arg-type]


def _input(rows: int, steps: int) -> np.ndarray:
    return np.random.default_rng(9).standard_normal((rows, steps, 3), np.float32)


def _served(report: Report, x: np.ndarray, chunk: int) -> np.ndarray:
    model = Model.load(report.path, slots=len(x), threads=1)
    slots, parts = np.arange(len(x)), []
    for start in range(0, x.shape[1], chunk):
        piece = np.ascontiguousarray(x[:, start : start + chunk])
        lengths = np.full(len(x), piece.shape[1], np.int32)
        parts += model.run(slots, np.full(len(x), start == 0), lengths, piece)
    return np.concatenate(parts, axis=1)


def test_the_file_is_near_its_source_and_really_rounded(net: nn.Module, exported: Exported) -> None:
    x = _input(3, 40)
    with torch.no_grad():
        wanted = net(torch.from_numpy(x)).numpy()

    error = abs(_served(exported.report, x, 8) - wanted).max()

    assert 2e-6 < error < exported.choice.error


def test_input_and_heads_stay_float32_and_the_contract_says_what_the_states_are(exported: Exported) -> None:
    contract = exported.report.contract

    assert {contract.input.dtype, *(head.dtype for head in contract.heads)} == {"float32"}
    assert {state.dtype for state in contract.states} == {exported.choice.states}
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.load(exported.report.path).graph.input}
    wanted = onnx.TensorProto.FLOAT16 if exported.choice.states == "float16" else onnx.TensorProto.FLOAT
    assert {types[state.name] for state in contract.states} == {wanted}


def test_learned_initial_values_have_the_type_of_their_state(exported: Exported) -> None:
    for state in exported.report.contract.states:
        assert state.initial is not None
        assert state.initial.dtype == exported.choice.states
        np.testing.assert_allclose(state.initial_array()[0], np.linspace(-1, 1, 12), atol=5e-4)


def test_however_a_stream_is_cut_the_file_agrees_with_itself(exported: Exported) -> None:
    x = _input(2, 30)

    whole = _served(exported.report, x, 30)

    for chunk in (1, 7):
        assert abs(_served(exported.report, x, chunk) - whole).max() <= exported.choice.by_cuts


def test_a_row_does_not_depend_on_the_others_in_its_batch(exported: Exported) -> None:
    x = _input(5, 12)
    x[1:] *= 50

    together, alone = _served(exported.report, x, 4), _served(exported.report, x[:1], 4)

    np.testing.assert_allclose(together[:1], alone, rtol=0, atol=1e-6)


def test_the_file_verifies_itself(exported: Exported) -> None:
    assert all(check.ok for check in verify(exported.report.path))
    (itself,) = (check for check in exported.report.checks if check.name == "against itself")
    assert itself.bound < 2 * exported.choice.refused
    # What the file repeats it repeats well, however far rounded weights are from the source's.
    proof = exported.report.contract.proof
    assert proof is not None
    assert proof.rtol == (1e-4 if exported.choice.refused == 1e-4 else 1 / 64)


def test_the_report_tells_of_precision_and_drift(exported: Exported) -> None:
    told = str(exported.report)

    assert f"runs in {exported.choice.options.get('precision', 'float32')}, states {exported.choice.states}" in told
    assert f"drift   over {exported.report.drift.steps:,} steps: error nearest its bound" in told
    assert exported.report.drift.chunk_steps == (16 if exported.choice.states == "float16" else 100)


def test_a_plain_runtime_gives_the_same(exported: Exported) -> None:
    report, x = exported.report, _input(2, 6)
    session = ort.InferenceSession(
        report.path, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED_OPTIMIZERS
    )
    states = {
        state.name: np.stack([state.initial_array()] * 2, axis=state.batch_axis) for state in report.contract.states
    }

    found = session.run(["output"], {"input": x, "lengths": np.array([6, 6], np.int32), **states})[0]

    np.testing.assert_allclose(found, _served(report, x, 6), rtol=0, atol=1e-3)


def test_weights_in_16_bits_take_half_the_file(tmp_path: Path) -> None:
    sizes = {
        precision: recurd_export.export(Net(64), torch.zeros(1, 5, 3), tmp_path / "m.onnx", precision=precision).bytes
        for precision in ("float32", "float16", "bfloat16-weights")
    }

    assert sizes["float16"] < 0.6 * sizes["float32"]
    assert sizes["bfloat16-weights"] < 0.6 * sizes["float32"]


def test_normalisation_stays_in_float32_in_front_of_float16(net: nn.Module, tmp_path: Path) -> None:
    mean, std = np.float32(2e5), np.float32(3)  # beyond float16
    report = recurd_export.export(
        net, torch.zeros(1, 5, 3), tmp_path / "m.onnx", precision="float16", normalize=(mean, std)
    )
    x = _input(2, 9) * std + mean
    with torch.no_grad():
        wanted = net(torch.from_numpy((x - mean) / std)).numpy()

    np.testing.assert_allclose(_served(report, x, 4), wanted, rtol=0, atol=4e-3)


class Cancels(nn.Module):
    """What is left of two weights when their difference is taken is lost in 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 6, batch_first=True)
        self.head = nn.Linear(12, 2, bias=False)
        with torch.no_grad():
            self.head.weight.fill_(1.0)
            self.head.weight[:, :6] += 2**-13

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        return 1000 * self.head(torch.cat([y, -y], dim=-1))


class Heavy(Net):
    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.head.weight[0, 0] = 1e6


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (Net, {"precision": "int8"}, "int8 is not offered: dynamic quantisation takes one range for the whole batch"),
        (Net, {"precision": "float8"}, "precision 'float8' is not known; there are float32, float16, bfloat16-weights"),
        (Net, {"state_precision": "bfloat16"}, "state precision 'bfloat16' is not known; there are float32, float16"),
        (Heavy, {"precision": "float16"}, r"weight '\S+' holds 1e\+06, float16 holds 65504 at most"),
        (Cancels, {"precision": "float16"}, "the exported model is not the source model: in the check"),
        (Cancels, {"precision": "bfloat16-weights"}, "the exported model is not the source model: in the check"),
    ],
)
def test_a_precision_that_does_not_do_is_refused(
    tmp_path: Path, model: type[nn.Module], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ExportError, match=words) as caught:
        recurd_export.export(model(), torch.zeros(1, 5, 3), tmp_path / "m.onnx", **options)

    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


class Average(nn.Module):
    """One step: what is new, beside a slow average whose decay float16 does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        mean = 0.99 * mean + 0.01 * (self.inner(x) + 2)
        return x - mean, mean


def test_a_float32_state_goes_through_float32_arithmetic_and_constants(tmp_path: Path) -> None:
    example = (torch.zeros(2, 3), torch.zeros(2, 3))
    worst = {}
    for states in ("float32", "float16"):
        report = recurd_export.export(
            Average(), example, tmp_path / "m.onnx", step=True, precision="float16", state_precision=states
        )
        worst[states] = next(curve.worst for curve in report.drift.curves if curve.kind == "state")

    assert worst["float32"] < 1e-3
    assert worst["float16"] > 1e-2  # what is told, and why there is the other


CONTRACT = Contract(
    name="x",
    input=Input(dtype="float32", shape=(2,)),
    heads=(Head(name="y", dtype="float32", shape=(2,)),),
    states=(State(name="h", output="h.next", dtype="float32", shape=(2,), batch_axis=0),),
    source=Source(framework="none"),
    weights_sha256="",
)
#: Celu knows no float16; the branches read tensors of the graph around them; the state is a running sum.
GRAPH = """
<ir_version: 8, opset_import: ["" : 18]>
g (float[batch, time, 2] input, int32[batch] lengths, float[batch, 2] h)
=> (float[batch, time, 2] y, float[batch, 2] "h.next")
<float[2] half = {0.5, 0.25}>
{
    long = Celu <alpha = 1.0> (input)
    scaled = Mul (long, half)
    always = Constant <value = bool {1}> ()
    chosen = If (always) <
        then_branch = t () => (float[batch, time, 2] then_y) { then_y = Add (scaled, half) },
        else_branch = e () => (float[batch, time, 2] else_y) { else_y = Celu (scaled) }
    >
    axis = Constant <value = int64[1] {1}> ()
    sum = ReduceSum <keepdims = 0> (input, axis)
    "h.next" = Add (h, sum)
    y = Cast <to = 1> (chosen)
}
"""


@pytest.mark.parametrize("states", [True, False])
def test_branches_and_operators_without_float16_are_cast_around(states: bool) -> None:
    model = onnx.parser.parse_model(GRAPH.replace('"h.next"', "h_next"))
    contract = Contract(
        **{f: getattr(CONTRACT, f) for f in ("name", "input", "heads", "source", "weights_sha256")},
        states=(State(name="h", output="h_next", dtype="float32", shape=(2,), batch_axis=0),),
    )
    x, h = _input(2, 3)[..., :2], np.array([[4096.0, 1], [2, 3]], np.float32)

    to_half(model, contract, states=states)

    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED_OPTIMIZERS
    )
    kind = np.float16 if states else np.float32
    feeds = {"input": x, "lengths": np.array([3, 3], np.int32), "h": h.astype(kind)}
    y, after = session.run(["y", "h_next"], feeds)
    wanted = np.where(x > 0, x, np.expm1(np.minimum(x, 0))) * [0.5, 0.25] + [0.5, 0.25]
    np.testing.assert_allclose(y, wanted, atol=3e-3)
    assert after.dtype == kind
    # A float32 state is added to in float32, whatever the rest does.
    np.testing.assert_allclose(after, h + x.sum(axis=1), atol=4.0 if states else 5e-3)


def test_a_type_that_cannot_be_inferred_is_said() -> None:
    model = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 18, "my.own" : 1]>
        g (float[batch, time, 2] input, int32[batch] lengths, float[batch, 2] h)
        => (float[batch, time, 2] y, float[batch, 2] h_next)
        { a = my.own.Odd (input)
          y = Neg (a)
          h_next = Identity (h) }
        """
    )

    with pytest.raises(ExportError, match=r"what 'my.own' operator Odd gives is not known"):
        to_half(model, CONTRACT, states=True)
