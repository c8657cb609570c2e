"""Model files: read, verified and warmed before any stream meets them; at the start and at every reload."""

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from msgspec import structs

from recurd import config, verify
from recurd.errors import ContractError
from recurd.metrics import ModelLabels
from recurd.model import Model
from recurd.scheduler import Shape


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model that may serve."""

    #: As configured, with the name that clients use.
    entry: config.Model
    model: Model
    #: Of the file's content (:func:`fingerprint`).
    fingerprint: str
    #: Whether its results do not depend on who shares a tick and how a stream is cut.
    bit_exact: bool
    #: Largest error of the golden run; ``None`` where the contract has no proof.
    golden_error: float | None
    seconds: float

    @property
    def name(self) -> str:
        """What clients call it."""
        assert self.entry.name is not None  # load() gave it one
        return self.entry.name

    @property
    def labels(self) -> ModelLabels:
        """What the metrics tell of it."""
        contract = self.model.contract
        return ModelLabels(contract.version, self.model.device, contract.weights_sha256[:12])


def load(entry: config.Model, settings: config.Config, device: str) -> Loaded:
    """Load a model, replay its golden run, so that a wrong answer is found here and not by a customer, and warm it.

    Raises :class:`ContractError`, :class:`~recurd.errors.DeviceError` or :class:`~recurd.errors.ConfigError`.
    """
    begin = time.monotonic()
    mark = fingerprint(entry.path)
    slots = entry.slots or settings.slots
    model = Model.load(entry.path, device=device, slots=slots, threads=settings.threads)
    if fingerprint(entry.path) != mark:
        raise ContractError(f"{entry.path}: it was written while it was read; try again when it is whole")
    error = verify.replay_golden(model)
    bit_exact = verify.is_bit_exact(model, settings.tick.rows, Shape.of(model, settings.tick))
    first = np.zeros(1, np.int64)
    model.write_rows(first, model.rows(first))
    return Loaded(
        entry=structs.replace(entry, name=entry.name or model.contract.name),
        model=model,
        fingerprint=mark,
        bit_exact=bit_exact,
        golden_error=error,
        seconds=round(time.monotonic() - begin, 3),
    )


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a model file, and of the contract beside it where there is one. Raises :class:`ContractError`.

    A pipe can be read once only, so it never changes: its mark is empty.
    """
    path = Path(path)
    sidecar = path.with_suffix(".contract.json")
    marks = []
    try:
        if path.is_fifo():
            return ""
        if path.is_char_device():
            raise ContractError(f"{path}: is no file, and may have no end")
        for part in (path, sidecar) if sidecar.exists() else (path,):
            with part.open("rb") as file:
                marks.append(hashlib.file_digest(file, "sha256").hexdigest())
    except FileNotFoundError as error:
        raise ContractError(f"{path}: there is no such file") from error
    except OSError as error:
        raise ContractError(f"{path}: cannot be read: {error.strerror}") from error
    return "+".join(marks)
