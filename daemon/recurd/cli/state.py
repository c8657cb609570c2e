"""``recurd state``: streams out of a running daemon into a file, and back."""

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec

from recurd.cli.endpoint import SECONDS, check_keys, checked, with_keys
from recurd.drain import bar, counted, pages
from recurd.errors import RecurdError
from recurd.keys import read_credentials
from recurd.remote import Remote
from recurd.saving import ModelStamp, Parcel

EPILOG = """\b
Examples:
  recurd state export streams.safetensors
  recurd state export pumps.safetensors --model pump --stream 'hall-3/*'
  recurd state import pumps.safetensors --endpoint tcp://10.0.0.2:7070
\b
To move all streams of a daemon that is in use to another one, see 'recurd drain'.
"""
EXPORT_EPILOG = """\b
Examples:
  recurd state export streams.safetensors
  recurd state export pumps.safetensors --model pump --stream 'hall-3/*' --tenant gateway-7
\b
Streams go on while they are copied: each stands in the file between two of its chunks, with the results that its
client has not acknowledged. The file holds what streams have learned of their data: keep it as you keep the data.

Exit codes: 0 done, 1 the daemon refused, 65 the file cannot be written, 69 no daemon or no answer, 77 a key file
is not good, 130 interrupted.
"""
IMPORT_EPILOG = """\b
Examples:
  recurd state import streams.safetensors
  recurd state import pumps.safetensors --endpoint tcp://10.0.0.2:7070
\b
All streams of the file, or none. A stream that is there already as it stands in the file stays; one of the same name
that is not is an error. A client that had the stream resumes it there.
\b
Exit codes: 0 done, 1 the daemon does not take them, 65 not a file of streams, 69 no daemon or no answer, 77 a key file
is not good, 130 interrupted.
"""
HELD_EPILOG = """\b
Examples:
  recurd state held
  recurd state held --drop 3f9ac1d25e7b8a60
\b
Clients of such streams are told to wait ('busy'). Usually the same 'recurd drain' again decides about them, by what the
daemon says that they came from. Decide yourself only when that one is gone for good: --admit when it had not gone on
with them, --drop when these copies are to be thrown away and clients may open the streams anew.
\b
Exit codes: 0 done, 1 the daemon refused or holds no such group, 69 no daemon or no answer, 77 a key file is not good,
130 interrupted.
"""
_ENDPOINT = click.option(
    "--endpoint", default="tcp://127.0.0.1:7070", show_default=True, callback=checked, help="The daemon's address."
)
_TIMEOUT = click.option("--timeout", type=SECONDS, default=60.0, show_default=True, help="In seconds.")
#: What a stream takes in a page besides its state and its answers.
_MARGIN_BYTES = 65_536
#: Streams of a message: a daemon's other clients wait while it takes one in.
_PAGE_STREAMS = 512


@click.group(epilog=EPILOG)
def state() -> None:
    """Streams and their states as a file. It takes the right 'admin'."""


@state.command("export", epilog=EXPORT_EPILOG)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--model", help="Only streams of this model.")
@click.option("--stream", default="*", show_default=True, help="Only streams with names like this.")
@click.option("--tenant", default="*", show_default=True, help="Only streams of tenants with names like this.")
@_ENDPOINT
@with_keys
@_TIMEOUT
def export(
    file: Path,
    model: str | None,
    stream: str,
    tenant: str,
    endpoint: str,
    key: str | None,
    server_key: str | None,
    timeout: float,
) -> None:
    """Copy streams of a running daemon into FILE (safetensors)."""
    from recurd import statefile

    check_keys(key, server_key)
    id = secrets.token_hex(8)
    with Remote(endpoint, timeout, read_credentials(key, server_key)) as daemon, bar("copying streams") as progress:
        report, _ = daemon.ask("gather", group=id, model=model, stream=stream, tenant=tenant)
        if model is not None and model not in daemon.welcome.models and not report["streams"]:
            raise RecurdError(f"there is no model '{model}' at {endpoint}, only {', '.join(daemon.welcome.models)}")
        parcels: list[Parcel] = []
        if report["streams"]:
            for data in pages(daemon, id, daemon.welcome.max_message_bytes - _MARGIN_BYTES, timeout):
                parcels += msgspec.msgpack.decode(data, type=list[Parcel])
                progress(len(parcels), report["streams"])
            daemon.ask("lift", group=id)
        in_use = {(parcel.stream.model, parcel.state_hash) for parcel in parcels}
        stamps = [one for one in msgspec.convert(report["stamps"], list[ModelStamp]) if _key(one) in in_use]
    statefile.write(file, parcels, stamps)
    click.echo(f"{counted(len(parcels))} in {file}")


def _key(one: ModelStamp) -> tuple[str, str]:
    return one.model, one.stamp.state_hash


@state.command("import", epilog=IMPORT_EPILOG)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--accept-drift", is_flag=True, help="Go on with other weights, another runtime or device.")
@_ENDPOINT
@with_keys
@_TIMEOUT
def import_(
    file: Path, accept_drift: bool, endpoint: str, key: str | None, server_key: str | None, timeout: float
) -> None:
    """Give the streams of FILE to a running daemon."""
    from recurd import statefile

    check_keys(key, server_key)
    parcels, stamps = statefile.read(file)
    id = secrets.token_hex(8)
    with Remote(endpoint, timeout, read_credentials(key, server_key)) as daemon, bar("giving streams") as progress:
        try:
            done = stayed = 0
            for count, data in _packed(parcels, daemon.welcome.max_message_bytes - _MARGIN_BYTES):
                report, _ = daemon.ask(
                    "import", data, group=id, stamps=stamps, accept_drift=accept_drift, lasting=False
                )
                stayed += report["stayed"]
                done += count
                progress(done, len(parcels))
            if parcels and daemon.ask("admit", group=id)[0]["fate"] != "admitted":
                raise RecurdError(
                    f"{endpoint} has dropped them: nothing was heard of us for too long; import them again"
                )
        except BaseException:
            daemon.ask("drop", group=id)
            raise
    there = f"; there already, as in the file: {stayed:,}" if stayed else ""
    click.echo(f"{counted(len(parcels) - stayed)} given to {endpoint}{there}")


@state.command("held", epilog=HELD_EPILOG)
@click.option("--admit", metavar="GROUP", help="They are this daemon's from now on.")
@click.option("--drop", metavar="GROUP", help="They are not, and never were.")
@_ENDPOINT
@with_keys
@_TIMEOUT
@click.option("--json", "as_json", is_flag=True, help="Print all that as JSON.")
def held(
    admit: str | None,
    drop: str | None,
    endpoint: str,
    key: str | None,
    server_key: str | None,
    timeout: float,
    as_json: bool,
) -> None:
    """Show the groups of streams that have arrived with a drain and are closed until they are handed over.

    And the daemons that more are to come from, by drains that are not finished, and where a drained daemon sends on to.
    """
    check_keys(key, server_key)
    if admit is not None and drop is not None:
        raise click.UsageError("--admit or --drop, not both")
    with Remote(endpoint, timeout, read_credentials(key, server_key)) as daemon:
        report, _ = daemon.ask("groups")
        groups = report["held"]
        id = admit or drop
        if id is None:
            _show(report, as_json=as_json)
        elif id not in groups:
            raise RecurdError(f"{endpoint} holds no group '{id}', but {', '.join(sorted(groups)) or 'none'}")
        else:
            daemon.ask("drop" if admit is None else "admit", group=id)
            what = "dropped" if admit is None else "admitted"
            click.echo(f"{counted(groups[id]['streams'])} {what} at {endpoint}")


def _show(report: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
        return
    groups = report["held"]
    for id, group in sorted(groups.items()):
        example = f", '{group['stream']}' of tenant '{group['tenant']}' among them" if group["streams"] else ""
        click.echo(f"{id}  {counted(group['streams'])}{example}")
    if not groups:
        click.echo("no streams are held")
    if report["expected"]:
        click.echo(
            f"more are to come from {' and '.join(report['expected'].values())}; until then no new stream begins here"
        )
    if report["sent_on"] is not None:
        click.echo(f"no stream is left here, and who opens one is sent on to {report['sent_on'][0]}")


def _packed(parcels: list[Parcel], max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Streams in messages of at most so many bytes (a larger one goes alone), and how many there are in each."""
    page: list[msgspec.Raw] = []
    size = 0
    for parcel in parcels:
        data = msgspec.msgpack.encode(parcel)
        if page and (size + len(data) > max_bytes or len(page) >= _PAGE_STREAMS):
            yield len(page), msgspec.msgpack.encode(page)
            page, size = [], 0
        page.append(msgspec.Raw(data))
        size += len(data)
    yield len(page), msgspec.msgpack.encode(page)
