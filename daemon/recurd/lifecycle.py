"""How connections and streams begin and end: HELLO, OPEN, CLOSE, time-outs, failure.

What happens seldom stands here, so that :mod:`recurd.engine` holds nothing but a chunk's way.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from msgspec import UNSET

import recurd
from recurd import wire
from recurd.config import Config
from recurd.endings import Redirect
from recurd.errors import Broken, Code, Refused
from recurd.fences import Fences
from recurd.lane import Lane, Room
from recurd.peers import Outbox, Peer, Peers
from recurd.saving import SavedAnswer, SavedStream, Unsaved, answer
from recurd.stats import Stats
from recurd.streams import MAX_ENDS, Chunk, Kind, Stream, Streams, not_allowed
from recurd.tenants import LOCAL, NOBODY, Tenant, Tenants

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

#: What a client waits before it asks a daemon again that is about to be started anew.
_RESTART_RETRY_SECONDS = 0.25
#: Streams that expire between two ticks and are logged by name, at most.
_NAMED = 16
_TYPES = {Kind.CHUNK: wire.Type.CHUNK, Kind.RESET: wire.Type.RESET}


@dataclass(frozen=True)
class Identity:
    """What a daemon says of itself: chosen at its start, told in WELCOME."""

    #: New at every start; eight random bytes.
    epoch: bytes
    #: Device asked for, device in use, whether the second is a fall-back.
    device: dict[str, Any]
    #: Models whose results were found not to depend, in any bit, on who shares a tick and how a stream is cut.
    bit_exact: tuple[str, ...] = ()
    #: The epoch of the start at which the journal was begun; empty: this one.
    origin: str = ""


class Lifecycle:
    """Begins and ends what the engine's streams, peers and lanes are. Owned by the engine, which owns those too."""

    def __init__(
        self,
        config: Config,
        identity: Identity,
        *,
        tenants: Tenants,
        room: Room,
        lanes: Mapping[str, Lane],
        streams: Streams,
        fences: Fences,
        peers: Peers,
        outbox: Outbox,
        unsaved: Unsaved,
        stats: Stats,
        log: "FilteringBoundLogger",
    ) -> None:
        self._limits = config.limits
        self._timeouts = config.timeouts
        self._identity = identity
        self._tenants = tenants
        self._room = room
        self._lanes = lanes
        self._streams = streams
        self._fences = fences
        self._peers = peers
        self._outbox = outbox
        self._unsaved = unsaved
        self._durability = config.durability.mode
        self._stats = stats
        self._log = log
        #: New connections and streams are refused.
        self.draining = False
        #: Whether more streams are to expire at once.
        self.has_to_expire = False

    def shutting_down(self) -> Refused:
        """What new work is told while the daemon is draining: to come again, where its streams will go on."""
        again = None if self._durability == "off" else _RESTART_RETRY_SECONDS
        return Refused(Code.DRAINING, "the daemon is shutting down", retry_after_seconds=again)

    # --- connections ---

    def meet(self, routing_id: bytes, user: str, now: float) -> Peer:
        """A stranger, to whom nothing of whoever had this routing id before belongs."""
        self.disconnected(routing_id)
        return Peer(routing_id, user, self._tenants.of(user) or NOBODY, now)

    def check_stranger(self, header: wire.Header, peer: Peer) -> None:
        """Hold a message against what somebody may say who has not been welcomed. Raises :class:`Refused`."""
        if peer.rights is NOBODY:
            raise _unknown_key()
        if header.type != wire.Type.HELLO:
            raise Refused(Code.HELLO_REQUIRED, "say HELLO first")
        if peer.user != LOCAL and not _is_given(peer.routing_id):
            # It may be one that another tenant had, and get the answers that are on their way to that one.
            raise Refused(Code.BAD_REQUEST, "a client must not choose its routing id")

    def cut(self) -> list[bytes]:
        """Rights have changed: forget connections whose key is not known any more, detach streams no longer allowed.

        All of them are told at once, unasked. The routing ids of those connections.
        """
        gone = []
        for peer in self._peers.all():
            rights = self._tenants.of(peer.user)
            if rights is None or rights.name != peer.tenant:
                error = _unknown_key() if rights is None else _other_tenant()
                peer.frames, peer.records = [], []
                self._forget_peer(peer)
                self._outbox.send_error(peer, wire.NO_HEADER, error)
                gone.append(peer.routing_id)
                continue
            peer.rights = rights
            for handle in list(peer.handles):
                stream = self._streams.of_handle(handle)
                if not rights.may_have(stream.name, stream.lane.name):
                    peer.handles.discard(handle)
                    self._streams.detach(handle)
                    self._stats.streams["attached"] -= 1
                    self._stats.streams["detached"] += 1
                    header = wire.NO_HEADER._replace(handle=handle, generation=stream.generation)
                    self._outbox.send_error(peer, header, not_allowed(stream))
        return gone

    def hello(self, header: wire.Header, payload: wire.Buffer, peer: Peer) -> None:
        """HELLO: greet a stranger, or a peer that says it again."""
        hello = wire.decode_request(payload, wire.Hello)
        if wire.VERSION not in hello.versions:
            raise Refused(Code.BAD_VERSION, f"only version {wire.VERSION} is spoken here", expected=wire.VERSION)
        if not peer.greeted:
            self._admit_peer(peer)
            self._log.debug("peer_connected", client=hello.client, tenant=peer.tenant)
        peer.multi = hello.multi
        self._outbox.send_control(peer, wire.control(wire.Type.WELCOME, self._welcome(peer.rights), seq=header.seq))

    @property
    def epoch(self) -> str:
        """The present start, as WELCOME tells it."""
        return self._identity.epoch.hex()

    def go_on_from(self, origin: str) -> None:
        """Go on with what a start of that epoch has begun."""
        self._identity = replace(self._identity, origin=origin)

    def announce(self, model: str, bit_exact: bool) -> None:
        """Another file of a model is served, or none any more: tell everybody unasked, by a WELCOME of number 0."""
        others = tuple(name for name in self._identity.bit_exact if name != model)
        self._identity = replace(self._identity, bit_exact=(*others, model) if bit_exact else others)
        records: dict[str, wire.Record] = {}
        for peer in self._peers.all():
            if peer.tenant not in records:
                records[peer.tenant] = wire.control(wire.Type.WELCOME, self._welcome(peer.rights))
            self._outbox.send_control(peer, records[peer.tenant])

    def _welcome(self, rights: Tenant) -> wire.Welcome:
        limits = self._limits
        return wire.Welcome(
            server=f"recurd {recurd.__version__}",
            epoch=self.epoch,
            origin=self._identity.origin or self.epoch,
            tenant=rights.name,
            versions=(wire.VERSION,),
            credit=limits.stream_credit,
            max_message_bytes=limits.message_bytes,
            max_chunk_steps=limits.chunk_steps,
            peer_timeout_seconds=self._timeouts.peer_idle_seconds,
            device=self._identity.device,
            durability=self._durability,
            bit_exact=tuple(name for name in self._identity.bit_exact if rights.models.match(name)),
            rights=tuple(sorted(rights.rights)),
            models={name: self._lanes[name].contract.public() for name in self._models(rights)},
        )

    def _admit_peer(self, peer: Peer) -> None:
        if self.draining:
            raise self.shutting_down()
        # As with the rest of the room: a tenant may have as many as are still free, so others always get in.
        free = self._limits.connections - len(self._peers)
        is_greedy = free > 0 and self._tenants.is_shared and self._peers.count(peer.tenant) >= free
        if (not free or is_greedy) and not self._forget_silent(peer.last_seen, peer.tenant if is_greedy else None):
            open_ = self._peers.count(peer.tenant) if is_greedy else len(self._peers)
            raise Refused(
                Code.BUSY,
                f"{open_} connections are open, the most there may be",
                retry_after_seconds=self._limits.busy_retry_seconds,
            )
        self._peers.add(peer)
        self._stats.peers = len(self._peers)

    def _forget_silent(self, now: float, tenant: str | None) -> bool:
        """Make room for a new connection where the longest silent one (of a tenant) is probably gone, whether one was.

        A connection that broke leaves its peer behind, and whoever reconnects comes as another. Were it alive after
        all, it would be asked to say HELLO again and lose nothing.
        """
        silent = self._peers.silent_since(now - 3 * self._timeouts.keepalive_seconds)
        peer = next((peer for peer in silent if tenant in (None, peer.tenant)), None)
        if peer is None:
            return False
        self._forget_peer(peer)
        self._stats.peers_expired += 1
        return True

    def disconnected(self, routing_id: bytes) -> None:
        """Note that a connection is gone; its streams stay, detached."""
        peer = self._peers.get(routing_id)
        if peer is not None:
            self._forget_peer(peer)

    def _forget_peer(self, peer: Peer) -> None:
        self._peers.remove(peer)
        self._stats.peers = len(self._peers)
        self._stats.streams["attached"] -= len(peer.handles)
        self._stats.streams["detached"] += len(peer.handles)
        for handle in peer.handles:
            self._streams.detach(handle)
        self._log.debug("peer_gone", tenant=peer.tenant, streams=len(peer.handles))

    # --- streams ---

    def open(self, header: wire.Header, payload: wire.Buffer, peer: Peer, now: float) -> None:
        """OPEN: attach a stream to the peer, resumed or new. Raises :class:`Refused` or :class:`Broken`."""
        request = wire.decode_request(payload, wire.Open)
        if self._streams.is_reserved(peer.tenant, request.stream):
            raise Refused(
                Code.BUSY,
                f"stream '{request.stream}' is a clone that is still to be made",
                retry_after_seconds=self._limits.busy_retry_seconds,
            )
        stream = self._streams.named(peer.tenant, request.stream)
        lane = self._check_open(request, stream, peer.rights)
        if stream is not None and stream.lane.name != lane.name:
            raise Refused(Code.WRONG_MODEL, f"stream '{stream.name}' belongs to model '{stream.lane.name}'")
        if stream is None:
            self._check_moved(request.stream, peer)
        elif self._fences.check(stream, request.group):
            self._unsaved.note(stream, stream.lane.slots.state(stream))
        if request.mode == "resume":
            self._check_resume(stream, request, peer)
        elif self.draining and (stream is None or request.mode == "new"):
            raise self.shutting_down()
        if stream is None or request.mode == "new":
            self._make_room(lane, peer, stream)
            idle_timeout = request.idle_timeout_seconds or lane.idle_seconds
            stream = self._start(peer.tenant, request.stream, lane, idle_timeout, now)
            self._unsaved.note(stream)
        stream.last_seen = now
        stream.lane.retain(-stream.acknowledge(header.ack), stream.share)
        self._attach(stream, peer)
        self._send_opened(stream, peer, header.seq)

    def _make_room(self, lane: Lane, peer: Peer, former: Stream | None) -> None:
        """For a new stream, perhaps in the place of a former one of its name, which ends when there is room."""
        if former is not None:
            peer.rights.demand("reset")
        self.check_room(lane, peer.tenant, replaced=former)
        if former is not None:
            self.end(former, Code.REPLACED, "replaced")

    def went_over(self, stream: Stream) -> None:
        """Tell whoever uses a stream that it goes by the present version of its model from now on."""
        if stream.peer is not None:
            self._send_opened(stream, stream.peer, 0)

    def _send_opened(self, stream: Stream, peer: Peer, request_id: int) -> None:
        opened = wire.Opened(
            stream=stream.name,
            model=stream.lane.name,
            generation=stream.generation,
            last_seq=stream.accepted,
            fresh=stream.untouched and not stream.queue,
            credit=self._limits.stream_credit,
            max_chunk_steps=self._limits.chunk_steps,
            idle_timeout_seconds=stream.idle_timeout,
            contract=stream.lane.contract.public() if stream.lane.is_former else UNSET,
        )
        record = wire.control(
            wire.Type.OPENED, opened, generation=stream.generation, handle=stream.handle, seq=request_id
        )
        self._outbox.send_control(peer, record)

    def _check_moved(self, name: str, peer: Peer) -> None:
        """Where a stream is not here: whether it has moved, or is to begin elsewhere. Raises :class:`Refused`."""
        ending = self._streams.ending(peer.tenant, name)
        if ending is not None and ending.redirect is not None:
            raise ending.redirect.error(name)
        self._fences.check_new(name, peer)

    def _models(self, rights: Tenant) -> list[str]:
        """Those a tenant may use; it is not told of others."""
        return [name for name in self._lanes if rights.models.match(name)]

    def check_name(self, name: str) -> None:
        """Raises :class:`Refused` (``bad_name``) for what cannot be a stream's name."""
        size = len(name.encode("utf-8", "surrogatepass"))
        if not 0 < size <= self._limits.name_bytes or not name.isprintable():
            raise Refused(
                Code.BAD_NAME,
                f"a stream's name has 1 to {self._limits.name_bytes} bytes of UTF-8, all of them printable",
            )

    def _check_open(self, request: wire.Open, stream: Stream | None, rights: Tenant) -> Lane:
        self.check_name(request.stream)
        if request.mode not in ("auto", "resume", "new"):
            raise Refused(Code.BAD_REQUEST, f"mode '{request.mode}' is not auto, resume or new")
        rights.demand_stream(request.stream, request.model)
        lane = self._lanes.get(request.model)
        if lane is None and stream is not None and request.mode != "new" and stream.lane.name == request.model:
            return stream.lane  # a model that new streams are not given any more
        if lane is None:
            names = ", ".join(sorted(self._models(rights)))
            text = f"there is no model '{request.model}'" + (f", only {names}" if names else "")
            raise Refused(Code.UNKNOWN_MODEL, text)
        idle = request.idle_timeout_seconds
        if idle is not None and not 0 < idle <= lane.idle_seconds:
            text = f"idle_timeout_seconds is more than 0 and at most {lane.idle_seconds:g}"
            raise Refused(Code.BAD_REQUEST, text)
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

    def check_owner(self, tenant: str, name: str, model: str) -> None:
        """Raises :class:`Refused` (``forbidden``) where no client could go on with such a stream."""
        if not self._tenants.is_reachable(tenant):
            raise Refused(Code.FORBIDDEN, f"tenant '{tenant}' has no key here: nobody could go on with stream '{name}'")
        self._tenants.rights(tenant).demand_stream(name, model)

    def check_room(
        self, lane: Lane, tenant: str, count: int = 1, *, on_lane: int | None = None, replaced: Stream | None = None
    ) -> None:
        """Raises :class:`Refused` where there is none for so many more streams of a tenant, one in the place of another
        perhaps, and as many on the lane, or so many when others' come with them."""
        most = self._tenants.rights(tenant).limits.streams or self._limits.streams
        open_ = self._streams.count(tenant)
        if replaced is None and open_ + count > most:
            raise Refused(Code.TOO_MANY_STREAMS, f"{open_} streams are open, and {most} may be at most")
        more = count if on_lane is None else on_lane
        if lane.has_no_room(more - (replaced is not None and replaced.lane is lane)):
            text = f"there is no room for the states of more streams of model '{lane.name}'"
            raise Refused(Code.NO_SLOTS, f"{text}: close streams, shorten the idle time-out or raise host_state_bytes")
        is_new = on_lane is None and replaced is None  # those that come from another daemon had their place there
        if is_new and self._tenants.is_shared and lane.leaves_others_no_room(tenant, count):
            text = f"tenant '{tenant}' has {open_} streams, and what is left is for others"
            raise Refused(Code.NO_SLOTS, f"{text}: close streams, shorten the idle time-out or raise host_state_bytes")

    def _start(self, tenant: str, name: str, lane: Lane, idle_timeout: float, now: float) -> Stream:
        """A new stream; it still has to be noted as unsaved."""
        ending = self._streams.ending(tenant, name)
        stream = self._streams.add(
            tenant=tenant,
            name=name,
            lane=lane,
            generation=1 if ending is None else ending.generation + 1,
            idle_timeout=idle_timeout,
            now=now,
        )
        stream.share = self._tenants.share(tenant, self._room)
        lane.count_streams(tenant, 1)
        self._stats.streams_opened += 1
        self._stats.streams["detached"] += 1
        self._log.debug("stream_opened", stream=stream.name, model=lane.name, generation=stream.generation)
        return stream

    # --- clones ---

    def check_clone(self, source: Stream, name: str, peer: Peer) -> None:
        """Hold the clone of a stream against what may be opened. Raises :class:`Refused`."""
        self.check_name(name)
        peer.rights.demand_stream(name, source.lane.name)
        if self._streams.named(peer.tenant, name) is not None or self._streams.is_reserved(peer.tenant, name):
            raise Refused(Code.EXISTS, f"there is a stream '{name}' already")
        ending = self._streams.ending(peer.tenant, name)
        if ending is not None and ending.redirect is not None:
            # Told that it has moved, the client would take its own stream for moved and follow.
            raise Refused(Code.EXISTS, f"there is a stream '{name}' already, at {ending.redirect.endpoint}")
        if reason := self._fences.may_come(peer.tenant, name):
            raise Refused(Code.EXISTS, reason)  # not busy: a clone that waits would hold up its stream
        self.check_room(source.lane, peer.tenant)

    def reserve(self, source: Stream, name: str) -> None:
        """Keep name and room for a clone that waits for its turn. Nobody but its source knows of it until then."""
        self._streams.reserve(source.tenant, name)
        source.lane.count_streams(source.tenant, 1)

    def clone(self, source: Stream, name: str, state: bytes | None, now: float) -> None:
        """Start the stream that was reserved, with the state of its source (``None``: the initial one)."""
        self._release(source, name)
        stream = self._start(source.tenant, name, source.lane, source.idle_timeout, now)
        if state is not None:
            stream.untouched = False
            stream.lane.slots.put(stream, state)
        self._unsaved.note(stream, state)
        if stream.lane.is_ending:
            self.end(stream, Code.RELOADED, "reloaded")
        elif source.fence is not None:  # which leaves, and its clone with it
            stream.fence = source.fence
            source.fence.streams.append(stream)

    def _release(self, source: Stream, name: str) -> None:
        self._streams.release(source.tenant, name)
        source.lane.count_streams(source.tenant, -1)

    def take_queue(self, stream: Stream) -> list[Chunk]:
        """The records of a stream that will never be carried out; it has none any more."""
        queued, stream.queue = stream.queue, []
        stream.lane.leave(len(queued), sum(chunk.data.nbytes for chunk in queued), stream.share)
        for record in queued:
            if record.kind is Kind.CLONE:
                self._release(stream, name_of(record))
        return queued

    # --- ends ---

    def restore(
        self, handle: int, saved: SavedStream, answers: list[SavedAnswer], now: float, lane: Lane | None = None
    ) -> Stream:
        """See :meth:`recurd.engine.Engine.restore`; ``lane`` is that of the present version when none is given."""
        lane = lane or self._lanes[saved.model]
        stream = self._streams.add(
            tenant=saved.tenant,
            name=saved.name,
            lane=lane,
            generation=saved.generation,
            idle_timeout=saved.idle_timeout,
            now=now,
            handle=handle,
        )
        stream.share = self._tenants.share(saved.tenant, self._room)
        self.renew(stream, saved, answers, now)
        stream.saved, stream.forgotten, stream.apart = saved.seq, saved.acked, saved.apart
        if saved.held:
            self._fences.restore(stream, saved.held)
        lane.count_streams(saved.tenant, 1)
        self._stats.streams["detached"] += 1
        return stream

    def renew(self, stream: Stream, saved: SavedStream, answers: list[SavedAnswer], now: float) -> None:
        """Put a stream, which has nothing queued, to where it is said to stand; its state is the caller's."""
        stream.generation, stream.first_generation = saved.generation, saved.first_generation
        stream.idle_timeout, stream.last_seen = saved.idle_timeout, now
        stream.stored = None
        stream.accepted = stream.answered = saved.seq
        stream.acked = saved.acked
        stream.lane.slots.drop(stream)
        stream.fresh = stream.untouched = saved.state is None
        stream.lane.retain(-sum(len(payload) for _, _, (_, payload) in stream.answers), stream.share)
        stream.answers = [answer(one) for one in answers]
        stream.lane.retain(sum(len(payload) for _, _, (_, payload) in stream.answers), stream.share)

    def _attach(self, stream: Stream, peer: Peer) -> None:
        if stream.peer is None:
            self._stats.streams["detached"] -= 1
            self._stats.streams["attached"] += 1
        else:
            stream.peer.handles.discard(stream.handle)
        if stream.closing is not None and stream.peer is not peer:
            self._answer_close(
                stream, Refused(Code.DETACHED, f"stream '{stream.name}' was opened on another connection")
            )
            stream.closing = wire.NO_HEADER
        stream.peer = peer
        peer.handles.add(stream.handle)

    def close(self, header: wire.Header, peer: Peer, now: float) -> None:
        """CLOSE: end the stream when all that was accepted before has been answered."""
        try:
            stream = self._streams.find(header, peer)
        except Refused as refusal:
            if refusal.code is not Code.CLOSED:
                raise
            self._outbox.send_control(peer, (wire.pack(wire.Type.CLOSED, handle=header.handle, seq=header.seq), b""))
            return
        stream.last_seen = now
        if stream.fence is not None:
            raise stream.fence.refusal(stream.name)
        if stream.closing is not None and stream.closing is not wire.NO_HEADER:
            raise Refused(Code.CLOSED, f"stream '{stream.name}' is being closed already")
        stream.closing = header
        if not stream.queue:
            self.finish_close(stream)

    def finish_close(self, stream: Stream) -> None:
        """The queue of a closing stream has run empty."""
        self._answer_close(stream, None)
        self.end(stream, Code.CLOSED, "closed")

    def _answer_close(self, stream: Stream, error: Refused | Broken | None) -> None:
        """Answer the CLOSE that a stream waits with, when there is one and somebody to be told."""
        close, peer = stream.closing, stream.peer
        stream.closing = None
        if close is None or close is wire.NO_HEADER or peer is None:
            return
        if error is not None:
            self._outbox.send_error(peer, close, error)
            return
        record = wire.pack(wire.Type.CLOSED, generation=stream.generation, handle=stream.handle, seq=close.seq)
        self._outbox.send_control(peer, (record, b""))

    def end(
        self, stream: Stream, code: Code, reason: str, redirect: Redirect | None = None, *, is_named: bool = True
    ) -> None:
        """Forget a stream. What is still queued is answered with how it ended; its slot is free at once.

        ``is_named``: whether it is logged by name, where it did not end by what a client does as often as it likes.

        A tick that still holds a row of it does no harm: ticks of a lane follow one another, and whoever gets the slot
        brings a state or starts fresh.
        """
        lane = stream.lane
        ended, endings_gone = self._streams.end(stream, code, redirect)
        self._unsaved.end(stream, ended, endings_gone)
        if redirect is None:
            self._fences.note_end(stream.tenant, stream.name)
        lane.retain(-sum(len(payload) for _, _, (_, payload) in stream.answers), stream.share)
        for chunk in self.take_queue(stream):
            if stream.peer is not None:
                self._outbox.send_error(stream.peer, header_of(stream, chunk), ended.error())
        self._answer_close(stream, ended.error())
        if not stream.running:
            lane.scheduler.remove(stream)
        lane.slots.drop(stream)
        lane.count_streams(stream.tenant, -1)
        if stream.peer is not None:
            stream.peer.handles.discard(stream.handle)
        self._stats.streams["detached" if stream.peer is None else "attached"] -= 1
        self._stats.streams_ended[reason] += 1
        is_named &= reason not in ("closed", "moved", "reloaded", "replaced")
        log = self._log.info if is_named else self._log.debug
        log(
            "stream_ended",
            reason=reason,
            stream=stream.name,
            model=lane.name,
            tenant=stream.tenant,
            generation=stream.generation,
            last_seq=stream.accepted,
        )

    def forget(self, stream: Stream) -> None:
        """Forget a stream that nobody here has ever had: that was to come from another daemon, and did not."""
        self._streams.forget(stream)
        self._unsaved.end(stream, None)
        stream.lane.retain(-sum(len(payload) for _, _, (_, payload) in stream.answers), stream.share)
        stream.lane.slots.drop(stream)
        stream.lane.count_streams(stream.tenant, -1)
        self._stats.streams["detached"] -= 1

    # --- time ---

    def expire(self, now: float) -> None:
        """End streams, not too many at once, and forget peers whose time-out has passed."""
        expired = self._streams.expired(now, MAX_ENDS)
        self.has_to_expire = len(expired) == MAX_ENDS
        are_many = len(expired) > _NAMED
        for stream in expired:
            if not stream.ended:  # one that has left and come back may stand in the order twice
                self.end(stream, Code.EXPIRED, "expired", is_named=not are_many)
        if are_many:  # as after a start, where all idle times count from one moment
            self._log.info("streams_expired", streams=len(expired), stream=expired[0].name, tenant=expired[0].tenant)
        for peer in self._peers.silent_since(now - self._timeouts.peer_idle_seconds):
            self._forget_peer(peer)
            self._stats.peers_expired += 1

    def deadline(self) -> float | None:
        """When :meth:`expire` should be called next."""
        silent = self._peers.longest_silent()
        expiry = None if silent is None else silent.last_seen + self._timeouts.peer_idle_seconds
        return min((time for time in (self._streams.deadline(), expiry) if time is not None), default=None)


def _unknown_key() -> Refused:
    return Refused(Code.FORBIDDEN, "this key is not known here (any more)")


def _other_tenant() -> Refused:
    return Refused(Code.FORBIDDEN, "this key is another tenant's now; connect again to be that one")


def _is_given(routing_id: bytes) -> bool:
    """Whether it is one that ROUTER made up; libzmq lets no client choose one like it."""
    return routing_id.startswith(b"\0")


def header_of(stream: Stream, chunk: Chunk) -> wire.Header:
    """The header a queued record came with, as far as an error about it repeats it."""
    return wire.NO_HEADER._replace(
        type=_TYPES.get(chunk.kind, wire.Type.STATE),
        flags=chunk.attempt,
        generation=chunk.generation - chunk.starts_afresh,
        handle=stream.handle,
        seq=chunk.seq,
    )


def name_of(record: Chunk) -> str:
    """Name of the stream that a CLONE asks for. Raises :class:`Refused` (``bad_name``)."""
    try:
        return record.data.tobytes().decode()
    except UnicodeDecodeError:
        raise Refused(Code.BAD_NAME, "a stream's name is UTF-8") from None
