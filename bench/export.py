"""How long an export takes, verification and the long run included, and what each precision costs.

The reference work is a 2-layer LSTM of 512 (8 -> 512 -> 512 -> 4) with random weights, exported from torch in a fresh
process each time, as 'recurd export' does: the first export of a process pays for imports that later ones do not. The
rounds go through the precisions in turns, so that a machine whose speed changes does not decide between them.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import click
import msgspec

FEATURES, OUTPUTS, LAYERS = 8, 4, 2
#: What the export of the reference work has to stay under, on two cores.
GOAL_SECONDS = 10.0


class Choice(NamedTuple):
    """A row of the table."""

    precision: str
    states: str

    def __str__(self) -> str:
        return f"{self.precision}, states {self.states}"


CHOICES = (
    Choice("float32", "float32"),
    Choice("float32", "float16"),
    Choice("bfloat16-weights", "float32"),
    Choice("float16", "float32"),
    Choice("float16", "float16"),
)


class Run(msgspec.Struct, frozen=True):
    """One export in a process of its own."""

    precision: str
    states: str
    #: The whole process, imports included; the export itself; its stages.
    process_seconds: float
    export_seconds: float
    #: CPU seconds of the whole process, which other processes disturb less than the others.
    cpu_seconds: float
    stages: dict[str, float]
    bytes: int
    #: Against the source: largest error of the short checks and of the long run, of the head.
    error: float
    drift: float
    drift_at_the_end: float
    drift_steps: int
    largest: float


@click.group(invoke_without_command=True, help=(__doc__ or "").replace("\n\n", "\n\n\b\n"))
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--hidden", type=click.IntRange(1), default=512, show_default=True, help="Size of both layers.")
@click.option("--json", "as_json", is_flag=True, help="Print every run as one JSON object a line.")
@click.pass_context
def main(ctx: click.Context, /, rounds: int, hidden: int, as_json: bool) -> None:
    if ctx.invoked_subcommand is not None:
        return
    runs: list[Run] = []
    for number in range(rounds):
        for choice in CHOICES:
            if sys.stderr.isatty():
                click.echo(f"round {number + 1} of {rounds}: {choice}", err=True)
            runs.append(one(choice, hidden))
            if as_json:
                click.echo(msgspec.json.encode(runs[-1]))
    if not as_json:
        click.echo(summary(runs))


def one(choice: Choice, hidden: int) -> Run:
    """One export in a process of its own."""
    command = [sys.executable, __file__, "one", *choice, str(hidden)]
    began = time.perf_counter()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    took = time.perf_counter() - began
    return msgspec.structs.replace(msgspec.json.decode(output, type=Run), process_seconds=took)


@main.command(name="one", hidden=True)
@click.argument("precision")
@click.argument("states")
@click.argument("hidden", type=int)
def one_here(precision: str, states: str, hidden: int) -> None:
    """Export once and print what it took."""
    import torch

    import recurd_export

    class Reference(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = torch.nn.LSTM(FEATURES, hidden, num_layers=LAYERS, batch_first=True)
            self.head = torch.nn.Linear(hidden, OUTPUTS)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.head(self.lstm(x)[0])
            return result

    torch.manual_seed(1234)
    model, stages = Reference(), Stages()
    with tempfile.TemporaryDirectory() as folder:
        report = recurd_export.export(
            model,
            torch.zeros(1, 16, FEATURES),
            Path(folder) / "reference.onnx",
            precision=precision,
            state_precision=states,
            progress=stages,
        )
    head = next(curve for curve in report.drift.curves if curve.kind == "head")
    run = Run(
        precision=precision,
        states=states,
        process_seconds=0.0,
        export_seconds=report.seconds,
        cpu_seconds=time.process_time(),
        stages=stages.ended(),
        bytes=report.bytes,
        error=max(check.error for check in report.checks),
        drift=head.worst,
        drift_at_the_end=head.errors[-1],
        drift_steps=report.drift.steps,
        largest=head.largest,
    )
    click.echo(msgspec.json.encode(run))


class Stages:
    """Told of each stage as it begins; owns how long each one took."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._present = ""
        self._since = 0.0

    def __call__(self, stage: str) -> None:
        self.ended()
        self._present, self._since = stage, time.perf_counter()

    def ended(self) -> dict[str, float]:
        """Seconds by stage; the present one is over."""
        if self._present:
            self._seconds[self._present] = round(time.perf_counter() - self._since, 3)
        self._present = ""
        return self._seconds


def summary(runs: list[Run]) -> str:
    """Medians and ranges by precision, and the stages of the first one."""
    heads = ("export s", "range", "process s", "CPU s", "MB", "checks", "drift", "at end", "steps")
    lines = ["{:34} {:>8} {:>10} {:>9} {:>6} {:>6} {:>8} {:>8} {:>8} {:>6}".format("", *heads)]
    for choice in CHOICES:
        mine = [run for run in runs if (run.precision, run.states) == choice]
        seconds = [run.export_seconds for run in mine]
        last = mine[-1]
        lines.append(
            f"{choice!s:34} {statistics.median(seconds):8.1f} {f'{min(seconds):.1f}-{max(seconds):.1f}':>10} "
            f"{statistics.median(run.process_seconds for run in mine):9.1f} "
            f"{statistics.median(run.cpu_seconds for run in mine):6.1f} {last.bytes / 1e6:6.2f} {last.error:8.1e} "
            f"{last.drift:8.1e} {last.drift_at_the_end:8.1e} {statistics.median(r.drift_steps for r in mine):6,.0f}"
        )
    plain = [run for run in runs if (run.precision, run.states) == CHOICES[0]]
    lines.append(f"largest value of the head over the long run: {plain[-1].largest:.3g}")
    stages = ", ".join(
        f"{stage} {statistics.median(run.stages.get(stage, 0.0) for run in plain):.1f}" for stage in plain[0].stages
    )
    lines.append(f"seconds by stage in float32: {stages}")
    met = statistics.median(run.export_seconds for run in plain) < GOAL_SECONDS
    lines.append(f"the goal of {GOAL_SECONDS:.0f} s {'was' if met else 'was NOT'} met")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
