"""What whoever runs the daemon asks of it over the wire: ADMIN messages, each answered by a REPORT or an ERROR.

A command is a row of a table. The engine's are carried out at once; those that the process has to carry out (it owns
files and models, the engine does not) are put out by :meth:`Admin.requests` and answered when they are done.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from recurd import wire
from recurd.errors import Broken, Code, Refused
from recurd.peers import Outbox, Peer

Body = TypeVar("Body")


class Request:
    """One ADMIN message, until it is answered."""

    __slots__ = ("_text", "command", "data", "header", "peer")

    def __init__(self, peer: Peer, header: wire.Header, payload: wire.Buffer) -> None:
        """Raises :class:`Refused` for a message that names no command."""
        self.peer = peer
        self.header = header
        self._text, self.data = wire.body_and_data(header, payload)
        self.command = wire.decode_body(self._text, wire.Admin).command

    def read(self, body: type[Body]) -> Body:
        """The command with its own keys. Raises :class:`Refused` (``bad_request``)."""
        return wire.decode_body(self._text, body)


#: Carries out a command at a time: the REPORT's body, and the data behind it. May raise Refused.
Command = Callable[[Request, float], tuple[Any, wire.Buffer]]


class Admin:
    """The table of commands. Owned by the engine."""

    def __init__(self, outbox: Outbox, commands: Mapping[str, Command], process_commands: Collection[str]) -> None:
        """``process_commands``: names of those that are put out by :meth:`requests`."""
        self._outbox = outbox
        self._commands = commands
        self._process_commands = frozenset(process_commands)
        self._requests: list[Request] = []

    def receive(self, header: wire.Header, payload: wire.Buffer, peer: Peer, now: float) -> None:
        """An ADMIN came. Raises :class:`Refused`."""
        peer.rights.demand("admin")
        request = Request(peer, header, payload)
        if request.command in self._process_commands:
            self._requests.append(request)
        elif (command := self._commands.get(request.command)) is not None:
            self.report(request, *command(request, now))
        else:
            names = ", ".join(sorted({*self._commands, *self._process_commands})) or "none"
            raise Refused(Code.BAD_REQUEST, f"there is no command '{request.command}' here, only {names}")

    def requests(self) -> list[Request]:
        """What the process is to do, asked since the last call; each is to be answered once, now or later."""
        requests, self._requests = self._requests, []
        return requests

    def report(self, request: Request, body: Any, data: wire.Buffer = b"") -> None:
        """Answer a request; ``body`` is a struct or a dict."""
        record = wire.control_with_data(wire.Type.REPORT, body, data, seq=request.header.seq)
        self._outbox.send_control(request.peer, record)

    def refuse(self, request: Request, error: Refused | Broken) -> None:
        """Answer a request with an error."""
        self._outbox.send_error(request.peer, request.header, error)
