"""/metrics, /healthz and /readyz over a real socket."""

import http.client
import io
import socket
import time
from collections.abc import Callable, Iterator

import pytest
from prometheus_client import CollectorRegistry, Gauge

from recurd.config import Log
from recurd.errors import AddressError, ExitCode
from recurd.http import MAX_REQUESTS, Application, Health, HttpServer, Phase
from recurd.logs import open_log

STALL_SECONDS = 30.0
Get = Callable[..., tuple[int, str]]


@pytest.fixture
def health() -> Health:
    health = Health(STALL_SECONDS)
    health.phase = Phase.READY
    health.progress(time.monotonic())
    return health


@pytest.fixture
def lines() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Gauge("recurd_answer", "For this test.", registry=registry).set(42)
    return registry


@pytest.fixture
def server(registry: CollectorRegistry, health: Health, lines: io.StringIO) -> Iterator[HttpServer]:
    log = open_log(Log(), lines, {})
    server = HttpServer("127.0.0.1:0", Application(registry, health, log), log, request_seconds=5)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def get(server: HttpServer) -> Get:
    def get(path: str, method: str = "GET") -> tuple[int, str]:
        response = request(server, path, method)
        return response.status, response.read().decode()

    return get


def request(server: HttpServer, path: str, method: str = "GET", accept: str = "") -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(*server.address, timeout=5)
    connection.request(method, path, headers={"Accept": accept})
    return connection.getresponse()


def test_metrics_are_those_of_the_registry(get: Get) -> None:
    status, body = get("/metrics")

    assert status == 200
    assert "recurd_answer 42.0" in body


def test_prometheus_gets_the_format_it_asks_for(server: HttpServer) -> None:
    response = request(server, "/metrics", accept="application/openmetrics-text; version=1.0.0")

    assert response.getheader("Content-Type", "").startswith("application/openmetrics-text")
    assert response.read().endswith(b"# EOF\n")


def test_a_daemon_that_makes_progress_is_healthy_and_ready(get: Get) -> None:
    assert get("/healthz") == (200, "ok\n")
    assert get("/readyz") == (200, "ready\n")


@pytest.mark.parametrize("phase", [Phase.LOADING, Phase.FULL, Phase.DRAINING])
def test_a_daemon_that_takes_no_streams_is_healthy_but_not_ready_and_says_why(
    get: Get, health: Health, phase: Phase
) -> None:
    health.phase = phase

    assert get("/healthz") == (200, "ok\n")
    assert get("/readyz") == (503, phase.value + "\n")


def test_a_stalled_daemon_is_neither_healthy_nor_ready(get: Get, health: Health) -> None:
    health.progress(time.monotonic() - STALL_SECONDS - 1)

    for path in ("/healthz", "/readyz"):
        status, body = get(path)
        assert status == 503
        assert body.startswith("stalled: no progress for 31.")


def test_loading_a_model_for_long_is_not_a_stall() -> None:
    health = Health(STALL_SECONDS)

    assert health.healthz(1e6)[0] == 200
    assert health.readyz(1e6) == (503, "loading: models are being loaded")


def test_the_index_names_the_pages_and_others_are_not_found(get: Get) -> None:
    status, index = get("/")

    assert status == 200
    for path in ("/metrics", "/healthz", "/readyz"):
        assert path in index
    assert get("/admin")[0] == 404


def test_only_reading_is_allowed(server: HttpServer) -> None:
    response = request(server, "/metrics", "POST")

    assert (response.status, response.getheader("Allow")) == (405, "GET, HEAD")


def test_a_head_request_has_the_headers_and_no_body(server: HttpServer) -> None:
    response = request(server, "/healthz", "HEAD")

    assert (response.status, response.getheader("Content-Length"), response.read()) == (200, "3", b"")


def test_a_bug_is_a_500_without_detail_and_a_traceback_in_the_log(
    get: Get, registry: CollectorRegistry, lines: io.StringIO
) -> None:
    class Failing:
        def collect(self) -> list[None]:
            raise ZeroDivisionError("a secret")

    registry._collector_to_names[Failing()] = []  # type: ignore[index]  # registering would collect at once

    status, body = get("/metrics")

    assert status == 500
    assert "secret" not in body
    assert "event=http_request_failed" in lines.getvalue()
    assert "ZeroDivisionError: a secret" in lines.getvalue()


def test_a_client_that_takes_its_time_is_cut(registry: CollectorRegistry, health: Health, lines: io.StringIO) -> None:
    log = open_log(Log(), lines, {})
    server = HttpServer("127.0.0.1:0", Application(registry, health, log), log, request_seconds=0.1)
    server.start()

    with socket.create_connection(server.address, timeout=5) as slow:
        slow.sendall(b"GET /metrics HT")
        assert slow.recv(100) == b""
    server.stop()


def test_connections_beyond_the_bound_are_closed_and_later_ones_served(server: HttpServer, get: Get) -> None:
    idle = [socket.create_connection(server.address, timeout=5) for _ in range(MAX_REQUESTS)]

    with socket.create_connection(server.address, timeout=5) as one_more:
        assert one_more.recv(100) == b""

    for connection in idle:
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""  # the request's thread is done with it
        connection.close()
    assert eventually(lambda: get("/healthz")[0] == 200)


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true within five seconds (a refused connection is: not yet)."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if condition():
                return True
        except (http.client.HTTPException, OSError):
            continue
    return False


def test_garbage_is_answered_and_the_next_request_served(server: HttpServer, get: Get) -> None:
    with socket.create_connection(server.address, timeout=5) as garbage:
        garbage.sendall(b"\x00\xff\r\n\r\n")
        assert b"400" in garbage.recv(1000)

    assert get("/healthz")[0] == 200


def test_an_address_in_use_is_told_in_one_sentence(server: HttpServer) -> None:
    address = f"127.0.0.1:{server.address[1]}"
    log = open_log(Log(), io.StringIO(), {})

    with pytest.raises(AddressError, match=f"^metrics: cannot bind {address}: Address already in use$") as caught:
        HttpServer(address, lambda environ, start_response: [], log, request_seconds=1)

    assert caught.value.exit_code is ExitCode.ADDRESS


def test_a_stopped_server_frees_its_address(registry: CollectorRegistry, health: Health) -> None:
    log = open_log(Log(), io.StringIO(), {})
    first = HttpServer("127.0.0.1:0", Application(registry, health, log), log, request_seconds=1)
    address = f"127.0.0.1:{first.address[1]}"
    first.start()
    first.stop()

    second = HttpServer(address, Application(registry, health, log), log, request_seconds=1)

    second.stop()
