"""Streams in a file: safetensors, which anything that reads tensors can look into.

=============== ======================================================================================================
``MODEL/STATE`` one tensor per state of a model, ``[streams, *shape]``: the streams that stand at no fresh start
``streams``     JSON as bytes: every stream's tenant, name, handle, numbers, row in its model's tensors, and answers
``answers``     the results that were not acknowledged, one after another as bytes
metadata        ``format``, ``stamps`` (what the streams were run by) and ``sha256`` (:func:`digest`)
=============== ======================================================================================================

Models of which two versions have streams are told apart by their state hash: ``MODEL@HASH/STATE``. Nothing in a file is
trusted: whatever is in it, reading it ends in streams or in one sentence, and the daemon looks at each of them again.
"""

import contextlib
import hashlib
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from recurd.errors import StateFileError
from recurd.saving import ModelStamp, Parcel, SavedStream, Stamp

FORMAT = "1"
Array = npt.NDArray[Any]
_STATE = re.compile(r"(.+?) (float16|float32|float64|int32|int64) \[([\d, ]*)\](?:, |$)")


class _Answer(msgspec.Struct, frozen=True, array_like=True):
    seq: int
    generation: int
    #: Bytes of its header and of its data.
    header: int
    data: int


class _Entry(msgspec.Struct, frozen=True):
    handle: int
    tenant: str
    name: str
    model: str
    state_hash: str
    first_generation: int
    generation: int
    seq: int
    acked: int
    idle_timeout: float
    #: In the tensors of its model; ``None``: it starts from the initial state.
    row: int | None
    answers: list[_Answer]


class _Column(NamedTuple):
    """Where a state stands in a row of bytes."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape) * self.dtype.itemsize


def _columns(stamp: Stamp) -> list[_Column]:
    """The states of one dtype stand side by side, dtypes in the order in which they first come (recurd.arena)."""
    states = []
    for name, dtype, shape in _STATE.findall(stamp.layout):
        states.append((name, np.dtype(dtype).newbyteorder("<"), tuple(int(n) for n in shape.split(",") if n.strip())))
    columns: list[_Column] = []
    for dtype in dict.fromkeys(dtype for _, dtype, _ in states):
        for name, own, shape in states:
            if own == dtype:
                columns.append(_Column(name, dtype, shape, columns[-1].end if columns else 0))
    return columns


def _prefix(one: ModelStamp, stamps: list[ModelStamp]) -> str:
    several = sum(other.model == one.model for other in stamps) > 1
    return f"{one.model}@{one.stamp.state_hash[:16]}" if several else one.model


# --- writing ---


def write(path: Path, parcels: Iterable[Parcel], stamps: list[ModelStamp]) -> None:
    """Write streams; a file that is there is replaced as a whole or not at all. Raises :class:`StateFileError`."""
    entries: list[_Entry] = []
    answers = bytearray()
    rows: dict[tuple[str, str], list[bytes]] = {(one.model, one.stamp.state_hash): [] for one in stamps}
    for parcel in parcels:
        saved = parcel.stream
        mine = rows[saved.model, parcel.state_hash]
        row = None
        if saved.state is not None:
            row = len(mine)
            mine.append(saved.state)
        sizes = []
        for seq, generation, header, data in parcel.answers:
            sizes.append(_Answer(seq, generation, len(header), len(data)))
            answers += header + data
        entries.append(
            _Entry(
                handle=parcel.handle,
                tenant=saved.tenant,
                name=saved.name,
                model=saved.model,
                state_hash=parcel.state_hash,
                first_generation=saved.first_generation,
                generation=saved.generation,
                seq=saved.seq,
                acked=saved.acked,
                idle_timeout=saved.idle_timeout,
                row=row,
                answers=sizes,
            )
        )
    tensors: dict[str, Array] = {
        "streams": np.frombuffer(msgspec.json.encode(entries), np.uint8),
        "answers": np.frombuffer(bytes(answers), np.uint8),
    }
    for one in stamps:
        mine = rows[one.model, one.stamp.state_hash]
        if mine:
            tensors |= _tensors(mine, one, _prefix(one, stamps))
    in_words = msgspec.json.encode(stamps).decode()
    _save(path, tensors, {"format": FORMAT, "stamps": in_words, "sha256": digest(tensors, in_words)})


def digest(tensors: Mapping[str, Array], stamps: str) -> str:
    """What tells a damaged file: SHA-256 of the stamps and of every tensor's name and bytes, in order of the names."""
    sha256 = hashlib.sha256(stamps.encode())
    for name in sorted(tensors):
        sha256.update(name.encode())
        sha256.update(np.ascontiguousarray(tensors[name]).view(np.uint8).data)
    return sha256.hexdigest()


def _tensors(rows: list[bytes], one: ModelStamp, prefix: str) -> dict[str, Array]:
    table = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1)
    columns = _columns(one.stamp)
    if not columns or columns[-1].end != table.shape[1]:
        raise StateFileError(f"the states of model '{one.model}' have names that a file cannot have")
    return {
        f"{prefix}/{column.name}": np.ascontiguousarray(table[:, column.start : column.end])
        .view(column.dtype)
        .reshape(len(rows), *column.shape)
        for column in columns
    }


def _save(path: Path, tensors: dict[str, Array], metadata: dict[str, str]) -> None:
    try:
        with tempfile.NamedTemporaryFile(dir=path.absolute().parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)  # readable by its owner alone, as states should be
    except OSError as error:
        raise StateFileError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise StateFileError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


# --- reading ---


def read(path: Path) -> tuple[list[Parcel], list[ModelStamp]]:
    """All streams of a file, and what they were run by. Raises :class:`StateFileError`, one sentence."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or "stamps" not in metadata:
                raise StateFileError(f"{path}: not a file of streams, or of a later version")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
        if metadata.get("sha256") != digest(tensors, metadata["stamps"]):
            raise StateFileError(f"{path}: it is damaged: its bytes are not those that were written (SHA-256)")
        stamps = msgspec.json.decode(metadata["stamps"], type=list[ModelStamp])
        entries = msgspec.json.decode(_bytes(tensors, "streams"), type=list[_Entry])
        return _parcels(entries, stamps, tensors), stamps
    except OSError as error:
        raise StateFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (SafetensorError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError, TypeError) as error:
        raise StateFileError(f"{path}: not a file of streams: {error}") from error


def _bytes(tensors: dict[str, Array], name: str) -> bytes:
    tensor = tensors.get(name)
    if tensor is None or tensor.dtype != np.uint8 or tensor.ndim != 1:
        raise ValueError(f"it has no '{name}' of bytes")
    return tensor.tobytes()


def _parcels(entries: list[_Entry], stamps: list[ModelStamp], tensors: dict[str, Array]) -> list[Parcel]:
    states = {(one.model, one.stamp.state_hash): _rows(one, _prefix(one, stamps), tensors) for one in stamps}
    data = memoryview(_bytes(tensors, "answers"))
    start = 0
    parcels = []
    for entry in entries:
        rows = states.get((entry.model, entry.state_hash))
        if rows is None or not (entry.row is None or 0 <= entry.row < len(rows)):
            raise ValueError(f"the state of stream '{entry.name}' is not in it")
        numbers = [entry.handle, entry.first_generation, entry.generation, entry.seq, entry.acked]
        numbers += [number for one in entry.answers for number in (one.seq, one.generation)]
        if not all(0 <= number < 2**64 for number in numbers):
            raise ValueError(f"the numbers of stream '{entry.name}' cannot be")
        answers = []
        for one in entry.answers:
            end = start + one.header + one.data
            if min(one.header, one.data) < 0 or end > len(data):
                raise ValueError(f"answer {one.seq} of stream '{entry.name}' is not in it")
            header = bytes(data[start : start + one.header])
            answers.append((one.seq, one.generation, header, bytes(data[start + one.header : end])))
            start = end
        saved = SavedStream(
            tenant=entry.tenant,
            name=entry.name,
            model=entry.model,
            first_generation=entry.first_generation,
            generation=entry.generation,
            seq=entry.seq,
            acked=entry.acked,
            idle_timeout=entry.idle_timeout,
            state=None if entry.row is None else rows[entry.row].tobytes(),
        )
        parcels.append(Parcel(entry.handle, saved, answers, entry.state_hash))
    return parcels


def _rows(one: ModelStamp, prefix: str, tensors: dict[str, Array]) -> Array:
    """Every stream's states of one model as bytes, ``[streams, bytes]``."""
    parts = []
    for column in _columns(one.stamp):
        tensor = tensors.get(f"{prefix}/{column.name}")
        if tensor is None:
            return np.zeros((0, 0), np.uint8)
        if tensor.dtype != column.dtype or tensor.shape[1:] != column.shape:
            raise ValueError(f"'{prefix}/{column.name}' is not {column.dtype} {list(column.shape)}")
        parts.append(np.ascontiguousarray(tensor).view(np.uint8).reshape(len(tensor), -1))
    if len({len(part) for part in parts}) > 1:
        raise ValueError(f"the states of model '{one.model}' are of different numbers of streams")
    return np.concatenate(parts, axis=1) if parts else np.zeros((0, 0), np.uint8)
