"""Results for others than their sender: an XPUB socket, and who may subscribe to what.

A message is two frames: the topic ``tenant/model/stream`` with a NUL at its end, so that no stream's topic is the
beginning of another's, and the RESULT as its sender gets it. Nothing is promised: what a subscriber is too slow for is
dropped for it alone, and the numbers in the headers show what is missing.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import zmq

from recurd import config, wire
from recurd.auth import Gate, user_of
from recurd.errors import AddressError
from recurd.sockets import Context, bind, is_tcp, lock, open_socket
from recurd.stats import Stats
from recurd.streams import Stream
from recurd.tenants import LOCAL, Tenant, Tenants

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

#: Subscriptions that are looked at before the loop goes on.
_SUBSCRIPTIONS_A_TURN = 256
#: Bytes of a topic besides the stream's name, at most.
_TOPIC_BYTES = 512
#: Topics that are counted; beyond, it is not known any more whether anybody is there.
_MAX_TOPICS = 100_000
#: Refusals that are logged between two looks; all are counted.
_LOGGED_REFUSALS = 20
_SUBSCRIBE = 1


class Publisher:
    """Publishes results to those who may have them. Owns the XPUB socket; on the loop's thread."""

    def __init__(
        self,
        context: Context,
        settings: config.Config,
        gate: Gate | None,
        *,
        tenants: Tenants,
        stats: Stats,
        log: "FilteringBoundLogger",
        stack: ExitStack,
    ) -> None:
        self._context = context
        self._settings = settings
        self._gate = gate
        self._tenants = tenants
        self._stats = stats
        self._log = log
        # Where nobody is asked who it is: over ipc, and everywhere without authentication.
        self._unnamed = LOCAL if gate is None or not all(map(is_tcp, settings.publish.bind)) else ""
        lock(settings.publish.bind, stack)
        self.socket = self._new_socket()
        stack.callback(self._close)
        self.endpoints: Sequence[str] = bind(self.socket, settings.publish.bind, gate)
        self._is_bound = True
        # Subscriptions by topic and user, refused ones too: how a connection that breaks ends does not tell them apart.
        self._topics: dict[bytes, Counter[str]] = {}
        self._has_too_many = False
        self._logged = 0
        #: Tenants who have subscribed to something, by user, as they were then.
        self._subscribers: dict[str, Tenant] = {}

    def _new_socket(self) -> zmq.Socket[bytes]:
        options = {
            zmq.LINGER: 0,
            # Every subscription is handed to us, and holds for nobody before we say so.
            zmq.XPUB_MANUAL: 1,
            zmq.MAXMSGSIZE: _TOPIC_BYTES + self._settings.limits.name_bytes,
            zmq.SNDHWM: self._settings.publish.high_water_mark,
        }
        return open_socket(self._context, zmq.XPUB, self._settings, options)

    def _close(self) -> None:
        self.socket.close()

    @property
    def wanted(self) -> bool:
        """Whether anybody is there who might want results."""
        return bool(self._topics) or self._has_too_many

    def take_subscriptions(self) -> None:
        """Allow or refuse what was subscribed to since the last call, up to a bound."""
        for _ in range(_SUBSCRIPTIONS_A_TURN):
            try:
                message = self.socket.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            data = message.bytes
            topic = data[1:]
            if not data or data[0] > _SUBSCRIBE:
                continue  # a message upstream, which is nothing here
            user = user_of(message)
            if data[0] == _SUBSCRIBE:
                self._count(topic, user or self._unnamed)
                self._subscribe(topic, user or self._unnamed)
            else:
                self._unsubscribe(topic, user)

    def _subscribe(self, topic: bytes, user: str) -> None:
        tenant = self._tenants.of(user)
        if tenant is not None and tenant.may_subscribe(topic):
            self._subscribers[user] = tenant
            self.socket.setsockopt(zmq.SUBSCRIBE, topic)  # for the connection it came on
            return
        self._stats.subscriptions_refused += 1
        self._logged += 1
        if self._logged > _LOGGED_REFUSALS:
            return
        name = "" if tenant is None else tenant.name
        self._log.warning("subscription_refused", tenant=name, topic=topic.decode(errors="replace"))

    def _count(self, topic: bytes, user: str) -> None:
        if topic in self._topics or len(self._topics) < _MAX_TOPICS:
            self._topics.setdefault(topic, Counter())[user] += 1
        else:
            self._has_too_many = True

    def _unsubscribe(self, topic: bytes, user: str) -> None:
        """``user`` is ``""`` for a connection that has ended, which had the topic; else he may never have had it."""
        users = self._topics.get(topic, Counter())
        who = user or next(iter(users), "")
        users[who] -= 1
        if users[who] <= 0:
            del users[who]
        if not users:
            self._topics.pop(topic, None)
        self.socket.setsockopt(zmq.UNSUBSCRIBE, topic)

    def publish(self, results: Iterable[tuple[Stream, wire.Record]]) -> None:
        """Send results to whoever has subscribed to them."""
        if not self._is_bound:
            return
        send = self.socket.send_multipart
        for stream, record in results:
            send((topic_of(stream), wire.frame(record)), zmq.NOBLOCK)
            self._stats.results_published += 1

    def rights_changed(self, poller: zmq.Poller) -> None:
        """Other tenants, rights or keys hold from now on; ``poller`` waits for the socket.

        libzmq can take a subscription from nobody but who sent the last one. Where somebody may not have what it has,
        all connections are closed, and those who may come back by themselves.
        """
        if not self._is_bound or all(self._tenants.of(user) == was for user, was in self._subscribers.items()):
            return
        poller.unregister(self.socket)
        self.socket.close()
        self._topics.clear()
        self._has_too_many = False
        self._subscribers.clear()
        self._is_bound = False
        self.look(poller)

    def look(self, poller: zmq.Poller) -> None:
        """Now and then. Bind again, when that is still to be done: a socket that is closed keeps its port a moment."""
        self._logged = 0
        if self._is_bound:
            return
        self.socket = self._new_socket()
        try:
            bind(self.socket, self.endpoints, self._gate)
        except AddressError as error:
            self.socket.close()
            self._log.warning("publish_waits", reason=str(error))
            return
        poller.register(self.socket, zmq.POLLIN)
        self._is_bound = True


def topic_of(stream: Stream) -> bytes:
    """The topic of a stream's results."""
    return f"{stream.tenant}/{stream.lane.name}/{stream.name}\0".encode()
