"""Rows of text <-> steps and predictions: CSV and JSON lines for ``recurd stream``. Knows no network and no files."""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import msgspec
import numpy as np

from recurd.errors import RecurdError
from recurd.signature import Array, Head, Result, Signature

Format = Literal["csv", "jsonl"]
Number = int | float


class InputError(RecurdError):
    """A row cannot be sent; the text starts with its line number."""


class RowReader(Protocol):
    """Takes one line after another."""

    def read(self, line: str) -> list[Number] | None:
        """The values of one step, in the model's order; ``None`` when the line holds none (empty, or the header).

        Raises :class:`InputError`.
        """


class _Reader:
    """What both formats share: names, line numbers, and which numbers the model takes."""

    def __init__(self, signature: Signature, *, ignore_extra: bool) -> None:
        self._names = signature.features
        self._width = signature.width
        self._classes: int | None = signature.contract["input"].get("classes")
        self._whole = signature.contract["input"]["dtype"] == "int64"
        self._ignore_extra = ignore_extra
        self.line = 0

    def _error(self, text: str) -> InputError:
        return InputError(f"line {self.line}: {text}")

    def _check_names(self, found: Sequence[str]) -> None:
        """Hold the names of columns or keys against the contract's."""
        missing = [name for name in self._names if name not in found]
        unexpected = [] if self._ignore_extra else [name for name in found if name not in self._names]
        complaints = [("missing", missing), ("unexpected", unexpected)]
        text = "; ".join(f"{what}: {', '.join(map(repr, names))}" for what, names in complaints if names)
        if text:
            hint = "" if missing else " (--ignore-extra leaves them out)"
            raise self._error(f"the columns are not the model's features: {text}{hint}")
        twice = sorted({name for name in found if found.count(name) > 1 and name in self._names})
        if twice:
            raise self._error(f"a column stands twice: {', '.join(map(repr, twice))}")

    def _checked(self, values: Sequence[Any]) -> list[Number]:
        """Numbers of one step, as the model takes them."""
        if len(values) != self._width:
            raise self._error(f"{len(values)} values, the model takes {self._width}")
        return [self._number(value, column) for column, value in enumerate(values)]

    def _number(self, value: Any, column: int) -> Number:
        if not self._is_number(value):
            wanted = "whole" if self._whole else "finite"
            raise self._error(f"{value!r} is not a {wanted} number{self._where(column)}")
        if self._classes is not None and not 0 <= value < self._classes:
            raise self._error(f"{value} is not in [0, {self._classes}){self._where(column)}")
        number: Number = value
        return number

    def _is_number(self, value: Any) -> bool:
        if isinstance(value, float):
            return not self._whole and math.isfinite(value)
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63

    def _where(self, column: int) -> str:
        return f" (column '{self._names[column]}')" if self._names else f" (column {column + 1})"


class CsvReader(_Reader):
    """Comma-separated values; the first row names the columns unless ``header`` is false."""

    def __init__(self, signature: Signature, *, header: bool, ignore_extra: bool) -> None:
        super().__init__(signature, ignore_extra=ignore_extra)
        self._header_to_come = header
        #: Where each feature stands in a row; ``None``: as they come.
        self._columns: list[int] | None = None
        self._cells = self._width

    def read(self, line: str) -> list[Number] | None:
        """See :class:`RowReader`."""
        self.line += 1
        if not line.strip():
            return None
        try:
            cells = next(csv.reader([line], skipinitialspace=True, strict=True))
        except csv.Error as error:
            raise self._error(f"not CSV: {error}") from error
        if self._header_to_come:
            self._header_to_come = False
            self._read_header([cell.strip() for cell in cells])
            return None
        if len(cells) != self._cells:
            raise self._error(f"{len(cells)} values, {self._cells} expected")
        if self._columns is not None:
            cells = [cells[column] for column in self._columns]
        return self._checked([self._parse(cell) for cell in cells])

    def _read_header(self, names: list[str]) -> None:
        numbers = [name for name in names if _is_number(name) and name not in self._names]
        if len(numbers) == len(names) or (numbers and not self._names):
            raise self._error("the first row holds numbers, not the columns' names (--no-header when there are none)")
        if self._names:
            self._check_names(names)
            self._columns = [names.index(name) for name in self._names]
            self._cells = len(names)
        elif len(names) != self._width:
            raise self._error(f"the header has {len(names)} columns, the model takes {self._width}")

    def _parse(self, cell: str) -> Any:
        try:
            return int(cell) if self._whole else float(cell)
        except ValueError:
            return cell  # is complained of with its column


def _is_number(cell: str) -> bool:
    """Whether a cell is no name, whatever the model takes."""
    try:
        float(cell)
    except ValueError:
        return False
    return True


class JsonReader(_Reader):
    """One JSON value a line: an object by feature name, an array, or a number for a model of one feature."""

    def read(self, line: str) -> list[Number] | None:
        """See :class:`RowReader`."""
        self.line += 1
        if not line.strip():
            return None
        try:
            value = msgspec.json.decode(line)
        except msgspec.DecodeError as error:
            raise self._error(f"not JSON: {error}") from error
        if isinstance(value, dict):
            if not self._names:
                raise self._error("an object, but the model's contract names no features: give arrays")
            self._check_names(list(value))
            value = [value[name] for name in self._names]
        return self._checked(list(_flat(value)))


def _flat(value: Any) -> Iterator[Any]:
    """The elements of nested arrays, in order."""
    if isinstance(value, list):
        for element in value:
            yield from _flat(element)
    else:
        yield value


def reader(format: Format, signature: Signature, *, header: bool, ignore_extra: bool) -> CsvReader | JsonReader:
    """The reader of a format."""
    if format == "csv":
        return CsvReader(signature, header=header, ignore_extra=ignore_extra)
    return JsonReader(signature, ignore_extra=ignore_extra)


class PredictionWriter:
    """Predictions as text, a line a step (a line a chunk when every head gives one output a chunk)."""

    def __init__(self, format: Format, heads: tuple[Head, ...]) -> None:
        self._format = format
        self._heads = heads

    def header(self) -> str:
        """The line before all others: the columns' names in CSV, nothing in JSON."""
        if self._format == "jsonl":
            return ""
        names = [name for head in self._heads for name in self._columns(head)]
        return ",".join(f'"{name}"' if set(name) & set(',"\n ') else name for name in names) + "\n"

    def _columns(self, head: Head) -> list[str]:
        if len(head.labels) == head.width:
            return list(head.labels) if len(self._heads) == 1 else [f"{head.name}.{label}" for label in head.labels]
        return [head.name] if head.width == 1 else [f"{head.name}.{number}" for number in range(head.width)]

    def lines(self, result: Result) -> str:
        """The predictions of one chunk. A head of the last step stands in the last line only."""
        arrays = result if isinstance(result, dict) else {self._heads[0].name: result}
        per_step = [len(arrays[head.name]) for head in self._heads if head.per == "step"]
        steps = max(per_step, default=1)
        line = self._csv_line if self._format == "csv" else self._json_line
        return "".join([line(arrays, step, step == steps - 1) for step in range(steps)])

    def _csv_line(self, arrays: Mapping[str, Array], step: int, is_last: bool) -> str:
        cells: list[str] = []
        for head in self._heads:
            values = _at(arrays[head.name], head, step, is_last)
            cells += [""] * head.width if values is None else map(str, values.ravel())
        return ",".join(cells) + "\n"

    def _json_line(self, arrays: Mapping[str, Array], step: int, is_last: bool) -> str:
        body: dict[str, Any] = {}
        for head in self._heads:
            values = _at(arrays[head.name], head, step, is_last)
            if values is not None:
                # By way of text: the shortest digits that give the float32 again, not those of the double.
                digits = np.array([float(str(value)) for value in values.ravel()])
                body[head.name] = digits.reshape(values.shape).tolist() if head.width > 1 else float(digits[0])
        return msgspec.json.encode(body).decode() + "\n"


def _at(array: Array, head: Head, step: int, is_last: bool) -> Array | None:
    """A head's output for one step; ``None`` where it has none."""
    if head.per == "step":
        return np.asarray(array[step])
    return np.asarray(array) if is_last else None
