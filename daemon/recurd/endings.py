"""How streams ended, so that who comes late is told why instead of "unknown"."""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from recurd.errors import BREAKING, Broken, Code, Refused


class Redirect(NamedTuple):
    """Where streams that were here are now."""

    endpoint: str
    #: The public key of the daemon there, where it has another one than this.
    server_key: str | None = None
    #: The group they left with.
    group: str | None = None
    #: The origin (see :class:`recurd.wire.Welcome`) of the daemon there.
    origin: str | None = None

    def goes_to(self, endpoint: str, origin: str | None) -> bool:
        """Whether it is to the daemon of that endpoint or origin."""
        return self.endpoint == endpoint or (origin is not None and self.origin == origin)

    def error(self, name: str) -> Refused:
        """What somebody is told who asks for one of them."""
        text = f"stream '{name}' is served by another daemon, at {self.endpoint}"
        return Refused(Code.MOVED, text, endpoint=self.endpoint, server_key=self.server_key, group=self.group)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a stream ended: what a late record or OPEN is told."""

    tenant: str
    name: str
    code: Code
    generation: int
    last_seq: int
    #: Where a stream that has moved is now.
    redirect: Redirect | None = None

    def error(self) -> Refused | Broken:
        """The error for who comes late."""
        if self.redirect is not None:
            return self.redirect.error(self.name)
        text = f"stream '{self.name}' " + _ENDINGS[self.code]
        if self.code not in BREAKING:
            return Refused(self.code, text)
        return Broken(self.code, text, generation=self.generation, last_seq=self.last_seq)


_ENDINGS = {
    Code.MOVED: "is served by another daemon",
    Code.CLOSED: "was closed",
    Code.REPLACED: "was opened anew; its former state is gone",
    Code.EXPIRED: "was idle for longer than its time-out; its state is gone",
    Code.FAILED: "was in a run of the model that failed; its state is gone",
    Code.RELOADED: "was of a version of the model that was replaced; its state is gone",
    Code.POISONED: "got a result with NaN or infinity from the model; its state is gone",
}


class Endings:
    """The last ones, by handle and by name inside a tenant. Owned by :class:`recurd.streams.Streams`."""

    def __init__(self, *, max_ended: int, max_moved: int = 0) -> None:
        """``max_ended``: of all tenants together; ``max_moved``: of each tenant."""
        self._ended = _Memory(max_ended)
        # Those that are served elsewhere, apart: one that is forgotten would begin here a second time.
        self._moved = _Memory(max_moved, of_each=True)
        self._by_name: dict[tuple[str, str], int] = {}
        #: How many of them went where: by endpoint and origin.
        self.gone_to: Counter[tuple[str, str | None]] = Counter()

    def of(self, tenant: str, handle: int) -> Ended | None:
        """How a tenant's stream of this handle ended, when it is remembered."""
        return self._ended.get(tenant, handle) or self._moved.get(tenant, handle)

    def named(self, tenant: str, name: str) -> Ended | None:
        """How the last stream of this name ended, when it is remembered."""
        handle = self._by_name.get((tenant, name))
        return None if handle is None else self.of(tenant, handle)

    def add(self, handle: int, ended: Ended) -> list[int]:
        """Remember one, as the last one of its name; the handles whose endings are forgotten for it."""
        for memory in (self._ended, self._moved):  # one that has moved may have come back and ended here
            self._forgotten(memory.drop(ended.tenant, handle))
        self._by_name[ended.tenant, ended.name] = handle
        memory = self._ended if ended.redirect is None else self._moved
        memory.add(handle, ended)
        if ended.redirect is not None:
            self.gone_to[ended.redirect.endpoint, ended.redirect.origin] += 1
        forgotten = []
        while memory.is_too_full(ended.tenant):
            handle, oldest = memory.forget(ended.tenant)
            self._forget_name(handle, oldest)
            self._forgotten(oldest)
            forgotten.append(handle)
        return forgotten

    def forget_moved(self, endpoint: str, origin: str | None) -> list[int]:
        """Forget those that went to the daemon of that endpoint or origin: their handles.

        A scan of all that have moved.
        """
        gone = [
            (handle, ended)
            for handle, ended in self._moved.all()
            if ended.redirect is not None and ended.redirect.goes_to(endpoint, origin)
        ]
        for handle, ended in gone:
            self._forgotten(self._moved.drop(ended.tenant, handle))
            self._forget_name(handle, ended)
        return [handle for handle, _ in gone]

    def _forgotten(self, ended: Ended | None) -> None:
        if ended is not None and ended.redirect is not None:
            where = ended.redirect.endpoint, ended.redirect.origin
            self.gone_to[where] -= 1
            if not self.gone_to[where]:
                del self.gone_to[where]

    def _forget_name(self, handle: int, ended: Ended) -> None:
        if self._by_name.get((ended.tenant, ended.name)) == handle:
            del self._by_name[ended.tenant, ended.name]


class _Memory:
    """So many endings at most, the oldest are forgotten first: of each tenant, or of all of them in equal parts.

    One who opens and closes a million streams shall not make the daemon forget how another's ended.
    """

    def __init__(self, most: int, *, of_each: bool = False) -> None:
        self._most = most
        self._of_each = of_each
        self._count = 0
        self._by_tenant: dict[str, OrderedDict[int, Ended]] = {}

    def is_too_full(self, latest: str) -> bool:
        """Whether one has to be forgotten, after one of the ``latest`` tenant was added."""
        return (len(self._by_tenant[latest]) if self._of_each else self._count) > self._most

    def all(self) -> Iterator[tuple[int, Ended]]:
        """Handles and endings of all tenants."""
        return chain.from_iterable(endings.items() for endings in self._by_tenant.values())

    def get(self, tenant: str, handle: int) -> Ended | None:
        """A tenant's ending, when it is here."""
        endings = self._by_tenant.get(tenant)
        return None if endings is None else endings.get(handle)

    def add(self, handle: int, ended: Ended) -> None:
        """Remember one that is not here."""
        self._by_tenant.setdefault(ended.tenant, OrderedDict())[handle] = ended
        self._count += 1

    def drop(self, tenant: str, handle: int) -> Ended | None:
        """Forget one; ``None`` where it is not here."""
        endings = self._by_tenant.get(tenant)
        ended = None if endings is None else endings.pop(handle, None)
        if ended is not None:
            self._count_out(tenant)
        return ended

    def forget(self, latest: str) -> tuple[int, Ended]:
        """Forget the oldest ending of a tenant that has more than its part: the ``latest`` one, if that has."""
        tenant = latest
        if not self._of_each and len(self._by_tenant[latest]) * len(self._by_tenant) <= self._most:
            tenant = max(self._by_tenant, key=lambda name: len(self._by_tenant[name]))
        oldest = self._by_tenant[tenant].popitem(last=False)
        self._count_out(tenant)
        return oldest

    def _count_out(self, tenant: str) -> None:
        self._count -= 1
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]
