"""Log lines: one event a line, as ``key=value`` pairs or JSON, on standard error.

A line has ``time`` (UTC), ``level``, ``event`` and fields. The event is a fixed word, what varies stands in the fields:
``log.info("stream_expired", stream="pump-17", idle_seconds=86400)``. An exception (``log.exception(...)``) becomes a
field of the same line. There is no global logger: what is returned here is passed on.
"""

import os
from collections.abc import Mapping
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

from recurd import config

#: First fields of a line, in this order.
KEY_ORDER = ("time", "level", "event")
#: Level names as the numbers that journald reads from the start of a line (man sd-daemon).
JOURNAL_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


def open_log(settings: config.Log, stream: TextIO, environ: Mapping[str, str]) -> FilteringBoundLogger:
    """A logger that writes to ``stream``, without time but with priorities where that is the systemd journal."""
    journal = _is_journal(stream, environ)
    processors: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.format_exc_info,
        structlog.processors.UnicodeDecoder(),
    ]
    if not journal:
        processors.append(structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"))
    if settings.format == "json":
        processors += [_in_order, structlog.processors.JSONRenderer(default=str)]
    else:
        renderer = structlog.processors.LogfmtRenderer(key_order=KEY_ORDER, drop_missing=True, bool_as_flag=False)
        processors += [_fit_for_logfmt, renderer]
    if journal:
        processors.append(_with_priority)  # type: ignore[arg-type]  # after the renderer there is a line, not an event
    logger: FilteringBoundLogger = structlog.wrap_logger(
        structlog.PrintLogger(stream),
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(settings.level),
        context_class=dict,
        cache_logger_on_first_use=True,
    ).bind()
    return logger


def _is_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether the stream is the one that systemd connected to the journal ($JOURNAL_STREAM is its device:inode)."""
    try:
        status = os.fstat(stream.fileno())
    except OSError:  # no file behind it
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _in_order(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    first = {key: event[key] for key in KEY_ORDER if key in event}
    return {**first, **event}


def _fit_for_logfmt(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """logfmt cannot quote a key, and its renderer lets a value's control characters through to the terminal."""
    return {"_".join(str(key).split()): _printable(value) for key, value in event.items()}


def _printable(value: Any) -> Any:
    if not isinstance(value, str) or value.isprintable():
        return value
    # the renderer escapes line feeds itself
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in value)


def _with_priority(logger: WrappedLogger, method: str, line: str) -> str:
    return f"<{JOURNAL_PRIORITIES.get(method, 6)}>{line}"
