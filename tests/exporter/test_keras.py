"""Keras models come out of the exported file as Keras runs them: whole, in chunks, stateful; layer by layer."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import recurd_export
from recurd.verify import Tolerance
from recurd_export.errors import ExportError
from recurd_export.facts import Facts
from recurd_export.keras import front
from recurd_export.keras.arrays import as_array
from recurd_export.keras.load import import_keras
from recurd_export.keras.twin import Notes, Twin
from recurd_export.prove import prove

keras = import_keras()
L = keras.layers

#: Said by Keras' own get_weights() with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BATCH, STEPS, CUTS = 3, 11, [1, 4, 5]
Build = Callable[[], Any]


def model_of(*layers: Any, shape: tuple[int | None, ...] = (None, 4), **options: Any) -> Any:
    return keras.Sequential([keras.Input(shape, **options), *layers])


def drawn(model: Any, seed: int = 0) -> Any:
    """The model with every weight drawn anew, so that biases and statistics count."""
    random = np.random.default_rng(seed)
    for weight in model.weights:
        kind = weight.path.rpartition("/")[2]
        if kind not in ("mean", "variance", "count"):  # a Normalization's, which it has read already
            low = 0.5 if kind == "moving_variance" else -0.7
            weight.assign(random.uniform(low, low + 1.4, tuple(weight.shape)).astype(np.float32))
    return model


def numbers(model: Any, batch: int = BATCH, steps: int = STEPS) -> np.ndarray:
    random = np.random.default_rng(5)
    shape = (batch, steps, *model.inputs[0].shape[2:])
    if isinstance(model.layers[0], L.Embedding):
        return random.integers(0, model.layers[0].input_dim, shape)
    return random.standard_normal(shape).astype(np.float32)


def outputs(model: Any, x: np.ndarray) -> list[np.ndarray]:
    """What Keras gives."""
    return [as_array(output.detach()) for output in keras.tree.flatten(model(x, training=False))]


def close(got: np.ndarray, wanted: np.ndarray) -> None:
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


# --- layers, one by one ---

ACTIVATIONS = [
    *("linear", "relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "softplus", "softsign"),
    *("sigmoid", "log_sigmoid", "hard_sigmoid", "hard_silu", "hard_tanh", "tanh", "tanh_shrink", "exponential"),
    *("softmax", "log_softmax"),
]
RECURRENT_ACTIVATIONS = [
    *("tanh", "sigmoid", "relu", "hard_sigmoid", "linear", "elu", "leaky_relu", "softplus", "softsign"),
]


def adapted(**options: Any) -> Any:
    layer = L.Normalization(**options)
    layer.adapt(np.random.default_rng(3).uniform(1, 9, (6, 5, 4)).astype(np.float32))
    return layer


def two_paths(merge: Any) -> Build:
    def build() -> Any:
        x = keras.Input((None, 4))
        return keras.Model(x, merge(x, L.Dense(4)(x)))

    return build


LAYERS: dict[str, Build] = {
    "rescaling": lambda: model_of(L.Rescaling(0.25, offset=-1.0)),
    "normalization by given numbers": lambda: model_of(L.Normalization(mean=[1, 2, 3, 4], variance=[4, 3, 2, 1])),
    "normalization, one for all": lambda: model_of(L.Normalization(axis=None, mean=2.0, variance=3.0)),
    "normalization backwards": lambda: model_of(L.Normalization(mean=2.0, variance=3.0, axis=None, invert=True)),
    "normalization as adapted": lambda: model_of(adapted()),
    "batch normalization": lambda: model_of(L.BatchNormalization()),
    "batch normalization without scale": lambda: model_of(L.BatchNormalization(scale=False, center=False)),
    "layer normalization": lambda: model_of(L.LayerNormalization()),
    "layer normalization of two axes": lambda: model_of(L.LayerNormalization(axis=[2, 3]), shape=(None, 3, 2)),
    "layer normalization without shift": lambda: model_of(L.LayerNormalization(center=False, scale=False)),
    "rms normalization": lambda: model_of(L.RMSNormalization()),
    "prelu": lambda: model_of(L.PReLU(shared_axes=[1])),
    "relu of three numbers": lambda: model_of(L.ReLU(max_value=1.5, negative_slope=0.1, threshold=0.3)),
    "leaky relu": lambda: model_of(L.LeakyReLU(negative_slope=0.4)),
    "elu": lambda: model_of(L.ELU(alpha=0.3)),
    "softmax": lambda: model_of(L.Softmax()),
    "softmax of another axis": lambda: model_of(L.Softmax(axis=2), shape=(None, 3, 2)),
    "what only training uses": lambda: model_of(
        L.Dropout(0.5),
        L.SpatialDropout1D(0.5),
        L.GaussianNoise(1.0),
        L.GaussianDropout(0.5),
        L.ActivityRegularization(),
    ),
    "dense without bias": lambda: model_of(L.Dense(3, use_bias=False, activation="tanh")),
    "dense with a layer for activation": lambda: model_of(L.Dense(3, activation=L.LeakyReLU(negative_slope=0.4))),
    "dense of steps of two axes": lambda: model_of(L.Dense(3), shape=(None, 3, 2)),
    "reshape of a fixed time": lambda: model_of(L.Reshape((11, 2, 2)), shape=(11, 4)),
    "reshape of any time": lambda: model_of(L.Reshape((-1, 2, 2)), shape=(None, 4)),
    "permute within a step": lambda: model_of(L.Permute((1, 3, 2)), shape=(None, 3, 2)),
    "flatten each step": lambda: model_of(L.TimeDistributed(L.Flatten()), shape=(None, 3, 2)),
    "normalize each step's rows": lambda: model_of(L.TimeDistributed(L.LayerNormalization(axis=2)), shape=(None, 3, 2)),
    "a model for each step": lambda: model_of(
        L.TimeDistributed(model_of(L.Flatten(), L.Dense(3, activation="relu"), shape=(3, 2))), shape=(None, 3, 2)
    ),
    "add": two_paths(lambda x, y: L.Add()([x, y, x])),
    "subtract": two_paths(lambda x, y: L.Subtract()([x, y])),
    "multiply": two_paths(lambda x, y: L.Multiply()([x, y, y])),
    "average": two_paths(lambda x, y: L.Average()([x, y, y])),
    "maximum": two_paths(lambda x, y: L.Maximum()([x, y])),
    "minimum": two_paths(lambda x, y: L.Minimum()([x, y])),
    "concatenate": two_paths(lambda x, y: L.Concatenate(axis=2)([x, y])),
    "operations with numbers": two_paths(lambda x, y: 1.0 - (x + y) * 2.0 / 3.0 + (x - y) * x),
    "operations of one": two_paths(lambda x, y: keras.ops.tanh(x) + keras.ops.relu(y)),
    "elements of each step": two_paths(lambda x, y: x[:, :, 1:3] + y[..., :2]),
    "the last step": two_paths(lambda x, y: L.Flatten()(x[:, -1]) + y[:, -1, :]),
    "after the last step": lambda: model_of(L.LSTM(6), L.Reshape((3, 2)), L.Permute((2, 1)), L.Flatten(), L.Dense(2)),
    "gru without biases": lambda: model_of(L.GRU(5, use_bias=False, return_sequences=True)),
    "gru that resets first, without biases": lambda: model_of(L.GRU(5, use_bias=False, reset_after=False)),
    "lstm without biases": lambda: model_of(L.LSTM(5, use_bias=False)),
    "a cell in the layer RNN": lambda: model_of(L.RNN(L.GRUCell(5), return_sequences=True)),
    "unrolled": lambda: model_of(L.LSTM(5, unroll=True), shape=(11, 4)),
}
LAYERS |= {f"activation {name}": lambda name=name: model_of(L.Activation(name)) for name in ACTIVATIONS}
LAYERS |= {
    f"bidirectional {merge} of {kind.__name__}": lambda kind=kind, merge=merge, whole=whole: model_of(
        L.Bidirectional(kind(5, return_sequences=whole), merge_mode=merge)
    )
    for kind, merge, whole in [
        (L.LSTM, "concat", True),
        (L.GRU, "sum", False),
        (L.SimpleRNN, "mul", True),
        (L.LSTM, "ave", False),
        (L.GRU, None, True),
    ]
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_does_in_torch_what_it_does_in_keras(name: str) -> None:
    model = drawn(LAYERS[name]())
    x = numbers(model)

    got = Twin(model, (True,), Notes()).eval()(torch.from_numpy(x))

    wanted = outputs(model, x)
    assert len(got) == len(wanted)
    for one, other in zip(got.values(), wanted, strict=True):
        close(one.detach().numpy(), other)


# --- whole models, exported ---


def every_activation() -> Any:
    """Layers in a row, with every activation a recurrent ONNX node has, as activation and at the gates."""
    layers = []
    for number, name in enumerate(RECURRENT_ACTIVATIONS):
        other = RECURRENT_ACTIVATIONS[number - 1]
        gates = {"recurrent_activation": other if other in ("sigmoid", "hard_sigmoid") else "sigmoid"}
        kind = (L.LSTM, L.GRU, L.SimpleRNN)[number % 3]
        options = {} if kind is L.SimpleRNN else gates
        layers += [kind(4, activation=name, return_sequences=True, **options), L.Activation("tanh")]
    layers += [
        L.GRU(4, reset_after=False, activation="elu", recurrent_activation="hard_sigmoid", return_sequences=True)
    ]
    layers += [L.LSTM(4, activation="softsign", recurrent_activation="hard_sigmoid")]
    return model_of(*layers)


def several_outputs() -> Any:
    x = keras.Input((None, 4))
    a = L.LSTM(5, return_sequences=True, name="first")(x)
    b, state = L.GRU(5, return_sequences=True, return_state=True, name="second")(L.Dropout(0.5)(a))
    joined = L.Concatenate()([a, b])
    return keras.Model(
        x, {"z": L.Dense(3)(joined), "state": state, "last": L.Dense(2, activation="softmax")(L.Add()([a, b])[:, -1])}
    )


def nested() -> Any:
    encoder = model_of(L.Dense(4, activation="relu"), L.LSTM(3, return_sequences=True, name="lstm"))
    between = keras.Input((None, 3))
    decoder = keras.Model(between, L.GRU(5, return_sequences=True, name="gru")(between), name="decoder")
    x = keras.Input((None, 4))
    return keras.Model(x, L.Dense(2, name="out")(decoder(encoder(x))))


def everything_around() -> Any:
    return model_of(
        L.Rescaling(0.5),
        adapted(),
        L.Reshape((12, 2, 2)),
        L.TimeDistributed(L.Flatten()),
        L.BatchNormalization(),
        L.LSTM(6, return_sequences=True),
        L.LayerNormalization(),
        L.SpatialDropout1D(0.3),
        L.TimeDistributed(L.Dense(4, activation="gelu")),
        L.SimpleRNN(5, return_sequences=True),
        L.PReLU(shared_axes=[1]),
        L.Dense(3, activation="softmax"),
        shape=(12, 4),
    )


def stateful(*layers: Any, shape: tuple[int | None, ...]) -> Any:
    return keras.Sequential([keras.Input(batch_shape=shape), *layers])


MODELS: dict[str, tuple[Build, list[str], list[str]]] = {
    "stacked": (
        lambda: model_of(L.LSTM(5, return_sequences=True, name="a"), L.GRU(6, name="b"), L.Dense(2, name="out")),
        ["out"],
        ["a.h_l0", "a.c_l0", "b.h_l0"],
    ),
    "stateful with a fixed batch and time": (
        lambda: stateful(
            L.LSTM(6, stateful=True, name="a"), L.Dense(10, activation="softmax", name="out"), shape=(32, 10, 16)
        ),
        ["out"],
        ["a.h_l0", "a.c_l0"],
    ),
    "bidirectional stateful": (
        lambda: stateful(
            L.Bidirectional(L.LSTM(5, stateful=True, return_sequences=True), name="both"), shape=(2, None, 3)
        ),
        ["both"],
        ["both.h_l0", "both.c_l0"],
    ),
    "every activation": (every_activation, [], []),
    "several outputs": (several_outputs, ["last", "state", "z"], ["first.h_l0", "first.c_l0", "second.h_l0"]),
    "models in a model": (nested, ["out"], []),
    "everything around": (everything_around, [], []),
}


@pytest.fixture(autouse=True)
def _short_long_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keras takes its time over thousands of steps."""
    monkeypatch.setattr("recurd_export.drift.STEPS", 200)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path, Any]]:
    """A model of the table, its file and its report; made once."""
    made: dict[str, tuple[Any, Path, Any]] = {}

    def export(name: str) -> tuple[Any, Path, Any]:
        if name not in made:
            model = drawn(MODELS[name][0]())
            path = tmp_path_factory.mktemp("keras") / "model.onnx"
            made[name] = model, path, recurd_export.export(model, None, path)
        return made[name]

    return export


@pytest.mark.parametrize("name", MODELS)
def test_the_file_gives_what_keras_gives(exported: Any, plain_run: Any, name: str) -> None:
    model, path, report = exported(name)
    plain = plain_run(path)
    batch, steps = (given or usual for given, usual in zip(model.inputs[0].shape, (BATCH, STEPS), strict=False))
    x = numbers(model, batch, steps)

    wanted = outputs_of_a_fresh_start(model, x)
    got, _ = plain.run(x, plain.initial(batch))

    for one, other in zip(got.values(), wanted, strict=True):
        close(one, other)
    heads, states = MODELS[name][1:]
    assert not heads or list(got) == heads
    assert not states or [state.name for state in report.contract.states] == states
    if report.contract.causal:
        chunked, _ = plain.chunks(x, CUTS)
        for one, other in zip(chunked.values(), wanted, strict=True):
            close(one, other)


def outputs_of_a_fresh_start(model: Any, x: np.ndarray) -> list[np.ndarray]:
    for layer in model.layers:
        if getattr(layer, "stateful", False):
            layer.reset_states()
    return outputs(model, x)


@pytest.mark.parametrize("name", ["stateful with a fixed batch and time", "bidirectional stateful"])
def test_chunks_carry_the_state_on_as_a_stateful_model_does(exported: Any, plain_run: Any, name: str) -> None:
    model, path, _ = exported(name)
    plain = plain_run(path)
    batch, steps = model.inputs[0].shape[0], model.inputs[0].shape[1] or 7
    states = plain.initial(batch)
    outputs_of_a_fresh_start(model, numbers(model, batch, steps))
    model.layers[0].reset_states()

    for _ in range(3):
        x = numbers(model, batch, steps)
        got, states = plain.run(x, states)
        close(next(iter(got.values())), outputs(model, x)[0])

    layer = model.layers[0]
    halves = [layer.forward_layer, layer.backward_layer] if hasattr(layer, "backward_layer") else [layer]
    for part, value in enumerate(states.values()):
        close(value, np.stack([as_array(half.states[part].value.detach()) for half in halves]))


def test_the_report_names_the_checks_against_keras_and_the_contract_its_source(exported: Any) -> None:
    _, _, report = exported("stacked")

    assert {"Keras stateful", "model as given"} <= {check.name for check in report.checks}
    assert report.contract.source.framework == "keras"
    assert report.contract.source.versions["keras"] == keras.__version__


def test_activations_that_run_on_the_cpu_only_are_told_of(exported: Any) -> None:
    assert any("on a machine with CUDA too" in note for note in exported("every activation")[2].notes)
    assert not any("CUDA" in note for note in exported("stacked")[2].notes)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = drawn(stateful(L.GRU(5, stateful=True), shape=(2, None, 3)))
    outputs(model, numbers(model, 2))
    layer = model.layers[0]
    before = [as_array(value) for value in (*model.weights, *layer.states)]

    recurd_export.export(model, None, tmp_path / "model.onnx")

    assert before[-1].any()
    for value, old in zip((*model.weights, *layer.states), before, strict=True):
        np.testing.assert_array_equal(as_array(value), old)


def test_the_state_of_the_random_generators_is_left_as_it_was(tmp_path: Path) -> None:
    model = drawn(model_of(L.LSTM(4, return_sequences=True, dropout=0.2), L.Dropout(0.3), L.Dense(2)))
    before, numpy_before, python_before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    recurd_export.export(model, None, tmp_path / "model.onnx")

    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()
    assert random.getstate() == python_before


def test_what_the_file_is_held_against_is_keras_and_not_its_translation() -> None:
    model = drawn(model_of(L.LSTM(4, return_sequences=True)))
    candidate = front(model)(Facts(name="net"), lambda stage: None)
    drawn(model, seed=1)

    with pytest.raises(ExportError, match="the exported model is not the source model"):
        prove(candidate, lambda stage: None)


def test_both_checks_of_keras_find_what_they_are_for() -> None:
    def checked() -> dict[str, bool]:
        return {check.name: check.ok for check in candidate.more_checks(candidate.inputs, Tolerance())}

    model = drawn(model_of(L.LSTM(4, return_sequences=True)))
    candidate = front(model)(Facts(name="net"), lambda stage: None)
    assert checked() == {"Keras stateful": True, "model as given": True}

    drawn(model, seed=1)  # the stateful one was built before
    assert checked() == {"Keras stateful": True, "model as given": False}

    candidate = front(model)(Facts(name="net"), lambda stage: None)
    drawn(model, seed=2)  # the stateful one is built afterwards
    assert checked() == {"Keras stateful": False, "model as given": True}


def test_mixed_precision_is_exported_in_float32_and_told_of(tmp_path: Path) -> None:
    model = drawn(model_of(L.LSTM(4, return_sequences=True, dtype="mixed_float16"), L.Dense(2)))

    report = recurd_export.export(model, None, tmp_path / "model.onnx")

    assert report.contract.input.dtype == "float32"
    assert any("mixed_float16" in note for note in report.notes)
