"""Arguments and return values of a model: nested tuples, lists, dictionaries and dataclasses of tensors, flattened."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from recurd_export.errors import ExportError

#: Where a tensor stands in a nest: keys, field names and positions.
Path = tuple[str | int, ...]


def leaves(value: Any, path: Path = ()) -> list[tuple[Path, torch.Tensor]]:
    """All tensors of a nest, in order, with their paths; ``None`` counts as nothing.

    Raises :class:`ExportError` for anything that is neither a tensor nor a nest.
    """
    if value is None:
        return []
    if isinstance(value, torch.Tensor):
        return [(path, value)]
    if isinstance(value, PackedSequence):
        raise ExportError(
            "the model returns a PackedSequence; lengths are part of the contract, so return plain tensors"
        )
    found: list[tuple[Path, torch.Tensor]] = []
    for key, item in _items(value):
        found += leaves(item, (*path, key))
    return found


def _items(value: Any) -> Iterator[tuple[str | int, Any]]:
    if isinstance(value, Mapping):
        return ((str(key), item) for key, item in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return zip(value._fields, value, strict=True)
    if isinstance(value, tuple | list):
        return iter(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    raise ExportError(
        f"the model takes or returns {_article(type(value).__name__)} where a tensor, or a tuple, list, dictionary or "
        f"dataclass of tensors, is needed"
    )


def _article(word: str) -> str:
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}"


def map_leaves(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same nest (of tuples, lists and dictionaries) with every tensor changed; other things stay as they are."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return type(value)({key: map_leaves(item, change) for key, item in value.items()})  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_leaves(item, change) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(map_leaves(item, change) for item in value)
    return value
