"""What only Keras can be asked: its own ``stateful=True``, and the model just as it was given."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from recurd.verify import EQUAL, Check, Inputs, Piece, Tolerance, compare, drive
from recurd_export.keras.quiet import quiet
from recurd_export.keras.recurrent import directions
from recurd_export.keras.reference import Reference, Stateful, as_numpy
from recurd_export.session import Session

Array = npt.NDArray[Any]
_CUTS = (0, 4, 5, EQUAL[0])


def check_stateful(proto: onnx.ModelProto, reference: Reference, inputs: Inputs, tolerance: Tolerance) -> Check:
    """Keras' stateful model fed chunk after chunk, ``reset_states`` between two rounds of streams: the file does so."""
    stateful = reference.stateful(len(EQUAL))
    random = np.random.default_rng(3)
    checks = []
    for _ in range(2):
        streams = inputs.draw(EQUAL, random)
        stateful.reset()
        expected = _in_chunks(stateful, reference, streams)
        plan = [[Piece(row, start, stop) for row in range(len(EQUAL))] for start, stop in itertools.pairwise(_CUTS)]
        got = drive(Session(proto, reference.contract), streams, plan)
        checks.append(compare("Keras stateful", expected, got, tolerance))
    return max(checks, key=lambda check: np.nan_to_num(check.error / check.bound, nan=np.inf))


def _in_chunks(stateful: Stateful, reference: Reference, streams: Sequence[Array]) -> dict[str, list[Array]]:
    x = np.stack(streams)
    parts = [stateful.run(x[:, start:stop]) for start, stop in itertools.pairwise(_CUTS)]
    results = {
        head.name: list(np.concatenate(pieces, axis=1) if head.per == "step" else pieces[-1])
        for head, pieces in zip(reference.contract.heads, zip(*parts, strict=True), strict=True)
    }
    return results | {name: list(stateful.read(keeper)) for name, keeper in reference.keepers.items()}


def check_as_given(model: Any, reference: Reference, inputs: Inputs, tolerance: Tolerance) -> Check:
    """The model itself, with its own batch and steps where they are fixed, on fresh streams: the reference does so."""
    import keras

    batch, steps = (given or usual for given, usual in zip(model.inputs[0].shape, (3, 13), strict=False))
    streams = inputs.draw((steps,) * batch, np.random.default_rng(4))
    with quiet():
        states = [state for layer in _stateful_layers(model) for state in layer.states]
        kept = [as_numpy(state) for state in states]
        for layer in _stateful_layers(model):
            layer.reset_states()
        try:
            outputs = [as_numpy(output) for output in keras.tree.flatten(model(np.stack(streams), training=False))]
        finally:
            for state, value in zip(states, kept, strict=True):
                state.assign(value)
    heads = [head.name for head in reference.contract.heads]
    expected = {name: list(output) for name, output in zip(heads, outputs, strict=True)}
    got = drive(reference, streams, [[Piece(row, 0, steps) for row in range(batch)]])
    return compare("model as given", expected, got, tolerance)


def _stateful_layers(model: Any) -> list[Any]:
    found = []
    for layer in model.layers:
        if hasattr(layer, "layers"):
            found += _stateful_layers(layer)
        else:
            found += [half for half in directions(layer) if getattr(half, "stateful", False)]
    return found
