"""Keras itself as a runner: what every check of an export is held against.

The model is built anew from its own configuration with ``stateful=True`` (and its batch size, which such a model must
know), and its weights are put in. Between chunks the states stay where Keras keeps them, or are put there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from recurd.contract import Contract
from recurd_export.errors import ExportError
from recurd_export.keras.arrays import own_name
from recurd_export.keras.load import say
from recurd_export.keras.quiet import quiet
from recurd_export.keras.recurrent import directions
from recurd_export.keras.twin import Notes, ends, is_graph

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Keeper:
    """Where Keras keeps a state: names of the layers that lead to a recurrent one, and which of its states."""

    lead: tuple[str, ...]
    part: int


class Stateful:
    """The model with ``stateful=True`` and a batch size of its own; owns its copy of the layers and their states."""

    def __init__(self, model: Any, batch: int, notes: Notes, contract: Contract, *, double: bool) -> None:
        self._contract = contract
        self._dtype = "float64" if double else "float32"
        self._batch = batch
        self._notes = notes
        self._copies: dict[int, tuple[Any, Any]] = {}
        with quiet():
            self.model = self._copy_graph(model)
            for original, copy in self._copies.values():
                copy.set_weights([as_numpy(weight) for weight in original.weights])

    def run(self, x: Array) -> list[Array]:
        """One chunk ``[batch, steps, *shape]``: every output as Keras gives it; the states are carried on."""
        import keras

        with quiet(), torch.no_grad():
            given = x.astype(self._dtype) if x.dtype == np.float32 else x
            return [as_numpy(output) for output in keras.tree.flatten(self.model(given, training=False))]

    def reset(self) -> None:
        """Begin anew, by Keras' own ``reset_states``."""
        with quiet():
            for lead in self._notes.recurrent.values():
                self._layer(lead).reset_states()

    def read(self, keeper: Keeper) -> Array:
        """A state as Keras holds it, ``[batch, directions, hidden]``."""
        with quiet():
            halves = directions(self._layer(keeper.lead))
            return np.stack([as_numpy(half.states[keeper.part]) for half in halves], axis=1)

    def write(self, keeper: Keeper, value: Array) -> None:
        """The reverse of :meth:`read`."""
        with quiet(), torch.no_grad():
            for direction, half in enumerate(directions(self._layer(keeper.lead))):
                half.states[keeper.part].assign(value[:, direction])

    def _layer(self, lead: tuple[str, ...]) -> Any:
        found = self.model
        for name in lead:
            found = found.get_layer(name)
        return found

    def _copy_graph(self, model: Any) -> Any:
        import keras

        # A model of its own on the same layers: not compiled, so that nothing but layers is copied.
        given, results = ends(model)
        shell = keras.Model(given, results, name=model.name)
        inputs = keras.tree.map_structure(self._input, given)
        return keras.models.clone_model(shell, input_tensors=inputs, clone_function=self._copy)

    def _input(self, given: Any) -> Any:
        import keras

        dtype = self._dtype if given.dtype.startswith(("float", "bfloat")) else given.dtype
        return keras.Input(batch_shape=(self._batch, None, *given.shape[2:]), dtype=dtype, name=given.name)

    def _copy(self, layer: Any) -> Any:
        if is_graph(layer) and any(lead[-2:-1] == (layer.name,) for lead in self._notes.recurrent.values()):
            return self._copy_graph(layer)
        config = _adapted(layer.get_config(), self._dtype)
        if id(layer) in self._notes.reshaped:
            config["target_shape"] = (-1, *self._notes.reshaped[id(layer)])
        copy = type(layer).from_config(config)
        if own_name(layer) == "Bidirectional":
            copy.supports_masking = False  # with it a stateful one that gives its states fails, and nothing is masked
        if hasattr(layer, "weights"):
            self._copies[id(layer)] = layer, copy
        return copy


def _adapted(config: Any, dtype: str) -> Any:
    """A layer's configuration, and those inside it: stateful, for any number of steps, of a dtype, with no drawing."""
    if isinstance(config, list | tuple):
        return type(config)(_adapted(item, dtype) for item in config)
    if not isinstance(config, dict):
        return config
    fixed: dict[str, Any] = {"stateful": True, "unroll": False, "dtype": dtype}
    return {
        key: fixed[key] if key in fixed else "zeros" if key.endswith("_initializer") else _adapted(value, dtype)
        for key, value in config.items()
        if key != "build_config"  # with it a layer inside another one is built at once, for another batch
    }


def as_numpy(tensor: Any) -> Array:
    """A copy of a tensor of Keras' back end."""
    import keras

    found: Array = np.array(keras.ops.convert_to_numpy(tensor))
    return found


class Reference:
    """Runs Keras tick by tick; owns the states of its slots. Satisfies :class:`recurd.verify.Runner`."""

    def __init__(
        self, model: Any, notes: Notes, keepers: Mapping[str, Keeper], contract: Contract, *, double: bool = False
    ) -> None:
        """``keepers``: by state. ``double``: compute in float64, to see what of a difference is float32's own rounding.

        Raises nothing; a model that cannot be built anew raises :class:`ExportError` when it runs.
        """
        self.contract = contract
        self._model = model
        self._notes = notes
        self.keepers = keepers
        self._double = double
        self._built: dict[int, Stateful] = {}
        self._states: dict[int, dict[str, Array]] = {}

    def stateful(self, batch: int) -> Stateful:
        """The model of a batch size. Raises :class:`ExportError` when Keras cannot build it."""
        if batch not in self._built:
            try:
                self._built[batch] = Stateful(self._model, batch, self._notes, self.contract, double=self._double)
            except Exception as error:  # Keras raises many types
                raise ExportError(
                    f"Keras cannot build the model anew with stateful=True and a batch of {batch}: {say(error)}"
                ) from error
        return self._built[batch]

    def run(self, slots: Array, fresh: Array, lengths: Array, input: Array) -> list[Array]:
        """See :meth:`recurd.model.Model.run`. Rows of equal length and start run as one batch, others alone."""
        groups: dict[tuple[int, bool], list[int]] = {}
        for row in range(len(slots)):
            groups.setdefault((int(lengths[row]), bool(fresh[row])), []).append(row)
        heads = [
            np.zeros((len(slots), *([input.shape[1]] if head.per == "step" else []), *head.shape), head.dtype)
            for head in self.contract.heads
        ]
        for (length, start), rows in groups.items():
            outputs = self._run(input[rows, :length], slots[rows], start)
            for head, whole, part in zip(self.contract.heads, heads, outputs, strict=True):
                if head.per == "step":
                    whole[rows, :length] = part.reshape(len(rows), length, *head.shape)
                else:
                    whole[rows] = part.reshape(len(rows), *head.shape)
        return heads

    def read(self, slots: Array) -> dict[str, Array]:
        """See :meth:`recurd.model.Model.read`."""
        return {name: np.stack([self._states[int(slot)][name] for slot in slots]) for name in self.keepers}

    def _run(self, x: Array, slots: Array, start: bool) -> list[Array]:
        stateful = self.stateful(len(x))
        if start:
            stateful.reset()
        else:
            for name, keeper in self.keepers.items():
                stateful.write(keeper, np.stack([self._states[int(slot)][name] for slot in slots]))
        try:
            outputs = stateful.run(x)
        except Exception as error:  # Keras raises many types
            raise ExportError(
                f"Keras fails to run the model with a batch of {len(x)} and {x.shape[1]} steps: {say(error)}"
            ) from error
        left = {name: stateful.read(keeper) for name, keeper in self.keepers.items()}
        for row, slot in enumerate(slots):
            self._states[int(slot)] = {name: value[row] for name, value in left.items()}
        return outputs
