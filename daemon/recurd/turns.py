"""The lines of tenants that share a daemon: one stream of each in turn, however many the others have waiting."""

from collections import deque
from collections.abc import Iterable

from recurd.streams import Stream


class Turns:
    """One line a tenant, who has waited longest for its turn first. Owned by a scheduler."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[Stream]] = {}
        self._streams = 0

    def __len__(self) -> int:
        """Streams in all lines."""
        return self._streams

    def ahead(self, tenant: str) -> int:
        """Streams that would run before one that joins its tenant's line now."""
        own = len(self._lines.get(tenant, ()))
        return min(self._streams, own + (own + 1) * (len(self._lines) - (own > 0)))

    def add(self, stream: Stream) -> None:
        """Put a stream at the end of its tenant's line."""
        line = self._lines.get(stream.tenant)
        if line is None:
            line = self._lines[stream.tenant] = deque()
        line.append(stream)
        self._streams += 1

    def remove(self, stream: Stream) -> None:
        """Take a stream out of its line, when it is in it."""
        line = self._lines.get(stream.tenant)
        if line is not None and stream in line:
            line.remove(stream)
            self._streams -= 1
            if not line:
                del self._lines[stream.tenant]

    def front(self, most: int) -> deque[Stream]:
        """Take out the streams that are next, one of each tenant in turn, so many at most."""
        lines = list(self._lines.values())
        front: deque[Stream] = deque()
        while lines and len(front) < most:
            for line in lines[: most - len(front)]:
                front.append(line.popleft())
            lines = [line for line in lines if line]
        self._streams -= len(front)
        return front

    def put_back(self, left: Iterable[Stream], served: Iterable[Stream]) -> None:
        """Put streams back that :meth:`front` took out and that do not run, in their order.

        Tenants of those that do are behind the others from now on.
        """
        for stream in reversed(list(left)):
            self._lines[stream.tenant].appendleft(stream)
            self._streams += 1
        for tenant in dict.fromkeys(stream.tenant for stream in served):
            self._lines[tenant] = self._lines.pop(tenant)
        self._lines = {tenant: line for tenant, line in self._lines.items() if line}
