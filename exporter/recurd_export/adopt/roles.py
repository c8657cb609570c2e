"""What each input and output of a foreign file is for: the input, the states, the heads, constants, lengths."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from recurd_export.adopt import pairing
from recurd_export.adopt.foreign import Foreign, Port
from recurd_export.adopt.settings import Adoption, StatePair
from recurd_export.errors import ExportError, ExportUsageError

#: Names under which models take the number of real steps of each row (sherpa-onnx, NeMo, torch's examples).
LENGTHS = frozenset(
    {"lengths", "length", "lens", "x_lens", "x_len", "input_lengths", "seq_lens", "seq_len", "seq_lengths"}
)


@dataclass(frozen=True)
class Constant:
    """The value of an input that is the same in every run, in the type and with the axes the model wants."""

    value: npt.NDArray[Any]
    #: Where the value is repeated for every row.
    batch_axis: int | None

    def rows(self, count: int) -> npt.NDArray[Any]:
        """The value for so many rows."""
        return self.value if self.batch_axis is None else np.repeat(self.value, count, self.batch_axis)


@dataclass(frozen=True)
class Roles:
    """Every input of a file has one role; outputs that are neither head nor state are left out."""

    input: Port
    #: What was said of each state, and its two ports.
    states: tuple[tuple[StatePair, Port, Port], ...]
    heads: tuple[Port, ...]
    constants: dict[str, Constant]
    lengths: Port | None


def assign(foreign: Foreign, adoption: Adoption) -> Roles:
    """Take what is said, guess the rest. Raises :class:`ExportError` where that cannot be."""
    inputs, outputs = {port.name: port for port in foreign.inputs}, {port.name: port for port in foreign.outputs}
    _check_names(adoption, inputs, outputs)
    constants = {name: _constant(inputs[name], value) for name, value in adoption.constants.items()}
    said = [(pair, inputs[pair.input], outputs[pair.output]) for pair in adoption.states if pair.output is not None]
    known = {pair.input: pair for pair in adoption.states if pair.output is None}
    for _, before, after in said:
        if not pairing.fits(before, after):
            raise ExportError(f"the state {before} and its next value {after} are not of one type and shape")
    taken = {*adoption.constants, *(before.name for _, before, _ in said)}
    free = [port for port in foreign.inputs if port.name not in taken]
    lengths = inputs[adoption.lengths] if adoption.lengths else _guess_lengths(free)
    free = [port for port in free if port is not lengths]
    open_outputs = [port for port in foreign.outputs if all(port is not after for _, _, after in said)]
    input, guessed = _guess(inputs.get(adoption.input or ""), free, open_outputs, adoption.heads)
    states = said + [(known.get(b.name, StatePair(input=b.name)), b, a) for b, a in guessed]
    _check_all_known(free, input, states, open_outputs)
    if not (states or adoption.context):
        raise ExportError(
            f"no state was found: the inputs are {_list(foreign.inputs)} and the outputs {_list(foreign.outputs)}; if "
            f"one is carried from step to step, name it with --state INPUT:OUTPUT"
        )
    order = {port.name: place for place, port in enumerate(foreign.inputs)}
    return Roles(
        input=input,
        states=tuple(sorted(states, key=lambda state: order[state[1].name])),
        heads=_heads(foreign, adoption, states),
        constants={
            name: Constant(value, _batch_axis(inputs[name], value, input, states)) for name, value in constants.items()
        },
        lengths=lengths,
    )


def _list(ports: Iterable[Port]) -> str:
    return ", ".join(map(str, ports)) or "none"


def _check_names(adoption: Adoption, inputs: dict[str, Port], outputs: dict[str, Port]) -> None:
    used_inputs = [*adoption.constants, *(pair.input for pair in adoption.states)]
    used_outputs = [pair.output for pair in adoption.states if pair.output is not None]
    used_inputs += [name for name in (adoption.input, adoption.lengths) if name is not None]
    for side, names, ports in (
        ("input", used_inputs, inputs),
        ("output", [*adoption.heads, *used_outputs], outputs),
    ):
        for name in names:
            if name not in ports:
                raise ExportUsageError(f"the model has no {side} '{name}'; its {side}s are {', '.join(ports)}")
    for names in (used_inputs, list(adoption.heads), used_outputs):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ExportUsageError(f"'{twice[0]}' is given two roles; every input and output has one")


def _guess_lengths(free: Sequence[Port]) -> Port | None:
    found = [p for p in free if p.name.lower() in LENGTHS and p.dtype in ("int32", "int64") and len(p.dims or ()) == 1]
    return found[0] if len(found) == 1 and len(free) > 1 else None


def _guess(
    input: Port | None, free: Sequence[Port], outputs: Sequence[Port], heads: Sequence[str]
) -> tuple[Port, list[tuple[Port, Port]]]:
    """The input, and the states among the rest; convention puts the input first and the first output is a head."""
    if input is not None:
        free = [port for port in free if port is not input]
    pairs = pairing.by_name(free, outputs)
    if input is None:
        named = {before.name for before, _ in pairs}
        unpaired = [port for port in free if port.name not in named]
        if not free:
            raise ExportError("no input is left for what streams send; every one is a state or a constant")
        input = unpaired[0] if unpaired else free[0]
        pairs = [(before, after) for before, after in pairs if before is not input]
        free = [port for port in free if port is not input]
    used = {port.name for pair in pairs for port in pair}
    rest = [port for port in outputs if port.name not in used]
    rest = [port for port in rest if port.name not in heads] if heads else rest[1:]
    return input, pairs + pairing.by_shape([port for port in free if port.name not in used], rest)


def _check_all_known(
    free: Sequence[Port], input: Port, states: Sequence[tuple[StatePair, Port, Port]], outputs: Sequence[Port]
) -> None:
    paired = {port.name for _, before, after in states for port in (before, after)}
    for port in free:
        if port is input or port.name in paired:
            continue
        fitting = [after.name for after in outputs if after.name not in paired and pairing.fits(port, after)]
        if len(fitting) > 1:
            raise ExportError(
                f"the input {port} may be a state, but it is not clear which output is its next value: "
                f"{' or '.join(fitting)}; say it with --state {port.name}:{fitting[0]}"
            )
        raise ExportError(
            f"nobody gives the input {port} a value; say what it is: --constant {port.name}=VALUE, "
            f"--state {port.name}:OUTPUT, --lengths {port.name} or --input {port.name}"
        )


def _heads(foreign: Foreign, adoption: Adoption, states: Sequence[tuple[StatePair, Port, Port]]) -> tuple[Port, ...]:
    if adoption.heads:
        return tuple(next(port for port in foreign.outputs if port.name == name) for name in adoption.heads)
    paired = {after.name for _, _, after in states}
    heads = tuple(port for port in foreign.outputs if port.name not in paired)
    if not heads:
        raise ExportError(
            f"every output ({', '.join(paired)}) is the next value of a state; say with --head which streams get"
        )
    return heads


def _batch_axis(
    port: Port, value: npt.NDArray[Any], input: Port, states: Sequence[tuple[StatePair, Port, Port]]
) -> int | None:
    """The axis of a constant that has the name the batch has in the input and in a state."""
    names = {size for _, before, _ in states for size in before.dims or () if isinstance(size, str)}
    names &= {size for size in input.dims or () if isinstance(size, str)}
    axes = [axis for axis, size in enumerate(port.dims or ()) if size in names and value.shape[axis] == 1]
    return axes[0] if len(axes) == 1 else None


def _constant(port: Port, value: Any) -> npt.NDArray[Any]:
    """A constant as the model wants it; axes of open size get a size of 1, or the value's own."""
    try:
        array = np.asarray(value)
        typed = array.astype(port.dtype)
        if array.dtype.kind not in "biuf" or not (typed.dtype.kind == "f" or np.array_equal(typed, array)):
            raise ValueError("another number than was said")
        if port.dims is None:
            return typed
        own = (1,) * (len(port.dims) - typed.ndim) + typed.shape
        sizes = [size if isinstance(size, int) else mine for size, mine in zip(port.dims, own, strict=True)]
        return np.ascontiguousarray(np.broadcast_to(typed, sizes)).reshape(sizes)
    except (TypeError, ValueError) as error:
        raise ExportUsageError(f"the constant {value!r} is no value for the input {port}") from error
