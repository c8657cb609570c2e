"""What the daemon counts: plain numbers, no metrics library.

The engine owns the one :class:`Stats` and adds to it while it works, from a single thread. :mod:`recurd.metrics` reads
it when somebody scrapes, so a chunk pays for an addition and nothing else. A reader on another thread may see a tick
half counted, never a number that goes back.

Counters only grow, gauges are set by their owner. Everything that carries a label is there from the start, at 0.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from recurd.errors import Code
from recurd.wire import Operation

#: Seconds. An LSTM's tick takes well below a millisecond, so the usual 5 ms for a start would show nothing.
LATENCY_BOUNDS = (50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 0.1, 0.2, 0.5, 1.0)
#: Rows of a tick.
ROW_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Histogram:
    """Counts of values by upper bound (a value equal to a bound belongs to it), and their sum.

    ``bounds`` rise strictly; a last bucket without a bound is added.
    """

    __slots__ = ("_edges", "bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(float(bound) for bound in bounds)
        self._edges = np.array(self.bounds)
        #: One count a bucket, not cumulated; the last one is for values over every bound.
        self.counts = np.zeros(len(self.bounds) + 1, np.int64)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def observe_many(self, values: npt.NDArray[Any]) -> None:
        """Count all values of an array (any shape, any real dtype) at once."""
        values = values.ravel()
        self.counts += np.bincount(np.searchsorted(self._edges, values), minlength=len(self.counts))
        self.sum += float(values.sum())

    @property
    def count(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    def cumulative(self) -> list[int]:
        """Number of values up to each bound; the last element is the number of all."""
        totals: list[int] = self.counts.cumsum().tolist()
        return totals


class ModelStats:
    """One model's numbers."""

    def __init__(self, slots: int = 0) -> None:
        # counters
        self.chunks_received = 0
        self.chunks_processed = 0
        self.steps_processed = 0
        self.resets = 0
        #: By operation of STATE, carried out.
        self.state_operations = {operation.word: 0 for operation in Operation}
        self.ticks = 0
        self.ticks_failed = 0
        #: Rows of ticks that held NaN or infinity.
        self.results_not_finite = 0
        #: Steps the model ran only to square up ragged rows.
        self.padded_steps = 0
        #: Streams whose slot was given to others, and whose state came back onto the device.
        self.paged_out = 0
        self.paged_in = 0
        # gauges
        self.queued_chunks = 0
        self.slots = slots
        self.slots_used = 0
        #: Of states in the host's memory: streams that have no slot at present.
        self.host_bytes = 0
        # histograms
        self.rows = Histogram(ROW_BOUNDS)
        #: From a chunk's arrival to the start of its first tick.
        self.queue_seconds = Histogram(LATENCY_BOUNDS)
        #: One tick's run of the model.
        self.run_seconds = Histogram(LATENCY_BOUNDS)
        #: Bringing back the states of all streams of one tick that had no slot.
        self.page_in_seconds = Histogram(LATENCY_BOUNDS)
        #: From a chunk's arrival to its result being ready to send.
        self.request_seconds = Histogram(LATENCY_BOUNDS)


class Stats:
    """The whole daemon's numbers; ``models`` by model name."""

    def __init__(self) -> None:
        self.models: dict[str, ModelStats] = {}
        # counters, by error code: stats.refused[Code.GAP] += 1
        self.refused = [0] * (max(Code) + 1)
        self.broken = [0] * (max(Code) + 1)
        self.internal_errors = 0
        #: Commits to the journal that could not be written.
        self.journal_failures = 0
        #: Model files that were looked at again, by what became of them.
        self.reloads = dict.fromkeys(("added", "failed", "finish", "kept", "removed", "restart", "unchanged"), 0)
        self.commit_seconds = Histogram(LATENCY_BOUNDS)
        self.duplicates = 0
        # counters: streams and peers
        self.streams_opened = 0
        self.streams_ended = {"closed": 0, "expired": 0, "failed": 0, "moved": 0, "poisoned": 0}
        self.streams_ended |= {"reloaded": 0, "replaced": 0}
        self.peers_expired = 0
        #: Handshakes refused for their key.
        self.auth_failures = 0
        self.subscriptions_refused = 0
        self.results_published = 0
        # counters: the wire
        self.frames_received = 0
        self.bytes_received = 0
        self.frames_sent = 0
        self.bytes_sent = 0
        self.send_failures = {"again": 0, "unreachable": 0}
        # gauges
        self.streams = {"attached": 0, "detached": 0}
        self.peers = 0
        #: Daemons that streams are to come from, and no stream begins here that is not known meanwhile.
        self.drains_unfinished = 0
        #: Of the arenas, on the device.
        self.state_bytes = 0

    def add_model(self, name: str, slots: int) -> ModelStats:
        """Start counting for a model; returns what its owner adds to."""
        stats = self.models[name] = ModelStats(slots)
        return stats
