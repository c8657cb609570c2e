"""What the programs in this folder end with: their findings as a table or as JSON, and a status that says whether all
was well. And a process's memory, which most of them look at."""

import sys
from pathlib import Path
from typing import NoReturn, Protocol

import click
import msgspec


class Outcome(Protocol):
    """A msgspec struct of findings."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found that must not be."""
        ...


def end(outcome: Outcome, *, as_json: bool) -> NoReturn:
    """Print the findings and end with status 0 or 1."""
    if as_json:
        click.echo(msgspec.json.encode(outcome))
    else:
        for name, value in msgspec.to_builtins(outcome).items():
            shown = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
            click.echo(f"{name.replace('_', ' '):28} {shown}")
    sys.exit(0 if outcome.ok else 1)


def say(text: str) -> None:
    """Progress, for a person who watches."""
    click.echo(text, err=True)


def memory(pid: int, field: str = "VmRSS") -> int:
    """Bytes of a process's resident memory now, or at most so far (``VmHWM``). Linux."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) * 1024
