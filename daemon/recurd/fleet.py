"""Many streams as arrays: what a load generator sends and how it judges the answers. Sans-I/O.

A load generator shares the machine with the daemon it measures, so nothing here is done record by record but what is
rare. Streams go by their index, ``0`` to ``streams - 1``.
"""

import math
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from recurd import wire
from recurd.errors import Code, RecurdError, is_passing

Array = npt.NDArray[Any]


class Answers(NamedTuple):
    """Results that came, in order: index of the stream and seq of each."""

    ids: Array
    seqs: Array


class Fleet:
    """All streams of one run: their numbers, their input, what is in flight. Owned by the load generator."""

    def __init__(
        self, contract: dict[str, Any], handles: Array, generations: Array, *, chunk_steps: int, window: int, seed: int
    ) -> None:
        """``contract`` as WELCOME tells it; ``window``: records a stream may have in flight."""
        streams = len(handles)
        self._order = np.argsort(handles)
        self._sorted_handles = handles[self._order]
        self._window = window
        self._frames = _frames(contract, handles, generations, chunk_steps, seed)
        self._expected = _expected_result(contract, chunk_steps)
        self.sent = np.zeros(streams, np.int64)
        self.answered = np.zeros(streams, np.int64)
        self.lost = np.zeros(streams, np.bool_)
        # Streams with a refused record: how many of those in flight were, and from when on to try again.
        self._refused = np.zeros(streams, np.int64)
        self._retry_at: dict[int, float] = {}
        #: Refusals and errors by code, and records sent again.
        self.errors: Counter[str] = Counter()
        self.retries = 0

    @property
    def retry_at(self) -> float | None:
        """When the next refused stream may be tried again."""
        return min(self._retry_at.values(), default=None)

    def ready(self, due: Array, now: float) -> Array:
        """Streams that may send their next record: fewer sent than ``due``, room in the window, not waiting."""
        for index in [index for index, at in self._retry_at.items() if at <= now]:
            self._try_again(index)
        ready = (self.sent < due) & (self.sent - self.answered < self._window)
        if self._retry_at or self.lost.any():
            ready &= (self._refused == 0) & ~self.lost
        return np.flatnonzero(ready)

    def _try_again(self, index: int) -> None:
        """Go back to the first refused record, once everything in flight has been answered."""
        if self.sent[index] - self.answered[index] == self._refused[index]:
            self.retries += int(self._refused[index])
            self.sent[index] = self.answered[index]
            self._refused[index] = 0
            del self._retry_at[index]

    def send(self, ids: Array, records: int) -> list[bytes]:
        """The next record of each of these streams (each once), as frames of at most ``records`` records."""
        self.sent[ids] += 1
        headers = self._frames["header"]
        headers["seq"][ids] = self.sent[ids]
        headers["ack"][ids] = self.answered[ids]
        if records == 1:
            size = self._frames.itemsize
            data = self._frames[ids].tobytes()
            return [data[start : start + size] for start in range(0, len(data), size)]
        return [self._multi(ids[start : start + records]) for start in range(0, len(ids), records)]

    def _multi(self, ids: Array) -> bytes:
        part = self._frames[ids]
        if len(part) == 1:
            return part.tobytes()
        body = part["header"].tobytes() + part["data"].tobytes()
        return wire.pack(wire.Type.MULTI, size=len(body), steps=len(part)) + body

    def take(self, frames: list[bytes], now: float) -> Answers:
        """Judge what came. Raises :class:`RecurdError` when an answer is not what it must be."""
        headers = []
        for frame in frames:
            header, payload = wire.decode(frame)
            if header.type == wire.Type.MULTI:
                fields = np.frombuffer(payload, wire.HEADER_DTYPE, header.steps)
                payload = payload[fields.nbytes :]
            else:
                fields = np.frombuffer(frame, wire.HEADER_DTYPE, 1)
            if (fields["type"] != wire.Type.RESULT).any():
                fields = self._take_errors(fields, payload, now)
            headers.append(fields)
        results = np.concatenate(headers)
        ids = self._indices(results)
        return Answers(ids, self._accept(ids, results))

    def _indices(self, fields: Array) -> Array:
        places = np.searchsorted(self._sorted_handles, fields["handle"])
        places[places == len(self._order)] = 0
        if (self._sorted_handles[places] != fields["handle"]).any():
            raise RecurdError("an answer came for a stream that is not ours")
        return self._order[places]

    def _accept(self, ids: Array, results: Array) -> Array:
        """Check results and count them as answered; their seqs."""
        for name, value in self._expected.items():
            if (results[name] != value).any():
                raise RecurdError(f"a result's {name} is {results[name][results[name] != value][0]}, not {value}")
        if (wrong := results["generation"] != self._frames["header"]["generation"][ids]).any():
            raise RecurdError(f"a result of generation {results['generation'][wrong][0]} came for a chunk of another")
        if (results["flags"] & ~np.uint8(wire.Flag.FRESH)).any():
            raise RecurdError("a result came twice")
        seqs: Array = results["seq"].astype(np.int64)
        # A stream may be there several times: its answers must follow each other in the order in which they came.
        order = np.argsort(ids, kind="stable")
        ids, following = ids[order], seqs[order]
        before = self.answered[ids]
        again = np.flatnonzero(ids[1:] == ids[:-1])
        before[again + 1] = following[again]
        if (following != before + 1).any():
            at = np.flatnonzero(following != before + 1)[0]
            raise RecurdError(f"result {following[at]} of a stream came, {before[at] + 1} is the next")
        np.maximum.at(self.answered, ids, following)
        if (self.answered > self.sent).any():
            raise RecurdError("a result came for a chunk that was not sent")
        return seqs

    def _take_errors(self, fields: Array, payload: memoryview, now: float) -> Array:
        """Count what is not a result; the results among the records."""
        ends = np.cumsum(fields["size"], dtype=np.int64)
        for place in np.flatnonzero(fields["type"] != wire.Type.RESULT):
            one = fields[place]
            if one["type"] != wire.Type.ERROR:
                raise RecurdError(f"an answer of type {one['type']} came to a chunk")
            body = wire.decode_body(payload[ends[place] - one["size"] : ends[place]], wire.Error)
            if not one["handle"]:
                raise RecurdError(f"the daemon said: {body.code}: {body.text}")
            self._on_error(int(self._indices(fields[place : place + 1])[0]), int(one["code"]), body, now)
        results: Array = fields[fields["type"] == wire.Type.RESULT]
        return results

    def _on_error(self, index: int, code: int, body: wire.Error, now: float) -> None:
        self.errors[body.code] += 1
        if is_passing(code, body.retry_after_seconds) or (code == Code.GAP and self._refused[index]):
            self._refused[index] += 1
            self._retry_at[index] = max(now + (body.retry_after_seconds or 0.0), self._retry_at.get(index, 0.0))
        else:
            self.lost[index] = True
            self._retry_at.pop(index, None)


def _frames(contract: dict[str, Any], handles: Array, generations: Array, chunk_steps: int, seed: int) -> Array:
    """Every stream's next record as it goes over the wire: header and random input, the same for the same seed."""
    entry = contract["input"]
    code = wire.DTYPES[entry["dtype"]]
    numpy_type, width = wire.NUMPY_TYPES[code], math.prod(entry["shape"])
    shape = (len(handles), chunk_steps * width)
    random = np.random.default_rng(seed)
    if entry["dtype"].startswith("int"):
        data = random.integers(0, entry.get("classes") or 2, shape).astype(numpy_type)
    else:
        data = random.standard_normal(shape, np.float32).astype(numpy_type)
    size = shape[1] * numpy_type.itemsize
    frames = np.zeros(len(handles), [("header", wire.HEADER_DTYPE), ("data", numpy_type, (shape[1],))])
    header = frames["header"]
    values = {"magic": wire.MAGIC, "version": wire.VERSION, "type": wire.Type.CHUNK, "dtype": code, "size": size}
    values |= {"steps": chunk_steps, "width": width, "handle": handles, "generation": generations}
    for name, value in values.items():
        header[name] = value
    frames["data"] = data
    return frames


def _expected_result(contract: dict[str, Any], chunk_steps: int) -> dict[str, int]:
    """Header fields every result must have."""
    heads = [(math.prod(head["shape"]), head["dtype"], head["per"]) for head in contract["heads"]]
    size = sum(width * np.dtype(dtype).itemsize * (chunk_steps if per == "step" else 1) for width, dtype, per in heads)
    return {
        "type": wire.Type.RESULT,
        "code": 0,
        "size": size,
        "steps": chunk_steps,
        "width": sum(width for width, _, _ in heads),
        "dtype": wire.DTYPES[heads[0][1]],
    }
