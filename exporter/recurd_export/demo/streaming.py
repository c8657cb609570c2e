"""Many streams to a daemon at once: several connections, ragged chunks, every stream interleaved with the others.

A stream is one sensor that records one series after another, with a reset between two of them.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import pairwise

import msgspec
import numpy as np

import recurd
from recurd.signature import Result
from recurd_export.demo.data import Array, Dataset, Series

#: Every recording is streamed so many times, in another stream and cut in another way.
ROUNDS = 3
_ANSWER_SECONDS = 30.0


class Script(msgspec.Struct, frozen=True):
    """What one stream is going to send: the numbers of its recordings, and where each is cut into chunks."""

    model: str
    stream: str
    order: tuple[int, ...]
    #: Per recording, rising from 0 to its number of steps.
    cuts: tuple[tuple[int, ...], ...]


class Outcome(msgspec.Struct, frozen=True):
    """What one stream got: an answer a recording, ``[steps, classes]``; each chunk's latency; resets carried out."""

    script: Script
    answers: tuple[Array, ...]
    latency_seconds: tuple[float, ...]
    resets: int

    @property
    def chunks(self) -> int:
        """Chunks that were answered."""
        return len(self.latency_seconds)

    @property
    def steps(self) -> int:
        """Steps that were answered."""
        return sum(map(len, self.answers))


def write_scripts(data: Dataset, random: np.random.Generator) -> list[Script]:
    """Deal the test recordings, each :data:`ROUNDS` times, to the data set's streams."""
    order = np.concatenate([random.permutation(len(data.test)) for _ in range(ROUNDS)]).tolist()
    return [
        Script(
            model=data.name,
            stream=f"{data.source}-{number + 1}",
            order=tuple(dealt),
            cuts=tuple(_cut(len(data.test[index].values), random) for index in dealt),
        )
        for number in range(data.streams)
        if (dealt := order[number :: data.streams])
    ]


def _cut(steps: int, random: np.random.Generator) -> tuple[int, ...]:
    """Cut into chunks of 1 to 8 steps, now and then of up to 25."""
    cuts = [0]
    while cuts[-1] < steps:
        longest = 25 if random.random() < 0.1 else 8
        cuts.append(min(steps, cuts[-1] + int(random.integers(1, longest + 1))))
    return tuple(cuts)


def play(
    endpoint: str,
    scripts: Sequence[Script],
    recordings: dict[str, tuple[Series, ...]],
    *,
    connections: int,
    seed: int,
    advance: Callable[[int], None],
) -> list[Outcome]:
    """Send all scripts at once, dealt to so many connections with a thread each; ``advance`` is told of steps sent.

    ``recordings`` by model. Raises what the client raises; then, and on Ctrl-C, the other threads stop too.
    """
    stop = threading.Event()
    connected = [_Connection(endpoint, scripts[n::connections], recordings, seed + n) for n in range(connections)]
    # Daemon threads, because an interrupt can come while one is being started, which then is known to nobody.
    threads = [threading.Thread(target=one.run, args=(advance, stop), daemon=True) for one in connected]
    try:
        for thread in threads:
            thread.start()
        return [outcome for one in connected for outcome in one.outcomes.result()]
    finally:
        stop.set()
        for thread in threads:
            if thread.is_alive():
                thread.join()


class _Connection:
    """One connection and whose turn it is on it, which is left to chance. ``outcomes`` is resolved at the end."""

    def __init__(
        self, endpoint: str, scripts: Sequence[Script], recordings: dict[str, tuple[Series, ...]], seed: int
    ) -> None:
        self.outcomes: Future[list[Outcome]] = Future()
        self._endpoint = endpoint
        self._scripts = scripts
        self._recordings = recordings
        self._random = np.random.default_rng(seed)

    def run(self, advance: Callable[[int], None], stop: threading.Event) -> None:
        """Play all scripts, or until told to stop; on a thread of its own."""
        try:
            self.outcomes.set_result(self._play(advance, stop))
        except Exception as error:
            self.outcomes.set_exception(error)

    def _play(self, advance: Callable[[int], None], stop: threading.Event) -> list[Outcome]:
        with recurd.connect(self._endpoint) as client:
            players = [
                Player(
                    client.open(script.stream, model=script.model, mode="new"), script, self._recordings[script.model]
                )
                for script in self._scripts
            ]
            playing = list(players)
            while playing and not stop.is_set():
                number = int(self._random.integers(len(playing)))
                steps = playing[number].send_next()
                advance(steps)
                if not steps:
                    playing.pop(number)
        # The connection is closed: what its thread had to note down about the last answers stands there.
        return [player.outcome() for player in players]


class Player:
    """Sends one script over an open stream, at most one chunk on its way. Owns what came back."""

    def __init__(self, stream: recurd.Stream, script: Script, recordings: Sequence[Series]) -> None:
        self._stream = stream
        self._script = script
        self._recordings = recordings
        self._resets = 0
        self._latency_seconds: list[float] = []
        self._answers: list[list[Array]] = []
        self._pieces = [(place, start, end) for place, cuts in enumerate(script.cuts) for start, end in pairwise(cuts)]
        self._next = 0
        self._pending: Future[Result] | None = None

    def send_next(self) -> int:
        """Take the answer to the last chunk, send the next one; its number of steps, 0 at the end."""
        self._collect()
        if self._next == len(self._pieces):
            return 0
        place, start, end = self._pieces[self._next]
        self._next += 1
        if start == 0:
            self._begin(first=place == 0)
        chunk = self._recordings[self._script.order[place]].values[start:end]
        sent_at = time.perf_counter()
        self._pending = self._stream.submit(chunk)
        self._pending.add_done_callback(lambda _: self._latency_seconds.append(time.perf_counter() - sent_at))
        return end - start

    def outcome(self) -> Outcome:
        """All that came back."""
        answers = tuple(np.concatenate(parts) for parts in self._answers)
        return Outcome(self._script, answers, tuple(self._latency_seconds), self._resets)

    def _begin(self, *, first: bool) -> None:
        if not first:
            self._stream.reset()
            self._resets += 1
        self._answers.append([])

    def _collect(self) -> None:
        if self._pending is not None:
            answer = self._pending.result(timeout=_ANSWER_SECONDS)
            assert isinstance(answer, np.ndarray)  # the model has one head
            self._answers[-1].append(answer)
            self._pending = None
