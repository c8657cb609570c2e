"""``recurd serve``: flags over a configuration file, then the daemon."""

import signal
from functools import partial
from pathlib import Path
from typing import Any

import click

from recurd import config
from recurd.errors import ConfigError

EPILOG = """\b
Examples:
  recurd serve pump.onnx
  recurd serve pump.onnx valve.onnx --bind ipc:///run/recurd/recurd.sock --device cpu
  recurd serve pump.onnx --journal ~/pump-streams
  recurd serve --config /etc/recurd/recurd.toml --check
\b
Exit codes: 0 stopped as asked, 65 a model file is not good, 69 no such device, 71 the device has gone, 74 the journal
cannot be gone on with, 75 an address cannot be bound, 77 a key file is not good or it cannot be made sure who may
connect, 78 the configuration is wrong, 130 interrupted while it started.
"""


@click.command(epilog=EPILOG)
@click.argument("models", nargs=-1, type=click.Path(path_type=Path))
@click.option("--config", "-c", "config_file", type=click.Path(path_type=Path), help="TOML file; flags override it.")
@click.option("--bind", multiple=True, help="tcp://host:port or ipc:///path; may be repeated.  [tcp://127.0.0.1:7070]")
@click.option("--metrics", help="host:port of /metrics, /healthz and /readyz; '' for none.  [127.0.0.1:9187]")
@click.option("--device", help="auto, cpu, cuda or cuda:N.  [auto]")
@click.option("--slots", type=int, help="Streams of a model whose state the device holds.  [4096]")
@click.option("--threads", type=int, help="Threads of a model's run on the CPU; 0: all cores.  [0]")
@click.option("--log-format", type=click.Choice(["keyvalue", "json"]), help="Form of the log lines.  [keyvalue]")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Least level.  [info]")
@click.option("--key", help="The daemon's own .key_secret file: tcp clients are authenticated, by --clients.")
@click.option("--clients", help="Folder of the public keys that are let in; NAME.key is tenant NAME's.")
@click.option("--insecure", is_flag=True, default=None, help="Serve beyond this machine without authentication.")
@click.option("--journal", type=click.Path(), help="Folder in which streams outlive the daemon.")
@click.option(
    "--durability",
    type=click.Choice(["off", "process", "power"]),
    help="What they outlive; power syncs every commit.  [process with --journal, else off]",
)
@click.option("--accept-drift", is_flag=True, default=None, help="Go on with streams of other weights or runtimes.")
@click.option("--check", is_flag=True, help="Check configuration, key and model files, and exit.")
@click.pass_context
def serve(ctx: click.Context, /, check: bool, **flags: Any) -> None:
    """Serve MODELS (files written by 'recurd export') to live streams until SIGTERM or Ctrl-C (a second one drops what
    is still to be run).

    Every other bound and time-out is a key of the configuration file. SIGHUP reads it again: tenants change at once.
    """
    read = partial(build_config, **flags)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the server takes it: what it asks for is being read right now
    if check:
        from recurd import auth

        settings = read()
        auth.read(settings.auth, settings.tenants)
        names = _check_models(settings)
        click.echo(f"recurd: the configuration is good; it serves {', '.join(names)} at {', '.join(settings.bind)}")
        return
    from recurd import server  # what 'serve --help' does without

    ctx.exit(server.serve(read))


def build_config(
    *,
    models: tuple[Path, ...],
    config_file: Path | None,
    log_format: str | None,
    log_level: str | None,
    bind: tuple[str, ...],
    journal: str | None,
    durability: str | None,
    accept_drift: bool | None,
    key: str | None,
    clients: str | None,
    **flags: Any,
) -> config.Config:
    """Defaults, then the file, then the flags that were given. Raises :class:`ConfigError`."""
    settings = config.load(config_file) if config_file is not None else config.Config()
    changes = {key: value for key, value in flags.items() if value is not None}
    if models:
        changes["models"] = [{"path": str(path)} for path in models]
    if bind:
        changes["bind"] = bind
    if journal is not None and durability is None and settings.durability.mode == "off":
        durability = "process"
    sections: dict[str, dict[str, Any]] = {
        "log": {"format": log_format, "level": log_level},
        "auth": {"key": key, "clients": clients},
        "durability": {"mode": durability, "directory": journal, "accept_drift": accept_drift},
    }
    for name, keys in sections.items():
        changes[name] = {key: value for key, value in keys.items() if value is not None}
    settings = config.override(settings, changes)
    if not settings.models:
        raise ConfigError("no model to serve: name a file ('recurd serve pump.onnx') or add [[models]] to the --config")
    return settings


def _check_models(settings: config.Config) -> list[str]:
    """The models' names, after loading every one and replaying its golden run on the CPU. Raises a StartError."""
    from recurd import verify  # brings onnxruntime
    from recurd.model import Model

    names = []
    for model in settings.models:
        found = Model.load(model.path, slots=len(verify.RAGGED), threads=settings.threads)
        verify.replay_golden(found)
        name = model.name or found.contract.name
        if name in names:
            raise ConfigError(f"{model.path}: there is a model '{name}' already; give it another name in [[models]]")
        names.append(name)
    return names
