"""Picks the front end for whatever is to be exported; the frameworks are imported only when they are needed."""

import os
import sys
from os import PathLike
from pathlib import Path
from typing import Any

from recurd_export.errors import ExportError, ExportUsageError, kind
from recurd_export.pipeline import FrontEnd

KERAS_FILES = frozenset({".keras", ".h5", ".hdf5"})
TORCH_FILES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl", ".safetensors"})


def is_file_of_a_model(target: str) -> bool:
    """Whether a target of the command line names a file, not ``package.module:factory``."""
    return ":" not in target and Path(target).suffix.lower() in KERAS_FILES | TORCH_FILES | {".onnx"}


def front_end(model: Any, example: Any, *, step: bool = False, trust_pickle: bool = False) -> FrontEnd:
    """The front end for a ``torch.nn.Module``, a Keras model, or a file of either.

    ``step``: the module's forward is one time step. ``trust_pickle``: code in a file of a torch model may be run.
    Raises :class:`ExportError` for anything else.
    """
    if isinstance(model, str | PathLike):
        model = load_file(Path(model), trust_pickle)
    if isinstance(model, Path) or is_keras(model):
        return _keras(model, example, step)
    return _torch(model, example, step)


def load_file(path: Path, trust_pickle: bool) -> Any:
    """The torch module in a file; a Keras file stays a path, as its front end reads more than the model from it.

    Raises :class:`ExportError` for a file that holds neither.
    """
    if path.suffix.lower() in KERAS_FILES:
        return path
    if path.suffix.lower() == ".onnx":
        raise ExportUsageError(f"{path}: an ONNX file is not exported but adopted: recurd adopt {path.name}")
    if path.suffix.lower() not in TORCH_FILES:
        raise ExportUsageError(
            f"{path}: is no file of a model by its name; those are {', '.join(sorted(KERAS_FILES | TORCH_FILES))}"
        )
    from recurd_export.pytorch.files import make_importable, read_module

    make_importable(os.getcwd())  # where the class of a pickled model may be
    return read_module(path, trusted=trust_pickle)


def _torch(model: Any, example: Any, step: bool) -> FrontEnd:
    from torch import nn

    if not isinstance(model, nn.Module):
        raise ExportError(
            f"there is no way to export {kind(model)}; give a torch.nn.Module, a Keras model, or a file of either"
        )
    from recurd_export import factory
    from recurd_export.pytorch.front import front

    if step:
        if example is None:
            raise ExportUsageError("the module of one step needs an example: one step [batch, ...], and every state")
        return front(model, example, step=True)
    return front(model, factory.make_example(model, None, None) if example is None else example)


def _keras(model: Any, example: Any, step: bool) -> FrontEnd:
    if example is not None:
        raise ExportUsageError("a Keras model says itself what its input is; give no example")
    if step:
        raise ExportUsageError("a Keras model works on whole sequences; step is for torch modules of one time step")
    from recurd_export.keras import front

    return front(model)


def is_keras(model: Any) -> bool:
    """Whether it is Keras' own; it is only where somebody has imported keras. (On torch it is an nn.Module too.)"""
    keras = sys.modules.get("keras")
    return keras is not None and isinstance(model, keras.layers.Layer)
