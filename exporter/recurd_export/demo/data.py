"""Recordings of real sensors that ship in sktime's wheel (BSD-3), as arrays.

BasicMotions: four people, four activities, a smart watch's accelerometer and gyroscope at 10 Hz, 10 s a recording.
JapaneseVowels: nine men saying /ae/, 12 LPC cepstrum coefficients a frame, 7 to 29 frames a recording.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Series(NamedTuple):
    """One recording: ``values [steps, channels]`` float32 as the sensor gave them, and the index of its class."""

    values: Array
    label: int


class Sensor(NamedTuple):
    """Consecutive channels that belong on one plot."""

    title: str
    channels: tuple[str, ...]


class Recipe(NamedTuple):
    """What it takes to train a good model in seconds. ``jitter`` is noise on the input, in standard deviations."""

    hidden: int
    layers: int
    epochs: int
    jitter: float


class Dataset(msgspec.Struct, frozen=True, kw_only=True):
    """One task: recordings to train on, recordings to stream, and what their numbers mean."""

    name: str
    title: str
    sensors: tuple[Sensor, ...]
    labels: tuple[str, ...]
    #: ``None`` where only the order of the steps is known.
    sample_rate_hz: float | None
    #: What a stream is called, and how many of them the daemon is given at once.
    source: str
    streams: int
    recipe: Recipe
    train: tuple[Series, ...]
    test: tuple[Series, ...]

    @property
    def features(self) -> tuple[str, ...]:
        """Names of all channels, in order."""
        return tuple(channel for sensor in self.sensors for channel in sensor.channels)


def load(name: str) -> Dataset:
    """Read the data set of one of :data:`NAMES`. Raises ModuleNotFoundError without sktime."""
    return _LOADERS[name]()


def _basic_motions() -> Dataset:
    from sktime.datasets import load_basic_motions  # brings pandas and scikit-learn, more than a second

    labels = ("standing", "running", "walking", "badminton")
    return Dataset(
        name="basic-motions",
        title="A watch tells what its wearer does",
        sensors=tuple(
            Sensor(sensor, tuple(f"{short}_{axis}" for axis in "xyz"))
            for sensor, short in (("accelerometer", "accel"), ("gyroscope", "gyro"))
        ),
        labels=labels,
        sample_rate_hz=10.0,
        source="watch",
        streams=8,
        recipe=Recipe(hidden=32, layers=1, epochs=120, jitter=0.3),
        train=tuple(_series(load_basic_motions, "train", labels)),
        test=tuple(_series(load_basic_motions, "test", labels)),
    )


def _japanese_vowels() -> Dataset:
    from sktime.datasets import load_japanese_vowels

    speakers = tuple(str(number) for number in range(1, 10))
    return Dataset(
        name="japanese-vowels",
        title="Who is speaking",
        sensors=(Sensor("LPC cepstrum", tuple(f"lpcc_{number}" for number in range(1, 13))),),
        labels=tuple(f"speaker {speaker}" for speaker in speakers),
        sample_rate_hz=None,
        source="microphone",
        streams=32,
        recipe=Recipe(hidden=48, layers=1, epochs=120, jitter=0.5),
        train=tuple(_series(load_japanese_vowels, "train", speakers)),
        test=tuple(_series(load_japanese_vowels, "test", speakers)),
    )


_LOADERS: dict[str, Callable[[], Dataset]] = {"basic-motions": _basic_motions, "japanese-vowels": _japanese_vowels}
NAMES = tuple(_LOADERS)


def _series(loader: Callable[..., Any], split: str, labels: tuple[str, ...]) -> Iterator[Series]:
    table, classes = loader(split=split, return_type="nested_univ")  # a table of recordings by channels
    for row, label in zip(table.to_numpy(), classes, strict=True):
        values = np.stack([channel.to_numpy() for channel in row], axis=1)
        yield Series(np.ascontiguousarray(values, np.float32), labels.index(label))
