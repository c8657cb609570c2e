"""Published results, as somebody else than their sender gets them: ``recurd.subscribe``."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import zmq
from zmq.utils.monitor import parse_monitor_message

from recurd import wire
from recurd.errors import RecurdError, Refused, Unanswered
from recurd.interface import check_endpoint
from recurd.keepalive import keepalive
from recurd.keys import read_credentials
from recurd.link import HANDSHAKE_EVENTS, KEEPALIVE_SECONDS, MAX_FRAME_BYTES, failed_handshake
from recurd.signature import Result, Signature


@dataclass(frozen=True, slots=True)
class Publication:
    """One published result."""

    tenant: str
    model: str
    stream: str
    header: wire.Header
    #: Its elements as on the wire: head after head, each ``[steps, *shape]``.
    values: npt.NDArray[Any]

    @property
    def seq(self) -> int:
        """Number of the chunk in its stream; one that is left out was lost on the way, or was a reset."""
        return self.header.seq

    @property
    def generation(self) -> int:
        """The stream's fresh starts so far."""
        return self.header.generation

    @property
    def fresh(self) -> bool:
        """Whether the chunk started from the initial state."""
        return bool(self.header.flags & wire.Flag.FRESH)

    def result(self, contract: dict[str, Any]) -> Result:
        """The heads, as ``push`` gives them to the sender; ``contract`` as in ``client.models``."""
        return Signature(contract).result(self.header, self.values.tobytes())


class Subscriber:
    """An iterator over what is published; a context manager. Made by :func:`subscribe`, used by one thread."""

    def __init__(self, endpoint: str, topics: tuple[str, ...], credentials: Any, timeout_seconds: float | None) -> None:
        self.endpoint = endpoint
        self._credentials = credentials
        self._timeout = timeout_seconds
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        keys = {} if credentials is None else credentials.options()
        for option, value in (keepalive(KEEPALIVE_SECONDS) | keys).items():
            self._socket.setsockopt(option, value)
        for topic in topics:
            self._socket.subscribe(topic[:-1] if topic.endswith("*") else topic + "\0")
        self._monitor = self._socket.get_monitor_socket(HANDSHAKE_EVENTS)
        self._socket.connect(endpoint)

    def __iter__(self) -> Iterator[Publication]:
        return self

    def __next__(self) -> Publication:
        """The next result. Raises :class:`Unanswered` when none comes in time, :class:`Refused` for a key not known."""
        milliseconds = -1 if self._timeout is None else int(self._timeout * 1000)
        while True:
            ready = dict(zmq.zmq_poll([(self._socket, zmq.POLLIN), (self._monitor, zmq.POLLIN)], milliseconds))
            if self._monitor in ready:
                event = parse_monitor_message(self._monitor.recv_multipart())
                error = failed_handshake(event["event"], event["value"], self.endpoint, self._credentials)
                if error is not None:
                    raise error
            elif not ready:
                raise Unanswered(f"nothing was published at {self.endpoint} within {self._timeout:g} s")
            if self._socket in ready:
                return _publication(self._socket.recv_multipart())

    def close(self) -> None:
        """Subscribe to nothing any more."""
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._monitor.close()
            self._socket.close()
            self._context.term()

    def __enter__(self) -> "Subscriber":
        return self

    def __exit__(
        self, type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def subscribe(
    endpoint: str,
    *topics: str,
    timeout_seconds: float | None = None,
    key: str | Path | None = None,
    server_key: str | Path | None = None,
) -> Subscriber:
    """Results that a daemon publishes (``[publish]``), as they come.

    A topic is ``tenant/model/stream``, or the beginning of some and a ``*``: ``gateway-7/pump/*``. The daemon sends
    what one's tenant may have; it does not answer a subscription that is refused. What one is too slow for is left out,
    and what was published before one was connected too. ``timeout_seconds``: longest wait for the next one.

    Raises:
        KeyFileError: one of the keys cannot be read, or is not good.
        RecurdError: no endpoint, or no topic.
    """
    check_endpoint(endpoint)
    if not topics:
        raise RecurdError("name at least one topic: tenant/model/stream, or the beginning of some and a *")
    return Subscriber(endpoint, topics, read_credentials(key, server_key), timeout_seconds)


def _publication(frames: list[bytes]) -> Publication:
    """Raises :class:`RecurdError` for what no daemon publishes."""
    try:
        topic, frame = frames
        tenant, model, stream = topic.rstrip(b"\0").decode().split("/", 2)
        header, payload = wire.decode(frame)
        values = np.frombuffer(payload, wire.NUMPY_TYPES[wire.Dtype(header.dtype)])
    except (ValueError, KeyError, Refused) as error:
        raise RecurdError(f"what came is no published result: {error}") from error
    return Publication(tenant, model, stream, header, values)
