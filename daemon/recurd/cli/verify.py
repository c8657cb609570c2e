"""``recurd verify``: replay a model file's proof, without the framework it came from."""

import sys
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recurd.errors import ExitCode

EPILOG = """\b
Examples:
  recurd verify pump.onnx
  recurd verify pump.onnx --device cuda:0 --json
\b
Exit codes: 0 every check held, 65 one did not, or the file is not good, 69 no such device.
"""


@click.command(epilog=EPILOG)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random streams.")
@click.option("--json", "as_json", is_flag=True, help="Print the checks as JSON.")
@click.pass_context
def verify(ctx: click.Context, model: Path, device: str, seed: int, as_json: bool) -> None:
    """Check MODEL (a file with a contract) against its own proof.

    Replays the golden run stored in the file, and shows on random streams that whole streams, any chunking, ragged
    batches and streams alone all give the same.
    """
    from recurd.model import resolve_device  # brings onnxruntime, which '--help' does without
    from recurd.verify import verify as run

    checks = run(model, resolve_device(device)[0], seed)
    if as_json:
        body = [{**msgspec.to_builtins(check), "ok": check.ok} for check in checks]
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(body)) + b"\n")
    else:
        table = Table("check", "largest error", "allowed", "in", "", box=None, pad_edge=False)
        for check in checks:
            numbers = (f"{check.error:.1e}", f"{check.bound:.1e}")
            table.add_row(check.name, *numbers, escape(check.tensor), "ok" if check.ok else "[red]FAILED[/]")
        Console().print(table)
    if not all(check.ok for check in checks):
        ctx.exit(ExitCode.CONTRACT)
