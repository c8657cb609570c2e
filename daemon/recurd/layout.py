"""A state as it travels: what STATE messages carry, the same for the daemon and its clients.

The first 32 bytes are the state hash of the contract (weights, and name, type and shape of every state), so that no
state is ever taken for one of another model. Behind it stands the *row*: the states of one dtype side by side, the
dtypes in the order in which the contract names them first, each state row-major and little-endian. A row is what the
arenas and the journal hold, so the daemon converts nothing. Knows no onnx, so that a client needs numpy alone.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from recurd import wire
from recurd.errors import Code, Refused

HASH_BYTES = 32

Array = npt.NDArray[Any]


class StreamState(dict[str, Array]):
    """A stream's state: the contract's states by name, ``[*shape]`` each, and of which weights they are.

    Copies are of the same weights, also changed ones (``state | {"h": h}``) and those that were pickled. A state whose
    arrays lay elsewhere is put together with its hash: ``StreamState(np.load("state.npz"), state_hash=...)``.
    """

    def __init__(self, states: Mapping[str, Array], *, state_hash: str) -> None:
        super().__init__(states)
        #: The state hash of the contract whose states these are, in hexadecimal.
        self.state_hash = state_hash

    def copy(self) -> "StreamState":
        """Another one with the same arrays."""
        return StreamState(self, state_hash=self.state_hash)

    def __or__(self, other: Mapping[str, Array]) -> "StreamState":  # type: ignore[override]  # it stays what it is
        return StreamState({**self, **other}, state_hash=self.state_hash)

    def __ror__(self, other: Mapping[str, Array]) -> "StreamState":  # type: ignore[override]  # likewise
        return StreamState({**other, **self}, state_hash=self.state_hash)


class State(Protocol):
    """What is needed of a state (:class:`recurd.contract.State`, or a client's notion of it)."""

    @property
    def name(self) -> str:
        """Its name in the contract."""
        ...

    @property
    def dtype(self) -> str:
        """Name of its numpy type."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, without a batch axis."""
        ...


class Layout:
    """Where every state of a model stands in a row. Immutable."""

    def __init__(self, state_hash: str, states: Iterable[State]) -> None:
        """``states`` in the contract's order; ``state_hash`` in hexadecimal."""
        self.state_hash = state_hash
        self._hash = bytes.fromhex(state_hash)
        self._states = tuple(states)
        dtypes = dict.fromkeys(state.dtype for state in self._states)
        #: State, its type and its first byte in the row.
        self._places: list[tuple[State, np.dtype[Any], int]] = []
        self.row_bytes = 0
        for dtype in dtypes:
            kind = np.dtype(dtype).newbyteorder("<")
            for state in self._states:
                if state.dtype == dtype:
                    self._places.append((state, kind, self.row_bytes))
                    self.row_bytes += math.prod(state.shape) * kind.itemsize

    # --- on the wire ---

    def pack(self, row: bytes) -> bytes:
        """A row as a payload."""
        return self._hash + row

    def is_ours(self, payload: wire.Buffer) -> bool:
        """Whether a payload begins with the state hash of this model."""
        return payload[:HASH_BYTES] == self._hash

    def unpack(self, payload: wire.Buffer) -> wire.Buffer:
        """The row of a payload. Raises :class:`Refused` (``state_mismatch``) for that of another model."""
        if len(payload) >= HASH_BYTES and not self.is_ours(payload):
            raise _mismatch(bytes(payload[:HASH_BYTES]).hex(), self.state_hash)
        if len(payload) != HASH_BYTES + self.row_bytes:
            raise Refused(
                Code.STATE_MISMATCH,
                f"a state of this model takes {HASH_BYTES + self.row_bytes} bytes with its hash, {len(payload)} came",
            )
        return payload[HASH_BYTES:]

    # --- as arrays ---

    def split(self, row: wire.Buffer) -> StreamState:
        """The states of a row by name, in the contract's order; the arrays are the caller's own."""
        states = {
            state.name: np.frombuffer(row, kind, math.prod(state.shape), start).reshape(state.shape).copy()
            for state, kind, start in self._places
        }
        in_order = {state.name: states[state.name] for state in self._states}
        return StreamState(in_order, state_hash=self.state_hash)

    def join(self, states: Mapping[str, npt.ArrayLike]) -> bytes:
        """The row of states by name. Numbers are converted where that keeps their meaning.

        Raises:
            TypeError: something that is no such number.
            ValueError: states of other names or shapes.
            Refused: ``state_mismatch``: a :class:`StreamState` of other weights.
        """
        if isinstance(states, StreamState) and states.state_hash != self.state_hash:
            raise _mismatch(states.state_hash, self.state_hash)
        names = [state.name for state in self._states]
        if not isinstance(states, Mapping) or set(states) != set(names):
            found = ", ".join(map(str, states)) if isinstance(states, Mapping) else type(states).__name__
            raise ValueError(f"a state of this model is a dictionary of {', '.join(names)}, not {found or 'nothing'}")
        return b"".join(_convert(states[state.name], state, kind).tobytes() for state, kind, _ in self._places)

    def is_finite(self, row: wire.Buffer) -> bool:
        """Whether no state of a row holds NaN or infinity."""
        return all(
            kind.kind != "f" or wire.all_finite(np.frombuffer(row, kind, math.prod(state.shape), start))
            for state, kind, start in self._places
        )


def _mismatch(given: str, ours: str) -> Refused:
    text = f"a state of state hash {given[:8]}... is not one of {ours[:8]}...: "
    return Refused(Code.STATE_MISMATCH, text + "other weights, or states of other names, types or shapes")


def _convert(value: npt.ArrayLike, state: State, kind: np.dtype[Any]) -> Array:
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"state '{state.name}' is a rectangular array of numbers, and its rows differ") from None
    if array.shape != state.shape:
        raise ValueError(f"state '{state.name}' is {list(state.shape)}, not {list(array.shape)}")
    if array.dtype.kind not in "biuf" or not np.can_cast(array.dtype, kind, "same_kind"):
        raise TypeError(f"state '{state.name}' is {kind.name}, and {array.dtype} cannot be converted to that safely")
    with np.errstate(over="ignore"):  # becomes infinite, which the daemon refuses with a code of its own
        return array.astype(kind)
