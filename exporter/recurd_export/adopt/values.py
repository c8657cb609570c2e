"""Numbers that a person gives: values of states at a fresh start, and steps that the model takes."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recurd_export.adopt.hypotheses import Hypothesis
from recurd_export.adopt.layout import StateLayout
from recurd_export.adopt.roles import Roles
from recurd_export.adopt.settings import Adoption, Initial
from recurd_export.errors import ExportUsageError

Array = npt.NDArray[Any]


def initial_values(roles: Roles, hypothesis: Hypothesis, adoption: Adoption) -> tuple[StateLayout, ...]:
    """A hypothesis's states with their initial values. Raises :class:`ExportUsageError` for one that does not fit."""
    return tuple(
        StateLayout(before, after, shape, axis, _value(before.name, pair.initial, shape, before.dtype))
        for (pair, before, after), (shape, axis) in zip(roles.states, hypothesis.states, strict=True)
    )


def read_example(path: str, adoption: Adoption) -> Array:
    """Steps ``[n, *shape]`` to draw from. Raises :class:`ExportUsageError` when they cannot be read or do not fit."""
    try:
        steps = np.load(Path(path), allow_pickle=False)
    except OSError as error:
        raise ExportUsageError(f"the example cannot be read: {path}: {error.strerror}") from error
    except (ValueError, EOFError) as error:
        raise ExportUsageError(f"the example {path} is not a .npy file of numbers") from error
    if steps.dtype.kind not in "iuf" or not len(np.atleast_1d(steps)) or not np.isfinite(steps).all():
        raise ExportUsageError(f"the example {path} does not hold finite numbers")
    if steps.ndim < 1 or adoption.step_shape not in (None, steps.shape[1:]):
        raise ExportUsageError(
            f"the example {path} holds {list(steps.shape)}; it must hold steps, each of shape "
            f"{list(adoption.step_shape or ())}"
        )
    return np.asarray(steps)


def _value(name: str, said: Initial | None, shape: tuple[int, ...], dtype: str) -> Array:
    if said is None:
        return np.zeros(shape, dtype)
    try:
        array = np.load(Path(said), allow_pickle=False) if isinstance(said, str) else np.asarray(said)
        if array.dtype.kind not in "biuf":
            raise ValueError("no numbers")
        return np.ascontiguousarray(np.broadcast_to(array, shape)).astype(dtype)
    except OSError as error:
        raise ExportUsageError(f"the initial value of '{name}' cannot be read: {said}: {error.strerror}") from error
    except (TypeError, ValueError, EOFError) as error:
        raise ExportUsageError(
            f"the initial value of '{name}' does not fit: a number, nested lists or a .npy file of shape {list(shape)}"
        ) from error
