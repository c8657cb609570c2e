"""recurd: serve trained recurrent networks to many live streams.

Clients need only this package: :func:`connect` for threads, :mod:`recurd.aio` for asyncio. The daemon is
``recurd serve``; to read its code, start at :mod:`recurd.engine`.
"""

from typing import TYPE_CHECKING, Any

from recurd.errors import Broken, RecurdError, Refused, Unanswered

if TYPE_CHECKING:
    from recurd import aio
    from recurd.client import Client, Stream, connect
    from recurd.layout import StreamState
    from recurd.subscriber import subscribe

__all__ = [
    "Broken",
    "Client",
    "RecurdError",
    "Refused",
    "Stream",
    "StreamState",
    "Unanswered",
    "aio",
    "connect",
    "subscribe",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The clients are imported when they are asked for: the daemon's core must not load zmq with this package."""
    import importlib

    if name == "aio":
        return importlib.import_module("recurd.aio")
    if name in ("connect", "Client", "Stream"):
        return getattr(importlib.import_module("recurd.client"), name)
    if name == "StreamState":
        return importlib.import_module("recurd.layout").StreamState
    if name == "subscribe":
        return importlib.import_module("recurd.subscriber").subscribe
    raise AttributeError(f"module 'recurd' has no attribute '{name}'")
