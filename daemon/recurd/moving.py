"""Streams that go to another daemon, and those that come from one: the ADMIN commands for it.

The daemons do not know each other: an operator's command (:mod:`recurd.drain`, or a file in between) takes streams here
and hands them over there, group by group (:mod:`recurd.fences` has the stages)::

    gather   take some streams as a group, closed to clients if they are to leave
    export   a page of the group: what the journal would keep of each stream, between two of its records
    release  they have arrived elsewhere: end them here, and send their clients there
    lift     they have not: as if nothing had happened
    import   take streams in, still closed to clients
    admit    they are this daemon's from now on
    drop     they are not
    expect   more streams are to come from there: begin none here that is not known, it may be one of them
    redirect no stream is left here: send everybody on who asks for one
    drained  no stream is left there: none is to come from there any more, and nobody is sent there
    groups   which have arrived and are not decided about, with the number of their streams and one of these
    fate     what became of a group

Every command may be given twice.
"""

from typing import TYPE_CHECKING, Any

import msgspec

from recurd.admin import Command, Request
from recurd.arriving import Arriving
from recurd.endings import Redirect
from recurd.errors import Code, Refused
from recurd.fences import Fences, OfGroup
from recurd.leaving import Endpoint, Key, Leaving, Origin
from recurd.lifecycle import Lifecycle
from recurd.peers import Outbox, Peers
from recurd.saving import Unsaved
from recurd.stats import Stats
from recurd.streams import Streams
from recurd.versions import Versions

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger


class _Expect(msgspec.Struct, frozen=True):
    #: ``None``: nothing is expected from anywhere.
    endpoint: Endpoint | None = None
    #: Where that is its address; ``None``: everywhere.
    machine: Endpoint | None = None
    origin: Origin = "-"
    #: It has no stream left: what has moved there from here is not there any more.
    is_empty: bool = False


class _Redirect(msgspec.Struct, frozen=True):
    #: ``None``: take streams again.
    endpoint: Endpoint | None = None
    server_key: Key | None = None
    origin: Origin | None = None


class _Drained(msgspec.Struct, frozen=True):
    endpoint: Endpoint
    #: ``None`` where only its address is known.
    origin: Origin | None = None


class Moving:
    """The table of commands, and what happens without one. Owned by the engine, which owns what it works on too."""

    def __init__(
        self,
        *,
        versions: Versions,
        streams: Streams,
        fences: Fences,
        peers: Peers,
        outbox: Outbox,
        unsaved: Unsaved,
        lifecycle: Lifecycle,
        stats: Stats,
        log: "FilteringBoundLogger",
    ) -> None:
        self._streams = streams
        self._fences = fences
        self._unsaved = unsaved
        self._stats = stats
        self._log = log
        self._leaving = Leaving(
            streams=streams,
            fences=fences,
            peers=peers,
            outbox=outbox,
            unsaved=unsaved,
            lifecycle=lifecycle,
            versions=versions,
            log=log,
        )
        self._arriving = Arriving(
            lanes=versions.present,
            streams=streams,
            fences=fences,
            unsaved=unsaved,
            lifecycle=lifecycle,
            log=log,
        )

    @property
    def commands(self) -> dict[str, Command]:
        """By name."""
        return {
            "gather": self._leaving.gather,
            "export": self._leaving.export,
            "release": self._leaving.release,
            "lift": self._leaving.lift,
            "import": self._arriving.import_,
            "admit": self._arriving.admit,
            "drop": self._arriving.drop,
            "expect": self._expect,
            "redirect": self._redirect,
            "drained": self._drained,
            "groups": self._groups,
            "fate": self._fate,
        }

    def _expect(self, request: Request, now: float) -> tuple[Any, bytes]:
        """Streams of another daemon are coming: take them, and begin none here that is not known. Or none are."""
        wanted = request.read(_Expect)
        if wanted.endpoint is None:
            self._set_expected({})
            return {"expected": {}}, b""
        self._check_drained(wanted.endpoint, wanted.origin)
        source = wanted.endpoint + (f" on {wanted.machine}" if wanted.machine is not None else "")
        self._set_expected(self._fences.expected | {wanted.origin: source})
        self._send_on(None)
        if wanted.is_empty:
            self._forget_moved(wanted.endpoint, wanted.origin)
        return {"expected": self._fences.expected}, b""

    def _check_drained(self, endpoint: str, origin: str | None) -> None:
        """Raises :class:`Refused` where all were sent to another daemon than that: streams have begun there since."""
        redirect = self._fences.redirect
        if redirect is not None and not redirect.goes_to(endpoint, origin):
            raise Refused(
                Code.BAD_REQUEST,
                f"this daemon was drained to {redirect.endpoint}, and sends everybody there; to let it take streams "
                f"again: 'recurd drain --cancel', with --drained {redirect.endpoint} if none is left there",
            )

    def _set_expected(self, sources: dict[str, str]) -> None:
        if sources != self._fences.expected:
            self.restore_expected(sources)
            self._unsaved.expect(sources)
            if sources:
                self._log.info("streams_expected", sources=list(sources.values()))
            else:
                self._log.info("streams_expected_no_more")

    def restore_expected(self, sources: dict[str, str]) -> None:
        """Streams of these daemons, endpoints by origin, are coming, as before the start."""
        self._fences.expect(sources)
        self._stats.drains_unfinished = len(sources)

    def _redirect(self, request: Request, now: float) -> tuple[Any, bytes]:
        """No stream is left here: send everybody on who asks for one. Or nobody any more."""
        wanted = request.read(_Redirect)
        left = len(self._streams)
        if wanted.endpoint is None:
            self._send_on(None)
            return {"left": left}, b""
        self._check_drained(wanted.endpoint, wanted.origin)
        others = [source for origin, source in self._fences.expected.items() if origin != wanted.origin]
        if others:
            raise Refused(
                Code.BAD_REQUEST,
                f"a drain from {' and '.join(others)} to this daemon is not finished: finish it first, or say that it "
                f"never will be ('recurd drain --cancel', to this daemon)",
            )
        if not left:
            self._set_expected({})  # what was to come is asked for there from now on
            self._send_on(Redirect(wanted.endpoint, wanted.server_key, origin=wanted.origin))
        return {"left": left}, b""

    def _send_on(self, redirect: Redirect | None) -> None:
        if redirect != self._fences.redirect:
            self._fences.redirect = redirect
            self._unsaved.redirect(redirect)
            if redirect is not None:
                self._log.info("drained", endpoint=redirect.endpoint)

    def _drained(self, request: Request, now: float) -> tuple[Any, bytes]:
        """A daemon has no stream left: none is to come from there, and nobody is sent there."""
        wanted = request.read(_Drained)
        forgotten = self._forget_moved(wanted.endpoint, wanted.origin)
        if self._fences.redirect is not None and self._fences.redirect.goes_to(wanted.endpoint, wanted.origin):
            self._send_on(None)
        # Two daemons may have been named alike, each by a command on its own machine.
        gone = [
            origin
            for origin, source in self._fences.expected.items()
            if origin == wanted.origin or (wanted.origin is None and source.partition(" on ")[0] == wanted.endpoint)
        ]
        self._set_expected({origin: source for origin, source in self._fences.expected.items() if origin not in gone})
        return {"forgotten": forgotten}, b""

    def _forget_moved(self, endpoint: str, origin: str | None) -> int:
        handles = self._streams.forget_moved(endpoint, origin)
        self._unsaved.forget(handles)
        return len(handles)

    def _groups(self, request: Request, now: float) -> tuple[Any, bytes]:
        """Groups that have arrived here, daemons that more are to come from, where all have gone, and who is here."""
        held: dict[str, dict[str, Any]] = {}
        for group in self._fences.held():
            streams = list(group.members())
            held[group.id] = {"streams": len(streams)}
            if streams:
                held[group.id] |= {"tenant": streams[0].tenant, "stream": streams[0].name}
        redirect = self._fences.redirect
        gone_to = [[*where, count] for where, count in self._streams.gone_to.items()]
        return {
            "held": held,
            "expected": self._fences.expected,
            "sent_on": None if redirect is None else [redirect.endpoint, redirect.origin],
            "gone_to": gone_to,
            "streams": len(self._streams),
        }, b""

    def _fate(self, request: Request, now: float) -> tuple[Any, bytes]:
        """What became of a group; asking changes nothing for it."""
        return {"fate": self._fences.fate(request.read(OfGroup).group)}, b""

    def expire(self, now: float) -> None:
        """Let groups go whose operator is not there any more."""
        for group in self._fences.expired(now):
            self._log.warning("operator_gone", streams=len(group.streams), group=group.id)
            if group.is_held:
                self._arriving.forget(group)
            else:
                self._leaving.open(group)
