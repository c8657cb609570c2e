"""Notes down what the convolutions of a model are given in a forward, and can put other results in place of theirs.

``nn.Conv1d`` and its kin convolve in their method ``_conv_forward``, and so do subclasses that pad or cut around it in
a ``forward`` of their own; that method is where they are watched.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

#: A convolution's path and the number of its call.
Key = tuple[str, int]
#: ``(key, module, input, weight, bias)`` -> what the convolution is to give, ``None``: what it gives by itself.
Convolve = Callable[[Key, Any, Tensor, Tensor, Tensor | None], Tensor | None]


@dataclass(frozen=True)
class Convolved:
    """One call of a convolution within one forward."""

    path: str
    #: The module's own calls in this forward are numbered from 0.
    ordinal: int
    module: Any
    #: ``[batch, channels, ...]``, without the padding the module adds itself.
    input: Tensor

    @property
    def key(self) -> Key:
        """What is the same in every forward."""
        return self.path, self.ordinal


class ConvolutionRecorder:
    """Watches every convolution of one copy of a model, for one forward."""

    def __init__(self, model: nn.Module, convolve: Convolve | None) -> None:
        self.calls: list[Convolved] = []
        self._convolve = convolve
        self._ordinals: dict[str, int] = defaultdict(int)
        self._modules: list[nn.Module] = []
        for path, module in model.named_modules():
            if isinstance(module, KINDS):
                self._watch(path, module)

    def remove(self) -> None:
        """Let the modules be as they were."""
        for module in self._modules:
            del module._conv_forward

    def _watch(self, path: str, module: Any) -> None:
        own = module._conv_forward

        def conv_forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            call = Convolved(path, self._ordinals[path], module, input.detach().clone())
            self._ordinals[path] += 1
            self.calls.append(call)
            given = self._convolve(call.key, module, input, weight, bias) if self._convolve is not None else None
            result: Tensor = own(input, weight, bias) if given is None else given
            return result

        module._conv_forward = conv_forward
        self._modules.append(module)
