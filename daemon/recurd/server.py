"""The process: sockets, signals, the clock and the loop that drives the engine. With :mod:`recurd.auth`, all of zmq.

The loop has six verbs: wait, receive, run, commit, send, beat. One thread does all of it, the run of the model
included: while it runs, ZeroMQ's own I/O thread fills the socket's queue, and the next tick takes what has come. Only
/metrics and /healthz are served by other threads, which read and never write.
"""

import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import zmq
from msgspec import structs

from recurd import auth, config, systemd
from recurd.admin import Request
from recurd.engine import Engine
from recurd.errors import Code, ConfigError, ExitCode, Refused, StartError
from recurd.former import Copies
from recurd.http import Application, Health, HttpServer, Phase
from recurd.intake import HEARING_SECONDS, Intake
from recurd.lifecycle import Identity
from recurd.loading import Loaded, load
from recurd.logs import open_log
from recurd.metrics import Collector, ModelLabels, open_registry
from recurd.model import resolve_device
from recurd.publisher import Publisher
from recurd.reload import Reload
from recurd.sockets import Context, bind, is_tcp, lock, open_socket
from recurd.stats import Stats
from recurd.tenants import LOCAL, Tenants

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from recurd.durable import Durable

#: Longest sleep of the loop: signals wake it, this bounds how late health and watchdog notice.
_BEAT_SECONDS = 0.5
#: A round that takes longer is a standstill.
_STANDSTILL_SECONDS = 1.0
#: What a thread sends that has something for the loop: the number of no signal.
_WAKE = b"\0"
#: How long the socket may go on sending answers after the loop has ended.
_LINGER_MILLISECONDS = 1000


def serve(read: Callable[[], config.Config]) -> int:
    """Serve until SIGTERM or SIGINT; the exit status.

    ``read`` reads the configuration: now, and at every SIGHUP. Raises :class:`recurd.errors.StartError` when the daemon
    cannot start.
    """
    settings = read()
    log = open_log(settings.log, sys.stderr, os.environ)
    with ExitStack() as stack:
        return Server(settings, read, log, stack).run()


class Server:
    """One daemon. Owns the socket, the engine, the models and the process's signals, until its stack is closed."""

    def __init__(
        self,
        settings: config.Config,
        read: Callable[[], config.Config],
        log: "FilteringBoundLogger",
        stack: ExitStack,
    ) -> None:
        self._config = settings
        self._read = read
        self._log = log
        self._notifier = systemd.Notifier(os.environ, os.getpid())
        stack.callback(self._notifier.close)
        keys, users = auth.read(settings.auth, settings.tenants)
        self._tenants = Tenants(settings.tenants, users)
        self._health = Health(settings.timeouts.stall_seconds)
        self._wakeup, waker = stack.enter_context(_signals())
        stats = Stats()
        device, trouble = resolve_device(settings.device)
        fallback = settings.device == "auto" and trouble is not None
        if fallback:
            log.warning("device_fallback", wanted=settings.device, used=device, reason=trouble)
        # /healthz and /readyz answer while models are loaded.
        labels: dict[str, ModelLabels] = {}
        self._http = self._open_http(Collector(stats, labels, device_fallback=fallback), stack)
        loaded = _load_models(settings, device, log)
        labels |= {one.name: one.labels for one in loaded}
        models = {one.name: one.model for one in loaded}
        settings = structs.replace(settings, models=tuple(one.entry for one in loaded))
        self._engine = Engine(
            settings,
            models,
            identity=Identity(
                os.urandom(8),
                {"wanted": settings.device, "used": device, "fallback": fallback},
                tuple(one.name for one in loaded if one.bit_exact),
            ),
            stats=stats,
            clock=time.monotonic,
            log=log,
            tenants=self._tenants,
            process_commands=("reload",),
        )
        self._stats = stats
        self._durable = None if settings.durability.mode == "off" else self._restore(loaded, device, stack)
        context = stack.enter_context(zmq.Context(settings.zeromq.io_threads))
        self._gate = None if keys is None else auth.Gate(context, keys, stats, stack)
        self._socket = _open_router(context, settings, stack)
        self.endpoints = bind(self._socket, settings.bind, self._gate)
        self._intake = self._open_intake()
        self._publisher = self._open_publisher(context, stack) if settings.publish.bind else None
        self._poller = self._open()
        self._reload = Reload(
            loaded,
            device=device,
            engine=self._engine,
            durable=self._durable,
            labels=labels,
            stats=stats,
            notifier=self._notifier,
            wake=partial(_wake, waker),
            log=log,
        )
        stack.callback(self._reload.close)
        # shutdown
        self._stop_at: float | None = None
        # beat
        self._next_beat = self._awake_at = self._slept = 0.0
        self._beat_seconds = min(_BEAT_SECONDS, (self._notifier.watchdog_seconds or 2 * _BEAT_SECONDS) / 2)

    def _open(self) -> zmq.Poller:
        """What the loop waits for. Those who are known are let in, once it is tried that nobody else is."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wakeup, zmq.POLLIN)
        if self._gate is not None:
            for endpoint in filter(is_tcp, self.endpoints):
                self._gate.check(endpoint)
            for endpoint in filter(is_tcp, self._publisher.endpoints if self._publisher is not None else ()):
                self._gate.check(endpoint, zmq.SUB)
            self._gate.allowed = self._tenants.users
            poller.register(self._gate.socket, zmq.POLLIN)
        if self._publisher is not None:
            poller.register(self._publisher.socket, zmq.POLLIN)
        return poller

    def _open_intake(self) -> Intake:
        # With keys, only over ipc is nobody asked who it is.
        unnamed = "" if self._gate is not None and all(map(is_tcp, self.endpoints)) else LOCAL
        records = self._config.tick.receive_records
        return Intake(self._socket, records, asks_users=self._gate is not None, unnamed=unnamed)

    def _open_publisher(self, context: Context, stack: ExitStack) -> Publisher:
        return Publisher(
            context,
            self._config,
            self._gate,
            tenants=self._tenants,
            stats=self._stats,
            log=self._log,
            stack=stack,
        )

    def _restore(self, loaded: list[Loaded], device: str, stack: ExitStack) -> "Durable":
        from recurd.durable import Durable  # brings lmdb

        begin = time.monotonic()
        folder = Path(self._config.durability.directory)
        copies = Copies(folder / "models", self._config, device, self._log)
        models = {one.name: one.model for one in loaded}
        durable = Durable(self._config, self._engine, models, copies, stats=self._stats, log=self._log)
        stack.callback(durable.close)
        streams = durable.restore(begin)
        if self._config.reload.incompatible == "restart":
            self._engine.end_former()
        for one in loaded:
            durable.keep(one)
        seconds = round(time.monotonic() - begin, 3)
        self._log.info("journal_opened", directory=str(folder), streams=streams, seconds=seconds)
        return durable

    def _open_http(self, collector: Collector, stack: ExitStack) -> HttpServer | None:
        if not self._config.metrics:
            return None
        application = Application(open_registry(collector), self._health, self._log)
        http = HttpServer(
            self._config.metrics, application, self._log, request_seconds=self._config.timeouts.http_seconds
        )
        stack.callback(http.stop)
        http.start()
        return http

    def run(self) -> int:
        """The loop."""
        self._look_for_signal()
        if not self._stopped():
            self._announce()
        self._awake_at = time.monotonic()
        while not self._stopped():
            self._wait()
            self._receive()
            self._change()
            self._run_tick()
            self._commit()
            self._send()
            self._publish()
            self._beat()
        self._log.info("stopped", dropped_chunks=self._engine.queued_chunks)
        return ExitCode.OK

    def _announce(self) -> None:
        self._warn()
        self._health.progress(time.monotonic())
        self._health.phase = Phase.READY
        addresses = ",".join(self.endpoints)
        published = ",".join(self._publisher.endpoints) if self._publisher is not None else "off"
        metrics = "off" if self._http is None else "{}:{}".format(*self._http.address)
        models = self._reload.names
        self._log.info(
            "ready",
            bind=addresses,
            publish=published,
            metrics=metrics,
            durability=self._config.durability.mode,
            models=",".join(models),
        )
        self._notifier.ready(f"serving {', '.join(models)} at {addresses}, metrics at {metrics}")

    def _warn(self) -> None:
        """Say what is allowed, and hardly meant."""
        durability = self._config.durability
        if durability.directory and durability.mode == "off":
            self._log.warning("journal_unused", directory=durability.directory, reason="durability.mode is off")
        if self._gate is not None and not self._tenants.users and all(map(is_tcp, self.endpoints)):
            reason = "no key is let in: name a folder of them (auth.clients), or a tenant's"
            self._log.warning("nobody_may_connect", reason=reason)

    def _wait(self) -> None:
        """Sleep until there is a frame, a signal, or something due."""
        deadline = self._engine.deadline()
        seconds = self._beat_seconds
        if self._intake.holds:
            seconds = 0.0
        elif deadline is not None:
            # What has no fixed time to be done at has time until it is known who was heard.
            seconds = min(seconds, max(HEARING_SECONDS, deadline - time.monotonic())) if deadline else 0.0
        begin = time.monotonic()
        came = self._poller.poll(int(seconds * 1000 + 0.999))
        self._slept = min(time.monotonic() - begin, seconds)
        for ready, _ in came:
            if ready == self._wakeup.fileno():
                self._look_for_signal()
            elif self._gate is not None and ready is self._gate.socket:
                self._gate.answer()
            elif self._publisher is not None and ready is self._publisher.socket:
                self._publisher.take_subscriptions()
                self._engine.publish(self._publisher.wanted)

    def _notice_standstill(self, now: float) -> None:
        """What passed since the last round, and was not slept, is no stream's idle time where it is long: a stopped
        machine, a slow disk."""
        stood_still = now - self._awake_at - self._slept
        self._awake_at = now
        if stood_still >= _STANDSTILL_SECONDS:
            self._log.warning("stood_still", seconds=round(stood_still, 3))
            self._engine.stood_still(stood_still)

    def _receive(self) -> None:
        """Feed the engine what has come."""
        self._intake.round(self._engine.receive, time.monotonic)

    def _change(self) -> None:
        """Between two ticks: what whoever runs the daemon asks for, and what has come of it."""
        for request in self._engine.admin.requests():
            self._read_again(request)
        self._reload.turn()
        if self._stop_at is None:
            # Before anything is answered: who is told that streams move away sees that none is taken.
            self._health.phase = Phase.FULL if self._engine.full else Phase.READY

    def _run_tick(self) -> None:
        now = time.monotonic()
        self._notice_standstill(now)
        tick = self._engine.take_tick(now, self._intake.heard_until)
        if tick is None:
            return
        lane = tick.lane
        try:
            outputs = lane.device.run(tick.slots, tick.fresh, tick.lengths, tick.input)
        except Exception as error:  # whatever the runtime raises, nobody but this tick's streams is told so
            self._engine.fail(tick, error, time.monotonic())
            lane.slots.check()
        else:
            self._engine.complete(tick, outputs, time.monotonic())

    def _commit(self) -> None:
        """Where streams are durable, what changed is saved before anything is sent."""
        if self._durable is None:
            return
        begin = time.monotonic()
        if self._durable.commit(begin):
            self._stats.commit_seconds.observe(time.monotonic() - begin)

    def _send(self) -> None:
        stats = self._stats
        frames = self._engine.replies_to_send() if self._durable is None else self._durable.due()
        for routing_id, frame in frames:
            try:
                self._socket.send_multipart((routing_id, frame), zmq.NOBLOCK)
            except zmq.Again:
                # A reader slower than its high-water mark. Results are retained and come again on request.
                stats.send_failures["again"] += 1
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                stats.send_failures["unreachable"] += 1
                self._engine.disconnected(routing_id)
            else:
                stats.frames_sent += 1
                stats.bytes_sent += len(frame)

    def _publish(self) -> None:
        """Results to others, when they stand in the journal where they have to."""
        if self._publisher is not None and not self._engine.halted:
            self._publisher.publish(self._engine.results_to_publish())

    def _beat(self) -> None:
        """Tell the outside, now and then, that the loop comes round."""
        now = time.monotonic()
        if now < self._next_beat:
            return
        self._next_beat = now + self._beat_seconds
        self._health.progress(now)
        self._notifier.watchdog()
        # A full collection of garbage would look at a million streams and hold them all up for a second. What lives by
        # now is not looked at again; it is let go when nothing refers to it any more, as everything here is.
        gc.collect(1)
        gc.freeze()
        if self._durable is not None:
            self._durable.look(now)
        if self._publisher is not None:
            self._publisher.look(self._poller)

    def _look_for_signal(self) -> None:
        with suppress(BlockingIOError):  # none came
            numbers = self._wakeup.recv(64)
            if signal.SIGHUP in numbers:
                self._read_again()
            if stops := numbers.replace(bytes([signal.SIGHUP]), b"").replace(_WAKE, b""):
                self._stop(stops)

    def _read_again(self, request: Request | None = None) -> None:
        """Take over what may change while serving: all of it, or nothing when something of it cannot be read.

        Tenants and their rights at once; models as soon as they are loaded, and then a ``request`` is answered.
        """
        if self._stop_at is not None:
            if request is not None:
                self._engine.admin.refuse(request, Refused(Code.DRAINING, "the daemon is shutting down"))
            return
        try:
            settings = self._read()
            users = self._read_users(settings)
        except StartError as error:
            self._log.error("reload_failed", reason=str(error))
            if request is not None:
                self._engine.admin.refuse(request, Refused(Code.BAD_REQUEST, str(error)))
            return
        self._tenants.change(settings.tenants, users)
        if self._gate is not None:
            self._gate.allowed = self._tenants.users
        gone = self._engine.rights_changed()
        if self._durable is not None:
            self._durable.withhold(gone)
        if self._publisher is not None:
            self._publisher.rights_changed(self._poller)
        waiting = config.changed(self._config, settings, {"models", "tenants", "auth", "reload"})
        self._log.info("configuration_read", taken="tenants, auth, models, reload", needs_start=",".join(waiting))
        try:
            # Everything else is as it was at the start.
            self._reload.ask(
                structs.replace(self._config, models=settings.models, slots=settings.slots, reload=settings.reload),
                request,
                waiting,
            )
        except Refused as refusal:
            assert request is not None  # it was the request that could not be read
            self._engine.admin.refuse(request, refusal)

    def _read_users(self, settings: config.Config) -> dict[str, str] | None:
        """Tenants by public key, as they are now. Raises :class:`StartError`."""
        if bool(settings.auth.key) != (self._gate is not None):
            raise ConfigError("auth.key: authentication is switched on and off by a new start only")
        return auth.read(settings.auth, settings.tenants)[1]

    def _stop(self, numbers: bytes) -> None:
        if self._stop_at is not None:
            self._log.warning("stopping_at_once", signal=signal.Signals(numbers[-1]).name)
            self._stop_at = 0.0
            return
        self._stop_at = time.monotonic() + self._config.timeouts.shutdown_seconds
        self._engine.drain()
        self._health.phase = Phase.DRAINING
        self._log.info("stopping", signal=signal.Signals(numbers[0]).name, queued_chunks=self._engine.queued_chunks)
        self._notifier.stopping("finishing what was accepted")

    def _stopped(self) -> bool:
        return self._stop_at is not None and (not self._engine.queued_chunks or time.monotonic() >= self._stop_at)


def _load_models(settings: config.Config, device: str, log: "FilteringBoundLogger") -> list[Loaded]:
    """Load and verify every model."""
    loaded: list[Loaded] = []
    for entry in settings.models:
        one = load(entry, settings, device)
        if any(one.name == other.name for other in loaded):
            raise ConfigError(
                f"{entry.path}: there is a model '{one.name}' already; give it another name in [[models]]"
            )
        loaded.append(one)
        log.info(
            "model_loaded",
            model=one.name,
            path=entry.path,
            device=one.model.device,
            slots=one.model.slots,
            state_bytes=one.model.state_bytes,
            golden_error=one.golden_error,
            bit_exact=one.bit_exact,
            seconds=one.seconds,
        )
    return loaded


def _open_router(context: Context, settings: config.Config, stack: ExitStack) -> zmq.Socket[bytes]:
    lock(settings.bind, stack)
    options = {
        zmq.LINGER: _LINGER_MILLISECONDS,
        # Without it ROUTER drops what it cannot deliver and says nothing.
        zmq.ROUTER_MANDATORY: 1,
        zmq.MAXMSGSIZE: settings.limits.message_bytes,
        zmq.SNDHWM: settings.zeromq.send_high_water_mark,
    }
    return stack.enter_context(open_socket(context, zmq.ROUTER, settings, options))


@contextmanager
def _signals() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A socket that becomes readable with the number of each SIGTERM, SIGINT and SIGHUP; and its other end.

    A handler that sets a flag would not do: it does not wake zmq's poll, which is retried with its whole time-out.
    """
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    former_fd = signal.set_wakeup_fd(writer.fileno())
    former: Mapping[int, object] = {n: signal.signal(n, _noted) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield reader, writer
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(former_fd)
        reader.close()
        writer.close()


def _wake(waker: socket.socket) -> None:
    with suppress(BlockingIOError):  # full: it is awake
        waker.send(_WAKE)


def _noted(number: int, frame: object) -> None:
    """The wake-up socket carries the signal; this only keeps the default action away."""
