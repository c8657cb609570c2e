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
    redirect no stream is left here, send everybody on who asks for one; or none is left there, send nobody there
    groups   which have arrived and are not decided about, with the number of their streams and one of these
    fate     what became of a group

Every command may be given twice.
"""

from typing import TYPE_CHECKING, Any

import msgspec

from recurd.admin import Command, Request
from recurd.arriving import Arriving
from recurd.endings import Redirect
from recurd.fences import Fences, OfGroup
from recurd.leaving import Endpoint, Key, Leaving
from recurd.lifecycle import Lifecycle
from recurd.peers import Outbox, Peers
from recurd.saving import Unsaved
from recurd.streams import Streams
from recurd.versions import Versions

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger


class _Expect(msgspec.Struct, frozen=True):
    #: ``None``: nothing is expected from anywhere.
    source: Endpoint | None = None


class _Redirect(msgspec.Struct, frozen=True):
    #: ``None``: take streams again.
    endpoint: Endpoint | None = None
    server_key: Key | None = None
    #: A daemon that has no stream left: nothing is expected from there, and what has moved there is not there any more.
    drained: Endpoint | None = None


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
        log: "FilteringBoundLogger",
    ) -> None:
        self._streams = streams
        self._fences = fences
        self._unsaved = unsaved
        self._log = log
        self._leaving = Leaving(
            streams=streams,
            fences=fences,
            peers=peers,
            outbox=outbox,
            unsaved=unsaved,
            lifecycle=lifecycle,
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
            "groups": self._groups,
            "fate": self._fate,
        }

    def _expect(self, request: Request, now: float) -> tuple[Any, bytes]:
        """Streams of another daemon are to come: begin none here that is not known. Or none are, from anywhere."""
        source = request.read(_Expect).source
        expected = self._fences.expected
        if source is None:
            self._await([])
        elif source not in expected:
            self._await([*expected, source])
        return {"expected": self._fences.expected}, b""

    def _redirect(self, request: Request, now: float) -> tuple[Any, bytes]:
        """No stream is left here, or elsewhere: send everybody on who asks for one, or nobody any more."""
        wanted = request.read(_Redirect)
        left = len(self._streams)
        redirect = None if wanted.endpoint is None else Redirect(wanted.endpoint, wanted.server_key)
        if redirect != self._fences.redirect and (redirect is None or not left):
            self._fences.redirect = redirect
            self._unsaved.redirect(redirect)
            if redirect is not None:
                self._log.info("drained", endpoint=redirect.endpoint)
                self._await([])  # whatever was to come here is asked for there
        if wanted.drained is not None:
            self._unsaved.forget(self._streams.forget_moved(wanted.drained))
            self._await([source for source in self._fences.expected if source != wanted.drained])
        return {"left": left}, b""

    def _await(self, sources: list[str]) -> None:
        if sources != self._fences.expected:
            self._fences.expected = sources
            self._unsaved.expect(sources)
            self._log.info("streams_expected", sources=sources)

    def _groups(self, request: Request, now: float) -> tuple[Any, bytes]:
        """Groups that have arrived here, and daemons that more are to come from."""
        held: dict[str, dict[str, Any]] = {}
        for group in self._fences.held():
            streams = list(group.members())
            held[group.id] = {"streams": len(streams)}
            if streams:
                held[group.id] |= {"tenant": streams[0].tenant, "stream": streams[0].name}
        return {"held": held, "expected": self._fences.expected}, b""

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
