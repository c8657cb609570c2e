"""The option ``--endpoint``, as every command that talks to a daemon takes it."""

import click

from recurd.errors import RecurdError
from recurd.interface import check_endpoint


def checked(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """The address as it is given, when it is one; else wrong usage."""
    if value is not None:
        try:
            check_endpoint(value)
        except RecurdError as error:
            raise click.BadParameter(str(error)) from error
    return value
