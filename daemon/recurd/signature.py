"""What a model takes and gives, as a client needs it: arrays <-> payloads, checked against the public contract.

Made from the contract that WELCOME tells (a dictionary, ``contract.Contract.public()``). Knows no onnx, so that a
client needs numpy and msgspec alone.
"""

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from recurd import wire
from recurd.errors import Code, Refused
from recurd.layout import HASH_BYTES, Layout

Array = npt.NDArray[Any]
#: One head: its array. Several heads: a dictionary of arrays by head name.
Result = Array | dict[str, Array]


class Payload(NamedTuple):
    """What one record says, ready for the wire: a chunk unless ``type`` says otherwise."""

    data: bytes
    steps: int
    width: int
    dtype: wire.Dtype
    type: wire.Type = wire.Type.CHUNK
    #: The operation of a STATE.
    flags: int = 0

    @property
    def starts_afresh(self) -> bool:
        """Whether it makes the stream's generation one higher."""
        return self.type is not wire.Type.CHUNK and wire.starts_afresh(self.type, self.flags)


def _order(type: wire.Type, flags: int = 0, data: bytes = b"") -> Payload:
    """A record without steps."""
    return Payload(data, 0, 0, wire.Dtype.JSON, type, flags)


RESET = _order(wire.Type.RESET)
GET_STATE = _order(wire.Type.STATE, wire.Operation.GET)


def clone(name: str) -> Payload:
    """Asks for a clone of a stream. Raises TypeError."""
    if not isinstance(name, str):
        raise TypeError(f"a stream's name is a string, not {name!r}")
    return _order(wire.Type.STATE, wire.Operation.CLONE, name.encode("utf-8", "surrogatepass"))


class _Input(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    features: tuple[str, ...] = ()


class Head(msgspec.Struct, frozen=True):
    """One output of the model."""

    name: str
    shape: tuple[int, ...]
    per: str = "step"
    labels: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Elements of one step."""
        return math.prod(self.shape)


class _State(msgspec.Struct, frozen=True):
    name: str
    dtype: str
    shape: tuple[int, ...]


class _Contract(msgspec.Struct, frozen=True):
    input: _Input
    heads: tuple[Head, ...]
    causal: bool = True
    states: tuple[_State, ...] = ()
    state_hash: str = ""


class Signature:
    """Input, heads and states of one model. Immutable; shared by all streams of the model."""

    def __init__(self, contract: dict[str, Any]) -> None:
        fields = msgspec.convert(contract, _Contract)
        self.contract = contract
        self._fields = fields
        self.heads = fields.heads
        #: Shape of one step: ``(features,)``, or ``()`` for token ids.
        self.shape = fields.input.shape
        self.width = math.prod(self.shape)
        self.features = fields.input.features
        self._widths = [head.width for head in self.heads]
        self._step_elements = sum(head.width for head in self.heads if head.per == "step")
        self._last_elements = sum(head.width for head in self.heads if head.per != "step")
        #: Whether the results do not depend on how a stream is cut into chunks.
        self.chunk_local = fields.causal and all(head.per == "step" for head in self.heads)
        self._wire_dtype = wire.DTYPES[fields.input.dtype]
        self._dtype = wire.NUMPY_TYPES[self._wire_dtype]
        self.step_bytes = self.width * self._dtype.itemsize

    def payload(self, x: npt.ArrayLike) -> Payload:
        """A chunk ``[steps, *shape]`` as it goes over the wire.

        A model with one feature a step takes ``[steps]`` too. Numbers are converted where that keeps their meaning: any
        real number to float32, integers to int64.

        Raises:
            TypeError: not numbers, or floating-point numbers for a model that takes token ids.
            ValueError: not of that shape.
        """
        try:
            array = np.asarray(x)
        except ValueError:
            raise ValueError("a chunk is a rectangular array of numbers, and the rows of this one differ") from None
        if array.dtype != self._dtype:
            array = self._convert(array)
        if array.shape[1:] != self.shape or array.ndim == 0:
            if self.width != 1 or array.ndim != 1:
                hint = "; one step is x[None]" if array.ndim and array.shape == self.shape else ""
                raise ValueError(f"a chunk of this model is {self._expected()}, this one is {list(array.shape)}{hint}")
            array = array.reshape(-1, *self.shape)
        return Payload(array.tobytes(), len(array), self.width, self._wire_dtype)

    def _convert(self, array: Array) -> Array:
        if array.dtype.kind in "OSU":
            raise TypeError(
                f"a chunk of this model is {self._expected()}, and this one holds something that is no such number "
                "(None, text, an object)"
            )
        if array.dtype.kind not in "biuf" or not np.can_cast(array.dtype, self._dtype, "same_kind"):
            raise TypeError(
                f"this model takes {self._dtype.name}, and {array.dtype} cannot be converted to that safely"
            )
        with np.errstate(over="ignore"):  # becomes infinite, which the daemon refuses with a code of its own
            return array.astype(self._dtype)

    def _expected(self) -> str:
        names = ", ".join(["steps", *map(str, self.shape)])
        return f"[{names}] {self._dtype.name}" + (" (or [steps])" if self.shape == (1,) else "")

    def given(self, operation: wire.Operation, states: Mapping[str, npt.ArrayLike]) -> Payload:
        """A put or reset-to. Raises TypeError, ValueError or :class:`Refused` for what is no state of the model."""
        return _order(wire.Type.STATE, operation, self._layout.pack(self._layout.join(states)))

    @cached_property
    def _layout(self) -> Layout:
        return Layout(self._fields.state_hash, self._fields.states)

    def is_foreign(self, sent: Payload, payload: wire.Buffer) -> bool:
        """Whether the answer to a record is a state of another version of the model."""
        return sent is GET_STATE and len(payload) > HASH_BYTES and not self._layout.is_ours(payload)

    def value(self, sent: Payload, header: wire.Header, payload: wire.Buffer) -> "Result | None":
        """What the answer to a record tells: a chunk's result, the states by name after a get, else nothing.

        Raises :class:`Refused` when the payload is not the contract's.
        """
        if sent.type is wire.Type.CHUNK:
            return self.result(header, payload)
        if sent is not GET_STATE:
            return None
        try:
            return self._layout.split(self._layout.unpack(payload))
        except (TypeError, ValueError) as error:
            raise Refused(Code.BAD_FRAME, f"the states of the contract cannot be read here: {error}") from error

    def result(self, header: wire.Header, payload: wire.Buffer) -> Result:
        """The heads of a RESULT: ``[steps, *shape]`` each, ``[*shape]`` for a head that gives one output a chunk.

        The arrays are the caller's own. Raises :class:`Refused` (``bad_frame``) when the payload is not the contract's.
        """
        dtype = wire.NUMPY_TYPES.get(header.dtype)  # type: ignore[call-overload]  # an IntEnum's keys are found by int
        if dtype is None or self._elements(header.steps) * dtype.itemsize != len(payload):
            raise Refused(Code.BAD_FRAME, "a result came that does not fit the model's contract")
        flat = np.frombuffer(payload, dtype).copy()  # a view would keep the whole frame alive, and be read-only
        if len(self.heads) == 1:
            return _shaped(flat, header.steps, self.heads[0])
        outputs: dict[str, Array] = {}
        start = 0
        for head, width in zip(self.heads, self._widths, strict=True):
            end = start + (header.steps if head.per == "step" else 1) * width
            outputs[head.name] = _shaped(flat[start:end], header.steps, head)
            start = end
        return outputs

    def _elements(self, steps: int) -> int:
        """Elements of a result."""
        return steps * self._step_elements + self._last_elements


def _shaped(flat: Array, steps: int, head: Head) -> Array:
    return flat.reshape((steps, *head.shape) if head.per == "step" else head.shape)
