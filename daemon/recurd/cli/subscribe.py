"""``recurd subscribe``: published results as JSON lines on standard output."""

from typing import Any

import click
import msgspec

from recurd.cli.endpoint import SECONDS, check_keys, checked, with_keys
from recurd.cli.output import discard_output
from recurd.subscriber import Publication, subscribe

EPILOG = """\b
Examples:
  recurd subscribe tcp://127.0.0.1:7071 'local/pump/*'
  recurd subscribe tcp://daemon:7071 gateway-7/pump/hall-3 --key scada.key_secret --server-key server.key
\b
One JSON object a result: tenant, model, stream, seq, generation, fresh, steps, and values (head after head, each
[steps, outputs], as one list). A seq that is left out was a reset, or too much for this reader. A topic that one may
not have gives nothing; the daemon's log and recurd_subscriptions_refused_total tell.
\b
Exit codes: 0 so many as were asked for came, 1 the key is not known, 69 nothing came in time, 77 a key file is not
good, 130 interrupted.
"""


@click.command("subscribe", epilog=EPILOG)
@click.argument("endpoint", callback=checked)
@click.argument("topics", nargs=-1, required=True)
@with_keys
@click.option("--count", type=click.IntRange(1), help="Stop after so many results.  [never]")
@click.option("--timeout", type=SECONDS, help="Longest wait for one, in seconds.  [for ever]")
def command(
    endpoint: str,
    topics: tuple[str, ...],
    key: str | None,
    server_key: str | None,
    count: int | None,
    timeout: float | None,
) -> None:
    """Print the results that the daemon publishes at ENDPOINT: TOPICS are tenant/model/stream, a '*' at the end."""
    check_keys(key, server_key)
    with subscribe(endpoint, *topics, timeout_seconds=timeout, key=key, server_key=server_key) as subscriber:
        try:
            for number, publication in enumerate(subscriber, 1):
                click.echo(msgspec.json.encode(_line(publication)).decode())
                if number == count:
                    return
        except BrokenPipeError:  # whoever reads us has seen enough
            discard_output()


def _line(publication: Publication) -> dict[str, Any]:
    return {
        "tenant": publication.tenant,
        "model": publication.model,
        "stream": publication.stream,
        "seq": publication.seq,
        "generation": publication.generation,
        "fresh": publication.fresh,
        "steps": publication.header.steps,
        "values": publication.values.tolist(),
    }
