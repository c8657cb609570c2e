"""What export raises on purpose."""

from recurd.errors import ExitCode, StartError


class ExportError(StartError):
    """The model cannot be exported, or its ONNX file does not do what the model does. One sentence says why."""

    exit_code = ExitCode.EXPORT


class ExportUsageError(ExportError):
    """The command names a factory or a file of weights that is not there."""

    exit_code = ExitCode.USAGE
