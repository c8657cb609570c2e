"""The contract: the typed description that an exported model carries, and the check that the file keeps it.

A contract model is plain ONNX that any runtime can run without recurd (docs/contract.md): inputs ``input
[batch, time, ...]``, ``lengths [batch]`` int32 and one per state; outputs one per head and one per state. The contract
itself is JSON in ``metadata_props["recurd.contract"]``, or in a file beside the model (``pump.contract.json`` beside
``pump.onnx``) for models whose file one does not want to touch.

This module knows onnx, not onnxruntime and no framework; the exporter writes with it, the daemon reads with it.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import onnx

from recurd.errors import ContractError

FORMAT = 1
METADATA_KEY = "recurd.contract"
#: Element types of heads: what the protocol carries (wire.Dtype).
HEAD_DTYPES = ("float32", "int64", "float16", "float64", "int32")

Array = npt.NDArray[Any]
#: Sizes of a tensor's axes; ``None`` for batch and time.
Shape = tuple[int | None, ...]


class Tensor(msgspec.Struct, frozen=True):
    """An array in JSON: dtype name, shape, and little-endian row-major bytes (base64 in the text)."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: Array) -> "Tensor":
        """Pack an array."""
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        return cls(array.dtype.name, array.shape, little.tobytes())

    def array(self) -> Array:
        """The array again (read-only)."""
        return np.frombuffer(self.data, np.dtype(self.dtype).newbyteorder("<")).reshape(self.shape)


class Input(msgspec.Struct, frozen=True, kw_only=True):
    """The one input: a chunk of steps."""

    name: str = "input"
    dtype: Literal["float32", "int64"]
    #: Shape of one step, without batch and time: ``[features]``, or ``[]`` for token ids.
    shape: tuple[int, ...]
    #: Names and units of the features, in order; empty when not given.
    features: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    sample_rate_hz: float | None = None
    #: Token ids are in ``[0, classes)``; ``None`` for other inputs.
    classes: int | None = None
    #: The graph itself begins with ``(input - mean) / std``: one number per element of a step, in row-major order;
    #: empty where it takes its input as it is.
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def width(self) -> int:
        """Elements of one step."""
        return int(np.prod(self.shape, dtype=np.int64))


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """One output of the model (predictions, not state)."""

    name: str
    dtype: str
    #: Shape of one step, without batch and time.
    shape: tuple[int, ...]
    #: ``step``: ``[batch, time, ...]``, one output a step. ``last``: ``[batch, ...]``, one a chunk, of its last step.
    per: Literal["step", "last"] = "step"
    labels: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Elements of one step."""
        return int(np.prod(self.shape, dtype=np.int64))


class State(msgspec.Struct, frozen=True, kw_only=True):
    """One state tensor: read from input ``name``, written to output ``output``."""

    name: str
    output: str
    dtype: str
    #: Shape without the batch axis, which stands at ``batch_axis`` of the tensor.
    shape: tuple[int, ...]
    batch_axis: int
    #: Value at a fresh start, of ``shape``; ``None`` means zeros (constant and learned values are both stored).
    initial: Tensor | None = None

    @property
    def width(self) -> int:
        """Elements of one stream's row."""
        return int(np.prod(self.shape, dtype=np.int64))

    def initial_array(self) -> Array:
        """The value at a fresh start, of ``shape``."""
        return np.zeros(self.shape, self.dtype) if self.initial is None else self.initial.array()


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where the model came from."""

    framework: str
    versions: dict[str, str] = {}
    #: Class of the source model, for the reader.
    model: str = ""


class Golden(msgspec.Struct, frozen=True, kw_only=True):
    """A short run from the initial state that must come out the same wherever the model is served.

    ``input`` is ``[batch, time, ...]``, ``lengths`` ``[batch]``; outputs by head, final states by state name, both as
    the model gives them.
    """

    input: Tensor
    lengths: Tensor
    outputs: dict[str, Tensor]
    states: dict[str, Tensor]


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """What was verified at export: the largest absolute error of every check, and the golden run."""

    #: Bound under which each error had to stay: absolute, plus relative to the largest value compared.
    atol: float
    rtol: float
    errors: dict[str, float]
    golden: Golden


class Contract(msgspec.Struct, frozen=True, kw_only=True):
    """The whole description (docs/contract.md)."""

    format: int = FORMAT
    name: str
    version: str = "1"
    input: Input
    lengths: str = "lengths"
    heads: tuple[Head, ...]
    states: tuple[State, ...]
    #: False for models that look ahead inside a chunk (bidirectional): their results depend on how a stream is cut.
    causal: bool = True
    source: Source
    #: SHA-256 over the model's initializers, in order of name.
    weights_sha256: str
    proof: Proof | None = None

    @property
    def state_hash(self) -> str:
        """Hash of all that gives a stored state its meaning: weights, and name, dtype and shape of every state."""
        layout = [(s.name, s.dtype, s.shape) for s in self.states]
        return hashlib.sha256(msgspec.json.encode([self.weights_sha256, layout])).hexdigest()

    @property
    def form(self) -> tuple[Any, ...]:
        """What a client sends and gets: queued chunks and open streams may go over to a model of the same form."""
        heads = [(head.name, head.dtype, head.shape, head.per) for head in self.heads]
        return self.input.dtype, self.input.shape, self.input.classes, heads, self.causal

    @property
    def form_hash(self) -> str:
        """Hash of the form."""
        return hashlib.sha256(msgspec.json.encode(self.form)).hexdigest()

    @property
    def chunk_local(self) -> bool:
        """Whether chunks may be sliced and joined freely: causal, and one output for every step."""
        return self.causal and all(head.per == "step" for head in self.heads)

    def public(self) -> dict[str, Any]:
        """What clients are told: everything but the proof and the initial values, and the state hash."""
        body: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(self, proof=None))
        body["state_hash"] = self.state_hash
        for state in body["states"]:
            state["initial"] = "zeros" if state["initial"] is None else "stored"
        return body


def weights_sha256(model: onnx.ModelProto) -> str:
    """SHA-256 over name, type, shape and little-endian bytes of every initializer, in order of name."""
    digest = hashlib.sha256()
    for tensor in sorted(model.graph.initializer, key=lambda t: t.name):
        array = onnx.numpy_helper.to_array(tensor)
        digest.update(f"{tensor.name}:{array.dtype.name}:{array.shape};".encode())
        digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def attach(model: onnx.ModelProto, contract: Contract) -> None:
    """Put the contract into the model's metadata, replacing one that is there."""
    kept = [p for p in model.metadata_props if p.key != METADATA_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    model.metadata_props.add(key=METADATA_KEY, value=msgspec.json.encode(contract).decode())


def load(path: str | Path) -> tuple[onnx.ModelProto, Contract]:
    """Read a model file and its contract, and check the one against the other.

    Raises :class:`ContractError` in one sentence that names the file.
    """
    path = Path(path)
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except FileNotFoundError as error:
        raise ContractError(f"{path}: there is no such file") from error
    except OSError as error:
        raise ContractError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # protobuf and the checker raise many types for one fact
        raise ContractError(
            f"{path}: not a valid ONNX model (is it the file that recurd export wrote?): {_first_line(error)}"
        ) from error
    try:
        contract = msgspec.json.decode(_contract_text(path, model), type=Contract)
    except OSError as error:
        raise ContractError(f"{path}: its contract cannot be read: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ContractError(f"{path}: its contract cannot be read: {error}") from error
    if contract.format != FORMAT:
        raise ContractError(f"{path}: contract format {contract.format} is not known here, only {FORMAT}")
    try:
        check(model, contract)
    except ContractError as error:
        raise ContractError(f"{path}: {error}") from error
    return model, contract


def _contract_text(path: Path, model: onnx.ModelProto) -> str | bytes:
    sidecar = path.with_suffix(".contract.json")
    if sidecar.exists():
        return sidecar.read_bytes()
    for prop in model.metadata_props:
        if prop.key == METADATA_KEY:
            return str(prop.value)
    raise ContractError(
        f"{path}: has no contract, neither inside nor as {sidecar.name} beside it; export it with 'recurd export'"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def check(model: onnx.ModelProto, contract: Contract) -> None:
    """Hold a model's inputs and outputs against its contract: names, element types and ranks, initial values, hash.

    Raises :class:`ContractError`.
    """
    _check_values(contract)
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = {v.name: v for v in model.graph.input if v.name not in initializers}
    outputs = {v.name: v for v in model.graph.output}
    expected_inputs = {
        contract.input.name: (contract.input.dtype, (None, None, *contract.input.shape)),
        contract.lengths: ("int32", (None,)),
    } | {s.name: (s.dtype, _batched(s)) for s in contract.states}
    expected_outputs = {
        h.name: (h.dtype, (None, None, *h.shape) if h.per == "step" else (None, *h.shape)) for h in contract.heads
    } | {s.output: (s.dtype, _batched(s)) for s in contract.states}
    _check_side("input", inputs, expected_inputs)
    _check_side("output", outputs, expected_outputs)
    found = weights_sha256(model)
    if found != contract.weights_sha256:
        raise ContractError(
            f"the weights are not those of the contract (sha256 {found[:12]}, contract {contract.weights_sha256[:12]})"
        )


def _check_values(contract: Contract) -> None:
    if not contract.heads:
        raise ContractError("the contract names no head")
    types = {head.dtype for head in contract.heads}
    if len(types) > 1:
        raise ContractError(f"the heads are of different types ({', '.join(sorted(types))}); a result has one")
    if contract.input.dtype == "int64" and contract.input.classes is None:
        # The runtime fails on an id the model does not have, and with it every stream of the tick.
        raise ContractError("the input is int64 token ids, and 'classes' does not say how many there are")
    check_names(contract)
    _check_normalization(contract.input)
    _check_states(contract)


def check_names(contract: Contract) -> None:
    """Names are shown on terminals, in logs and on pages: all of them must be printable, the model's not empty.

    Nor may the model's hold a slash, which parts the topics of published results.

    Raises :class:`ContractError`.
    """
    if not contract.name:
        raise ContractError("the model's name is empty")
    if "/" in contract.name:
        raise ContractError(f"the model's name '{contract.name}' holds a '/'")
    names = [contract.name, contract.version, *contract.input.features, *contract.input.units]
    names += [name for head in contract.heads for name in (head.name, *head.labels)]
    names += [state.name for state in contract.states]
    for name in names:
        if not name.isprintable():
            raise ContractError(f"the name {name!a} holds characters that cannot be printed")


def _check_normalization(input: Input) -> None:
    if not (input.mean or input.std):
        return
    if input.dtype != "float32" or not len(input.mean) == len(input.std) == input.width:
        raise ContractError(
            f"the input has {len(input.mean)} means and {len(input.std)} deviations for {input.width} {input.dtype}s"
        )
    if not (np.isfinite([*input.mean, *input.std]).all() and min(input.std) > 0):
        raise ContractError("the input's means must be finite and its deviations finite and positive")


def _check_states(contract: Contract) -> None:
    if not contract.states:
        raise ContractError("the contract names no state; a model without state needs no recurd")
    for head in contract.heads:
        if head.dtype not in HEAD_DTYPES:
            raise ContractError(f"head '{head.name}' is {head.dtype}, heads are {', '.join(HEAD_DTYPES)}")
    for state in contract.states:
        if not 0 <= state.batch_axis <= len(state.shape):
            raise ContractError(f"state '{state.name}': batch axis {state.batch_axis} is outside its shape")
        try:
            initial = state.initial_array()
        except (TypeError, ValueError, MemoryError) as error:
            raise ContractError(f"state '{state.name}': its initial value cannot be read: {error}") from error
        if initial.shape != state.shape or initial.dtype.name != state.dtype:
            raise ContractError(
                f"state '{state.name}': its initial value is {initial.dtype.name} {list(initial.shape)}, "
                f"the state {state.dtype} {list(state.shape)}"
            )


def _batched(state: State) -> Shape:
    return (*state.shape[: state.batch_axis], None, *state.shape[state.batch_axis :])


def _check_side(side: str, found: Mapping[str, onnx.ValueInfoProto], expected: Mapping[str, tuple[str, Shape]]) -> None:
    if found.keys() != expected.keys():
        missing = sorted(expected.keys() - found.keys())
        unexpected = sorted(found.keys() - expected.keys())
        raise ContractError(f"the model's {side}s are not the contract's (missing {missing}, unexpected {unexpected})")
    for name, (dtype, shape) in expected.items():
        tensor = found[name].type.tensor_type
        found_dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        if found_dtype != dtype:
            raise ContractError(f"{side} '{name}' is {found_dtype}, the contract says {dtype}")
        if not tensor.HasField("shape"):
            continue
        if len(tensor.shape.dim) != len(shape):
            raise ContractError(f"{side} '{name}' has {len(tensor.shape.dim)} axes, the contract says {len(shape)}")
        for axis, (dim, size) in enumerate(zip(tensor.shape.dim, shape, strict=True)):
            # Batch and time are left to the graph: exporters leave sizes there that do not bind it.
            if size is not None and dim.HasField("dim_value") and dim.dim_value != size:
                raise ContractError(f"{side} '{name}' has {dim.dim_value} on axis {axis}, the contract says {size}")
