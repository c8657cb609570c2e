"""A session's way to its daemon: one DEALER socket at a time, made anew when the connection is lost.

The only client module with zmq. :meth:`Link.turn` moves whatever can move and never waits; the drivers wait, on
:attr:`Link.watched`, until there is something to move.
"""

import logging
import os
from collections import deque
from collections.abc import Callable

import zmq
from zmq.utils.monitor import parse_monitor_message

from recurd.errors import Code, RecurdError, Refused
from recurd.keepalive import keepalive
from recurd.keys import Credentials, is_key
from recurd.session import Session

_log = logging.getLogger("recurd.client")

#: Far above any result there should be: a bound on what a strange daemon can make us allocate.
MAX_FRAME_BYTES = 1 << 30
#: Between looks whether the daemon's machine is there, while nothing comes.
KEEPALIVE_SECONDS = 5

_OPTIONS = {
    zmq.LINGER: 0,  # what is unanswered is sent again on the next connection
    zmq.MAXMSGSIZE: MAX_FRAME_BYTES,
    zmq.RCVHWM: 10_000,  # answers are bounded by what was asked
    zmq.HANDSHAKE_IVL: 5_000,
    zmq.RECONNECT_IVL: 50,  # until the first connection; after that a lost one costs the socket
    zmq.RECONNECT_IVL_MAX: 1_000,
    **keepalive(KEEPALIVE_SECONDS),
}


#: Of a socket's monitor: those that :func:`failed_handshake` is asked about.
HANDSHAKE_EVENTS = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_EVENTS = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class Link:
    """Owns the context, the socket and its monitor. Not thread-safe: one driver, one thread."""

    def __init__(
        self,
        endpoint: str,
        session: Session,
        watch: Callable[[list[int]], None] | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        """``watch`` is told which file descriptors to wait for: none before sockets are closed, theirs when made."""
        self._endpoint = self._connected_to = endpoint
        self._session = session
        self._options = _OPTIONS if credentials is None else _OPTIONS | credentials.options()
        self._credentials = credentials
        self._watch = watch or _ignore
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._outbox: deque[bytes] = deque()

    @property
    def endpoint(self) -> str:
        """Where the daemon is: as it was given, or where the one there has sent us on to."""
        redirect = self._session.redirect
        return self._endpoint if redirect is None or redirect.endpoint is None else redirect.endpoint

    @property
    def watched(self) -> list[tuple[zmq.Socket[bytes], int]]:
        """Sockets and what to poll them for."""
        if self._socket is None or self._monitor is None:
            return []
        return [(self._socket, zmq.POLLIN | (zmq.POLLOUT if self._outbox else 0)), (self._monitor, zmq.POLLIN)]

    def turn(self, now: float) -> None:
        """Receive and send until nothing moves any more."""
        session = self._session
        moving = True
        while moving:
            moving = self._receive(now)
            if self._is_lost():
                moving |= self._receive(now)  # what came before the loss
                session.disconnected(now)
            if not session.is_connected:
                self._drop()
            if session.wants_connection(now):
                self._connect(now)
            moving |= self._send(now)

    def close(self) -> None:
        """Let go of everything; what is in the socket is lost."""
        self._drop()
        self._context.term()

    def _connect(self, now: float) -> None:
        socket = self._context.socket(zmq.DEALER)
        for option, value in self._options.items():
            socket.setsockopt(option, value)
        redirect = self._session.redirect
        if self._credentials is not None and redirect is not None and is_key(redirect.server_key or ""):
            socket.setsockopt(zmq.CURVE_SERVERKEY, (redirect.server_key or "").encode())
        monitor = socket.get_monitor_socket(_EVENTS)
        try:
            socket.connect(self.endpoint)
        except zmq.ZMQError as error:
            socket.disable_monitor()
            monitor.close()
            socket.close()
            self._session.end(RecurdError(f"'{self.endpoint}' cannot be connected to: {error.strerror}"))
            return
        self._session.trouble = self._session.trouble or no_permission(self.endpoint)
        self._socket, self._monitor, self._connected_to = socket, monitor, self.endpoint
        self._session.connected(now)
        self._watch([socket.fileno(), monitor.fileno()])

    def _drop(self) -> None:
        socket, monitor = self._socket, self._monitor
        self._socket = self._monitor = None
        self._outbox.clear()
        if socket is not None and monitor is not None:
            self._watch([])
            socket.disable_monitor()
            monitor.close()
            socket.close()
            if self._session.error is None:
                _log.info("connection to %s lost; making one to %s", self._connected_to, self.endpoint)

    def _is_lost(self) -> bool:
        lost = False
        while self._monitor is not None:
            try:
                message = self._monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            event = parse_monitor_message(message)
            if event["event"] == zmq.EVENT_DISCONNECTED:
                lost = True
            else:
                self._on_failed_handshake(event["event"], event["value"])
        return lost

    def _on_failed_handshake(self, event: int, value: int) -> None:
        """What another try would not help ends the session; the rest is told when nobody wants to wait any longer."""
        error = failed_handshake(event, value, self.endpoint, self._credentials)
        if error is not None:
            self._session.end(error)
        elif self._credentials is not None:
            self._session.trouble = (
                "the connection breaks off in the handshake: is it the server's right key, and does it take keys there?"
            )
        else:
            self._session.trouble = (
                "the connection breaks off at once: does it want keys (--key, --server-key), is it a recurd daemon?"
            )

    def _receive(self, now: float) -> bool:
        """Hand every frame that is there to the session; whether there was one."""
        socket, session, moved = self._socket, self._session, False
        while socket is not None:
            try:
                parts = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            moved = True
            session.receive(parts[0] if len(parts) == 1 else b"", now)  # the protocol knows only single frames
        return moved

    def _send(self, now: float) -> bool:
        """Send as much as the socket takes; whether anything went out."""
        moved = False
        while self._socket is not None:
            if not self._outbox:
                self._outbox.extend(self._session.frames_to_send(now))
            if not self._outbox or not self._session.is_connected:
                break
            try:
                self._socket.send(self._outbox[0], zmq.NOBLOCK)
            except zmq.Again:
                break
            self._outbox.popleft()
            moved = True
        return moved


def no_permission(endpoint: str) -> str:
    """What keeps us from an ipc endpoint whose file says who may connect; empty when nothing does."""
    path = endpoint.removeprefix("ipc://")
    if path == endpoint or path.startswith("@"):
        return ""
    try:
        os.stat(path)
    except PermissionError:
        allowed = False
    except OSError:
        return ""  # no daemon, so far
    else:
        allowed = os.access(path, os.W_OK, effective_ids=True)
    return "" if allowed else f"this user may not write to {path} (is it in the daemon's group?)"


def failed_handshake(event: int, value: int, endpoint: str, credentials: Credentials | None) -> Refused | None:
    """Why a daemon does not let us in; ``None`` when another try may help."""
    where = f"the daemon at {endpoint}"
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and credentials is not None:
        return Refused(Code.FORBIDDEN, f"{where} does not know this client's key ({credentials.pair.public})")
    if event != zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL or value != zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
        return None
    if credentials is None:
        text = f"{where} wants to know who connects: give key and server_key (--key, --server-key)"
    else:
        text = f"{where} takes no keys there: leave key and server_key out, if it is the right one"
    return Refused(Code.FORBIDDEN, text)


def _ignore(descriptors: list[int]) -> None:
    pass
