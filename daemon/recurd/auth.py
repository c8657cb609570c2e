"""Who may connect: CURVE on the tcp endpoints, and the one who decides about keys (ZAP, rfc.zeromq.org/spec/27).

libzmq lets in whoever encrypts unless somebody decides, asks nobody where the socket has no domain, and gives an
endpoint the options that its socket has when it is bound. So: the domain is set *and* enforced, the gate stands before
anything is bound, ipc endpoints (which files' permissions guard) are bound before the socket becomes a CURVE server,
and :meth:`Gate.check` tries it at every tcp endpoint before anybody is served.

pyzmq's own authenticator is not used: it answers from an event loop on another thread, lets in what does not
authenticate at all, and only logs what it cannot read.
"""

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from recurd import config
from recurd.errors import AuthError, KeyFileError
from recurd.keys import PUBLIC_SUFFIX, Credentials, Pair, is_key, read_pair, read_public
from recurd.stats import Stats
from recurd.tenants import LOCAL

_ADDRESS = "inproc://zeromq.zap.01"
_VERSION = b"1.0"
_DOMAIN = b"recurd"
#: Handshakes decided before the loop goes on.
_ANSWERS_A_TURN = 32
_CHECK_SECONDS = 5.0
#: In a path: the folder systemd puts credentials into (LoadCredential=).
_CREDENTIALS = "$CREDENTIALS_DIRECTORY"


def read(settings: config.Auth, sections: Mapping[str, config.Tenant]) -> tuple[Pair | None, dict[str, str] | None]:
    """The daemon's keys, and tenants by public key; ``None`` without authentication.

    Raises :class:`KeyFileError` for a file that is not good, and :class:`AuthError` for a key or name that cannot be.
    """
    if not settings.key:
        return None, None
    return _read_server(settings), _read_users(settings, sections)


def _read_server(settings: config.Auth) -> Pair:
    path = settings.key
    if path.startswith(_CREDENTIALS):
        folder = os.environ.get(_CREDENTIALS[1:])
        if folder is None:
            raise AuthError(f"auth.key: {_CREDENTIALS} is not set; LoadCredential= of the service sets it")
        path = folder + path.removeprefix(_CREDENTIALS)
    return read_pair(Path(path))


def _read_users(settings: config.Auth, sections: Mapping[str, config.Tenant]) -> dict[str, str]:
    """A ``NAME.key`` file is tenant NAME's, and the key that a section names is its own."""
    users: dict[str, str] = {}
    for path in _key_files(settings.clients):
        name = path.name.removesuffix(PUBLIC_SUFFIX)
        _add(users, read_public(path), name, str(path))
    for name, section in sections.items():
        if section.key:
            if not is_key(section.key):
                raise AuthError(f"tenants.{name}.key: '{section.key}' is not 40 characters of Z85")
            _add(users, section.key, name, f"tenants.{name}.key")
    return users


def _key_files(directory: str) -> list[Path]:
    if not directory:
        return []
    try:
        return sorted(path for path in Path(directory).iterdir() if path.name.endswith(PUBLIC_SUFFIX))
    except OSError as error:
        raise KeyFileError(f"{directory}: cannot be read: {error.strerror}") from error


def _add(users: dict[str, str], key: str, name: str, place: str) -> None:
    if name == LOCAL or not config.TENANT_NAME.fullmatch(name):
        raise AuthError(f"{place}: '{name}' cannot be the name of a tenant with a key")
    if users.setdefault(key, name) != name:
        raise AuthError(f"{place}: tenant '{users[key]}' has this key already")


class Gate:
    """Decides about the keys of those who want to connect. Owns ZAP's socket of its context; on the loop's thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: Pair, stats: Stats, stack: ExitStack) -> None:
        self._context = context
        self._keys = keys
        self._stats = stats
        #: Public keys that are let in.
        self.allowed: frozenset[str] = frozenset()
        self.socket = stack.enter_context(context.socket(zmq.REP))
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(_ADDRESS)

    def answer(self) -> None:
        """Decide about who is waiting, up to a bound."""
        for _ in range(_ANSWERS_A_TURN):
            try:
                request = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.socket.send_multipart(self._decide(request))

    def _decide(self, request: list[bytes]) -> list[bytes]:
        request_id = request[1] if len(request) > 1 else b""
        key = ""
        if len(request) == 7 and request[0] == _VERSION and request[2] == _DOMAIN and request[5] == b"CURVE":
            key = z85.encode(request[6]).decode()
        if key and key in self.allowed:
            return [_VERSION, request_id, b"200", b"OK", key.encode(), b""]
        self._stats.auth_failures += 1
        return [_VERSION, request_id, b"400", b"this key is not known here", b"", b""]

    def secure(self, socket: zmq.Socket[bytes]) -> None:
        """Let in only whom the gate knows, at every endpoint of a socket that is bound from now on."""
        socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
        # Without it everybody is let in where the gate is not there.
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret.encode())

    def check(self, endpoint: str, kind: int = zmq.DEALER) -> None:
        """Try at an endpoint that a known key is let in and another one is not. Raises :class:`AuthError`.

        ``kind``: of the sockets that connect to it. All others are kept out meanwhile.
        """
        stranger, friend = (Pair(*(key.decode() for key in zmq.curve_keypair())) for _ in range(2))
        allowed, failures = self.allowed, self._stats.auth_failures
        self.allowed = frozenset({friend.public})
        try:
            answers = [self._knock(_reachable(endpoint), kind, pair) for pair in (stranger, friend)]
        finally:
            self.allowed, self._stats.auth_failures = allowed, failures
        if answers[0] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            raise AuthError(f"{endpoint}: a key that is not known was let in")
        if answers != [zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_SUCCEEDED]:
            raise AuthError(f"{endpoint}: nobody decides who may connect: a known key was not let in")

    def _knock(self, endpoint: str, kind: int, pair: Pair) -> int | None:
        """How a handshake ends; ``None`` when it does not within some seconds."""
        end = time.monotonic() + _CHECK_SECONDS
        with self._context.socket(kind) as client:
            client.setsockopt(zmq.LINGER, 0)
            for option, value in Credentials(pair, self._keys.public).options().items():
                client.setsockopt(option, value)
            monitor = client.get_monitor_socket(_DECIDED)
            try:
                client.connect(endpoint)
                while (left := end - time.monotonic()) > 0:
                    ready = dict(zmq.zmq_poll([(self.socket, zmq.POLLIN), (monitor, zmq.POLLIN)], int(left * 1000) + 1))
                    if self.socket in ready:
                        self.answer()
                    if monitor in ready:
                        return int(parse_monitor_message(monitor.recv_multipart())["event"])
            finally:
                client.disable_monitor()
                monitor.close()
        return None


_DECIDED = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL


def _reachable(endpoint: str) -> str:
    """An address as which a bound endpoint can be connected to."""
    return endpoint.replace("://0.0.0.0:", "://127.0.0.1:").replace("://[::]:", "://[::1]:")


def user_of(frame: zmq.Frame) -> str:
    """The key that the gate let in with whom a received frame is from; empty: nobody was asked about it (ipc)."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return ""
