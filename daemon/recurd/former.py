"""Copies of the model files that durable streams run on, so that the next daemon has the former versions too.

Streams that finish on a version which was replaced outlive the daemon, and the file of that version is gone by then. So
beside the journal there is a copy of every file that is served, by the name of its version.
"""

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from recurd import config
from recurd.errors import ContractError, StartError
from recurd.loading import Loaded, fingerprint, load
from recurd.saving import VERSION_DIGITS

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

_SIDECAR = ".contract.json"
#: What the name of a copy looks like; files of others may lie in the same folder.
_COPY = re.compile(rf"([0-9a-f]{{{VERSION_DIGITS}}})(\.onnx|\.contract\.json|\.part|\.contract\.part)")


class Copies:
    """The folder of the copies. Owned by what owns the journal; :meth:`keep` may be called on any thread."""

    def __init__(self, folder: Path, settings: config.Config, device: str, log: "FilteringBoundLogger") -> None:
        self._folder = folder
        self._settings = settings
        self._device = device
        self._log = log

    def keep(self, loaded: Loaded) -> None:
        """Copy a file that is about to serve. That it cannot be is logged: only a start with another file needs it."""
        source, target = Path(loaded.entry.path), self._path(loaded.model.stamp.version)
        try:
            if not loaded.fingerprint or (target.exists() and fingerprint(target) == loaded.fingerprint):
                return
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _copy(source.with_suffix(_SIDECAR), target.with_suffix(_SIDECAR))
            _copy(source, target)
            if fingerprint(target) != loaded.fingerprint:
                raise ContractError(f"{source}: it was written while it was copied")
        except (OSError, ContractError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or str(error)
            self._log.warning("version_not_kept", model=loaded.name, path=str(target), reason=reason)

    def load(self, name: str, version: str) -> Loaded | None:
        """A former version of a model; ``None`` where it was not kept or cannot be loaded, which is logged."""
        path = self._path(version)
        if not path.exists():
            return None
        slots = next((entry.slots for entry in self._settings.models if entry.name == name), None)
        try:
            loaded = load(config.Model(path=str(path), name=name, slots=slots), self._settings, self._device)
            self._log.info("former_version_loaded", model=name, version=version, seconds=loaded.seconds)
            return loaded
        except StartError as error:
            self._log.warning("version_not_kept", model=name, path=str(path), reason=str(error))
            return None

    def forget(self, versions: Collection[str]) -> None:
        """Delete all copies but those of some versions; whatever else lies there stays."""
        for path in self._folder.glob("*"):
            copy = _COPY.fullmatch(path.name)
            if copy is None or copy[1] in versions:
                continue
            try:
                path.unlink()
            except OSError as error:
                self._log.warning("version_not_forgotten", path=str(path), reason=error.strerror)

    def _path(self, version: str) -> Path:
        return self._folder / f"{version}.onnx"


def _copy(source: Path, target: Path) -> None:
    """Copy a file so that it is there as a whole or as it was before; where there is none, there is none then."""
    if not source.exists():
        target.unlink(missing_ok=True)
        return
    part = target.with_suffix(".part")
    try:
        with source.open("rb") as original, part.open("wb") as copy:
            shutil.copyfileobj(original, copy)
            copy.flush()
            os.fsync(copy.fileno())
        os.replace(part, target)
        _sync(target.parent)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _sync(folder: Path) -> None:
    """Have the names in a folder survive the machine's death."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
