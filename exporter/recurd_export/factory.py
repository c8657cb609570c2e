"""A factory of models that the command line names, and an example for what it makes."""

import importlib
import os
from typing import Any

import torch
from torch import Tensor, nn

from recurd_export.errors import ExportError, ExportUsageError, kind
from recurd_export.keras.load import back_end
from recurd_export.pytorch.files import make_importable
from recurd_export.pytorch.layout import check_modules
from recurd_export.pytorch.watch import first_line, label
from recurd_export.sources import is_keras

#: Batch and steps of an example nobody gave.
GUESSED = (2, 16)


def build(target: str) -> tuple[Any, Any]:
    """Call ``package.module:factory`` (also found below the current directory); its model, and its example or ``None``.

    The factory may be a function or class that gives a torch module or a Keras model, or a module and an example, or be
    a model itself.
    Raises :class:`ExportError` when there is no such thing or it raises.
    """
    make_importable(os.getcwd())
    with back_end():
        factory = _find(target)
        try:
            built = factory if _is_model(factory) else factory()
        except Exception as error:  # the factory is the user's code
            raise ExportError(f"factory '{target}' failed: {type(error).__name__}: {first_line(error)}") from error
    model, example = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not _is_model(model):
        raise ExportError(
            f"factory '{target}' gives {kind(model)}; it must give a torch.nn.Module, or one and an example, or a "
            f"Keras model"
        )
    return model, example


def _is_model(value: Any) -> bool:
    """Whether it is a torch module or a Keras model."""
    return isinstance(value, nn.Module) or is_keras(value)


def _find(target: str) -> Any:
    module_name, colon, path = target.partition(":")
    if not colon or not module_name or not path:
        raise ExportUsageError(f"'{target}' does not name a factory; write package.module:factory")
    if module_name.endswith(".py"):
        dotted = module_name.removesuffix(".py").strip("./").replace("/", ".")
        raise ExportUsageError(f"'{target}' names a file, not a module; write {dotted}:{path}")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ExportUsageError(f"there is no module '{error.name}' (looked in {os.getcwd()} too)") from error
        raise ExportError(f"module '{module_name}' cannot be imported: {first_line(error)}") from error
    except Exception as error:  # the module is the user's code
        raise ExportError(
            f"module '{module_name}' cannot be imported: {type(error).__name__}: {first_line(error)}"
        ) from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise ExportUsageError(f"module '{module_name}' has no '{path}'")
        found = getattr(found, name)
    if not callable(found):
        raise ExportUsageError(f"'{target}' is {kind(found)}, not a factory of modules")
    return found


def make_example(model: nn.Module, shape: tuple[int, ...] | None, dtype: str | None) -> Tensor:
    """An example of a shape and element type; what is not given is guessed from the first layer with parameters.

    Raises :class:`ExportError` when it cannot be guessed, and at once for a model that cannot be exported anyway.
    """
    check_modules(model)
    if shape is None or dtype is None:
        guessed_shape, guessed_dtype = _guess(model, shape is None)
        shape, dtype = shape or guessed_shape, dtype or guessed_dtype
    if dtype == "int64":
        return torch.zeros(shape, dtype=torch.int64)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _guess(model: nn.Module, needed: bool) -> tuple[tuple[int, ...], str]:
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            return GUESSED, "int64"
        if isinstance(module, nn.Linear):
            return (*GUESSED, module.in_features), "float32"
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            return (*GUESSED, module.input_size), "float32"
        if needed and next(module.parameters(recurse=False), None) is not None and path:
            raise ExportError(
                f"no example is given, and it cannot be guessed from {label(path, module)}; name its shape with "
                f"--example"
            )
    if needed:
        raise ExportError("no example is given, and it cannot be guessed from the model; name its shape with --example")
    return GUESSED, "float32"
