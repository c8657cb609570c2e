"""A small LSTM that says after every step what it takes the recording for, trained in seconds."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from recurd_export.demo.data import Array, Dataset, Series

#: Label of the steps that pad a batch.
_PADDING = -1


class Classifier(nn.Module):
    """Raw sensor values ``[batch, time, channels]`` to ``probability [batch, time, classes]``.

    Scaling is part of the model, so that whoever streams need not know about it.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor, classes: int, *, hidden: int, layers: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.lstm = nn.LSTM(len(mean), hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The head that is served."""
        return {"probability": self.logits((x - self.mean) / self.deviation).softmax(-1)}

    def logits(self, x: Tensor) -> Tensor:
        """Of scaled values."""
        y, _ = self.lstm(x)
        logits: Tensor = self.head(y)
        return logits


def train(data: Dataset, *, seed: int, epochs: int, advance: Callable[[], None]) -> Classifier:
    """Train on whole recordings; ``advance`` is called after every epoch.

    Every step counts in the loss, so that the answers are sensible early in a recording too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        steps = torch.from_numpy(np.concatenate([series.values for series in data.train]))
        mean, deviation = steps.mean(0), steps.std(0)
        recipe = data.recipe
        model = Classifier(mean, deviation, len(data.labels), hidden=recipe.hidden, layers=recipe.layers)
        x, wanted = _batch(data.train, mean, deviation)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=epochs)
        for _ in range(epochs):
            logits = model.logits(x + recipe.jitter * torch.randn_like(x))
            loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=_PADDING, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            advance()
    return model.eval()


def _batch(recordings: Sequence[Series], mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    x = pad_sequence([(torch.from_numpy(s.values) - mean) / deviation for s in recordings], batch_first=True)
    wanted = [torch.full((len(s.values),), s.label) for s in recordings]
    return x, pad_sequence(wanted, batch_first=True, padding_value=_PADDING)


def run_offline(model: Classifier, recordings: Sequence[Series], advance: Callable[[], None]) -> list[Array]:
    """The model over each whole recording, alone: ``[steps, classes]`` each."""
    answers = []
    with torch.inference_mode():
        for series in recordings:
            answers.append(model(torch.from_numpy(series.values)[None])["probability"][0].numpy())
            advance()
    return answers


def example(data: Dataset) -> Tensor:
    """A real recording, as a batch of one."""
    return torch.from_numpy(data.train[0].values)[None]
