"""Joins engine, models and journal: nothing leaves before it is saved, and a daemon goes on where the last ended."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from recurd.config import Config
from recurd.engine import Engine
from recurd.errors import JournalError
from recurd.former import Copies
from recurd.journal import Journal
from recurd.lane import states_of
from recurd.loading import Loaded
from recurd.model import Model
from recurd.saving import Saving, Stamp, is_fresh
from recurd.stats import Stats

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger


#: How long to wait before a commit that failed is tried again.
RETRY_SECONDS = 1.0


class Durable:
    """Commits what changed. Owns the journal, and the answers that wait for a commit which has failed."""

    def __init__(
        self,
        settings: Config,
        engine: Engine,
        models: Mapping[str, Model],
        copies: Copies | None = None,
        *,
        stats: Stats,
        log: "FilteringBoundLogger",
    ) -> None:
        """Open the journal of a ``settings.durability`` that is not off. Raises :class:`JournalError`.

        ``copies`` of model files, for the versions that streams of the journal finish on.
        """
        self._engine = engine
        self._copies = copies
        self._stats = stats
        self._log = log
        durability = settings.durability
        assert durability.mode != "off"
        self._journal = Journal(Path(durability.directory), durability.mode)
        try:
            self._take_up(models, accept_drift=durability.accept_drift)
            origin = self._journal.origin(engine.epoch)
        except BaseException:
            self._journal.close()
            raise
        engine.keep_in(self._journal)
        engine.go_on_from(origin)
        self._held: list[tuple[bytes, bytes]] = []
        self._retry_at = 0.0

    def _take_up(self, models: Mapping[str, Model], *, accept_drift: bool) -> None:
        """Find for every stored stream the version that it goes on with. Raises :class:`JournalError`."""
        present = {name: model.stamp for name, model in models.items()}
        stored = self._journal.stamps()
        former: dict[tuple[str, str], Stamp] = {}
        for name, version in sorted({(name, stamp.version) for (name, _), stamp in stored.items()}):
            if name in present and present[name].version == version:
                continue
            if self._copies is not None and (loaded := self._copies.load(name, version)) is not None:
                former[name, version] = loaded.model.stamp
                self._engine.add_former(name, loaded.model)
        for drift in self._journal.stamp(present, former, accept_drift=accept_drift):
            self._log.warning("drift_accepted", reason=drift)
        #: Version of the lane that streams go to, by model and the version that they are stored under.
        self._versions = {key: stamp.version for key, stamp in stored.items()}
        if self._copies is not None:
            self._copies.forget({*self._versions.values(), *(stamp.version for stamp in present.values())})

    def keep(self, loaded: Loaded) -> None:
        """Keep a copy of a model file; may be called on any thread."""
        if self._copies is not None:
            self._copies.keep(loaded)

    def close(self) -> None:
        """Let go of the journal."""
        self._journal.close()

    def note_version(self, name: str, model: Model) -> None:
        """Streams of this version of a model are saved from now on. Raises :class:`JournalError`."""
        self._journal.note_version(name, model.stamp)

    def restore(self, now: float) -> int:
        """Give the engine all streams of the journal, and how others ended; how many streams there were.

        Raises :class:`JournalError` for a damaged one.
        """
        for handle, ended in self._journal.endings():
            self._engine.remember(handle, ended)
        redirect = self._journal.redirect()
        if redirect is not None:
            self._engine.send_on(redirect)
            self._log.warning("drained", endpoint=redirect.endpoint, reason="before the start; see drain --cancel")
        sources = self._journal.expected()
        if sources:
            self._engine.expect(sources)
            self._log.warning("streams_expected", sources=list(sources.values()), reason="before the start; see drain")
        count = 0
        for handle, saved, answers in self._journal.load():
            version = self._versions[saved.model, saved.version]
            self._engine.restore(handle, saved, answers, now, version)
            count += 1
        return count

    def commit(self, now: float) -> bool:
        """Save what changed since the last commit; whether there was something and it worked.

        A commit that fails halts the engine, and is tried again later.
        """
        saving = self._engine.to_save()
        if saving is None or now < self._retry_at:
            return False
        try:
            self._journal.commit(saving, _states(saving))
        except JournalError as error:
            self._fail(error, now, len(saving.streams))
            return False
        if self._engine.halted:
            self._log.info("journal_recovered", streams=len(saving.streams))
        self._engine.saved()
        return True

    def _fail(self, error: JournalError, now: float, streams: int) -> None:
        self._stats.journal_failures += 1
        self._retry_at = now + RETRY_SECONDS
        if not self._engine.halted:
            self._log.error("journal_failed", reason=str(error), streams=streams)
            self._held = self._engine.replies_to_send()
        self._engine.halt(str(error))

    def look(self, now: float) -> None:
        """Look, now and then, whether the journal is still where it was: what is saved elsewhere would be lost."""
        if not self._engine.halted and not self._journal.is_in_place:
            self._fail(JournalError("the journal's files were deleted or replaced under the running daemon"), now, 0)
            self._retry_at = math.inf

    def withhold(self, routing_ids: Collection[bytes]) -> None:
        """Drop the answers that wait for connections which may not have them any more."""
        gone = frozenset(routing_ids)
        self._held = [(routing_id, frame) for routing_id, frame in self._held if routing_id not in gone]

    def due(self) -> list[tuple[bytes, bytes]]:
        """Routing ids and frames that may be sent: what is saved, and refusals while nothing can be."""
        frames = self._engine.replies_to_send()
        if self._held and not self._engine.halted:
            frames, self._held = self._held + frames, []
        return frames


def _states(saving: Saving) -> dict[int, bytes]:
    """The states of streams that are to be saved, by handle; nothing for those that start fresh."""
    others = [stream for stream in saving.streams if stream.handle not in saving.known and not is_fresh(stream)]
    return saving.known | states_of(others)
