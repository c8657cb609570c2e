"""The options ``--endpoint``, ``--key`` and ``--server-key``, as every command that talks to a daemon takes them."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import click

from recurd.errors import RecurdError
from recurd.interface import check_endpoint

Command = TypeVar("Command", bound=Callable[..., Any])


class _Seconds(click.FloatRange):
    """A time to wait."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """As :class:`click.FloatRange`, which takes ``nan`` for a number between others."""
        seconds: float = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{seconds} is no time to wait.", param, ctx)
        return seconds


SECONDS = _Seconds(0, min_open=True)


def with_keys(command: Command) -> Command:
    """Add ``--key`` and ``--server-key`` to a command, which gets ``key`` and ``server_key``: both, or neither."""
    for option in (
        click.option(
            "--server-key",
            envvar="RECURD_SERVER_KEY",
            help="The daemon's public key, or its .key file.  [RECURD_SERVER_KEY]",
        ),
        click.option(
            "--key",
            envvar="RECURD_KEY",
            help="One's own .key_secret file, where the daemon authenticates its clients.  [RECURD_KEY]",
        ),
    ):
        command = option(command)
    return command


def check_keys(key: str | None, server_key: str | None) -> None:
    """Raises click.UsageError for one of the two without the other."""
    if (key is None) != (server_key is None):
        raise click.UsageError("--key (one's own) and --server-key (the daemon's public one) go together")


def checked(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """The address as it is given, when it is one; else wrong usage."""
    if value is not None:
        try:
            check_endpoint(value)
        except RecurdError as error:
            raise click.BadParameter(str(error)) from error
    return value
