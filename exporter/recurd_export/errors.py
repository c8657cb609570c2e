"""What export raises on purpose."""

from typing import Any

from recurd.errors import ExitCode, StartError


class ExportError(StartError):
    """The model cannot be exported, or its ONNX file does not do what the model does. One sentence says why."""

    exit_code = ExitCode.EXPORT


class ExportUsageError(ExportError):
    """The command names a factory or a file of weights that is not there."""

    exit_code = ExitCode.USAGE


def kind(value: Any) -> str:
    """``an int``: as a refusal names what was given in place of something else."""
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
