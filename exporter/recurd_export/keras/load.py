"""Keras files, and Keras itself: imported when it is needed, with its torch back end."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from recurd_export.errors import ExportError, ExportUsageError

#: What an HDF5 file begins with.
_HDF5 = b"\x89HDF\r\n\x1a\n"
#: Arguments that Keras 2 wrote into its files and Keras 3 refuses.
_KERAS_2_ONLY = ("time_major",)
#: Of the options of a layer, those that no initializer, regularizer or policy has.
_OF_LAYERS = ("name", "trainable")
_MODELS = ("Sequential", "Functional", "Model")
#: What reading a damaged file raises.
_DAMAGED = (zipfile.BadZipFile, zlib.error, OSError, ValueError, TypeError, EOFError, RecursionError)


def import_keras() -> Any:
    """Keras 3; with the torch back end, unless the caller has imported it already or asks for another.

    Raises :class:`ExportError` when there is no Keras, or an old one.
    """
    try:
        with back_end():
            import keras
    except ImportError as error:
        raise ExportUsageError(
            f"a Keras model needs Keras 3, and it cannot be imported ({error}); install the extra 'keras'"
        ) from error
    if int(keras.__version__.partition(".")[0]) < 3:
        raise ExportUsageError(f"a Keras model needs Keras 3, and this is Keras {keras.__version__}; install keras>=3")
    return keras


@contextlib.contextmanager
def back_end() -> Iterator[None]:
    """Keras that is imported inside comes with its torch back end, unless another is asked for and there."""
    wanted = os.environ.get("KERAS_BACKEND")
    if "keras" not in sys.modules and (not wanted or importlib.util.find_spec(wanted) is None):
        os.environ["KERAS_BACKEND"] = "torch"
    try:
        yield
    finally:
        if wanted is None:
            os.environ.pop("KERAS_BACKEND", None)
        else:
            os.environ["KERAS_BACKEND"] = wanted


def load(path: Path) -> Any:
    """The model of a ``.keras`` or HDF5 file; no code in it is run.

    Raises :class:`ExportError` in one sentence for whatever is not such a file, most of it before Keras is imported.
    """
    if is_hdf5(path, "model.save('model.keras')"):
        return _load_hdf5(import_keras(), path)
    return _load_zip(path)


def is_hdf5(path: Path, how: str) -> bool:
    """Whether it is an HDF5 file or else a zip file. Raises :class:`ExportError` for one that is neither."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_HDF5))
    except OSError as error:
        raise ExportUsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    if start != _HDF5 and start[:2] != b"PK":
        raise ExportError(f"{path}: is not a Keras file; write one with {how}")
    return start == _HDF5


def _load_zip(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read("config.json"))
            names = archive.namelist()
            damaged = archive.testzip()
    except KeyError as error:
        raise ExportError(f"{path}: is a zip file, but no Keras file (it has no config.json)") from error
    except _DAMAGED as error:
        raise ExportError(f"{path}: is cut off or damaged ({say(error)}); copy it again") from error
    if damaged is not None:
        raise ExportError(f"{path}: is damaged (in {damaged}); copy it again")
    if "model.weights.h5" not in names:
        raise ExportError(f"{path}: has no weights in it (no model.weights.h5); write it with model.save()")
    keras = import_keras()
    _check_classes(keras, path, config)

    def edit(copy: Path) -> None:
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
            for name in names:
                new.writestr(name, json.dumps(_of_keras_3(config)) if name == "config.json" else old.read(name))

    return _load_copy(keras, path, "model.keras", edit if _of_keras_3(config) != config else None)


def _load_hdf5(keras: Any, path: Path) -> Any:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            text = file.attrs.get("model_config")
            config = None if text is None else json.loads(text)
            has_layers = "model_weights" in file
    except (*_DAMAGED, RuntimeError) as error:
        raise ExportError(f"{path}: is cut off or damaged ({say(error)}); copy it again") from error
    if config is None or not has_layers:
        raise ExportError(
            f"{path}: holds weights only; write the whole model with model.save('model.keras'), or load them into it "
            f"and give the model"
        )
    _check_classes(keras, path, config)

    def edit(copy: Path) -> None:
        shutil.copyfile(path, copy)
        with h5py.File(copy, "r+") as file:
            file.attrs["model_config"] = json.dumps(_of_keras_3(config))

    return _load_copy(keras, path, "model.h5", edit if _of_keras_3(config) != config else None)


def _load_copy(keras: Any, path: Path, name: str, edit: Callable[[Path], None] | None) -> Any:
    """Load it under a name by which Keras knows the format, as an edited copy where it needs one."""
    from recurd_export.keras.quiet import quiet

    with tempfile.TemporaryDirectory() as folder, quiet():
        file = Path(folder, name)
        try:
            if edit is None:
                file.symlink_to(path.resolve())
            else:
                edit(file)
            return keras.saving.load_model(file, compile=False, safe_mode=True)
        except Exception as error:  # Keras raises many types
            raise ExportError(f"{path}: Keras {keras.__version__} cannot load it: {say(error)}") from error


def _of_keras_3(config: Any) -> Any:
    """The same without arguments that Keras 2 wrote and Keras 3 refuses, where they say nothing."""
    if isinstance(config, list):
        return [_of_keras_3(item) for item in config]
    if not isinstance(config, dict):
        return config
    return {key: _of_keras_3(value) for key, value in config.items() if not (key in _KERAS_2_ONLY and value is False)}


def _check_classes(keras: Any, path: Path, config: Any) -> None:
    """Refuse what only code of the file's author could build, before Keras looks for it."""
    if not isinstance(config, dict):
        raise ExportError(f"{path}: is no file of a Keras model; write one with model.save('model.keras')")
    # The model itself and what it is made of; what it was compiled with is not needed.
    for node in (config, *_dictionaries(config.get("config"))):
        name, module, registered = (node.get(key) for key in ("class_name", "module", "registered_name"))
        config_of_node = node.get("config")
        options: dict[str, Any] = config_of_node if isinstance(config_of_node, dict) else {}
        if name in ("Lambda", "__lambda__"):
            layer = options.get("name", "lambda")
            raise ExportError(
                f"{path}: layer '{layer}' (Lambda) is code, and code in files is not run; use Keras' own layers for "
                f"what it does"
            )
        if isinstance(module, str):
            is_own = module.partition(".")[0] == "keras"
        elif "registered_name" in node:
            is_own = not isinstance(registered, str)
        else:  # as HDF5 files have it, which say no more than the class of a layer
            is_layer = node is config or not options.keys().isdisjoint(_OF_LAYERS)
            is_own = not is_layer or hasattr(keras.layers, str(name)) or name in _MODELS
        if isinstance(name, str) and not is_own:
            raise ExportError(f"{path}: {_of_your_own(node)}")


def _of_your_own(node: dict[str, Any]) -> str:
    config, name = node.get("config"), node.get("class_name")
    layer = f" (layer '{config['name']}')" if isinstance(config, dict) and "name" in config else ""
    what = f"function '{config}'" if name == "function" else f"class '{name}'"
    return (
        f"needs the {what}{layer}, which is not Keras' own and whose code is not in the file; load it in Python where "
        f"that is known and rebuild it of Keras' own layers (keras.Sequential or the functional API), or write its "
        f"step in torch and export that"
    )


def _dictionaries(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from _dictionaries(item)
    elif isinstance(value, list):
        for item in value:
            yield from _dictionaries(item)


def say(error: BaseException) -> str:
    """The first sentence of what Keras says, which may be pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.split(r"\.\s+(?=[A-Z])", lines[0])[0].rstrip(".") if lines else type(error).__name__
