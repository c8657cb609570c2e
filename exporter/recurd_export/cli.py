"""``recurd export``: a trained model, from a file or a factory with weights, to a contract file."""

from pathlib import Path
from typing import Any

import click

from recurd_export import command
from recurd_export.errors import ExportUsageError

EPILOG = """\b
Examples:
  recurd export pump.keras --out pump.onnx
  recurd export pump.model:build --weights pump.pt --out pump.onnx
  recurd export pump.model:build --weights pump.safetensors --out pump.onnx --features flow,pressure --units l/s,bar
  recurd export charrnn:CharRNN --example 2,16 --dtype int64 --out char.onnx --json
\b
TARGET is a file of a whole model (.keras, .h5, or a torch.nn.Module in .pt or .pth), or a factory: a function or class
that gives a torch.nn.Module, or a module and an example input, or a Keras model. It is looked up below the current
directory too.
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


@click.command(epilog=EPILOG)
@click.argument("target", metavar="TARGET")
@click.option(
    "--weights", type=click.Path(path_type=Path), help="For a factory: torch.save, .safetensors or Keras' .weights.h5."
)
@click.option("--out", "-o", type=click.Path(path_type=Path), required=True, help="File to write, e.g. pump.onnx.")
@click.option("--name", help="Name of the model in the daemon.  [the file's name without .onnx]")
@click.option("--model-version", default="1", show_default=True, help="Version of the model.")
@click.option("--example", type=_Sizes(), help="Shape of an input: batch,steps,features.  [guessed]")
@click.option("--dtype", type=click.Choice(["float32", "int64"]), help="Element type of the input.  [guessed]")
@click.option("--features", callback=command.words, help="Names of the features, separated by commas.")
@click.option("--units", callback=command.words, help="Their units, separated by commas.")
@click.option("--sample-rate-hz", type=float, help="Rate of the steps.")
@click.option("--labels", "labels", multiple=True, metavar="HEAD=A,B,...", help="Names of a head's elements (classes).")
@click.option("--step", is_flag=True, help="The module's forward is one step: (x, state...) -> (y, state...).")
@click.option(
    "--trust-pickle",
    is_flag=True,
    help="Load a whole torch model from a file, which RUNS code that is in the file. Only for files you trust.",
)
@command.with_choices
def export(target: str, out: Path, as_json: bool, **options: Any) -> None:
    """Export a trained model to an ONNX file with a contract, and prove that the file does what the model does.

    The model's hidden states become explicit inputs and outputs.
    """
    import recurd_export  # brings torch, which '--help' does without

    labels = dict(map(command.labels_of_a_head, options.pop("labels")))
    options["version"] = options.pop("model_version")
    loading = {name: options.pop(name) for name in ("weights", "example", "dtype", "trust_pickle")}
    chosen = command.read_choices(options) | options

    def work(stages: command.Stages) -> Any:
        model, example = _load(target, **loading, step=options["step"])
        return recurd_export.export(model, example, out, labels=labels, progress=stages, **chosen)

    command.run(work, as_json=as_json)


def _load(
    target: str, weights: Path | None, example: Any, dtype: str | None, trust_pickle: bool, step: bool
) -> tuple[Any, Any]:
    """The model that was named, and an example for it; for a Keras file its path.

    A Keras model says itself what it takes.
    """
    from recurd_export import factory as factories
    from recurd_export import sources

    if sources.is_file_of_a_model(target):
        if weights is not None:
            raise ExportUsageError(f"{target} brings its own weights; --weights goes with a factory")
        model, given = sources.load_file(Path(target), trust_pickle), None
    else:
        model, given = factories.build(target)
    if isinstance(model, Path) or sources.is_keras(model):
        if example is not None or dtype is not None:
            raise ExportUsageError(f"{target} says itself what its input is; leave out --example and --dtype")
        if weights is not None:
            from recurd_export.keras.weights import load_weights as load_keras_weights

            load_keras_weights(model, weights)
        return model, given
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
