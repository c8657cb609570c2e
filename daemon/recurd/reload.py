"""New files for models that are served: looked for and loaded beside the loop, taken over by it between two ticks.

A thread of its own reads, verifies and warms every file that has changed while the loop goes on serving; what it found
is taken over on the loop's thread, one model at a time. A file that is not good leaves the former one serving. Whoever
asks while a reload is under way gets one of their own after it.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

import msgspec

from recurd import config
from recurd.admin import Request
from recurd.engine import Engine
from recurd.errors import ConfigError, StartError
from recurd.loading import Loaded, fingerprint, load
from recurd.metrics import ModelLabels
from recurd.stats import Stats
from recurd.systemd import Notifier
from recurd.versions import Incompatible, Takeover

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from recurd.durable import Durable

#: How long the end of the process waits for a file that is being loaded.
_JOIN_SECONDS = 10.0


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """``reload`` as an ADMIN command."""

    #: What becomes of streams that a new file cannot go on with; ``None``: as configured.
    incompatible: Incompatible | None = None


class Outcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one model: it is ``unchanged``, ``kept`` (its streams keep their states), ``finish``, ``restart``,
    ``added``, ``removed`` or ``failed``."""

    model: str
    path: str
    outcome: str
    #: Why it failed; what served before serves on.
    reason: str = ""
    #: Streams that keep their state, finish on the former version, or end.
    kept: int = 0
    finishing: int = 0
    ending: int = 0
    #: Loading, verifying and warming.
    load_seconds: float = 0.0
    #: Taking over, for which the loop stood still.
    takeover_seconds: float = 0.0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a reload has done."""

    models: list[Outcome]
    #: Streams that were finishing on versions replaced before, and end now too (``restart``).
    former_ending: int
    #: Keys of the configuration that were changed and take a new start.
    needs_start: list[str]
    seconds: float


@dataclass(frozen=True)
class _Asked:
    """A reload that is wanted."""

    settings: config.Config
    incompatible: Incompatible
    requests: list[Request]
    needs_start: list[str]


@dataclass(frozen=True)
class _Failed:
    entry: config.Model
    #: The model's name, as far as it is known.
    name: str
    reason: str


#: What the thread finds of an entry: a new file, one that cannot be used, or the one that is served.
_Found = Loaded | _Failed | str


class Reload:
    """Owns the thread, and what is known of the files that are served. All but :meth:`_look` runs on the loop's."""

    def __init__(
        self,
        loaded: Iterable[Loaded],
        *,
        device: str,
        engine: Engine,
        durable: "Durable | None",
        labels: dict[str, ModelLabels],
        stats: Stats,
        notifier: Notifier,
        wake: Callable[[], object],
        log: "FilteringBoundLogger",
    ) -> None:
        """``wake`` is called on the thread when there is something for :meth:`turn`."""
        self._served = {one.name: one for one in loaded}
        self._device = device
        self._engine = engine
        self._durable = durable
        self._labels = labels
        self._stats = stats
        self._notifier = notifier
        self._wake = wake
        self._log = log
        # the one under way, and what is wanted after it
        self._thread: threading.Thread | None = None
        self._found: SimpleQueue[_Found | None] = SimpleQueue()
        self._asked: _Asked | None = None
        self._next: deque[_Asked] = deque()
        self._outcomes: list[Outcome] = []
        self._begin = 0.0

    @property
    def names(self) -> list[str]:
        """Names of the models that are served."""
        return list(self._served)

    def ask(self, settings: config.Config, request: Request | None, needs_start: list[str]) -> None:
        """Look at the models of ``settings`` again; ``request`` is answered when all is done.

        ``needs_start``: keys that were changed besides, to be told.

        Raises :class:`Refused` for a request that cannot be read.
        """
        incompatible = settings.reload.incompatible
        if request is not None:
            incompatible = request.read(Command).incompatible or incompatible
        requests = [] if request is None else [request]
        if self._next and self._next[-1].incompatible == incompatible:
            requests = self._next.pop().requests + requests  # one does for both
        self._next.append(_Asked(settings, incompatible, requests, needs_start))
        if self._asked is None:
            self._start()

    def _start(self) -> None:
        self._asked = self._next.popleft() if self._next else None
        if self._asked is None:
            return
        self._begin = time.monotonic()
        self._notifier.reloading(self._begin)
        self._notifier.status("loading models again")
        self._outcomes = []
        served = {one.entry.path: one for one in self._served.values()}
        arguments = (self._asked.settings, served)
        self._thread = threading.Thread(target=self._look, args=arguments, name="recurd reload", daemon=True)
        self._thread.start()

    # --- on the thread ---

    def _look(self, settings: config.Config, served: Mapping[str, Loaded]) -> None:
        try:
            for entry in settings.models:
                self._found.put(self._look_at(entry, settings, served.get(entry.path)))
                self._wake()
        finally:
            self._found.put(None)
            self._wake()

    def _look_at(self, entry: config.Model, settings: config.Config, former: Loaded | None) -> _Found:
        try:
            if former is not None and entry.name not in (None, former.name):
                former = None
            mark = fingerprint(entry.path)
            if former is not None and mark == former.fingerprint:
                if self._durable is not None:
                    self._durable.keep(former)  # it may not have been possible before
                return former.name
            if not mark:
                # Whoever opens it waits for its other end, and every reload to come with him.
                raise ConfigError(f"{entry.path}: is a pipe, which is taken at the start only; give a file")
            loaded = load(entry, settings, self._device)
            if former is not None and loaded.name != former.name:
                raise ConfigError(f"{entry.path}: it holds model '{loaded.name}' now, and not '{former.name}'")
            if self._durable is not None:
                self._durable.keep(loaded)
            return loaded
        except StartError as error:
            reason = str(error)
        except Exception as error:  # no memory, or a bug of the runtime: nothing that a daemon must die of
            reason = f"{entry.path}: {type(error).__name__}: {error}"
        return _Failed(entry, entry.name or (former.name if former is not None else ""), reason)

    # --- on the loop's thread ---

    def turn(self) -> None:
        """Take over what was found since the last call."""
        while self._asked is not None:
            try:
                found = self._found.get_nowait()
            except Empty:
                return
            if found is None:
                self._finish(self._asked)
            elif isinstance(found, str):
                self._note(Outcome(model=found, path=self._served[found].entry.path, outcome="unchanged"))
            elif isinstance(found, _Failed):
                self._note(Outcome(model=found.name, path=found.entry.path, outcome="failed", reason=found.reason))
            else:
                self._take_over(found, self._asked.incompatible)

    def _take_over(self, loaded: Loaded, incompatible: Incompatible) -> None:
        begin = time.monotonic()
        try:
            self._check(loaded)
            takeover, outcome = self._hand_over(loaded, incompatible)
        except Exception as error:  # a device without memory, a disk that is full: the former one serves on
            reason = str(error) if isinstance(error, StartError) else f"{type(error).__name__}: {error}"
            self._note(Outcome(model=loaded.name, path=loaded.entry.path, outcome="failed", reason=reason))
            return
        self._served[loaded.name], self._labels[loaded.name] = loaded, loaded.labels
        self._note(
            Outcome(
                model=loaded.name,
                path=loaded.entry.path,
                outcome=outcome,
                kept=takeover.kept,
                finishing=takeover.finishing,
                ending=takeover.ending,
                load_seconds=loaded.seconds,
                takeover_seconds=round(time.monotonic() - begin, 6),
            )
        )

    def _check(self, loaded: Loaded) -> None:
        """Raises :class:`ConfigError` for a file that is good, and not one that can be taken over."""
        path, former = loaded.entry.path, self._served.get(loaded.name)
        if any(outcome.model == loaded.name for outcome in self._outcomes):
            raise ConfigError(f"{path}: there is a model '{loaded.name}' already")
        if former is not None and former.model.slots != loaded.model.slots:
            raise ConfigError(
                f"{path}: slots: {former.model.slots} at the start, {loaded.model.slots} now; that is changed by a new "
                "start only"
            )

    def _hand_over(self, loaded: Loaded, incompatible: Incompatible) -> tuple[Takeover, str]:
        """Give a model to the engine; what became of the streams, in numbers and in a word."""
        name, model, bit_exact = loaded.name, loaded.model, loaded.bit_exact
        if self._durable is not None:
            self._durable.note_version(name, model)
        if name not in self._served:
            idle_seconds = loaded.entry.stream_idle_seconds
            self._engine.add_model(name, model, bit_exact=bit_exact, idle_seconds=idle_seconds)
            return Takeover(), "added"
        takeover = self._engine.replace_model(name, model, incompatible, bit_exact=bit_exact)
        return takeover, incompatible if takeover.is_new_version else "kept"

    def _note(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        self._stats.reloads[outcome.outcome] += 1
        fields = msgspec.structs.asdict(outcome)
        del fields["outcome"]
        if outcome.outcome == "failed":
            self._log.error("reload_failed", model=outcome.model, path=outcome.path, reason=outcome.reason)
        elif outcome.outcome != "unchanged":
            del fields["reason"]
            self._log.info(f"model_{_EVENTS.get(outcome.outcome, outcome.outcome)}", outcome=outcome.outcome, **fields)

    def _finish(self, asked: _Asked) -> None:
        named = {outcome.model for outcome in self._outcomes}
        # A file that cannot be read may be that of any model which no other entry names.
        for name in [] if "" in named else sorted(self._served.keys() - named):
            takeover = self._engine.remove_model(name, asked.incompatible)
            path = self._served.pop(name).entry.path
            del self._labels[name]
            self._note(
                Outcome(model=name, path=path, outcome="removed", finishing=takeover.finishing, ending=takeover.ending)
            )
        former = self._engine.end_former() if asked.incompatible == "restart" else 0
        report = Report(
            models=self._outcomes,
            former_ending=former,
            needs_start=asked.needs_start,
            seconds=round(time.monotonic() - self._begin, 3),
        )
        failed = [outcome.model for outcome in self._outcomes if outcome.outcome == "failed"]
        self._log.info(
            "reloaded",
            models=",".join(self._served),
            failed=",".join(failed),
            former_ending=former,
            seconds=report.seconds,
        )
        trouble = f"; could not reload {', '.join(failed)}, see the log" if failed else ""
        self._notifier.ready(f"serving {', '.join(self._served)}{trouble}")
        for request in asked.requests:
            self._engine.admin.report(request, report)
        self._start()

    def close(self) -> None:
        """Wait for a file that is being loaded; it is not taken over any more."""
        if self._thread is not None:
            self._thread.join(_JOIN_SECONDS)


#: Outcomes that are told by another word in the log.
_EVENTS = {"kept": "replaced", "finish": "replaced", "restart": "replaced"}
