"""A load generator: many streams against one daemon, every answer counted and checked (``recurd bench``).

Two ways to load. *Closed loop*: every stream has one chunk in flight, and sends the next when it is answered; says what
a daemon can do at most. *Open loop*: chunks have a schedule, and latency counts from the scheduled time whether or not
the chunk could be sent then, so that a stall of the daemon shows in full.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import zmq

from recurd import wire
from recurd.dealer import Connection
from recurd.errors import Code, Refused, Unanswered
from recurd.fleet import Answers, Fleet
from recurd.keys import Credentials
from recurd.latency import Latencies, Latency

Array = npt.NDArray[Any]
Progress = Callable[[float], None]

_POLL_SECONDS = 0.05
_TELL_SECONDS = 0.1
#: Shorter waits are slept: zmq's poll counts in milliseconds.
_SLEEP_SECONDS = 100e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run."""

    endpoint: str
    #: Where the daemon authenticates its clients.
    credentials: Credentials | None = None
    #: ``None``: the daemon's only model.
    model: str | None = None
    streams: int = 256
    chunk_steps: int = 16
    #: Records a frame, at most.
    records: int = 1
    connections: int = 1
    #: Chunks per second of all streams together; ``None``: closed loop.
    rate: float | None = None
    seconds: float = 10.0
    warm_up_seconds: float = 2.0
    #: Longest wait for any answer.
    timeout_seconds: float = 10.0
    seed: int = 0
    #: Part of the streams' names; another one for every run.
    run: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a run measured, warm-up left out (``errors`` and ``retries`` are of the whole run)."""

    model: str
    device: str
    streams: int
    chunk_steps: int
    records_per_frame: int
    connections: int
    rate: float | None
    seconds: float
    chunks: int
    chunks_per_second: float
    steps_per_second: float
    latency_ms: Latency | None
    errors: dict[str, int]
    retries: int
    #: Streams given up after an error that a retry does not help.
    lost_streams: int
    #: Chunks that were due and not answered when the run was over.
    unanswered: int
    client_cpu_seconds: float
    daemon_cpu_seconds: float | None

    @property
    def clean(self) -> bool:
        """Whether every chunk was answered with a result."""
        return not self.lost_streams and not self.unanswered


def run(
    plan: Plan, *, progress: Progress | None = None, daemon_cpu: Callable[[], float | None] | None = None
) -> Report:
    """Open the streams, load the daemon, close the streams.

    ``progress`` is told the fraction done, now and then; ``daemon_cpu`` gives the daemon's CPU seconds so far. Raises
    :class:`Refused` when the plan does not fit the daemon, :class:`Unanswered` when it does not answer, and another
    :class:`recurd.errors.RecurdError` when an answer is wrong.
    """
    with zmq.Context() as context, contextlib.ExitStack() as stack:
        connections = [
            stack.enter_context(Connection(context, plan.endpoint, plan.timeout_seconds, plan.credentials))
            for _ in range(min(plan.connections, plan.streams))
        ]
        welcome = [connection.hello() for connection in connections][-1]
        name = _check(plan, welcome)
        shares = np.array_split(np.arange(plan.streams), len(connections))
        opened: list[wire.Header] = []
        stack.callback(_close, connections, shares, opened)
        for connection, share in zip(connections, shares, strict=True):
            connection.open([f"bench-{plan.run}-{index}" for index in share], name, opened)
        fleet = Fleet(
            welcome.models[name],
            np.array([header.handle for header in opened], np.uint64),
            np.array([header.generation for header in opened], np.uint32),
            chunk_steps=plan.chunk_steps,
            window=welcome.credit if plan.rate else 1,
            seed=plan.seed,
        )
        load = Load(plan, connections, np.array([share[0] for share in shares[1:]], np.int64), fleet)
        load.drive(progress or (lambda fraction: None), daemon_cpu or (lambda: None))
        return load.report(name, str(welcome.device.get("used", "")))


def _check(plan: Plan, welcome: wire.Welcome) -> str:
    """The model's name, when the plan fits the daemon. Raises :class:`Refused`."""
    names = ", ".join(welcome.models)
    if plan.model is None and len(welcome.models) > 1:
        raise Refused(Code.UNKNOWN_MODEL, f"the daemon serves several models ({names}); name one")
    name = plan.model or next(iter(welcome.models))
    if name not in welcome.models:
        raise Refused(Code.UNKNOWN_MODEL, f"the daemon has no model '{name}', it serves {names}")
    if plan.chunk_steps > welcome.max_chunk_steps:
        raise Refused(Code.TOO_LONG, f"the daemon takes at most {welcome.max_chunk_steps} steps a chunk")
    return name


def _close(connections: list[Connection], shares: list[Array], opened: list[wire.Header]) -> None:
    """Close what was opened; a daemon that is gone by now is no error."""
    for connection, share in zip(connections, shares, strict=True):
        with contextlib.suppress(Unanswered, zmq.ZMQError):
            connection.close_streams(opened[int(share[0]) : int(share[-1]) + 1])


class Load:
    """The measured part of a run. Owns the clock's marks and the counts."""

    def __init__(self, plan: Plan, connections: list[Connection], borders: Array, fleet: Fleet) -> None:
        """``borders``: index of the first stream of every connection but the first."""
        self._plan = plan
        self._connections = connections
        self._borders = borders
        self._fleet = fleet
        self._poller = zmq.Poller()
        for connection in connections:
            self._poller.register(connection.socket, zmq.POLLIN)
        self._latencies = Latencies()
        self._chunks = 0
        self._client_cpu = 0.0
        self._daemon_cpu: float | None = None
        self._unanswered = 0
        # the clock's marks, set by drive()
        self._start = self._begin = self._end = self._heard = 0.0
        #: Closed loop: since when each stream's chunk in flight has been due.
        self._since = np.zeros(plan.streams)

    def drive(self, progress: Progress, daemon_cpu: Callable[[], float | None]) -> None:
        """Send and receive until the time is over and everything is answered, or cannot be expected to be any more."""
        plan = self._plan
        now = self._start = self._heard = time.perf_counter()
        self._begin = now + plan.warm_up_seconds
        self._end = self._begin + plan.seconds
        self._since[:] = now
        readings: list[tuple[float, float | None]] = []
        told = now
        while not self._over(now):
            self._send(now)
            now = self._receive(now)
            if len(readings) < 2 and now >= (self._end if readings else self._begin):
                readings.append((time.process_time(), daemon_cpu()))
            if now - told > _TELL_SECONDS:
                told = now
                progress(min(1.0, (now - self._start) / (self._end - self._start)))
        if len(readings) == 2:
            (client, daemon), (client_end, daemon_end) = readings
            self._client_cpu = client_end - client
            self._daemon_cpu = None if daemon is None or daemon_end is None else daemon_end - daemon
        self._give_up(now)

    def _over(self, now: float) -> bool:
        """Whether the run has ended. Raises :class:`Unanswered` when the daemon has fallen silent."""
        fleet, patience = self._fleet, self._plan.timeout_seconds
        if fleet.errors and fleet.lost.all():
            return True
        silent = now - self._heard > patience
        if now < self._end and not silent:
            return False
        waiting = bool(((fleet.sent > fleet.answered) & ~fleet.lost).any())
        if now < self._end:
            if waiting:
                raise self._connections[0].unanswered()
            return False
        behind = bool(((self._due(now) > fleet.answered) & ~fleet.lost).any())
        return now >= self._end + patience or not (waiting or behind)

    def _due(self, now: float) -> Array:
        """How many chunks every stream should have sent by now."""
        rate, streams = self._plan.rate, self._plan.streams
        if rate is None:
            return self._fleet.answered + (now < self._end)
        total = int((min(now, self._end) - self._start) * rate) + 1
        return (total - np.arange(streams) + streams - 1) // streams

    def _due_since(self, answers: Answers) -> Array:
        """When the chunks of these answers became due."""
        rate = self._plan.rate
        if rate is None:
            return self._since[answers.ids]
        due: Array = self._start + ((answers.seqs - 1) * self._plan.streams + answers.ids) / rate
        return due

    def _send(self, now: float) -> None:
        due = self._due(now)
        while len(ids := self._fleet.ready(due, now)):
            cuts = np.searchsorted(ids, self._borders)
            for connection, part in zip(self._connections, np.split(ids, cuts), strict=True):
                if len(part):
                    for frame in self._fleet.send(part, self._plan.records):
                        connection.send(frame)

    def _receive(self, now: float) -> float:
        """Wait for answers or for something to send, take what came; the time after."""
        self._wait(now)
        frames = [frame for connection in self._connections for frame in connection.receive()]
        now = time.perf_counter()
        if frames:
            self._heard = now
            self._count(self._fleet.take(frames, now), now)
        return now

    def _wait(self, now: float) -> None:
        seconds = _POLL_SECONDS
        if self._plan.rate is not None and now < self._end:
            # the schedule's next chunk
            elapsed = now - self._start
            seconds = min(seconds, (int(elapsed * self._plan.rate) + 1) / self._plan.rate - elapsed)
        if self._fleet.retry_at is not None:
            seconds = min(seconds, max(0.001, self._fleet.retry_at - now))
        if seconds >= 0.001:
            self._poller.poll(int(seconds * 1000))
        elif not self._poller.poll(0):
            time.sleep(min(seconds, _SLEEP_SECONDS))

    def _count(self, answers: Answers, now: float) -> None:
        since = self._due_since(answers)
        if self._plan.rate is None:
            self._since[answers.ids] = now
        if self._begin <= now < self._end:
            self._chunks += len(since)
        self._latencies.add(now - since[(since >= self._begin) & (since < self._end)])

    def _give_up(self, now: float) -> None:
        """Count what was due and has no answer, with the time it has waited so far."""
        fleet = self._fleet
        for index in np.flatnonzero((self._due(now) > fleet.answered) | (fleet.sent > fleet.answered)):
            last = max(int(self._due(now)[index]), int(fleet.sent[index]))
            seqs = np.arange(int(fleet.answered[index]) + 1, last + 1)
            self._unanswered += len(seqs)
            self._latencies.add(now - self._due_since(Answers(np.full(len(seqs), index), seqs)))

    def report(self, model: str, device: str) -> Report:
        """What was measured."""
        plan, fleet = self._plan, self._fleet
        chunks_per_second = self._chunks / plan.seconds
        return Report(
            model=model,
            device=device,
            streams=plan.streams,
            chunk_steps=plan.chunk_steps,
            records_per_frame=plan.records,
            connections=len(self._connections),
            rate=plan.rate,
            seconds=plan.seconds,
            chunks=self._chunks,
            chunks_per_second=round(chunks_per_second, 1),
            steps_per_second=round(chunks_per_second * plan.chunk_steps, 1),
            latency_ms=self._latencies.milliseconds(),
            errors=dict(fleet.errors),
            retries=fleet.retries,
            lost_streams=int(fleet.lost.sum()),
            unanswered=self._unanswered,
            client_cpu_seconds=round(self._client_cpu, 3),
            daemon_cpu_seconds=None if self._daemon_cpu is None else round(self._daemon_cpu, 3),
        )
