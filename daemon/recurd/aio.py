"""The client for asyncio: ``recurd.aio.connect``.

Everything runs on the event loop that connected: the sockets' file descriptors are watched by the loop, and
:mod:`recurd.session` is where the protocol's client side is. Not thread-safe, as asyncio is not.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Generator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy.typing as npt

from recurd import wire
from recurd.backlog import Record
from recurd.errors import RecurdError, Unanswered
from recurd.interface import CLOSED, Connection, OpenStream, closed_error
from recurd.keys import Credentials, read_credentials
from recurd.layout import StreamState
from recurd.link import Link
from recurd.signature import GET_STATE, RESET, Payload, Result, clone
from recurd.writer import Mode, Writer

_Value = TypeVar("_Value")


class connect:  # noqa: N801  # to be awaited, or used with "async with", as a function would be
    """Connect to a daemon: ``async with connect(...) as client:`` or ``client = await connect(...)``.

    Takes and raises what :func:`recurd.connect` does.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        timeout_seconds: float = 30.0,
        queue_limit: int = 256,
        key: str | Path | None = None,
        server_key: str | Path | None = None,
    ) -> None:
        self._arguments = (endpoint, timeout_seconds, queue_limit, read_credentials(key, server_key))
        self._client: Client | None = None

    async def _connect(self) -> "Client":
        client = Client(*self._arguments)
        try:
            await client._wait_for_welcome()
        except BaseException:
            await client.close()
            raise
        return client

    def __await__(self) -> Generator[Any, None, "Client"]:
        return self._connect().__await__()

    async def __aenter__(self) -> "Client":
        self._client = await self._connect()
        return self._client

    async def __aexit__(
        self, type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._client is not None  # entered before
        await self._client.close()


class Client(Connection):
    """A connection to a daemon, made anew whenever it breaks. Made by :class:`connect`; a context manager.

    Closing the client leaves its streams open in the daemon, with their state, for whoever opens them next.
    """

    def __init__(
        self, endpoint: str, timeout_seconds: float, queue_limit: int, credentials: Credentials | None = None
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._welcomed: asyncio.Future[None] = self._loop.create_future()
        super().__init__(endpoint, (self._welcomed, None), self._loop.time, timeout_seconds, queue_limit)
        self._link = Link(endpoint, self._session, self._watch, credentials)
        self._watched: list[int] = []
        self._closed = False
        # what is planned
        self._timer: asyncio.TimerHandle | None = None
        self._soon: asyncio.Handle | None = None
        self._turn_soon()

    async def _wait_for_welcome(self) -> None:
        await _answer(self._welcomed, self._deadline(None), self._no_daemon)

    # --- calls ---

    async def open(
        self,
        name: str,
        *,
        model: str | None = None,
        mode: Mode = "auto",
        idle_timeout_seconds: float | None = None,
        timeout_seconds: float | None = None,
    ) -> "Stream":
        """Open a stream; see :meth:`recurd.client.Client.open`."""
        self._check_open()
        reply = self._loop.create_future()
        writer = self._session.open(self._request(name, model, mode, idle_timeout_seconds), (reply, None))
        self._turn_soon()
        late = partial(self._no_answer, f"opening stream '{name}'", self._seconds(timeout_seconds), writer=writer)
        try:
            await _answer(reply, self._deadline(timeout_seconds), late)
        except BaseException:  # a refusal, a time-out or a cancelled task: nobody will use it
            self._session.give_up(writer, late())
            raise
        return Stream(self, writer)

    async def clone(self, source: "Stream", name: str, *, timeout_seconds: float | None = None) -> "Stream":
        """Start another stream where one stands, and open it; see :meth:`recurd.client.Client.clone`."""
        if not isinstance(source, Stream):
            raise TypeError(f"a clone is made of an open stream, not of {source!r}")
        deadline = self._deadline(timeout_seconds)
        await source._carry_out(clone(name), "the clone", timeout_seconds)
        left = math.inf if deadline is None else max(0.0, deadline - self._loop.time())
        return await self.open(name, model=source.model, mode="resume", timeout_seconds=left)

    async def push_many(
        self,
        chunks: "Mapping[Stream, npt.ArrayLike]",
        *,
        timeout_seconds: float | None = None,
        expires_seconds: float | None = None,
    ) -> "dict[Stream, Result]":
        """Push a chunk to each of many streams at once; see :meth:`recurd.client.Client.push_many`."""
        deadline = self._deadline(timeout_seconds)
        futures = await self.submit_many(chunks, timeout_seconds=timeout_seconds, expires_seconds=expires_seconds)
        done = asyncio.gather(*futures.values(), return_exceptions=True)

        def late() -> Unanswered:
            # Those that had no answer by then are cancelled, the first of them stands for all.
            stream = min(futures, key=lambda stream: not futures[stream].cancelled())
            return stream._late(self._seconds(timeout_seconds), "each chunk")()

        await _answer(done, deadline, late)
        return {stream: future.result() for stream, future in futures.items()}

    async def submit_many(
        self,
        chunks: "Mapping[Stream, npt.ArrayLike]",
        *,
        timeout_seconds: float | None = None,
        expires_seconds: float | None = None,
    ) -> "dict[Stream, asyncio.Future[Result]]":
        """Send a chunk to each of many streams at once; see :meth:`recurd.client.Client.submit_many`."""
        self._check_open()
        deadline = self._deadline(timeout_seconds)
        records = {stream: (stream._payload(x), stream._starts_by(expires_seconds)) for stream, x in chunks.items()}
        taken: list[Stream] = []
        try:
            for stream in records:
                await stream._take_room(deadline, timeout_seconds)
                taken.append(stream)
        except BaseException:
            for stream in taken:
                stream._room.release()
            raise
        return {stream: stream._send(payload, starts_by) for stream, (payload, starts_by) in records.items()}

    async def close(self) -> None:
        """Close the connection. What is unanswered fails with :class:`Unanswered`. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._session.end(Unanswered(CLOSED))
        self._resolve()
        for handle in (self._timer, self._soon):
            if handle is not None:
                handle.cancel()
        self._link.close()

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(
        self, type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<recurd asyncio client of {self.endpoint}{' (closed)' if self._closed else ''}>"

    def _check_open(self) -> None:
        if self._closed:
            raise closed_error()

    def _deadline(self, timeout_seconds: float | None) -> float | None:
        """The loop's time when a call has waited long enough."""
        seconds = self._seconds(timeout_seconds)
        return None if seconds is None else self._loop.time() + seconds

    # --- driving the session ---

    def _turn_soon(self) -> None:
        """Send what has been handed in, once for everything handed in before the loop comes round."""
        if self._soon is None and not self._closed:
            self._soon = self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        try:
            self._link.turn(self._loop.time())
        except Exception as bug:
            self._session.end(RecurdError(f"the client failed: {bug!r}"))
            raise  # to the loop, which reports it
        finally:
            self._resolve()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._session.deadline()
        if deadline is not None:
            self._timer = self._loop.call_at(deadline, self._turn)

    def _resolve(self) -> None:
        for (reply, room), value, error in self._session.take_answers():
            if room is not None:
                room.release()
            if reply.done():  # who waited has gone; its place in the stream was kept
                continue
            if error is None:
                reply.set_result(value)
            else:
                error.__traceback__ = None  # one error may be raised many times; it must not remember all of them
                reply.set_exception(error)

    def _watch(self, descriptors: list[int]) -> None:
        for descriptor in self._watched:
            self._loop.remove_reader(descriptor)
        self._watched = descriptors
        for descriptor in descriptors:
            self._loop.add_reader(descriptor, self._turn)


class Stream(OpenStream):
    """An open stream. Chunks run in the order they are handed in. Made by :meth:`Client.open`."""

    def __init__(self, client: Client, writer: Writer) -> None:
        super().__init__(writer, client)
        self._client = client
        self._room = asyncio.Semaphore(client._queue_limit)

    async def push(
        self, x: npt.ArrayLike, *, timeout_seconds: float | None = None, expires_seconds: float | None = None
    ) -> Result:
        """Send a chunk and wait for its result; see :meth:`recurd.client.Stream.push`.

        When the task is cancelled meanwhile, the chunk keeps its place: it may have run, or may run yet.
        """
        deadline = self._client._deadline(timeout_seconds)
        reply = await self.submit(x, timeout_seconds=timeout_seconds, expires_seconds=expires_seconds)
        result: Result = await _answer(reply, deadline, self._late(self._client._seconds(timeout_seconds)))
        return result

    async def submit(
        self, x: npt.ArrayLike, *, timeout_seconds: float | None = None, expires_seconds: float | None = None
    ) -> "asyncio.Future[Result]":
        """Send a chunk without waiting for its result; see :meth:`recurd.client.Stream.submit`."""
        return await self._submit(self._payload(x), timeout_seconds, self._starts_by(expires_seconds))

    async def reset(
        self, *, to: Mapping[str, npt.ArrayLike] | None = None, timeout_seconds: float | None = None
    ) -> None:
        """Start afresh after the chunks handed in before; see :meth:`recurd.client.Stream.reset`."""
        payload = RESET if to is None else self._given(wire.Operation.RESET_TO, to)
        await self._carry_out(payload, "the reset", timeout_seconds)

    async def state(self, *, timeout_seconds: float | None = None) -> StreamState:
        """The state after the chunks handed in before; see :meth:`recurd.client.Stream.state`."""
        states: StreamState = await self._carry_out(GET_STATE, "the request", timeout_seconds)
        return states

    async def set_state(self, states: Mapping[str, npt.ArrayLike], *, timeout_seconds: float | None = None) -> None:
        """Go on from another state; see :meth:`recurd.client.Stream.set_state`."""
        await self._carry_out(self._given(wire.Operation.PUT, states), "the state", timeout_seconds)

    async def _carry_out(self, payload: Payload, what: str, timeout_seconds: float | None) -> Any:
        deadline = self._client._deadline(timeout_seconds)
        late = self._late(self._client._seconds(timeout_seconds), what)
        return await _answer(await self._submit(payload, timeout_seconds), deadline, late)

    async def close(self, *, timeout_seconds: float | None = None) -> None:
        """Answer what was handed in before, then forget the stream; see :meth:`recurd.client.Stream.close`."""
        self._client._check_open()
        reply = self._client._loop.create_future()
        self._client._session.close(self._writer, (reply, None))
        self._client._turn_soon()
        seconds = self._client._seconds(timeout_seconds)
        late = partial(self._client._no_answer, f"closing stream '{self.name}'", seconds, writer=self._writer)
        await _answer(reply, self._client._deadline(timeout_seconds), late)

    async def _take_room(self, deadline: float | None, timeout_seconds: float | None) -> None:
        if not self._room.locked():  # the usual case, without the cost of a time-out
            await self._room.acquire()
        else:
            late = partial(self._no_room, self._client._seconds(timeout_seconds))
            await _answer(self._room.acquire(), deadline, late)
        if self._client._closed:  # meanwhile
            self._room.release()
            raise closed_error()

    async def _submit(
        self, payload: Payload, timeout_seconds: float | None, starts_by: float = math.inf
    ) -> "asyncio.Future[Any]":
        self._client._check_open()
        await self._take_room(self._client._deadline(timeout_seconds), timeout_seconds)
        return self._send(payload, starts_by)

    def _send(self, payload: Payload, starts_by: float) -> "asyncio.Future[Any]":
        reply = self._client._loop.create_future()
        self._client._session.submit(self._writer, (Record((reply, self._room), payload, starts_by),))
        self._client._turn_soon()
        return reply


async def _answer(awaited: Awaitable[_Value], deadline: float | None, late: Callable[[], Unanswered]) -> _Value:
    """Wait for an answer; raises what ``late`` makes when it does not come in time."""
    try:
        async with asyncio.timeout_at(deadline):
            return await awaited
    except TimeoutError as error:
        if isinstance(error, Unanswered):
            raise
        raise late() from None
