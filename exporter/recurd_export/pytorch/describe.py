"""What was found out about a model, as the contract and the report say it."""

from collections.abc import Iterator
from typing import Any

import onnx
import onnxscript
import torch
from torch import Tensor, nn

from recurd.contract import Contract, Head, Source, State
from recurd.contract import Tensor as Stored
from recurd_export.errors import ExportError
from recurd_export.facts import Facts
from recurd_export.pytorch.convolutions import Convolution
from recurd_export.pytorch.layout import Layout
from recurd_export.pytorch.outputs import HeadLayout
from recurd_export.pytorch.recurrence import Recurrence
from recurd_export.pytorch.state import StateLayout
from recurd_export.pytorch.step_layout import AnyLayout, StepLayout
from recurd_export.report import Layer


def describe_model(model: nn.Module, found: AnyLayout, program: torch.export.ExportedProgram, facts: Facts) -> Contract:
    """The contract, as yet without hash and proof."""
    facts.check_labels(head.name for head in found.heads)
    outputs: Any = program.graph_module.graph.output_node().args[0]
    values = [node.meta["val"] for node in outputs[: len(found.heads)]]
    one_step = not any(spec.arg.name == "lengths" for spec in program.graph_signature.input_specs)
    return Contract(
        name=facts.name,
        version=facts.version,
        input=facts.input(found.arguments.dtype, found.arguments.step_shape, found.arguments.classes),
        heads=tuple(_head(head, value, facts, one_step) for head, value in zip(found.heads, values, strict=True)),
        states=tuple(map(_state, found.states)),
        causal=found.causal,
        source=Source(
            framework="torch",
            versions={"torch": str(torch.__version__), "onnx": onnx.__version__, "onnxscript": onnxscript.__version__},
            model=f"{type(model).__module__}.{type(model).__qualname__}",
        ),
        weights_sha256="",
    )


def _head(head: HeadLayout, value: Tensor, facts: Facts, one_step: bool) -> Head:
    shape = value.shape[2 if head.per == "step" and not one_step else 1 :]
    if not all(isinstance(size, int) for size in shape):
        raise ExportError(
            f"head '{head.name}' has the shape {list(value.shape)}, which is not fixed but for batch and time"
        )
    return facts.head(head.name, str(value.dtype).removeprefix("torch."), tuple(shape), head.per)


def _state(state: StateLayout) -> State:
    return State(
        name=state.name,
        output=state.output,
        dtype=state.initial.dtype.name,
        shape=state.initial.shape,
        batch_axis=state.batch_axis,
        initial=Stored.of(state.initial) if state.initial.any() else None,
    )


def describe_layer(recurrence: Recurrence) -> Layer:
    """What the report tells of one call of a recurrent module, or of a cell."""
    return Layer(
        module=recurrence.name,
        kind=recurrence.mode,
        layers=recurrence.layers,
        directions=recurrence.directions,
        hidden=recurrence.hidden,
        initial="learned" if recurrence.learned else "zeros",
        states=tuple(state.name for state in recurrence.states),
    )


def describe_step(model: nn.Module, found: StepLayout) -> Layer:
    """What the report tells of the states of a module of one step."""
    return Layer(
        module=type(model).__name__,
        kind="step",
        layers=1,
        directions=1,
        hidden=sum(state.initial.size for state in found.states),
        initial="learned" if any(state.initial.any() for state in found.states) else "zeros",
        states=tuple(state.name for state in found.states),
    )


def describe_convolution(convolution: Convolution) -> Layer:
    """What the report tells of one call of a convolution over time."""
    dilation = f", dilation {convolution.dilation}" if convolution.dilation > 1 else ""
    return Layer(
        module=convolution.name,
        kind=convolution.kind,
        hidden=convolution.initial.shape[0],
        shape=f"kernel {convolution.kernel}{dilation}",
        initial="constant" if convolution.initial.any() else "zeros",
        states=(convolution.state.name,),
    )


def convolution_notes(found: Layout) -> Iterator[str]:
    """What the caller should know of a model that its own callers may run in chunks, with convolutions in it."""
    if found.convolutions and (found.arguments.state_axes or found.arguments.kept):
        names = ", ".join(f"'{convolution.name}'" for convolution in found.convolutions)
        yield (
            f"called chunk by chunk, the model itself pads every chunk anew (convolution {names}); the exported file "
            f"goes on with the last inputs of the chunk before, as the model does within one call"
        )


def step_notes(model: nn.Module, found: StepLayout) -> Iterator[str]:
    """What was taken for granted of a module of one step that returns no more tensors than it takes states."""
    if found.heads[0].position in found.returned and not isinstance(model, nn.RNNCellBase):
        names = " and ".join(f"'{state.name}'" for state in found.states)
        yield (
            f"the module returns as many tensors as it takes states, so all were taken for the next {names} and the "
            f"first for the output too; if the first is an output only, return it and then every state"
        )


def notes(found: AnyLayout, contract: Contract) -> Iterator[str]:
    """What the caller should know and might not expect."""
    if not contract.causal:
        yield (
            "the model looks ahead: the backward half of a chunk sees that chunk only, so results depend on how a "
            "stream is cut into chunks"
        )
    if found.arguments.time_major:
        yield "the model's own input is [time, batch, ...]; the exported file takes [batch, time, ...]"
    if found.arguments.time_axis > 1:
        order = ["batch", *["..."] * (found.arguments.time_axis - 1), "time"]
        rest = [", ..."] if found.arguments.example.dim() > found.arguments.time_axis + 1 else [""]
        yield f"the model's own input is [{', '.join(order)}{rest[0]}]; the exported file takes [batch, time, ...]"
    if found.arguments.drawn:
        yield "the model does not take any number, so it was verified on steps of the example; give a real one"
    for head in found.heads:
        if head.as_float:
            yield f"head '{head.name}' holds whole numbers and is sent as float32, as the other heads are"
