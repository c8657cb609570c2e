"""An export's report as one HTML file that needs nothing else: to be kept beside the model, sent, or printed."""

from collections import Counter
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from string import Template

import numpy as np
import onnx

from recurd.contract import Contract, Input, State
from recurd.verify import Check
from recurd_export import surgery
from recurd_export.diagram import diagram
from recurd_export.drift import Curve, Drift
from recurd_export.errors import ExportError
from recurd_export.markup import Html, join, table, tag
from recurd_export.plot import plot
from recurd_export.report import Report

#: Curves drawn at most, the worst ones: as many as there are colours.
CURVES = 8
#: What each check of docs/contract.md runs.
MEANINGS = {
    "alone": "every stream whole, in a batch of its own",
    "ragged batch": "streams of different lengths whole, in one padded batch",
    "chunks alone": "every stream cut at random, its state carried on",
    "chunks in ragged batches": "the same cuts, in every run a random choice of the streams",
    "batch of equal lengths": "streams of one length in one batch",
    "state passed along": "the source itself, its caller handing the state back",
    "Keras stateful": "Keras' own stateful=True model, fed chunk after chunk and reset between streams",
    "model as given": "the very Keras model, at its own fixed sizes",
    "against itself": "the file's own whole runs against all of the above",
    "golden run": "the finished file, read as the daemon reads it",
}


def check_target(path: Path, model: Path) -> None:
    """Refuse at once, with :class:`ExportError`, a page that could not be written."""
    if not path.parent.is_dir():
        raise ExportError(f"{path}: the report cannot be written: there is no directory {path.parent}")
    if path.is_dir() or path.absolute() == model.absolute():
        raise ExportError(f"{path}: the report needs a file of its own")


def write(path: Path, report: Report, model: onnx.ModelProto) -> None:
    """Render and write; a page that was there stays until the new one is whole. Raises :class:`ExportError`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        try:
            temporary.write_text(render(report, model), encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ExportError(f"{path}: the report cannot be written: {error.strerror}") from error


def render(report: Report, model: onnx.ModelProto) -> str:
    """The whole page; ``model`` is the graph as it was written."""
    contract = report.contract
    template = Template(resources.files("recurd_export").joinpath("page.html").read_text(encoding="utf-8"))
    sections = (
        _head(report),
        _section("Errors over time", *_over_time(report.drift)),
        _section("Chunk invariance", *_invariance(report.checks, contract)),
        _section("Hoisted states", *_states(report)),
        _section("Contract", _facts(contract)),
        _section("Graph", *_graph(model, contract)),
        _section("Origin", _origin(report, model)),
    )
    return template.substitute(title=join([f"{contract.name}: export report"]), body=join(sections))


def _section(title: str, *children: object) -> Html:
    return tag("section", tag("h2", title), *children)


def _head(report: Report) -> Html:
    contract, worst = report.contract, report.drift.worst
    states = ", ".join(dict.fromkeys(state.dtype for state in contract.states))
    memory = sum(state.width * _bytes(state.dtype) for state in contract.states)
    tiles = (
        ("checks that held", f"{sum(check.ok for check in report.checks)} of {len(report.checks)}"),
        ("largest error of the checks", f"{max(check.error for check in report.checks):.1e}"),
        (f"error nearest its bound in {report.drift.steps:,} steps", f"{worst.worst:.1e}"),
        ("precision", f"{report.precision}, states {states}"),
        ("file", _size(report.bytes)),
        ("state of one stream", _size(memory)),
    )
    notes = [tag("li", note) for note in report.notes]
    return join(
        [
            tag("h1", contract.name),
            tag("p", f"Version {contract.version}, exported from {contract.source.framework} to ",
                tag("code", report.path.name), f" in {report.seconds:.1f} s.", class_="faint"),
            tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in tiles), class_="tiles"),
            tag("ul", *notes) if notes else "",
        ]
    )  # fmt: skip


def _over_time(drift: Drift) -> Iterator[Html]:
    curves = sorted(drift.curves, key=lambda curve: curve.worst / curve.bound, reverse=True)
    shown = curves[:CURVES]
    more = f" The {len(shown)} worst of {len(curves)} tensors are drawn." if len(curves) > len(shown) else ""
    fewer = f" Not as many steps as usual: {drift.fewer}." if drift.fewer else ""
    yield tag(
        "p",
        f"One random stream of {drift.steps:,} steps, run by the source and by the file, which gets it in chunks of "
        f"{drift.chunk_steps} steps: errors as a share of what is allowed.{more}{fewer}",
    )
    yield plot(shown, drift.steps)
    heads = ("", "tensor", "largest error", "at the end", "allowed", "largest value")
    yield table(heads, (_curve_row(curve, index) for index, curve in enumerate(shown)), numbers=(2, 3, 4, 5))


def _curve_row(curve: Curve, index: int) -> tuple[object, ...]:
    beyond = curve.passes_at is not None
    largest = tag("span", f"{curve.worst:.1e}", class_="bad" if beyond else "good")
    end, bound, value = f"{curve.errors[-1]:.1e}", f"{curve.bound:.1e}", f"{curve.largest:.3g}"
    return tag("span", class_=f"key k{index}"), tag("code", curve.tensor), largest, end, bound, value


def _invariance(checks: tuple[Check, ...], contract: Contract) -> Iterator[Html]:
    cut = "however it is cut" if contract.causal else "for the same cuts (the model looks ahead inside a chunk)"
    yield tag("p", f"A stream gives what the source model gives for it, {cut}, and whatever else is in its batch.")
    rows = (
        (
            join([tag("strong", check.name), tag("small", MEANINGS.get(check.name, ""))]),
            tag("span", f"{check.error:.1e}", class_="good" if check.ok else "bad"),
            f"{check.bound:.1e}",
            tag("code", check.tensor),
        )
        for check in checks
    )
    yield table(("check", "largest error", "allowed", "worst in"), rows, numbers=(1, 2))


def _states(report: Report) -> Iterator[Html]:
    kinds = {name: layer for layer in report.hoisted for name in layer.states}
    rows = []
    for state in report.contract.states:
        layer = kinds.get(state.name)
        origin = f"{layer.module} ({layer.kind})" if layer else ""
        rows.append((tag("code", state.name), origin, f"{state.dtype} {_shape(state.shape)}", _initial(state)))
    yield tag("p", "What a stream remembers between its chunks; each is an input and an output of the graph.")
    yield table(("state", "from", "a stream's part", "starts from"), rows)


def _initial(state: State) -> str:
    return "zeros" if state.initial is None or not state.initial.array().any() else "stored values"


def _facts(contract: Contract) -> Html:
    rows: list[tuple[object, object]] = [
        ("input", f"{contract.input.dtype} [batch, time{_tail(contract.input.shape)}]")
    ]
    rows += [(name, value) for name, value in _input_facts(contract.input) if value]
    for head in contract.heads:
        axes = "[batch, time" if head.per == "step" else "[batch"
        last = "" if head.per == "step" else ", of a chunk's last step"
        rows.append((f"head {head.name}", f"{head.dtype} {axes}{_tail(head.shape)}]{last}"))
        rows += [(f"labels of {head.name}", ", ".join(head.labels))] if head.labels else []
    rows.append(("causal", "yes" if contract.causal else "no: results depend on how a stream is cut"))
    return table(("", ""), rows)


def _input_facts(input: Input) -> Iterator[tuple[str, str]]:
    named = zip(input.features, input.units or [""] * len(input.features), strict=False)
    yield "features", ", ".join(f"{name} [{unit}]" if unit else name for name, unit in named)
    yield "sample rate", f"{input.sample_rate_hz:g} Hz" if input.sample_rate_hz else ""
    yield "token ids", f"0 to {input.classes - 1:,}" if input.classes else ""
    yield "normalised in the graph, mean", ", ".join(f"{value:g}" for value in input.mean)
    yield "normalised in the graph, std", ", ".join(f"{value:g}" for value in input.std)


def _graph(model: onnx.ModelProto, contract: Contract) -> Iterator[Html]:
    kinds = Counter(node.op_type for node in surgery.nodes(model.graph))
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    yield tag("p", f"{sum(kinds.values())} nodes: {counts}.")
    yield diagram(model, contract)


def _origin(report: Report, model: onnx.ModelProto) -> Html:
    contract = report.contract
    opsets = ", ".join(f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in model.opset_import)
    weights = sum(surgery.elements(tensor) for tensor in model.graph.initializer)
    rows: list[tuple[object, object]] = [
        ("source", f"{contract.source.framework} {contract.source.model}"),
        *(sorted(contract.source.versions.items())),
        ("operator sets", opsets),
        ("weights", f"{weights:,} numbers"),
        ("SHA-256 of the weights", tag("code", contract.weights_sha256, class_="long")),
        ("contract format", contract.format),
    ]
    return table(("", ""), rows)


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _tail(shape: tuple[int, ...]) -> str:
    return "".join(f", {size}" for size in shape)


def _bytes(dtype: str) -> int:
    return int(np.dtype(dtype).itemsize)


def _size(count: int) -> str:
    for size, unit in ((10**6, "MB"), (10**3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
