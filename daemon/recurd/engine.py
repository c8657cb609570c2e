"""Read this first: a chunk's journey through the daemon, as one straight line.

    receive   a frame is decoded, its record admitted (streams) and queued (scheduler)
    take_tick the next run of a model: rows of distinct streams, as arrays
    complete  its outputs become answers, retained for retries and put out for sending
    fail      or it failed, and its streams say so
    to_save   what must stand in the journal before anything is sent, where streams are durable
    replies_to_send

The engine is sans-I/O: frames and ``now`` (monotonic seconds) come in as arguments, frames and ticks go out as
values. It imports no zmq, threading, time or onnxruntime; :mod:`recurd.server` drives it. All of it runs on one
thread. A tick is handed over: until it is completed or failed its streams are not in line, and no other tick of that
lane is taken.
"""

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from recurd import wire
from recurd.admin import Admin
from recurd.arena import Device, Store
from recurd.config import Config
from recurd.endings import Ended, Redirect
from recurd.errors import Broken, Code, Refused, StartError
from recurd.fences import Fences
from recurd.lane import Lane, Room
from recurd.lifecycle import Identity, Lifecycle, header_of
from recurd.moving import Moving
from recurd.peers import Outbox, Peer, Peers
from recurd.saving import SavedAnswer, SavedStream, Saving, Unsaved
from recurd.scheduler import Row, Tick, assemble
from recurd.states import States, kind_of
from recurd.stats import ModelStats, Stats
from recurd.streams import Chunk, Kind, Stream, Streams
from recurd.tenants import LOCAL, Tenants
from recurd.versions import Incompatible, Takeover, Versions

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

_HANDLE_BITS = 40
#: What a client waits before it asks a halted daemon again.
_HALT_RETRY_SECONDS = 1.0
#: And before it sends to a stream again that is about to end.
_END_RETRY_SECONDS = 0.02
#: Idle time-outs come so much later at most, where there is always more to read than has been.
_DEAF_SECONDS = 30.0
#: Messages that touch no stream.
_HARMLESS = frozenset({wire.Type.HELLO, wire.Type.PING})


class Engine:
    """The daemon without its sockets. Owns lanes, streams, peers, what is to be sent, and the numbers in ``stats``."""

    def __init__(
        self,
        config: Config,
        models: Mapping[str, Device],
        *,
        identity: Identity,
        stats: Stats,
        clock: Callable[[], float],
        log: "FilteringBoundLogger",
        tenants: Tenants | None = None,
        process_commands: Collection[str] = (),
    ) -> None:
        """``models`` by the name clients use; ``clock`` only measures how long something took.

        ``tenants``: whose users there are; without them those of a daemon without authentication.
        ``process_commands``: ADMIN commands that the caller carries out, see :attr:`admin`.
        """
        limits = config.limits
        self._stats = stats
        self._log = log
        # process
        self._credit = limits.stream_credit
        self._max_streams = limits.streams
        self._room = Room(limits)
        # Handles of another start of the daemon must not be taken for this one's, hence the random high bits.
        first_handle = (int.from_bytes(identity.epoch[:3], "little") << _HANDLE_BITS) + 1
        self._streams = Streams(first_handle, max_ended=limits.ended_streams, max_moved=2 * limits.streams)
        self._versions = Versions(
            lambda name, device, counts: Lane(name, device, config=config, stats=counts, room=self._room, clock=clock),
            streams=self._streams,
            stats=stats,
            log=log,
        )
        for name, model in models.items():
            self._versions.add(name, model)
        self._lanes = self._versions.present
        self._peers = Peers()
        self._outbox = Outbox(stats, max_message_bytes=limits.message_bytes)
        self._fences = Fences()
        self._unsaved = Unsaved(config.durability.mode != "off")
        #: Why nothing can be saved, and so nothing accepted, at present.
        self._halted: str | None = None
        self._halted_since = 0.0
        self._clock = clock
        self._tenants = tenants or Tenants(config.tenants)
        self._lifecycle = Lifecycle(
            config,
            identity,
            tenants=self._tenants,
            room=self._room,
            lanes=self._lanes,
            streams=self._streams,
            fences=self._fences,
            peers=self._peers,
            outbox=self._outbox,
            unsaved=self._unsaved,
            stats=stats,
            log=log,
        )
        self._moving = Moving(
            versions=self._versions,
            streams=self._streams,
            fences=self._fences,
            peers=self._peers,
            outbox=self._outbox,
            unsaved=self._unsaved,
            lifecycle=self._lifecycle,
            stats=stats,
            log=log,
        )
        #: ADMIN commands; its ``requests`` are the caller's to carry out and to answer.
        self.admin = Admin(self._outbox, self._moving.commands, process_commands)
        self._states = States(self._lifecycle, self._versions, log)
        # in flight
        #: Results that others may want; ``None`` while nobody does.
        self._published: list[tuple[Stream, wire.Record]] | None = None
        self._turns = self._versions.turns

    # --- frames in ---

    def receive(self, frame: wire.Buffer, routing_id: bytes, now: float, user: str = LOCAL) -> int:
        """Take one frame from the connection ``routing_id``; the number of records in it.

        ``user`` is what authentication says of that very frame: a client may choose its routing id, and so take that
        of another. Whatever the frame holds, it is answered, and nothing is raised.
        """
        self._stats.frames_received += 1
        self._stats.bytes_received += len(frame)
        peer = self._peers.get(routing_id)
        if peer is None or peer.user != user:
            peer = self._lifecycle.meet(routing_id, user, now)
        else:
            self._peers.seen(peer, now)
        header = wire.NO_HEADER
        try:
            header, payload = wire.decode(frame)
            if not peer.greeted:
                self._lifecycle.check_stranger(header, peer)
            is_multi = header.type == wire.Type.MULTI
            records = wire.decode_multi(header, payload) if is_multi else [(header, payload)]
        except Refused as refusal:
            self._outbox.send_error(peer, header, refusal)
            return 1
        # The data of a MULTI is looked at once, as a whole.
        is_finite = is_multi and wire.multi_is_finite(header, payload)
        for record_header, record_payload in records:
            self._handle(record_header, record_payload, peer, now, is_finite)
        return len(records)

    def _handle(self, header: wire.Header, payload: wire.Buffer, peer: Peer, now: float, is_finite: bool) -> None:
        try:
            if self._halted is not None and header.type not in _HARMLESS:
                if self._has_accepted(header, peer):
                    return
                raise Refused(Code.BUSY, self._halted, retry_after_seconds=_HALT_RETRY_SECONDS)
            if header.type == wire.Type.CHUNK:
                self._on_chunk(header, payload, peer, now, is_finite)
            else:
                self._on_other(header, payload, peer, now)
        except (Refused, Broken) as error:
            again = error.retry_after_seconds if isinstance(error, Refused) else None
            if again and header.type in wire.RECORDS and self._halted is None:  # halted, all wait: see saved()
                self._streams.note_wait(header.handle, peer, now + again)  # who waits as he was told is not idle
            self._outbox.send_error(peer, header, error)
            error.__traceback__ = None  # it may be kept to be told again, and must not keep the frame
        except StartError:
            raise  # a state that cannot be read, in the journal or on the device: nothing can be gone on with
        except Exception:
            # A bug must not take the other streams down with it.
            self._stats.internal_errors += 1
            self._log.exception("internal_error", type=header.type, handle=header.handle, seq=header.seq)
            bug = Refused(Code.INTERNAL, "a bug in the daemon; its log has the traceback")
            self._outbox.send_error(peer, header, bug)

    def _has_accepted(self, header: wire.Header, peer: Peer) -> bool:
        """Whether this is a record sent again. Halted, it is not refused: its answer comes once it is saved.

        A client that is refused a record takes it for one that has never been accepted.
        """
        if header.type not in wire.RECORDS:
            return False
        try:
            stream = self._streams.find(header, peer)
        except (Refused, Broken):
            return False
        stream.note_attempt(header)
        return 0 < header.seq <= stream.accepted

    def _on_other(self, header: wire.Header, payload: wire.Buffer, peer: Peer, now: float) -> None:
        if header.type in wire.RECORDS:
            self._on_state(header, payload, peer, now)
        elif header.type == wire.Type.OPEN:
            self._lifecycle.open(header, payload, peer, now)
        elif header.type == wire.Type.CLOSE:
            self._lifecycle.close(header, peer, now)
        elif header.type == wire.Type.PING:
            self._outbox.send_control(peer, (wire.pack(wire.Type.PONG, seq=header.seq), b""))
        elif header.type == wire.Type.HELLO:
            self._lifecycle.hello(header, payload, peer)
        elif header.type == wire.Type.ADMIN:
            self.admin.receive(header, payload, peer, now)
        else:
            raise Refused(Code.UNKNOWN_TYPE, f"message type {header.type} is not known here")

    def _on_chunk(self, header: wire.Header, payload: wire.Buffer, peer: Peer, now: float, is_finite: bool) -> None:
        stream = self._admit(header, peer, now)
        if stream is None:
            return
        lane = stream.lane
        lane.stats.chunks_received += 1
        chunk = Chunk(header.seq, header.generation, now, header.steps, lane.read(header, payload, is_finite))
        if header.code:
            chunk.starts_by = now + header.code / 1000
        if _accept(stream, chunk, header):
            lane.scheduler.add(stream)

    def _on_state(self, header: wire.Header, payload: wire.Buffer, peer: Peer, now: float) -> None:
        """RESET and STATE: records that are carried out between chunks."""
        kind = kind_of(header)
        peer.rights.demand("reset" if kind is Kind.RESET else "state")
        stream = self._admit(header, peer, now)
        if stream is None:
            return
        record = self._states.read(kind, header, payload, stream, peer, now)
        is_first = _accept(stream, record, header)
        self._states.accepted(stream, record)
        if is_first:
            self._settle(stream, now)

    def _admit(self, header: wire.Header, peer: Peer, now: float) -> Stream | None:
        """The stream whose next record this is; ``None`` for a duplicate, which is answered here."""
        stream = self._streams.find(header, peer)
        stream.last_seen = now
        if header.ack > stream.acked:
            stream.lane.retain(-stream.acknowledge(header.ack), stream.share)
        if not stream.is_next(header, self._credit):
            self._stats.duplicates += 1
            record = stream.retained(header)
            if record is not None:
                self._outbox.send_again(peer, record)
            stream.note_attempt(header)
            return None
        if stream.fence is not None:
            raise stream.fence.refusal(stream.name)
        if stream.closing is not None:
            raise Refused(Code.CLOSED, f"stream '{stream.name}' is being closed")
        if self._lifecycle.draining:
            raise self._lifecycle.shutting_down()
        if stream.lane.is_ending:
            # What was accepted before is answered first; then this record is told how the stream ended.
            raise Refused(
                Code.BUSY, "the model was replaced, the stream is ending", retry_after_seconds=_END_RETRY_SECONDS
            )
        return stream

    # --- ticks ---

    def take_tick(self, now: float, heard_until: float | None = None) -> Tick | None:
        """The next run of a model, or ``None``. It must be given back to :meth:`complete` or :meth:`fail`.

        ``heard_until``: all that was sent until then was handed in, so who is silent is so since then at the latest;
        ``None``: until now.
        """
        if self._halted is not None:
            return None
        self._lifecycle.expire(now if heard_until is None else max(heard_until, now - _DEAF_SECONDS))
        if self._versions.former:
            self._look_after_former()
        self._moving.expire(now)
        for _ in range(len(self._turns)):
            lane = self._turns[0]
            self._turns.rotate(-1)
            if len(lane.scheduler) and not lane.busy:
                tick = self._take(lane, now)
                if tick is not None:
                    return tick
        return None

    def _take(self, lane: Lane, now: float) -> Tick | None:
        rows, late = lane.scheduler.take(now)
        for stream in late:
            self._refuse_queued(stream, 1, Refused(Code.LATE, "the chunk was not started within the time it gave"))
        if not rows:
            return None
        lane.slots.admit([row.stream for row in rows])
        arrived = []
        for row in rows:
            row.stream.running = True
            for chunk, first, _ in row.parts:
                if not first:
                    arrived.append(chunk.arrived)
        lane.busy = True
        lane.stats.queue_seconds.observe_many(now - np.array(arrived))
        tick = assemble(lane.name, lane.contract, rows, now, lane.shape)
        lane.slots.used(tick.slots[: len(rows)])
        return tick

    def complete(self, tick: Tick, outputs: list[npt.NDArray[Any]], now: float) -> None:
        """Take a tick's outputs (heads in the contract's order): answer what is done, put what is not back in line.

        A stream that gets NaN or infinity is given up, it alone, as by :meth:`fail`.
        """
        lane = tick.lane
        lane.busy = False
        heads = [output.tobytes() for output in outputs]
        time = tick.input.shape[1]
        finished: list[float] = []
        spoiled = lane.spoiled(tick.lengths[: len(tick.rows)], outputs)
        for index, row in enumerate(tick.rows):
            stream = row.stream
            stream.running = False
            if stream.ended or index in spoiled:
                continue
            stream.untouched = False
            start = 0
            for chunk, _, count in row.parts:
                pieces = lane.cut(heads, time, index, start, count)
                start += count
                if chunk.taken < chunk.steps:
                    chunk.outputs += (pieces,)
                else:
                    self._answer_chunk(lane, stream, chunk, pieces)
                    finished.append(chunk.arrived)
            self._settle(stream, now)
        lane.scheduler.pace.ran(now - tick.taken_at, len(tick.rows))
        _count_tick(lane.stats, tick, finished, now)
        if spoiled:
            self._withdraw([tick.rows[index] for index in spoiled])

    def _withdraw(self, rows: list[Row]) -> None:
        """Give nobody the results of rows that hold NaN or infinity."""
        stream = rows[0].stream
        stream.lane.stats.results_not_finite += len(rows)
        # One line a tick, however many it spoils, with one of them to look at.
        self._log.warning(
            "results_not_finite",
            model=stream.lane.name,
            rows=len(rows),
            tenant=stream.tenant,
            stream=stream.name,
            seq=stream.answered + 1,
        )
        self._give_up(rows, Code.POISONED)

    def fail(self, tick: Tick, error: Exception, now: float) -> None:
        """A tick's run raised, and what became of its rows is not known.

        Streams that are durable go back to where their last answered record left them, and their chunks are refused
        (``run_failed``). Others end as ``failed``, exactly those in this tick.
        """
        lane = tick.lane
        lane.busy = False
        lane.stats.ticks_failed += 1
        self._log.error("tick_failed", model=lane.name, rows=len(tick.rows), exc_info=error)
        for row in tick.rows:
            row.stream.running = False
        self._give_up(tick.rows, Code.FAILED)

    def _give_up(self, rows: list[Row], code: Code) -> None:
        """See :meth:`complete` and :meth:`fail`."""
        for row in rows:
            if row.stream.ended:
                continue
            if self._unsaved.durable:
                self._take_back(row.stream, len(row.parts), code)
            else:
                self._lifecycle.end(row.stream, code, code.word)

    def _take_back(self, stream: Stream, parts: int, code: Code) -> None:
        """Undo what was run of a stream: so many of its records."""
        # Whether the state that is taken from the journal again is that of a fresh start. One that was given right
        # before is not there yet: it is noted with the stream, and a commit stands before the next tick.
        stream.fresh = stream.untouched = stream.untouched or stream.queue[0].fresh
        stream.lane.slots.drop(stream)
        why = "raised (the log says why)" if code is Code.FAILED else "gave NaN or infinity"
        self._refuse_queued(
            stream, parts, Refused(Code.RUN_FAILED, f"the model's run {why}; the stream is as it was before")
        )

    def _refuse_queued(self, stream: Stream, count: int, refusal: Refused) -> None:
        """Refuse so many of a stream's records, and those behind them; their numbers are free again.

        None of them may have left a trace in the state, and the stream is not in line.
        """
        queued = self._lifecycle.take_queue(stream)
        stream.accepted = stream.answered
        behind = Refused(Code.GAP, "a record before this one was refused", expected=stream.accepted + 1)
        for number, chunk in enumerate(queued):
            stream.generation -= chunk.starts_afresh
            if stream.peer is not None:
                error = refusal if number < count else behind
                self._outbox.send_error(stream.peer, header_of(stream, chunk), error)
        self._rest(stream)

    def _answer_chunk(self, lane: Lane, stream: Stream, chunk: Chunk, pieces: list[bytes]) -> None:
        payload = lane.join(chunk.outputs, pieces)
        header = wire.pack_result(
            wire.Flag.FRESH.value if chunk.fresh else 0,
            lane.result_dtype,
            len(payload),
            chunk.steps,
            lane.result_width,
            chunk.generation,
            stream.handle,
            chunk.seq,
            stream.accepted,
        )
        self._answer(stream, chunk, (header, payload))
        if self._published is not None:
            self._published.append((stream, (header, payload)))

    def _answer(self, stream: Stream, chunk: Chunk, record: wire.Record, state: bytes | None = None) -> None:
        """Answer the oldest record of a stream, and keep the answer until it is acknowledged.

        ``state``: the stream's, where it is known.
        """
        del stream.queue[0]
        stream.lane.leave(1, chunk.data.nbytes, stream.share)
        stream.answered = chunk.seq
        stream.answers.append((chunk.seq, chunk.generation, record))
        stream.lane.retain(len(record[1]), stream.share)
        self._unsaved.note(stream, state)
        if stream.peer is not None:
            self._outbox.send(stream.peer, record)

    def _settle(self, stream: Stream, now: float) -> None:
        """After an answer: carry out what is no chunk and whose turn it is, then wait in line, or close."""
        while stream.queue and not stream.queue[0].steps:
            record = stream.queue[0]
            answer, state = self._states.carry_out(stream, record, now)
            self._answer(stream, record, answer, state)
        if stream.queue:
            stream.lane.scheduler.add(stream)
        else:
            self._rest(stream)

    def _rest(self, stream: Stream) -> None:
        """A stream has nothing queued any more; some end then."""
        if stream.closing is not None:
            self._lifecycle.finish_close(stream)
        elif self._versions.has_to_end(stream):
            if stream.untouched and self._versions.renew(stream):
                self._unsaved.note(stream)  # or the next start would ask for the former file
                self._lifecycle.went_over(stream)
            else:
                self._lifecycle.end(stream, Code.RELOADED, "reloaded")

    # --- versions of models ---

    def add_model(
        self, name: str, device: Device, *, bit_exact: bool = False, idle_seconds: float | None = None
    ) -> None:
        """Serve another model; ``idle_seconds``: time-out of its streams, where it has one of its own."""
        self._versions.add(name, device, idle_seconds)
        self._lifecycle.announce(name, bit_exact)

    def replace_model(
        self, name: str, device: Device, incompatible: Incompatible = "finish", *, bit_exact: bool = False
    ) -> Takeover:
        """Serve a model by another file, of as many slots, from the next tick on; no tick may be out.

        Streams keep their state where the new file can go on with it, else it goes by ``incompatible``
        (:mod:`recurd.versions`).
        """
        takeover = self._versions.replace(name, device, incompatible)
        self._lifecycle.announce(name, bit_exact)
        return takeover

    def remove_model(self, name: str, incompatible: Incompatible = "finish") -> Takeover:
        """Serve a model no more; what becomes of its streams is as in :meth:`replace_model`."""
        takeover = self._versions.remove(name, incompatible)
        self._lifecycle.announce(name, False)
        return takeover

    def add_former(self, name: str, device: Device) -> None:
        """Serve a former version of a model, on which streams of the journal finish."""
        self._versions.add_former(name, device)

    def end_former(self) -> int:
        """End the streams that finish on former versions of models, as with ``restart``; how many there are."""
        return self._versions.end_former()

    def _look_after_former(self) -> None:
        for stream in self._versions.due():
            self._rest(stream)
        self._versions.drop()

    # --- durability ---

    def keep_in(self, store: Store) -> None:
        """Tell where durable streams stand: states that were saved need not be kept in memory."""
        self._versions.keep_in(store)

    @property
    def epoch(self) -> str:
        """New at every start."""
        return self._lifecycle.epoch

    def go_on_from(self, origin: str) -> None:
        """Be the daemon that has begun the journal, at a start of that epoch."""
        self._lifecycle.go_on_from(origin)

    def restore(
        self, handle: int, saved: SavedStream, answers: list[SavedAnswer], now: float, version: str = ""
    ) -> None:
        """Go on with a stream out of the journal, before anything is received. Its state stays there until it runs."""
        lane = self._versions.lane_of(saved.model, version)
        self._lifecycle.restore(handle, saved, answers, now, lane)

    def remember(self, handle: int, ended: Ended) -> None:
        """Know how a stream ended, out of the journal: who comes late is told."""
        self._unsaved.forget(self._streams.remember(handle, ended))
        if ended.redirect is not None and ended.redirect.group is not None:
            self._fences.remember(ended.redirect.group, "released")

    def send_on(self, redirect: Redirect) -> None:
        """Take no stream, as a daemon that was drained and started again: out of the journal."""
        self._fences.redirect = redirect

    def expect(self, sources: dict[str, str]) -> None:
        """Begin no stream that may be one of these daemons', as before the start: out of the journal."""
        self._moving.restore_expected(sources)

    def to_save(self) -> Saving | None:
        """What changed since the last :meth:`saved`; nothing that was put out may be sent before it is saved."""
        return self._unsaved.take()

    def saved(self) -> None:
        """What :meth:`to_save` gave last stands in the journal."""
        self._unsaved.saved()
        if self._halted is not None:
            # Nobody could send anything: that time is no stream's idle time.
            self._streams.forgive(self._clock() - self._halted_since)
        self._halted = None

    def stood_still(self, seconds: float) -> None:
        """Nobody could be heard, or answered and go on, for so long: that is no stream's idle time, nor the pace."""
        self._streams.forgive(seconds)
        for lane in self._turns:
            lane.scheduler.pace.pause()

    def halt(self, reason: str) -> None:
        """Nothing can be saved: refuse everything that would change a stream, until :meth:`saved`."""
        if self._halted is None:
            self._halted_since = self._clock()
        self._halted = reason
        for lane in self._turns:
            lane.scheduler.pace.pause()

    @property
    def halted(self) -> bool:
        """Whether it refuses everything at present."""
        return self._halted is not None

    # --- frames out, and the daemon's condition ---

    def replies_to_send(self) -> list[tuple[bytes, bytes]]:
        """Routing ids and frames that have become due since the last call, in order for each routing id."""
        return self._outbox.take()

    def publish(self, wanted: bool) -> None:
        """Whether to put out results for others than their sender from now on."""
        if wanted != (self._published is not None):
            self._published = [] if wanted else None

    def results_to_publish(self) -> list[tuple[Stream, wire.Record]]:
        """Streams and results since the last call, each once; not to be sent while the engine is halted."""
        if not self._published:
            return []
        results, self._published = self._published, []
        return results

    def deadline(self) -> float | None:
        """When :meth:`take_tick` should be called at the latest; 0 when there is a tick to take now."""
        if self._halted is not None:
            return None
        if (
            self._versions.are_due
            or self._lifecycle.has_to_expire
            or any(len(lane.scheduler) and not lane.busy for lane in self._turns)
        ):
            return 0.0
        due = (self._lifecycle.deadline(), self._fences.deadline())
        return min((time for time in due if time is not None), default=None)

    def disconnected(self, routing_id: bytes) -> None:
        """Note that a connection is gone; its streams stay, detached."""
        self._lifecycle.disconnected(routing_id)

    def rights_changed(self) -> list[bytes]:
        """Other tenants, rights or keys hold from now on: cut what is not allowed any more.

        The routing ids of connections to which nothing may be sent that was due before.
        """
        return self._lifecycle.cut()

    def drain(self) -> None:
        """Refuse new work from now on; what was accepted is finished as ticks are taken."""
        self._lifecycle.draining = True

    @property
    def queued_chunks(self) -> int:
        """Records accepted and not answered yet."""
        return self._room.chunks

    @property
    def full(self) -> bool:
        """New streams, or all chunks, are refused."""
        return (
            self._halted is not None
            or self._fences.redirect is not None
            or self._room.full
            or self._streams.all_have(self._max_streams)
            or all(lane.full for lane in self._lanes.values())
        )


def _accept(stream: Stream, record: Chunk, header: wire.Header) -> bool:
    """Queue a record that was admitted; whether it is the only one. Raises :class:`Refused` (``busy``, ``limit``)."""
    is_first = not stream.queue
    record.attempt = header.flags & wire.ATTEMPT
    stream.lane.enter(stream, record)
    stream.accepted = record.seq
    stream.queue.append(record)
    return is_first


def _count_tick(stats: ModelStats, tick: Tick, finished: list[float], now: float) -> None:
    steps = int(tick.lengths[: len(tick.rows)].sum())
    stats.ticks += 1
    stats.steps_processed += steps
    stats.padded_steps += tick.input.shape[0] * tick.input.shape[1] - steps
    stats.chunks_processed += len(finished)
    stats.rows.observe(len(tick.rows))
    stats.run_seconds.observe(now - tick.taken_at)
    stats.request_seconds.observe_many(now - np.array(finished))
