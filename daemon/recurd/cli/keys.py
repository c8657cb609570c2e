"""``recurd keys``: pairs of CURVE keys for a daemon and its clients."""

import datetime
from pathlib import Path

import click

from recurd.errors import ExitCode, KeyFileError
from recurd.keys import PUBLIC_SUFFIX, SECRET_SUFFIX, new, read_pair, read_public

EPILOG = """\b
Examples:
  recurd keys new server --directory /etc/recurd          on the daemon's machine: auth.key is server.key_secret
  recurd keys new gateway-7                               on the client's machine
  scp gateway-7.key daemon:/etc/recurd/clients/           the public key, to the daemon
  recurd keys list /etc/recurd/clients                    who may connect
\b
NAME.key holds the public key and may be given to anybody; NAME.key_secret is its owner's alone and never leaves its
machine. A client is the tenant NAME of its file in the daemon's folder of clients.
\b
Exit codes: 0 done, 77 a key file is not good, or there already.
"""


@click.group(epilog=EPILOG)
def keys() -> None:
    """Make and look at CURVE keys: who a daemon is, and who may connect to it."""


@keys.command("new")
@click.argument("name")
@click.option(
    "--directory",
    "-d",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Where the two files go.  [here]",
)
def new_command(name: str, directory: Path) -> None:
    """Make the keys NAME: NAME.key, and NAME.key_secret with mode 0600. Nothing is ever overwritten."""
    public, secret = new(name, directory)
    click.echo(f"{secret}  the secret key: stays here")
    click.echo(f"{public}  the public key: {read_public(public)}")


@keys.command("show")
@click.argument("file", type=click.Path(path_type=Path))
def show(file: Path) -> None:
    """Print the public key of FILE, a .key or a .key_secret file, once it is found to be good."""
    click.echo(read_pair(file).public if file.name.endswith(SECRET_SUFFIX) else read_public(file))


@keys.command("list")
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False), default=Path())
@click.pass_context
def list_command(ctx: click.Context, directory: Path) -> None:
    """List the public keys in DIRECTORY: the tenant, its key, and since when it is there."""
    try:
        files = sorted(path for path in directory.iterdir() if path.name.endswith(PUBLIC_SUFFIX))
    except OSError as error:
        raise KeyFileError(f"{directory}: cannot be read: {error.strerror}") from error
    status = ExitCode.OK
    for path in files:
        day = datetime.date.fromtimestamp(path.stat().st_mtime)
        try:
            click.echo(f"{path.name.removesuffix(PUBLIC_SUFFIX):24} {read_public(path)}  {day}")
        except KeyFileError as error:
            click.echo(f"recurd: {error}", err=True)
            status = error.exit_code
    ctx.exit(status)
