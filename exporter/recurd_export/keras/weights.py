"""Weights alone, for a Keras model that its factory built."""

import re
import tempfile
from pathlib import Path
from typing import Any

from recurd_export.errors import ExportError, ExportUsageError
from recurd_export.keras.load import is_hdf5, say
from recurd_export.keras.quiet import quiet

HOW = "model.save_weights('model.weights.h5')"


def load_weights(model: Any, path: Path) -> None:
    """Load what ``model.save_weights`` wrote into a model.

    Raises :class:`ExportError` in one sentence for another file, and for weights that are not this model's.
    """
    if not is_hdf5(path, HOW):
        raise ExportUsageError(
            f"{path}: is not a file of Keras weights; export a whole model by its own name, or {HOW}"
        )
    if path.suffix not in (".h5", ".hdf5"):
        raise ExportUsageError(f"{path}: is not called as Keras wants it; name it {path.stem}.weights.h5")
    with quiet(), tempfile.TemporaryDirectory() as folder:
        again = Path(folder, "again.weights.h5")
        try:
            model.load_weights(path)
            model.save_weights(again)
            left = len(_of_layers(path)) - len(_of_layers(again))
        except Exception as error:  # Keras raises many types
            raise ExportError(f"{path}: does not fit model '{model.name}': {_why(error)}") from error
    if left > 0:
        raise ExportError(f"{path}: does not fit model '{model.name}': {left} of its tensors have no place in it")


def _of_layers(path: Path) -> list[str]:
    """The tensors of the layers in a file as Keras 3 writes it; Keras itself does not tell of those it leaves."""
    import h5py

    names: list[str] = []
    with h5py.File(path, "r") as file:
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return [name for name in names if name.startswith("layers/") and "seed_generator" not in name]


def _why(error: Exception) -> str:
    """What is wrong with the first layer that does not fit: Keras counts them, names one, and then says it."""
    counted, *lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    layer = re.match(r"A total of .* for object <\w+ name=(\w+)", counted)
    return f"'{layer[1]}': {say(ValueError(lines[0]))}" if layer and lines else say(error)
