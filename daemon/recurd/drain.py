"""Moves all streams of one daemon to another, group by group (``recurd drain``).

Each group is closed to its clients, copied, and handed over in two steps: the daemon it leaves lets go of it first, and
is the one who decides. So whoever dies in the middle, a stream is open at one of them at most, and a second drain goes
on where this one ended.
"""

import contextlib
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from recurd.endings import Redirect
from recurd.errors import Code, RecurdError, Refused, Unanswered
from recurd.fences import FENCE_SECONDS
from recurd.remote import Remote
from recurd.saving import Parcel

#: Streams of a group, about; the streams of one connection are never parted.
GROUP_STREAMS = 256
#: Between two looks at a stream that is in the middle of a chunk.
_POLL_SECONDS = 0.005

#: Names of streams in a sentence, at most.
_MAX_NAMES = 10
#: Addresses that mean another daemon on every machine.
_LOCAL = ("ipc:", "tcp://127.", "tcp://localhost:", "tcp://[::1]:")

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
    #: Daemons that streams are still to come from there, by other drains that are not finished.
    expected: list[str]
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
        self._server_key = server_key
        self._accept_drift = accept_drift
        self._timeout_seconds = timeout_seconds
        self._progress = progress or _ignore
        self._page_bytes = min(source.welcome.max_message_bytes, target.welcome.max_message_bytes) - 65_536
        self._moved = self._groups = self._settled = 0
        #: Whether the target knows that more streams are to come than have been released.
        self._is_expected = False
        # Streams that cannot leave, by handle, as the target has others in their place; and why, for the first of them.
        self._staying: dict[int, str] = {}
        self._conflict = ""
        # Groups at the target that the source knows nothing of.
        self._unknown: list[str] = []
        self._longest = 0.0
        # Streams of the group that is on its way.
        self._leaving = 0

    def run(self) -> Report:
        """Move until nothing is left. Raises :class:`DrainError`, :class:`Refused` or :class:`Unanswered`."""
        if self._source.welcome.epoch == self._target.welcome.epoch:
            raise DrainError(f"{self._source.endpoint} and {self._target.endpoint} are the same daemon")
        for daemon in (self._source, self._target):
            if not daemon.welcome.origin:
                raise DrainError(f"{daemon.endpoint} is of a version that this command does not know how to drain")
        begin = self._advanced_at = time.monotonic()
        try:
            there, _ = self._target.ask("groups")
            self._check_ways(there)
            self._settle_former(there)
            while not self._is_empty():
                if not self._move(secrets.token_hex(8)):
                    raise DrainError(f"{counted(len(self._staying))} cannot move to {self._target.endpoint}")
            # Nothing is to come any more, and what had moved from there to here and has ended since may begin anew.
            self._target.ask("drained", endpoint=self._source.endpoint, origin=self._source.welcome.origin)
            self._is_expected = False
            there, _ = self._target.ask("groups")
        except BaseException as error:
            error.add_note(f"{counted(self._moved + self._settled)} moved to {self._target.endpoint}")
            if self._staying:
                error.add_note(self._why_some_stay())
            if self._is_expected:
                error.add_note(
                    f"no stream begins at {self._target.endpoint} that it does not know, until this drain is finished "
                    f"(or 'recurd drain --cancel --endpoint {self._target.endpoint}' says that it never will be)"
                )
            raise
        return Report(
            streams=self._moved,
            groups=self._groups,
            settled=self._settled,
            undecided=self._undecided(there["held"]),
            expected=list(there["expected"].values()),
            seconds=round(time.monotonic() - begin, 3),
            longest_pause_seconds=round(self._longest, 4),
        )

    def _is_empty(self) -> bool:
        """Whether no stream is left; then whoever asks for one there is sent on from now on."""
        if not self._source.ask("groups")[0]["streams"]:
            self._expect(is_empty=True)  # first, or each of the two might send whoever asks to the other
        left: int = self._source.ask("redirect", **self._there)[0]["left"]
        self._progress(self._moved, self._moved + left)
        return not left

    @property
    def _there(self) -> dict[str, Any]:
        """Where streams go, as it is remembered with them."""
        target = self._target
        return {"endpoint": target.endpoint, "server_key": self._server_key, "origin": target.welcome.origin}

    def _expect(self, *, is_empty: bool = False) -> None:
        """From now on some are here and some are there: who asks there for one that is here must not begin it anew."""
        before, self._is_expected = self._is_expected, True  # also when the answer is lost
        endpoint, origin = self._source.endpoint, self._source.welcome.origin
        machine = socket.gethostname() if endpoint.startswith(_LOCAL) else None
        try:
            self._target.ask("expect", endpoint=endpoint, machine=machine, origin=origin, is_empty=is_empty)
        except Refused as refusal:
            self._is_expected = before
            raise DrainError(f"{self._target.endpoint} takes none: {refusal.text}") from refusal

    def _check_ways(self, there: dict[str, Any]) -> None:
        """A daemon that streams come back to has to know where they all are. ``there``: its report of groups."""
        ways = there["gone_to"] if there["sent_on"] is None else [there["sent_on"], *there["gone_to"]]
        if not any(_leads_to(self._source, way) for way in ways):
            return
        here, _ = self._source.ask("groups")
        others = sorted({way[0] for way in here["gone_to"] if not _leads_to(self._target, way)})
        if others:
            raise DrainError(
                f"streams of {self._source.endpoint} have gone on to {' and '.join(others)}, of which "
                f"{self._target.endpoint} would know nothing: drain these back to {self._source.endpoint} first"
            )

    def _settle_former(self, there: dict[str, Any]) -> None:
        """Decide about what a drain before has left there undecided, as the source says."""
        self._is_expected = self._source.welcome.origin in there["expected"]
        for id in there["held"]:
            fate = self._source.ask("fate", group=id)[0]["fate"]
            if fate == "released":
                self._settled += self._target.ask("admit", group=id)[0]["streams"]
            elif fate == "lifted":
                self._target.ask("drop", group=id)
            else:
                self._unknown.append(id)

    def _undecided(self, held: dict[str, Any]) -> int:
        """Streams that still wait there: those that have come again with this drain do not."""
        return sum(held[id]["streams"] for id in self._unknown if id in held)

    def _move(self, id: str) -> bool:
        """Move the next group, or wait for others to; whether there may be another one."""
        begin = time.monotonic()
        self._leaving = 0
        try:
            more = self._move_group(id)
        except BaseException as error:
            self._give_up(id, error)
            raise
        if self._leaving:
            self._longest = max(self._longest, time.monotonic() - begin)
            self._advanced_at = time.monotonic()
        return more

    def _move_group(self, id: str) -> bool:
        report, _ = self._source.ask("gather", group=id, fence=True, limit=GROUP_STREAMS, staying=list(self._staying))
        self._leaving = report["streams"]
        if not self._leaving:
            if self._staying and report["left"] == report["in_no_group"]:
                return False
            self._wait_for_others(report["left"])
            return True
        # Before the first state is copied: other weights are told at once.
        self._import(id, b"", report)
        for data in pages(self._source, id, self._page_bytes, self._timeout_seconds):
            if not self._import(id, data, report):
                self._source.ask("lift", group=id)
                self._target.ask("drop", group=id)
                return True
        self._expect()
        released, _ = self._source.ask("release", group=id, **self._there)
        if released["fate"] == "unknown":
            raise DrainError(f"{self._source.endpoint} was started afresh meanwhile")
        if released["fate"] != "released":
            raise DrainError(
                f"{self._source.endpoint} has taken its streams back: nothing was heard of us for too long"
            )
        self._leaving = released.get("streams", self._leaving)
        self._admit(id)
        return True

    def _admit(self, id: str) -> None:
        """A group is the target's from now on."""
        self._target.ask("admit", group=id)
        # Not those that it has admitted now: clients that were sent on have opened some of them already.
        self._moved += self._leaving
        self._groups += 1

    def _import(self, id: str, data: bytes | memoryview, report: dict[str, Any]) -> bool:
        """Whether the target has taken streams in; where it has others in their place, these stay."""
        try:
            self._target.ask("import", data, group=id, stamps=report["stamps"], accept_drift=self._accept_drift)
        except Refused as refusal:
            if refusal.handles and self._stay(refusal, data):
                return False
            error = DrainError(f"{self._target.endpoint} does not take them: {refusal.text}")
            if refusal.code is Code.WRONG_MODEL and report["former"]:
                error.add_note(
                    f"{report['former']:,} of them finish on a former version of their model, since a reload: let them "
                    f"finish and drain again, or end them ('recurd reload --incompatible restart')"
                )
            raise error from refusal
        return True

    def _stay(self, refusal: Refused, data: bytes | memoryview) -> bool:
        """Leave streams where they are, with all streams of their connections; whether that has not been tried yet."""
        self._conflict = self._conflict or refusal.text
        known = len(self._staying)
        parcels = msgspec.msgpack.decode(data, type=list[Parcel])
        handles = frozenset(refusal.handles or ())
        self._staying |= {parcel.handle: parcel.stream.name for parcel in parcels if parcel.handle in handles}
        return len(self._staying) > known

    def _why_some_stay(self) -> str:
        names = ", ".join(f"'{name}'" for name in list(self._staying.values())[:_MAX_NAMES])
        more = f" and {len(self._staying) - _MAX_NAMES:,} more" if len(self._staying) > _MAX_NAMES else ""
        return (
            f"there are other streams in the place of {names}{more} ({self._conflict}): they stay at "
            f"{self._source.endpoint}, with all streams of connections that have one; close each at one of the two "
            f"daemons, and drain again"
        )

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


def _leads_to(daemon: Remote, way: list[Any]) -> bool:
    """Whether streams that went this way, as it is reported, are at a daemon."""
    endpoint, origin, *_ = way
    return Redirect(endpoint, origin=origin).goes_to(daemon.endpoint, daemon.welcome.origin)


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
