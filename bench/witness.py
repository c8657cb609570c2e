"""What a stream must give, bit for bit: the same chunks through the contract model, alone in their tick."""

from typing import Any

import numpy as np
import numpy.typing as npt

from recurd.model import Model
from recurd.verify import Runner

Array = npt.NDArray[Any]


class Witness:
    """One stream in a model of its own. Owns a slot of it."""

    def __init__(self, model: Model, slot: int = 0, *, runner: Runner | None = None) -> None:
        """``runner`` runs the ticks, where the model does not do that as it is."""
        self._model = model
        self._runner = runner or model
        self._slots = np.array([slot], np.int64)
        self._fresh = True

    def run(self, x: Array) -> bytes:
        """The next chunk ``[steps, *shape]``; what its RESULT must hold."""
        lengths, input = np.array([len(x)], np.int32), np.ascontiguousarray(x[None])
        heads = self._runner.run(self._slots, np.array([self._fresh]), lengths, input)
        self._fresh = False
        return b"".join(head.tobytes() for head in heads)

    def reset(self) -> None:
        """Start afresh."""
        self._fresh = True

    def put(self, states: dict[str, Array]) -> None:
        """Go on from other states."""
        self._model.write(self._slots, {name: value[None] for name, value in states.items()})
        self._fresh = False

    @property
    def states(self) -> dict[str, Array]:
        """Its states by name."""
        if self._fresh:
            return {state.name: state.initial_array() for state in self._model.contract.states}
        return {name: value[0] for name, value in self._model.read(self._slots).items()}

    @property
    def state(self) -> bytes | None:
        """Its rows of all arenas; ``None`` at a fresh start."""
        return None if self._fresh else self._model.rows(self._slots)[0]


def result_bytes(result: Any) -> bytes:
    """What the client gave for a chunk, as the RESULT held it."""
    heads = result.values() if isinstance(result, dict) else [result]
    return b"".join(np.asarray(head).tobytes() for head in heads)
