"""What was found out about a model, as the contract and the report say it."""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import onnx
import onnxscript
import torch
from torch import Tensor, nn

from recurd import wire
from recurd.contract import Contract, Head, Input, Source, State
from recurd.contract import Tensor as Stored
from recurd.verify import RTOL
from recurd_export.errors import ExportError
from recurd_export.pytorch.layout import Layout, Recurrence
from recurd_export.pytorch.outputs import HeadLayout
from recurd_export.report import Layer


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What only the caller can know about the model."""

    name: str
    version: str = "1"
    features: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    labels: dict[str, tuple[str, ...]] = {}
    sample_rate_hz: float | None = None


def describe_model(model: nn.Module, found: Layout, program: torch.export.ExportedProgram, facts: Facts) -> Contract:
    """The contract, as yet without hash and proof."""
    names = [head.name for head in found.heads]
    for name in facts.labels:
        if name not in names:
            raise ExportError(f"labels are given for '{name}', but the heads are {', '.join(names)}")
    outputs: Any = program.graph_module.graph.output_node().args[0]
    values = [node.meta["val"] for node in outputs[: len(found.heads)]]
    return Contract(
        name=facts.name,
        version=facts.version,
        input=_input(found, facts),
        heads=tuple(_head(head, value, facts) for head, value in zip(found.heads, values, strict=True)),
        states=tuple(state for recurrence in found.recurrences for state in _states(recurrence)),
        causal=found.causal,
        source=Source(
            framework="torch",
            versions={"torch": str(torch.__version__), "onnx": onnx.__version__, "onnxscript": onnxscript.__version__},
            model=f"{type(model).__module__}.{type(model).__qualname__}",
        ),
        weights_sha256="",
    )


def _input(found: Layout, facts: Facts) -> Input:
    arguments = found.arguments
    described = Input(
        dtype="int64" if arguments.dtype == "int64" else "float32",
        shape=arguments.step_shape,
        features=facts.features,
        units=facts.units,
        sample_rate_hz=facts.sample_rate_hz,
        classes=arguments.classes,
    )
    for what, names in (("features", facts.features), ("units", facts.units)):
        if names and len(names) != described.width:
            raise ExportError(f"{len(names)} {what} are named, but a step of the input has {described.width}")
    return described


def _head(head: HeadLayout, value: Tensor, facts: Facts) -> Head:
    shape = value.shape[2 if head.per == "step" else 1 :]
    if not all(isinstance(size, int) for size in shape):
        raise ExportError(
            f"head '{head.name}' has the shape {list(value.shape)}, which is not fixed but for batch and time"
        )
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in wire.DTYPES:
        raise ExportError(f"head '{head.name}' is {dtype}; a head must be one of {', '.join(wire.DTYPES)}")
    labels = facts.labels.get(head.name, ())
    described = Head(name=head.name, dtype=dtype, shape=tuple(shape), per=head.per, labels=labels)
    if labels and len(labels) != described.width:
        raise ExportError(
            f"{len(labels)} labels are given for head '{head.name}', which has {described.width} elements"
        )
    return described


def _states(recurrence: Recurrence) -> Sequence[State]:
    return [
        State(
            name=name,
            output=f"{name}.next",
            dtype="float32",
            shape=(recurrence.directions, recurrence.hidden),
            batch_axis=1,
            initial=Stored.of(value[layer]) if value[layer].any() else None,
        )
        for layer in range(recurrence.layers)
        for name, value in zip(recurrence.state_names(layer), recurrence.initial, strict=True)
    ]


def describe_layer(recurrence: Recurrence) -> Layer:
    """What the report tells of one call of a recurrent module."""
    return Layer(
        module=recurrence.name,
        kind=recurrence.mode,
        layers=recurrence.layers,
        directions=recurrence.directions,
        hidden=recurrence.hidden,
        initial="learned" if recurrence.learned else "zeros",
        states=tuple(name for layer in range(recurrence.layers) for name in recurrence.state_names(layer)),
    )


def notes(found: Layout, contract: Contract) -> Iterator[str]:
    """What the caller should know and might not expect."""
    if not contract.causal:
        yield (
            "the model looks ahead: the backward half of a chunk sees that chunk only, so results depend on how a "
            "stream is cut into chunks"
        )
    if found.arguments.time_major:
        yield "the model's own input is [time, batch, ...]; the exported file takes [batch, time, ...]"
    if contract.proof is not None and contract.proof.rtol > RTOL:
        yield f"rounding grows in this model, so relative errors up to {contract.proof.rtol:.1e} are allowed"
    if found.arguments.drawn:
        yield "the model does not take any number, so it was verified on steps of the example; give a real one"
    for head in found.heads:
        if head.as_float:
            yield f"head '{head.name}' holds whole numbers and is sent as float32, as the other heads are"
