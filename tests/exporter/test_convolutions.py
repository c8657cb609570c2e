"""Causal convolutions are carried from chunk to chunk by their last inputs; those that look ahead are refused."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recurd_export
from recurd.model import Model
from recurd_export import ExportError

EXAMPLE = torch.zeros(2, 16, 5)
#: Chunks of a stream: single steps, chunks shorter and longer than a convolution looks back.
CHUNKS = {"single steps": [1] * 14, "short ones": [1, 2, 1, 3, 1, 1, 4, 1], "long ones": [50, 1, 45]}


def _norm(channels: int) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(channels)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return norm


class CnnLstm(nn.Module):
    """As it is usually written."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.ConstantPad1d((8, 0), 0.0), nn.Conv1d(5, 8, 5, dilation=2), _norm(8), nn.ReLU(), nn.Dropout(0.3)
        )
        self.lstm = nn.LSTM(8, 7, 2, batch_first=True, dropout=0.2)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x.transpose(1, 2)).transpose(1, 2)
        y, _ = self.lstm(y)
        return self.head(y).softmax(-1)


class Chomp(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.size].contiguous()


class Block(nn.Module):
    """A residual block of a TCN."""

    def __init__(self, before: int, after: int, dilation: int, norm: Any) -> None:
        super().__init__()
        padding = 2 * dilation
        self.net = nn.Sequential(
            norm(nn.Conv1d(before, after, 3, padding=padding, dilation=dilation)), Chomp(padding), nn.ReLU(),
            nn.Dropout(0.2), norm(nn.Conv1d(after, after, 3, padding=padding, dilation=dilation)), Chomp(padding),
        )  # fmt: skip
        self.narrow = nn.Conv1d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.net(x) + self.narrow(x))


class Tcn(nn.Sequential):
    """Two blocks, one with each kind of weight norm; without any recurrent layer."""

    def __init__(self) -> None:
        super().__init__(Block(5, 4, 1, _old_weight_norm), Block(4, 4, 8, nn.utils.parametrizations.weight_norm))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT).mT


def _old_weight_norm(module: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(module)


class CausalConv1d(nn.Conv1d):
    """Pads in a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, ((self.kernel_size[0] - 1) * self.dilation[0], 0)))


class Shared(nn.Module):
    """One convolution called twice: over time, and once over features, which is no matter of time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3)
        self.rnn = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, features = x.shape
        x = self.conv(x.reshape(batch * steps, 1, features)).reshape(batch, steps, features - 2)
        y = self.conv(F.pad(x.mean(-1)[:, None], (2, 0)))
        y = self.conv(F.pad(y, (2, 0)))
        return self.rnn(x * y.transpose(1, 2))[0]


class TimeMajor(nn.Module):
    """Neither layer says which axis is time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(5, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x.permute(1, 2, 0), (2, 0))).permute(2, 0, 1)


class BothWays(nn.Module):
    """Looks ahead, though its convolution does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rnn = nn.Conv1d(5, 4, 3), nn.LSTM(4, 3, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        return self.rnn(self.conv(F.pad(x.mT, (2, 0))).mT, state)


class Gated(nn.Module):
    """A convolution behind a layer, cut by the number of steps as in Mamba; the last step is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(5, 6, batch_first=True)
        self.conv = nn.Conv1d(6, 6, 4, padding=3, groups=6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        z = F.silu(self.conv(y.mT)[..., : x.shape[1]]).mT
        return (y * z)[:, -1]


class Spectrum(nn.Module):
    """Convolutions over time and frequency."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 3, (3, 3), stride=(1, 2), padding=(0, 1), dilation=(2, 1))
        self.second = nn.Conv2d(3, 2, (2, 2), padding="valid")
        self.rnn = nn.GRU(4, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(F.pad(x.unsqueeze(1), (0, 0, 4, 0)))
        y = self.second(F.pad(F.relu(y), (0, 0, 1, 0)))
        return self.rnn(y.transpose(1, 2).flatten(2))[0]


class Cell(nn.Module):
    """A convolution before a loop; what the loop makes of the cell's state is ``between``."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.before, self.after = nn.Conv1d(5, 4, 3, padding=2), nn.Conv1d(6, 3, 2)
        self.cell, self.between = nn.GRUCell(4, 6), between

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x.mT)[..., :-2].mT
        h, steps = x.new_zeros(len(x), 6), []
        for step in x.unbind(1):
            h = self.between(self.cell(step, h))
            steps.append(h)
        return self.after(F.pad(torch.stack(steps, 2), (1, 0))).mT


class PassesState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(5, 4, 3)
        self.rnn = nn.LSTM(4, 6, batch_first=True)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        y, state = self.rnn(self.conv(F.pad(x.mT, (2, 0))).mT, state)
        return y, state


class Ways(nn.Module):
    """Every way to pad, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.zeros, self.value, self.normed = nn.Conv1d(5, 2, 3, dilation=2), nn.Conv1d(5, 2, 4), nn.Conv1d(5, 2, 3)
        self.norm, self.more, self.both = _norm(5), nn.Conv1d(5, 2, 3), nn.Conv1d(5, 2, 3, padding=1)
        self.subclass, self.narrow = CausalConv1d(5, 2, 3, dilation=4), nn.Conv1d(5, 2, 1)
        self.wide = nn.Conv1d(2, 4, 3, dilation=20, groups=2)
        self.first, self.between, self.second = nn.Conv1d(5, 4, 3, dilation=2), _norm(4), nn.Conv1d(4, 3, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.mT
        found = {
            "zeros": self.zeros(torch.cat([torch.zeros(len(x), x.shape[1], 4), x], dim=-1)),
            "value": self.value(F.pad(x, (3, 0), value=-2.0)),
            "normed": self.normed(self.norm(F.pad(x, (2, 0)))),
            "more": self.more(F.pad(x, (5, 0)))[..., 3:],
            "both": self.both(F.pad(x, (1, 0)))[..., :-1],
            "subclass": self.subclass(x),
            "wide": self.wide(F.pad(self.narrow(x), (40, 0))),
            # Once for two convolutions: the second one begins with what the first makes of padding.
            "once": self.second(F.relu(self.between(self.first(F.pad(x, (7, 0)))))),
        }
        return {f"by {name}": y.mT for name, y in found.items()}


ZOO: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]]]] = {
    "CNN-LSTM": (CnnLstm, {"features.1.x": (5, 8)}),
    "TCN": (Tcn, {"0.net.0.x": (5, 2), "0.net.4.x": (4, 2), "1.net.0.x": (4, 16), "1.net.4.x": (4, 16)}),
    "every way to pad": (
        Ways,
        {"zeros.x": (5, 4), "value.x": (5, 3), "normed.x": (5, 2), "more.x": (5, 2), "both.x": (5, 2),
         "subclass.x": (5, 8), "wide.x": (2, 40), "first.x": (5, 4), "second.x": (4, 3)},
    ),
    "one module three times": (Shared, {"conv@2.x": (1, 2), "conv@3.x": (1, 2)}),
    "behind a layer, last step": (Gated, {"conv.x": (6, 3)}),
    "time and frequency": (Spectrum, {"first.x": (1, 4, 5), "second.x": (3, 1, 3)}),
    "before and behind a cell": (lambda: Cell(nn.Identity()), {"before.x": (5, 2), "after.x": (6, 1)}),
    "with a cell that is normalised": (lambda: Cell(nn.LayerNorm(6)), {"before.x": (5, 2), "after.x": (6, 1)}),
    "passes its state": (PassesState, {"conv.x": (5, 2)}),
}  # fmt: skip


EXAMPLES = {"passes its state": (EXAMPLE, (torch.zeros(1, 2, 6), torch.zeros(1, 2, 6)))}


class Exported(NamedTuple):
    model: nn.Module
    report: Any
    path: Path
    plain: Any

    def whole(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """What torch gives for one whole stream ``[steps, features]``."""
        with torch.no_grad():
            found = self.model.eval()(torch.from_numpy(x)[None])
        if isinstance(found, dict):
            return {name: head[0].numpy() for name, head in found.items()}
        return {"output": (found if isinstance(found, Tensor) else found[0])[0].numpy()}


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, plain_run: Any) -> Callable[[str], Exported]:
    """Exports a model of the zoo, once in all tests."""
    done: dict[str, Exported] = {}
    folder = tmp_path_factory.mktemp("convolutions")

    def get(name: str) -> Exported:
        if name not in done:
            torch.manual_seed(7)
            model = ZOO[name][0]()
            path = folder / f"{name.replace(' ', '_')}.onnx"
            report = recurd_export.export(model, EXAMPLES.get(name, EXAMPLE), path, name="zoo")
            done[name] = Exported(model, report, path, plain_run(path))
        return done[name]

    return get


def _streams(steps: Sequence[int], seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.standard_normal((count, 5)).astype(np.float32) for count in steps]


def _assert_equal(expected: dict[str, np.ndarray], got: dict[str, np.ndarray], what: str = "") -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=3e-6, err_msg=f"{name} {what}")


@pytest.mark.parametrize("name", ZOO)
def test_any_chunks_give_what_torch_gives_for_the_whole(exported: Callable[[str], Exported], name: str) -> None:
    found = exported(name)
    for what, sizes in CHUNKS.items():
        (x,) = _streams([sum(sizes)], 1)

        heads, _ = found.plain.chunks(x[None], list(np.cumsum(sizes)[:-1]))

        _assert_equal(found.whole(x), {head: value[0] for head, value in heads.items()}, what)


@pytest.mark.parametrize("name", ZOO)
def test_ragged_rows_with_rubbish_behind_them_carry_on_right(exported: Callable[[str], Exported], name: str) -> None:
    found = exported(name)
    streams = _streams([9, 5, 13], 2)
    states, done = found.plain.initial(3), [0, 0, 0]
    per = {head["name"]: head["per"] for head in found.plain.contract["heads"]}
    parts: list[dict[str, list[np.ndarray]]] = [{head: [] for head in per} for _ in streams]

    for lengths in ([4, 1, 6], [1, 3, 1], [4, 1, 6]):
        x = np.full((3, 6, 5), 1e3, np.float32)
        for row, length in enumerate(lengths):
            x[row, :length] = streams[row][done[row] : done[row] + length]
            done[row] += length
        heads, states = found.plain.run(x, states, lengths)
        for row, length in enumerate(lengths):
            for head, value in heads.items():
                parts[row][head].append(value[row] if per[head] == "last" else value[row, :length])

    assert done == [len(stream) for stream in streams]
    for row, stream in enumerate(streams):
        got = {h: p[-1] if per[h] == "last" else np.concatenate(p) for h, p in parts[row].items()}
        _assert_equal(found.whole(stream), got, f"of row {row}")


@pytest.mark.parametrize("name", ZOO)
def test_the_last_inputs_are_states_of_the_contract(exported: Callable[[str], Exported], name: str) -> None:
    contract = exported(name).report.contract

    states = {state.name: state for state in contract.states if state.name.endswith(".x")}

    assert {name: state.shape for name, state in states.items()} == ZOO[name][1]
    assert {state.batch_axis for state in states.values()} == {0}
    assert all(state.output == f"{state.name}.next" for state in states.values())
    assert contract.causal


def test_a_state_is_the_last_inputs_and_keeps_old_ones_in_short_rows(exported: Callable[[str], Exported]) -> None:
    plain = exported("every way to pad").plain
    x = np.stack(_streams([6, 6], 3))

    _, states = plain.run(x[:, :3].copy(), plain.initial(2), [1, 3])
    _, states = plain.run(x[:, 3:].copy(), states, [1, 3])

    seen = [np.concatenate([x[0, :1], x[0, 3:4]]), x[1]]
    for row, steps in enumerate(seen):
        np.testing.assert_array_equal(states["more.x"][row], steps[-2:].T)
        np.testing.assert_array_equal(
            states["value.x"][row], np.concatenate([np.full((3, 5), -2, np.float32), steps])[-3:].T
        )


def test_a_stream_starts_from_what_the_model_pads_with(exported: Callable[[str], Exported]) -> None:
    report = exported("every way to pad").report
    values = {state.name: state.initial_array() for state in report.contract.states}

    assert (values["value.x"] == -2).all()
    assert not values["zeros.x"].any()
    norm = exported("every way to pad").model.norm.eval()
    expected = norm(torch.zeros(1, 5, 2))[0].detach().numpy()
    np.testing.assert_allclose(values["normed.x"], expected, rtol=1e-6)
    assert "hoisted value (Conv1d, kernel 4), initial constant: value.x" in str(report)
    assert "hoisted wide (Conv1d, kernel 3, dilation 20), initial zeros: wide.x" in str(report)


@pytest.mark.parametrize("name", ["CNN-LSTM", "every way to pad"])
def test_streams_in_the_daemons_ticks_give_what_torch_gives(exported: Callable[[str], Exported], name: str) -> None:
    found = exported(name)
    model = Model.load(found.path, slots=4, threads=1)
    streams = _streams([12, 9, 11], 4)
    done, parts = [0, 0, 0], [[], [], []]
    random = np.random.default_rng(5)

    while any(done[i] < len(stream) for i, stream in enumerate(streams)):
        rows = [i for i, stream in enumerate(streams) if done[i] < len(stream)]
        rows = [i for i in rows if random.random() < 0.7] or rows
        lengths = [min(int(random.integers(1, 5)), len(streams[i]) - done[i]) for i in rows]
        x = np.zeros((len(rows), max(lengths), 5), np.float32)
        for row, (i, length) in enumerate(zip(rows, lengths, strict=True)):
            x[row, :length] = streams[i][done[i] : done[i] + length]
        # Slots in another order than rows, and one that is not used.
        slots, fresh = np.array([3 - i for i in rows]), np.array([done[i] == 0 for i in rows])
        outputs = model.run(slots, fresh, np.array(lengths, np.int32), x)
        for row, (i, length) in enumerate(zip(rows, lengths, strict=True)):
            parts[i].append([output[row, :length] for output in outputs])
            done[i] += length

    heads = [head.name for head in model.contract.heads]
    for stream, part in zip(streams, parts, strict=True):
        got = {head: np.concatenate(values) for head, values in zip(heads, zip(*part, strict=True), strict=True)}
        _assert_equal(found.whole(stream), got)


def test_the_convolution_stays_one_over_the_whole_chunk(exported: Callable[[str], Exported]) -> None:
    kinds = [node.op_type for node in exported("CNN-LSTM").plain.model.graph.node]

    assert (kinds.count("Conv"), kinds.count("LSTM"), kinds.count("Scan")) == (1, 2, 0)


def test_a_model_that_takes_its_state_is_told_of_what_it_does_not_take(exported: Callable[[str], Exported]) -> None:
    report = exported("passes its state").report

    assert "state passed along" in [check.name for check in report.checks]
    assert any("pads every chunk anew (convolution 'conv')" in note for note in report.notes)


class Images(nn.Module):
    """Takes ``[batch, channels, time, frequency]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rnn = nn.Conv2d(2, 4, 3, padding=(0, 1)), nn.GRU(12, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.conv(F.pad(x, (0, 0, 2, 0))).transpose(1, 2).flatten(2))[0]


AXES: dict[str, tuple[nn.Module, tuple[int, ...], Any, str]] = {
    "time first": (TimeMajor(), (4, 4, 5), lambda m, x: m(x.transpose(0, 1)).transpose(0, 1), "[time, batch, ...]"),
    # As many channels as the steps it is tried with.
    "time last": (
        nn.Sequential(nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(11, 3, 3)), (2, 11, 16), lambda m, x: m(x.mT).mT,
        "[batch, ..., time]",
    ),
    "time between": (Images(), (2, 2, 16, 3), lambda m, x: m(x.transpose(1, 2)), "[batch, ..., time, ...]"),
}  # fmt: skip


@pytest.mark.parametrize("name", AXES)
def test_the_axis_of_time_is_found_wherever_it_is(tmp_path: Path, plain_run: Any, name: str) -> None:
    model, shape, call, said = AXES[name]
    report = recurd_export.export(model.eval(), torch.zeros(shape), tmp_path / "m.onnx")
    x = torch.randn(3, 9, *report.contract.input.shape)

    heads, _ = plain_run(tmp_path / "m.onnx").chunks(x.numpy(), [1, 4])

    np.testing.assert_allclose(heads["output"], call(model, x).detach(), atol=3e-6)
    assert f"the model's own input is {said}; the exported file takes [batch, time, ...]" in report.notes


def test_beside_a_layer_that_looks_ahead_a_convolution_is_carried_on(tmp_path: Path, plain_run: Any) -> None:
    model = BothWays().eval()
    recurd_export.export(model, EXAMPLE, tmp_path / "m.onnx")
    x = torch.randn(3, 9, 5)
    plain, state, heads = plain_run(tmp_path / "m.onnx"), None, []

    got, _ = plain.chunks(x.numpy(), [1, 4])

    with torch.no_grad():
        features = model.conv(F.pad(x.mT, (2, 0))).mT
        for start, stop in ((0, 1), (1, 4), (4, 9)):
            head, state = model.rnn(features[:, start:stop], state)
            heads.append(head)
    np.testing.assert_allclose(got["output"], torch.cat(heads, 1), atol=3e-6)


class Net(nn.Module):
    """What ``change`` makes of ``[batch, channels, time]``, by a layer; then perhaps a recurrent layer."""

    def __init__(self, change: Any, layer: nn.Module, *, recurrent: bool = True) -> None:
        super().__init__()
        self.change, self.layer = change, layer
        self.rnn = nn.GRU(5, 6, batch_first=True) if recurrent else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.change(self.layer, x.mT).mT
        return y if self.rnn is None else self.rnn(y)[0]


CUT = "layer 'layer' (Conv1d) is a convolution over time, so results would depend on how a stream is cut into chunks; "
LEFT = "an nn.Conv1d can be exported when it is padded on the left only, with (kernel - 1) * dilation constant steps"


def _plainly(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def _left(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(F.pad(x, (2, 0)))


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "padding='same'": (Net(_plainly, nn.Conv1d(5, 5, 3, padding="same")), CUT + LEFT),
    "on both sides": (Net(lambda conv, x: conv(F.pad(x, (1, 1))), nn.Conv1d(5, 5, 3)), CUT + LEFT),
    "on the right": (Net(lambda conv, x: conv(F.pad(x, (0, 2))), nn.Conv1d(5, 5, 3)), CUT + LEFT),
    "with the first step": (
        Net(lambda conv, x: conv(F.pad(x, (2, 0), mode="replicate")), nn.Conv1d(5, 5, 3)), CUT + LEFT,
    ),
    "on both sides, without a recurrent layer": (
        Net(_plainly, nn.Conv1d(5, 5, 3, padding=1), recurrent=False), CUT + LEFT,
    ),
    "with its other end": (
        Net(lambda conv, x: conv(x)[..., :-2], nn.Conv1d(5, 5, 3, padding=2, padding_mode="circular")),
        "layer 'layer' (Conv1d) does not take every number of steps, as chunks have: Padding value causes wrapping",
    ),
    "a stride": (
        Net(_left, nn.Conv1d(5, 5, 3, stride=2)),
        "layer 'layer' (Conv1d) gives one step for every 2 (stride=2), so chunks of a stream would not fit together",
    ),
    "a stride, without a recurrent layer": (
        Net(_left, nn.Conv1d(5, 5, 3, stride=2), recurrent=False),
        "layer 'layer' (Conv1d) gives one step for every 2 (stride=2), so chunks of a stream would not fit together",
    ),
    "the other end cut off": (
        Net(lambda conv, x: conv(x)[..., 2:], nn.Conv1d(5, 5, 3, padding=2)), "cuts a part out of time",
    ),
    "delayed": (
        Net(lambda conv, x: conv(F.pad(x, (4, 0)))[..., : x.shape[2]], nn.Conv1d(5, 5, 3)), "cuts a part out of time",
    ),
    "pooling after a causal one": (
        Net(lambda both, x: both[1](both[0](x)[..., :-2]),
            nn.ModuleList([nn.Conv1d(5, 5, 3, padding=2), nn.MaxPool1d(2)])),
        "layer 'layer.1' (MaxPool1d) changes the number of time steps ([3, 5, 11] into [3, 5, 5])",
    ),
    "a kernel of one only": (
        Net(_plainly, nn.Conv1d(5, 5, 1), recurrent=False),
        "no cell and no convolution over time was found in Net",
    ),
    "rows that are no streams": (
        Net(lambda conv, x: conv(x.reshape(-1, 1, x.shape[2])).reshape(x.shape), nn.Conv1d(1, 1, 1), recurrent=False),
        "layer 'layer' (Conv1d) is given [15, 1, 11] where the model was given a batch of 3 and 11 steps",
    ),
    "a branch on values": (
        Net(lambda conv, x: x if conv(x)[..., :-2].sum() > 0 else -x, nn.Conv1d(5, 5, 3, padding=2)),
        "the model's forward branches on the values of tensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_carried_on_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    model, sentence = REFUSED[name]

    with pytest.raises(ExportError) as caught:
        recurd_export.export(model, EXAMPLE, tmp_path / "m.onnx")

    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
