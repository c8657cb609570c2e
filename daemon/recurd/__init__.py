"""recurd: serve trained recurrent networks to many live streams.

Clients need only this package: :func:`connect` for threads, :mod:`recurd.aio` for asyncio. The daemon is
``recurd serve``; to read its code, start at :mod:`recurd.engine`.
"""

__version__ = "0.1.0"
