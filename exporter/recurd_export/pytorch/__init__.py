"""The exporter's half that knows torch. Read :mod:`recurd_export.pipeline` first."""
