"""What a foreign file's layout may be, by what it declares and what was said; the likeliest first."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from recurd_export.adopt.foreign import Port
from recurd_export.adopt.layout import InputLayout
from recurd_export.adopt.roles import Roles
from recurd_export.adopt.settings import Adoption, StatePair
from recurd_export.errors import ExportError, ExportUsageError

BATCH_NAMES = frozenset({"n", "b", "bs", "batch"})
CANNOT_SHARE = "so rows of several streams cannot share a tick; export it again with a free batch axis"


@dataclass(frozen=True)
class Hypothesis:
    """A layout of the input, and of every state its shape and batch axis."""

    input: InputLayout
    states: tuple[tuple[tuple[int, ...], int], ...]


def hypotheses(roles: Roles, adoption: Adoption) -> Iterator[Hypothesis]:
    """All there are, lazily. Raises :class:`ExportError` where there can be none."""
    inputs = _inputs(roles, adoption)
    for input in inputs:
        symbol = (input.port.dims or ())[input.batch_axis]
        # States that are declared alike are laid out alike, so that a deep stack does not multiply what is tried.
        kinds: dict[object, list[tuple[tuple[int, ...], int]]] = {}
        keys = []
        for pair, before, after in roles.states:
            keys.append((before.dims, after.dims, pair.shape, pair.batch_axis))
            kinds.setdefault(keys[-1], _state(pair, before, after, adoption, symbol))
        for chosen in itertools.product(*kinds.values()):
            layouts = dict(zip(kinds, chosen, strict=True))
            yield Hypothesis(input, tuple(layouts[key] for key in keys))


def _open(dims: Sequence[int | str | None]) -> list[int]:
    """Axes that may be the batch's (or time's): of no fixed size, or of the size 1 that an example left behind."""
    return [axis for axis, size in enumerate(dims) if not isinstance(size, int) or size == 1]


# --- the input ---


def _inputs(roles: Roles, adoption: Adoption) -> list[InputLayout]:
    port = roles.input
    if port.dims is None:
        raise ExportError(
            f"the file does not say how many axes the input '{port.name}' has; export it again with shapes"
        )
    found = []
    for batch in _batches(roles, port.dims, adoption):
        for time in _times(port.dims, batch, any_axis=adoption.step_shape is not None):
            shape = _step_shape(port, batch, time, adoption)
            if shape is not None:
                found.append(InputLayout(port, batch, time, shape))
    if found:
        return found
    if adoption.step_shape is None:
        raise ExportError(f"the file does not say the size of a step of the input {port}; give it with --step-shape")
    context = f" and a context of {adoption.context}" if adoption.context else ""
    raise ExportError(f"a step of shape {list(adoption.step_shape)}{context} does not fit the input {port}")


def _batches(roles: Roles, dims: Sequence[int | str | None], adoption: Adoption) -> list[int]:
    """Axes that may be the batch's, the likeliest first."""
    if adoption.input_batch_axis is not None:
        if not 0 <= adoption.input_batch_axis < len(dims):
            raise ExportUsageError(f"the input {roles.input} has no axis {adoption.input_batch_axis} for the batch")
        return [adoption.input_batch_axis]
    shared = {size for _, before, _ in roles.states for size in before.dims or () if isinstance(size, str)}

    def likelihood(axis: int) -> tuple[bool, bool, bool, int]:
        size = dims[axis]
        return size not in shared, not _names_batch(size), isinstance(size, int), axis

    axes = sorted(_open(dims), key=likelihood)
    if not axes:
        raise ExportError(f"the input {roles.input} has no axis for the batch, {CANNOT_SHARE}")
    return axes


def _names_batch(size: int | str | None) -> bool:
    return isinstance(size, str) and (size.lower() in BATCH_NAMES or "batch" in size.lower())


def _times(dims: Sequence[int | str | None], batch: int, any_axis: bool) -> list[int | None]:
    """Axes that may be time: an open one before one of size 1, before (``any_axis``) one of any size, before none."""
    axes = [axis for axis in (range(len(dims)) if any_axis else _open(dims)) if axis != batch]
    return [*sorted(axes, key=lambda axis: (isinstance(dims[axis], int), dims[axis] != 1)), None]


def _step_shape(port: Port, batch: int, time: int | None, adoption: Adoption) -> tuple[int, ...] | None:
    """What the model takes of one step under this hypothesis, or ``None`` where it cannot be."""
    sizes = [size for axis, size in enumerate(port.dims or ()) if axis not in (batch, time)]
    if adoption.step_shape is None:
        said = tuple(size for size in sizes if isinstance(size, int))
        too_short = adoption.context and not (said and said[-1] > adoption.context)
        return None if len(said) < len(sizes) or too_short else said
    said = adoption.step_shape
    if adoption.context:
        said = (*said[:-1], said[-1] + adoption.context) if said else said
    if len(said) != len(sizes):
        return None
    fits = all(size == mine for size, mine in zip(sizes, said, strict=True) if isinstance(size, int))
    return said if fits else None


# --- the states ---


def _state(
    pair: StatePair, before: Port, after: Port, adoption: Adoption, batch: int | str | None
) -> list[tuple[tuple[int, ...], int]]:
    """Shapes (without batch) and batch axes a state may have."""
    dims = _dims(pair, before, after)
    axis = adoption.batch_axis if pair.batch_axis is None else pair.batch_axis
    if axis is not None and not 0 <= axis < len(dims):
        raise ExportUsageError(f"the state {before} has no axis {axis} for the batch")
    axes = _open(dims if before.dims is None else before.dims) if axis is None else [axis]
    if not axes:
        raise ExportError(f"the state {before} has no axis for the batch, {CANNOT_SHARE}")

    def likelihood(axis: int) -> tuple[bool, bool, int]:
        return dims[axis] is None or dims[axis] != batch, isinstance(dims[axis], int), abs(axis - 1)

    found = []
    for candidate in sorted(axes, key=likelihood):
        shape = _state_shape(dims, candidate, pair.shape)
        if shape is not None:
            found.append((shape, candidate))
    if found:
        return found
    if pair.shape is None:
        _refuse_axis(before, dims, axis)
        raise ExportError(f"the file does not say the shape of the state {before}; give it with --state-shape")
    raise ExportError(f"a state of shape {list(pair.shape)} (without batch) does not fit {before}")


def _refuse_axis(before: Port, dims: Sequence[int | str | None], said: int | None) -> None:
    """Refuse an axis of fixed size that was said to be the batch's, where the only other one of none must be."""
    free = [axis for axis, size in enumerate(dims) if not isinstance(size, int)]
    if said is not None and len(free) == 1 and said not in free:
        raise ExportUsageError(
            f"axis {said} of the state {before} is not the batch's, as its size is always {dims[said]}; say "
            f"--batch-axis {before.name}={free[0]}, or leave it out"
        )


def _dims(pair: StatePair, before: Port, after: Port) -> tuple[int | str | None, ...]:
    """What the file says of the state's axes: what one of the two ports does not say, the other may."""
    if before.dims is not None and after.dims is not None:
        return tuple(
            other if isinstance(other, int) and not isinstance(one, int) else one
            for one, other in zip(before.dims, after.dims, strict=True)
        )
    dims = before.dims if before.dims is not None else after.dims
    if dims is not None:
        return dims
    if pair.shape is None:
        raise ExportError(f"the file does not say the shape of the state '{before.name}'; give it with --state-shape")
    return (None,) * (len(pair.shape) + 1)


def _state_shape(dims: Sequence[int | str | None], batch: int, said: tuple[int, ...] | None) -> tuple[int, ...] | None:
    sizes = [size for axis, size in enumerate(dims) if axis != batch]
    if said is None:
        known = tuple(size for size in sizes if isinstance(size, int))
        return known if len(known) == len(sizes) else None
    if len(said) != len(sizes):
        return None
    fits = all(size == mine for size, mine in zip(sizes, said, strict=True) if isinstance(size, int))
    return said if fits else None
