"""Puts a carried state in the place of what a loop starts from.

A loop may use a cell's state itself (``h = h + cell(x, h)``). In a run of one step it must then start from the carried
state, not from the zeros that the forward makes. Which call of torch made them shows in a run that notes all results;
later runs get the state in the place of that call's result.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class Made(TorchFunctionMode):
    """Notes which call of torch made which tensor."""

    def __init__(self) -> None:
        super().__init__()
        self._results: list[Any] = []  # kept, so that no two have one id

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a call of torch, and keep what it gives."""
        result = func(*args, **(kwargs or {}))
        self._results.append(result)
        return result

    def number_of(self, tensor: Tensor) -> int | None:
        """The number of the call that made a tensor, ``None`` where none did."""
        numbers = (number for number, result in enumerate(self._results) if result is tensor)
        return next(numbers, None)


class Replaced(TorchFunctionMode):
    """Gives states in the place of the results of some calls, by their numbers."""

    def __init__(self, states: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._states = states
        self._count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a call of torch, or give the state that stands for it."""
        number = self._count
        self._count += 1
        result = func(*args, **(kwargs or {}))
        return self._states.get(number, result)
