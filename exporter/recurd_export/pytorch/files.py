"""Files that torch writes: weights for a model, and whole models.

Weights are read without running anything. A whole model (``torch.save(model)``) is a pickle: loading it runs whatever
its author put into it, so it is loaded only for a caller who says that the file is trusted.
"""

import pickle
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recurd_export.errors import ExportError, ExportUsageError, kind
from recurd_export.pytorch.watch import first_line

#: Where training scripts put the weights, or the model, in a file that holds more.
_WEIGHTS_KEYS = ("state_dict", "model_state_dict", "model")
_MODEL_KEYS = ("model", "ema")


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict (``torch.save`` or safetensors) into a model; nothing in the file is executed.

    Raises :class:`ExportError` for a file that cannot be read and for weights that do not fit.
    """
    weights = _without_prefix(_read_weights(path), model)
    own = model.state_dict()
    missing = sorted(_not_given(own, weights.keys()))
    unexpected = sorted(weights.keys() - own.keys())
    if missing or unexpected:
        raise ExportError(f"{path}: does not fit {type(model).__name__}: {_few('missing', missing, unexpected)}")
    for name, value in weights.items():
        if isinstance(own[name], Tensor) and own[name].shape != value.shape:
            raise ExportError(
                f"{path}: does not fit {type(model).__name__}: '{name}' is {list(value.shape)}, the model's is "
                f"{list(own[name].shape)}"
            )
    model.load_state_dict(weights, strict=False)


def read_module(path: Path, *, trusted: bool) -> nn.Module:
    """A whole model from a file. With ``trusted`` code in the file is run, as unpickling does.

    Raises :class:`ExportError` for a file that holds no model, and :class:`ExportUsageError` when it is not trusted.
    """
    _refuse_graphs(path)
    if not trusted:
        _read_weights(path, whole=True)
        raise ExportUsageError(
            f"{path}: holds weights only; name what builds the model: recurd export package.module:factory "
            f"--weights {path.name}"
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=False)
    except OSError as error:
        raise _unreadable(path, error) from error
    except (AttributeError, ImportError) as error:
        raise ExportError(
            f"{path}: the class of its model cannot be imported here ({first_line(error)}); run this where the module "
            f"that defines it can be, or save model.state_dict() and name a factory"
        ) from error
    except Exception as error:  # a broken file raises many types, and code in it any
        raise ExportError(f"{path}: is not a file of a torch model{_why(error)}") from error
    for key in _MODEL_KEYS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), nn.Module):
            loaded = loaded[key]
    if not isinstance(loaded, nn.Module):
        raise ExportError(f"{path}: holds {kind(loaded)}, not a torch.nn.Module")
    return loaded


def _refuse_graphs(path: Path) -> None:
    """Files of graphs, whose layers can no longer be told apart."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    for part, what in (("/code/", "TorchScript"), ("models/model.json", "torch.export")):
        if any(part in f"/{name}" for name in names):
            raise ExportError(
                f"{path}: is a {what} archive, in which the states cannot be told apart any more; export the "
                f"torch.nn.Module it was made from"
            )


def _read_weights(path: Path, *, whole: bool = False) -> Mapping[str, Any]:
    """The state dict in a file. ``whole``: the caller would rather have a whole model, and is told how."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _unreadable(path, error) from error
    except pickle.UnpicklingError as error:
        raise _not_weights(path, whole) from error
    except Exception as error:  # both formats raise many types for a broken file
        raise ExportError(f"{path}: is not a file of weights{_why(error)}") from error
    for key in _WEIGHTS_KEYS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ExportError(f"{path}: holds no state dict (a mapping of names to tensors)")
    return loaded


def _unreadable(path: Path, error: OSError) -> ExportUsageError:
    return ExportUsageError(f"{path}: cannot be read: {error.strerror or first_line(error)}")


def _why(error: Exception) -> str:
    """What a loader says of a broken file, where it says more than a number or a key it stumbled over."""
    words = first_line(error) if str(error) else ""
    return f": {words.rstrip('.')}" if " " in words else ""


def _not_weights(path: Path, whole: bool) -> ExportError:
    if not zipfile.is_zipfile(path):
        return ExportError(f"{path}: is not a file of weights")
    if whole:
        return ExportUsageError(
            f"{path}: holds a whole model, and loading one runs code that is in the file; say --trust-pickle if you "
            f"trust where it comes from, or save model.state_dict() and name a factory"
        )
    return ExportError(
        f"{path}: holds more than weights, which is not loaded because it could run code; save model.state_dict() "
        f"instead"
    )


def _without_prefix(weights: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Names as the model has them, where a wrapper (DataParallel, torch.compile) has put its own before all of them."""
    for prefix in ("module.", "_orig_mod."):
        if weights and all(name.startswith(prefix) for name in weights) and not hasattr(model, prefix[:-1]):
            return {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _not_given(own: Mapping[str, Any], given: Iterable[str]) -> set[str]:
    """Names that are not given, nor share their storage with one that is (safetensors stores tied weights once)."""
    places = {(own[name].data_ptr(), own[name].shape) for name in given if isinstance(own.get(name), Tensor)}
    return {
        name
        for name in own.keys() - set(given)
        if not (isinstance(own[name], Tensor) and (own[name].data_ptr(), own[name].shape) in places)
    }


def _few(word: str, missing: list[str], unexpected: list[str]) -> str:
    parts = [
        f"{word} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for word, names in ((word, missing), ("unexpected", unexpected))
        if names
    ]
    return "; ".join(parts)


def make_importable(folder: str) -> None:
    """Let modules below a folder be imported, as ``python -m`` does for the current one."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
