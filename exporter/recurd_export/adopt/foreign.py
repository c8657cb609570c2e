"""Reads a foreign ONNX file: its graph with the weights in it, and what goes in and out."""

import re
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto, ValueInfoProto, helper, inliner

from recurd.contract import METADATA_KEY
from recurd_export.errors import ExportError, ExportUsageError
from recurd_export.surgery import nodes

#: What docs/contract.md asks of a graph.
OPSET = 17
#: Beyond it, recurrent nodes are not known to run on CUDA.
NEWEST_OPSET = 20
#: protobuf's limit, less room for the contract.
MAX_BYTES = 2**31 - 2**24
RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
#: ``ir_version``, the first field of every ONNX file there is.
FIRST_BYTE = b"\x08"


@dataclass(frozen=True)
class Port:
    """An input or output as the file declares it; what it declares need not bind it."""

    name: str
    #: numpy's name of the element type.
    dtype: str
    #: A size, the name of a size, or ``None``, per axis; ``None`` when not even their number is said.
    dims: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        if self.dims is None:
            return f"'{self.name}' {self.dtype}"
        return f"'{self.name}' {self.dtype} [{', '.join('?' if size is None else str(size) for size in self.dims)}]"


@dataclass(frozen=True)
class Foreign:
    """A foreign file."""

    path: Path
    #: Its graph, lifted to an opset recurd takes; local functions inlined, weights inside.
    proto: ModelProto
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    #: The opset as the file has it.
    opset: int


def load(path: Path) -> Foreign:
    """Read a file. Raises :class:`ExportError` in one sentence when it is none recurd can take."""
    proto = _parse(path)
    if any(entry.key == METADATA_KEY for entry in proto.metadata_props):
        raise ExportUsageError(
            f"{path}: has a contract already, which adopting would drop; look at it with recurd inspect, and serve the "
            f"file as it is with recurd serve"
        )
    opset = max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=0)
    size = proto.ByteSize()
    if size > MAX_BYTES:
        raise ExportError(f"{path}: holds {size / 2**30:.1f} GiB; an ONNX file with weights inside holds 2 GiB")
    try:
        if proto.functions:
            proto = inliner.inline_local_functions(proto)
    except Exception as error:  # whatever it does not like
        raise ExportError(f"{path}: its local functions cannot be inlined: {first_line(error)}") from error
    _refuse_random(path, proto)
    weights = {tensor.name for tensor in proto.graph.initializer}
    return Foreign(
        path=path,
        proto=_lifted(path, proto, opset),
        inputs=tuple(_port(path, value) for value in proto.graph.input if value.name not in weights),
        outputs=tuple(_port(path, value) for value in proto.graph.output),
        opset=opset,
    )


def _parse(path: Path) -> ModelProto:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror}") from error
    proto = ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # protobuf's own type, which mypy does not know
        if data.startswith(FIRST_BYTE):
            raise ExportError(
                f"{path}: damaged or cut off: it begins as an ONNX file and does not end as one"
            ) from error
        raise ExportError(f"{path}: not an ONNX file") from error
    if not proto.HasField("graph") or not proto.graph.output:
        raise ExportError(f"{path}: not a whole ONNX file: there is no graph in it that gives anything")
    try:
        onnx.load_external_data_for_model(proto, str(path.parent))
    except Exception as error:  # the loader raises its own types, and those of the system
        raise ExportError(
            f"{path}: its weights are in another file that cannot be read; put it beside the model: {first_line(error)}"
        ) from error
    return proto


def first_line(error: Exception) -> str:
    """What an error says, in a line, without the source paths of onnx and onnxruntime."""
    text = str(error).strip().split("\n")[0]
    text = text.rpartition("Status Message: ")[2] or text
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"\S*\.(?:cc|h):\d+:? (?:\S+::)?\w+(?:\(.*?\)(?: const)?|:)? ?", "", text)
    text = re.sub(r"^\S.*? was false\. |^Assertion `.*?` failed: ", "", text)
    return text.strip() or type(error).__name__


def _port(path: Path, value: ValueInfoProto) -> Port:
    if not value.type.HasField("tensor_type"):
        raise ExportError(f"{path}: '{value.name}' is {value.type.WhichOneof('value')}, not a tensor")
    tensor = value.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    if not tensor.HasField("shape"):
        return Port(value.name, dtype, None)
    dims = tuple(dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None) for dim in tensor.shape.dim)
    return Port(value.name, dtype, dims)


def _refuse_random(path: Path, proto: ModelProto) -> None:
    for node in nodes(proto.graph):
        if node.op_type in RANDOM and node.domain in ("", "ai.onnx"):
            raise ExportError(
                f"{path}: the model draws random numbers ({node.op_type}), so nothing about it can be verified; export "
                f"it again without them"
            )


def _lifted(path: Path, proto: ModelProto, opset: int) -> ModelProto:
    """The model with opset 17 or later. What the lift does to it is verified like everything else."""
    if opset >= OPSET:
        return proto
    if not _changes(proto, opset):
        lifted = ModelProto()
        lifted.CopyFrom(proto)
        for entry in lifted.opset_import:
            entry.version = OPSET if entry.domain in ("", "ai.onnx") else entry.version
        return lifted
    try:
        lifted = onnx.version_converter.convert_version(proto, OPSET)
    except Exception as error:  # the converter raises many types
        raise ExportError(
            f"{path}: its opset {opset} is too old and it cannot be lifted to {OPSET} ({first_line(error)}); export it "
            f"again with opset {OPSET} to {NEWEST_OPSET}"
        ) from error
    return lifted


def _changes(proto: ModelProto, opset: int) -> bool:
    """Whether any operator the model uses became another one after its opset."""
    for node in nodes(proto.graph):
        if node.domain in ("", "ai.onnx"):
            try:
                versions = {onnx.defs.get_schema(node.op_type, limit, "").since_version for limit in (opset, OPSET)}
            except onnx.defs.SchemaError:
                return True  # one of the two does not have it
            if len(versions) > 1:
                return True
    return False
