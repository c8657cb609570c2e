"""A daemon with keys: its folder, its clients and its configuration."""

import signal
from pathlib import Path

from process import Process, eventually
from recurd.keys import Credentials, new, read_credentials


class House:
    """A folder with a daemon's key, its clients' keys and its configuration."""

    def __init__(self, folder: Path, pump: Path) -> None:
        self.folder = folder
        self.clients = folder / "clients"
        self._pump = pump
        new("server", folder)
        for name in ("a", "b"):
            self.add(name)
        self.write()

    def add(self, name: str) -> None:
        """Make a client's keys, and let it in."""
        public, _ = new(name, self.folder)
        self.clients.mkdir(exist_ok=True)
        (self.clients / public.name).write_bytes(public.read_bytes())

    def write(self, text: str = "") -> None:
        (self.folder / "recurd.toml").write_text(
            f'bind = ["tcp://127.0.0.1:*", "ipc://{self.socket}"]\nmetrics = "127.0.0.1:0"\n'
            f'[auth]\nkey = "server.key_secret"\nclients = "clients"\n[[models]]\npath = "{self._pump}"\n{text}'
        )

    @property
    def socket(self) -> Path:
        return self.folder / "socket"

    def serve(self, **environment: str) -> Process:
        return Process(self.folder, "--config", self.folder / "recurd.toml", **environment)

    def keys(self, name: str) -> dict[str, str]:
        return {"key": str(self.folder / f"{name}.key_secret"), "server_key": str(self.folder / "server.key")}

    def credentials(self, name: str) -> Credentials:
        credentials = read_credentials(**self.keys(name))
        assert credentials is not None
        return credentials


def reload(daemon: Process) -> None:
    """Have it read its configuration again, and wait until it has, or could not."""

    def count() -> int:
        return daemon.log.count("configuration_read") + daemon.log.count("reload_failed")

    before = count()
    daemon.process.send_signal(signal.SIGHUP)
    eventually(lambda: count() > before)
