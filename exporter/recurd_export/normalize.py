"""Puts ``(input - mean) / std`` in front of a candidate, so that clients send what their sensors give.

The difference comes first and in float32, where it is exact for values near the mean; ``input * a + b`` would lose all
digits of a pressure in pascal. A mean that float32 cannot hold is subtracted in two parts.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from recurd.contract import Contract, Input
from recurd.verify import Check, Inputs, Runner, Tolerance
from recurd_export import surgery
from recurd_export.candidate import Candidate
from recurd_export.errors import ExportError, ExportUsageError

Array = npt.NDArray[Any]

#: Part of a deviation that a mean may be off without anybody seeing it: float32's own rounding.
NEGLIGIBLE = float(np.finfo(np.float32).eps) / 2


@dataclass(frozen=True)
class Affine:
    """What is done to a step: ``(step - mean) / std``, each of one step's shape or a single number; float64."""

    mean: Array
    std: Array

    def shaped(self, input: Input) -> "Affine":
        """One number per element of a step. Raises :class:`ExportError` where they do not fit the model's input."""
        if input.dtype != "float32":
            raise ExportError("the model takes token ids, which cannot be normalised; leave 'normalize' away")
        return Affine(self._fit("mean", self.mean, input), self._fit("std", self.std, input))

    @staticmethod
    def _fit(what: str, values: Array, input: Input) -> Array:
        if values.ndim and values.shape != input.shape:
            raise ExportError(
                f"normalize has a {what} of shape {list(values.shape)}, but a step of the input is {list(input.shape)}"
            )
        return np.broadcast_to(values, input.shape)

    def parts(self) -> tuple[list[Array], Array]:
        """What is subtracted, one after another, and what it is divided by; float32."""
        mean = self.mean.astype(np.float32)
        rest = self.mean - mean
        small = np.all(np.abs(rest) <= NEGLIGIBLE * self.std)
        return [mean] if small else [mean, rest.astype(np.float32)], self.std.astype(np.float32)

    def apply(self, x: Array) -> Array:
        """What the graph does, in numpy; ``x`` float32 ``[..., *shape]``."""
        subtracted, std = self.parts()
        for part in subtracted:
            x = x - part
        return x / std

    def undo(self, x: Array) -> Array:
        """Input that the model sees as ``x``, float32."""
        return (x * self.std + self.mean).astype(np.float32)


def parse(given: Any) -> Affine:
    """What ``normalize=`` means: a pair of mean and deviation, or a fitted scaler of scikit-learn.

    Raises :class:`ExportUsageError`, one sentence.
    """
    if hasattr(given, "fit") and hasattr(given, "transform"):
        return _checked(*_of_scaler(given))
    if isinstance(given, str | bytes) or not isinstance(given, Sequence) or len(given) != 2:
        raise ExportUsageError("normalize takes a pair (mean, std) or a fitted scaler of scikit-learn")
    mean, std = given
    return _checked(mean, std)


def read(text: bytes, name: str) -> Affine:
    """A JSON file ``{"mean": [...], "std": [...]}``, numbers or arrays. Raises :class:`ExportUsageError`."""
    try:
        found = msgspec.json.decode(text)
        mean, std = found["mean"], found["std"]
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise ExportUsageError(f'{name}: is not JSON of the form {{"mean": [...], "std": [...]}}') from error
    return _checked(mean, std)


def _checked(mean: Any, std: Any) -> Affine:
    try:
        values = np.array(mean, np.float64), np.array(std, np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ExportUsageError("normalize: mean and std must be numbers or arrays of one step's shape") from error
    with np.errstate(over="ignore"):
        singles = [array.astype(np.float32) for array in values]
    for what, array in zip(("mean", "std"), singles, strict=True):
        if not np.isfinite(array).all():
            raise ExportUsageError(f"normalize: the {what} is not finite in float32 everywhere")
    if not (singles[1] > 0).all():
        raise ExportUsageError("normalize: a std is zero or negative; a feature that never varies takes 1")
    return Affine(*values)


def _of_scaler(scaler: Any) -> tuple[Any, Any]:
    """Mean and deviation of StandardScaler, RobustScaler, MinMaxScaler or MaxAbsScaler, told by their attributes."""
    kind = type(scaler).__name__
    if not hasattr(scaler, "scale_"):
        known = "StandardScaler, RobustScaler, MinMaxScaler and MaxAbsScaler can be put into the graph"
        raise ExportUsageError(f"normalize: this {kind} is not fitted, or not affine; fitted {known}")
    if getattr(scaler, "clip", False):
        raise ExportUsageError(f"normalize: this {kind} clips, which is not put into the graph; fit it without 'clip'")
    if hasattr(scaler, "min_"):  # MinMaxScaler: x * scale_ + min_
        scale = np.asarray(scaler.scale_, np.float64)
        return -np.asarray(scaler.min_, np.float64) / scale, 1 / scale
    mean = getattr(scaler, "mean_", None) if getattr(scaler, "with_mean", True) else None
    mean = getattr(scaler, "center_", mean)
    return 0.0 if mean is None else mean, 1.0 if scaler.scale_ is None else scaler.scale_


def put_in_front(candidate: Candidate, affine: Affine | None) -> Candidate:
    """The candidate that takes raw input; as it was without ``affine``. Raises :class:`ExportError`."""
    if affine is None:
        return candidate
    affine = affine.shaped(candidate.contract.input)
    input = msgspec.structs.replace(
        candidate.contract.input, mean=tuple(affine.mean.ravel().tolist()), std=tuple(affine.std.ravel().tolist())
    )
    known = candidate.inputs.known

    def more_checks(inputs: Inputs, tolerance: Tolerance) -> Iterable[Check]:
        return candidate.more_checks(candidate.inputs, tolerance)  # of the source alone, in its own numbers

    return dataclasses.replace(
        candidate,
        proto=_in_graph(candidate.proto, input.name, affine),
        contract=msgspec.structs.replace(candidate.contract, input=input),
        reference=_Normalised(candidate.reference, affine),
        exact=None if candidate.exact is None else _Normalised(candidate.exact, affine),
        inputs=Inputs(input, None if known is None else affine.undo(known)),
        more_checks=more_checks,
    )


def _in_graph(model: onnx.ModelProto, input: str, affine: Affine) -> onnx.ModelProto:
    """The model with the nodes in front; the initializers are float32, of one step's shape."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph, name = result.graph, surgery.unused(model.graph)
    subtracted, std = affine.parts()
    steps = [
        ("Sub", "mean", subtracted[0]),
        *(("Sub", "mean.rest", part) for part in subtracted[1:]),
        ("Div", "std", std),
    ]
    source, new = input, []
    for kind, what, values in steps:
        constant, target = name(f"{input}.{what}"), name(f"{input}.normalized")
        graph.initializer.append(numpy_helper.from_array(values, constant))
        new.append(helper.make_node(kind, [source, constant], [target], name=name(f"{input}.{kind.lower()}")))
        source = target
    surgery.rename_reads(graph, input, source)
    surgery.put_first(graph, new)
    return result


class _Normalised:
    """The source model, given what the graph makes of raw input. Satisfies :class:`recurd.verify.Runner`."""

    def __init__(self, runner: Runner, affine: Affine) -> None:
        self._runner = runner
        self._affine = affine

    @property
    def contract(self) -> Contract:
        """The source's own."""
        return self._runner.contract

    def run(self, slots: Array, fresh: Array, lengths: Array, input: Array) -> list[Array]:
        """See :meth:`recurd.verify.Runner.run`."""
        return self._runner.run(slots, fresh, lengths, self._affine.apply(input))

    def read(self, slots: Array) -> dict[str, Array]:
        """See :meth:`recurd.verify.Runner.read`."""
        return self._runner.read(slots)
