"""Operations of ``keras.ops`` that stand between layers, such as ``x[:, -1]`` and ``x + y``."""

import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from recurd_export.errors import ExportError
from recurd_export.keras.activations import FUNCTIONS
from recurd_export.keras.built import Apply, Built
from recurd_export.keras.place import Place

_ARITHMETIC: Mapping[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Subtract": operator.sub,
    "Multiply": operator.mul,
    "Divide": operator.truediv,
    "TrueDivide": operator.truediv,
}
_WHOLE = slice(None)


def build(place: Place, node: Any) -> Built:
    """The operation of a node as torch. Raises :class:`ExportError` for one that cannot be exported."""
    name = type(place.layer).__name__
    arguments = [*node.arguments.args, *node.arguments.kwargs.values()]
    if name == "GetItem":
        return _get_item(place, arguments[1])
    if name in _ARITHMETIC and len(arguments) == 2:
        return _arithmetic(place, _ARITHMETIC[name], arguments)
    if name == "Cast" and str(place.layer.dtype).startswith(("float", "bfloat")):
        return Built(nn.Identity())  # of mixed precision: all is computed in float32
    function = FUNCTIONS.get(name.lower())
    if function is not None and len(arguments) == 1:
        return Built(Apply(function))
    raise ExportError(f"{place.label} of keras.ops cannot be exported; use a layer of keras.layers for it")


def _arithmetic(place: Place, function: Callable[[Any, Any], Any], arguments: list[Any]) -> Built:
    numbers = [argument for argument in arguments if isinstance(argument, int | float)]
    if len(numbers) + len(place.shapes) != 2:
        raise ExportError(f"{place.label} of keras.ops takes a constant that is not a number; use a layer for it")
    if not numbers:
        if len({len(shape) for shape in place.shapes}) != 1 or len(set(place.timed)) != 1:
            raise ExportError(
                f"{place.label} joins something that has time steps with something that has none, or axes of different "
                f"meaning {[list(shape) for shape in place.shapes]}; give it inputs of one form"
            )
        return Built(Apply(function))
    number = numbers[0]
    if arguments[0] is number:
        return Built(Apply(lambda x: function(number, x)))
    return Built(Apply(lambda x: function(x, number)))


def _get_item(place: Place, key: Any) -> Built:
    """The last step, or elements of every step."""
    keys = list(key) if isinstance(key, tuple | list) else [key]
    rank = len(place.shape)
    if Ellipsis in keys:
        at = keys.index(Ellipsis)
        keys[at : at + 1] = [_WHOLE] * (rank - len(keys) + 1)
    keys += [_WHOLE] * (rank - len(keys))
    fixed = keys[: rank - place.local]
    rest = tuple(keys[rank - place.local :])
    picks_last = place.is_timed and fixed[1:] == [-1]
    if fixed[0] != _WHOLE or (place.is_timed and not picks_last and fixed[1] != _WHOLE):
        raise ExportError(f"{place.label} cuts a part out of batch or time; of time only the last step can be picked")
    if not all(isinstance(part, int | slice) for part in rest) or len(keys) != rank:
        raise ExportError(f"{place.label} picks by more than numbers and slices, which cannot be exported")

    def pick(x: Tensor) -> Tensor:
        x = x[:, -1] if picks_last else x
        return x if all(part == _WHOLE for part in rest) else x[(..., *rest)]

    return Built(Apply(pick), timed=(False,) if picks_last else None)
