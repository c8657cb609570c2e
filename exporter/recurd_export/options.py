"""What a caller chooses beside the model: how its input is prepared, in which precision it is stored and runs, and
whether a page is written about it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from recurd_export.errors import ExportUsageError
from recurd_export.normalize import Affine, parse

Precision = Literal["float32", "float16", "bfloat16-weights"]
StatePrecision = Literal["float32", "float16"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Choices that hold for any source model."""

    #: Put in front of the model, in the graph.
    normalize: Affine | None = None
    #: ``float16``: weights, arithmetic and, unless said otherwise, states. ``bfloat16-weights``: the weights as stored.
    precision: Precision = "float32"
    #: Of the float32 states.
    states: StatePrecision = "float32"
    #: An HTML page to write.
    page: Path | None = None

    @property
    def reduced(self) -> bool:
        """Whether anything is in less than float32."""
        return self.precision != "float32" or self.states != "float32"


def options(
    *, normalize: Any = None, precision: str = "float32", state_precision: str | None = None, page: Path | None = None
) -> Options:
    """The choices, checked. Raises :class:`ExportUsageError`, one sentence."""
    if precision == "int8":
        raise ExportUsageError(
            "precision int8 is not offered: dynamic quantisation takes one range for the whole batch, so that a "
            "stream's results would depend on the streams it happens to share a tick with"
        )
    _check("precision", precision, get_args(Precision))
    chosen = state_precision or ("float16" if precision == "float16" else "float32")
    _check("state precision", chosen, get_args(StatePrecision))
    return Options(
        normalize=None if normalize is None else normalize if isinstance(normalize, Affine) else parse(normalize),
        precision=cast(Precision, precision),
        states=cast(StatePrecision, chosen),
        page=page,
    )


def _check(what: str, chosen: str, allowed: tuple[str, ...]) -> None:
    if chosen not in allowed:
        raise ExportUsageError(f"{what} '{chosen}' is not known; there are {', '.join(allowed)}")
