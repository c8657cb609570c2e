"""What only a GPU can show: the same tick on CUDA and on the CPU. Run with ``make test-gpu``."""

from pathlib import Path

import numpy as np
import pytest

from recurd.config import Tick
from recurd.errors import DeviceError
from recurd.model import Model, resolve_device
from recurd.scheduler import Shape
from recurd.verify import is_bit_exact
from recurrent import Network

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def device() -> str:
    try:
        return resolve_device("cuda")[0]
    except DeviceError as error:
        pytest.skip(f"no CUDA device: {error}")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Learned initial values, and a state of another dtype, so that there are two arenas; weights of a size that
    does not amplify rounding from step to step, which would measure the network and not the device."""
    return Network(hidden=64, learned=True, counter=True, spread=0.125).save(
        tmp_path_factory.mktemp("gpu") / "pump.onnx"
    )


def test_cuda_gives_what_the_cpu_gives_over_ragged_ticks(device: str, model_path: Path) -> None:
    """Random slots, lengths and fresh starts, 50 ticks: outputs and final states agree to float32 rounding."""
    slots = 64
    cpu, cuda = (Model.load(model_path, device=where, slots=slots) for where in ("cpu", device))
    random = np.random.default_rng(1)
    started = np.zeros(slots, np.bool_)
    for _ in range(50):
        chosen = random.permutation(slots)[: random.integers(1, slots)].astype(np.int64)
        lengths = random.integers(1, 20, len(chosen)).astype(np.int32)
        fresh = ~started[chosen] | (random.random(len(chosen)) < 0.1)
        shape = (len(chosen), int(lengths.max()), *cpu.contract.input.shape)
        steps = random.standard_normal(shape, dtype=np.float32)
        for a, b in zip(cpu.run(chosen, fresh, lengths, steps), cuda.run(chosen, fresh, lengths, steps), strict=True):
            for row, length in enumerate(lengths):
                np.testing.assert_allclose(b[row, :length], a[row, :length], rtol=1e-4, atol=1e-5)
        started[chosen] = True
    everything = np.flatnonzero(started)
    on_cpu, on_cuda = cpu.read(everything), cuda.read(everything)
    for name, state in on_cpu.items():
        np.testing.assert_allclose(on_cuda[name], state, rtol=1e-4, atol=1e-5)


def test_a_tick_on_cuda_leaves_the_rows_of_others_untouched(device: str, model_path: Path) -> None:
    """Bit for bit: the scatter writes the tick's slots and nothing else."""
    model = Model.load(model_path, device="cuda", slots=8)
    everything = np.arange(8)
    zeros = model.read(everything)
    random = np.random.default_rng(2)
    before = {name: random.standard_normal(state.shape).astype(state.dtype) for name, state in zeros.items()}
    model.write(everything, before)

    chosen = np.array([5, 2], np.int64)
    steps = random.standard_normal((2, 3, *model.contract.input.shape), dtype=np.float32)
    model.run(chosen, np.zeros(2, np.bool_), np.array([3, 1], np.int32), steps)

    after = model.read(everything)
    others = np.setdiff1d(everything, chosen)
    for name in before:
        np.testing.assert_array_equal(after[name][others], before[name][others])
        assert (after[name][chosen] != before[name][chosen]).any()


def test_in_ticks_of_one_shape_nobody_notices_on_cuda_who_shares_them(device: str, model_path: Path) -> None:
    """Bit for bit, as a strict daemon tries at its start; without one shape it holds on the CPU alone."""
    model = Model.load(model_path, device=device, slots=64)
    assert is_bit_exact(model, 64, Shape.of(model, Tick(rows=64, steps=20, strict=True)))
