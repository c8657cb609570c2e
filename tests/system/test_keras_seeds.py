"""Stateful Keras models as people train them: trained a little, exported, served by a daemon, and held against Keras.

Every model is fed chunk after chunk, as a batch by Keras with ``stateful=True`` and as one stream a row by the daemon.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import recurd
import recurd_export
from process import Process
from recurd.client import Client
from recurd.model import Model
from recurd_export.keras.arrays import as_array
from recurd_export.keras.load import import_keras

keras = import_keras()
L = keras.layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of Keras' own get_weights()
]

TEXT = (
    "the river comes down from the hills and the mill turns with it all day long. in the night the mill stands still, "
    "and the miller counts the sacks by the light of a lamp. when the snow melts the river is high, the wheel turns "
    "faster than the stones can bear, and the miller opens the gate to let the water pass him by. "
) * 8
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
WORDS = [word for number in NUMBERS for word in (number, ".")] * 30


@dataclass(frozen=True)
class Seed:
    """A trained model, what was learned, and data that goes on from where the training stopped."""

    model: Any
    #: Mean loss of the first and of the last round of the training.
    losses: tuple[float, float]
    #: ``[rows, steps, ...]``, and where it is cut.
    data: np.ndarray
    cuts: tuple[int, ...]

    @property
    def recurrent(self) -> list[Any]:
        """Layers that keep states."""
        return [layer for layer in self.model.layers if getattr(layer, "stateful", False)]

    def reset(self) -> None:
        """Keras' own fresh start."""
        for layer in self.recurrent:
            layer.reset_states()

    def chunks(self) -> list[np.ndarray]:
        return [self.data[:, start:stop] for start, stop in pairwise(self.cuts)]

    def run(self, chunk: np.ndarray) -> np.ndarray:
        """Keras, which keeps its states."""
        return as_array(self.model(chunk, training=False).detach())

    def states(self) -> list[np.ndarray]:
        """What Keras keeps, each ``[rows, directions, units]``."""
        found = []
        for layer in self.recurrent:
            halves = [layer.forward_layer, layer.backward_layer] if hasattr(layer, "backward_layer") else [layer]
            found += [np.stack(parts, 1) for parts in zip(*(map(_value, half.states) for half in halves), strict=True)]
        return found


def _value(state: Any) -> np.ndarray:
    return as_array(state.value.detach())


Build = Callable[[int, bool], Any]


def model_of(shape: tuple[int | None, ...], *layers: Any) -> Any:
    return keras.Sequential([keras.Input(batch_shape=shape), *layers])


def trained(build: Build, loss: str, x: np.ndarray, y: np.ndarray, steps: int, rounds: int) -> tuple[Any, Any]:
    """The stateful model of as many rows, and the mean loss of the first and the last round.

    Trained on windows that do not overlap, without state: in training, the states of a stateful layer are written over
    before their gradients are there, on Keras' torch back end.
    """
    model, stateful = build(len(x), False), build(len(x), True)
    model.compile(keras.optimizers.Adam(0.02), loss)
    losses = []
    for _ in range(rounds):
        for start in range(0, x.shape[1] - steps + 1, steps):
            wanted = y[:, start : start + steps] if y.ndim > 1 else y
            losses.append(float(model.train_on_batch(x[:, start : start + steps], wanted)))
    stateful.set_weights(model.get_weights())
    windows = len(losses) // rounds
    return stateful, (float(np.mean(losses[:windows])), float(np.mean(losses[-windows:])))


def characters() -> tuple[Seed, Seed]:
    """Trained in a batch of 32 over windows that do not overlap; the same weights in a batch of 1."""
    ids = np.array([sorted(set(TEXT)).index(character) for character in TEXT])
    classes = int(ids.max()) + 1
    rows = ids[: len(ids) // 32 * 32].reshape(32, -1)

    def build(batch: int, stateful: bool) -> Any:
        return model_of(
            (batch, None),
            L.Embedding(classes, 16),
            L.GRU(128, return_sequences=True, stateful=stateful),
            L.Dense(classes, activation="softmax"),
        )

    many, losses = trained(build, "sparse_categorical_crossentropy", rows[:, :-1], rows[:, 1:], 14, 6)
    one = build(1, True)
    one.set_weights(many.get_weights())
    return Seed(many, losses, rows[:, :42], (0, 14, 28, 42)), Seed(one, losses, ids[None, :80], (0, 1, 2, 30, 80))


def words() -> Seed:
    """``one . two . three .``: the next word of number words."""
    names = sorted(set(WORDS))
    ids = np.array([names.index(word) for word in WORDS])[None]

    def build(batch: int, stateful: bool) -> Any:
        return model_of(
            (batch, None),
            L.Embedding(len(names), 64),
            L.LSTM(64, return_sequences=True, stateful=stateful),
            L.Dense(len(names), activation="softmax"),
        )

    model, losses = trained(build, "sparse_categorical_crossentropy", ids[:, :-1], ids[:, 1:], 20, 2)
    return Seed(model, losses, ids[:, :60], (0, 3, 4, 20, 60))


def followers(random: np.random.Generator) -> dict[str, Seed]:
    """Two rows of three numbers; a sum that fades is to be followed."""
    x = random.standard_normal((2, 60, 3)).astype(np.float32)
    y = np.zeros((2, 60, 1), np.float32)
    for step in range(60):
        y[:, step] = 0.8 * (y[:, step - 1] if step else 0) + 0.2 * x[:, step].sum(-1, keepdims=True)
    layers = {
        "gru": lambda **o: [L.GRU(5, **o)],
        "both": lambda **o: [L.Bidirectional(L.LSTM(5, **o))],
        "stack": lambda **o: [L.LSTM(8, **o), L.LSTM(6, **o), L.LSTM(4, **o)],
    }
    found = {}
    for name, of in layers.items():

        def build(batch: int, stateful: bool, of: Any = of) -> Any:
            return model_of((batch, None, 3), *of(return_sequences=True, stateful=stateful), L.Dense(1))

        model, losses = trained(build, "mse", x, y, 20, 12)
        found[name] = Seed(model, losses, x[:, :30], (0, 10, 20, 30))
    return found


def classifier(random: np.random.Generator) -> Seed:
    """A batch of 32, ten steps of 16 features, one of ten classes for each window."""
    classes = np.arange(32) % 10
    x = random.standard_normal((32, 40, 16)).astype(np.float32)
    x[:, :, :10] += 3 * np.eye(10, dtype=np.float32)[classes][:, None]

    def build(batch: int, stateful: bool) -> Any:
        return model_of((batch, 10, 16), L.LSTM(32, stateful=stateful), L.Dense(10, activation="softmax"))

    model, losses = trained(build, "sparse_categorical_crossentropy", x, classes, 10, 3)
    return Seed(model, losses, x, (0, 10, 20, 30, 40))


@pytest.fixture(scope="module", autouse=True)
def _short_long_runs() -> Iterator[None]:
    """Keras takes its time over 10,000 steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recurd_export.drift.STEPS", 200)
        yield


@pytest.fixture(scope="module")
def seeds() -> dict[str, Seed]:
    torch.set_num_threads(1)
    keras.utils.set_random_seed(7)
    random = np.random.default_rng(7)
    many, one = characters()
    return {
        "characters-32": many,
        "characters-1": one,
        "words": words(),
        "classifier": classifier(random),
        **followers(random),
    }


NAMES = ["characters-32", "characters-1", "words", "classifier", "gru", "both", "stack"]


@pytest.fixture(scope="module")
def files(seeds: dict[str, Seed], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("seeds")
    found = {}
    for name, seed in seeds.items():
        found[name] = folder / f"{name}.onnx"
        recurd_export.export(seed.model, None, found[name])
    return found


@pytest.fixture(scope="module")
def client(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("daemon")
    with Process(folder, "--bind", "tcp://127.0.0.1:0", "--metrics", "127.0.0.1:0", *files.values()) as daemon:
        daemon.ready()
        with recurd.connect(daemon.endpoint) as connected:
            yield connected


def near(got: Any, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_training_learned_something(seeds: dict[str, Seed], name: str) -> None:
    first, last = seeds[name].losses

    assert last < 0.8 * first


@pytest.mark.parametrize("name", NAMES)
def test_the_daemon_answers_chunk_by_chunk_as_keras_does(seeds: dict[str, Seed], client: Client, name: str) -> None:
    seed = seeds[name]
    streams = [client.open(f"{name}-{row}", model=name) for row in range(len(seed.data))]

    for _ in range(2):
        seed.reset()
        for chunk in seed.chunks():
            answers = [stream.submit(row) for stream, row in zip(streams, chunk, strict=True)]
            wanted = seed.run(chunk)
            near(np.stack([answer.result(30) for answer in answers]), wanted)
        for stream in streams:
            stream.reset()
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("name", NAMES)
def test_states_read_back_are_those_keras_keeps_and_a_reset_gives_zeros(
    seeds: dict[str, Seed], files: dict[str, Path], name: str
) -> None:
    seed = seeds[name]
    rows = len(seed.data)
    model = Model.load(files[name], slots=rows, threads=1)
    slots = np.arange(rows, dtype=np.int64)
    seed.reset()
    fresh = np.ones(rows, bool)

    assert not any(state.any() for state in seed.states())
    assert not any(state.initial_array().any() for state in model.contract.states)
    for chunk in seed.chunks():
        lengths = np.full(rows, chunk.shape[1], np.int32)
        model.run(slots, fresh, lengths, np.ascontiguousarray(chunk))
        seed.run(chunk)
        fresh = np.zeros(rows, bool)
        for got, wanted in zip(model.read(slots).values(), seed.states(), strict=True):
            near(got, wanted)
    assert all(state.any() for state in seed.states())


def test_one_pass_is_three_sub_sequences(seeds: dict[str, Seed], client: Client) -> None:
    seed = seeds["gru"]
    seed.reset()
    whole = seed.run(seed.data)
    at_the_end = seed.states()
    seed.reset()
    parts = [seed.run(chunk) for chunk in seed.chunks()]

    near(np.concatenate(parts, 1), whole)
    for one, other in zip(seed.states(), at_the_end, strict=True):
        near(one, other)
    for row in range(2):
        stream = client.open(f"passes-{row}", model="gru")
        near(stream.push(seed.data[row]), whole[row])
        stream.reset()
        near(np.concatenate([stream.push(chunk[row]) for chunk in seed.chunks()]), whole[row])
        stream.close()
