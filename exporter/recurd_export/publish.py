"""Writes a model file so that it has its final name only when it is complete and proven."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx

from recurd_export.errors import ExportError


def check_target(path: Path) -> None:
    """Refuse at once, with :class:`ExportError`, a path that could not be written or would not be read."""
    if not path.parent.is_dir():
        raise ExportError(f"{path}: cannot be written: there is no directory {path.parent}")
    if path.is_dir():
        raise ExportError(f"{path}: cannot be written: it is a directory")
    sidecar = path.with_suffix(".contract.json")
    if sidecar.exists():
        raise ExportError(
            f"{path}: the contract in {sidecar.name} beside it would be taken instead of its own; remove it"
        )


@contextlib.contextmanager
def unpublished(model: onnx.ModelProto, path: Path) -> Iterator[Path]:
    """Write the model beside ``path`` under a temporary name; on leaving without an error it becomes ``path``.

    The file and its directory are synced to the disk. On any error, also Ctrl-C, nothing of it is left. Raises
    :class:`ExportError` when the file cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise ExportError(f"{path}: cannot be written: {error.strerror}") from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            _write(file.fileno(), model.SerializeToString(), path)
        yield temporary
        _rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(descriptor: int, data: bytes, path: Path) -> None:
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fchmod(descriptor, 0o666 & ~_umask())
        os.fsync(descriptor)
    except OSError as error:
        raise ExportError(f"{path}: cannot be written: {error.strerror}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _rename(temporary: Path, path: Path) -> None:
    try:
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise ExportError(f"{path}: cannot be written: {error.strerror}") from error
