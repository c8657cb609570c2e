"""Latencies of a load, kept as a histogram."""

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt


class Latency(msgspec.Struct, frozen=True):
    """Milliseconds from when a chunk was due to when its result was read; exact to 1 %."""

    p50: float
    p99: float
    p999: float
    max: float


class Latencies:
    """A histogram in steps of 1 %, so that its size does not depend on the length of a run. Owned by a Load."""

    _FIRST_SECONDS = 1e-6
    _RATIO = 1.01
    _BINS = 2100

    def __init__(self) -> None:
        self._counts = np.zeros(self._BINS, np.int64)
        self._max = 0.0

    def add(self, seconds: npt.NDArray[Any]) -> None:
        """Count some latencies."""
        if len(seconds):
            bins = np.log(np.maximum(seconds, self._FIRST_SECONDS) / self._FIRST_SECONDS) / np.log(self._RATIO)
            np.add.at(self._counts, np.minimum(bins.astype(np.int64), self._BINS - 1), 1)
            self._max = max(self._max, float(seconds.max()))

    def milliseconds(self) -> Latency | None:
        """Percentiles; ``None`` when there is nothing."""
        total = int(self._counts.sum())
        if not total:
            return None
        places = np.searchsorted(np.cumsum(self._counts), np.ceil(np.array([0.5, 0.99, 0.999]) * total))
        values = self._FIRST_SECONDS * self._RATIO ** (places + 0.5) * 1e3
        longest = self._max * 1e3
        p50, p99, p999 = (round(min(value, longest), 4) for value in values.tolist())
        return Latency(p50, p99, p999, round(longest, 4))
