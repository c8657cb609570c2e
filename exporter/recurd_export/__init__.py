"""recurd_export: trained recurrent networks to ONNX with a contract and a proof.

::

    report = recurd_export.export(model, example, "pump.onnx", name="pump")
    print(report)
"""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recurd_export.errors import ExportError

if TYPE_CHECKING:
    from recurd_export.report import Report

__all__ = ["ExportError", "export"]


def export(
    model: Any,
    example: Any,
    path: str | PathLike[str],
    *,
    name: str | None = None,
    version: str = "1",
    features: Sequence[str] = (),
    units: Sequence[str] = (),
    labels: Mapping[str, Sequence[str]] | None = None,
    sample_rate_hz: float | None = None,
    step: bool = False,
    trust_pickle: bool = False,
    normalize: Any = None,
    precision: str = "float32",
    state_precision: str | None = None,
    report: str | PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> "Report":
    """Export a trained recurrent model to an ONNX file with a contract, and prove that the file does what it does.

    Args:
        model: a ``torch.nn.Module`` or a Keras model, which is left as it was, or the path of a file of either.
        example: an input tensor ``[batch, time, ...]`` as the model takes it (``[time, batch, ...]`` where it does so),
            or a tuple of one and the states the model takes. Float32, or int64 token ids. Its values
            matter only where the model does not take any number (logarithms). ``None`` for a Keras model, which says
            itself what it takes, and where it can be guessed from the module's first layer.
        path: the file to write; the directory must exist. It gets this name only when everything was verified.
        name: name of the model in the daemon; the file's stem when not given.
        version: version of the model.
        features: names of the input's features, in order.
        units: their units.
        labels: per head, names of its elements (classes).
        sample_rate_hz: rate of the steps.
        step: the module's forward is one time step, ``(x [batch, ...], *states) -> (y, *states)``, and the example its
            arguments; the states in it are the initial values.
        trust_pickle: load a whole torch model from a file, which runs code that is in the file.
        normalize: what is to be done to the input in the graph, so that clients send raw values: a pair ``(mean, std)``
            of numbers or of arrays of one step's shape, or a fitted scaler of scikit-learn (standard, robust, min-max
            or max-abs). The example is what the model itself takes.
        precision: ``float32``; ``float16``: weights, arithmetic and, unless said otherwise, states; or
            ``bfloat16-weights``: half the file, computed in float32. Inputs and heads stay float32.
        state_precision: ``float32`` or ``float16``; as the arithmetic when not given.
        report: an HTML file to write about the export: one page, nothing else needed to read it.
        progress: is told the name of each stage as it begins.

    Returns:
        What was hoisted, the heads, whether the model is causal, and the errors measured; printable.

    Raises:
        ExportError: the model cannot be exported, or its file does not do the same; nothing is left at ``path``.
    """
    from recurd_export import pipeline, sources  # onnx, torch and keras take seconds to import
    from recurd_export.facts import Facts
    from recurd_export.options import options

    target = Path(path)
    facts = Facts(
        name=target.stem if name is None else name,
        version=version,
        features=tuple(features),
        units=tuple(units),
        labels={head: tuple(names) for head, names in (labels or {}).items()},
        sample_rate_hz=sample_rate_hz,
    )
    page = None if report is None else Path(report)
    chosen = options(normalize=normalize, precision=precision, state_precision=state_precision, page=page)
    source = sources.front_end(model, example, step=step, trust_pickle=trust_pickle)
    return pipeline.export(source, target, facts, progress or (lambda stage: None), chosen)
