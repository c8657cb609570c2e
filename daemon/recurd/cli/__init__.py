"""The command ``recurd``: a group whose sub-commands are imported when they are called.

So ``recurd --help`` is quick and works with any set of extras, and a command that misses one says which. Errors that
recurd raises on purpose become one line on standard error and their exit code; a traceback means a bug.
"""

import errno
import os
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

import click

from recurd import __version__
from recurd.cli.output import discard_output
from recurd.errors import ExitCode, RecurdError, StartError, Unanswered

INTERRUPTED = 130
#: What a write to a full disk fails with.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class Entry(NamedTuple):
    """Where a sub-command lives (``module:function``), the extras it needs, and its line in ``recurd --help``."""

    target: str
    extras: str
    help: str


COMMANDS = {
    "export": Entry("recurd_export.cli:export", "gpu,torch", "Turn a trained model into ONNX with a contract."),
    "adopt": Entry("recurd_export.adopt.cli:adopt", "gpu", "Give a contract to a stateful ONNX model of others."),
    "verify": Entry("recurd.cli.verify:verify", "gpu", "Check a model file against its own proof."),
    "inspect": Entry("recurd.cli.inspect:inspect", "gpu", "Print a model file's contract."),
    "serve": Entry("recurd.cli.serve:serve", "gpu", "Serve models to live streams."),
    "reload": Entry("recurd.cli.reload:reload", "gpu", "Have a daemon take over new files of its models."),
    "stream": Entry("recurd.cli.stream:stream", "gpu", "Send rows from a file or standard input, print predictions."),
    "subscribe": Entry("recurd.cli.subscribe:command", "gpu", "Print results that a daemon publishes."),
    "bench": Entry("recurd.cli.bench:bench", "gpu", "Measure a daemon under load."),
    "keys": Entry("recurd.cli.keys:keys", "gpu", "Make keys for a daemon and for those who may connect to it."),
    "state": Entry("recurd.cli.state:state", "gpu", "Copy streams of a running daemon into a file, and back."),
    "drain": Entry("recurd.cli.drain:drain", "gpu", "Move all streams of a daemon to another, while clients go on."),
    "demo": Entry("recurd_export.demo:demo", "gpu,demo", "Train, export, serve and stream real sensor data."),
}

#: Packages that only extras bring: without one, a command says what to install. Any other missing import is a bug.
OPTIONAL = frozenset(
    {
        "keras",
        "lmdb",
        "matplotlib",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "pandas",
        "prometheus_client",
        "safetensors",
        "sklearn",
    }
    | {"sktime", "structlog", "tensorflow", "torch"}
)

EPILOG = """\b
Examples:
  recurd export package.module:factory --weights w.pt --out pump.onnx
  recurd serve pump.onnx
  recurd stream --model pump --stream pump-17 < rows.csv
\b
Completion in bash (zsh and fish likewise):
  eval "$(_RECURD_COMPLETE=bash_source recurd)"
"""


class LazyGroup(click.Group):
    """A group over :data:`COMMANDS`; it turns what commands raise into sentences and exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order one needs them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; without one of its extras it becomes an error that names the extra."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        module, _, name = entry.target.partition(":")
        try:
            command: click.Command = getattr(import_module(module), name)
        except ModuleNotFoundError as error:
            _exit(_missing(cmd_name, error), ExitCode.USAGE, ctx)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; what recurd raises on purpose ends in one line and an exit code."""
        # onnxruntime reports to its maker from 1.29 on, unless this is set before it is imported
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        try:
            return super().invoke(ctx)
        except StartError as error:
            _exit(str(error), error.exit_code, ctx)
        except Unanswered as error:
            _exit(str(error), ExitCode.DEVICE, ctx)  # EX_UNAVAILABLE
        except RecurdError as error:
            _exit(str(error), ExitCode.BUG, ctx)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            discard_output()
            _exit(f"standard output takes no more: {error.strerror}", ExitCode.BUG, ctx)
        except ModuleNotFoundError as error:
            _exit(_missing(ctx.invoked_subcommand or "recurd", error), ExitCode.USAGE, ctx)
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)


def _missing(command: str, error: ModuleNotFoundError) -> str:
    package = (error.name or "").partition(".")[0]
    if package not in OPTIONAL or command not in COMMANDS:
        raise error
    extras = COMMANDS[command].extras
    word = "extras" if "," in extras else "extra"
    return (
        f"'recurd {command}' needs {package}: recurd was installed without the {word} '{extras}' "
        f"(pip install '.[{extras}]' in a checkout)"
    )


def _exit(sentence: str, code: int, ctx: click.Context) -> NoReturn:
    click.echo(f"recurd: {sentence}", err=True)
    ctx.exit(int(code))


@click.group(cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", message="recurd %(version)s")
def main() -> None:
    """Serve trained recurrent networks (LSTM, GRU, RNN) to many live streams."""
