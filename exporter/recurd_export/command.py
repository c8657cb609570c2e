"""What ``recurd export`` and ``recurd adopt`` share: options, the progress bar, printing of the report."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from recurd_export.errors import ExportUsageError

if TYPE_CHECKING:
    from recurd_export.report import Report

#: Options of both commands; :func:`read_choices` turns what they say into arguments of the functions behind.
_CHOICES = (
    click.option("--normalize", type=click.Path(path_type=Path), help='JSON file: {"mean": [...], "std": [...]}.'),
    click.option(
        "--precision",
        default="float32",
        show_default=True,
        metavar="float32|float16|bfloat16-weights",
        help="Of the file.",
    ),
    click.option("--state-precision", metavar="float32|float16", help="Of the states.  [as the arithmetic]"),
    click.option("--report", type=click.Path(path_type=Path), help="HTML page to write, e.g. pump.html."),
    click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
)


def with_choices(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that hold for any source model."""
    for option in reversed(_CHOICES):
        command = option(command)
    return command


def read_choices(options: dict[str, Any]) -> dict[str, Any]:
    """Take them out of a command's options, as keyword arguments of ``export`` and ``adopt``."""
    chosen = {name: options.pop(name) for name in ("normalize", "precision", "state_precision", "report")}
    path: Path | None = chosen["normalize"]
    if path is not None:
        from recurd_export.normalize import read

        try:
            chosen["normalize"] = read(path.read_bytes(), str(path))
        except OSError as error:
            raise ExportUsageError(f"{path}: cannot be read: {error.strerror}") from error
    return chosen


def words(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    """``flow,pressure`` as a tuple."""
    return tuple(word.strip() for word in value.split(",")) if value else ()


def labels_of_a_head(text: str) -> tuple[str, list[str]]:
    """``output=low,high`` as a head and the names of its elements. Raises :class:`ExportUsageError`."""
    head, equals, names = text.partition("=")
    if not equals or not head or not names:
        raise ExportUsageError(f"'{text}' does not say the labels of a head; write --labels output=low,high")
    return head, [name.strip() for name in names.split(",")]


def run(work: "Callable[[Stages], Report]", *, as_json: bool) -> None:
    """Do the work under a progress bar, where standard error is a terminal, and print its report."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:18}"), BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
    with bar or nullcontext():
        report = work(Stages(bar))
    if as_json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(report, enc_hook=str)) + b"\n")
    else:
        click.echo(report)


class Stages:
    """Moves the bar; called with the name of each stage as it begins."""

    def __init__(self, bar: Progress | None) -> None:
        from recurd_export.pipeline import STAGES  # brings onnx

        self._places = {stage: place for place, stage in enumerate(STAGES)}
        self._bar = bar
        self._task = bar.add_task(STAGES[0], total=len(STAGES)) if bar is not None else None

    def __call__(self, stage: str) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=stage, completed=self._places[stage])
