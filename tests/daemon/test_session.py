"""The client's core against a model of the daemon's side of the protocol, over a network that loses what we choose."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest
import structlog.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from recurd import config, wire
from recurd.backlog import Record
from recurd.contract import Contract, Head, Input, Source, State
from recurd.engine import Engine
from recurd.errors import PASSING, Broken, Code, RecurdError, Refused, Unanswered
from recurd.lifecycle import Identity
from recurd.session import Limits, Session
from recurd.signature import GET_STATE, RESET, Payload, clone
from recurd.stats import Stats
from recurd.writer import KEPT_SECONDS, Writer

CONTRACT = {
    "name": "sum",
    "input": {"dtype": "float32", "shape": [1]},
    "heads": [{"name": "total", "dtype": "float32", "shape": [1]}],
    "states": [{"name": "h", "dtype": "float32", "shape": [1]}],
    "state_hash": "ab" * 32,
}


# --- the daemon's side ---


@dataclass
class Life:
    """What the reference daemon knows of one stream: a running sum is its state."""

    handle: int
    generation: int = 1
    peer: int | None = None
    accepted: int = 0
    total: float = 0.0
    answers: dict[int, wire.Record] = field(default_factory=dict)
    queue: list[tuple[wire.Header, np.ndarray]] = field(default_factory=list)


class Reference:
    """The protocol's server side in the fewest words: no limits, no time, answers when told to."""

    def __init__(self, start: int, credit: int = 4) -> None:
        self.epoch = start
        self.now = 0.0
        self.credit = credit
        self.busy = False
        self.refuse_opens: Code | None = None
        self.former: dict[str, Any] | None = None
        self.greeted: set[int] = set()
        self.lives: dict[str, Life] = {}
        self.ended: dict[int, Code] = {}
        self.replies: list[tuple[int, bytes]] = []

    def receive(self, frame: bytes, peer: int) -> None:
        header, payload = wire.decode(frame)
        if header.type != wire.Type.HELLO and peer not in self.greeted:
            return self.refuse(peer, header, Code.HELLO_REQUIRED)
        if header.type == wire.Type.MULTI:
            for record_header, record_payload in wire.decode_multi(header, payload):
                self.on_record(record_header, record_payload, peer)
            return None
        actions: dict[int, Callable[[wire.Header, memoryview, int], None]] = {
            wire.Type.HELLO: self.on_hello,
            wire.Type.OPEN: self.on_open,
            wire.Type.CHUNK: self.on_record,
            wire.Type.RESET: self.on_record,
            wire.Type.STATE: self.on_record,
            wire.Type.CLOSE: self.on_close,
            wire.Type.PING: lambda header, _, peer: self.say(peer, (wire.pack(wire.Type.PONG, seq=header.seq), b"")),
        }
        actions[header.type](header, payload, peer)
        return None

    def say(self, peer: int, record: wire.Record) -> None:
        self.replies.append((peer, wire.frame(record)))

    def refuse(self, peer: int, header: wire.Header, code: Code, **more: Any) -> None:
        body = wire.Error(code=code.word, text="no", in_reply_to=header.type, **more)
        flags = header.flags & wire.ATTEMPT
        self.say(
            peer, wire.control(wire.Type.ERROR, body, flags=flags, code=code, handle=header.handle, seq=header.seq)
        )

    def on_hello(self, header: wire.Header, payload: memoryview, peer: int) -> None:
        self.greeted.add(peer)
        welcome = wire.Welcome(
            server="reference",
            epoch=str(self.epoch),
            tenant="local",
            versions=(1,),
            credit=self.credit,
            max_message_bytes=1 << 20,
            max_chunk_steps=100,
            peer_timeout_seconds=60.0,
            device={},
            models={"sum": CONTRACT},
        )
        self.say(peer, wire.control(wire.Type.WELCOME, welcome, seq=header.seq))

    def on_open(self, header: wire.Header, payload: memoryview, peer: int) -> None:
        request = wire.decode_body(payload, wire.Open)
        life = self.lives.get(request.stream)
        if self.refuse_opens:
            again = 0.5 if self.refuse_opens in PASSING else None
            return self.refuse(peer, header, self.refuse_opens, retry_after_seconds=again)
        if request.mode == "resume" and life is None:
            return self.refuse(peer, header, Code.UNKNOWN_STREAM)
        if life is None or request.mode == "new":
            if life is not None:
                self.ended[life.handle] = Code.REPLACED
            life = Life(handle=self.epoch * 1000 + len(self.ended) + len(self.lives) + 1)
            self.lives[request.stream] = life
        life.peer = peer
        opened = wire.Opened(
            stream=request.stream,
            model="sum",
            generation=life.generation,
            last_seq=life.accepted,
            fresh=life.accepted == 0,
            credit=self.credit,
            max_chunk_steps=100,
            idle_timeout_seconds=60.0,
            contract=self.former or msgspec.UNSET,
        )
        return self.say(peer, wire.control(wire.Type.OPENED, opened, handle=life.handle, seq=header.seq))

    def on_record(self, header: wire.Header, payload: memoryview, peer: int) -> None:
        life = next((life for life in self.lives.values() if life.handle == header.handle), None)
        if life is None:
            return self.refuse(peer, header, self.ended.get(header.handle, Code.UNKNOWN_HANDLE))
        if life.peer != peer:
            return self.refuse(peer, header, Code.DETACHED)
        for seq in [seq for seq in life.answers if seq <= header.ack]:
            del life.answers[seq]
        if header.seq > life.accepted + 1:
            return self.refuse(peer, header, Code.GAP, expected=life.accepted + 1)
        if header.seq <= life.accepted:
            return self.on_duplicate(header, life, peer)
        if header.generation != life.generation:
            return self.refuse(peer, header, Code.STALE, generation=life.generation)
        assert header.seq - header.ack <= self.credit
        if self.busy:
            return self.refuse(peer, header, Code.BUSY, expected=header.seq, retry_after_seconds=0.5)
        if header.type == wire.Type.STATE:
            assert not payload or header.flags & 15 == wire.Operation.CLONE or payload[:32] == b"\xab" * 32
            steps = np.frombuffer(payload, "u1")
        else:
            steps = np.frombuffer(payload, "<f4")
        if not np.isfinite(steps).all():
            return self.refuse(peer, header, Code.NOT_FINITE)
        life.accepted = header.seq
        life.generation += wire.starts_afresh(header.type, header.flags)
        life.queue.append((header, steps))
        return None

    def on_duplicate(self, header: wire.Header, life: Life, peer: int) -> None:
        if header.seq in life.answers:
            first, payload = life.answers[header.seq]
            self.say(peer, (first[:4] + bytes([first[4] | wire.Flag.DUPLICATE]) + first[5:], payload))
        elif header.seq <= header.ack:
            raise AssertionError("the client asks for what it acknowledged")

    def on_close(self, header: wire.Header, payload: memoryview, peer: int) -> None:
        life = next((life for life in self.lives.values() if life.handle == header.handle), None)
        if life is None:
            return self.refuse(peer, header, self.ended.get(header.handle, Code.UNKNOWN_HANDLE))
        if life.peer != peer:
            return self.refuse(peer, header, Code.DETACHED)
        assert not life.queue
        self.lives = {name: other for name, other in self.lives.items() if other is not life}
        self.ended[header.handle] = Code.CLOSED
        return self.say(peer, (wire.pack(wire.Type.CLOSED, seq=header.seq), b""))

    def work(self) -> bool:
        """Answer one record of every stream; whether there was one."""
        worked = False
        for life in list(self.lives.values()):
            if life.queue:
                self.answer(life, *life.queue.pop(0))
                worked = True
        return worked

    def answer(self, life: Life, header: wire.Header, steps: np.ndarray) -> None:
        if header.type == wire.Type.STATE:
            return self.answer_state(life, header, steps.tobytes())
        is_reset = header.type == wire.Type.RESET
        sums = (life.total + np.cumsum(steps)).astype("<f4")
        life.total = 0.0 if is_reset else float(sums[-1])
        record = wire.pack(
            wire.Type.DONE if is_reset else wire.Type.RESULT,
            flags=wire.Flag.FRESH if is_reset else 0,
            dtype=0 if is_reset else wire.Dtype.FLOAT32,
            size=sums.nbytes,
            steps=len(sums),
            width=1,
            generation=header.generation + is_reset,
            handle=life.handle,
            seq=header.seq,
            ack=life.accepted,
        )
        return self.tell(life, header, (record, sums.tobytes()))

    def answer_state(self, life: Life, header: wire.Header, data: bytes) -> None:
        operation, payload = header.flags & wire.OPERATION, b""
        if operation == wire.Operation.GET:
            payload = b"\xab" * 32 + np.float32(life.total).tobytes()
        elif operation == wire.Operation.CLONE:
            self.lives[data.decode()] = Life(life.handle * 1000 + header.seq, total=life.total)
        else:
            life.total = float(np.frombuffer(data[32:], "<f4")[0])
        record = wire.pack(
            wire.Type.STATE_OF,
            size=len(payload),
            generation=header.generation + wire.starts_afresh(header.type, header.flags),
            handle=life.handle,
            seq=header.seq,
            ack=life.accepted,
        )
        self.tell(life, header, (record, payload))

    def tell(self, life: Life, header: wire.Header, record: wire.Record) -> None:
        life.answers[header.seq] = record
        if life.peer is not None:
            self.say(life.peer, record)


class Real:
    """The daemon's own engine behind the same face, with arrays for a model."""

    def __init__(self, start: int, credit: int = 4) -> None:
        limits = config.Limits(stream_credit=credit, queued_chunks=6, busy_retry_seconds=0.5, chunk_steps=100)
        contract = Contract(
            name="sum",
            input=Input(dtype="float32", shape=(1,)),
            heads=(Head(name="total", dtype="float32", shape=(1,)),),
            states=(State(name="h", output="h.next", dtype="float32", shape=(1,), batch_axis=0),),
            source=Source(framework="none"),
            weights_sha256="",
        )
        # what the engine wants of a model: three slots, so that more streams have to share them
        self.contract, self.slots, self.row_bytes = contract, 3, 4
        self.totals = np.zeros((3, 1), np.float32)
        self.log = structlog.testing.CapturingLogger()
        self.epoch = start
        self.now = 0.0
        self.busy = False  # the engine is busy by itself, when six chunks wait
        self.engine = Engine(
            config.Config(limits=limits),
            {"sum": self},
            identity=Identity(bytes([start] * 8), {}),
            stats=Stats(),
            clock=lambda: self.now,
            log=self.log,
        )
        self.replies: list[tuple[int, bytes]] = []

    def receive(self, frame: bytes, peer: int) -> None:
        self.engine.receive(frame, bytes([peer % 256, peer // 256]), self.now)
        self.collect()

    def rows(self, slots: Any) -> list[bytes]:
        return [row.tobytes() for row in self.totals[slots]]

    def write_rows(self, slots: Any, rows: list[bytes]) -> None:
        self.totals[slots] = np.frombuffer(b"".join(rows), np.float32)[:, None]

    def collect(self) -> None:
        assert not [call for call in self.log.calls if call.method_name in ("exception", "error")]
        self.replies += [(peer[0] + 256 * peer[1], frame) for peer, frame in self.engine.replies_to_send()]

    def work(self) -> bool:
        tick = self.engine.take_tick(self.now)
        if tick is not None:
            self.totals[tick.slots[tick.fresh]] = 0
            sums = self.totals[tick.slots][:, None, :] + np.cumsum(tick.input, axis=1)
            self.totals[tick.slots] = sums[np.arange(len(tick.lengths)), tick.lengths - 1]
            self.engine.complete(tick, [sums], self.now)
        self.collect()  # without a tick too: what is late is told
        return tick is not None


# --- the two together ---


class Pair:
    """A session and a daemon with the network between them in our hands; ``outcomes`` has every answer by its token."""

    def __init__(self, credit: int = 4, kind: type[Any] = Reference) -> None:
        self.now = 0.0
        self.credit = credit
        self.daemon = kind(start=1, credit=credit)
        self.session = Session("welcome", self.now, Limits())
        self.outcomes: dict[str, Any] = {}
        self.peer = 0
        self.up: list[bytes] = []
        self.down: list[bytes] = []
        self.late: list[tuple[int, bytes]] = []
        self.sent: list[wire.Header] = []

    def collect(self) -> None:
        for token, value, error in self.session.take_answers():
            assert token not in self.outcomes, f"{token} was answered twice"
            self.outcomes[token] = error if error is not None else value

    def turn(self) -> None:
        """What a driver does after everything."""
        if self.session.wants_connection(self.now):
            self.connect()
        frames = self.session.frames_to_send(self.now)
        if not self.session.is_connected:
            self.lose()
        for frame in frames:
            header, payload = wire.decode(frame)
            is_multi = header.type == wire.Type.MULTI
            self.sent += [h for h, _ in wire.decode_multi(header, payload)] if is_multi else [header]
        self.up += frames
        self.collect()

    def connect(self) -> None:
        self.lose()
        self.peer += 1
        self.session.connected(self.now)

    def lose(self) -> None:
        """What was on the way is lost; the daemon may still read what had reached its socket."""
        self.late += [(self.peer, frame) for frame in self.up]
        self.up, self.down = [], []

    def deliver_up(self, count: int = 1_000_000) -> None:
        frames, self.up = self.up[:count], self.up[count:]
        for frame in frames:
            self.daemon.receive(frame, self.peer)

    def deliver_late(self) -> None:
        frames, self.late = self.late, []
        for peer, frame in frames:
            self.daemon.receive(frame, peer)

    def deliver_down(self, count: int = 1_000_000) -> None:
        replies, self.daemon.replies = self.daemon.replies, []
        self.down += [frame for peer, frame in replies if peer == self.peer]
        frames, self.down = self.down[:count], self.down[count:]
        for frame in frames:
            self.session.receive(frame, self.now)
            if not self.session.is_connected:
                self.lose()
                break
        self.turn()

    def disconnect(self) -> None:
        self.session.disconnected(self.now)
        self.lose()
        self.turn()

    def reconnect(self) -> None:
        """Time for a new connection, too little for anything to be asked for again."""
        self.disconnect()
        self.pass_time(1.0)
        self.exchange()

    def restart_daemon(self) -> None:
        self.daemon = type(self.daemon)(self.daemon.epoch + 1, self.credit)
        self.late = []
        self.disconnect()

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.daemon.now = self.now
        self.turn()

    def exchange(self) -> None:
        """Let both sides talk and work until nothing moves any more, without time passing."""
        self.turn()
        while True:
            self.deliver_up()
            worked = self.daemon.work()
            if not (worked or self.daemon.replies or self.up or self.down):
                return
            self.deliver_down()

    def settle(self) -> None:
        """Let time pass too until everything is answered."""
        for _ in range(200):
            self.exchange()
            self.pass_time(1.0)

    def open(self, name: str = "s", mode: str = "auto") -> Writer:
        writer = self.session.open(wire.Open(stream=name, model="sum", mode=mode), f"open {name}")
        self.turn()
        return writer

    def push(self, writer: Writer, token: str, *values: float, expires: float = math.inf) -> None:
        payload = Payload(np.array(values, "<f4").tobytes(), len(values), 1, wire.Dtype.FLOAT32)
        self.session.submit(writer, [Record(token, payload, self.now + expires)])
        self.turn()

    def reset(self, writer: Writer, token: str) -> None:
        self.session.submit(writer, [Record(token, RESET)])
        self.turn()

    def get(self, writer: Writer, token: str) -> None:
        self.session.submit(writer, [Record(token, GET_STATE)])
        self.turn()

    def give(self, writer: Writer, token: str, operation: wire.Operation, value: float) -> None:
        assert writer.signature is not None
        self.session.submit(writer, [Record(token, writer.signature.given(operation, {"h": [value]}))])
        self.turn()

    def clone(self, writer: Writer, token: str, name: str) -> None:
        self.session.submit(writer, [Record(token, clone(name))])
        self.turn()

    def close(self, writer: Writer, token: str) -> None:
        self.session.close(writer, token)
        self.turn()

    def totals(self, *tokens: str) -> list[list[float]]:
        return [self.outcomes[token].ravel().tolist() for token in tokens]

    def code(self, token: str) -> Code:
        error = self.outcomes[token]
        assert isinstance(error, Refused | Broken)
        return error.code


@pytest.fixture
def pair() -> Pair:
    pair = Pair()
    pair.exchange()
    return pair


@pytest.fixture
def writer(pair: Pair) -> Writer:
    writer = pair.open()
    pair.exchange()
    return writer


# --- the plain course ---


def test_the_first_welcome_answers_who_connected(pair: Pair) -> None:
    assert pair.outcomes == {"welcome": None}
    assert pair.session.welcome is not None
    assert pair.session.welcome.server == "reference"


def test_an_opened_stream_knows_where_it_stands(pair: Pair) -> None:
    writer = pair.open()
    pair.exchange()
    assert pair.outcomes["open s"] is None
    assert (writer.backlog.generation, writer.backlog.last_seq, writer.fresh) == (1, 0, True)


def test_results_come_for_every_chunk_in_order(pair: Pair, writer: Writer) -> None:
    pair.push(writer, "a", 1, 2)
    pair.push(writer, "b", 3)
    pair.exchange()
    assert pair.totals("a", "b") == [[1, 3], [6]]
    assert (writer.backlog.last_seq, writer.fresh) == (2, False)


def test_chunks_of_many_streams_leave_in_one_frame(pair: Pair) -> None:
    writers = [pair.open(f"s{n}") for n in range(10)]
    pair.exchange()
    payload = Payload(np.ones(1, "<f4").tobytes(), 1, 1, wire.Dtype.FLOAT32)
    for n, writer in enumerate(writers):
        pair.session.submit(writer, [Record(f"r{n}", payload)])
    frames = pair.session.frames_to_send(pair.now)
    assert len(frames) == 1
    assert wire.decode(frames[0])[0].steps == 10


def test_no_more_than_the_credit_is_in_flight(pair: Pair, writer: Writer) -> None:
    for n in range(10):
        pair.push(writer, f"r{n}", 1)
    assert [header.seq for header in pair.sent if header.type == wire.Type.CHUNK] == [1, 2, 3, 4]
    pair.exchange()
    assert pair.totals("r9") == [[10]]


def test_acknowledgements_follow_the_results(pair: Pair, writer: Writer) -> None:
    pair.push(writer, "a", 1)
    pair.exchange()
    pair.push(writer, "b", 1)
    assert (pair.sent[-1].seq, pair.sent[-1].ack) == (2, 1)


def test_records_after_a_reset_carry_the_next_generation(pair: Pair, writer: Writer) -> None:
    pair.push(writer, "a", 5)
    pair.reset(writer, "reset")
    pair.push(writer, "b", 1)
    assert [header.generation for header in pair.sent[-3:]] == [1, 1, 2]
    pair.exchange()
    assert pair.outcomes["reset"] is None
    assert pair.totals("b") == [[1]]
    assert writer.backlog.generation == 2


def test_a_close_waits_for_everything_before_it(pair: Pair, writer: Writer) -> None:
    pair.push(writer, "a", 1)
    pair.close(writer, "close")
    assert pair.sent[-1].type == wire.Type.CHUNK
    pair.exchange()
    assert pair.totals("a") == [[1]]
    assert pair.outcomes["close"] is None
    pair.push(writer, "late", 1)
    assert isinstance(pair.outcomes["late"], RecurdError)


def test_a_stream_is_open_once_on_a_client_and_again_after_its_close(pair: Pair, writer: Writer) -> None:
    second = pair.session.open(wire.Open(stream="s", model="sum"), "again")
    pair.collect()
    assert isinstance(pair.outcomes.pop("again"), RecurdError)
    assert second.error is not None
    pair.close(writer, "close")
    pair.exchange()
    pair.session.open(wire.Open(stream="s", model="sum"), "again")
    pair.exchange()
    assert pair.outcomes["again"] is None


# --- connections that break ---


def test_what_was_unanswered_is_sent_again_with_its_old_number(pair: Pair, writer: Writer) -> None:
    pair.push(writer, "a", 1)
    pair.exchange()
    pair.push(writer, "b", 2)
    pair.push(writer, "c", 3)
    pair.deliver_up(1)  # b arrives, c does not; no answer comes back
    pair.sent = []
    pair.reconnect()
    opens = [header for header in pair.sent if header.type == wire.Type.OPEN]
    assert [header.ack for header in opens] == [1]
    assert [(h.type, h.seq) for h in pair.sent if h.type == wire.Type.CHUNK] == [(3, 2), (3, 3)]
    assert pair.totals("a", "b", "c") == [[1], [3], [6]]


def test_a_stream_that_was_open_is_only_ever_resumed(pair: Pair) -> None:
    writer = pair.open(mode="new")
    pair.exchange()
    pair.reset(writer, "reset")
    pair.exchange()
    pair.disconnect()
    pair.pass_time(1.0)
    pair.deliver_up()
    pair.deliver_down()
    request = wire.decode_body(wire.decode(pair.up[-1])[1], wire.Open)
    assert (request.mode, request.generation) == ("resume", 2)


def test_answers_lost_on_a_living_connection_are_asked_for_again(pair: Pair, writer: Writer) -> None:
    pair.push(writer, "a", 1)
    pair.push(writer, "b", 1)
    pair.deliver_up()
    while pair.daemon.work():
        pair.daemon.replies.clear()
    connections = pair.session.connections
    pair.settle()
    assert pair.totals("a", "b") == [[1], [2]]
    assert pair.session.connections == connections


def test_an_opened_that_was_lost_is_asked_for_again(pair: Pair) -> None:
    writer = pair.open()
    pair.deliver_up()
    pair.daemon.replies.clear()
    pair.push(writer, "a", 1)
    pair.settle()
    assert pair.totals("a") == [[1]]


def test_an_open_without_answer_is_sent_again_as_it_was(pair: Pair) -> None:
    pair.open(mode="new")
    pair.disconnect()
    pair.settle()
    assert pair.outcomes["open s"] is None


def test_a_late_open_from_a_lost_connection_does_not_take_the_stream_away(pair: Pair) -> None:
    writer = pair.open()
    pair.disconnect()  # the OPEN is still in the daemon's socket
    pair.pass_time(1)
    pair.exchange()
    pair.deliver_late()
    pair.push(writer, "a", 1)
    pair.settle()
    assert pair.totals("a") == [[1]]


def test_a_silent_connection_is_made_anew(pair: Pair, writer: Writer) -> None:
    pair.push(writer, "a", 1)
    connections = pair.session.connections
    for _ in range(40):
        pair.up, pair.down = [], []
        pair.pass_time(1.0)
        if pair.session.connections > connections:
            break
    pair.settle()
    assert pair.totals("a") == [[1]]


def test_an_idle_connection_is_kept_alive_by_pings(pair: Pair, writer: Writer) -> None:
    connections = pair.session.connections
    last_heard = pair.now
    for _ in range(300):
        pair.pass_time(1.0)
        if pair.up:
            last_heard = pair.now
        assert pair.now - last_heard < 60  # peer_timeout_seconds
        pair.exchange()
    assert pair.session.connections == connections


def test_a_daemon_that_forgot_the_connection_is_greeted_again(pair: Pair, writer: Writer) -> None:
    pair.daemon.greeted.clear()
    pair.push(writer, "a", 1)
    pair.settle()
    assert pair.totals("a") == [[1]]


def test_a_restarted_daemon_breaks_its_streams_and_says_so(pair: Pair, writer: Writer) -> None:
    pair.push(writer, "a", 1)
    pair.exchange()
    pair.push(writer, "b", 1)
    pair.restart_daemon()
    pair.settle()
    assert pair.code("b") is Code.UNKNOWN_STREAM
    assert isinstance(pair.outcomes["b"], Broken)
    assert str(pair.outcomes["b"]) == (
        "unknown_stream: the daemon was restarted (or forgot the stream), the state of stream 's' is lost; "
        "open it again to start afresh"
    )
    pair.push(writer, "c", 1)
    assert isinstance(pair.outcomes["c"], Broken)
    pair.outcomes.clear()
    again = pair.open()
    pair.push(again, "d", 4)
    pair.settle()
    assert pair.totals("d") == [[4]]


def test_a_daemon_that_knows_less_than_was_answered_breaks_the_stream(pair: Pair, writer: Writer) -> None:
    for n in range(3):
        pair.push(writer, f"r{n}", 1)
    pair.exchange()
    pair.daemon.lives["s"].accepted = 2  # restored from an old copy
    pair.disconnect()
    pair.settle()
    pair.push(writer, "next", 1)
    pair.settle()
    assert isinstance(pair.outcomes["next"], Broken)


def test_a_fresh_start_by_another_client_breaks_the_stream(pair: Pair, writer: Writer) -> None:
    pair.push(writer, "a", 1)
    pair.exchange()
    life = pair.daemon.lives["s"]
    life.generation, life.accepted = 2, 1  # opened anew, reset, whatever: not the life we know
    pair.disconnect()
    pair.settle()
    pair.push(writer, "b", 1)
    assert pair.code("b") is Code.STALE


def test_a_stream_that_expired_is_broken_with_that_code(pair: Pair, writer: Writer) -> None:
    life = pair.daemon.lives.pop("s")
    pair.daemon.ended[life.handle] = Code.EXPIRED
    pair.push(writer, "a", 1)
    pair.push(writer, "b", 1)
    pair.close(writer, "close")
    pair.exchange()
    assert pair.code("a") is pair.code("b") is Code.EXPIRED
    assert isinstance(pair.outcomes["a"], Broken)
    assert pair.outcomes["close"] is None


def test_a_contract_that_cannot_be_read_fails_the_opening(pair: Pair) -> None:
    assert pair.session.welcome is not None
    pair.session.welcome.models["sum"] = {"input": {"dtype": "complex64", "shape": [1]}, "heads": []}
    pair.open()
    pair.exchange()
    assert pair.code("open s") is Code.BAD_FRAME


def test_a_close_that_was_carried_out_before_the_connection_broke_is_done(pair: Pair, writer: Writer) -> None:
    pair.close(writer, "close")
    pair.deliver_up()
    pair.disconnect()
    pair.settle()
    assert pair.outcomes["close"] is None


def test_who_was_taken_over_by_another_client_is_told_and_does_not_fight(pair: Pair, writer: Writer) -> None:
    pair.daemon.lives["s"].peer = 99
    pair.push(writer, "a", 1)
    pair.push(writer, "b", 1)
    pair.settle()
    assert pair.code("a") is pair.code("b") is Code.DETACHED
    assert pair.daemon.lives["s"].peer == 99


def test_what_was_sent_before_another_client_took_over_may_have_been_run(pair: Pair, writer: Writer) -> None:
    pair.push(writer, "a", 1)
    pair.turn()
    pair.deliver_up()  # accepted, and its answer goes to nobody
    pair.daemon.lives["s"].peer = 99
    pair.push(writer, "b", 1)
    pair.settle()
    assert isinstance(pair.outcomes["a"], Unanswered)
    assert pair.code("b") is Code.DETACHED


def forbid(pair: Pair, handle: int, in_reply_to: int = 0) -> None:
    """Let the daemon say that something is not allowed any more."""
    error = wire.Error(code="forbidden", text="not any more", in_reply_to=in_reply_to)
    record = wire.control(wire.Type.ERROR, error, code=Code.FORBIDDEN, handle=handle)
    pair.session.receive(wire.frame(record), pair.now)
    pair.collect()


def test_a_stream_that_is_taken_away_ends_at_once_and_what_was_sent_may_have_been_run(
    pair: Pair, writer: Writer
) -> None:
    other = pair.open("t")
    pair.settle()
    for number in range(6):  # two over the credit
        pair.push(writer, str(number), 1)
    pair.turn()
    forbid(pair, writer.handle)
    assert [isinstance(pair.outcomes[str(number)], Unanswered) for number in range(6)] == [True] * 4 + [False] * 2
    assert pair.code("5") is Code.FORBIDDEN
    pair.push(other, "other", 1)
    pair.settle()
    assert pair.totals("other") == [[1]]


@pytest.mark.parametrize("handle", ["stream", "key"])
def test_a_stream_that_is_taken_away_is_not_called_closed(pair: Pair, writer: Writer, handle: str) -> None:
    pair.push(writer, "a", 1)
    pair.close(writer, "waiting")
    forbid(pair, writer.handle if handle == "stream" else 0)
    pair.close(writer, "later")
    assert pair.code("waiting") is pair.code("later") is Code.FORBIDDEN


@pytest.mark.parametrize("in_reply_to", [0, wire.Type.PING])
def test_a_client_whose_key_is_not_known_any_more_is_told_at_once(pair: Pair, writer: Writer, in_reply_to: int) -> None:
    pair.push(writer, "a", 1)
    pair.turn()
    forbid(pair, 0, in_reply_to)
    assert isinstance(pair.outcomes["a"], Unanswered)
    assert isinstance(pair.session.error, Refused)
    assert pair.session.error.code is Code.FORBIDDEN
    pair.push(writer, "b", 1)
    pair.collect()
    assert pair.code("b") is Code.FORBIDDEN


def test_a_result_of_another_clients_chunk_is_not_taken_for_ours(pair: Pair, writer: Writer) -> None:
    life = pair.daemon.lives["s"]
    life.accepted = 1
    life.answers[1] = (wire.pack(wire.Type.RESULT, dtype=1, size=4, steps=1, handle=life.handle, seq=1), b"\0" * 4)
    pair.push(writer, "a", 1)
    pair.settle()
    assert pair.code("a") is Code.DETACHED


# --- refusals ---


def test_a_refused_chunk_fails_alone_and_those_behind_it_run(pair: Pair, writer: Writer) -> None:
    pair.push(writer, "a", 1)
    pair.push(writer, "bad", math.nan)
    pair.push(writer, "b", 2)
    pair.reset(writer, "reset")
    pair.push(writer, "c", 3)
    pair.exchange()
    assert pair.code("bad") is Code.NOT_FINITE
    assert pair.totals("a", "b", "c") == [[1], [3], [3]]
    assert writer.backlog.last_seq == 4


def test_two_refused_chunks_in_one_pipeline_fail_each_alone(pair: Pair, writer: Writer) -> None:
    for token, value in (("x", math.nan), ("a", 1), ("y", math.nan), ("b", 2), ("z", math.nan), ("c", 3)):
        pair.push(writer, token, value)
    pair.exchange()
    assert pair.totals("a", "b", "c") == [[1], [3], [6]]
    assert {pair.code(token) for token in "xyz"} == {Code.NOT_FINITE}


def test_a_busy_daemon_gets_the_same_chunk_again_after_the_time_it_named(pair: Pair, writer: Writer) -> None:
    pair.daemon.busy = True
    pair.push(writer, "a", 1)
    pair.push(writer, "b", 1)
    pair.exchange()
    pair.daemon.busy = False
    sent = len(pair.sent)
    pair.pass_time(0.4)
    assert len(pair.sent) == sent
    deadline = pair.session.deadline()
    assert deadline is not None
    assert deadline <= 0.5
    pair.pass_time(0.1)
    pair.exchange()
    assert pair.totals("a", "b") == [[1], [2]]


def test_a_busy_daemon_is_not_sent_everything_again_each_time(pair: Pair, writer: Writer) -> None:
    pair.daemon.busy = True
    for n in range(6):
        pair.push(writer, f"r{n}", 1)
    for _ in range(4):
        pair.exchange()
        pair.pass_time(0.5)
    assert len(pair.sent) == 1 + 1 + 4 + 2 + 1 + 1 + 1  # HELLO, OPEN, the credit, then less and less
    pair.daemon.busy = False
    pair.settle()
    assert pair.totals("r5") == [[6]]


def test_a_chunk_that_ran_although_the_client_was_told_busy_is_not_taken_for_anothers(
    pair: Pair, writer: Writer
) -> None:
    pair.push(writer, "a", 1)
    pair.deliver_up()
    busy = wire.Error(code="busy", text="no", in_reply_to=wire.Type.CHUNK, retry_after_seconds=0.5)
    pair.down.append(
        wire.frame(wire.control(wire.Type.ERROR, busy, flags=0x10, code=Code.BUSY, handle=writer.handle, seq=1))
    )
    pair.deliver_down()
    pair.push(writer, "b", 2)
    pair.settle()
    assert pair.totals("a", "b") == [[1], [3]]


def test_a_refusal_just_before_the_connection_breaks_leaves_no_hole(pair: Pair, writer: Writer) -> None:
    pair.push(writer, "a", 1)
    pair.push(writer, "bad", math.nan)
    pair.push(writer, "b", 2)
    pair.deliver_up()
    pair.deliver_down(1)  # the refusal, not the gap behind it
    assert pair.code("bad") is Code.NOT_FINITE
    pair.reconnect()
    assert pair.totals("a", "b") == [[1], [3]]


def test_a_number_is_not_used_again_while_an_error_for_it_is_on_its_way(pair: Pair, writer: Writer) -> None:
    pair.push(writer, "bad", math.nan)
    pair.push(writer, "b", 1)
    pair.push(writer, "c", 1)
    pair.deliver_up()
    sent = len(pair.sent)
    pair.deliver_down(2)
    pair.push(writer, "d", 1)
    assert len(pair.sent) == sent
    pair.exchange()
    assert [header.seq for header in pair.sent[sent:]] == [1, 2, 3]


def test_errors_behind_a_refusal_that_are_lost_do_not_stop_the_stream(pair: Pair, writer: Writer) -> None:
    pair.push(writer, "bad", math.nan)
    pair.push(writer, "b", 2)
    pair.deliver_up()
    pair.deliver_down(1)
    pair.down.clear()
    pair.settle()
    assert pair.totals("b") == [[2]]


def test_an_open_that_is_refused_fails_and_leaves_no_stream(pair: Pair) -> None:
    pair.daemon.refuse_opens = Code.NO_SLOTS
    pair.open()
    pair.exchange()
    assert pair.code("open s") is Code.NO_SLOTS
    assert pair.daemon.lives == {}


def test_an_open_that_is_too_early_is_tried_again(pair: Pair) -> None:
    pair.daemon.refuse_opens = Code.BUSY
    pair.open()
    pair.exchange()
    pair.daemon.refuse_opens = None
    pair.settle()
    assert pair.outcomes["open s"] is None


def test_a_session_that_ends_leaves_nothing_unresolved(pair: Pair, writer: Writer) -> None:
    pair.push(writer, "a", 1)
    pair.close(writer, "close")
    pair.open("other")
    pair.session.end(RecurdError("over"))
    pair.open("too late")
    assert {token for token, error in pair.outcomes.items() if isinstance(error, RecurdError)} == {
        "a",
        "open other",
        "open too late",
    }
    assert "close" in pair.outcomes


# --- chunks that may not wait for ever ---


@pytest.fixture
def real() -> Pair:
    pair = Pair(kind=Real)
    pair.exchange()
    return pair


def test_what_is_left_of_a_chunks_time_goes_with_it(pair: Pair, writer: Writer) -> None:
    pair.push(writer, "a", 1)
    pair.push(writer, "b", 1, expires=0.25)
    for n in range(3):
        pair.push(writer, f"c{n}", 1)  # the third is over the credit
    pair.push(writer, "d", 1, expires=0.25)
    pair.pass_time(0.2)
    pair.exchange()
    chunks = [header for header in pair.sent if header.type == wire.Type.CHUNK]
    assert [header.code for header in chunks] == [0, 250, 0, 0, 0, 49]


def test_a_chunk_that_is_late_before_it_leaves_fails_at_its_time(pair: Pair, writer: Writer) -> None:
    pair.daemon.busy = True
    pair.push(writer, "a", 1)
    pair.exchange()
    pair.push(writer, "late", 1, expires=0.1)
    pair.push(writer, "later", 1, expires=0.2)
    pair.daemon.busy = False
    deadline = pair.session.deadline()
    assert deadline is not None
    assert deadline <= 0.1
    pair.pass_time(0.11)
    assert pair.code("late") is Code.LATE
    assert "later" not in pair.outcomes
    pair.pass_time(0.11)
    assert pair.code("later") is Code.LATE
    pair.push(writer, "b", 2)
    pair.settle()
    assert pair.totals("a", "b") == [[1], [3]]
    assert [header.seq for header in pair.sent if header.type == wire.Type.CHUNK] == [1, 1, 2]


def test_a_chunk_is_late_without_any_connection(pair: Pair, writer: Writer) -> None:
    pair.disconnect()
    pair.push(writer, "late", 1, expires=0.5)
    pair.pass_time(1.0)
    assert pair.code("late") is Code.LATE


def test_a_stream_is_closed_when_the_last_chunk_before_was_late(pair: Pair, writer: Writer) -> None:
    pair.daemon.busy = True
    pair.push(writer, "late", 1, expires=0.4)
    pair.exchange()
    pair.close(writer, "close")
    pair.pass_time(0.5)
    pair.exchange()
    assert pair.code("late") is Code.LATE
    assert pair.outcomes["close"] is None


def test_a_chunk_sent_again_goes_with_its_old_number_however_late_it_is(pair: Pair, writer: Writer) -> None:
    pair.push(writer, "a", 1, expires=0.5)
    pair.deliver_up()  # accepted; the answer is lost
    pair.daemon.work()
    pair.daemon.replies.clear()
    pair.reconnect()
    last = [header for header in pair.sent if header.type == wire.Type.CHUNK][-1]
    assert (last.seq, last.code) == (1, 1)
    assert pair.totals("a") == [[1]]


def test_a_late_chunk_fails_alone_and_those_behind_it_run(real: Pair) -> None:
    writer = real.open()
    real.exchange()
    real.push(writer, "late", 1, expires=0.5)
    real.reset(writer, "reset")
    real.push(writer, "b", 2)
    real.deliver_up()
    real.pass_time(1.0)
    real.exchange()
    assert real.code("late") is Code.LATE
    assert real.outcomes["reset"] is None
    assert real.totals("b") == [[2]]
    assert (writer.backlog.last_seq, writer.backlog.generation) == (2, 2)


def test_an_error_that_crosses_the_repetition_of_its_chunk_is_not_that_of_the_repetition(real: Pair) -> None:
    writer = real.open()
    real.exchange()
    real.push(writer, "a", 1, expires=0.5)
    real.push(writer, "b", 2)
    real.deliver_up()  # accepted, and the connection breaks
    real.disconnect()
    real.pass_time(1.0)
    real.deliver_up()
    real.deliver_down()  # welcomed
    real.deliver_up()  # opened: the daemon has both, says so, and finds that it is too late
    real.daemon.work()
    real.deliver_down(1)  # OPENED: both are sent again
    assert [header.seq for header in real.sent[-2:]] == [1, 2]
    real.exchange()
    assert real.totals("a", "b") == [[1], [3]]  # in the time that was left: it was taken anew


# --- what does not speak our protocol ---


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=120), max_size=5), st.integers(0, 255), st.integers(0, 255))
def test_whatever_comes_never_raises_and_is_survived(frames: list[bytes], kind: int, flags: int) -> None:
    pair = Pair()
    pair.exchange()
    writer = pair.open()
    pair.push(writer, "a", 1)
    for body in frames:
        for frame in (body, wire.pack(kind, flags=flags, size=len(body), handle=1001, seq=1, generation=1) + body):
            pair.session.receive(frame, pair.now)
            pair.turn()
    pair.settle()
    assert "a" in pair.outcomes


# --- anything in any order ---

_STREAMS = ("s", "t")
_COMMON = st.one_of(
    st.tuples(st.just("push"), st.sampled_from(_STREAMS), st.integers(1, 9)),
    st.tuples(st.just("push"), st.just("s"), st.sampled_from([1, 2, 3, math.nan])),
    st.tuples(st.just("push"), st.sampled_from(_STREAMS), st.integers(1, 9), st.sampled_from([0.01, 0.3, 7.0])),
    st.tuples(st.just("deliver_up"), st.integers(1, 3)),
    st.tuples(st.just("deliver_down"), st.integers(1, 3)),
    st.tuples(st.just("work")),
)
_RARE = st.one_of(
    st.tuples(st.just("reset"), st.sampled_from(_STREAMS)),
    st.tuples(st.sampled_from(["get", "clone"]), st.sampled_from(_STREAMS)),
    st.tuples(st.sampled_from(["put", "reset_to"]), st.sampled_from(_STREAMS), st.integers(10, 99)),
    st.tuples(st.just("disconnect")),
    st.tuples(st.just("deliver_late")),
    st.tuples(st.just("lose_answers")),
    st.tuples(st.just("busy"), st.booleans()),
    st.tuples(st.just("pass_time"), st.sampled_from([0.05, 0.5, 6.0])),
    st.tuples(st.just("pass_time"), st.sampled_from([0.05, 0.5, 6.0])),
)
_LAST = st.one_of(
    st.tuples(st.just("close"), st.sampled_from(_STREAMS)),
    st.tuples(st.just("restart_daemon")),
)
_COURSES = st.builds(
    lambda first, last: first + last,
    st.lists(st.one_of(_COMMON, _COMMON, _COMMON, _RARE), min_size=10, max_size=100),
    st.lists(st.one_of(_COMMON, _COMMON, _RARE, _LAST), max_size=20),
)


class Course:
    """A pair under random operations, with what was asked of each stream in order."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.writers = {name: pair.open(name) for name in _STREAMS}
        pair.exchange()
        #: Token, what it asks for, and with which value.
        self.asked: dict[str, list[tuple[str, str, float]]] = {name: [] for name in _STREAMS}
        self.may_be_late: set[str] = set()
        self.closes = self.restarts = 0
        self.closed: set[str] = set()

    def do(self, name: str, *arguments: Any) -> None:
        if name == "push":
            stream, value, *expires = arguments
            token = self.ask(stream, name, value)
            self.may_be_late |= {token for _ in expires}
            self.pair.push(self.writers[stream], token, value, expires=expires[0] if expires else math.inf)
        elif name == "reset":
            (stream,) = arguments
            self.pair.reset(self.writers[stream], self.ask(stream, name, 0.0))
        elif name == "get":
            (stream,) = arguments
            self.pair.get(self.writers[stream], self.ask(stream, name, 0.0))
        elif name == "clone":
            (stream,) = arguments
            token = self.ask(stream, name, 0.0)
            self.pair.clone(self.writers[stream], token, f"clone {token}")
        elif name in ("put", "reset_to"):
            stream, value = arguments
            token = self.ask(stream, name, value)
            self.pair.give(self.writers[stream], token, wire.Operation[name.upper()], value)
        elif name == "close":
            self.closes += 1
            self.closed.add(arguments[0])
            self.pair.close(self.writers[arguments[0]], f"close {self.closes}")
        elif name == "work":
            self.pair.daemon.work()
        elif name == "lose_answers":
            self.pair.daemon.replies.clear()
            self.pair.down.clear()
        elif name == "busy":
            self.pair.daemon.busy = arguments[0]
        else:
            self.restarts += name == "restart_daemon"
            getattr(self.pair, name)(*arguments)

    def ask(self, stream: str, what: str, value: float) -> str:
        token = f"{stream}{len(self.asked[stream])}"
        self.asked[stream].append((token, what, value))
        return token

    def check(self) -> None:
        """Every answered chunk must show what exactly-once, in-order application of what was not refused gives."""
        assert all(f"close {n + 1}" in self.pair.outcomes for n in range(self.closes))
        for stream in _STREAMS:
            total, over = 0.0, False
            may_end = self.restarts or stream in self.closed
            for token, what, value in self.asked[stream]:
                outcome = self.pair.outcomes[token]  # a KeyError is a request that was never answered
                if isinstance(outcome, Refused) and outcome.code is Code.NOT_FINITE:
                    assert math.isnan(value)
                elif isinstance(outcome, Refused) and outcome.code is Code.LATE:
                    assert token in self.may_be_late
                elif isinstance(outcome, RecurdError):
                    assert may_end, f"nothing was lost, and yet: {outcome}"
                    if self.has_run(stream, token):
                        total = {"push": total + value, "get": total, "clone": total}.get(what, value)
                    else:
                        over = True
                else:
                    assert not over, "a lost stream went on"
                    total = self.check_one(token, what, value, total)

    def has_run(self, stream: str, token: str) -> bool:
        """Whether a request that failed had run, its answer lost: one behind it was answered before it failed."""
        decided = list(self.pair.outcomes)
        asked = [one for one, _, _ in self.asked[stream]]
        return any(
            decided.index(later) < decided.index(token) and not isinstance(self.pair.outcomes[later], RecurdError)
            for later in asked[asked.index(token) + 1 :]
        )

    def check_one(self, token: str, what: str, value: float, total: float) -> float:
        """Hold an answer against the total before it; the total after it."""
        outcome = self.pair.outcomes[token]
        if what == "push":
            assert outcome.ravel().tolist() == [total + value]
            return total + value
        if what == "get":
            assert outcome["h"].tolist() == [total]
            return total
        assert outcome is None
        if what == "clone" and not self.restarts:
            writer = self.pair.open(f"clone {token}", "resume")
            self.pair.get(writer, f"state of clone {token}")
            self.pair.exchange()
            assert self.pair.outcomes[f"state of clone {token}"]["h"].tolist() == [total]
        return total if what == "clone" else value


@pytest.mark.parametrize("kind", [Reference, Real])
@settings(max_examples=300, deadline=None)
@given(operations=_COURSES, credit=st.integers(1, 5))
def test_whatever_happens_each_chunk_runs_once_in_order_and_is_answered_once(
    kind: type[Any], operations: list[tuple[Any, ...]], credit: int
) -> None:
    pair = Pair(credit, kind)
    course = Course(pair)
    for operation in operations:
        course.do(*operation)
    pair.daemon.busy = False
    pair.deliver_late()
    pair.settle()
    course.check()


# --- models that are replaced ---


def test_a_welcome_that_nobody_asked_for_holds_for_streams_opened_from_then_on(pair: Pair, writer: Writer) -> None:
    assert pair.session.welcome is not None
    signature = writer.signature
    wide = CONTRACT | {"input": {"dtype": "float32", "shape": [2]}}
    welcome = msgspec.structs.replace(pair.session.welcome, models={"sum": wide})
    pair.daemon.say(pair.peer, wire.control(wire.Type.WELCOME, welcome))
    pair.deliver_down()

    second = pair.open("second")
    pair.exchange()

    assert pair.session.welcome == welcome
    assert second.signature is not None
    assert second.signature.width == 2
    assert writer.signature is signature


def test_a_stream_of_a_former_version_is_read_by_its_own_contract(pair: Pair) -> None:
    pair.daemon.former = CONTRACT | {"input": {"dtype": "float32", "shape": [3]}}

    writer = pair.open()
    pair.exchange()

    assert writer.signature is not None
    assert writer.signature.width == 3


# --- sent on to another daemon ---


def move(pair: Pair, *handles: int, to: str = "tcp://b:1", kind: int = 0, seq: int = 0) -> None:
    """The daemon says that these streams are elsewhere; another one, which has them, is connected to next."""
    body = wire.Error(code="moved", text="no", in_reply_to=kind, endpoint=to, group=f"to {to}")
    for handle in handles:
        record = wire.control(wire.Type.ERROR, body, code=Code.MOVED, handle=handle, seq=seq)
        pair.daemon.replies.append((pair.peer, wire.frame(record)))
    pair.deliver_down()


def test_a_client_goes_where_its_streams_are_with_all_of_them_and_sends_again_what_was_not_answered(pair: Pair) -> None:
    writers = [pair.open(name) for name in "ab"]
    pair.exchange()
    for writer in writers:
        for seq in (1, 2):
            pair.push(writer, f"{writer.stream}{seq}", seq)
    pair.lose()
    pair.sent.clear()
    move(pair, writers[0].handle, writers[1].handle)
    assert pair.session.redirect is not None
    assert pair.session.redirect.endpoint == "tcp://b:1"
    assert pair.session.is_connected  # at once
    pair.exchange()

    opens = [h for h in pair.sent if h.type == wire.Type.OPEN]
    assert len(opens) == 2
    assert [(h.handle, h.seq) for h in pair.sent if h.type == wire.Type.CHUNK] == [
        (writer.handle, seq) for writer in writers for seq in (1, 2)
    ]
    assert pair.totals("a1", "a2", "b1", "b2") == [[1], [3], [1], [3]]


def test_an_open_that_follows_says_with_which_group_the_stream_left(pair: Pair, writer: Writer) -> None:
    move(pair, writer.handle)
    pair.deliver_up()
    pair.deliver_down()
    (frame,) = [frame for frame in pair.up if wire.decode(frame)[0].type == wire.Type.OPEN]
    request = wire.decode_body(wire.decode(frame)[1], wire.Open)
    assert (request.mode, request.group) == ("resume", "to tcp://b:1")


def test_a_stream_that_is_sent_back_and_forth_ends_with_an_error(pair: Pair, writer: Writer) -> None:
    pair.push(writer, "x", 1)
    move(pair, writer.handle)
    for number in range(20):
        if writer.error is not None:
            break
        pair.now += 1
        pair.turn()
        frames = [wire.decode(frame)[0].type for frame in pair.up]
        pair.deliver_up(frames.index(wire.Type.HELLO) + 1)
        pair.deliver_down()
        opens = [header for header in pair.sent if header.type == wire.Type.OPEN]
        pair.up.clear()
        body = wire.Error(code="moved", text="no", in_reply_to=wire.Type.OPEN, endpoint=f"tcp://b:{number % 2 + 1}")
        record = wire.control(wire.Type.ERROR, body, code=Code.MOVED, seq=opens[-1].seq)
        pair.daemon.replies.append((pair.peer, wire.frame(record)))
        pair.deliver_down()
    assert isinstance(writer.error, Refused)
    assert writer.error.code is Code.MOVED
    assert number == Limits().redirects


def refuse_open(pair: Pair, *names: str, to: str = "tcp://b:1") -> None:
    """The daemon answers the OPENs of streams that are on their way with `moved`, and reads what else is."""
    frames, up = pair.up[:], []
    for frame in frames:
        header, payload = wire.decode(frame)
        if header.type == wire.Type.OPEN and wire.decode_body(payload, wire.Open).stream in names:
            body = wire.Error(code="moved", text=f"at {to}", in_reply_to=wire.Type.OPEN, endpoint=to)
            record = wire.control(wire.Type.ERROR, body, code=Code.MOVED, seq=header.seq)
            pair.daemon.replies.append((pair.peer, wire.frame(record)))
        else:
            up.append(frame)
    pair.up[:] = up
    pair.deliver_up()
    pair.deliver_down()


def test_one_stream_that_is_elsewhere_does_not_take_away_those_that_are_here(pair: Pair, writer: Writer) -> None:
    other = pair.session.open(wire.Open(stream="gone", model="sum"), "gone")
    pair.turn()
    refuse_open(pair, "gone")
    assert pair.session.redirect is None
    pair.push(writer, "x", 1)
    pair.exchange()
    assert pair.totals("x") == [[1]]
    assert "tcp://b:1" in other.trouble

    pair.session.close(writer, "closed")  # now nothing keeps the client here
    pair.exchange()
    pair.now += KEPT_SECONDS
    pair.turn()
    refuse_open(pair, "gone")
    assert pair.session.redirect is not None
    pair.exchange()
    assert other.is_open


def test_what_is_elsewhere_is_refused_when_others_stay_here(pair: Pair, writer: Writer) -> None:
    other = pair.session.open(wire.Open(stream="gone", model="sum"), "gone")
    begin = pair.now
    while other.error is None:
        pair.turn()
        refuse_open(pair, "gone")
        pair.now += KEPT_SECONDS
    assert begin + Limits().follow_seconds <= pair.now <= begin + Limits().follow_seconds + 2 * KEPT_SECONDS
    assert isinstance(other.error, Refused)
    assert (other.error.code, other.error.endpoint) == (Code.MOVED, "tcp://b:1")
    assert (pair.session.redirect, writer.error) == (None, None)
    pair.push(writer, "x", 1)
    pair.exchange()
    assert pair.totals("x") == [[1]]


def test_a_client_goes_where_its_streams_are_when_all_of_them_are_there(pair: Pair) -> None:
    writers = [pair.session.open(wire.Open(stream=name, model="sum"), name) for name in "ab"]
    pair.turn()
    refuse_open(pair, "a", "b")
    assert pair.session.redirect is not None
    pair.exchange()
    assert all(writer.is_open for writer in writers)


def test_a_stream_that_is_not_there_yet_is_waited_for_but_not_for_ever(pair: Pair, writer: Writer) -> None:
    pair.daemon.refuse_opens = Code.UNKNOWN_STREAM
    move(pair, writer.handle)
    pair.exchange()
    assert writer.error is None
    pair.daemon.refuse_opens = None
    pair.now += 1
    pair.exchange()
    assert writer.phase.value == "attached"

    pair.daemon.refuse_opens = Code.UNKNOWN_STREAM
    move(pair, writer.handle)
    pair.exchange()
    pair.pass_time(Limits().follow_seconds)
    pair.exchange()
    assert isinstance(writer.error, Unanswered)  # it may be where it was
