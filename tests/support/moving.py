"""Commands to a daemon without sockets, as whoever runs it gives them."""

import json
from typing import Any

from dialogue import Desk, Reply, admin
from recurd.wire import Type


class Operator:
    """Gives commands to a desk."""

    def __init__(self, desk: Desk) -> None:
        self._caller = desk.connect("operator")

    def ask(self, command: str, data: bytes = b"", **keys: Any) -> Any:
        reply = self.reply(command, data, **keys)
        assert reply.type == Type.REPORT, reply
        text = reply.payload[: len(reply.payload) - reply.header.width]
        return json.loads(text)

    def reply(self, command: str, data: bytes = b"", **keys: Any) -> Reply:
        self._caller.take()
        return self._caller.ask(admin(command, data, **keys))

    def export(self, group: str, **keys: Any) -> bytes:
        reply = self.reply("export", group=group, **({"start": 0, "max_bytes": 10**6} | keys))
        assert reply.type == Type.REPORT, reply
        return reply.payload[len(reply.payload) - reply.header.width :]
