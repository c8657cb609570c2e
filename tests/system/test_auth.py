"""Real daemons with CURVE: who gets in, who does not, and what a key that comes or goes does to those connected."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import zmq
from click.testing import CliRunner

import recurd
from dialogue import chunk, hello
from house import House, reload
from process import Dealer, Process
from recurd import auth
from recurd.cli import main
from recurd.errors import AuthError, Code, ExitCode
from recurd.keys import Credentials, new, read_pair, read_public
from recurd.stats import Stats
from recurrent import Network

PUMP = Network()


@pytest.fixture(scope="module")
def pump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return PUMP.save(tmp_path_factory.mktemp("models") / "pump.onnx", proof=True)


@pytest.fixture
def house(tmp_path: Path, pump: Path) -> House:
    return House(tmp_path, pump)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, pump: Path) -> House:
    return House(tmp_path_factory.mktemp("home"), pump)


@pytest.fixture(scope="module")
def daemon(home: House) -> Iterator[Process]:
    """One daemon for the tests that do not harm it."""
    with home.serve() as daemon:
        yield daemon.ready()


def draw(steps: int = 3, seed: int = 0) -> np.ndarray:
    return PUMP.draw(steps, np.random.default_rng(seed))


# --- getting in ---


def test_a_known_key_is_the_tenant_of_its_file_and_is_served(daemon: Process, home: House) -> None:
    with recurd.connect(daemon.endpoint, **home.keys("a")) as client:
        output = client.open("s").push(draw())

        assert client.server.tenant == "a"
        assert client.server.rights == ("reset", "state", "stream")
    np.testing.assert_allclose(output, PUMP.run(draw())[0]["output"], rtol=0, atol=1e-5)


async def test_the_asyncio_client_gets_in_likewise(daemon: Process, home: House) -> None:
    async with recurd.aio.connect(daemon.endpoint, **home.keys("b")) as client:
        output = await (await client.open("s-aio")).push(draw())

        assert client.server.tenant == "b"
    np.testing.assert_allclose(output, PUMP.run(draw())[0]["output"], rtol=0, atol=1e-5)


def test_an_unknown_key_is_told_so_at_once(daemon: Process, home: House) -> None:
    new("stranger", home.folder)
    before = daemon.metric("recurd_auth_failures_total")

    for connect in (recurd.connect, lambda *args, **keys: asyncio.run(enter(*args, **keys))):
        with pytest.raises(recurd.Refused, match=r"does not know this client's key \(") as caught:
            connect(daemon.endpoint, **home.keys("stranger"))
        assert caught.value.code is Code.FORBIDDEN

    assert daemon.metric("recurd_auth_failures_total") == before + 2


async def enter(endpoint: str, **keys: str) -> None:
    await recurd.aio.connect(endpoint, **keys)


def test_without_a_key_one_is_told_what_is_missing(daemon: Process) -> None:
    # Whoever of the two reads the other's greeting first hangs up; when that is the daemon we can only guess.
    with pytest.raises(recurd.RecurdError, match=r"give key and server_key \(--key|does it want keys \(--key"):
        recurd.connect(daemon.endpoint, timeout_seconds=2.0)


def test_a_wrong_server_key_is_a_hint_when_the_wait_is_over(daemon: Process, home: House) -> None:
    keys = home.keys("a") | {"server_key": str(home.folder / "b.key")}

    with pytest.raises(recurd.Unanswered, match="is it the server's right key"):
        recurd.connect(daemon.endpoint, timeout_seconds=1.0, **keys)


def test_a_daemon_without_authentication_takes_no_keys(pump: Path, home: House, tmp_path: Path) -> None:
    with Process(tmp_path, pump, "--bind", "tcp://127.0.0.1:*", "--metrics", "") as daemon:
        endpoint = daemon.ready().endpoint
        with pytest.raises(recurd.RecurdError, match=r"takes no keys there|does it take keys there"):
            recurd.connect(endpoint, timeout_seconds=2.0, **home.keys("a"))


def test_a_raw_connection_without_curve_gets_nothing(daemon: Process) -> None:
    with Dealer(daemon.endpoint, greet=False) as dealer:
        dealer.send(hello())

        assert dealer.socket.poll(500) == 0


def test_ipc_is_guarded_by_its_file_and_is_the_tenant_local(daemon: Process, home: House) -> None:
    with recurd.connect(f"ipc://{home.socket}") as client:
        assert client.server.tenant == "local"
        assert "admin" in client.server.rights
        client.open("s-ipc").push(draw())


def test_the_commands_take_keys_too(daemon: Process, home: House, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["--key", home.keys("a")["key"], "--server-key", read_public(home.folder / "server.key")]
    rows = home.folder / "rows.csv"
    np.savetxt(rows, draw(), delimiter=",")
    to = ["--endpoint", daemon.endpoint, "--timeout", "10"]

    command = [sys.executable, "-m", "recurd", "stream", *to, "--stream", "s-cli", "--no-header", *keys, str(rows)]
    lines = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout.splitlines()
    assert len(lines) == 3

    monkeypatch.setenv("RECURD_KEY", home.keys("b")["key"])
    monkeypatch.setenv("RECURD_SERVER_KEY", home.keys("b")["server_key"])
    few = ["--seconds", "0.2", "--warm-up-seconds", "0", "--streams", "4"]
    result = CliRunner().invoke(main, ["bench", *to, *few, "--json"])
    assert (result.exit_code, '"errors":{}' in result.stdout) == (0, True)

    monkeypatch.delenv("RECURD_SERVER_KEY")
    assert CliRunner().invoke(main, ["bench", *to, *few]).exit_code == ExitCode.USAGE
    monkeypatch.setenv("RECURD_SERVER_KEY", str(home.folder / "none.key"))
    assert CliRunner().invoke(main, ["stream", *to, "--stream", "x"]).exit_code == ExitCode.AUTH
    monkeypatch.setenv("RECURD_SERVER_KEY", home.keys("b")["server_key"])
    monkeypatch.setenv("RECURD_KEY", str(home.folder / "stranger-2.key_secret"))
    new("stranger-2", home.folder)
    result = CliRunner().invoke(main, ["bench", *to, *few])
    assert (result.exit_code, "does not know this client's key" in result.stderr) == (1, True)


@pytest.mark.parametrize("command", [["reload"], ["drain", "--cancel"], ["state", "export", "x"], ["bench"]])
def test_the_commands_say_that_keys_are_missing_or_too_many(
    daemon: Process, home: House, pump: Path, tmp_path: Path, command: list[str]
) -> None:
    missing = CliRunner().invoke(main, [*command, "--endpoint", daemon.endpoint, "--timeout", "2"])
    assert missing.exit_code in (1, ExitCode.DEVICE)
    assert "give key and server_key (--key" in missing.stderr or "want keys (--key" in missing.stderr
    stranger = tmp_path / "stranger.key_secret"
    new("stranger", tmp_path)
    flags = ["--key", str(stranger), "--server-key", str(home.folder / "server.key"), "--timeout", "20"]
    begin = time.monotonic()
    unknown = CliRunner().invoke(main, [*command, "--endpoint", daemon.endpoint, *flags])
    assert (unknown.exit_code, "does not know this client's key" in unknown.stderr) == (1, True)
    assert time.monotonic() - begin < 15


def test_a_daemon_that_lets_nobody_in_says_so_at_its_start(house: House) -> None:
    (house.folder / "recurd.toml").write_text(
        '[auth]\nkey = "server.key_secret"\n[durability]\ndirectory = "streams"\n'
    )
    with Process(house.folder, house._pump, "--config", house.folder / "recurd.toml", "--metrics", "") as daemon:
        daemon.ready()
        assert "event=nobody_may_connect" in daemon.log
        assert "event=journal_unused" in daemon.log
        assert "durability=off" in daemon.log


# --- apart from each other ---


class Curve(Dealer):
    """A connection of raw frames with a key."""

    def __init__(self, endpoint: str, credentials: Credentials, routing_id: bytes = b"") -> None:
        self._credentials, self._routing_id = credentials, routing_id
        super().__init__(endpoint, greet=False)

    def _prepare(self) -> None:
        for option, value in self._credentials.options().items():
            self.socket.setsockopt(option, value)
        if self._routing_id:
            self.socket.setsockopt(zmq.ROUTING_ID, self._routing_id)


def test_the_same_name_is_another_stream_of_each_tenant_and_handles_are_worth_nothing_to_others(
    daemon: Process, home: House
) -> None:
    x = draw(6)
    with (
        recurd.connect(daemon.endpoint, **home.keys("a")) as a,
        recurd.connect(daemon.endpoint, **home.keys("b")) as b,
        recurd.connect(f"ipc://{home.socket}") as local,
        Curve(daemon.endpoint, home.credentials("b")) as raw,
    ):
        streams = [client.open("shared") for client in (a, b, local)]
        for stream, cut in zip(streams, (2, 3, 5), strict=True):
            stream.push(x[:cut])
        for stream, cut in zip(streams, (2, 3, 5), strict=True):
            truth = PUMP.run(x)[0]["output"][cut:]
            np.testing.assert_allclose(stream.push(x[cut:]), truth, rtol=0, atol=1e-5)
        handle = streams[0]._writer.handle
        assert raw.ask(hello()).body["tenant"] == "b"
        for message in (chunk(handle, 3, x), chunk(handle, 1, x), (b"", b"")):
            answer = raw.ask(b"".join(message))
            assert answer.code in ("unknown_handle", "bad_frame")
        np.testing.assert_allclose(streams[0].push(x[:1]).shape, (1, 2))
        assert streams[0].last_seq == 3


def test_a_routing_id_that_a_client_chose_is_no_way_to_anothers_answers(daemon: Process, home: House) -> None:
    with Curve(daemon.endpoint, home.credentials("a"), routing_id=b"mine") as raw:
        assert raw.ask(hello()).code == "bad_request"


# --- keys that come and go ---


def test_a_key_that_comes_is_let_in_and_one_that_goes_is_cut_at_once(house: House) -> None:
    with house.serve() as daemon, ExitStack() as stack:
        endpoint = daemon.ready().endpoint
        a = stack.enter_context(recurd.connect(endpoint, **house.keys("a")))
        b = stack.enter_context(recurd.connect(endpoint, **house.keys("b")))
        mine, theirs = a.open("s"), b.open("s")
        mine.push(draw())
        new("c", house.folder)
        with pytest.raises(recurd.Refused, match="does not know this client's key"):
            recurd.connect(endpoint, **house.keys("c"))

        (house.folder / "c.key").rename(house.clients / "c.key")
        (house.clients / "a.key").unlink()
        reload(daemon)

        # Unanswered where the chunk and the word of it cross on the way.
        with pytest.raises((recurd.Refused, recurd.Unanswered), match="this key is not known here"):
            mine.push(draw())
        with pytest.raises(recurd.Refused, match="this key is not known here") as caught:
            mine.push(draw())
        assert caught.value.code is Code.FORBIDDEN
        theirs.push(draw())
        stack.enter_context(recurd.connect(endpoint, **house.keys("c"))).open("s").push(draw())
        with pytest.raises(recurd.Refused, match="does not know this client's key"):
            recurd.connect(endpoint, **house.keys("a"))


def test_rights_that_change_hold_for_connections_that_are_open(house: House) -> None:
    house.write()
    with house.serve() as daemon, recurd.connect(daemon.ready().endpoint, **house.keys("a")) as client:
        stream = client.open("hall-1")
        stream.reset()

        text = (house.folder / "recurd.toml").read_text()
        (house.folder / "recurd.toml").write_text(text + '[tenants.a]\nstreams = ["hall-*"]\nrights = ["stream"]\n')
        reload(daemon)

        with pytest.raises(recurd.Refused, match="has not the right 'reset'"):
            stream.reset()
        stream.push(draw())
        with pytest.raises(recurd.Refused, match="has streams like 'hall-\\*' only"):
            client.open("cellar")


@pytest.mark.parametrize("what", ["key", "right"])
def test_what_is_under_way_when_rights_go_is_called_refused_only_where_it_was_not_run(house: House, what: str) -> None:
    key = house.clients / "a.key"
    text = key.read_bytes()
    with house.serve() as daemon:
        daemon.ready()
        with recurd.connect(daemon.endpoint, timeout_seconds=2, **house.keys("a")) as client:
            stream = client.open("s")
            futures = [stream.submit(PUMP.draw(4000, np.random.default_rng(seed))) for seed in range(60)]
            futures[0].result(30)
            if what == "key":
                key.unlink()
            else:
                house.write('[tenants.a]\nrights = ["state"]\n')
            reload(daemon)
            errors = [future.exception(30) for future in futures]
        refused = sum(isinstance(error, recurd.Refused) for error in errors)
        assert {type(error) for error in errors} <= {type(None), recurd.Refused, recurd.Unanswered}
        key.write_bytes(text)
        house.write("")
        reload(daemon)
        with recurd.connect(daemon.endpoint, **house.keys("a")) as client:
            ran = client.open("s", mode="resume").last_seq
    assert errors.count(None) <= ran <= 60 - refused


def test_a_reload_that_cannot_be_read_leaves_everything_as_it_was(house: House) -> None:
    with house.serve() as daemon, recurd.connect(daemon.ready().endpoint, **house.keys("a")) as client:
        (house.clients / "a.key").unlink()
        (house.clients / "broken.key").write_text("")
        reload(daemon)

        assert "broken.key: has no public key" in daemon.log
        client.open("s").push(draw())
        (house.clients / "broken.key").unlink()
        text = (house.folder / "recurd.toml").read_text()
        (house.folder / "recurd.toml").write_text(
            text.replace('key = "server', '#key = "server').replace("clients", "#")
        )
        reload(daemon)
        assert "authentication is switched on and off by a new start only" in daemon.log
        client.open("t").push(draw())


def test_a_tenant_with_a_new_key_uses_both_until_the_old_one_goes(house: House) -> None:
    new("a-new", house.folder)
    text = (house.folder / "recurd.toml").read_text()
    section = f'[tenants.a]\nkey = "{read_public(house.folder / "a-new.key")}"\n'
    (house.folder / "recurd.toml").write_text(text + section)
    with house.serve() as daemon, recurd.connect(daemon.ready().endpoint, **house.keys("a")) as old:
        old.open("s").push(draw())
        with recurd.connect(daemon.endpoint, **house.keys("a-new")) as client:
            stream = client.open("s", mode="resume")
            (house.clients / "a.key").unlink()
            reload(daemon)
            stream.push(draw())

            assert (client.server.tenant, stream.last_seq) == ("a", 2)
        with pytest.raises(recurd.Refused, match="this key is not known"):
            old.open("t")


# --- starting ---


def test_beyond_loopback_a_key_is_enough(house: House) -> None:
    text = (house.folder / "recurd.toml").read_text()
    (house.folder / "recurd.toml").write_text(text.replace("tcp://127.0.0.1:*", "tcp://0.0.0.0:*"))
    with house.serve() as daemon:
        endpoint = daemon.ready().endpoint.replace("0.0.0.0", "127.0.0.1")
        with recurd.connect(endpoint, **house.keys("a")) as client:
            client.open("s").push(draw())
        with pytest.raises(recurd.RecurdError, match="key"):
            recurd.connect(endpoint, timeout_seconds=2.0)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda house: (house.folder / "server.key_secret").chmod(0o604), "everybody may read or change it"),
        (lambda house: (house.folder / "server.key_secret").write_text("x"), "has no secret key"),
        (lambda house: (house.folder / "server.key_secret").unlink(), "cannot be read: No such file"),
        (lambda house: (house.clients / "a.key").write_text('    public-key = "short"\n'), "not 40 characters of Z85"),
        (
            lambda house: (house.clients / "b.key").write_bytes((house.clients / "a.key").read_bytes()),
            "this key already",
        ),
    ],
)
def test_with_keys_that_are_not_good_it_does_not_start(house: House, harm: object, message: str) -> None:
    harm(house)  # type: ignore[operator]

    with house.serve() as daemon:
        assert daemon.wait() == ExitCode.AUTH
        assert message in daemon.log


def test_the_daemons_key_comes_from_systemds_credentials(house: House) -> None:
    (house.folder / "credentials").mkdir()
    (house.folder / "server.key_secret").rename(house.folder / "credentials" / "server.key_secret")
    text = (house.folder / "recurd.toml").read_text()
    file = house.folder / "recurd.toml"
    file.write_text(text.replace('"server.key_secret"', '"$CREDENTIALS_DIRECTORY/server.key_secret"'))
    with house.serve(CREDENTIALS_DIRECTORY=str(house.folder / "credentials")) as daemon:
        endpoint = daemon.ready().endpoint
        with recurd.connect(endpoint, **house.keys("a")) as client:
            client.open("s").push(draw())


class Booth:
    """A CURVE socket and its gate, as the server has them, without a daemon around them."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self.context = stack.enter_context(zmq.Context())
        _, secret = new("server", folder)
        self.stats = Stats()
        self.gate = auth.Gate(self.context, read_pair(secret), self.stats, stack)
        self.router = stack.enter_context(self.context.socket(zmq.ROUTER))
        self.router.setsockopt(zmq.LINGER, 0)

    def bind(self) -> str:
        self.router.bind("tcp://127.0.0.1:*")
        return self.router.getsockopt_string(zmq.LAST_ENDPOINT)


def test_the_check_at_the_start_finds_a_gate_that_works(tmp_path: Path) -> None:
    with ExitStack() as stack:
        booth = Booth(stack, tmp_path)
        booth.gate.secure(booth.router)

        booth.gate.check(booth.bind())

        assert (booth.gate.allowed, booth.stats.auth_failures) == (frozenset(), 0)


def test_the_check_at_the_start_finds_an_endpoint_without_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "_CHECK_SECONDS", 0.5)
    with ExitStack() as stack:
        booth = Booth(stack, tmp_path)
        endpoint = booth.bind()
        booth.gate.secure(booth.router)  # too late for an endpoint that is bound

        with pytest.raises(AuthError, match="a known key was not let in"):
            booth.gate.check(endpoint)


def test_the_check_at_the_start_finds_that_nobody_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "_CHECK_SECONDS", 0.5)
    with ExitStack() as stack:
        booth = Booth(stack, tmp_path)
        booth.gate.secure(booth.router)
        booth.gate.socket.unbind("inproc://zeromq.zap.01")

        with pytest.raises(AuthError, match="nobody decides who may connect"):
            booth.gate.check(booth.bind())


def test_the_check_at_the_start_finds_that_everybody_is_let_in(tmp_path: Path) -> None:
    """What libzmq does without a handler unless a domain is enforced: encryption, and no authentication."""
    with ExitStack() as stack:
        booth = Booth(stack, tmp_path)
        booth.gate.socket.unbind("inproc://zeromq.zap.01")
        booth.router.setsockopt(zmq.CURVE_SERVER, 1)
        booth.router.setsockopt(zmq.CURVE_SECRETKEY, read_pair(tmp_path / "server.key_secret").secret.encode())

        with pytest.raises(AuthError, match="a key that is not known was let in"):
            booth.gate.check(booth.bind())


def test_the_gate_answers_nothing_but_curve_in_its_own_domain(tmp_path: Path) -> None:
    with ExitStack() as stack:
        booth = Booth(stack, tmp_path)
        credentials = read_pair(tmp_path / "server.key_secret")
        booth.gate.allowed = frozenset({credentials.public})
        asker = stack.enter_context(booth.context.socket(zmq.REQ))
        asker.setsockopt(zmq.LINGER, 0)
        asker.connect("inproc://zeromq.zap.01")
        key = zmq.utils.z85.decode(credentials.public)

        def ask(*frames: bytes) -> bytes:
            asker.send_multipart(frames)
            assert booth.gate.socket.poll(5000)
            booth.gate.answer()
            answer: bytes = asker.recv_multipart()[2]
            return answer

        good = (b"1.0", b"1", b"recurd", b"127.0.0.1", b"", b"CURVE", key)
        assert ask(*good) == b"200"
        for place, value in ((0, b"2.0"), (2, b""), (2, b"other"), (5, b"NULL"), (5, b"PLAIN"), (6, b"\0" * 32)):
            assert ask(*good[:place], value, *good[place + 1 :]) == b"400"
        for frames in ((b"",), (b"1.0", b"1"), good[:6], (*good, b"")):
            assert ask(*frames) == b"400"
        assert booth.stats.auth_failures == 10


def test_a_check_of_the_configuration_looks_at_the_keys_as_the_start_does(house: House) -> None:
    command = [sys.executable, "-m", "recurd", "serve", "--config", str(house.folder / "recurd.toml"), "--check"]
    good = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (good.returncode, good.stderr) == (0, "")

    (house.folder / "server.key_secret").unlink()
    bad = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert bad.returncode == 77
    assert "server.key_secret: cannot be read" in bad.stderr
