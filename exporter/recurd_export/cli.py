"""``recurd export``: a factory and weights to a contract file."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

EPILOG = """\b
Examples:
  recurd export pump.model:build --weights pump.pt --out pump.onnx
  recurd export pump.model:build --weights pump.safetensors --out pump.onnx --features flow,pressure --units l/s,bar
  recurd export charrnn:CharRNN --example 2,16 --dtype int64 --out char.onnx --json
\b
The factory is a function or class that gives a torch.nn.Module, or a module and an example input. It is looked up below
the current directory too. Nothing in the weights file is executed.
\b
Exit codes: 0 exported and verified, 2 wrong usage, 70 the model cannot be exported (nothing is written).
"""


class _Sizes(click.ParamType[Any]):
    """``2,16,8``: sizes of the axes."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The sizes as numbers."""
        if isinstance(value, tuple):
            return value
        try:
            sizes = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            sizes = ()
        if not sizes or min(sizes) < 1:
            self.fail(f"'{value}' is not a list of sizes like 2,16,8 (batch, steps, features)", param, ctx)
        return sizes


def _words(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in value.split(",")) if value else ()


@click.command(epilog=EPILOG)
@click.argument("factory", metavar="PACKAGE.MODULE:FACTORY")
@click.option("--weights", type=click.Path(path_type=Path), help="State dict: torch.save or .safetensors.")
@click.option("--out", "-o", type=click.Path(path_type=Path), required=True, help="File to write, e.g. pump.onnx.")
@click.option("--name", help="Name of the model in the daemon.  [the file's name without .onnx]")
@click.option("--model-version", default="1", show_default=True, help="Version of the model.")
@click.option("--example", type=_Sizes(), help="Shape of an input: batch,steps,features.  [guessed]")
@click.option("--dtype", type=click.Choice(["float32", "int64"]), help="Element type of the input.  [guessed]")
@click.option("--features", callback=_words, help="Names of the features, separated by commas.")
@click.option("--units", callback=_words, help="Their units, separated by commas.")
@click.option("--sample-rate-hz", type=float, help="Rate of the steps.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def export(factory: str, weights: Path | None, out: Path, example: Any, dtype: str | None, **options: Any) -> None:
    """Export a trained torch model to an ONNX file with a contract, and prove that the file does what the model does.

    PACKAGE.MODULE:FACTORY gives the model; its hidden states become explicit inputs and outputs.
    """
    from recurd_export import export as run  # brings torch, which '--help' does without
    from recurd_export import factory as factories
    from recurd_export.pipeline import STAGES

    as_json, version = options.pop("as_json"), options.pop("model_version")
    with _bar(len(STAGES)) as bar:
        step = _Steps(bar, len(STAGES))
        model, given = factories.build(factory)
        if weights is not None:
            factories.load_weights(model, weights)
        if example is not None or given is None:
            given = factories.make_example(model, example, dtype)
        report = run(model, given, out, version=version, progress=step, **options)
        step.finish()
    if as_json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(report, enc_hook=str)) + b"\n")
    else:
        click.echo(report)


def _bar(stages: int) -> Any:
    """A progress bar on standard error when that is a terminal, else nothing."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return nullcontext(None)
    columns = (TextColumn("{task.description:18}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


class _Steps:
    """Moves the bar; called with the name of each stage as it begins."""

    def __init__(self, bar: Progress | None, stages: int) -> None:
        self._bar = bar
        self._task = bar.add_task("load", total=stages + 1) if bar is not None else None

    def __call__(self, stage: str) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=stage, advance=1)

    def finish(self) -> None:
        """All done."""
        self("done")
