"""What a Keras model or file cannot be exported with is said in one sentence."""

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

import recurd_export
from recurd.cli import main
from recurd_export.errors import ExportError, ExportUsageError
from recurd_export.facts import Facts
from recurd_export.keras import front
from recurd_export.keras.arrays import as_array
from recurd_export.keras.load import import_keras, load

keras = import_keras()
L = keras.layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of Keras' own get_weights()
]


def model_of(*layers: Any, shape: tuple[int | None, ...] = (None, 4), **options: Any) -> Any:
    return keras.Sequential([keras.Input(shape, **options), *layers])


def refusal(source: Any) -> str:
    """The sentence an export ends with."""
    with pytest.raises(ExportError) as error:
        front(source)(Facts(name="net"), lambda stage: None)
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


class Doubled(keras.layers.Layer):
    def call(self, x: Any) -> Any:
        return x * 2


class Cell(keras.layers.Layer):
    """A cell of one's own."""

    state_size = 4

    def call(self, x: Any, states: Any) -> Any:
        return states[0], [states[0]]


class Subclassed(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = L.LSTM(3)

    def call(self, x: Any) -> Any:
        return self.rnn(x)


class Overridden(keras.Model):
    """Functional, but for what it does when it is called."""

    def call(self, x: Any) -> Any:
        return super().call(x) * 2


def functional(build: Callable[[Any], Any], shape: tuple[int | None, ...] = (None, 4)) -> Any:
    x = keras.Input(shape)
    return keras.Model(x, build(x))


def two_inputs() -> Any:
    one, other = keras.Input((None, 4), name="one"), keras.Input((None, 4), name="other")
    return keras.Model([one, other], L.LSTM(3)(L.Add()([one, other])))


def encoder_decoder() -> Any:
    def build(x: Any) -> Any:
        _, h, c = L.LSTM(3, return_state=True)(x)
        return L.LSTM(3, return_sequences=True, name="decoder")(x, initial_state=[h, c])

    return functional(build)


def called_twice() -> Any:
    rnn = L.GRU(4, return_sequences=True, name="shared")
    return functional(lambda x: rnn(rnn(x)))


def overridden() -> Any:
    x = keras.Input((None, 4))
    return Overridden(x, L.LSTM(3)(x))


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "no recurrent layer": (lambda: model_of(L.Dense(3)), "has no recurrent layer"),
    "subclassed": (Subclassed, "Subclassed is a subclassed model, whose code cannot be looked into; build it with"),
    "a call of its own": (overridden, "Overridden is a subclassed model"),
    "not built": (lambda: keras.Sequential([L.LSTM(3)]), "is not built yet, or Keras cannot follow it"),
    "several inputs": (two_inputs, "has 2 inputs ('one', 'other'), and a stream has one; join them"),
    "masking": (
        lambda: model_of(L.Masking(), L.LSTM(3)),
        "(Masking) leaves out steps by their value, and the exported file leaves out none",
    ),
    "mask_zero": (
        lambda: model_of(L.Embedding(5, 3, mask_zero=True), L.LSTM(3), shape=(None,)),
        "has mask_zero=True, which leaves out steps of id 0",
    ),
    "lambda": (lambda: model_of(L.Lambda(lambda x: x * 2), L.LSTM(3)), "(Lambda) is code that is not looked into"),
    "a layer of one's own": (
        lambda: model_of(Doubled(name="twice"), L.LSTM(3)),
        "layer 'twice' (Doubled) is a layer of your own, whose code cannot be looked into; build the model of Keras'",
    ),
    "a cell of one's own": (lambda: model_of(L.RNN(Cell())), "has a cell of its own (Cell)"),
    "a stack of cells": (
        lambda: model_of(L.RNN(L.StackedRNNCells([L.LSTMCell(3), L.LSTMCell(3)]))),
        "has a stack of cells; make each a layer of its own",
    ),
    "backwards": (lambda: model_of(L.GRU(3, go_backwards=True)), "(GRU) goes backwards over time"),
    "halves of two kinds": (
        lambda: model_of(
            L.Bidirectional(
                L.LSTM(3, activation="relu"), backward_layer=L.LSTM(3, activation="tanh", go_backwards=True)
            )
        ),
        "has halves of different kinds",
    ),
    "an initial state": (encoder_decoder, "layer 'decoder' (LSTM) is given its initial state by another layer"),
    "one layer twice": (called_twice, "layer 'shared' (GRU) is called twice, and as a stateful layer it has one state"),
    "an activation ONNX lacks": (
        lambda: model_of(L.LSTM(3, activation="gelu")),
        "has the activation 'gelu', which ONNX's recurrent nodes do not know; train it with one of tanh, sigmoid",
    ),
    "an activation of one's own": (
        lambda: model_of(L.LSTM(3), L.Dense(2, activation=lambda x: x * 2)),
        "<lambda>', which cannot be exported; those that can are linear, relu",
    ),
    "pooling": (
        lambda: model_of(L.LSTM(3, return_sequences=True), L.GlobalAveragePooling1D()),
        "(GlobalAveragePooling1D) pools over time, so results would depend on how a stream is cut into chunks",
    ),
    "attention": (
        lambda: functional(lambda x: L.Attention()([L.LSTM(4, return_sequences=True)(x), x])),
        "(Attention) looks at every step of a sequence",
    ),
    "an unknown layer": (
        lambda: model_of(L.UpSampling1D(2), L.LSTM(3)),
        "(UpSampling1D) cannot be exported; build the model of Keras' own layers",
    ),
    "convolution": (
        lambda: model_of(L.Conv1D(3, 2, padding="causal"), L.LSTM(3)),
        "(Conv1D) looks at several steps at once, and its last inputs are carried on for torch models only; write it",
    ),
    "repeat": (
        lambda: model_of(L.LSTM(3), L.RepeatVector(4), L.LSTM(3)),
        "(RepeatVector) makes time steps of one",
    ),
    "a second time axis": (
        lambda: model_of(L.TimeDistributed(L.LSTM(3, name="inner")), L.LSTM(3), shape=(None, 5, 2)),
        "layer 'inner' (LSTM) runs over an axis that is not the stream's time",
    ),
    "flatten over time": (
        lambda: model_of(L.LSTM(3, return_sequences=True), L.Flatten(), L.Dense(2), shape=(6, 4)),
        "(Flatten) makes one row of all time steps, so chunks of a stream would not fit together; wrap it in",
    ),
    "reshape over time": (
        lambda: model_of(L.Reshape((3, 8)), L.LSTM(3), shape=(6, 4)),
        "makes steps of [3, 8] from [6, 4], so a step would not be a step any more",
    ),
    "permute": (
        lambda: model_of(L.Permute((2, 1)), L.LSTM(3), shape=(6, 4)),
        "(Permute) swaps time with another axis",
    ),
    "normalization over time": (
        lambda: model_of(L.LayerNormalization(axis=1), L.LSTM(3), shape=(6, 4)),
        "(LayerNormalization) works along time",
    ),
    "softmax over the batch": (
        lambda: model_of(L.LSTM(3), L.Softmax(axis=0)),
        "(Softmax) works along the batch",
    ),
    "numbers for every step": (
        lambda: model_of(L.PReLU(), L.LSTM(3), shape=(6, 4)),
        "(PReLU) has numbers of its own for every step of a sequence",
    ),
    "steps with rows": (
        lambda: functional(lambda x: L.Add()([L.LSTM(4, return_sequences=True)(x), L.LSTM(4)(x)])),
        "(Add) joins something that has time steps with something that has none",
    ),
    "a step in the middle": (
        lambda: functional(lambda x: L.LSTM(3, return_sequences=True)(x)[:, 2], (6, 4)),
        "cuts a part out of batch or time; of time only the last step can be picked",
    ),
    "an operation that is not known": (
        lambda: functional(lambda x: keras.ops.cumsum(L.LSTM(3, return_sequences=True)(x), axis=1)),
        "of keras.ops cannot be exported; use a layer of keras.layers for it",
    ),
    "a constant that is no number": (
        lambda: functional(lambda x: L.LSTM(3)(x) + np.ones(3, np.float32)),
        "takes a constant that is not a number",
    ),
    "open sizes": (
        lambda: model_of(L.TimeDistributed(L.GlobalMaxPooling1D()), L.LSTM(3), shape=(None, None, 2)),
        "all but batch and time must be of a fixed size",
    ),
    "no time": (lambda: model_of(L.Reshape((1, 1)), L.LSTM(3), shape=()), "it must be [batch, time, ...]"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_be_exported_is_refused_with_its_reason(name: str) -> None:
    build, reason = MODELS[name]

    assert reason in refusal(build())


def test_integers_must_be_ids() -> None:
    assert "the model's input is int32, but does not go into an Embedding alone" in refusal(
        model_of(L.Rescaling(0.5), L.LSTM(3), dtype="int32")
    )


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="LSTM is a layer, not a model; put it behind a"):
        recurd_export.export(L.LSTM(3), None, tmp_path / "net.onnx")


def test_a_quantised_model_is_refused() -> None:
    model = model_of(L.LSTM(3), L.Dense(8, name="out"))
    model.get_layer("out").quantize("int8")

    assert "layer 'out' (Dense) is quantised" in refusal(model)


def test_a_model_keras_cannot_build_stateful_is_refused(tmp_path: Path) -> None:
    model = model_of(L.LSTM(3))
    model.layers[0].get_config = dict

    with pytest.raises(ExportError, match="Keras cannot build the model anew with stateful=True and a batch of"):
        recurd_export.export(model, None, tmp_path / "net.onnx")
    assert not any(tmp_path.iterdir())


# --- files ---


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as ``net.keras`` and ``net.h5``."""
    folder = tmp_path_factory.mktemp("files")
    model = model_of(L.LSTM(3, return_sequences=True, stateful=True, name="lstm"), L.Dense(2), batch_size=2)
    for name in ("net.keras", "net.h5"):
        model.save(folder / name)
    return folder


def changed(source: Path, target: Path, change: Callable[[bytearray], Any]) -> Path:
    data = bytearray(source.read_bytes())
    change(data)
    target.write_bytes(data)
    return target


def flip_the_middle(data: bytearray) -> None:
    for place in range(len(data) // 2, len(data) // 2 + 9):
        data[place] ^= 255


def saved(folder: Path, name: str, *layers: Any) -> Path:
    model_of(*layers).save(folder / name)
    return folder / name


class Scaled(L.Layer):
    """A layer as many are written: its options are what Keras finds out, its name is not among them."""

    def __init__(self, scale: float, **options: Any) -> None:
        super().__init__(**options)
        self.scale = scale

    def call(self, x: Any) -> Any:
        return x * self.scale


class Net(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = L.LSTM(3)

    def call(self, x: Any) -> Any:
        return self.lstm(x)


def subclassed(path: Path) -> Path:
    model = Net()
    model(np.zeros((1, 2, 4), np.float32))
    model.save(path)
    return path


def reconfigured(files: Path, folder: Path, kind: str, other: str) -> Path:
    """The file with layers of another kind, which have no options."""
    with zipfile.ZipFile(files / "net.keras") as old, zipfile.ZipFile(folder / "a.keras", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "config.json":
                config = json.loads(data)
                for layer in config["config"]["layers"]:
                    if layer["class_name"] == kind:
                        layer |= {"class_name": other, "config": "nothing"}
                data = json.dumps(config).encode()
            new.writestr(name, data)
    return folder / "a.keras"


BROKEN: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "text": (
        lambda files, tmp: changed(files / "net.h5", tmp / "a.keras", lambda d: d.__setitem__(slice(0, 4), b"text")),
        "is not a Keras file",
    ),
    "empty": (lambda files, tmp: changed(files / "net.h5", tmp / "a.h5", bytearray.clear), "is not a Keras file"),
    "cut off": (
        lambda files, tmp: changed(
            files / "net.keras", tmp / "a.keras", lambda d: d.__delitem__(slice(len(d) // 2, None))
        ),
        "is cut off or damaged",
    ),
    "cut off hdf5": (
        lambda files, tmp: changed(files / "net.h5", tmp / "a.h5", lambda d: d.__delitem__(slice(len(d) // 2, None))),
        "is cut off or damaged",
    ),
    "damaged": (
        lambda files, tmp: changed(files / "net.keras", tmp / "a.keras", flip_the_middle),
        "is damaged (in model.weights.h5); copy it again",
    ),
    "lambda": (
        lambda files, tmp: saved(tmp, "a.keras", L.LSTM(3), L.Lambda(lambda x: x * 2, name="twice")),
        "layer 'twice' (Lambda) is code, and code in files is not run",
    ),
    "lambda in hdf5": (
        lambda files, tmp: saved(tmp, "a.h5", L.LSTM(3), L.Lambda(lambda x: x * 2, name="twice")),
        "layer 'twice' (Lambda) is code, and code in files is not run",
    ),
    "a layer of one's own": (
        lambda files, tmp: saved(tmp, "a.keras", L.LSTM(3), Doubled(name="twice")),
        "needs the class 'Doubled' (layer 'twice'), which is not Keras' own and whose code is not in the file",
    ),
    "a layer of one's own in hdf5": (
        lambda files, tmp: saved(tmp, "a.h5", L.LSTM(3), Doubled(name="twice")),
        "needs the class 'Doubled' (layer 'twice'), which is not Keras' own and whose code is not in the file",
    ),
    "a layer in hdf5 that does not say its name": (
        lambda files, tmp: saved(tmp, "a.h5", L.LSTM(3), Scaled(2.0)),
        "needs the class 'Scaled', which is not Keras' own and whose code is not in the file",
    ),
    "a subclassed model": (
        lambda files, tmp: subclassed(tmp / "a.keras"),
        "in the file; load it in Python where that is known and rebuild it of Keras' own layers (keras.Sequential or",
    ),
    "a subclassed model in hdf5": (
        lambda files, tmp: subclassed(tmp / "a.h5"),
        "needs the class 'Net', which is not Keras' own and whose code is not in the file",
    ),
    "a lambda of nothing": (
        lambda files, tmp: reconfigured(files, tmp, "LSTM", "Lambda"),
        "layer 'lambda' (Lambda) is code, and code in files is not run",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_loaded_is_refused_in_one_sentence(files: Path, tmp_path: Path, name: str) -> None:
    make, reason = BROKEN[name]
    path = make(files, tmp_path)

    sentence = refusal(path)

    assert sentence.startswith(f"{path}: ")
    assert reason in sentence
    assert ". " not in sentence.removeprefix(f"{path}")


def test_a_file_that_is_not_keras_is_refused_before_keras_is_imported(tmp_path: Path) -> None:
    (tmp_path / "junk.keras").write_bytes(b"junk" * 20)
    script = (
        "import sys\nfrom recurd.cli import main\n"
        "try:\n    main(['export', 'junk.keras', '-o', 'm.onnx'])\nfinally:\n    assert 'keras' not in sys.modules\n"
    )

    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert "AssertionError" not in done.stderr
    assert "junk.keras: is not a Keras file; write one with model.save('model.keras')" in done.stderr


def test_a_file_that_is_not_there_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(ExportUsageError, match=r"none\.keras: cannot be read: No such file"):
        load(tmp_path / "none.keras")


def test_weights_alone_are_no_model(files: Path, tmp_path: Path) -> None:
    load(files / "net.keras").save_weights(tmp_path / "net.weights.h5")

    assert "holds weights only; write the whole model with model.save" in refusal(tmp_path / "net.weights.h5")


@pytest.mark.parametrize(("left_out", "reason"), [("config.json", "no Keras file"), ("model.weights.h5", "no weights")])
def test_a_zip_file_must_have_both_parts(files: Path, tmp_path: Path, left_out: str, reason: str) -> None:
    with zipfile.ZipFile(files / "net.keras") as old, zipfile.ZipFile(tmp_path / "net.keras", "w") as new:
        for name in old.namelist():
            if name != left_out:
                new.writestr(name, old.read(name))

    assert reason in refusal(tmp_path / "net.keras")


def test_what_keras_says_of_a_file_it_cannot_load_is_passed_on(files: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(files / "net.keras") as old, zipfile.ZipFile(tmp_path / "net.keras", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b'"units": 3', b'"units": -3'))

    sentence = refusal(tmp_path / "net.keras")

    assert f"net.keras: Keras {keras.__version__} cannot load it: " in sentence


def test_a_loss_of_ones_own_in_a_file_is_not_needed(tmp_path: Path) -> None:
    def loss(wanted: Any, got: Any) -> Any:
        return keras.ops.mean(wanted - got)

    model = model_of(L.LSTM(3))
    model.compile("adam", loss)
    model.save(tmp_path / "net.keras")

    assert len(load(tmp_path / "net.keras").layers) == 1


def test_hdf5_files_of_keras_2_are_loaded(files: Path, tmp_path: Path) -> None:
    """As Keras 2.15 wrote them: ``batch_input_shape``, ``time_major``, classes without modules."""
    path = changed(files / "net.h5", tmp_path / "net.h5", lambda data: None)
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        for layer in config["config"]["layers"]:
            options = layer["config"]
            if layer["class_name"] == "InputLayer":
                options["batch_input_shape"] = options.pop("batch_shape")
            if layer["class_name"] == "LSTM":
                options |= {"time_major": False, "implementation": 2}
            options["dtype"] = "float32"
            for key in ("module", "registered_name", "build_config"):
                layer.pop(key, None)
        file.attrs["model_config"] = json.dumps(config)
        file.attrs["keras_version"] = "2.15.0"
    x = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32)

    model, same = load(path), load(files / "net.h5")

    np.testing.assert_array_equal(as_array(model(x).detach()), as_array(same(x).detach()))


def test_the_command_exports_a_file(files: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["export", str(files / "net.h5"), "--out", str(tmp_path / "net.onnx")])

    assert done.exit_code == 0, done.output
    assert "lstm.h_l0, lstm.c_l0" in done.output


# --- factories ---

FACTORIES = """
import keras

def build(**options):
    lstm = keras.layers.LSTM(3, return_sequences=True, name="lstm", **options)
    return keras.Sequential([keras.Input((None, 4)), lstm, keras.layers.Dense(2, name="dense")])

def without_bias():
    return build(use_bias=False)

def deeper():
    model = build()
    model.add(keras.layers.Dense(2, name="last"))
    return model

def with_example():
    return build(), [0.0]

class Own(keras.Model):
    pass

ready = build()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory with a module of factories that give Keras models, and weights of one."""
    (tmp_path / "keras_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    import keras_factories  # type: ignore[import-not-found]

    keras_factories.build().save_weights("w.weights.h5")
    keras_factories.deeper().save_weights("deeper.weights.h5")
    keras_factories.build().save("whole.keras")
    Path("w.bin").write_bytes(Path("w.weights.h5").read_bytes())
    Path("junk.weights.h5").write_bytes(b"junk" * 20)
    Path("broken.weights.h5").write_bytes(Path("w.weights.h5").read_bytes()[:99])
    yield tmp_path
    del sys.modules["keras_factories"]


def test_a_factory_may_give_a_keras_model_and_gets_its_weights(folder: Path) -> None:
    arguments = ["export", "keras_factories:build", "--weights", "w.weights.h5", "--out", "net.onnx"]
    done = CliRunner().invoke(main, arguments)

    assert done.exit_code == 0, done.output
    assert "lstm.h_l0, lstm.c_l0" in done.output
    with h5py.File("w.weights.h5") as file:
        dense = np.array(file["layers/dense/vars/0"])
    written = [numpy_helper.to_array(tensor) for tensor in onnx.load("net.onnx").graph.initializer]
    assert any(np.array_equal(dense, found) or np.array_equal(dense.T, found) for found in written)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["build", "--example", "2,3,4"], "says itself what its input is; leave out --example and --dtype"),
        (["ready", "--dtype", "float32"], "says itself what its input is; leave out --example and --dtype"),
        (["build", "--step"], "a Keras model works on whole sequences; step is for torch modules of one time step"),
        (["with_example"], "a Keras model says itself what its input is; give no example"),
        (["Own"], "Own is a subclassed model, whose code cannot be looked into"),
        (["build", "--weights", "none.weights.h5"], "none.weights.h5: cannot be read: No such file or directory"),
        (
            ["build", "--weights", "junk.weights.h5"],
            "junk.weights.h5: is not a Keras file; write one with model.save_w",
        ),
        (["build", "--weights", "broken.weights.h5"], "broken.weights.h5: does not fit model 'sequential"),
        (["build", "--weights", "whole.keras"], "whole.keras: is not a file of Keras weights; export a whole model"),
        (["build", "--weights", "w.bin"], "w.bin: is not called as Keras wants it; name it w.weights.h5"),
        (["build", "--weights", "deeper.weights.h5"], "2 of its tensors have no place in it"),
        (["deeper", "--weights", "w.weights.h5"], "'last': Layer 'last' expected 2 variables, but received 0"),
        (["without_bias", "--weights", "w.weights.h5"], "'lstm_cell': Layer 'lstm_cell' expected 2 variables"),
    ],
)
def test_what_does_not_go_with_a_factory_of_keras_models_is_said(
    folder: Path, arguments: list[str], sentence: str
) -> None:
    factory, *options = arguments
    done = CliRunner().invoke(main, ["export", f"keras_factories:{factory}", *options, "--out", "net.onnx"])

    assert done.exit_code in (2, 70), done.output
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert not Path("net.onnx").exists()


# --- Keras itself ---


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (None, r"a Keras model needs Keras 3, and it cannot be imported \(.*\); install the extra 'keras'"),
        (SimpleNamespace(__version__="2.15.0"), "a Keras model needs Keras 3, and this is Keras 2.15.0"),
    ],
)
def test_keras_3_is_needed(monkeypatch: pytest.MonkeyPatch, found: Any, reason: str) -> None:
    monkeypatch.setitem(sys.modules, "keras", found)

    with pytest.raises(ExportUsageError, match=reason):
        import_keras()


def test_keras_comes_with_its_torch_back_end_where_the_one_asked_for_is_not_there() -> None:
    code = (
        "import os; os.environ['KERAS_BACKEND'] = 'tensorflow'\n"
        "from recurd_export.keras.load import import_keras\n"
        "print(import_keras().config.backend(), os.environ['KERAS_BACKEND'])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)

    assert done.stdout == "torch tensorflow\n", done.stderr


def test_the_export_of_a_torch_module_imports_no_keras() -> None:
    code = (
        "import sys, torch, recurd_export, recurd_export.pytorch.front, recurd_export.sources as s\n"
        "s.front_end(torch.nn.LSTM(2, 3), torch.zeros(2, 3, 2)); print('keras' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout == "False\n"
