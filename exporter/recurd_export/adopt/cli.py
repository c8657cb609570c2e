"""``recurd adopt``: a stateful ONNX file of others to a contract file."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import click
import msgspec

from recurd_export import command
from recurd_export.adopt.settings import Adoption, StatePair, read
from recurd_export.errors import ExportUsageError

EPILOG = """\b
Examples:
  recurd adopt lstm.onnx -o pump.onnx
  recurd adopt model.onnx --state h:hn --state c:cn --batch-axis 1 -o adopted.onnx
  recurd adopt silero_vad.onnx --constant sr=16000 --step-shape 512 --context 64 -o vad.onnx
  recurd adopt adopt.toml
\b
The file says in its inputs and outputs what is carried from step to step; names like h and hn, state and stateN,
past and present are recognised, and the axes of batch and time are found by running. The rest can be said here, or in a
TOML file (given with --config, or in the model's place) with the keys
  model, out, input, heads, lengths, step_shape, context, batch_axis, input_batch_axis, example, classes, name,
  version, features, units, sample_rate_hz, the tables [constants] and [labels], and for every state [[states]] with
  input, output, batch_axis, shape, initial.
\b
Exit codes: 0 adopted and verified, 2 wrong usage, 70 the model cannot be adopted (nothing is written).
"""


def _sizes(text: str, option: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        sizes = (0,)
    if any(size < 1 for size in sizes):
        raise ExportUsageError(f"'{text}' is not a shape; write {option} like 512 or 2,128")
    return sizes


def _named(text: str, option: str, example: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise ExportUsageError(f"'{text}' has no name and value; write {option} {example}")
    return name, value


@click.command(epilog=EPILOG)
@click.argument("model", metavar="[MODEL.onnx|ADOPT.toml]", required=False, type=click.Path(path_type=Path))
@click.option("--config", type=click.Path(path_type=Path), help="TOML file with what is said here by options.")
@click.option("--out", "-o", type=click.Path(path_type=Path), help="File to write, e.g. adopted.onnx.")
@click.option("--state", "states", multiple=True, metavar="INPUT:OUTPUT", help="A state and its next value.  [guessed]")
@click.option("--input", metavar="NAME", help="The input that streams send.  [guessed]")
@click.option("--head", "heads", multiple=True, metavar="NAME", help="An output that streams get.  [all but states]")
@click.option("--constant", "constants", multiple=True, metavar="NAME=VALUE", help="The value of a further input.")
@click.option("--lengths", metavar="NAME", help="The input for the number of steps of each row.  [guessed]")
@click.option("--step-shape", metavar="SIZES", help="Shape of one step as streams send it, e.g. 512.  [from the file]")
@click.option("--context", type=click.IntRange(0), help="So many last elements of a step go in front of the next one.")
@click.option(
    "--batch-axis", "batch_axes", multiple=True, metavar="[STATE=]AXIS", help="Of states.  [found by running]"
)
@click.option("--input-batch-axis", type=click.IntRange(0), metavar="AXIS", help="Of the input.  [found by running]")
@click.option("--state-shape", "shapes", multiple=True, metavar="STATE=SIZES", help="Without batch.  [from the file]")
@click.option("--initial", "initials", multiple=True, metavar="STATE=VALUE", help="A number or .npy file.  [zeros]")
@click.option("--example", type=click.Path(), help="A .npy file of steps the model takes, if not any number.")
@click.option("--classes", type=click.IntRange(1), help="Token ids are below this number.")
@click.option("--name", help="Name of the model in the daemon.  [the new file's name without .onnx]")
@click.option("--model-version", "version", help="Version of the model.  [1]")
@click.option("--features", callback=command.words, help="Names of the features, separated by commas.")
@click.option("--units", callback=command.words, help="Their units, separated by commas.")
@click.option("--labels", multiple=True, metavar="HEAD=A,B,...", help="Names of a head's elements (classes).")
@click.option("--sample-rate-hz", type=float, help="Rate of the steps.")
@command.with_choices
def adopt(model: Path | None, config: Path | None, out: Path | None, as_json: bool, **options: Any) -> None:
    """Give a contract to a stateful ONNX model of others, and prove that the new file does what the old one does.

    The model's own graph is kept inside; its states become the daemon's.
    """
    if model is not None and model.suffix == ".toml":
        if config is not None:
            raise ExportUsageError(f"{model} and {config} are both TOML files; give one")
        model, config = None, model
    adoption = _with_options(Adoption() if config is None else read(config), options)
    source = model or (adoption.model and Path(adoption.model)) or _missing("model", "MODEL.onnx")
    target = out or (adoption.out and Path(adoption.out)) or _missing("file to write", "--out")
    from recurd_export.adopt import adopt as run  # brings onnxruntime, which '--help' does without

    chosen = command.read_choices(options)
    command.run(lambda stages: run(source, target, adoption, progress=stages, **chosen), as_json=as_json)


def _missing(what: str, how: str) -> NoReturn:
    raise ExportUsageError(f"no {what} is named; give {how}, or a TOML file that names it")


def _with_options(adoption: Adoption, options: dict[str, Any]) -> Adoption:
    """The adoption with what was said by options, which win."""
    said: dict[str, Any] = {}
    axes = [axis for axis in options["batch_axes"] if "=" not in axis]
    if axes:
        said["batch_axis"] = _axis(axes[-1])
    if options["step_shape"] is not None:
        said["step_shape"] = _sizes(options["step_shape"], "--step-shape")
    constants = dict(_constant(text) for text in options["constants"])
    labels = {head: tuple(names) for head, names in map(command.labels_of_a_head, options["labels"])}
    said |= {"constants": adoption.constants | constants, "labels": adoption.labels | labels}
    said["states"] = _states(adoption.states, options)
    plain = ("input", "heads", "lengths", "context", "input_batch_axis", "example", "classes")
    facts = ("name", "version", "features", "units", "sample_rate_hz")
    said |= {key: options[key] for key in (*plain, *facts) if options[key] not in (None, ())}
    return msgspec.structs.replace(adoption, **said)


def _states(known: Iterable[StatePair], options: dict[str, Any]) -> tuple[StatePair, ...]:
    pairs = {pair.input: pair for pair in known}

    def change(name: str, **fields: Any) -> None:
        pairs[name] = msgspec.structs.replace(pairs.get(name, StatePair(input=name)), **fields)

    for text in options["states"]:
        before, colon, after = text.partition(":")
        if not (before and colon and after) or ":" in after:
            raise ExportUsageError(
                f"'{text}' does not name a state's input and output; write --state h:hn, and names with a colon in a "
                f"TOML file"
            )
        change(before, output=after)
    for text in options["batch_axes"]:
        if "=" in text:
            name, value = _named(text, "--batch-axis", "h=1")
            change(name, batch_axis=_axis(value))
    for text in options["shapes"]:
        name, value = _named(text, "--state-shape", "h=2,128")
        change(name, shape=_sizes(value, "--state-shape"))
    for text in options["initials"]:
        name, value = _named(text, "--initial", "h=0.5")
        change(name, initial=_number(value))
    return tuple(pairs.values())


def _axis(text: str) -> int:
    if not text.isdecimal():
        raise ExportUsageError(f"'{text}' is no axis; write --batch-axis 1 or --batch-axis h=1")
    return int(text)


def _number(text: str) -> float | str:
    """A number, or else the name of a file."""
    try:
        return float(text)
    except ValueError:
        return text


def _constant(text: str) -> tuple[str, Any]:
    name, value = _named(text, "--constant", "sr=16000")
    try:
        return name, msgspec.json.decode(value, type=bool | int | float | list[Any])
    except msgspec.MsgspecError as error:
        raise ExportUsageError(
            f"'{value}' is no value for '{name}'; write --constant {name}=1, =0.5 or =[1,2]"
        ) from error
