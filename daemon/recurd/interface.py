"""What the threaded and the asyncio client share: what their objects tell, and how a call becomes a request."""

import math
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

    def __init__(self, writer: Writer, session: Session) -> None:
        self._writer = writer
        self._session = session

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
        """The stream's fresh starts so far: openings with mode ``new``, resets, expiries."""
        return self._writer.backlog.generation

    @property
    def last_seq(self) -> int:
        """Number of the chunk or reset up to which everything is answered."""
        return self._writer.backlog.last_seq

    @property
    def fresh(self) -> bool:
        """Whether no step has been taken since the fresh start, as far as answers have come."""
        return self._writer.fresh

    @property
    def last_fresh(self) -> bool:
        """Whether the chunk answered last started from the initial state."""
        return self._writer.last_fresh

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
        if len(payload.data) + wire.HEADER_BYTES > self._max_message_bytes:
            raise ValueError(f"a chunk of {payload.steps} steps is over the daemon's {self._max_message_bytes} bytes")
        return payload

    @property
    def _max_message_bytes(self) -> int:
        assert self._session.welcome is not None  # as above
        return self._session.welcome.max_message_bytes

    def _no_room(self, seconds: float | None) -> Unanswered:
        return Unanswered(f"stream '{self.name}' has too many unanswered chunks; no room within {seconds or 0:g} s")


class Connection:
    """A client, as far as it does not depend on threads or asyncio."""

    def __init__(self, endpoint: str, token: Any, now: float, timeout_seconds: float, queue_limit: int) -> None:
        self.endpoint = endpoint
        self._session = Session(token, now)
        self._timeout_seconds = timeout_seconds
        self._queue_limit = queue_limit

    @property
    def server(self) -> wire.Welcome:
        """What the daemon last said of itself: version, epoch, tenant, limits, device."""
        assert self._session.welcome is not None  # a client is handed out when it is connected
        return self._session.welcome

    @property
    def models(self) -> dict[str, Any]:
        """The public contracts of the daemon's models, by name."""
        return self.server.models

    def _request(self, name: str, model: str | None, mode: Mode, idle_timeout_seconds: float | None) -> wire.Open:
        if mode not in get_args(Mode):
            raise ValueError(f"mode is one of {', '.join(get_args(Mode))}, not '{mode}'")
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
        return Unanswered(f"no daemon answered at {self.endpoint} within {self._timeout_seconds:g} s")


def no_answer(what: str, seconds: float | None) -> Unanswered:
    """The error of a call that has waited long enough."""
    return Unanswered(f"{what} was not answered within {seconds or 0:g} s")


def closed_error() -> RecurdError:
    """The error of a call on a closed client."""
    return RecurdError(CLOSED)
