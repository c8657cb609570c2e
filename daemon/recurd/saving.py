"""Which streams stand otherwise in memory than in the journal, and how one stands there.

The engine notes every stream whose answers or whose life changed; before anything of it is sent, the server takes them
as a :class:`Saving` and hands it to :mod:`recurd.journal`. What is saved is always a stream between two of its records:
a chunk that is only partly run has not happened.
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass

import msgspec

from recurd import wire
from recurd.endings import Ended, Redirect
from recurd.streams import Answer, Stream

#: Digits of the hash that names a version of a model.
VERSION_DIGITS = 16
#: A retained answer: seq, generation, and the record's header and payload.
SavedAnswer = tuple[int, int, bytes, bytes]
#: Bytes of the answers that stand beside a stream, at most.
BESIDE_BYTES = 4096


class Stamp(msgspec.Struct, frozen=True):
    """What a stored state's bits depend on."""

    #: Weights, and names, types and shapes of the states (contract.state_hash).
    state_hash: str
    #: Types and shapes alone: where they differ, the rows cannot even be read.
    layout: str
    runtime: str
    device: str
    #: What goes in and comes out (contract.form_hash), as retained answers and queued chunks have it; empty: not noted.
    form: str = ""

    @property
    def version(self) -> str:
        """Name of the version: streams of another one cannot go on with its states, or not in the same form."""
        return version_of(self.state_hash, self.form)

    def difference(self, other: "Stamp") -> str | None:
        """The first thing in which a stored stamp differs from this one, in words."""
        for name, what in (
            ("state_hash", "weights, state hash"),
            ("form", "inputs and outputs, hash"),
            ("runtime", "runtime"),
            ("device", "device"),
        ):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs and (theirs or name != "form"):  # former journals do not note the form
                return f"{what} {theirs[:20]} then, {mine[:20]} now"
        return None


def version_of(state_hash: str, form: str) -> str:
    """Name of a version of a model, the same for files that streams go on with as if nothing had happened."""
    return hashlib.sha256(f"{state_hash} {form}".encode()).hexdigest()[:VERSION_DIGITS]


class SavedStream(msgspec.Struct, frozen=True, array_like=True):
    """A stream as it stands in the journal."""

    tenant: str
    name: str
    model: str
    #: Generation when seq 1 was, and after record ``seq``.
    first_generation: int
    generation: int
    #: seq of the record last answered, and last acknowledged.
    seq: int
    acked: int
    idle_timeout: float
    #: Its rows of all arenas, one after another as bytes; ``None``: it starts from the initial state.
    state: bytes | None
    #: The group it has arrived with from another daemon, as long as it is not handed over (recurd.fences).
    held: str = ""
    #: Of the model that gave it its state (:attr:`Stamp.version`).
    version: str = ""
    #: seq up to which answers are kept apart from it (:func:`divided`).
    apart: int = 0

    @classmethod
    def of(cls, stream: Stream, state: bytes | None) -> "SavedStream":
        """A stream as it stands now; ``state`` is ``None`` for one that stands at a fresh start (:func:`is_fresh`)."""
        return cls(
            stream.tenant,
            stream.name,
            stream.lane.name,
            stream.first_generation,
            generation_of(stream),
            stream.answered,
            stream.acked,
            stream.idle_timeout,
            state,
            held_by(stream),
            stream.lane.version,
        )


class Parcel(msgspec.Struct, frozen=True, array_like=True):
    """A stream on its way to another daemon: all that the journal keeps of it."""

    handle: int
    stream: SavedStream
    #: Its answers that were not acknowledged, oldest first.
    answers: list[SavedAnswer]
    #: Of the version of its model that it was run by.
    state_hash: str


class ModelStamp(msgspec.Struct, frozen=True):
    """What streams of a model were run by."""

    model: str
    stamp: Stamp


def is_fresh(stream: Stream) -> bool:
    """Whether a stream that is to be saved, and whose state is not known, stands at a fresh start.

    One that is in the middle of a chunk came to be noted by its opening or a reset right before it, as a tick that
    finishes a chunk of a row takes no part of the next one.
    """
    return stream.untouched or bool(stream.queue and stream.queue[0].taken)


@dataclass(frozen=True, slots=True)
class Saving:
    """What has changed since the last one."""

    streams: list[Stream]
    #: By handle, the states that are known without asking where they are: of streams that were given one, or asked for
    #: it, since their last chunk.
    known: dict[int, bytes]
    #: Streams that have ended, and how; ``None``: nobody is to know of them.
    ended: list[tuple[Stream, Ended | None]]
    #: Handles of streams of which it is not known any more how they ended.
    endings_gone: list[int]
    #: Where all are sent who ask for a stream that is not here, the last of them from now on; empty: as before.
    redirects: list[Redirect | None]
    #: Daemons that streams are to come from, from now on; ``None``: as before.
    expected: dict[str, str] | None


class Unsaved:
    """Streams that are to be saved. Owned by the engine; does nothing where nothing is durable."""

    def __init__(self, durable: bool) -> None:
        #: Whether anything is.
        self.durable = durable
        self._streams: dict[int, Stream] = {}
        self._known: dict[int, bytes] = {}
        self._ended: list[tuple[Stream, Ended | None]] = []
        self._endings_gone: set[int] = set()
        self._redirects: list[Redirect | None] = []
        self._expected: dict[str, str] | None = None

    def note(self, stream: Stream, state: bytes | None = None) -> None:
        """A stream began, or a record of it was answered; ``state`` where it is known and not that of a fresh start."""
        if self.durable:
            self._streams[stream.handle] = stream
            if state is not None:
                self._known[stream.handle] = state
            elif self._known:
                self._known.pop(stream.handle, None)

    def end(self, stream: Stream, ended: Ended | None, endings_gone: Collection[int] = ()) -> None:
        """A stream ended, and for that it is not known any more how others did: their handles."""
        if self.durable:
            self._streams.pop(stream.handle, None)
            self._known.pop(stream.handle, None)
            self._ended.append((stream, ended))
            # It may have come back, and how it ended before be gone since this very round.
            self._endings_gone.discard(stream.handle)
            self.forget(endings_gone)

    def forget(self, handles: Collection[int]) -> None:
        """It is not known any more how these streams ended."""
        if self.durable:
            self._endings_gone.update(handles)

    def redirect(self, redirect: Redirect | None) -> None:
        """Who asks for a stream that is not here is sent there from now on; ``None``: not any more."""
        if self.durable:
            self._redirects.append(redirect)

    def expect(self, sources: dict[str, str]) -> None:
        """Streams of these daemons are to come, from now on."""
        if self.durable:
            self._expected = sources

    def take(self) -> Saving | None:
        """All of them; ``None`` when there are none. They stay noted until :meth:`saved`."""
        if not (self._streams or self._ended or self._endings_gone or self._redirects or self._expected is not None):
            return None
        streams, endings_gone = list(self._streams.values()), list(self._endings_gone)
        return Saving(streams, self._known, self._ended, endings_gone, self._redirects, self._expected)

    def saved(self) -> None:
        """What was taken last stands in the journal; nothing was noted since."""
        for stream in self._streams.values():
            if divided(stream)[1]:
                stream.apart = stream.answered
            stream.saved, stream.forgotten = stream.answered, stream.acked
            stream.stored = identity(stream)
            if stream.state is not None:
                stream.lane.slots.saved(stream)
        self._streams, self._known, self._ended, self._endings_gone, self._redirects = {}, {}, [], set(), []
        self._expected = None


def identity(stream: Stream) -> object:
    """What seldom changes of a saved stream: the same as :attr:`Stream.stored` when that stands in the journal already.

    The lane says it all for a stream that is in its first life and nobody's to hand over.
    """
    if stream.first_generation == 1 and (stream.fence is None or not stream.fence.is_held):
        return stream.lane
    return stream.first_generation, held_by(stream), stream.lane


def held_by(stream: Stream) -> str:
    """The group that a stream has arrived with, as long as it is not handed over; else ``""``."""
    return stream.fence.id if stream.fence is not None and stream.fence.is_held else ""


def generation_of(stream: Stream) -> int:
    """The generation after the record answered last: what waits in the queue has not happened yet."""
    if stream.queue:
        return stream.queue[0].generation - stream.queue[0].starts_afresh
    return stream.generation


def divided(stream: Stream) -> tuple[list[Answer], list[Answer]]:
    """Answers that are to stand with the stream in the journal, written with it again and again, and those that are to
    stand apart from now on, written once: where they are too much to stand beside it. Not to be changed.
    """
    if stream.apart <= stream.acked:
        answers = stream.answers  # as of nearly all streams: none of those that are left stands apart
    else:
        answers = [one for one in stream.answers if one[0] > stream.apart]
    size = 0
    for _, _, (header, payload) in answers:  # a sum() costs as much as all the rest
        size += len(header) + len(payload)
    return (answers, []) if size <= BESIDE_BYTES else ([], answers)


def forgotten(stream: Stream) -> range:
    """Numbers of the answers that stand apart and were acknowledged since."""
    return range(stream.forgotten + 1, min(stream.acked, stream.apart) + 1)


def answer(saved: SavedAnswer) -> tuple[int, int, wire.Record]:
    """The answer as a stream retains it."""
    seq, generation, header, payload = saved
    return seq, generation, (header, payload)
