"""Every tick in one shape ([tick] strict): the same bits whoever shares it; nobody notices the rows that fill up."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from dialogue import Desk, chunk, hello
from process import Dealer, Process
from recurd.config import Config, Limits, Tick
from recurd.errors import ConfigError, ExitCode
from recurd.model import Model
from recurd.scheduler import Shape
from recurd.verify import is_bit_exact
from recurrent import Array, Network

PUMP = Network(counter=True, learned=True)
BOTH = Network(name="both", directions=2, layers=1)
STRICT = Tick(rows=6, steps=5, strict=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.load(PUMP.save(tmp_path_factory.mktemp("models") / "pump.onnx"), slots=8, threads=1)


def draw(steps: int, seed: int) -> Array:
    return PUMP.draw(steps, np.random.default_rng(seed))


def results(model: Model, tick: Tick, seed: int) -> tuple[dict[tuple[int, int], bytes], Desk, list[tuple[int, ...]]]:
    """What eleven streams get for chunks of many lengths, and the shapes of the ticks."""
    random = np.random.default_rng(seed)
    desk = Desk({"pump": model}, Config(tick=tick, limits=Limits(queued_seconds=1e9)))
    caller = desk.connect()
    handles = [caller.handle(f"s{number}") for number in range(11)]
    order = random.permutation([(n, seq) for n in range(11) for seq in (1, 2, 3, 4)]).tolist()
    seqs, found, shapes = [0] * 11, {}, []
    for number, _ in order:
        seqs[number] += 1
        seq = seqs[number]
        caller.send(chunk(handles[number], seq, draw(1 + (7 * number + 3 * seq) % 13, 100 * number + seq)))
        if random.random() < 0.4:
            taken = desk.tick()
            shapes += [taken.input.shape[:2]] if taken else []
    while taken := desk.tick():
        shapes.append(taken.input.shape[:2])
    for reply in caller.take():
        found[handles.index(reply.header.handle), reply.header.seq] = reply.payload
    return found, desk, shapes


def test_every_tick_has_one_shape_and_the_same_bits_as_without(model: Model) -> None:
    loose, *_ = results(model, Tick(rows=6, steps=5), seed=1)
    strict, _, shapes = results(model, STRICT, seed=2)

    assert set(shapes) == {(6, 5)}
    assert len(strict) == 44
    assert strict == loose


def test_rows_that_fill_up_are_counted_as_padding_and_take_no_slot(model: Model) -> None:
    _, desk, shapes = results(model, STRICT, seed=3)
    stats = desk.stats.models["pump"]

    steps = sum(1 + (7 * number + 3 * seq) % 13 for number in range(11) for seq in (1, 2, 3, 4))
    assert stats.steps_processed == steps
    assert stats.padded_steps == 30 * len(shapes) - steps
    assert stats.slots_used <= 8


def test_a_shape_may_have_more_rows_than_there_are_slots(tmp_path: Path) -> None:
    small = Model.load(PUMP.save(tmp_path / "pump.onnx"), slots=2, threads=1)
    found, _, shapes = results(small, STRICT, seed=4)

    assert set(shapes) == {(6, 5)}
    assert found == results(small, Tick(), seed=5)[0]


def test_what_the_model_gives_for_rows_that_fill_up_is_nobodys(model: Model) -> None:
    """A result that is not finite there is not told to a stream, and does not end one."""
    desk = Desk({"pump": model}, Config(tick=STRICT))
    caller = desk.connect()
    caller.send(chunk(caller.handle("s"), 1, draw(3, 0)))
    tick = desk.engine.take_tick(desk.now)
    assert tick is not None
    outputs = model.run(tick.slots, tick.fresh, tick.lengths, tick.input)
    for output in outputs:
        output[1:] = np.nan
    desk.engine.complete(tick, outputs, desk.now)

    (reply,) = caller.take()
    np.testing.assert_allclose(reply.output, PUMP.run(draw(3, 0))[0]["output"], rtol=0, atol=1e-5)


def test_a_model_that_looks_ahead_is_refused_in_one_sentence(tmp_path: Path) -> None:
    both = BOTH.save(tmp_path / "both.onnx")
    (tmp_path / "recurd.toml").write_text("[tick]\nstrict = true\n")
    with pytest.raises(ConfigError, match="tick.strict: model 'both' looks ahead"):  # noqa: RUF043
        Shape.of(Model.load(both, slots=2), STRICT)
    with Process(tmp_path, both, "--bind", "tcp://127.0.0.1:0", "--config", tmp_path / "recurd.toml") as daemon:
        assert daemon.wait() == ExitCode.CONFIG
        assert "tick.strict: model 'both' looks ahead inside a chunk" in daemon.log


class ByShape:
    """A model whose last bit depends on the shape of the tick, as a GPU's does."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.contract = model.contract
        self.slots = model.slots
        self.read = model.read

    def run(self, slots: Any, fresh: Any, lengths: Any, input: Any) -> Any:
        outputs = self._model.run(slots, fresh, lengths, input)
        return [output * (1 + input.shape[0] * input.shape[1] * np.float32(1e-6)) for output in outputs]


@pytest.mark.parametrize(("rows", "steps"), [(6, 5), (8, 64), (1, 1)])
def test_what_depends_on_the_shape_alone_is_bit_exact_where_there_is_one_shape(
    model: Model, rows: int, steps: int
) -> None:
    by_shape: Any = ByShape(model)

    assert is_bit_exact(by_shape, rows, Shape(rows, steps, model.slots))
    assert not is_bit_exact(by_shape, 6)
    assert is_bit_exact(model, rows, Shape(rows, steps, model.slots))


class OnGpu(ByShape):
    """A model whose last bit depends on how many rows are long enough for a step, as cuDNN's does."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.stamp = msgspec.structs.replace(model.stamp, device="cuda")

    def run(self, slots: Any, fresh: Any, lengths: Any, input: Any) -> Any:
        outputs = self._model.run(slots, fresh, lengths, input)
        rows = (lengths[None] > np.arange(input.shape[1])[:, None]).sum(axis=1)
        return [output * (1 + rows[None, :, None] * np.float32(1e-6)) for output in outputs]


def test_on_a_gpu_only_ticks_of_one_step_are_all_alike(model: Model) -> None:
    on_gpu: Any = OnGpu(model)

    assert Shape.of(model, STRICT) == (6, 5, model.slots)
    assert Shape.of(on_gpu, STRICT) == (6, 1, model.slots)
    assert not is_bit_exact(on_gpu, 6, Shape(6, 20, model.slots))
    assert is_bit_exact(on_gpu, 6, Shape.of(on_gpu, STRICT))


def test_clients_are_told_that_a_strict_daemon_is_bit_exact(tmp_path: Path) -> None:
    path = PUMP.save(tmp_path / "pump.onnx", proof=True)
    (tmp_path / "recurd.toml").write_text("[tick]\nstrict = true\nrows = 5\nsteps = 7\n")
    flags = ["--bind", "tcp://127.0.0.1:0", "--metrics", "127.0.0.1:0", "--config", tmp_path / "recurd.toml"]
    with Process(tmp_path, path, *flags) as daemon, Dealer(daemon.ready().endpoint, greet=False) as dealer:
        assert dealer.ask(hello()).body["bit_exact"] == ["pump"]
        x = draw(20, 1)
        dealer.send(*map(b"".join, [chunk(dealer.handle("s"), 1, x)]))
        np.testing.assert_allclose(dealer.take().output, PUMP.run(x)[0]["output"], rtol=0, atol=1e-5)
        padded = daemon.metric('recurd_steps_padded_total{model="pump"}')

    assert padded == 3 * 35 - 20
