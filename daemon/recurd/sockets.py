"""The sockets a daemon binds: their options, and the order in which endpoints get them."""

import fcntl
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import zmq

from recurd import config
from recurd.auth import Gate
from recurd.errors import AddressError
from recurd.keepalive import keepalive

Socket = zmq.Socket[bytes]
Context = zmq.Context[zmq.Socket[bytes]]


def is_tcp(endpoint: str) -> bool:
    """Whether keys guard an endpoint (where there are any), and not the permissions of a file."""
    return endpoint.startswith("tcp://")


def open_socket(
    context: Context, kind: int, settings: config.Config, options: Mapping[zmq.SocketOption, int]
) -> Socket:
    """A socket that is not bound yet, with what is the same for all of a daemon's, and ``options``."""
    common = {
        zmq.RCVHWM: settings.zeromq.receive_high_water_mark,
        zmq.BACKLOG: settings.zeromq.backlog,
        zmq.HANDSHAKE_IVL: int(settings.timeouts.handshake_seconds * 1000),
        **keepalive(settings.timeouts.keepalive_seconds),
    }
    socket = context.socket(kind)
    for option, value in (common | dict(options)).items():
        socket.setsockopt(option, value)
    return socket


def bind(socket: Socket, endpoints: Sequence[str], gate: Gate | None) -> list[str]:
    """Bind a socket to all of them; the endpoints as they were bound (a port 0 resolved).

    Where there is a gate, the tcp endpoints take only whom it lets in. Raises :class:`AddressError`.
    """
    bound = {}
    # An endpoint has the options that the socket has when it is bound: ipc's are guarded by permissions, not by keys.
    for endpoint in sorted(endpoints, key=is_tcp):
        if gate is not None and is_tcp(endpoint):
            gate.secure(socket)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise AddressError(f"cannot bind {endpoint}: {os.strerror(error.errno or 0)}") from error
        bound[endpoint] = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    return [bound[endpoint] for endpoint in endpoints]


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def lock(endpoints: Sequence[str], stack: ExitStack) -> None:
    """Hold a lock beside every ipc path: binding one that another process has bound takes it away without an error.

    Raises :class:`AddressError`.
    """
    for endpoint in endpoints:
        path = endpoint.removeprefix("ipc://")
        if not path.startswith("/"):
            continue
        try:
            # Whoever may read it could hold it too.
            file = stack.enter_context(open(f"{path}.lock", "w", opener=_private))  # noqa: SIM115  # the stack closes it
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AddressError(f"cannot bind ipc://{path}: another process serves it") from error
        except OSError as error:
            raise AddressError(f"cannot bind ipc://{path}: {error.strerror}") from error
