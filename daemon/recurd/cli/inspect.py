"""``recurd inspect``: what a model file promises, readable."""

import sys
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recurd.contract import Contract, Head, Input, State, load

EPILOG = """\b
Examples:
  recurd inspect pump.onnx
  recurd inspect pump.onnx --json | jq .states
"""


@click.command(epilog=EPILOG)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the whole contract as JSON, golden run included.")
def inspect(model: Path, as_json: bool) -> None:
    """Print the contract of MODEL: input, heads, states, and what was proven at export."""
    _, contract = load(model)
    if as_json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(contract)) + b"\n")
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for what, text in rows(contract):
        table.add_row(what, escape(text))
    Console().print(table)


def rows(contract: Contract) -> Iterator[tuple[str, str]]:
    """The contract as pairs of a word and a line."""
    yield "model", f"{contract.name}, version {contract.version} (contract format {contract.format})"
    yield "input", _input(contract.input)
    for number, name in enumerate(contract.input.features):
        unit = f" [{contract.input.units[number]}]" if number < len(contract.input.units) else ""
        yield "", f"{number}: {name}{unit}"
    for head in contract.heads:
        yield "head", _head(head)
    for state in contract.states:
        yield "state", _state(state)
    size = sum(state.width * np.dtype(state.dtype).itemsize for state in contract.states)
    yield "state row", f"{sum(state.width for state in contract.states)} elements, {size} bytes a stream"
    yield "causal", "yes" if contract.causal else "no: results depend on how a stream is cut into chunks"
    versions = ", ".join(f"{name} {version}".rstrip() for name, version in contract.source.versions.items())
    yield "source", f"{contract.source.model or contract.source.framework} ({versions})"
    yield "weights", f"sha256 {contract.weights_sha256}"
    yield "state hash", contract.state_hash
    if contract.proof is None:
        yield "proof", "none"
        return
    for name, error in contract.proof.errors.items():
        yield "proof", f"{name}: largest error {error:.1e}"
    golden = contract.proof.golden
    lengths = ", ".join(str(length) for length in golden.lengths.array())
    yield "golden", f"streams of {lengths} steps"


def _input(input: Input) -> str:
    shape = ", ".join(["batch", "time", *map(str, input.shape)])
    classes = f", ids below {input.classes}" if input.classes is not None else ""
    rate = f", {input.sample_rate_hz:g} Hz" if input.sample_rate_hz is not None else ""
    return f"{input.name}: {input.dtype} [{shape}]{classes}{rate}"


def _head(head: Head) -> str:
    axes = ["batch", "time"] if head.per == "step" else ["batch"]
    labels = f", labels {', '.join(head.labels)}" if head.labels else ""
    per = "one output a step" if head.per == "step" else "one output a chunk, of its last step"
    return f"{head.name}: {head.dtype} [{', '.join([*axes, *map(str, head.shape)])}], {per}{labels}"


def _state(state: State) -> str:
    shape = [*map(str, state.shape[: state.batch_axis]), "batch", *map(str, state.shape[state.batch_axis :])]
    initial = "zeros" if state.initial is None else "stored values"
    return f"{state.name}: {state.dtype} [{', '.join(shape)}], starts from {initial}"
