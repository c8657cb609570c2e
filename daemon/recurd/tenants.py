"""Who may do what: tenants, their rights, and how much of the daemon each may take.

A *user* is what authentication says of a connection: the text of its public key, or ``local`` where nobody is
authenticated (ipc, whose files have permissions, and a daemon without CURVE). A *tenant* is whom that user belongs to:
stream names live inside a tenant, and the rights of a tenant are the same on all its connections.

No clock and no sockets here: ``now`` is monotonic seconds, users are told by :mod:`recurd.server`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import translate
from typing import TYPE_CHECKING

from recurd import config
from recurd.errors import Code, Refused

if TYPE_CHECKING:
    from recurd.lane import Room
    from recurd.streams import Chunk

#: The user, and the tenant, of whoever is not authenticated.
LOCAL = "local"
#: Rights of a tenant that is not told any; ``local`` has all of them.
_USUAL = frozenset({"stream", "reset", "state"})
_ALL = _USUAL | {"admin"}
#: What a tenant that was silent may send at once, in seconds of its rate.
_BURST_SECONDS = 1.0
#: Between two tries of a tenant that has no room, at least.
_LEAST_RETRY_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class Tenant:
    """What a tenant may do. Patterns are globs over whole names (``*``, ``?``, ``[abc]``)."""

    name: str
    models: "Patterns"
    streams: "Patterns"
    rights: frozenset[str]
    limits: config.TenantLimits
    #: Topics it may subscribe to besides its own: ``tenant/model/stream``.
    subscribe: tuple[str, ...] = ()

    def may(self, right: str) -> bool:
        """Whether it has a right: ``stream``, ``reset``, ``state`` or ``admin``."""
        return right in self.rights

    def demand(self, right: str) -> None:
        """Raises :class:`Refused` (``forbidden``) where it has not this right."""
        if right not in self.rights:
            raise Refused(Code.FORBIDDEN, f"tenant '{self.name}' has not the right '{right}'")

    def may_have(self, stream: str, model: str) -> bool:
        """Whether it may have a stream of this name and model."""
        return "stream" in self.rights and self.models.match(model) and self.streams.match(stream)

    def may_subscribe(self, prefix: bytes) -> bool:
        """Whether it may have all published results whose topic starts so: its own, and those that it is given."""
        if prefix.startswith(f"{self.name}/".encode()):
            return True
        return any(
            prefix.startswith(topic[:-1].encode() if topic.endswith("*") else f"{topic}\0".encode())
            for topic in self.subscribe
        )

    def demand_stream(self, stream: str, model: str) -> None:
        """Raises :class:`Refused` (``forbidden``) where it may not have a stream of this name and model.

        Says nothing about what there is: a model that it may not use is forbidden whether or not it is served.
        """
        self.demand("stream")
        if not self.models.match(model):
            raise Refused(Code.FORBIDDEN, f"tenant '{self.name}' may not use model '{model}'")
        if not self.streams.match(stream):
            raise Refused(Code.FORBIDDEN, f"tenant '{self.name}' has streams like {self.streams} only, not '{stream}'")


class Patterns:
    """Globs; a name matches when it matches one of them."""

    __slots__ = ("_globs", "_match")

    def __init__(self, globs: Iterable[str]) -> None:
        self._globs = tuple(globs)
        self._match = re.compile("|".join(map(translate, self._globs)) or r"(?!)").match

    def match(self, name: str) -> bool:
        """Whether a whole name is like one of them."""
        return self._match(name) is not None

    def __str__(self) -> str:
        return ", ".join(f"'{glob}'" for glob in self._globs) or "none"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Patterns) and self._globs == other._globs

    def __hash__(self) -> int:
        return hash(self._globs)


#: Whoever is not known.
NOBODY = Tenant("", Patterns(()), Patterns(()), frozenset(), config.TenantLimits())


class Tenants:
    """Who is whose, and every tenant's rights and share. Owned by the server, read by the engine."""

    def __init__(
        self, sections: Mapping[str, config.Tenant] | None = None, users: Mapping[str, str] | None = None
    ) -> None:
        """``sections``: ``[tenants.NAME]`` of the configuration. ``users``: tenants by public key; ``None`` without
        authentication, where a user's name is its tenant's.
        """
        #: Whether there may be more than one: one that has the daemon for itself pays for no accounts.
        self.is_shared = False
        self._shares: dict[str, Share] = {}
        self._known: dict[str, Tenant] = {}
        self.change(sections or {}, users)

    def change(self, sections: Mapping[str, config.Tenant], users: Mapping[str, str] | None) -> None:
        """Take other rights and keys from now on; shares keep what their tenants hold.

        A daemon that had neither counts what is opened from then on.
        """
        self.is_shared |= users is not None or bool(sections)
        self._sections = dict(sections)
        self._users = None if users is None else dict(users)
        self._reachable = frozenset({LOCAL, *(users or {}).values()})
        self._known.clear()
        for name, share in self._shares.items():
            share.limit(self.rights(name).limits)

    @property
    def users(self) -> frozenset[str]:
        """All keys that are known."""
        return frozenset(self._users or ())

    def of(self, user: str) -> Tenant | None:
        """The tenant of a user; ``None`` for one whose key is not known (any more)."""
        if self._users is None or user == LOCAL:
            return self.rights(user)
        name = self._users.get(user)
        return None if name is None else self.rights(name)

    def is_reachable(self, name: str) -> bool:
        """Whether anybody can be this tenant: whoever is not authenticated is ``local``, all others need a key."""
        return name in self._reachable

    def rights(self, name: str) -> Tenant:
        """A tenant's rights: its section's, or the usual ones."""
        known = self._known.get(name)
        if known is None:
            known = self._known[name] = _tenant(name, self._sections.get(name, config.Tenant()))
        return known

    def share(self, name: str, room: "Room") -> "Share | None":
        """What a tenant holds of the daemon's room; ``None`` where one tenant has all of it."""
        if not self.is_shared:
            return None
        share = self._shares.get(name)
        if share is None:
            share = self._shares[name] = Share(name, room)
            share.limit(self.rights(name).limits)
        return share


def _tenant(name: str, section: config.Tenant) -> Tenant:
    rights: frozenset[str] = _ALL if name == LOCAL else _USUAL
    if section.rights is not None:
        rights = frozenset(section.rights)
    models, streams = Patterns(section.models), Patterns(section.streams)
    return Tenant(name, models, streams, rights, section.limits, section.subscribe)


class Rate:
    """So many units a second, and what was saved up in one second of silence at once. Owned by a share.

    A bucket of tokens as the one moment from which on more is let in: whoever comes after it pays afterwards, so that
    something larger than the bucket is let in too, and waited for.
    """

    __slots__ = ("_open_at", "_per_second", "_stretch")

    def __init__(self, per_second: float, former: "Rate | None" = None) -> None:
        """``former``: it goes on from there; what was used up is not given anew because rights are read again."""
        self._per_second = per_second
        self._open_at: float = 0.0 if former is None else former._open_at
        #: What is still to be waited for was taken at another rate, and so takes so many times as long now.
        self._stretch: float = 1.0 if former is None else former._stretch * former._per_second / per_second

    def wait(self, now: float) -> float:
        """Seconds until something is let in; 0 or less: now."""
        if self._stretch != 1.0:
            if self._open_at > now:
                self._open_at = now + (self._open_at - now) * self._stretch
            self._stretch = 1.0
        return self._open_at - now

    def take(self, amount: float, now: float) -> None:
        """Something was let in."""
        self._open_at = max(self._open_at, now - _BURST_SECONDS) + amount / self._per_second


class Share:
    """What one tenant holds of the daemon's room, and its rates. Counted by the lanes.

    Besides its own limits a tenant may hold as much as is still free, half of everything when it is alone: so there is
    always room for the next one, however much those before it have taken.
    """

    __slots__ = (
        "_bytes_rate",
        "_chunks_rate",
        "_in_flight",
        "_name",
        "_refused",
        "_refused_at",
        "_retained",
        "_room",
        "bytes",
        "chunks",
        "due",
        "held",
    )

    def __init__(self, name: str, room: "Room") -> None:
        self._name = name
        self._room = room
        #: Chunks waiting to be run, and their bytes.
        self.chunks = 0
        self.bytes = 0
        #: Bytes of the answers kept for retries.
        self.held = 0
        #: Bytes of the answers that what is queued will give.
        self.due = 0.0
        self._chunks_rate: Rate | None = None
        self._bytes_rate: Rate | None = None
        self.limit(config.TenantLimits())

    def limit(self, limits: config.TenantLimits) -> None:
        """Hold the tenant to these limits from now on."""
        self._in_flight = limits.in_flight
        self._retained = limits.retained_bytes
        # The last refusal by its rates, and when.
        self._refused: Refused | None = None
        self._refused_at = 0.0
        chunks, bytes = limits.chunks_per_second, limits.bytes_per_second
        self._chunks_rate = None if chunks is None else Rate(chunks, self._chunks_rate)
        self._bytes_rate = None if bytes is None else Rate(bytes, self._bytes_rate)

    def enter(self, chunk: "Chunk", due: float, is_first: bool) -> None:
        """Count a chunk that is about to be queued, and so many bytes of its results to come.

        Raises :class:`Refused`, nothing counted, when it may not be.
        """
        size, now = chunk.data.nbytes, chunk.arrived
        room = self._room
        # What its queued chunks will give counts like what they have given: nobody may have acknowledged it then.
        held = self.held + self.due
        if self.chunks >= room.max_chunks - room.chunks and not is_first:
            raise room.refusal("chunks wait to be run")
        if self.bytes + size > room.max_bytes - room.bytes:
            raise room.refusal("bytes wait to be run")
        if held and held >= room.max_retained - room.retained - room.due:
            raise room.refusal("results wait to be acknowledged")
        if self._chunks_rate is not None:
            self._chunks_rate.take(1, now)
        if self._bytes_rate is not None:
            self._bytes_rate.take(size, now)
        self.chunks += 1
        self.bytes += size
        self.due += due

    def check_limits(self, now: float) -> None:
        """Hold a chunk that comes now against the tenant's own limits. Raises :class:`Refused`."""
        if self._in_flight is not None and self.chunks >= self._in_flight:
            raise self._refusal(f"{self.chunks} chunks in flight", self._room.retry_after_seconds)
        if self._retained is not None and self.held + self.due >= self._retained:
            what = f"{self.held + int(self.due)} bytes of results, those to come too, not acknowledged"
            raise self._refusal(what, self._room.retry_after_seconds)
        if self._refused is not None and self._refused_at == now:
            # The other chunks of a frame, which has one time: one who sends a thousand of them too many costs little.
            raise self._refused.with_traceback(None)
        for rate, what in ((self._chunks_rate, "chunks"), (self._bytes_rate, "bytes")):
            if rate is not None and (wait := rate.wait(now)) > 0:
                self._refused, self._refused_at = self._refusal(f"its {what} for now", wait), now
                raise self._refused

    def _refusal(self, what: str, wait_seconds: float) -> Refused:
        return Refused(
            Code.LIMIT,
            f"tenant '{self._name}' has had {what}, the most it may",
            retry_after_seconds=max(wait_seconds, _LEAST_RETRY_SECONDS),
        )

    def leave(self, chunks: int, size: int, due: float) -> None:
        """Count queued chunks out, and their bytes."""
        self.chunks -= chunks
        self.bytes -= size
        self.due = self.due - due if self.chunks else 0.0
