"""What the threaded and the asyncio client share: what their objects tell, and how a call becomes a request."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from typing import Any, get_args

import numpy.typing as npt

from recurd import wire
from recurd.errors import RecurdError, Unanswered
from recurd.session import Session
from recurd.signature import Payload, Signature
from recurd.writer import Mode, Writer

CLOSED = "the client is closed"


class OpenStream:
    """One open stream, as far as it does not depend on threads or asyncio."""

    def __init__(self, writer: Writer, connection: "Connection") -> None:
        self._writer = writer
        self._connection = connection
        self._session = connection._session

    @property
    def name(self) -> str:
        """The stream's name."""
        return self._writer.stream

    @property
    def model(self) -> str:
        """Name of the model it belongs to."""
        return self._writer.model

    @property
    def contract(self) -> dict[str, Any]:
        """The model's public contract: inputs, heads, states."""
        return self.signature.contract

    @property
    def generation(self) -> int:
        """The stream's fresh starts so far: openings with mode ``new``, resets (also to a state), expiries."""
        return self._writer.backlog.generation

    @property
    def last_seq(self) -> int:
        """Number of the chunk, reset or other record up to which everything is answered."""
        return self._writer.backlog.last_seq

    @property
    def fresh(self) -> bool:
        """Whether it stands at its initial state, as far as answers have come: no step taken, and no state given."""
        return self._writer.fresh

    @property
    def last_fresh(self) -> bool:
        """Whether the chunk answered last started from the initial state."""
        return self._writer.last_fresh

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection to the daemon at this moment."""
        return self._connection.is_connected

    @property
    def trouble(self) -> str:
        """What holds it up and is waited out: no connection, or what the daemon said last; empty when nothing."""
        return self._connection._trouble(self._writer)

    @property
    def max_chunk_steps(self) -> int:
        """Steps a chunk may have: the daemon's limit, and what fits in a message of its limit."""
        room = self._max_message_bytes - wire.HEADER_BYTES
        return min(self._writer.max_chunk_steps, room // self.signature.step_bytes)

    @property
    def signature(self) -> Signature:
        """The contract as arrays need it: shapes and names of input and heads."""
        assert self._writer.signature is not None  # a stream is handed out when it is open
        return self._writer.signature

    def __repr__(self) -> str:
        state = f"seq {self.last_seq}, generation {self.generation}" if self._writer.error is None else "ended"
        return f"<recurd stream '{self.name}' of model '{self.model}': {state}>"

    def _payload(self, x: npt.ArrayLike) -> Payload:
        """A chunk for the wire. Raises TypeError or ValueError for what the model cannot take."""
        payload = self.signature.payload(x)
        self._check_size(payload, f"a chunk of {payload.steps} steps")
        return payload

    def _given(self, operation: wire.Operation, states: Mapping[str, npt.ArrayLike]) -> Payload:
        """A state for the wire. Raises TypeError, ValueError or :class:`Refused` for what is none of the model."""
        payload = self.signature.given(operation, states)
        self._check_size(payload, "a state of this model")
        return payload

    def _check_size(self, payload: Payload, what: str) -> None:
        if len(payload.data) + wire.HEADER_BYTES > self._max_message_bytes:
            raise ValueError(f"{what} is over the daemon's {self._max_message_bytes} bytes")

    @property
    def _max_message_bytes(self) -> int:
        assert self._session.welcome is not None  # as above
        return self._session.welcome.max_message_bytes

    def _starts_by(self, expires_seconds: float | None) -> float:
        """When it will be too late to start a chunk that is handed in now. Raises TypeError and ValueError."""
        if expires_seconds is None:
            return math.inf
        if not isinstance(expires_seconds, Real):
            raise TypeError(f"expires_seconds is a number, not {expires_seconds!r}")
        if not 0 < expires_seconds <= wire.MAX_EXPIRES_SECONDS:
            raise ValueError(
                f"expires_seconds is more than 0 and at most {wire.MAX_EXPIRES_SECONDS:g}, not {expires_seconds}"
            )
        return self._connection._clock() + expires_seconds

    def _late(self, seconds: float | None, what: str = "the chunk") -> "partial[Unanswered]":
        """What makes the error of a call on this stream that has waited long enough."""
        place = f"{what} keeps its place and must not be sent again"
        return partial(self._connection._no_answer, f"stream '{self.name}'", seconds, place, writer=self._writer)

    def _no_room(self, seconds: float | None) -> Unanswered:
        text = f"stream '{self.name}' has too many unanswered chunks; no room within {seconds or 0:g} s"
        return Unanswered("; ".join(filter(None, [text, self.trouble])))


class Connection:
    """A client, as far as it does not depend on threads or asyncio."""

    def __init__(
        self, endpoint: str, token: Any, clock: Callable[[], float], timeout_seconds: float, queue_limit: int
    ) -> None:
        """``clock``: the session's."""
        check_endpoint(endpoint)
        self._endpoint = endpoint
        self._clock = clock
        self._session = Session(token, clock())
        self._timeout_seconds = timeout_seconds
        self._queue_limit = queue_limit

    @property
    def endpoint(self) -> str:
        """The daemon's address: as it was given, or where the daemon there has sent us on to (``moved``)."""
        redirect = self._session.redirect
        return self._endpoint if redirect is None or redirect.endpoint is None else redirect.endpoint

    @property
    def server(self) -> wire.Welcome:
        """What the daemon last said of itself: version, epoch, tenant, limits, device."""
        assert self._session.welcome is not None  # a client is handed out when it is connected
        return self._session.welcome

    @property
    def models(self) -> dict[str, Any]:
        """The public contracts of the daemon's models, by name."""
        return self.server.models

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection to the daemon at this moment."""
        return self._session.is_ready

    def _request(self, name: str, model: str | None, mode: Mode, idle_timeout_seconds: float | None) -> wire.Open:
        if not isinstance(name, str):
            raise TypeError(f"a stream's name is a string, not {name!r}")
        if not isinstance(model, str | None):
            raise TypeError(f"a model's name is a string, not {model!r}")
        if mode not in get_args(Mode):
            raise ValueError(f"mode is one of {', '.join(get_args(Mode))}, not '{mode}'")
        if idle_timeout_seconds is not None and not (
            isinstance(idle_timeout_seconds, Real) and 0 < idle_timeout_seconds < math.inf
        ):
            raise ValueError(f"idle_timeout_seconds is a number over 0, or None, not {idle_timeout_seconds!r}")
        if model is None:
            if len(self.models) != 1:
                raise ValueError(f"the daemon serves several models, name one: {', '.join(sorted(self.models))}")
            model = next(iter(self.models))
        return wire.Open(stream=name, model=model, mode=mode, idle_timeout_seconds=idle_timeout_seconds)

    def _seconds(self, timeout_seconds: float | None) -> float | None:
        """A call's time-out: its own or the client's; ``None`` for infinite, as threads and asyncio want it."""
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        return None if math.isinf(seconds) else seconds

    def _no_daemon(self) -> Unanswered:
        who = "no daemon answered" if self._session.refusal is None else "the daemon did not let us in"
        text = f"{who} at {self.endpoint} within {self._timeout_seconds:g} s"
        return Unanswered(text + "; " + (self._kept_out or "start one with 'recurd serve'"))

    def _no_answer(self, what: str, seconds: float | None, *notes: str, writer: Writer | None = None) -> Unanswered:
        """The error of a call that has waited long enough, made at that moment; ``writer``: of its stream."""
        text = f"{what} was not answered within {seconds or 0:g} s"
        return Unanswered("; ".join(filter(None, [text, *notes, self._trouble(writer)])))

    def _trouble(self, writer: Writer | None) -> str:
        """What holds up a stream, as far as one knows; may be empty."""
        if self.is_connected:
            return _said(writer.trouble) if writer is not None and writer.trouble else ""
        reason = self._kept_out and f" ({self._kept_out})"
        return f"there is no connection to {self.endpoint} at present{reason}"

    @property
    def _kept_out(self) -> str:
        """Why there is no connection, as far as one knows; may be empty."""
        refusal = self._session.refusal
        return self._session.trouble if refusal is None else _said(str(refusal))


def _said(refusal: str) -> str:
    return f"the daemon said last: {refusal}"


def check_endpoint(endpoint: str) -> None:
    """Hold a daemon's address against the forms there are, before anything is tried. Raises :class:`RecurdError`."""
    scheme, _, address = str(endpoint).partition("://")
    host, _, port = address.rpartition(":")
    is_tcp = scheme == "tcp" and host and port.isascii() and port.isdigit() and 0 < int(port) < 65_536
    if not is_tcp and not (scheme == "ipc" and address.strip("/") and "\0" not in address):
        raise RecurdError(f"'{endpoint}' is neither tcp://host:port nor ipc:///path")


def closed_error() -> RecurdError:
    """The error of a call on a closed client."""
    return RecurdError(CLOSED)
