"""``recurd reload``: a daemon reads its configuration again and takes over the model files that have changed."""

import sys
from collections.abc import Iterator
from typing import Any

import click
import msgspec

from recurd.cli.endpoint import SECONDS, check_keys, checked, with_keys
from recurd.errors import ExitCode
from recurd.keys import read_credentials
from recurd.remote import Remote

EPILOG = """\b
Examples:
  recurd reload
  recurd reload --endpoint ipc:///run/recurd/recurd.sock --incompatible restart --json
\b
Exit codes: 0 every file is served, 65 one is not (the former one serves on), 69 no daemon answered (within 10 s), 1 it
refused (the right 'admin' is missing, or its configuration cannot be read; then nothing has changed), 77 a key file is
not good, 130 interrupted (the daemon goes on reloading).
"""
#: Time for the daemon to say that it is there.
_GREETING_SECONDS = 10.0


@click.command(epilog=EPILOG)
@click.option(
    "--endpoint", default="tcp://127.0.0.1:7070", show_default=True, callback=checked, help="The daemon's address."
)
@click.option(
    "--incompatible",
    type=click.Choice(["finish", "restart"]),
    help="Streams that a new file cannot go on with finish on the former one, or end.  [as configured]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--timeout", type=SECONDS, default=300.0, show_default=True, help="Seconds to wait until all is loaded.")
@with_keys
@click.pass_context
def reload(
    ctx: click.Context,
    endpoint: str,
    incompatible: str | None,
    as_json: bool,
    timeout: float,
    key: str | None,
    server_key: str | None,
) -> None:
    """Have a daemon read its configuration again, load the model files that have changed beside those it serves, and
    take them over between two ticks. Says what became of each, and of its streams."""
    check_keys(key, server_key)
    choice: dict[str, Any] = {} if incompatible is None else {"incompatible": incompatible}
    with Remote(endpoint, min(timeout, _GREETING_SECONDS), read_credentials(key, server_key)) as daemon:
        report, _ = daemon.ask("reload", seconds=timeout, **choice)
    if as_json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    else:
        for model in report["models"]:
            click.echo(_sentence(model))
        if report["former_ending"]:
            click.echo(f"{report['former_ending']} streams of versions replaced before end")
        if report["needs_start"]:
            click.echo(f"changed, and taken at the next start only: {', '.join(report['needs_start'])}")
    if any(model["outcome"] == "failed" for model in report["models"]):
        ctx.exit(ExitCode.CONTRACT)


def _sentence(model: dict[str, Any]) -> str:
    return f"{model['model'] or model['path']}: " + "; ".join(_clauses(model))


def _clauses(model: dict[str, Any]) -> Iterator[str]:
    if model["outcome"] == "failed":
        yield f"NOT reloaded: {model['reason']}"
        return
    yield {"unchanged": "unchanged", "added": "added", "removed": "removed"}.get(model["outcome"], "replaced")
    for key, words in _STREAMS.items():
        if key in model:
            yield f"{model[key]} {words}"


_STREAMS = {
    "kept": "streams keep their state",
    "finishing": "streams finish on the former version",
    "ending": "streams of the former version end",
}
