"""``recurd export``: a trained model, from a file or a factory with weights, to a contract file."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from recurd_export.errors import ExportUsageError

EPILOG = """\b
Examples:
  recurd export pump.keras --out pump.onnx
  recurd export pump.model:build --weights pump.pt --out pump.onnx
  recurd export pump.model:build --weights pump.safetensors --out pump.onnx --features flow,pressure --units l/s,bar
  recurd export charrnn:CharRNN --example 2,16 --dtype int64 --out char.onnx --json
\b
TARGET is a file of a whole model (.keras, .h5, or a torch.nn.Module in .pt or .pth), or a factory: a function or class
that gives a torch.nn.Module, or a module and an example input. It is looked up below the current directory too.
ONNX files are taken by 'recurd adopt'. Nothing in a file is executed but with --trust-pickle.
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
@click.argument("target", metavar="TARGET")
@click.option(
    "--weights", type=click.Path(path_type=Path), help="State dict for a factory: torch.save or .safetensors."
)
@click.option("--out", "-o", type=click.Path(path_type=Path), required=True, help="File to write, e.g. pump.onnx.")
@click.option("--name", help="Name of the model in the daemon.  [the file's name without .onnx]")
@click.option("--model-version", default="1", show_default=True, help="Version of the model.")
@click.option("--example", type=_Sizes(), help="Shape of an input: batch,steps,features.  [guessed]")
@click.option("--dtype", type=click.Choice(["float32", "int64"]), help="Element type of the input.  [guessed]")
@click.option("--features", callback=_words, help="Names of the features, separated by commas.")
@click.option("--units", callback=_words, help="Their units, separated by commas.")
@click.option("--sample-rate-hz", type=float, help="Rate of the steps.")
@click.option("--labels", "labels", multiple=True, metavar="HEAD=A,B,...", help="Names of a head's elements (classes).")
@click.option("--normalize", type=click.Path(path_type=Path), help='JSON file: {"mean": [...], "std": [...]}.')
@click.option(
    "--precision", default="float32", show_default=True, metavar="float32|float16|bfloat16-weights", help="Of the file."
)
@click.option("--report", type=click.Path(path_type=Path), help="HTML page to write, e.g. pump.html.")
@click.option("--state-precision", metavar="float32|float16", help="Of the states.  [as the arithmetic]")
@click.option("--step", is_flag=True, help="The module's forward is one step: (x, state...) -> (y, state...).")
@click.option(
    "--trust-pickle",
    is_flag=True,
    help="Load a whole torch model from a file, which RUNS code that is in the file. Only for files you trust.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def export(target: str, out: Path, **options: Any) -> None:
    """Export a trained model to an ONNX file with a contract, and prove that the file does what the model does.

    The model's hidden states become explicit inputs and outputs.
    """
    from recurd_export import export as run  # brings torch, which '--help' does without

    as_json, version = options.pop("as_json"), options.pop("model_version")
    labels = dict(map(_labels_of_a_head, options.pop("labels")))
    options["normalize"] = _read_normalization(options["normalize"])
    loading = {name: options.pop(name) for name in ("weights", "example", "dtype", "trust_pickle")}
    with _bar() as bar:
        stages = _Stages(bar)
        model, example = _load(target, **loading, step=options["step"])
        report = run(model, example, out, version=version, labels=labels, progress=stages, **options)
        stages.finish()
    if as_json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(report, enc_hook=str)) + b"\n")
    else:
        click.echo(report)


def _load(
    target: str, weights: Path | None, example: Any, dtype: str | None, trust_pickle: bool, step: bool
) -> tuple[Any, Any]:
    """The model that was named, and an example for it; for a Keras file its path, as it says itself what it takes."""
    from recurd_export import factory as factories
    from recurd_export import sources

    if sources.is_file_of_a_model(target):
        if weights is not None:
            raise ExportUsageError(f"{target} brings its own weights; --weights goes with a factory")
        model, given = sources.load_file(Path(target), trust_pickle), None
        if isinstance(model, Path):
            if example is not None or dtype is not None:
                raise ExportUsageError(f"{target} says itself what its input is; leave out --example and --dtype")
            return model, None
    else:
        model, given = factories.build(target)
    if weights is not None:
        from recurd_export.pytorch.files import load_weights

        load_weights(model, weights)
    if step and (example is not None or dtype is not None or given is None):
        raise ExportUsageError(
            "--step needs a factory that gives the module and an example (x, state...); a shape does not say its states"
        )
    if example is not None or given is None:
        given = factories.make_example(model, example, dtype)
    return model, given


def _labels_of_a_head(text: str) -> tuple[str, list[str]]:
    head, equals, names = text.partition("=")
    if not equals or not head or not names:
        raise ExportUsageError(f"'{text}' does not say the labels of a head; write --labels output=low,high")
    return head, [name.strip() for name in names.split(",")]


def _read_normalization(path: Path | None) -> Any:
    if path is None:
        return None
    from recurd_export.normalize import read

    try:
        return read(path.read_bytes(), str(path))
    except OSError as error:
        raise ExportUsageError(f"{path}: cannot be read: {error.strerror}") from error


def _bar() -> Any:
    """A progress bar on standard error when that is a terminal, else nothing."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return nullcontext(None)
    columns = (TextColumn("{task.description:18}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


class _Stages:
    """Moves the bar; called with the name of each stage as it begins."""

    def __init__(self, bar: Progress | None) -> None:
        from recurd_export.pipeline import STAGES  # brings onnx

        self._places = {stage: place for place, stage in enumerate(STAGES)}
        self._bar = bar
        self._task = bar.add_task("load", total=len(STAGES)) if bar is not None else None

    def __call__(self, stage: str) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=stage, completed=self._places[stage])

    def finish(self) -> None:
        """All done."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=len(self._places))
