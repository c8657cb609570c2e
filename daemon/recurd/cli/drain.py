"""``recurd drain``: move all streams of a daemon to another one."""

import click
import msgspec

from recurd.cli.endpoint import SECONDS, check_keys, checked, with_keys
from recurd.drain import Drain, Report, bar, counted
from recurd.errors import ExitCode, RecurdError, Unanswered
from recurd.keys import read_credentials
from recurd.remote import Remote

EPILOG = """\b
Examples:
  recurd drain --to tcp://10.0.0.2:7070
  recurd drain --endpoint tcp://10.0.0.1:7070 --to tcp://10.0.0.2:7070 --json
  recurd drain --cancel                       take streams again, after all
  recurd drain --cancel --endpoint tcp://10.0.0.2:7070
                                              also where a drain to it was cut off
  recurd drain --cancel --drained tcp://10.0.0.2:7070
                                              and anew those that had moved there
\b
Run it while both daemons serve. Clients follow by themselves, so --to is the address as they reach it; nothing is lost
and nothing runs twice. The daemon that is drained goes on running, without streams, and sends everybody on who comes:
stop it when its clients know the other address. Ctrl-C stops between two groups of streams; run it again to go on.
\b
Exit codes: 0 all streams have moved, 1 not all of them (the sentence says why; each is served by one of the two),
69 no daemon or no answer, 77 a key file is not good, 130 interrupted.
"""


@click.command(epilog=EPILOG)
@click.option("--to", callback=checked, help="The daemon that takes the streams, at the address clients reach it by.")
@click.option(
    "--endpoint", default="tcp://127.0.0.1:7070", show_default=True, callback=checked, help="The daemon to be drained."
)
@with_keys
@click.option("--to-server-key", help="Public key of the daemon that takes them, or its .key file.  [--server-key]")
@click.option("--accept-drift", is_flag=True, help="Go on with other weights, another runtime or device there.")
@click.option(
    "--cancel",
    is_flag=True,
    help="Let the daemon begin new streams again: after it was drained, or where a drain to it will not be finished.",
)
@click.option(
    "--drained",
    callback=checked,
    help="With --cancel: a daemon without streams, or gone for good; nobody is sent there, and none come from there.",
)
@click.option("--timeout", type=SECONDS, default=60.0, show_default=True, help="In seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def drain(
    ctx: click.Context,
    /,
    to: str | None,
    endpoint: str,
    key: str | None,
    server_key: str | None,
    to_server_key: str | None,
    accept_drift: bool,
    cancel: bool,
    drained: str | None,
    timeout: float,
    as_json: bool,
) -> None:
    """Move all streams of a running daemon to another one (--to), while clients go on.

    It takes the right 'admin' on both.
    """
    check_keys(key, server_key)
    if (to is None) != cancel:
        raise click.UsageError("name the daemon that takes the streams with --to (or say --cancel, alone)")
    if drained is not None and not cancel:
        raise click.UsageError("--drained goes with --cancel")
    credentials = read_credentials(key, server_key)
    with Remote(endpoint, timeout, credentials) as source:
        source.ask("groups")  # whether we may, before the other daemon is waited for
        if to is None:
            _cancel(source, drained, as_json)
            return
        theirs = read_credentials(key, to_server_key or server_key)
        try:
            with Remote(to, timeout, theirs) as target, bar("moving streams") as progress:
                if source.welcome.durability != "off" and target.welcome.durability == "off":
                    click.echo(f"recurd: {to} keeps no journal: streams do not survive its end there", err=True)
                report = Drain(
                    source,
                    target,
                    server_key=None if theirs is None else theirs.server,
                    accept_drift=accept_drift,
                    timeout_seconds=timeout,
                    progress=progress,
                ).run()
        except KeyboardInterrupt as interrupt:
            _tell("interrupted; run it again to go on", interrupt)
            raise
        except RecurdError as error:
            _tell(str(error), error)
            ctx.exit(ExitCode.DEVICE if isinstance(error, Unanswered) else ExitCode.BUG)
    click.echo(msgspec.json.encode(report).decode() if as_json else _sentence(report, to))
    _warn(report, to)


def _warn(report: Report, to: str) -> None:
    """What is not as it should be, though all streams have moved."""
    if report.undecided:
        click.echo(
            f"recurd: closed at {to} until another drain says where they are: {counted(report.undecided)}; "
            f"'recurd state held --endpoint {to}' shows them",
            err=True,
        )
    if report.expected:
        click.echo(
            f"recurd: no new stream begins at {to} until a drain from {' and '.join(report.expected)} is finished too; "
            f"where it never will be: 'recurd drain --cancel --endpoint {to}'",
            err=True,
        )


def _cancel(source: Remote, drained: str | None, as_json: bool) -> None:
    before, _ = source.ask("groups")
    left = source.ask("redirect")[0]["left"]
    forgotten = 0
    if drained is None:
        source.ask("expect")
    else:
        forgotten = source.ask("drained", endpoint=drained)[0]["forgotten"]
    after, _ = source.ask("groups")
    ended = [before["expected"][origin] for origin in before["expected"].keys() - after["expected"].keys()]
    if as_json:
        done = {"endpoint": source.endpoint, "takes_streams": not after["expected"], "streams": left}
        click.echo(msgspec.json.encode(done | {"not_expected": ended, "forgotten": forgotten}).decode())
        return
    if drained is not None:
        click.echo(f"{counted(forgotten)} that had moved to {drained} may begin at {source.endpoint} again")
    again = "as before" if before["sent_on"] is None and not ended else "again"
    for endpoint in ended:
        click.echo(f"{source.endpoint} expects no more streams from {endpoint}")
    for endpoint in after["expected"].values():
        click.echo(f"{source.endpoint} takes no new streams, as a drain from {endpoint} is not finished")
    if not after["expected"]:
        click.echo(f"{source.endpoint} takes new streams {again}")


def _tell(text: str, error: BaseException) -> None:
    """Why a drain stopped, and what it had done by then."""
    for line in (f"recurd: {text}", *getattr(error, "__notes__", ())):
        click.echo(line, err=True)


def _sentence(report: Report, to: str) -> str:
    settled = f"{counted(report.settled)} of a drain that was cut off went to {to}; " if report.settled else ""
    if not report.streams:
        what = "no other stream" if settled else "no stream"
        return f"{settled}there was {what}; whoever asks for one is sent to {to} from now on"
    pause = f"{report.longest_pause_seconds * 1000:,.1f} ms"
    return (
        f"{settled}{counted(report.streams)} moved to {to} in {report.seconds:g} s; "
        f"none was closed to its client for longer than {pause} by that"
    )
