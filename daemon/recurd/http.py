"""/metrics, /healthz and /readyz over HTTP: a small WSGI server on threads of its own.

The server's thread and the requests' threads only read: the registry (which reads Stats) and :class:`Health`.
"""

import socket
import sys
import threading
import time
from collections.abc import Iterable
from enum import Enum
from http import HTTPStatus
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from structlog.typing import FilteringBoundLogger

from recurd.config import split_address
from recurd.errors import AddressError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

TEXT = "text/plain; charset=utf-8"
INDEX = """recurd: recurrent networks for live streams
/metrics  for Prometheus
/healthz  200 while the daemon makes progress
/readyz   200 while new streams are taken
"""
#: Requests at a time; a further connection is closed at once.
MAX_REQUESTS = 16
#: How often the server's thread looks whether it shall stop.
STOP_POLL_SECONDS = 0.1


class Phase(Enum):
    """What the daemon is about; the value is what /readyz says."""

    LOADING = "loading: models are being loaded"
    READY = "ready"
    FULL = "full: no new stream is taken"
    DRAINING = "draining: the daemon is shutting down"


class Health:
    """How the daemon is. Owned and written by the server's main thread, read by HTTP requests.

    The tick loop calls :meth:`progress` on every pass, idle or not, more often than every ``stall_seconds``. All times
    are ``time.monotonic()``.
    """

    def __init__(self, stall_seconds: float) -> None:
        self.phase = Phase.LOADING
        self._stall_seconds = stall_seconds
        self._progress_at = 0.0

    def progress(self, now: float) -> None:
        """The tick loop has come round."""
        self._progress_at = now

    def healthz(self, now: float) -> tuple[HTTPStatus, str]:
        """Whether the tick loop lives; while models are loaded there is none, which is no illness."""
        age = now - self._progress_at
        if self.phase is not Phase.LOADING and age > self._stall_seconds:
            return HTTPStatus.SERVICE_UNAVAILABLE, f"stalled: no progress for {age:.1f} seconds"
        return HTTPStatus.OK, "ok"

    def readyz(self, now: float) -> tuple[HTTPStatus, str]:
        """Whether a new stream would be taken."""
        status, text = self.healthz(now)
        if status is not HTTPStatus.OK:
            return status, text
        return HTTPStatus.OK if self.phase is Phase.READY else HTTPStatus.SERVICE_UNAVAILABLE, self.phase.value


class Application:
    """The WSGI application; owns nothing."""

    def __init__(self, registry: CollectorRegistry, health: Health, log: FilteringBoundLogger) -> None:
        self._registry = registry
        self._health = health
        self._log = log

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        """Answer one request."""
        try:
            status, content_type, body = self._answer(environ)
        except Exception:
            self._log.exception("http_request_failed", path=environ.get("PATH_INFO", ""))
            status, content_type, body = HTTPStatus.INTERNAL_SERVER_ERROR, TEXT, b"internal: see the daemon's log\n"
        headers = [("Content-Type", content_type), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")]
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            headers.append(("Allow", "GET, HEAD"))
        start_response(f"{status.value} {status.phrase}", headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    def _answer(self, environ: "WSGIEnvironment") -> tuple[HTTPStatus, str, bytes]:
        path = environ.get("PATH_INFO", "")
        if path not in ("/", "/metrics", "/healthz", "/readyz"):
            return HTTPStatus.NOT_FOUND, TEXT, b"not found; there are /metrics, /healthz and /readyz\n"
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return HTTPStatus.METHOD_NOT_ALLOWED, TEXT, b"only GET and HEAD\n"
        if path == "/metrics":
            encode, content_type = choose_encoder(environ.get("HTTP_ACCEPT", ""))
            return HTTPStatus.OK, content_type, encode(self._registry)
        if path == "/":
            return HTTPStatus.OK, TEXT, INDEX.encode()
        check = self._health.healthz if path == "/healthz" else self._health.readyz
        status, text = check(time.monotonic())
        return status, TEXT, f"{text}\n".encode()


class HttpServer:
    """Serves an application at ``host:port`` from its own threads, from :meth:`start` until :meth:`stop`.

    Binds at once; raises :class:`AddressError`. A request that takes longer than ``request_seconds`` is cut.
    """

    def __init__(
        self, address: str, application: "WSGIApplication", log: FilteringBoundLogger, *, request_seconds: float
    ) -> None:
        host, port = split_address(address)
        try:
            self._server = _Server(host, port, log, request_seconds)
        except OSError as error:
            raise AddressError(f"metrics: cannot bind {address}: {error.strerror or error}") from error
        self._server.set_app(application)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=[STOP_POLL_SECONDS], name="http", daemon=True
        )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that are bound."""
        host, port = self._server.server_address[:2]
        return str(host), int(port)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Stop answering and free the address; requests under way are not waited for."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, host: str, port: int, log: FilteringBoundLogger, request_seconds: float) -> None:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = family
        self.log = log
        self.request_seconds = request_seconds
        self._free = threading.BoundedSemaphore(MAX_REQUESTS)
        super().__init__(address, _Handler)  # type: ignore[arg-type]  # IPv6 addresses have four parts

    def server_bind(self) -> None:
        """Bind without the name look-up of http.server, which hangs where there is no name server."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        # a time-out on the socket would bound one read only, not a client that sends a byte a second
        cut = threading.Timer(self.request_seconds, _cut, [request])
        cut.daemon = True
        cut.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            cut.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # what remains here is the network's: a client that went away or was cut
        self.log.debug("http_connection_failed", peer=client_address[0], error=repr(sys.exception()))


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        self.server.log.debug("http_request", text=format % args)  # type: ignore[attr-defined]

    def address_string(self) -> str:
        return str(self.client_address[0])


def _cut(request: socket.socket) -> None:
    try:
        request.shutdown(socket.SHUT_RDWR)
    except OSError:  # closed meanwhile
        return
