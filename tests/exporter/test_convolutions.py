"""Causal convolutions are carried from chunk to chunk by their last inputs; those that look ahead are refused."""

from collections.abc import Callable
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
#: Chunks of a stream: single steps, chunks shorter and longer than any convolution looks back.
CHUNKS = {"single steps": [1] * 14, "short ones": [1, 2, 1, 3, 1, 1, 4, 1], "long ones": [9, 1, 4]}


class Over(nn.Module):
    """What ``channels`` makes of ``[batch, channels, time]``, then perhaps a recurrent layer."""

    def __init__(self, channels: Callable[[Any, Tensor], Tensor], rnn: int = 0, **layers: nn.Module) -> None:
        super().__init__()
        self.channels = channels
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.rnn = nn.GRU(rnn, 6, batch_first=True) if rnn else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.channels(self, x.transpose(1, 2)).transpose(1, 2)
        return y if self.rnn is None else self.rnn(y)[0]


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


def _tcn(norm: Any = nn.utils.parametrizations.weight_norm) -> nn.Module:
    blocks = nn.Sequential(Block(5, 4, 1, norm), Block(4, 4, 2, norm), Block(4, 4, 8, norm))
    return Over(lambda net, x: net.blocks(x), blocks=blocks)


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
    def __init__(self, *, recurrent: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(5, 4, 3)
        self.rnn = nn.LSTM(4, 6) if recurrent else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(F.pad(x.permute(1, 2, 0), (2, 0))).permute(2, 0, 1)
        return y if self.rnn is None else self.rnn(y)[0]


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


def _pad(x: Tensor, steps: int, value: float = 0.0) -> Tensor:
    return F.pad(x, (steps, 0), value=value)


def _cat(net: Any, x: Tensor) -> Tensor:
    return net.conv(torch.cat([torch.zeros(len(x), x.shape[1], 4), x], dim=-1))


def _once(net: Any, x: Tensor) -> Tensor:
    """Padded once for both convolutions: the second one begins with what the first makes of padding."""
    return net.second(F.relu(net.norm(net.first(_pad(x, 7)))))


ZOO: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]]]] = {
    "CNN-LSTM": (CnnLstm, {"features.1.x": (5, 8)}),
    "TCN": (_tcn, {"blocks.0.net.0.x": (5, 2), "blocks.0.net.4.x": (4, 2), "blocks.1.net.0.x": (4, 4),
                   "blocks.1.net.4.x": (4, 4), "blocks.2.net.0.x": (4, 16), "blocks.2.net.4.x": (4, 16)}),
    "block with the old weight norm": (
        lambda: Over(lambda net, x: net.block(x), 4, block=Block(5, 4, 1, _old_weight_norm)),
        {"block.net.0.x": (5, 2), "block.net.4.x": (4, 2)},
    ),
    "zeros put before it": (lambda: Over(_cat, 6, conv=nn.Conv1d(5, 6, 3, dilation=2)), {"conv.x": (5, 4)}),
    "padded with another value": (
        lambda: Over(lambda net, x: net.conv(_pad(x, 3, -2.0)), conv=nn.Conv1d(5, 4, 4)), {"conv.x": (5, 3)},
    ),
    "normalised after the padding": (
        lambda: Over(lambda net, x: net.conv(net.norm(_pad(x, 2))), 4, conv=nn.Conv1d(5, 4, 3), norm=_norm(5)),
        {"conv.x": (5, 2)},
    ),
    "padded once for two": (
        lambda: Over(_once, 3, first=nn.Conv1d(5, 4, 3, dilation=2), norm=_norm(4), second=nn.Conv1d(4, 3, 4)),
        {"first.x": (5, 4), "second.x": (4, 3)},
    ),
    "padded by more than it takes": (
        lambda: Over(lambda net, x: net.conv(_pad(x, 5))[..., 3:], conv=nn.Conv1d(5, 4, 3)), {"conv.x": (5, 2)},
    ),
    "padded by itself and before": (
        lambda: Over(lambda net, x: net.conv(_pad(x, 1))[..., :-1], conv=nn.Conv1d(5, 4, 3, padding=1)),
        {"conv.x": (5, 2)},
    ),
    "a subclass that pads itself": (
        lambda: Over(lambda net, x: net.conv(x), 6, conv=CausalConv1d(5, 6, 3, dilation=4)), {"conv.x": (5, 8)},
    ),
    "one module three times": (Shared, {"conv@2.x": (1, 2), "conv@3.x": (1, 2)}),
    "kernel of one beside it": (
        lambda: Over(
            lambda net, x: net.conv(_pad(net.narrow(x), 40)),
            narrow=nn.Conv1d(5, 2, 1), conv=nn.Conv1d(2, 4, 3, dilation=20, groups=2),
        ),
        {"conv.x": (2, 40)},
    ),
    "behind a layer, last step": (Gated, {"conv.x": (6, 3)}),
    "time and frequency": (Spectrum, {"first.x": (1, 4, 5), "second.x": (3, 1, 3)}),
    "before and behind a cell": (lambda: Cell(nn.Identity()), {"before.x": (5, 2), "after.x": (6, 1)}),
    "with a cell that is normalised": (lambda: Cell(nn.LayerNorm(6)), {"before.x": (5, 2), "after.x": (6, 1)}),
    "passes its state": (PassesState, {"conv.x": (5, 2)}),
}  # fmt: skip


class Exported(NamedTuple):
    model: nn.Module
    report: Any
    path: Path
    plain: Any

    def whole(self, x: np.ndarray) -> np.ndarray:
        """What torch gives for one whole stream ``[steps, features]``."""
        with torch.no_grad():
            found = self.model.eval()(torch.from_numpy(x)[None])
        return (found[0] if isinstance(found, tuple) else found)[0].numpy()


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
            report = recurd_export.export(model, EXAMPLE, path, name="zoo")
            done[name] = Exported(model, report, path, plain_run(path))
        return done[name]

    return get


def _streams(steps: list[int], seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.standard_normal((count, 5)).astype(np.float32) for count in steps]


@pytest.mark.parametrize("name", ZOO)
def test_any_chunks_give_what_torch_gives_for_the_whole(exported: Callable[[str], Exported], name: str) -> None:
    found = exported(name)
    (x,) = _streams([14], 1)
    expected = found.whole(x)

    for what, sizes in CHUNKS.items():
        heads, _ = found.plain.chunks(x[None], list(np.cumsum(sizes)[:-1]))
        (head,) = heads.values()
        np.testing.assert_allclose(head[0], expected, rtol=1e-4, atol=3e-6, err_msg=what)


@pytest.mark.parametrize("name", ZOO)
def test_ragged_rows_with_rubbish_behind_them_carry_on_right(exported: Callable[[str], Exported], name: str) -> None:
    found = exported(name)
    streams = _streams([9, 5, 13], 2)
    plain, states, done, heads = found.plain, found.plain.initial(3), [0, 0, 0], [[], [], []]
    is_last = plain.contract["heads"][0]["per"] == "last"

    for lengths in ([4, 1, 6], [1, 3, 1], [4, 1, 6]):
        x = np.full((3, 6, 5), 1e3, np.float32)
        for row, length in enumerate(lengths):
            x[row, :length] = streams[row][done[row] : done[row] + length]
            done[row] += length
        (head,), states = (lambda got: (got[0].values(), got[1]))(plain.run(x, states, lengths))
        for row, length in enumerate(lengths):
            heads[row].append(head[row] if is_last else head[row, :length])

    assert done == [len(stream) for stream in streams]
    for row, stream in enumerate(streams):
        got = heads[row][-1] if is_last else np.concatenate(heads[row])
        np.testing.assert_allclose(got, found.whole(stream), rtol=1e-4, atol=3e-6)
