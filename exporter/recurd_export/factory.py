"""What the command line names, turned into objects: a factory, its weights, an example."""

import importlib
import os
import pickle
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recurd_export.errors import ExportError, ExportUsageError
from recurd_export.pytorch.layout import check_modules
from recurd_export.pytorch.watch import first_line, label

#: Batch and steps of an example nobody gave.
GUESSED = (2, 16)


def build(target: str) -> tuple[nn.Module, Any]:
    """Call ``package.module:factory`` (also found below the current directory); its model, and its example or ``None``.

    The factory may be a function or class that gives a module, or a module and an example, or be a module itself.
    Raises :class:`ExportError` when there is no such thing or it raises.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as 'python -m' does
    factory = _find(target)
    try:
        built = factory if isinstance(factory, nn.Module) else factory()
    except Exception as error:  # the factory is the user's code
        raise ExportError(f"factory '{target}' failed: {type(error).__name__}: {first_line(error)}") from error
    model, example = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(model, nn.Module):
        raise ExportError(
            f"factory '{target}' gives {_article(model)}; it must give a torch.nn.Module, or one and an example"
        )
    return model, example


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
        raise ExportUsageError(f"'{target}' is {_article(found)}, not a factory of modules")
    return found


def _article(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict (``torch.save`` or safetensors) into a model; nothing in the file is executed.

    Raises :class:`ExportError` for a file that cannot be read and for weights that do not fit.
    """
    weights = _without_prefix(_read_weights(path), model)
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unexpected:
        raise ExportError(f"{path}: does not fit {type(model).__name__}: {_few('missing', missing, unexpected)}")
    for name, value in weights.items():
        if isinstance(own[name], Tensor) and own[name].shape != value.shape:
            raise ExportError(
                f"{path}: does not fit {type(model).__name__}: '{name}' is {list(value.shape)}, the model's is "
                f"{list(own[name].shape)}"
            )
    model.load_state_dict(weights)


def _read_weights(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ExportUsageError(f"{path}: cannot be read: {error.strerror or first_line(error)}") from error
    except pickle.UnpicklingError as error:
        raise ExportError(
            f"{path}: holds more than weights, which is not loaded because it could run code; save "
            f"model.state_dict() instead"
            if zipfile.is_zipfile(path)
            else f"{path}: is not a file of weights"
        ) from error
    except Exception as error:  # both formats raise many types for a broken file
        raise ExportError(f"{path}: is not a file of weights: {first_line(error)}") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ExportError(f"{path}: holds no state dict (a mapping of names to tensors)")
    return loaded


def _without_prefix(weights: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Names as the model has them, where a wrapper (DataParallel, torch.compile) has put its own before all of them."""
    for prefix in ("module.", "_orig_mod."):
        if weights and all(name.startswith(prefix) for name in weights) and not hasattr(model, prefix[:-1]):
            return {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _few(word: str, missing: list[str], unexpected: list[str]) -> str:
    parts = [
        f"{word} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for word, names in ((word, missing), ("unexpected", unexpected))
        if names
    ]
    return "; ".join(parts)


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
        if isinstance(module, nn.RNNBase):
            return (*GUESSED, module.input_size), "float32"
        if needed and next(module.parameters(recurse=False), None) is not None and path:
            raise ExportError(
                f"no example is given, and it cannot be guessed from {label(path, module)}; name its shape with "
                f"--example"
            )
    if needed:
        raise ExportError("no example is given, and it cannot be guessed from the model; name its shape with --example")
    return GUESSED, "float32"
