"""The client for threads: ``recurd.connect``.

One background thread owns socket and session (:mod:`recurd.session` is where the protocol's client side is). Users'
threads put what they want into an inbox, wake it, and wait on futures; every object here may be used by many threads at
once, but not by another process: open a client after a fork, not before.
"""

import contextlib
import logging
import math
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy.typing as npt
import zmq

from recurd import wire
from recurd.backlog import Record
from recurd.errors import RecurdError, Unanswered
from recurd.interface import CLOSED, Connection, OpenStream, closed_error
from recurd.keys import Credentials, read_credentials
from recurd.layout import StreamState
from recurd.link import Link
from recurd.signature import GET_STATE, RESET, Payload, Result, clone
from recurd.writer import Mode, Writer

_log = logging.getLogger("recurd.client")
#: Longest wait of the background thread: a bound on what a clock that jumps can do.
_MAX_WAIT_SECONDS = 60.0


class _Reply(Future[Any]):
    """A future that only the daemon's answer resolves. It cannot be cancelled: what was sent may have been run."""

    def __init__(self, room: threading.Semaphore | None = None) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()
        self._room = room

    def resolve(self, value: Any, error: RecurdError | None) -> None:
        """Hand the answer to whoever waits, and make room for the next chunk."""
        if self._room is not None:
            self._room.release()
        if error is None:
            self.set_result(value)
        else:
            error.__traceback__ = None  # one error may be raised many times; it must not remember all of them
            self.set_exception(error)


class _Opening(_Reply):
    """The future of an OPEN; ``writer`` is there before it is resolved."""

    writer: Writer | None = None


def connect(
    endpoint: str,
    *,
    timeout_seconds: float = 30.0,
    queue_limit: int = 256,
    key: str | Path | None = None,
    server_key: str | Path | None = None,
) -> "Client":
    """Connect to a daemon, for example ``tcp://127.0.0.1:7070`` or ``ipc:///run/recurd/recurd.sock``.

    ``timeout_seconds`` is how long a call waits for its answer when it is not told otherwise (``math.inf``: for ever),
    and how long this one waits for the daemon. ``queue_limit`` is how many chunks of a stream may be unanswered before
    ``submit`` waits. A daemon that authenticates its clients is connected to with one's own key file
    (``gateway-7.key_secret``, by ``recurd keys new gateway-7``) and the daemon's public key (its file, or the key).

    Raises:
        KeyFileError: one of the keys cannot be read, or is not good.
        Unanswered: no daemon answered in time.
        Refused: the daemon did not want us, for example because it speaks another version of the protocol, or does not
            know our key.
    """
    credentials = read_credentials(key, server_key)
    client = Client(endpoint, timeout_seconds=timeout_seconds, queue_limit=queue_limit, credentials=credentials)
    try:
        client._wait_for_welcome()
    except BaseException:
        client.close()
        raise
    return client


class Client(Connection):
    """A connection to a daemon, made anew whenever it breaks. Made by :func:`connect`; a context manager.

    Closing the client leaves its streams open in the daemon, with their state, for whoever opens them next.
    """

    def __init__(
        self, endpoint: str, *, timeout_seconds: float, queue_limit: int, credentials: Credentials | None = None
    ) -> None:
        self._credentials = credentials
        self._welcomed = _Reply()
        super().__init__(endpoint, self._welcomed, time.monotonic, timeout_seconds, queue_limit)
        self._process = os.getpid()
        # shared with the background thread
        self._inbox: deque[Callable[[], None]] = deque()
        self._awake = False
        self._closing = False
        self._closed = threading.Event()
        self._lock = threading.Lock()  # for what is done after the thread's end
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._thread = threading.Thread(target=self._run, name=f"recurd-client {endpoint}", daemon=True)
        self._thread.start()

    def _wait_for_welcome(self) -> None:
        _wait(self._welcomed, self._deadline(None), self._no_daemon)
        self._welcomed.result()

    # --- calls, on users' threads ---

    def open(
        self,
        name: str,
        *,
        model: str | None = None,
        mode: Mode = "auto",
        idle_timeout_seconds: float | None = None,
        timeout_seconds: float | None = None,
    ) -> "Stream":
        """Open a stream of a model (which may be left out where the daemon serves only one).

        ``mode``: ``auto`` resumes the stream, or starts it when there is none; ``resume`` only resumes; ``new`` drops
        what there was. ``idle_timeout_seconds``: how long the daemon keeps it without a chunk, when it starts it (its
        default: one day); a stream that is resumed keeps the time-out it has.

        Raises:
            Refused: the daemon did not open it; ``code`` says why.
            Broken: its state is lost (mode ``resume``).
            Unanswered: no answer in time; the stream is not open here, and may be opened again.
        """
        request = self._request(name, model, mode, idle_timeout_seconds)
        opening = _Opening()

        def start() -> None:
            opening.writer = self._session.open(request, opening)

        self._hand_over(start)

        def late() -> Unanswered:
            seconds = self._seconds(timeout_seconds)
            return self._no_answer(f"opening stream '{name}'", seconds, writer=opening.writer)

        def give_up() -> None:
            assert opening.writer is not None  # it was started before
            self._session.give_up(opening.writer, late())

        try:
            _wait(opening, self._deadline(timeout_seconds), late)
        except BaseException:  # the time-out, or Ctrl-C: nobody will use it
            self._hand_over(give_up)
            raise
        opening.result()
        assert opening.writer is not None  # it was opened
        return Stream(self, opening.writer)

    def clone(self, source: "Stream", name: str, *, timeout_seconds: float | None = None) -> "Stream":
        """Start another stream where one stands after the chunks handed in before, and open it.

        It has the source's model, state and idle time-out, and goes its own way from there.

        Raises what :meth:`open` and :meth:`Stream.push` raise, and
            Refused: ``exists``: there is a stream of that name.
        """
        if not isinstance(source, Stream):
            raise TypeError(f"a clone is made of an open stream, not of {source!r}")
        deadline = self._deadline(timeout_seconds)
        source._carry_out(clone(name), "the clone", deadline)
        left = deadline.left()
        return self.open(name, model=source.model, mode="resume", timeout_seconds=math.inf if left is None else left)

    def push_many(
        self,
        chunks: "Mapping[Stream, npt.ArrayLike]",
        *,
        timeout_seconds: float | None = None,
        expires_seconds: float | None = None,
    ) -> "dict[Stream, Result]":
        """Push a chunk to each of many streams at once (one message) and wait for all results.

        Raises what :meth:`Stream.push` raises, for the first stream that failed, after all have been answered; with
        :meth:`submit_many` each can be looked at by itself.
        """
        deadline = self._deadline(timeout_seconds)
        futures = self.submit_many(chunks, timeout_seconds=timeout_seconds, expires_seconds=expires_seconds)
        for stream, future in futures.items():
            _wait(future, deadline, stream._late(deadline.seconds, "each chunk"))
        return {stream: future.result() for stream, future in futures.items()}

    def submit_many(
        self,
        chunks: "Mapping[Stream, npt.ArrayLike]",
        *,
        timeout_seconds: float | None = None,
        expires_seconds: float | None = None,
    ) -> "dict[Stream, Future[Result]]":
        """Send a chunk to each of many streams at once, in one message; returns the futures of the results.

        Nothing is sent when one of the chunks cannot be (TypeError, ValueError) or there is no room for it in time.
        """
        deadline = self._deadline(timeout_seconds)
        records = {
            stream: stream._record(stream._payload(x), stream._starts_by(expires_seconds))
            for stream, x in chunks.items()
        }
        taken: list[Stream] = []
        try:
            for stream in records:
                stream._take_room(deadline)
                taken.append(stream)
            batch = [(stream._writer, [record]) for stream, record in records.items()]
            self._hand_over(lambda: self._submit(batch))
        except BaseException:
            for stream in taken:
                stream._room.release()
            raise
        return {stream: record.token for stream, record in records.items()}

    def close(self) -> None:
        """Close the connection. What is unanswered fails with :class:`Unanswered`. May be called twice."""
        self._closing = True
        if os.getpid() != self._process:
            return  # a forked child: thread and socket are the parent's
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<recurd client of {self.endpoint}{' (closed)' if self._closing else ''}>"

    def _deadline(self, timeout_seconds: float | None) -> "_Deadline":
        return _Deadline(self._seconds(timeout_seconds))

    # --- handing over ---

    def _hand_over(self, work: Callable[[], None]) -> None:
        """Have work done by the background thread. Raises :class:`RecurdError` where there is none."""
        if self._closing:
            raise closed_error()
        if os.getpid() != self._process:
            raise RecurdError("this client was connected before the fork; connect in the process that uses it")
        self._inbox.append(work)
        self._wake()
        if self._closed.is_set():
            self._do_work()  # the thread ended meanwhile; its session answers everything with the reason

    def _wake(self) -> None:
        if not self._awake:
            self._awake = True
            with contextlib.suppress(OSError):  # full of wake-ups, or closed: nobody has to be woken
                self._wake_in.send(b"\0")

    def _submit(self, batch: Iterable[tuple[Writer, list[Record]]]) -> None:
        for writer, records in batch:
            self._session.submit(writer, records)

    # --- the background thread ---

    def _run(self) -> None:
        link = Link(self._endpoint, self._session, credentials=self._credentials)
        error: RecurdError = Unanswered(CLOSED)
        try:
            while not self._closing:
                self._turn(link)
        except Exception as bug:
            _log.exception("the client's background thread failed")
            error = RecurdError(f"the client failed: {bug!r}")
        self._session.end(error)
        self._closed.set()
        self._do_work()
        link.close()
        self._wake_in.close()
        self._wake_out.close()

    def _turn(self, link: Link) -> None:
        self._take_inbox()
        link.turn(time.monotonic())
        self._resolve()
        deadline = self._session.deadline()
        wait_seconds = _MAX_WAIT_SECONDS if deadline is None else deadline - time.monotonic()
        milliseconds = int(1000 * min(max(wait_seconds, 0.0), _MAX_WAIT_SECONDS)) + 1
        ready = zmq.zmq_poll([*link.watched, (self._wake_out.fileno(), zmq.POLLIN)], milliseconds)
        if any(source == self._wake_out.fileno() for source, _ in ready):
            self._wake_out.recv(4096)
            self._awake = False  # before the inbox is looked at: what comes later wakes again

    def _take_inbox(self) -> None:
        inbox = self._inbox
        while inbox:
            inbox.popleft()()

    def _resolve(self) -> None:
        for reply, value, error in self._session.take_answers():
            reply.resolve(value, error)

    def _do_work(self) -> None:
        """After the thread's end, for whoever finds work in the inbox."""
        with self._lock:
            self._take_inbox()
            self._resolve()


class Stream(OpenStream):
    """An open stream. Chunks run in the order they are handed in. Made by :meth:`Client.open`."""

    def __init__(self, client: Client, writer: Writer) -> None:
        super().__init__(writer, client)
        self._client = client
        self._room = threading.Semaphore(client._queue_limit)

    def push(
        self, x: npt.ArrayLike, *, timeout_seconds: float | None = None, expires_seconds: float | None = None
    ) -> Result:
        """Send a chunk and wait for its result: ``x [steps, features]`` gives ``y [steps, outputs]``.

        Several heads come as a dictionary by head name; a head of the last step comes without the time axis. Numbers
        are converted to the model's type where that is safe. A model of one feature takes ``[steps]`` too, as does one
        of token ids.

        ``expires_seconds``: how long from now the chunk may wait to be started, at most 65.5 s. One that is not by then
        is refused (``late``) and has not happened. Its time on the way, until the daemon reads it between two runs of
        the model, is not counted. One that was sent, and its connection lost, may have run by then.

        Raises:
            TypeError, ValueError: the chunk is not what the model takes; nothing was sent.
            Refused: the daemon did not take the chunk; the stream goes on without it.
            Broken: the stream's state is lost; open it again to start afresh.
            Unanswered: no result in time. The chunk keeps its place: it may have run, or may run yet. Or the stream was
                taken over or away after the chunk was sent: it may have run.
        """
        deadline = self._client._deadline(timeout_seconds)
        future = self._submit(self._payload(x), deadline, self._starts_by(expires_seconds))
        result: Result = self._result(future, deadline, "the chunk")
        return result

    def submit(
        self, x: npt.ArrayLike, *, timeout_seconds: float | None = None, expires_seconds: float | None = None
    ) -> Future[Result]:
        """Send a chunk without waiting for its result, which the future will have.

        Waits only while ``queue_limit`` chunks of the stream are unanswered; raises then what :meth:`push` raises. A
        callback added to the future runs on the client's own thread: it may submit more, but must not wait for answers.
        """
        deadline = self._client._deadline(timeout_seconds)
        return self._submit(self._payload(x), deadline, self._starts_by(expires_seconds))

    def reset(self, *, to: Mapping[str, npt.ArrayLike] | None = None, timeout_seconds: float | None = None) -> None:
        """Start afresh after the chunks handed in before: from the initial state, or from another (``to``).

        What :meth:`set_state` says of states holds for ``to``. The generation is one higher from then on.
        """
        payload = RESET if to is None else self._given(wire.Operation.RESET_TO, to)
        self._carry_out(payload, "the reset", self._client._deadline(timeout_seconds))

    def state(self, *, timeout_seconds: float | None = None) -> StreamState:
        """The state after the chunks handed in before: the contract's states by name, ``[*shape]`` each.

        Without a batch axis. It knows which weights it is of. Raises what :meth:`push` raises.
        """
        states: StreamState = self._carry_out(GET_STATE, "the request", self._client._deadline(timeout_seconds))
        return states

    def set_state(self, states: Mapping[str, npt.ArrayLike], *, timeout_seconds: float | None = None) -> None:
        """Go on from another state after the chunks handed in before: one that :meth:`state` gave, or one's own.

        All states of the contract by name, ``[*shape]`` each; numbers are converted where that is safe. What
        :meth:`state` gave is taken by a stream on the same weights only; a plain dictionary counts as a state of the
        weights that the stream is on. The generation stays; :meth:`reset` with ``to`` is a fresh start from a state.

        Raises, besides what :meth:`push` raises:
            TypeError, ValueError: not the states of the model; nothing was sent.
            Refused: ``state_mismatch``: a state of other weights than the stream is on; ``not_finite``.
        """
        payload = self._given(wire.Operation.PUT, states)
        self._carry_out(payload, "the state", self._client._deadline(timeout_seconds))

    def _carry_out(self, payload: Payload, what: str, deadline: "_Deadline") -> Any:
        return self._result(self._submit(payload, deadline), deadline, what)

    def _result(self, future: Future[Any], deadline: "_Deadline", what: str) -> Any:
        _wait(future, deadline, self._late(deadline.seconds, what))
        return future.result()

    def close(self, *, timeout_seconds: float | None = None) -> None:
        """Answer what was handed in before, then forget the stream and its state, here and in the daemon."""
        deadline = self._client._deadline(timeout_seconds)
        reply = _Reply()
        self._client._hand_over(lambda: self._client._session.close(self._writer, reply))
        late = partial(self._client._no_answer, f"closing stream '{self.name}'", deadline.seconds, writer=self._writer)
        _wait(reply, deadline, late)
        reply.result()

    def _record(self, payload: Payload, starts_by: float = math.inf) -> Record:
        return Record(_Reply(self._room), payload, starts_by)

    def _take_room(self, deadline: "_Deadline") -> None:
        if not self._room.acquire(timeout=deadline.left()):
            raise self._no_room(deadline.seconds)

    def _submit(self, payload: Payload, deadline: "_Deadline", starts_by: float = math.inf) -> Future[Any]:
        record = self._record(payload, starts_by)
        self._take_room(deadline)
        try:
            self._client._hand_over(lambda: self._client._session.submit(self._writer, (record,)))
        except BaseException:  # others may wait for the room, to be told the same
            self._room.release()
            raise
        future: Future[Any] = record.token
        return future


class _Deadline:
    """What is left of a call's time-out."""

    __slots__ = ("_end", "seconds")

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float | None:
        return None if self._end is None else max(0.0, self._end - time.monotonic())


def _wait(future: Future[Any], deadline: _Deadline, late: Callable[[], Unanswered]) -> None:
    """Wait until a future is done, whatever its outcome. Raises what ``late`` makes when it is not in time."""
    try:
        future.exception(deadline.left())
    except FutureTimeoutError:
        raise late() from None
