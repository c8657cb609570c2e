"""Adopts ONNX files of others: stateful models that stand there with their states as inputs and outputs.

::

    from recurd_export.adopt import Adoption, adopt
    report = adopt("silero_vad.onnx", "vad.onnx", Adoption(constants={"sr": 16000}, step_shape=(512,), context=64))

``foreign`` reads the file, ``roles`` says what each of its inputs and outputs is for (``pairing`` guesses the states),
``layout`` finds by running where batch and time stand, ``graph`` puts the file's own graph inside a contract graph,
``reference`` runs the file as it is, one stream at a time. ``front`` ties them together.
"""

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recurd_export.adopt.settings import Adoption, StatePair
from recurd_export.errors import ExportUsageError

if TYPE_CHECKING:
    from recurd_export.report import Report

__all__ = ["Adoption", "StatePair", "adopt"]


def adopt(
    source: str | PathLike[str],
    path: str | PathLike[str],
    adoption: Adoption | None = None,
    *,
    normalize: Any = None,
    precision: str = "float32",
    state_precision: str | None = None,
    report: str | PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> "Report":
    """Turn a stateful ONNX model that somebody else made into a contract file, and prove that it does what it did.

    Args:
        source: the ONNX file; it is left as it is.
        path: the file to write; it gets this name only when everything was verified.
        adoption: what cannot be found in the file.
        normalize, precision, state_precision, report: as in :func:`recurd_export.export`.
        progress: is told the name of each stage as it begins.

    Raises:
        ExportError: the model cannot be adopted, or the adopted one does not do the same.
    """
    from recurd_export import pipeline  # onnx takes its time
    from recurd_export.adopt.front import front
    from recurd_export.options import options

    target = Path(path)
    if target.resolve() == Path(source).resolve():
        raise ExportUsageError(f"{target} is the model itself, which is left as it is; name another file to write")
    adoption = Adoption() if adoption is None else adoption
    facts = adoption.facts(default_name=target.stem)
    page = None if report is None else Path(report)
    chosen = options(normalize=normalize, precision=precision, state_precision=state_precision, page=page)
    return pipeline.export(front(Path(source), adoption), target, facts, progress or (lambda stage: None), chosen)
