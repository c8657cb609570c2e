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

    def unpack(self, payload: wire.Buffer) -> wire.Buffer:
        """The row of a payload. Raises :class:`Refused` (``state_mismatch``) for that of another model."""
        if len(payload) >= HASH_BYTES and payload[:HASH_BYTES] != self._hash:
            raise Refused(
                Code.STATE_MISMATCH,
                f"a state of state hash {bytes(payload[:4]).hex()}... is not one of {self._hash[:4].hex()}...: other "
                "weights, or states of other names, types or shapes",
            )
        if len(payload) != HASH_BYTES + self.row_bytes:
            raise Refused(
                Code.STATE_MISMATCH,
                f"a state of this model takes {HASH_BYTES + self.row_bytes} bytes with its hash, {len(payload)} came",
            )
        return payload[HASH_BYTES:]

    # --- as arrays ---

    def split(self, row: wire.Buffer) -> dict[str, Array]:
        """The states of a row by name, in the contract's order; the arrays are the caller's own."""
        states = {
            state.name: np.frombuffer(row, kind, math.prod(state.shape), start).reshape(state.shape).copy()
            for state, kind, start in self._places
        }
        return {state.name: states[state.name] for state in self._states}

    def join(self, states: Mapping[str, npt.ArrayLike]) -> bytes:
        """The row of states by name. Numbers are converted where that keeps their meaning.

        Raises:
            TypeError: something that is no such number.
            ValueError: states of other names or shapes.
        """
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
