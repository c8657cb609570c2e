"""A real daemon serving a model whose every output says what went into it, and a network that can be cut."""

import os
import re
import selectors
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from recurd import contract


def save_sum_model(path: Path, name: str = "sum") -> Path:
    """A contract model without a framework: a ReLU cell with all weights 1, so that y is the running sum of x >= 0.

    Its second head ``last`` gives the sum at the end of a chunk when ``name`` is "two".
    """
    two = name == "two"
    nodes = [
        helper.make_node("Transpose", ["input"], ["x"], perm=[1, 0, 2]),
        helper.make_node(
            "RNN", ["x", "w", "r", "", "lengths", "h"], ["y4", "h.next"], activations=["Relu"], hidden_size=1
        ),
        helper.make_node("Squeeze", ["y4", "axis"], ["y3"]),
        helper.make_node("Transpose", ["y3"], ["total"], perm=[1, 0, 2]),
    ]
    outputs = [helper.make_tensor_value_info("total", TensorProto.FLOAT, ["batch", "time", 1])]
    heads = [contract.Head(name="total", dtype="float32", shape=(1,), labels=("sum",))]
    if two:
        nodes.append(helper.make_node("Squeeze", ["h.next", "axis0"], ["last"]))
        outputs.append(helper.make_tensor_value_info("last", TensorProto.FLOAT, ["batch", 1]))
        heads.append(contract.Head(name="last", dtype="float32", shape=(1,), per="last"))
    graph = helper.make_graph(
        nodes,
        name,
        [
            helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", "time", 1]),
            helper.make_tensor_value_info("lengths", TensorProto.INT32, ["batch"]),
            helper.make_tensor_value_info("h", TensorProto.FLOAT, [1, "batch", 1]),
        ],
        [*outputs, helper.make_tensor_value_info("h.next", TensorProto.FLOAT, [1, "batch", 1])],
        [
            helper.make_tensor("w", TensorProto.FLOAT, [1, 1, 1], [1.0]),
            helper.make_tensor("r", TensorProto.FLOAT, [1, 1, 1], [1.0]),
            helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
            helper.make_tensor("axis0", TensorProto.INT64, [1], [0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    description = contract.Contract(
        name=name,
        input=contract.Input(dtype="float32", shape=(1,), features=("flow",)),
        heads=tuple(heads),
        states=(contract.State(name="h", output="h.next", dtype="float32", shape=(1, 1), batch_axis=1),),
        source=contract.Source(framework="none"),
        weights_sha256=contract.weights_sha256(model),
    )
    contract.attach(model, description)
    onnx.save(model, path)
    return path


class Daemon:
    """``recurd serve`` on a free loopback port (or the one given), ready when this returns."""

    def __init__(self, *arguments: str | Path, port: int = 0) -> None:
        command = [sys.executable, "-m", "recurd", "serve", *map(str, arguments)]
        command += ["--bind", f"tcp://127.0.0.1:{port or '*'}", "--device", "cpu", "--metrics", "", "--slots", "256"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        log = []
        for line in self.process.stderr:
            log.append(line)
            if found := re.search(r"bind=(tcp://127\.0\.0\.1:(\d+))", line):
                self.endpoint, self.port = found[1], int(found[2])
                break
        else:
            raise AssertionError("the daemon did not start:\n" + "".join(log))
        # Read on, or a talkative daemon would block on its full pipe.
        self._reader = threading.Thread(target=self.process.stderr.read, daemon=True)
        self._reader.start()

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self._end()

    def stop(self) -> None:
        """End it as a service manager would."""
        self.process.terminate()
        self._end()

    def _end(self) -> None:
        self.process.wait(20)
        self._reader.join(20)
        assert self.process.stderr is not None
        self.process.stderr.close()


class Proxy:
    """A TCP way to the daemon that can be cut, on a thread of its own."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._wake_in, self._wake_out = socket.socketpair()
        self._other: dict[socket.socket, socket.socket] = {}
        self._orders: list[str] = []
        self.connections = 0
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake_out, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Break every connection; new ones are taken."""
        self._order("cut")

    def close(self) -> None:
        self._order("stop")
        self._thread.join(20)
        for end in (self._listener, self._wake_in, self._wake_out):
            end.close()

    def _order(self, order: str) -> None:
        self._orders.append(order)
        self._wake_in.send(b"\0")

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._wake_out:
                    self._wake_out.recv(4096)
                elif key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj in self._other:
                    self._forward(key.fileobj)  # type: ignore[arg-type]
            orders, self._orders = self._orders, []
            if orders:
                for end in list(self._other):
                    self._drop(end)
            if "stop" in orders:
                self._selector.close()
                return

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        try:
            far = socket.create_connection(("127.0.0.1", self._target))
        except OSError:
            near.close()
            return
        self.connections += 1
        self._other |= {near: far, far: near}
        for end in (near, far):
            self._selector.register(end, selectors.EVENT_READ)

    def _forward(self, end: socket.socket) -> None:
        try:
            data = end.recv(65536)
            self._other[end].sendall(data)
        except OSError:
            data = b""
        if not data:
            self._drop(end)

    def _drop(self, end: socket.socket) -> None:
        if end in self._other:  # else dropped with its other end already
            for one in (end, self._other.pop(end)):
                self._other.pop(one, None)
                self._selector.unregister(one)
                one.close()


@pytest.fixture(scope="session")
def sum_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sum_model(tmp_path_factory.mktemp("models") / "sum.onnx")


@pytest.fixture(scope="session")
def two_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sum_model(tmp_path_factory.mktemp("models") / "two.onnx", "two")


@pytest.fixture(scope="session")
def daemon(sum_model: Path, two_model: Path) -> Iterator[Daemon]:
    """One daemon for all tests that do not harm it; each uses stream names of its own."""
    os.environ.pop("NOTIFY_SOCKET", None)
    daemon = Daemon(sum_model, two_model)
    yield daemon
    daemon.stop()


@pytest.fixture
def proxy(daemon: Daemon) -> Iterator[Proxy]:
    proxy = Proxy(daemon.port)
    yield proxy
    proxy.close()
