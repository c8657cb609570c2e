"""What a Keras layer becomes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


def same(value: Any) -> Any:
    """What went in."""
    return value


@dataclass(frozen=True)
class Built:
    """A torch module that takes the layer's inputs, and what is to be made of its result."""

    module: nn.Module
    finish: Callable[[Any], Any] = same
    #: Of every output, whether its axis 1 is the stream's time; ``None``: where an input's is.
    timed: tuple[bool, ...] | None = None


class Apply(nn.Module):
    """A function as a module: of its inputs, and of constants it keeps."""

    def __init__(self, function: Callable[..., Any], *constants: Tensor) -> None:
        super().__init__()
        self._function = function
        self._count = len(constants)
        for number, constant in enumerate(constants):
            self.register_buffer(f"constant_{number}", constant)

    def forward(self, *inputs: Tensor) -> Any:
        """See the class."""
        return self._function(*inputs, *(getattr(self, f"constant_{number}") for number in range(self._count)))
