"""``recurd demo``: the main job on real sensor data, from training to answers over the network.

Read :mod:`recurd_export.demo.run` first: the whole way.
"""

import signal
import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from recurd.errors import RecurdError
from recurd_export.demo.data import NAMES

EPILOG = """\b
Examples:
  recurd demo
  recurd demo --data basic-motions --out /tmp/demo --json
\b
Exit codes: 0 the daemon gave what the models give, 1 it did not, or something failed; 130 interrupted.
"""


@click.command(epilog=EPILOG)
@click.option(
    "--data", type=click.Choice([*NAMES, "both"]), default="both", show_default=True, help="Recordings to work on."
)
@click.option(
    "--out",
    "-o",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo-out"),
    show_default=True,
    help="Directory for models, rows, pictures and the daemon's log; it is made.",
)
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the training part.  [120]")
@click.option("--connections", type=click.IntRange(1, 64), default=4, show_default=True, help="Clients at once.")
@click.option("--device", default="auto", show_default=True, help="Of the daemon: auto, cpu, cuda or cuda:N.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all that is random.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def demo(data: str, out: Path, as_json: bool, **options: Any) -> None:
    """Train, export, serve and stream real sensor data, and hold the answers against the trained models.

    Recordings of a smart watch (what is its wearer doing?) and of a microphone (who is speaking?) train two small
    LSTMs; a daemon serves both to some forty streams at once, which send ragged chunks over several connections.
    """
    from recurd_export.demo import report, run  # bring torch, which '--help' does without

    signal.signal(signal.SIGTERM, _interrupt)  # so that the daemon is stopped then too
    found = run.run(NAMES if data == "both" else (data,), out, **options)
    if as_json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(found, enc_hook=str)) + b"\n")
        sys.stdout.flush()
    else:
        click.echo(report.describe(found))
    if not found.agrees:
        raise RecurdError("the daemon's answers are not those of the trained model")


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
