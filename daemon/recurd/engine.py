"""Read this first: a chunk's journey through the daemon, as one straight line.

    receive   a frame is decoded, its record admitted (streams) and queued (scheduler)
    take_tick the next run of a model: rows of distinct streams, as arrays
    complete  its outputs become answers, retained for retries and put out for sending
    fail      or it failed, and its streams say so
    replies_to_send

The engine is sans-I/O: frames and ``now`` (monotonic seconds) come in as arguments, frames and ticks go out as
values. It imports no zmq, threading, time or onnxruntime; :mod:`recurd.server` drives it. All of it runs on one
thread. A tick is handed over: until it is completed or failed its streams are not in line, and no other tick of that
lane is taken.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import recurd
from recurd import wire
from recurd.arena import Slots
from recurd.config import Config
from recurd.contract import Contract
from recurd.errors import Broken, Code, Refused
from recurd.peers import Peer, Peers
from recurd.scheduler import Scheduler, Tick, assemble
from recurd.stats import ModelStats, Stats
from recurd.streams import NO_SLOT, Answer, Chunk, Stream, Streams

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

_HANDLE_BITS = 40


@dataclass(frozen=True)
class Identity:
    """What a daemon says of itself: chosen at its start, told in WELCOME."""

    #: New at every start; eight random bytes.
    epoch: bytes
    #: Device asked for, device in use, whether the second is a fall-back.
    device: dict[str, Any]


class Lane:
    """One model on one device, as the engine sees it: its line of streams, its slots, its numbers."""

    def __init__(self, name: str, contract: Contract, slots: int, config: Config, stats: ModelStats) -> None:
        self.name = name
        self.contract = contract
        self.slots = Slots(slots)
        self.stats = stats
        self.scheduler = Scheduler(
            contract,
            max_rows=min(config.tick.rows, slots),
            max_steps=config.tick.steps,
            padding_ratio=config.tick.padding_ratio,
        )
        #: Whether a tick is out; ticks of a lane never overlap.
        self.busy = False
        self._dtype = wire.DTYPES[contract.input.dtype]
        self._numpy_type = wire.NUMPY_TYPES[self._dtype]
        self._width = contract.input.width
        self._classes = contract.input.classes
        self._max_steps = config.limits.chunk_steps
        # An element times zero is zero unless it is NaN or infinite: one dot product finds out.
        self._zeros = np.zeros(self._max_steps * self._width, self._numpy_type)
        self.result_dtype = wire.DTYPES[contract.heads[0].dtype]
        self.result_width = sum(head.width for head in contract.heads)
        self._per_step = [head.per == "step" for head in contract.heads]

    def read(self, header: wire.Header, payload: wire.Buffer) -> npt.NDArray[Any]:
        """A chunk's steps, ``[steps * width]``. Raises :class:`Refused` for what the model cannot take."""
        if header.dtype != self._dtype:
            raise Refused(Code.DTYPE, f"model '{self.name}' takes {self._numpy_type.name}, not dtype {header.dtype}")
        if header.width != self._width:
            raise Refused(Code.WIDTH, f"model '{self.name}' takes {self._width} elements a step, not {header.width}")
        if not header.steps:
            raise Refused(Code.EMPTY, "a chunk has at least one step")
        if header.steps > self._max_steps:
            raise Refused(Code.TOO_LONG, f"a chunk has at most {self._max_steps} steps, this one {header.steps}")
        elements = header.steps * self._width
        if header.size != elements * self._numpy_type.itemsize:
            raise Refused(
                Code.BAD_FRAME,
                f"{header.steps} steps of {self._width} {self._numpy_type.name} are "
                f"{elements * self._numpy_type.itemsize} bytes, not {header.size}",
            )
        data = np.frombuffer(payload, self._numpy_type)
        if self._classes is not None:
            if data.min() < 0 or data.max() >= self._classes:
                raise Refused(Code.OUT_OF_RANGE, f"token ids are in [0, {self._classes})")
        elif self._numpy_type.kind == "f" and np.dot(data, self._zeros[:elements]) != 0:
            raise Refused(Code.NOT_FINITE, "the chunk holds NaN or infinity")
        return data

    def cut(self, outputs: list[npt.NDArray[Any]], row: int, start: int, count: int) -> list[bytes]:
        """A row's ``count`` steps from ``start`` on, per head (of a head of the last step its one output)."""
        return [
            (output[row, start : start + count] if per_step else output[row]).tobytes()
            for output, per_step in zip(outputs, self._per_step, strict=True)
        ]

    def join(self, earlier: list[list[bytes]], last: list[bytes]) -> bytes:
        """A chunk's payload from its slices: head after head, each in order of time."""
        if not earlier:
            return last[0] if len(last) == 1 else b"".join(last)
        heads = [
            [*(slice[index] for slice in earlier if per_step), last[index]]
            for index, per_step in enumerate(self._per_step)
        ]
        return b"".join([piece for head in heads for piece in head])


class Engine:
    """The daemon without its sockets. Owns streams, peers, lanes and the numbers in ``stats``."""

    def __init__(
        self,
        config: Config,
        models: Mapping[str, tuple[Contract, int]],
        *,
        identity: Identity,
        stats: Stats,
        log: "FilteringBoundLogger",
    ) -> None:
        """``models``: contract and number of slots by the name clients use."""
        self._config = config
        self._limits = config.limits
        self._identity = identity
        self._log = log
        self.stats = stats
        # process
        self.lanes = {
            name: Lane(name, contract, slots, config, stats.add_model(name, slots))
            for name, (contract, slots) in models.items()
        }
        # Handles of another start of the daemon must not be taken for this one's, hence the random high bits.
        first_handle = (int.from_bytes(identity.epoch[:3], "little") << _HANDLE_BITS) + 1
        self._streams = Streams(first_handle, max_ended=self._limits.ended_streams)
        self._peers = Peers()
        self._draining = False
        # in flight
        self._turns = deque(self.lanes.values())
        self._queued_chunks = 0
        self._queued_bytes = 0
        self._outgoing: list[Peer] = []

    # --- frames in ---

    def receive(self, frame: wire.Buffer, routing_id: bytes, now: float, tenant: str = "local") -> None:
        """Take one frame from the connection ``routing_id``. Whatever it holds, it is answered and never raises."""
        self.stats.frames_received += 1
        self.stats.bytes_received += len(frame)
        peer = self._peers.get(routing_id)
        if peer is None:
            peer = Peer(routing_id, tenant, now)
        else:
            self._peers.seen(peer, now)
        header = _NOTHING
        try:
            header, payload = wire.decode(frame)
            if not peer.greeted and header.type != wire.Type.HELLO:
                raise Refused(Code.HELLO_REQUIRED, "say HELLO first")
            records = wire.decode_multi(header, payload) if header.type == wire.Type.MULTI else ((header, payload),)
        except Refused as refusal:
            self._send_error(peer, header, refusal)
            return
        for record_header, record_payload in records:
            self._handle(record_header, record_payload, peer, now)

    def _handle(self, header: wire.Header, payload: wire.Buffer, peer: Peer, now: float) -> None:
        try:
            if header.type == wire.Type.CHUNK:
                self._on_chunk(header, payload, peer, now)
            else:
                self._on_other(header, payload, peer, now)
        except (Refused, Broken) as error:
            self._send_error(peer, header, error)
        except Exception:
            # A bug must not take the other streams down with it.
            self.stats.internal_errors += 1
            self._log.exception("internal_error", type=header.type, handle=header.handle, seq=header.seq)
            self._send_error(peer, header, Refused(Code.INTERNAL, "a bug in the daemon; its log has the traceback"))

    def _on_chunk(self, header: wire.Header, payload: wire.Buffer, peer: Peer, now: float) -> None:
        stream = self._admit(header, peer, now)
        if stream is None:
            return
        lane = stream.lane
        lane.stats.chunks_received += 1
        data = lane.read(header, payload)
        self._check_room(header)
        self._accept(stream, Chunk(header.seq, header.generation, now, header.steps, data))
        if len(stream.queue) == 1:
            lane.scheduler.add(stream)

    def _admit(self, header: wire.Header, peer: Peer, now: float) -> Stream | None:
        """The stream whose next record this is; ``None`` for a duplicate, which is answered here."""
        stream = self._streams.find(header, peer)
        stream.last_seen = now
        stream.acknowledge(header.ack)
        if not stream.is_next(header, self._limits.stream_credit):
            self.stats.duplicates += 1
            record = stream.retained(header)
            if record is not None:
                self._send(peer, record)
            return None
        if stream.closing is not None:
            raise Refused(Code.CLOSED, f"stream '{stream.name}' is being closed")
        if self._draining:
            raise Refused(Code.DRAINING, "the daemon is shutting down")
        return stream

    def _check_room(self, header: wire.Header) -> None:
        limits = self._limits
        if self._queued_chunks >= limits.queued_chunks or self._queued_bytes + header.size > limits.queued_bytes:
            raise Refused(
                Code.BUSY,
                f"{self._queued_chunks} chunks ({self._queued_bytes} bytes) wait already",
                expected=header.seq,
                retry_after_seconds=limits.busy_retry_seconds,
            )

    def _accept(self, stream: Stream, chunk: Chunk) -> None:
        stream.accepted = chunk.seq
        stream.queue.append(chunk)
        self._queued_chunks += 1
        self._queued_bytes += chunk.data.nbytes
        stream.lane.stats.queued_chunks += 1

    def _on_other(self, header: wire.Header, payload: wire.Buffer, peer: Peer, now: float) -> None:
        if header.type == wire.Type.RESET:
            self._on_reset(header, peer, now)
        elif header.type == wire.Type.OPEN:
            self._on_open(header, payload, peer, now)
        elif header.type == wire.Type.CLOSE:
            self._on_close(header, peer, now)
        elif header.type == wire.Type.PING:
            self._send_control(peer, (wire.pack(wire.Type.PONG, seq=header.seq), b""))
        elif header.type == wire.Type.HELLO:
            self._on_hello(header, payload, peer)
        else:
            raise Refused(Code.UNKNOWN_TYPE, f"message type {header.type} is not known here")

    def _on_reset(self, header: wire.Header, peer: Peer, now: float) -> None:
        stream = self._admit(header, peer, now)
        if stream is None:
            return
        self._check_room(header)
        stream.generation += 1
        self._accept(stream, Chunk(header.seq, stream.generation, now, steps=0))
        if len(stream.queue) == 1:
            self._settle(stream)

    # --- connections ---

    def _on_hello(self, header: wire.Header, payload: wire.Buffer, peer: Peer) -> None:
        hello = wire.decode_body(payload, wire.Hello)
        if wire.VERSION not in hello.versions:
            raise Refused(Code.BAD_VERSION, f"only version {wire.VERSION} is spoken here", expected=wire.VERSION)
        if not peer.greeted:
            self._admit_peer(peer)
            self._log.debug("peer_connected", client=hello.client, tenant=peer.tenant)
        peer.multi = hello.multi
        limits = self._limits
        welcome = wire.Welcome(
            server=f"recurd {recurd.__version__}",
            epoch=self._identity.epoch.hex(),
            tenant=peer.tenant,
            versions=(wire.VERSION,),
            credit=limits.stream_credit,
            max_message_bytes=limits.message_bytes,
            max_chunk_steps=limits.chunk_steps,
            peer_timeout_seconds=self._config.timeouts.peer_idle_seconds,
            device=self._identity.device,
            models={name: lane.contract.public() for name, lane in self.lanes.items()},
        )
        self._send_control(peer, wire.control(wire.Type.WELCOME, welcome, seq=header.seq))

    def _admit_peer(self, peer: Peer) -> None:
        if self._draining:
            raise Refused(Code.DRAINING, "the daemon is shutting down")
        if len(self._peers) >= self._limits.connections:
            raise Refused(
                Code.BUSY,
                f"{len(self._peers)} connections are open, the most there may be",
                retry_after_seconds=self._limits.busy_retry_seconds,
            )
        self._peers.add(peer)
        self.stats.peers = len(self._peers)

    def disconnected(self, routing_id: bytes) -> None:
        """Note that a connection is gone; its streams stay, detached."""
        peer = self._peers.get(routing_id)
        if peer is not None:
            self._forget_peer(peer)

    def _forget_peer(self, peer: Peer) -> None:
        self._peers.remove(peer)
        self.stats.peers = len(self._peers)
        self.stats.streams["attached"] -= len(peer.handles)
        self.stats.streams["detached"] += len(peer.handles)
        for handle in peer.handles:
            self._streams.detach(handle)
        self._log.debug("peer_gone", tenant=peer.tenant, streams=len(peer.handles))

    # --- streams ---

    def _on_open(self, header: wire.Header, payload: wire.Buffer, peer: Peer, now: float) -> None:
        request = wire.decode_body(payload, wire.Open)
        lane = self._check_open(request)
        stream = self._streams.named(peer.tenant, request.stream)
        if stream is not None and stream.lane is not lane:
            raise Refused(Code.WRONG_MODEL, f"stream '{stream.name}' belongs to model '{stream.lane.name}'")
        if stream is not None and request.mode == "new":
            self._end(stream, Code.REPLACED, "replaced")
            stream = None
        if request.mode == "resume":
            self._check_resume(stream, request, peer)
        if stream is None:
            stream = self._start(request, lane, peer, now)
        stream.last_seen = now
        self._attach(stream, peer)
        opened = wire.Opened(
            stream=stream.name,
            model=lane.name,
            generation=stream.generation,
            last_seq=stream.accepted,
            fresh=stream.untouched and not stream.queue,
            credit=self._limits.stream_credit,
            max_chunk_steps=self._limits.chunk_steps,
            idle_timeout_seconds=stream.idle_timeout,
        )
        record = wire.control(
            wire.Type.OPENED, opened, generation=stream.generation, handle=stream.handle, seq=header.seq
        )
        self._send_control(peer, record)

    def _check_open(self, request: wire.Open) -> Lane:
        size = len(request.stream.encode("utf-8", "surrogatepass"))
        if not 0 < size <= self._limits.name_bytes or not request.stream.isprintable():
            raise Refused(
                Code.BAD_NAME,
                f"a stream's name has 1 to {self._limits.name_bytes} bytes of UTF-8 and no control characters",
            )
        if request.mode not in ("auto", "resume", "new"):
            raise Refused(Code.BAD_REQUEST, f"mode '{request.mode}' is not auto, resume or new")
        idle = request.idle_timeout_seconds
        if idle is not None and not 0 < idle <= self._config.timeouts.stream_idle_seconds:
            raise Refused(
                Code.BAD_REQUEST,
                f"idle_timeout_seconds is more than 0 and at most {self._config.timeouts.stream_idle_seconds:g}",
            )
        lane = self.lanes.get(request.model)
        if lane is None:
            raise Refused(
                Code.UNKNOWN_MODEL, f"there is no model '{request.model}', only {', '.join(sorted(self.lanes))}"
            )
        return lane

    def _check_resume(self, stream: Stream | None, request: wire.Open, peer: Peer) -> None:
        if stream is None:
            ending = self._streams.ending(peer.tenant, request.stream)
            if ending is not None:
                raise ending.error()
            raise Refused(Code.UNKNOWN_STREAM, f"there is no stream '{request.stream}' to resume")
        known = request.generation
        if known is not None and not stream.first_generation <= known <= stream.generation:
            raise Refused(
                Code.STALE,
                f"generation {known} of stream '{stream.name}' is gone, this is {stream.generation}",
                expected=stream.accepted + 1,
                generation=stream.generation,
            )

    def _start(self, request: wire.Open, lane: Lane, peer: Peer, now: float) -> Stream:
        if self._draining:
            raise Refused(Code.DRAINING, "the daemon is shutting down")
        if self._streams.count(peer.tenant) >= self._limits.streams:
            raise Refused(Code.TOO_MANY_STREAMS, f"{self._limits.streams} streams are open, the most there may be")
        slot = lane.slots.allocate()
        if slot is None:
            raise Refused(Code.NO_SLOTS, f"all {lane.slots.count} slots of model '{lane.name}' are taken")
        ending = self._streams.ending(peer.tenant, request.stream)
        stream = self._streams.add(
            tenant=peer.tenant,
            name=request.stream,
            lane=lane,
            slot=slot,
            generation=1 if ending is None else ending.generation + 1,
            idle_timeout=request.idle_timeout_seconds or self._config.timeouts.stream_idle_seconds,
            now=now,
        )
        lane.stats.slots_used = len(lane.slots)
        self.stats.streams_opened += 1
        self.stats.streams["detached"] += 1
        self._log.debug("stream_opened", stream=stream.name, model=lane.name, generation=stream.generation)
        return stream

    def _attach(self, stream: Stream, peer: Peer) -> None:
        if stream.peer is None:
            self.stats.streams["detached"] -= 1
            self.stats.streams["attached"] += 1
        else:
            stream.peer.handles.discard(stream.handle)
        stream.peer = peer
        peer.handles.add(stream.handle)

    def _on_close(self, header: wire.Header, peer: Peer, now: float) -> None:
        try:
            stream = self._streams.find(header, peer)
        except Refused as refusal:
            if refusal.code is not Code.CLOSED:
                raise
            self._send_control(peer, (wire.pack(wire.Type.CLOSED, handle=header.handle, seq=header.seq), b""))
            return
        stream.last_seen = now
        stream.closing = header
        if not stream.queue:
            self._finish_close(stream)

    def _finish_close(self, stream: Stream) -> None:
        assert stream.closing is not None
        record = wire.pack(wire.Type.CLOSED, generation=stream.generation, handle=stream.handle, seq=stream.closing.seq)
        if stream.peer is not None:
            self._send_control(stream.peer, (record, b""))
        self._end(stream, Code.CLOSED, "closed")

    def _end(self, stream: Stream, code: Code, reason: str) -> None:
        """Forget a stream. What is still queued is answered with how it ended; its slot is free at once.

        A tick that still holds a row of it does no harm: ticks of a lane follow one another, and whoever gets the slot
        starts fresh.
        """
        lane = stream.lane
        ended = self._streams.end(stream, code)
        queued, stream.queue = stream.queue, []
        for chunk in queued:
            self._count_out(stream, chunk)
            if stream.peer is not None:
                self._send_error(stream.peer, _record_header(stream, chunk), ended.error())
        if not stream.running:
            lane.scheduler.remove(stream)
        lane.slots.free(stream.slot)
        stream.slot = NO_SLOT
        lane.stats.slots_used = len(lane.slots)
        if stream.peer is not None:
            stream.peer.handles.discard(stream.handle)
        self.stats.streams["detached" if stream.peer is None else "attached"] -= 1
        self.stats.streams_ended[reason] += 1
        log = self._log.debug if reason == "closed" else self._log.info
        log(
            "stream_ended",
            reason=reason,
            stream=stream.name,
            model=lane.name,
            tenant=stream.tenant,
            generation=stream.generation,
            last_seq=stream.accepted,
        )

    # --- ticks ---

    def take_tick(self, now: float) -> Tick | None:
        """The next run of a model, or ``None``. It must be given back to :meth:`complete` or :meth:`fail`."""
        self._expire(now)
        for _ in range(len(self._turns)):
            lane = self._turns[0]
            self._turns.rotate(-1)
            if len(lane.scheduler) and not lane.busy:
                return self._take(lane, now)
        return None

    def _take(self, lane: Lane, now: float) -> Tick:
        rows = lane.scheduler.take()
        waited = []
        for row in rows:
            row.stream.running = True
            waited += [now - chunk.arrived for chunk, first, _ in row.parts if first == 0]
        tick = assemble(lane.name, lane.contract, rows, now)
        lane.busy = True
        lane.stats.queue_seconds.observe_many(np.array(waited))
        return tick

    def complete(self, tick: Tick, outputs: list[npt.NDArray[Any]], now: float) -> None:
        """Take a tick's outputs (heads in the contract's order): answer what is done, put what is not back in line."""
        lane = self.lanes[tick.model]
        lane.busy = False
        finished: list[float] = []
        for index, row in enumerate(tick.rows):
            stream = row.stream
            stream.running = False
            if stream.slot == NO_SLOT:
                continue
            stream.untouched = False
            start = 0
            for chunk, _, count in row.parts:
                pieces = lane.cut(outputs, index, start, count)
                start += count
                if chunk.taken < chunk.steps:
                    chunk.outputs.append(pieces)
                else:
                    self._answer_chunk(stream, chunk, pieces)
                    finished.append(chunk.arrived)
            self._settle(stream)
        self._count_tick(lane.stats, tick, finished, now)

    def fail(self, tick: Tick, error: Exception, now: float) -> None:
        """A tick's run raised: what became of its rows is not known, so exactly their streams end as ``failed``."""
        lane = self.lanes[tick.model]
        lane.busy = False
        self._log.error(
            "tick_failed", model=lane.name, rows=len(tick.rows), seconds=now - tick.taken_at, error=str(error)
        )
        for row in tick.rows:
            row.stream.running = False
            if row.stream.slot != NO_SLOT:
                self._end(row.stream, Code.FAILED, "failed")

    def _answer_chunk(self, stream: Stream, chunk: Chunk, pieces: list[bytes]) -> None:
        payload = stream.lane.join(chunk.outputs, pieces)
        self._count_out(stream, chunk)
        self._answer(
            stream,
            chunk,
            wire.pack(
                wire.Type.RESULT,
                flags=wire.Flag.FRESH if chunk.fresh else 0,
                dtype=stream.lane.result_dtype,
                size=len(payload),
                steps=chunk.steps,
                width=stream.lane.result_width,
                generation=chunk.generation,
                handle=stream.handle,
                seq=chunk.seq,
                ack=stream.accepted,
            ),
            payload,
        )

    def _answer(self, stream: Stream, chunk: Chunk, header: bytes, payload: bytes) -> None:
        """Answer the oldest record of a stream, and keep the answer until it is acknowledged."""
        del stream.queue[0]
        stream.answered = chunk.seq
        record = (header, payload)
        stream.answers.append(Answer(chunk.seq, chunk.generation, record))
        if stream.peer is not None:
            self._send(stream.peer, record)

    def _settle(self, stream: Stream) -> None:
        """After an answer: carry out the resets whose turn it is, then wait in line, or close."""
        while stream.queue and stream.queue[0].is_reset:
            reset = stream.queue[0]
            stream.fresh = stream.untouched = True
            stream.lane.stats.resets += 1
            self._count_out(stream, reset)
            header = wire.pack(
                wire.Type.DONE,
                flags=wire.Flag.FRESH,
                generation=reset.generation,
                handle=stream.handle,
                seq=reset.seq,
                ack=stream.accepted,
            )
            self._answer(stream, reset, header, b"")
        if stream.queue:
            stream.lane.scheduler.add(stream)
        elif stream.closing is not None:
            self._finish_close(stream)

    def _count_out(self, stream: Stream, chunk: Chunk) -> None:
        self._queued_chunks -= 1
        self._queued_bytes -= chunk.data.nbytes
        stream.lane.stats.queued_chunks -= 1

    def _count_tick(self, stats: ModelStats, tick: Tick, finished: list[float], now: float) -> None:
        steps = int(tick.lengths.sum())
        stats.ticks += 1
        stats.steps_processed += steps
        stats.padded_steps += tick.input.shape[0] * tick.input.shape[1] - steps
        stats.chunks_processed += len(finished)
        stats.rows.observe(len(tick.rows))
        stats.run_seconds.observe(now - tick.taken_at)
        stats.request_seconds.observe_many(now - np.array(finished))

    # --- time ---

    def deadline(self) -> float | None:
        """When :meth:`take_tick` should be called at the latest; 0 when there is a tick to take now."""
        if any(len(lane.scheduler) and not lane.busy for lane in self.lanes.values()):
            return 0.0
        silent = self._peers.longest_silent()
        times = [self._streams.deadline(), None if silent is None else silent + self._config.timeouts.peer_idle_seconds]
        return min((time for time in times if time is not None), default=None)

    def _expire(self, now: float) -> None:
        for stream in self._streams.expired(now):
            self._end(stream, Code.EXPIRED, "expired")
        for peer in self._peers.silent_since(now - self._config.timeouts.peer_idle_seconds):
            self._forget_peer(peer)
            self.stats.peers_expired += 1

    def drain(self) -> None:
        """Refuse new work from now on; what was accepted is finished as ticks are taken."""
        self._draining = True

    @property
    def idle(self) -> bool:
        """Nothing is queued or running."""
        return not self._queued_chunks

    @property
    def full(self) -> bool:
        """A new stream, or any chunk, would be refused."""
        return (
            self._queued_chunks >= self._limits.queued_chunks
            or len(self._streams) >= self._limits.streams
            or all(len(lane.slots) == lane.slots.count for lane in self.lanes.values())
        )

    # --- frames out ---

    def replies_to_send(self) -> list[tuple[bytes, bytes]]:
        """Routing ids and frames that have become due since the last call, in order for each routing id."""
        replies = []
        for peer in self._outgoing:
            peer.seal(self._limits.message_bytes)
            replies += [(peer.routing_id, frame) for frame in peer.frames]
            peer.frames = []
        self._outgoing = []
        return replies

    def _send(self, peer: Peer, record: wire.Record) -> None:
        if not peer.records and not peer.frames:
            self._outgoing.append(peer)
        peer.records.append(record)

    def _send_control(self, peer: Peer, record: wire.Record) -> None:
        if not peer.records and not peer.frames:
            self._outgoing.append(peer)
        peer.seal(self._limits.message_bytes)
        peer.frames.append(wire.frame(record))

    def _send_error(self, peer: Peer, header: wire.Header, error: Refused | Broken) -> None:
        if isinstance(error, Broken):
            self.stats.broken[error.code] += 1
            body = wire.Error(
                code=error.code.word,
                text=error.text,
                in_reply_to=header.type,
                generation=error.generation,
                last_seq=error.last_seq,
            )
        else:
            self.stats.refused[error.code] += 1
            body = wire.Error(
                code=error.code.word,
                text=error.text,
                in_reply_to=header.type,
                expected=error.expected,
                generation=error.generation,
                retry_after_seconds=error.retry_after_seconds,
            )
        record = wire.control(
            wire.Type.ERROR, body, code=error.code, generation=header.generation, handle=header.handle, seq=header.seq
        )
        if header.type in (wire.Type.CHUNK, wire.Type.RESET):
            self._send(peer, record)
        else:
            self._send_control(peer, record)


def _record_header(stream: Stream, chunk: Chunk) -> wire.Header:
    """The header a queued record came with, as far as an error about it repeats it."""
    kind = wire.Type.RESET if chunk.is_reset else wire.Type.CHUNK
    return _NOTHING._replace(type=kind, generation=chunk.generation, handle=stream.handle, seq=chunk.seq)


#: Stands for the header of a frame that has none that could be read.
_NOTHING = wire.Header(b"", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
