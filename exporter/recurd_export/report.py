"""What export found and proved, for the caller to print, test or store."""

from pathlib import Path

import msgspec

from recurd.contract import Contract
from recurd.verify import Check
from recurd_export.drift import Drift


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """One recurrent module or convolution over time (or one of its calls) whose states were hoisted."""

    module: str
    kind: str
    layers: int = 1
    directions: int = 1
    #: Elements of a step of its state.
    hidden: int
    #: In words, where it is no stack of recurrent layers.
    shape: str = ""
    #: ``zeros``, ``learned`` or ``constant`` (a value, or computed from parameters; its values are in the contract).
    initial: str
    states: tuple[str, ...]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The result of :func:`recurd_export.export`; ``print(report)`` is readable."""

    path: Path
    contract: Contract
    #: Of weights and arithmetic; that of the states is in the contract.
    precision: str = "float32"
    hoisted: tuple[Layer, ...]
    checks: tuple[Check, ...]
    #: Errors over a long stream.
    drift: Drift
    #: What the caller should know and might not expect.
    notes: tuple[str, ...] = ()
    #: Size of the file.
    bytes: int
    seconds: float

    def __str__(self) -> str:
        contract = self.contract
        lines = [f"exported '{contract.name}' to {self.path} ({self.bytes / 1e6:.2f} MB, {self.seconds:.1f} s)"]
        lines.append(f"  input   {contract.input.dtype} [batch, time{_tail(contract.input.shape)}]")
        for head in contract.heads:
            axes = "batch, time" if head.per == "step" else "batch"
            lines.append(f"  head    {head.name}: {head.dtype} [{axes}{_tail(head.shape)}]{_per(head.per)}")
        for layer in self.hoisted:
            lines.append(f"  hoisted {_describe(layer)}")
        if self.precision != "float32" or any(state.dtype == "float16" for state in contract.states):
            states = ", ".join(dict.fromkeys(state.dtype for state in contract.states))
            lines.append(f"  runs in {self.precision}, states {states}")
        if contract.input.std:
            lines.append("  input   is normalised in the graph: clients send raw values")
        lines.append(f"  causal  {'yes' if contract.causal else 'no'}")
        for check in self.checks:
            lines.append(f"  checked {check.name}: largest error {check.error:.1e} (allowed {check.bound:.1e})")
        lines.append(f"  drift   {_drift(self.drift)}")
        return "\n".join(lines + [f"  note    {note}" for note in self.notes])


def _tail(shape: tuple[int, ...]) -> str:
    return "".join(f", {size}" for size in shape)


def _per(per: str) -> str:
    return "" if per == "step" else ", of a chunk's last step"


def _describe(layer: Layer) -> str:
    stack = f"{layer.layers} layer{'s' if layer.layers > 1 else ''} of {layer.hidden}"
    stack = layer.shape or stack
    both = ", both directions" if layer.directions == 2 else ""
    return f"{layer.module} ({layer.kind}, {stack}{both}), initial {layer.initial}: {', '.join(layer.states)}"


def _drift(drift: Drift) -> str:
    worst = drift.worst
    fewer = f"; {drift.fewer}" if drift.fewer else ""
    return (
        f"over {drift.steps:,} steps: error nearest its bound {worst.worst:.1e} (allowed {worst.bound:.1e}) in "
        f"'{worst.tensor}', at the end {worst.errors[-1]:.1e}{fewer}"
    )
