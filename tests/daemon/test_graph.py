"""The tick's graph: in place in an arena, for every layout of states, the same as out of place."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from recurd import graph
from recurd.contract import Contract, load
from recurd.errors import ContractError
from recurrent import Array, Network, States

SLOTS = 9
NETWORKS = {
    "plain": Network(),
    "batch first": Network(batch_axis=0),
    "batch last": Network(batch_axis=2, learned=True),
    "both directions": Network(directions=2, layers=1),
    "both directions, batch first": Network(directions=2, layers=2, batch_axis=0, learned=True),
    "both directions, batch last": Network(directions=2, layers=1, batch_axis=2),
    "two dtypes": Network(counter=True, learned=True),
    "one of everything": Network(directions=2, batch_axis=2, learned=True, counter=True, last=True, classes=5),
}


class InPlace:
    """A wrapped graph over arenas that stand on both sides, as the daemon binds them."""

    def __init__(self, network: Network, path: Path, scatter: graph.Scatter) -> None:
        model, self.contract = load(network.save(path))
        self.session = _session(graph.wrap(model, self.contract, scatter))
        self.arenas = graph.arenas(self.contract)
        # what stands in a slot that nobody started must not matter
        self.buffers = {
            a.name: ort.OrtValue.ortvalue_from_numpy(_noise((SLOTS, a.width), a.dtype)) for a in self.arenas
        }
        self.scatter = scatter

    def run(self, slots: Array, fresh: Array, lengths: Array, x: Array) -> dict[str, Array]:
        binding = self.session.io_binding()
        feeds = {graph.SLOTS: slots, graph.FRESH: fresh, "lengths": lengths, "input": x}
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        for head in self.contract.heads:
            binding.bind_output(head.name)
        for name, buffer in self.buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(f"{name}.next", buffer)
        self.session.run_with_iobinding(binding)
        return {head.name: binding.get_outputs()[n].numpy() for n, head in enumerate(self.contract.heads)}

    def rows(self) -> dict[str, Array]:
        return {name: buffer.numpy().copy() for name, buffer in self.buffers.items()}

    def states(self, slot: int) -> States:
        found: States = {}
        for arena in self.arenas:
            found |= {n: v[0] for n, v in arena.split(self.rows()[arena.name][slot : slot + 1]).items()}
        return found


def _noise(shape: tuple[int, ...], dtype: str) -> Array:
    if dtype == "int64":
        return np.full(shape, 12345)
    return np.full(shape, np.nan, dtype)


def _session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("scatter", ["rows", "elements"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_ticks_in_place_give_what_every_stream_gives_alone(kind: str, scatter: graph.Scatter, tmp_path: Path) -> None:
    network, random = NETWORKS[kind], np.random.default_rng(1)
    ticks = InPlace(network, tmp_path / "m.onnx", scatter)
    states: dict[int, States] = {}
    for _ in range(12):
        slots = random.permutation(SLOTS)[: random.integers(1, SLOTS)].astype(np.int64)
        lengths = random.integers(1, 6, len(slots)).astype(np.int32)
        fresh = np.array([slot not in states or random.random() < 0.3 for slot in slots])
        x = np.stack([network.draw(int(lengths.max()), random) for _ in slots])
        before = ticks.rows()

        heads = ticks.run(slots, fresh, lengths, x)

        for row, slot in enumerate(slots.tolist()):
            start = None if fresh[row] else states[slot]
            expected, states[slot] = network.run(x[row, : lengths[row]], start)
            got = {name: value[row] for name, value in heads.items()}
            got["output"] = got["output"][: lengths[row]]
            for name, value in expected.items():
                np.testing.assert_allclose(got[name], value, rtol=0, atol=1e-5, err_msg=name)
            for name, value in ticks.states(slot).items():
                np.testing.assert_allclose(value, states[slot][name], rtol=0, atol=1e-5, err_msg=name)
        others = np.setdiff1d(np.arange(SLOTS), slots)
        for name, rows in ticks.rows().items():
            assert rows[others].tobytes() == before[name][others].tobytes(), "other slots' rows, bit for bit"


def test_states_of_one_dtype_share_an_arena_in_the_contracts_order(tmp_path: Path) -> None:
    _, contract = load(Network(counter=True).save(tmp_path / "m.onnx"))

    floats, counts = graph.arenas(contract)

    assert (floats.dtype, counts.dtype) == ("float32", "int64")
    assert [s.name for s in floats.states] == ["lstm.h_l0", "lstm.c_l0", "lstm.h_l1", "lstm.c_l1"]
    assert (floats.width, counts.width) == (20, 1)


def test_rows_come_apart_as_states_and_go_together_again(tmp_path: Path) -> None:
    _, contract = load(Network(directions=2, hidden=3, layers=1).save(tmp_path / "m.onnx"))
    (arena,) = graph.arenas(contract)
    rows = np.arange(4 * arena.width, dtype=np.float32).reshape(4, -1)

    states = arena.split(rows)

    assert {name: value.shape for name, value in states.items()} == {"lstm.h_l0": (4, 2, 3), "lstm.c_l0": (4, 2, 3)}
    np.testing.assert_array_equal(arena.join(states), rows)


def test_each_arena_has_one_reader_and_the_scatter_depends_on_it(tmp_path: Path) -> None:
    """What makes writing in place right, whatever order the runtime chooses."""
    model, contract = load(Network(counter=True).save(tmp_path / "m.onnx"))
    wrapped = graph.wrap(model, contract, "rows")
    producers = {output: node for node in wrapped.graph.node for output in node.output}

    def comes_from(name: str) -> set[str]:
        node = producers.get(name)
        return {name} | (set().union(*map(comes_from, node.input)) if node is not None else set())

    for arena in graph.arenas(contract):
        readers = [node.op_type for node in wrapped.graph.node if arena.name in node.input]
        assert sorted(readers) == ["Gather", "ScatterND"]
        assert f"{arena.name}.gathered" in comes_from(f"{arena.name}.rows")


def test_wrapping_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model, contract = load(Network().save(tmp_path / "m.onnx"))
    before = model.SerializeToString(deterministic=True)
    graph.wrap(model, contract, "rows")

    assert model.SerializeToString(deterministic=True) == before


def test_an_old_opset_is_refused(tmp_path: Path) -> None:
    model, contract = load(Network().save(tmp_path / "m.onnx"))
    model.opset_import[0].version = 16

    with pytest.raises(ContractError, match="opset 16"):
        graph.wrap(model, contract, "rows")


def test_a_model_that_uses_recurds_own_names_is_refused(tmp_path: Path) -> None:
    model, contract = load(Network().save(tmp_path / "m.onnx"))
    model.graph.node.append(helper.make_node("Identity", ["output"], ["recurd.slots"]))

    with pytest.raises(ContractError, match=r"'recurd\.slots'"):
        graph.wrap(model, contract, "rows")


@pytest.mark.parametrize("scatter", ["rows", "elements"])
def test_rows_are_written_and_read_by_slot(scatter: graph.Scatter, tmp_path: Path) -> None:
    arena = graph.arenas(load(Network().save(tmp_path / "m.onnx"))[1])[0]
    buffer = np.zeros((SLOTS, arena.width), np.float32)
    slots, rows = np.array([7, 2]), np.random.default_rng(0).standard_normal((2, arena.width), np.float32)

    feeds: dict[str, Any] = {arena.name: buffer, graph.SLOTS: slots, graph.ROWS: rows}
    (written,) = _session(graph.row_writer(arena, scatter)).run(None, feeds)
    (read,) = _session(graph.row_reader(arena)).run(None, {arena.name: written, graph.SLOTS: slots})

    np.testing.assert_array_equal(read, rows)
    np.testing.assert_array_equal(np.delete(written, slots, axis=0), 0)


def test_sizes_left_behind_by_an_exporter_do_not_bind_the_batch(tmp_path: Path) -> None:
    network = replace(Network(), layers=1)
    model = network.model()
    model.graph.value_info.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 1, 3]))
    contract: Contract = network.contract(model)

    assert not graph.wrap(model, contract, "rows").graph.value_info
