"""The front end for foreign ONNX files: a contract around the file's own graph, held against the file itself."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from onnx import GraphProto, ModelProto, TensorProto

from recurd.contract import Contract, Source, State, Tensor
from recurd.verify import Inputs, Tolerance, hold_against
from recurd_export import pipeline, scan, surgery
from recurd_export.adopt import foreign as files
from recurd_export.adopt import graph, probe, roles
from recurd_export.adopt.foreign import Foreign, Port
from recurd_export.adopt.layout import Layout
from recurd_export.adopt.reference import Reference
from recurd_export.adopt.settings import Adoption
from recurd_export.adopt.values import read_example
from recurd_export.candidate import Candidate
from recurd_export.errors import ExportError
from recurd_export.facts import Facts
from recurd_export.precision import FLOAT16
from recurd_export.session import Session

CONTEXT = "context"
#: Element types the daemon can keep as state.
STATES = ("float32", "float16", "float64", "int32", "int64")


def front(path: Path, adoption: Adoption) -> pipeline.FrontEnd:
    """The front end for one file."""

    def look(facts: Facts, progress: pipeline.Progress) -> Candidate:
        progress(pipeline.LOOK)
        foreign = files.load(path)
        said = roles.assign(foreign, adoption)
        known, complete = None, _with_classes(foreign, said.input, adoption)
        if adoption.example is not None:
            known = read_example(adoption.example, adoption)
            complete = msgspec.structs.replace(complete, step_shape=known.shape[1:])
        progress(pipeline.STEPS)
        layout = probe.find(foreign, said, complete, known)
        contract = describe(foreign, layout, complete, facts)
        known = None if known is None else known.astype(contract.input.dtype)
        progress(pipeline.CONVERT)
        reference = Reference(foreign, said, layout, contract)
        inputs = Inputs(contract.input, known)
        proto, how = _build(foreign, said, layout, inputs, reference)
        coarse = _computes_in_float16(foreign) and not _holds(proto, inputs, reference)
        return Candidate(
            proto=proto,
            contract=contract,
            reference=reference,
            inputs=inputs,
            notes=(*_notes(foreign, layout, contract), how),
            # The runtime rounds to float16 at places that depend on what stands around a node.
            coarseness=32 * FLOAT16 if coarse else 0.0,
            cuts=16 * FLOAT16 if coarse else 0.0,
        )

    return look


def _build(
    foreign: Foreign, said: roles.Roles, layout: Layout, inputs: Inputs, reference: Reference
) -> tuple[ModelProto, str]:
    """The file's graph over many steps at once where it heeds the rows' lengths, else step by step."""
    contract = reference.contract
    whole = graph.whole_model(foreign, said, layout, contract)
    if whole is not None and _holds(whole, inputs, reference):
        return whole, "runs as it is, told how long every row is"
    step = graph.step_model(foreign, said, layout, contract)
    return scan.over_time(step, contract), "runs step by step inside an ONNX Scan"


def _computes_in_float16(foreign: Foreign) -> bool:
    kinds = {tensor.data_type for tensor in foreign.proto.graph.initializer}
    kinds |= {a.i for node in surgery.nodes(foreign.proto.graph) for a in node.attribute if a.name == "to"}
    ports = {port.dtype for port in (*foreign.inputs, *foreign.outputs)}
    return TensorProto.FLOAT16 in kinds or "float16" in ports


def _holds(proto: ModelProto, inputs: Inputs, reference: Reference) -> bool:
    try:
        session = Session(proto, reference.contract)
        checks = hold_against(session, reference, inputs, Tolerance(), np.random.default_rng(3))
        return all(check.ok for check in checks)
    except Exception:  # the runtime raises its own unexported types; the other way remains
        return False


# --- the contract ---


def describe(foreign: Foreign, layout: Layout, adoption: Adoption, facts: Facts) -> Contract:
    """The contract. Raises :class:`ExportError` for what it cannot say."""
    input, names = layout.input, _Names()
    shape = input.shape
    if adoption.context:
        shape = (*shape[:-1], shape[-1] - adoption.context)
    dtype: Literal["float32", "int64"] = "int64" if adoption.classes is not None else "float32"
    heads = tuple(facts.head(names.free(head.port.name), head.dtype, head.shape, "step") for head in layout.heads)
    facts.check_labels(head.name for head in heads)
    if len({head.dtype for head in heads}) > 1:
        kinds = ", ".join(f"{head.name} {head.dtype}" for head in heads)
        raise ExportError(f"the heads are of different types ({kinds}); a result has one, so choose with --head")
    states = []
    for state in layout.states:
        if state.before.dtype not in STATES:
            raise ExportError(
                f"the state '{state.before.name}' is {state.before.dtype}; a state must be {', '.join(STATES)}"
            )
        name = names.free(state.before.name)
        head = any(state.after.name == h.port.name for h in layout.heads)
        output = names.free(f"{name}.next" if head else state.after.name)
        initial = Tensor.of(state.initial) if state.initial.any() else None
        states.append(
            State(
                name=name,
                output=output,
                dtype=state.before.dtype,
                shape=state.shape,
                batch_axis=state.batch_axis,
                initial=initial,
            )
        )
    if adoption.context:
        name = names.free(CONTEXT)
        kept = (*shape[:-1], adoption.context)
        states.append(State(name=name, output=names.free(f"{name}.next"), dtype=dtype, shape=kept, batch_axis=0))
    return Contract(
        name=facts.name,
        version=facts.version,
        input=facts.input(dtype, shape, adoption.classes),
        heads=heads,
        states=tuple(states),
        source=_source(foreign),
        weights_sha256="",
    )


class _Names:
    """Names of the contract; owns those that are taken."""

    def __init__(self) -> None:
        self._taken = {"input", "lengths"}

    def free(self, wanted: str) -> str:
        """The name, or a longer one where it is taken or recurd's own."""
        name = f"model.{wanted}" if wanted.startswith("recurd.") else wanted
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name


def _source(foreign: Foreign) -> Source:
    proto = foreign.proto
    versions = {"opset": str(foreign.opset)}
    if proto.producer_name:
        versions[proto.producer_name] = proto.producer_version
    return Source(framework="onnx", versions=versions, model=foreign.path.name)


def _notes(foreign: Foreign, layout: Layout, contract: Contract) -> Iterable[str]:
    pairs = [f"{state.before.name} -> {state.after.name}" for state in layout.states]
    if len(contract.states) > len(pairs):
        context = contract.states[-1]
        pairs.append(f"the last {context.shape[-1]} of every step's input, put in front of the next one's")
    yield f"carried from step to step: {', '.join(pairs)}"
    if foreign.opset < files.OPSET:
        yield f"lifted from opset {foreign.opset} to {files.OPSET}"
    if foreign.opset > files.NEWEST_OPSET:
        yield f"its opset {foreign.opset} is beyond {files.NEWEST_OPSET}; on a GPU its recurrent nodes may not run"


# --- token ids ---


def _with_classes(foreign: Foreign, port: Port, adoption: Adoption) -> Adoption:
    """The adoption with the number of classes for token ids, found in an embedding's table when it is not said."""
    if port.dtype.startswith("float") or port.dtype == "bfloat16":
        if adoption.classes is not None:
            raise ExportError(f"--classes is for token ids, but the input {port} is no integer")
        return adoption
    if port.dtype not in ("int32", "int64"):
        raise ExportError(f"the input {port} is neither a float nor token ids (int32 or int64)")
    classes = adoption.classes or _table_rows(foreign.proto.graph, port.name)
    if classes is None:
        raise ExportError(f"the input {port} is token ids, and the file does not say how many there are; use --classes")
    return msgspec.structs.replace(adoption, classes=classes)


def _table_rows(graph: GraphProto, name: str) -> int | None:
    """Rows of the smallest table that is looked up with nothing but this tensor."""
    tables = {tensor.name: tensor.dims[0] for tensor in graph.initializer if len(tensor.dims)}
    users = [node for node in graph.node if name in node.input]
    found = []
    for node in users:
        by_rows = not any(attribute.name == "axis" and attribute.i != 0 for attribute in node.attribute)
        if node.op_type == "Gather" and node.input[1] == name and node.input[0] in tables and by_rows:
            found.append(tables[node.input[0]])
        elif node.op_type == "Cast":
            found.append(_table_rows(graph, node.output[0]) or 0)
        else:
            return None
    return min(found, default=0) or None
