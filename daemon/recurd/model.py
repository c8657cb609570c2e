"""A loaded model on one device: session, binding and arenas. The only module that knows onnxruntime.

:class:`Model` runs ticks: the wrapped graph of :mod:`recurd.graph` over arenas that stay on the device. Nothing but the
chunk's input goes to the device and nothing but the heads comes back.
"""

import contextlib
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from recurd import graph
from recurd.contract import Contract, load
from recurd.errors import ContractError, DeviceError
from recurd.saving import Stamp

# onnxruntime reports to its maker unless this is set before it is imported; a sensor's daemon does not call home.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort

Array = npt.NDArray[Any]

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_FIRST_CUDA = "cuda:0"
#: With float16 weights in front of a MatMul this one makes onnxruntime 1.31 crash on the CPU while it loads.
DISABLED_OPTIMIZERS = ["FuseFp16InitializerToFp32NodeTransformer"]
_WITHOUT_CUDA = "recurd may be installed without the extra 'cuda' (pip install '.[cuda]' in a checkout)"


def resolve_device(wanted: str) -> tuple[str, str | None]:
    """The device to use for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, and with ``auto`` why it is not CUDA.

    Raises :class:`DeviceError` when ``cuda`` is asked for and cannot be had. Whether CUDA works is found by making a
    session: the runtime's list of providers says only what it was built for.
    """
    if wanted == "cpu":
        return "cpu", None
    device = _FIRST_CUDA if wanted in ("auto", "cuda") else wanted
    reason = _cuda_trouble(device)
    if reason is None:
        return device, None
    if wanted == "auto":
        return "cpu", reason
    raise DeviceError(f"device '{wanted}' cannot be had: {reason}")


def _cuda_trouble(device: str) -> str | None:
    """Why CUDA cannot be used, or ``None`` when it can."""
    if _CUDA not in ort.get_available_providers():
        return f"this onnxruntime is built without CUDA; {_WITHOUT_CUDA}"
    identity = onnx.helper.make_node("Identity", ["x"], ["y"])
    value = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy"]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([identity], "probe", value[:1], value[1:]),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=8,
    )
    try:
        # The failed load is told once, by us, not by the runtime on stderr; preload_dlls prints what it does not find.
        with _quiet(), contextlib.redirect_stdout(None):
            ort.preload_dlls()
            session = ort.InferenceSession(model.SerializeToString(), _options(1), providers=[_provider(device)])
            if _CUDA not in session.get_providers():
                return f"the CUDA libraries or an NVIDIA GPU and its driver are missing; {_WITHOUT_CUDA}"
            session.run(None, {"x": np.zeros(1, np.float32)})
    except Exception as error:  # the runtime raises its own unexported types
        return _first_line(error)
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of the runtime's default log on stderr; sessions have their own."""
    ort.set_default_logger_severity(4)
    try:
        yield
    finally:
        ort.set_default_logger_severity(2)  # as it is by default: it cannot be asked


def _provider(device: str) -> Any:
    if device == "cpu":
        return _CPU
    # TF32 would cost three digits of agreement with the framework the model was verified against.
    return (_CUDA, {"device_id": device.partition(":")[2] or "0", "use_tf32": "0"})


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # patterns are kept for every input shape, and ticks have many
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # Threads that spin between ticks take the cores from the loop and from clients beside it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


#: The most that is kept to read rows into.
_KEPT_BYTES = 1 << 24


class Model:
    """A model ready to run ticks. Owns its session, its arenas and the contents of its rows, not who has which slot."""

    def __init__(self, model: onnx.ModelProto, contract: Contract, *, device: str, slots: int, threads: int) -> None:
        """Build the session and the arenas, ``slots`` rows each."""
        self.contract = contract
        self.device = _FIRST_CUDA if device == "cuda" else device
        self.slots = slots
        self._scatter: graph.Scatter = "rows" if self.device == "cpu" else "elements"
        # One row more than there are slots, for rows that only fill up a tick.
        self._arenas = [(arena, self._allocate(arena, slots + 1)) for arena in graph.arenas(contract)]
        self._session = self._make_session(graph.wrap(model, contract, self._scatter), threads)
        self._check_placement()
        self._binding = self._session.io_binding()
        for arena, buffer in self._arenas:
            # The same buffer on both sides: this is what makes the scatter in place.
            self._binding.bind_ortvalue_input(arena.name, buffer)
            self._binding.bind_ortvalue_output(f"{arena.name}.next", buffer)
        self._readers = [
            _Reader(self._make_session(graph.row_reader(arena), 1), arena, buffer) for arena, buffer in self._arenas
        ]
        self._heads = [(head, np.dtype(head.dtype)) for head in contract.heads]

    @classmethod
    def load(cls, path: str | Path, *, device: str = "cpu", slots: int = 1024, threads: int = 0) -> "Model":
        """Load a contract file onto ``cpu``, ``cuda`` or ``cuda:N``. ``threads`` 0 means all cores.

        Raises :class:`ContractError` or :class:`DeviceError`, one sentence each.
        """
        model, contract = load(path)
        try:
            return cls(model, contract, device=device, slots=slots, threads=threads)
        except (ContractError, DeviceError) as error:
            raise type(error)(f"{path}: {error}") from error
        except Exception as error:  # the runtime raises its own unexported types
            raise ContractError(f"{path}: the runtime does not take it: {_first_line(error)}") from error

    @cached_property
    def _writers(self) -> list[ort.InferenceSession]:
        """A session for each arena; serving does not need them, so they are made when states are first written."""
        return [self._make_session(graph.row_writer(arena, self._scatter), 1) for arena, _ in self._arenas]

    @property
    def state_bytes(self) -> int:
        """Bytes that the slots of all arenas take on the device."""
        return self.slots * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one stream's state."""
        return sum(arena.width * np.dtype(arena.dtype).itemsize for arena, _ in self._arenas)

    def run(self, slots: Array, fresh: Array, lengths: Array, input: Array) -> list[Array]:
        """One tick: advance the state of every slot by its row's steps, in place.

        ``slots`` int64 ``[rows]``, distinct and in range, or the one behind the last, whose state is nobody's;
        ``fresh`` bool ``[rows]``: start from the initial state; ``lengths`` int32 ``[rows]``, each in ``[1, time]``;
        ``input`` ``[rows, time, *shape]``. Returns the heads in the contract's order, ``[rows, time, *shape]``
        (``[rows, *shape]`` for heads of the last step); what stands beyond a row's length means nothing. After an
        exception the state of these slots is unknown.
        """
        self._check_rows(slots, lengths, input)
        binding = self._binding
        binding.bind_cpu_input(graph.SLOTS, slots)
        binding.bind_cpu_input(graph.FRESH, fresh)
        binding.bind_cpu_input(self.contract.lengths, lengths)
        binding.bind_cpu_input(self.contract.input.name, input)
        rows_and_time = input.shape[:2]
        outputs = []
        for head, dtype in self._heads:
            shape = (*(rows_and_time if head.per == "step" else rows_and_time[:1]), *head.shape)
            output = np.empty(shape, dtype)
            binding.bind_output(head.name, "cpu", 0, dtype, shape, output.ctypes.data)
            outputs.append(output)
        self._session.run_with_iobinding(binding)
        return outputs

    def read(self, slots: Array) -> dict[str, Array]:
        """States of these slots by name, each ``[rows, *state.shape]``, copied to the host."""
        states: dict[str, Array] = {}
        for (arena, _), reader in zip(self._arenas, self._readers, strict=True):
            states |= arena.split(reader.rows(slots).copy())
        return {state.name: states[state.name] for state in self.contract.states}

    def write(self, slots: Array, states: dict[str, Array]) -> None:
        """Set the states of these slots; the reverse of :meth:`read`."""
        self._write_arenas(slots, [arena.join(states) for arena, _ in self._arenas])

    def _write_arenas(self, slots: Array, tables: list[Array]) -> None:
        """Set these rows of every arena, each table ``[n, width]``."""
        for (arena, buffer), session, rows in zip(self._arenas, self._writers, tables, strict=True):
            binding = session.io_binding()
            binding.bind_ortvalue_input(arena.name, buffer)
            binding.bind_cpu_input(graph.SLOTS, np.ascontiguousarray(slots, np.int64))
            binding.bind_cpu_input(graph.ROWS, np.ascontiguousarray(rows, arena.dtype))
            binding.bind_ortvalue_output(f"{arena.name}.next", buffer)
            session.run_with_iobinding(binding)

    def rows(self, slots: Array) -> list[bytes]:
        """Each slot's rows of all arenas as bytes, one after another: what a journal keeps of a state."""
        parts = [reader.rows(slots).view(np.uint8).reshape(len(slots), -1) for reader in self._readers]
        return [row.tobytes() for row in (parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1))]

    def write_rows(self, slots: Array, rows: list[bytes]) -> None:
        """Put rows back that :meth:`rows` gave, into any slots."""
        table = np.frombuffer(b"".join(rows), np.uint8).reshape(len(slots), -1)
        start = 0
        tables = []
        for arena, _ in self._arenas:
            size = arena.width * np.dtype(arena.dtype).itemsize
            tables.append(np.ascontiguousarray(table[:, start : start + size]).view(arena.dtype))
            start += size
        self._write_arenas(slots, tables)

    @cached_property
    def stamp(self) -> Stamp:
        """What the bits of its states depend on."""
        layout = ", ".join(f"{s.name} {s.dtype} {list(s.shape)}" for s in self.contract.states)
        provider = self.device.partition(":")[0]
        runtime = f"onnxruntime {ort.__version__}"
        return Stamp(self.contract.state_hash, layout, runtime, provider, self.contract.form_hash)

    def _check_rows(self, slots: Array, lengths: Array, input: Array) -> None:
        # The runtime aborts the process on zero rows, erases the state of a row of length zero, and on CUDA writes a
        # slot out of range into somebody else's.
        if not (len(slots) and slots.min() >= 0 and slots.max() <= self.slots):
            raise ValueError(f"a tick needs rows with slots in [0, {self.slots}]")
        if not (lengths.min() >= 1 and lengths.max() <= input.shape[1]):
            raise ValueError(f"a tick's lengths must lie in [1, {input.shape[1]}]")

    def _allocate(self, arena: graph.Arena, rows: int) -> Any:
        zeros = np.zeros((rows, arena.width), arena.dtype)
        if self.device == "cpu":
            return ort.OrtValue.ortvalue_from_numpy(zeros)
        return ort.OrtValue.ortvalue_from_numpy(zeros, "cuda", int(self.device.partition(":")[2]))

    def _make_session(self, model: onnx.ModelProto, threads: int) -> ort.InferenceSession:
        with _quiet():  # since 1.26 every session on CUDA warns that no plugin is registered for it, and none has to be
            session = ort.InferenceSession(
                model.SerializeToString(),
                _options(threads),
                providers=[_provider(self.device)],
                disabled_optimizers=DISABLED_OPTIMIZERS,
            )
        if self.device != "cpu" and _CUDA not in session.get_providers():
            raise DeviceError(f"the session on '{self.device}' fell back to the CPU")
        return session

    def _check_placement(self) -> None:
        """On CUDA the state's whole way must be on the GPU: one node elsewhere copies whole arenas at every tick."""
        if self.device == "cpu":
            return
        for assignment in self._session.get_provider_graph_assignment_info():
            if assignment.ep_name == _CUDA:
                continue
            for node in assignment.get_nodes():
                if node.op_type in _RECURRENT or (node.op_type in _STATE and node.name.startswith("recurd.")):
                    raise DeviceError(
                        f"node '{node.name}' ({node.op_type}) runs on {assignment.ep_name}, not on the GPU"
                    )


class _Reader:
    """Copies rows of one arena to the host. Owns its binding, and the buffer that they stand in until the next ones."""

    def __init__(self, session: ort.InferenceSession, arena: graph.Arena, buffer: Any) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._binding.bind_ortvalue_input(arena.name, buffer)
        self._rows = np.empty((0, arena.width), arena.dtype)

    def rows(self, slots: Array) -> Array:
        """The rows of these slots, ``[n, width]``; good until the next call."""
        rows = self._rows[: len(slots)]
        if len(rows) < len(slots):
            rows = np.empty((len(slots), self._rows.shape[1]), self._rows.dtype)
            if rows.nbytes <= _KEPT_BYTES:  # the memory of a new one costs as much as what is copied into it
                self._rows = rows
        self._binding.bind_cpu_input(graph.SLOTS, np.ascontiguousarray(slots, np.int64))
        self._binding.bind_output(graph.ROWS, "cpu", 0, rows.dtype, rows.shape, rows.ctypes.data)
        self._session.run_with_iobinding(self._binding)
        return rows


_RECURRENT = ("LSTM", "GRU", "RNN")
_STATE = ("Gather", "Where", "ScatterElements", "ScatterND")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
