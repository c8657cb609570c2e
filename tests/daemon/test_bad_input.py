"""Everything a client can do wrong, over a real socket; beside it a witness stream that must not notice anything."""

import random
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import numpy as np
import pytest
import zmq

from dialogue import chunk, closing, hello, opening, ping, reset
from process import Dealer, Process, eventually
from recurd import wire
from recurd.errors import ContractError
from recurd.loading import fingerprint
from recurd.wire import Flag, Type
from recurrent import Array, Network, States

PUMP = Network()
CONFIG = """
bind = ["tcp://127.0.0.1:0"]
metrics = "127.0.0.1:0"
slots = 40
[limits]
streams = 30
stream_credit = 8
chunk_steps = 64
message_bytes = 65536
[zeromq]
send_high_water_mark = 400
"""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("daemon")
    (folder / "recurd.toml").write_text(CONFIG)
    with Process(folder, PUMP.save(folder / "pump.onnx"), "--config", folder / "recurd.toml") as process:
        yield process.ready()
        assert process.stop(signal.SIGTERM) == 0, process.log
        assert "Traceback" not in process.log


class Witness:
    """A stream on a connection of its own."""

    def __init__(self, endpoint: str) -> None:
        self.dealer = Dealer(endpoint)
        self.handle = self.dealer.handle("witness")
        self.random = np.random.default_rng(0)
        self.seq = 0
        self.states: States | None = None

    def goes_on(self) -> None:
        """One more chunk gives exactly what follows from all before."""
        self.seq += 1
        x = PUMP.draw(3, self.random)
        reply = self.dealer.ask(wire.frame(chunk(self.handle, self.seq, x, ack=self.seq - 1)))
        expected, self.states = PUMP.run(x, self.states)
        np.testing.assert_allclose(reply.output, expected["output"], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def witness(daemon: Process) -> Iterator[Witness]:
    witness = Witness(daemon.endpoint)
    with witness.dealer:
        yield witness


@pytest.fixture
def dealer(daemon: Process, witness: Witness) -> Iterator[Dealer]:
    """A connection to do harm on; afterwards the daemon must live and the witness go on."""
    witness.goes_on()
    with Dealer(daemon.endpoint) as dealer:
        yield dealer
    witness.goes_on()
    assert daemon.process.poll() is None
    assert daemon.metric("recurd_internal_errors_total") == 0


@pytest.fixture
def handle(dealer: Dealer, request: pytest.FixtureRequest) -> Iterator[int]:
    """A stream of that connection, closed afterwards."""
    handle = dealer.handle(request.node.name[:200])
    yield handle
    dealer.send(closing(handle, seq=2**40))
    while dealer.take().header.seq != 2**40:
        pass


X: Array = PUMP.draw(4, np.random.default_rng(1))


def still_fresh(dealer: Dealer, handle: int) -> None:
    """Nothing happened to the stream: its first chunk starts it."""
    reply = dealer.ask(wire.frame(chunk(handle, 1, X)))
    assert reply.flags == Flag.FRESH
    np.testing.assert_allclose(reply.output, PUMP.run(X)[0]["output"], rtol=0, atol=1e-5)


BODY = b'{"stream":"\xff","model":"p"}'
NOT_UTF8 = wire.pack(Type.OPEN, size=len(BODY)) + BODY

FRAMES = {
    "nothing": (b"", "bad_frame"),
    "a letter": (b"R", "bad_frame"),
    "truncated header": (ping(1)[:47], "bad_frame"),
    "wrong magic": (b"CR" + ping(1)[2:], "bad_frame"),
    "http": (b"GET / HTTP/1.1\r\nHost: recurd\r\nUser-Agent: curl/8.0\r\n\r\n", "bad_frame"),
    "version 0": (b"RC\x00" + ping(1)[3:], "bad_version"),
    "version 2": (b"RC\x02" + ping(1)[3:], "bad_version"),
    "more than announced": (ping(1) + b"x", "bad_frame"),
    "less than announced": (wire.pack(Type.OPEN, size=2**32 - 1), "bad_frame"),
    "unknown type": (wire.pack(0x77), "unknown_type"),
    "a daemon's type": (wire.pack(Type.WELCOME), "unknown_type"),
    "no records": (wire.pack(Type.MULTI), "bad_frame"),
    "too many records": (wire.pack(Type.MULTI, steps=2**32 - 1, size=48) + ping(1), "bad_frame"),
    "a multi in a multi": (wire.multi([(wire.pack(Type.MULTI), b"")]), "bad_frame"),
    "a body that is none": (wire.pack(Type.OPEN, size=3) + b"{{{", "bad_request"),
    "a body not in UTF-8": (NOT_UTF8, "bad_request"),
    "a body without end": (wire.pack(Type.HELLO, size=60_000) + b"[" * 60_000, "bad_request"),
    "an unknown handle": (wire.frame(chunk(12345, 1, X)), "unknown_handle"),
    "a reset of nothing": (wire.frame(reset(2**64 - 1, 1)), "unknown_handle"),
    "a close of nothing": (closing(0), "unknown_handle"),
    "an unknown model": (opening("s", "pomp"), "unknown_model"),
    "an empty name": (opening(""), "bad_name"),
    "a name too long": (opening("x" * 256), "bad_name"),
    "a name of two lines": (opening("a\nb"), "bad_name"),
}


@pytest.mark.parametrize("kind", FRAMES)
def test_a_bad_message_is_answered_with_its_code_and_counted(daemon: Process, dealer: Dealer, kind: str) -> None:
    frame, code = FRAMES[kind]
    series = f'recurd_refused_total{{code="{code}"}}'
    before = daemon.metric(series)

    assert dealer.ask(frame).code == code

    assert daemon.metric(series) == before + 1
    assert dealer.ask(ping(7)).header.seq == 7, "the connection lives"


CHUNKS = {
    "wrong width": ({"x": np.zeros((2, 4), np.float32)}, "width"),
    "wrong dtype": ({"x": np.zeros((2, 3), np.int64)}, "dtype"),
    "no such dtype": ({"x": X, "dtype": 99}, "dtype"),
    "empty": ({"x": X[:0], "width": 3}, "empty"),
    "too long": ({"x": np.zeros((65, 3), np.float32)}, "too_long"),
    "longer than numbers go": ({"x": X, "steps": 2**32 - 1}, "too_long"),
    "fewer steps than announced": ({"x": X, "steps": 5}, "bad_frame"),
    "more steps than announced": ({"x": X, "steps": 3}, "bad_frame"),
    "NaN": ({"x": np.where(X[2, 1] == X, np.float32(np.nan), X)}, "not_finite"),
    "infinity": ({"x": np.where(X[0, 0] == X, np.float32(np.inf), X)}, "not_finite"),
    "signalling NaN": ({"x": np.frombuffer(struct.pack("<3I", 0, 0x7F800001, 0), "<f4").reshape(1, 3)}, "not_finite"),
    "a gap": ({"x": X, "seq": 3}, "gap"),
    "number 0": ({"x": X, "seq": 0}, "gap"),
    "the last number there is": ({"x": X, "seq": 2**64 - 1}, "gap"),
    "an old generation": ({"x": X, "generation": 0}, "stale"),
    "a generation to come": ({"x": X, "generation": 2}, "stale"),
}


@pytest.mark.parametrize("joined", [False, True], ids=["alone", "joined"])
@pytest.mark.parametrize("kind", CHUNKS)
def test_a_bad_chunk_is_refused_with_its_code_and_its_stream_lives(
    daemon: Process, dealer: Dealer, handle: int, kind: str, joined: bool
) -> None:
    options, code = CHUNKS[kind]
    options = {"seq": 1} | options
    series = f'recurd_refused_total{{code="{code}"}}'
    before = daemon.metric(series)
    record = chunk(handle, options.pop("seq"), options.pop("x"), **options)

    assert dealer.ask(wire.multi([record]) if joined else wire.frame(record)).code == code

    assert daemon.metric(series) == before + 1
    still_fresh(dealer, handle)


def test_a_message_of_several_frames_is_no_message(dealer: Dealer, handle: int) -> None:
    record = chunk(handle, 1, X)
    for parts in ((b"", wire.frame(record)), record, (ping(1), ping(2)), (b"", b"", b""), (b"x",) * 1000):
        assert dealer.ask(*parts).code == "bad_frame"
    still_fresh(dealer, handle)


def test_without_hello_nothing_is_taken(daemon: Process, dealer: Dealer, handle: int) -> None:
    with Dealer(daemon.endpoint, greet=False) as stranger:
        for frame in (ping(1), opening("s"), wire.frame(chunk(handle, 1, X)), closing(handle)):
            assert stranger.ask(frame).code == "hello_required"
        assert stranger.ask(b"\0").code == "bad_frame"
        assert stranger.ask(hello()).type == Type.WELCOME
        assert stranger.ask(wire.frame(chunk(handle, 1, X))).code == "detached"
    still_fresh(dealer, handle)


def test_more_streams_than_allowed_are_refused_and_those_there_are_live(dealer: Dealer, handle: int) -> None:
    opened = []
    while (reply := dealer.ask(opening(f"many {len(opened)}"))).type == Type.OPENED:
        opened.append(reply.header.handle)

    assert reply.code == "too_many_streams"
    assert 20 < len(opened) < 30
    still_fresh(dealer, handle)
    for one in opened:
        assert dealer.ask(closing(one)).type == Type.CLOSED


def test_more_in_flight_than_the_credit_is_refused_and_what_is_within_it_comes(dealer: Dealer, handle: int) -> None:
    dealer.send(wire.multi([chunk(handle, seq, X) for seq in range(1, 13)]))
    answers = [dealer.take() for _ in range(12)]

    assert sorted(r.header.seq for r in answers if r.type == Type.RESULT) == list(range(1, 9))
    assert [r.code for r in answers if r.code] == ["credit", "gap", "gap", "gap"]


def test_a_duplicate_gets_the_same_answer_and_changes_nothing(dealer: Dealer, handle: int) -> None:
    first = dealer.ask(wire.frame(chunk(handle, 1, X)))
    for _ in range(20):
        again = dealer.ask(wire.frame(chunk(handle, 1, np.full_like(X, 7))))
        assert (again.payload, again.flags) == (first.payload, Flag.FRESH | Flag.DUPLICATE)
    y = dealer.ask(wire.frame(chunk(handle, 2, X))).output

    np.testing.assert_allclose(y, PUMP.run(np.concatenate([X, X]))[0]["output"][4:], rtol=0, atol=1e-5)


def test_a_frame_over_the_limit_costs_its_sender_the_connection_and_nobody_else(
    daemon: Process, dealer: Dealer, handle: int
) -> None:
    with Dealer(daemon.endpoint) as greedy:
        events = greedy.socket.get_monitor_socket()
        greedy.send(b"x" * 65_537)
        assert events.poll(30_000), "it is disconnected"
        assert greedy.ask(ping(1)).code == "hello_required", "a new connection, not known yet"
        greedy.socket.disable_monitor()
        events.close()
    still_fresh(dealer, handle)


def test_a_frame_just_within_the_limit_is_read(dealer: Dealer) -> None:
    assert dealer.ask(b"x" * 65_536).code == "bad_frame"


def test_random_frames_are_all_answered(dealer: Dealer, handle: int) -> None:
    r = random.Random(2)
    good = [
        ping(1),
        hello(),
        opening("s", "nope"),
        wire.frame(chunk(handle, 1, X)),
        wire.multi([chunk(handle, 9, X)] * 3),
    ]
    for _ in range(30):
        frames = [_damaged(r, good) for _ in range(100)]
        for frame in frames:
            dealer.send(frame)
        dealer.send(ping(2**50))
        count = 0
        while dealer.take().type != Type.PONG:
            count += 1
        assert count >= 100, "each was answered"


def _damaged(r: random.Random, good: list[bytes]) -> bytes:
    """Noise, or a good frame with some bytes changed: none that opens, closes or runs anything."""
    if r.random() < 0.3:
        return r.randbytes(r.randint(0, 200))
    data = bytearray(r.choice(good))
    for _ in range(r.randint(1, 4)):
        data[r.randrange(2)] = r.randrange(256)
        data[r.randrange(len(data))] ^= 1 << r.randrange(8)
    data[0:2] = r.choice((b"RC", bytes(data[0:2])))
    data[8:12] = ((len(data) - r.choice((47, 49, 0))) % 2**32).to_bytes(4, "little")  # its size lies
    return bytes(data)


def test_a_peer_that_never_reads_loses_its_answers_and_holds_up_nobody(
    daemon: Process, dealer: Dealer, handle: int, witness: Witness
) -> None:
    deaf = Dealer(daemon.endpoint)
    with deaf:
        deaf.socket.setsockopt(zmq.RCVHWM, 1)
        series = 'recurd_send_failures_total{reason="again"}'
        before = daemon.metric(series)

        def fill() -> bool:
            for seq in range(200):
                deaf.send(hello(seq=seq))
            witness.goes_on()
            return daemon.metric(series) > before

        eventually(fill)
    still_fresh(dealer, handle)


def test_connections_that_speak_no_zeromq_hold_up_nobody(daemon: Process, dealer: Dealer, witness: Witness) -> None:
    host, port = daemon.endpoint.removeprefix("tcp://").split(":")
    with ExitStack() as stack:
        for noise in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 500, random.Random(3).randbytes(100_000)):
            raw = stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
            with suppress(ConnectionError):
                raw.sendall(noise)
            witness.goes_on()
            assert dealer.ask(ping(1)).type == Type.PONG


def test_a_model_path_that_cannot_be_looked_at_is_said_in_a_sentence() -> None:
    with pytest.raises(ContractError, match="cannot be read: File name too long"):
        fingerprint("x" * 300)
