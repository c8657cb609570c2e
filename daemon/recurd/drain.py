"""Moves all streams of one daemon to another, group by group (``recurd drain``).

Each group is closed to its clients, copied, and handed over in two steps: the daemon it leaves lets go of it first, and
is the one who decides. So whoever dies in the middle, a stream is open at one of them at most, and a second drain goes
on where this one ended.
"""

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from recurd.errors import Code, RecurdError, Refused, Unanswered
from recurd.fences import FENCE_SECONDS
from recurd.remote import Remote

#: Streams of a group, about; the streams of one connection are never parted.
GROUP_STREAMS = 256
#: Between two looks at a stream that is in the middle of a chunk.
_POLL_SECONDS = 0.005

#: Streams moved, and how many there are in all.
Progress = Callable[[int, int], None]


class DrainError(RecurdError):
    """Not all streams were moved. The text says why, and where they are."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What was done."""

    streams: int
    groups: int
    #: Streams besides that a drain before had left undecided, and that are served by the target now.
    settled: int
    #: Streams that wait there for a word of another daemon's drain, or of one that this daemon does not remember.
    undecided: int
    seconds: float
    #: The longest time for which the streams of a group were closed to their clients by this drain.
    longest_pause_seconds: float


class Drain:
    """One run. Owns neither of the connections."""

    def __init__(
        self,
        source: Remote,
        target: Remote,
        *,
        server_key: str | None = None,
        accept_drift: bool = False,
        timeout_seconds: float = 60.0,
        progress: Progress | None = None,
    ) -> None:
        """``server_key``: the target's public key, for clients that it authenticates itself to."""
        self._source = source
        self._target = target
        self._redirect: dict[str, Any] = {"endpoint": target.endpoint, "server_key": server_key}
        self._accept_drift = accept_drift
        self._timeout_seconds = timeout_seconds
        self._progress = progress or _ignore
        self._page_bytes = min(source.welcome.max_message_bytes, target.welcome.max_message_bytes) - 65_536
        self._moved = self._groups = self._settled = 0
        # Groups at the target that the source knows nothing of.
        self._unknown: list[str] = []
        self._longest = 0.0
        # Streams of the group that is on its way.
        self._leaving = 0

    def run(self) -> Report:
        """Move until nothing is left. Raises :class:`DrainError`, :class:`Refused` or :class:`Unanswered`."""
        if self._source.welcome.epoch == self._target.welcome.epoch:
            raise DrainError(f"{self._source.endpoint} and {self._target.endpoint} are the same daemon")
        begin = self._advanced_at = time.monotonic()
        try:
            self._settle_former()
            self._target.ask("redirect")  # where it was drained itself before: it takes streams again
            while not self._is_empty():
                self._move(secrets.token_hex(8))
            # What had moved from there to here and has ended since is nobody's: it may begin anew.
            self._target.ask("redirect", drained=self._source.endpoint)
        except BaseException as error:
            error.add_note(f"{counted(self._moved + self._settled)} moved to {self._target.endpoint}")
            raise
        return Report(
            streams=self._moved,
            groups=self._groups,
            settled=self._settled,
            undecided=self._count_undecided(),
            seconds=round(time.monotonic() - begin, 3),
            longest_pause_seconds=round(self._longest, 4),
        )

    def _is_empty(self) -> bool:
        """Whether no stream is left; then whoever asks for one there is sent on from now on."""
        left: int = self._source.ask("redirect", **self._redirect)[0]["left"]
        self._progress(self._moved, self._moved + left)
        return not left

    def _settle_former(self) -> None:
        """Decide about what a drain before has left there undecided, as the source says."""
        for id in self._target.ask("groups")[0]["held"]:
            fate = self._source.ask("fate", group=id)[0]["fate"]
            if fate == "released":
                self._settled += self._target.ask("admit", group=id)[0]["streams"]
            elif fate == "lifted":
                self._target.ask("drop", group=id)
            else:
                self._unknown.append(id)

    def _count_undecided(self) -> int:
        """Streams that still wait there: those that have come again with this drain do not."""
        held = self._target.ask("groups")[0]["held"] if self._unknown else {}
        return sum(held[id]["streams"] for id in self._unknown if id in held)

    def _move(self, id: str) -> None:
        """Move the next group, or wait for others to."""
        begin = time.monotonic()
        self._leaving = 0
        try:
            self._move_group(id)
        except BaseException as error:
            self._give_up(id, error)
            raise
        if self._leaving:
            self._longest = max(self._longest, time.monotonic() - begin)
            self._advanced_at = time.monotonic()

    def _move_group(self, id: str) -> None:
        report, _ = self._source.ask("gather", group=id, fence=True, limit=GROUP_STREAMS)
        self._leaving = report["streams"]
        if not self._leaving:
            self._wait_for_others(report["left"])
            return
        # Before the first state is copied: other weights are told at once.
        self._import(id, b"", report)
        for data in pages(self._source, id, self._page_bytes, self._timeout_seconds):
            self._import(id, data, report)
        released, _ = self._source.ask("release", group=id, **self._redirect)
        if released["fate"] != "released":
            raise DrainError(
                f"{self._source.endpoint} has taken its streams back: nothing was heard of us for too long"
            )
        self._leaving = released.get("streams", self._leaving)
        self._admit(id)

    def _admit(self, id: str) -> None:
        """A group is the target's from now on."""
        self._target.ask("admit", group=id)
        # Not those that it has admitted now: clients that were sent on have opened some of them already.
        self._moved += self._leaving
        self._groups += 1

    def _import(self, id: str, data: bytes | memoryview, report: dict[str, Any]) -> None:
        try:
            self._target.ask("import", data, group=id, stamps=report["stamps"], accept_drift=self._accept_drift)
        except Refused as refusal:
            error = DrainError(f"{self._target.endpoint} does not take them: {refusal.text}")
            if refusal.code is Code.WRONG_MODEL and report["former"]:
                error.add_note(
                    f"{report['former']:,} of them finish on a former version of their model, since a reload: let them "
                    f"finish and drain again, or end them ('recurd reload --incompatible restart')"
                )
            raise error from refusal

    def _wait_for_others(self, left: int) -> None:
        """All streams that are left are on their way already."""
        if left and time.monotonic() > self._advanced_at + max(self._timeout_seconds, FENCE_SECONDS):
            raise DrainError(
                f"{left} streams of {self._source.endpoint} are on their way with another command, or have arrived "
                f"there and were never handed over: finish that drain first ('recurd state held' shows them)"
            )
        time.sleep(10 * _POLL_SECONDS)

    def _give_up(self, id: str, error: BaseException) -> None:
        """Whoever is to have the group has it: as the source says, and if it does not answer, nobody decides."""
        try:
            fate = self._source.ask("lift", group=id)[0]["fate"]
            if fate == "released":
                self._admit(id)
            elif fate == "lifted":
                self._target.ask("drop", group=id)
            elif self._leaving:  # it was started afresh meanwhile: what has arrived may be all that there is
                error.add_note(f"{self._source.endpoint} knows nothing of the last group any more; it stays undecided")
        except (RecurdError, OSError) as trouble:
            error.add_note(f"the last group is not decided about ({trouble}): the next drain does that, and counts it")


def counted(streams: int) -> str:
    """So many streams, in words."""
    return "1 stream" if streams == 1 else f"{streams:,} streams"


def pages(source: Remote, id: str, page_bytes: int, timeout_seconds: float) -> Iterator[memoryview]:
    """The streams of a group, as they are imported elsewhere.

    Raises :class:`Unanswered` when a stream stays in the middle of its chunks for too long.
    """
    start = 0
    end = time.monotonic() + timeout_seconds
    while True:
        report, data = source.ask("export", group=id, start=start, max_bytes=page_bytes)
        if report["streams"]:
            yield data
            end = time.monotonic() + timeout_seconds
        start = report["next"]
        if start >= report["of"]:
            return
        if report["waits"]:
            if time.monotonic() > end:
                raise Unanswered(f"a stream was in the middle of a chunk for {timeout_seconds:g} s")
            time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def bar(text: str) -> Iterator[Progress]:
    """A progress bar on standard error when that is a terminal."""
    import sys

    if sys.stderr is None or not sys.stderr.isatty():
        yield _ignore
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def _ignore(done: int, total: int) -> None:
    pass
