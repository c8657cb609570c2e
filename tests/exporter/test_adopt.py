"""ONNX files of others, adopted; the reference is the file itself in a plain session, one stream at a time."""

import base64
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import helper, numpy_helper

from foreign_models import FEATURES, HIDDEN, OUTPUTS, Original, Size, lstm_file, lstm_weights, node, port, save
from recurd import contract as contracts
from recurd.cli import main
from recurd.errors import ExitCode
from recurd.verify import verify
from recurd_export.adopt import Adoption, StatePair, adopt
from recurd_export.adopt.foreign import Port
from recurd_export.adopt.pairing import by_name
from recurd_export.report import Report

Array = np.ndarray[Any, Any]
LENGTHS = [1, 9, 4]
CUTS = [2, 3, 7]
ZEROS = np.zeros((1, 1, HIDDEN), np.float32)


def draw(steps: int, *shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(steps, *shape)).astype(np.float32)


def kinds(path: Path) -> set[str]:
    """Operators at the top of a file's graph."""
    return {n.op_type for n in onnx.load(path).graph.node}


def hold(
    adopted: Any, truth: Callable[[Array], dict[str, Array]], streams: Sequence[Array], states: Sequence[str] = ()
) -> None:
    """Heads (all steps) and final states of every stream, alone, in one ragged batch and in chunks, are the truth's."""
    wanted = [truth(stream) for stream in streams]
    longest = max(map(len, streams))
    padded = np.stack([np.resize(stream, (longest, *stream.shape[1:])) for stream in streams])
    heads, left = adopted.run(padded, adopted.initial(len(streams)), [len(s) for s in streams])
    for row, (stream, expected) in enumerate(zip(streams, wanted, strict=True)):
        own, own_left = adopted.chunks(stream[None], [cut for cut in CUTS if cut < len(stream)])
        for head in heads:
            np.testing.assert_allclose(heads[head][row, : len(stream)], expected[head], rtol=0, atol=2e-6)
            np.testing.assert_allclose(own[head][0], expected[head], rtol=0, atol=2e-6)
        for state in states:
            axis = next(s["batch_axis"] for s in adopted.contract["states"] if s["name"] == state)
            np.testing.assert_allclose(left[state].take(row, axis), expected[state], rtol=0, atol=2e-6)
            np.testing.assert_allclose(own_left[state].take(0, axis), expected[state], rtol=0, atol=2e-6)


def whole(original: Original, *, time_major: bool = False) -> Callable[[Array], dict[str, Array]]:
    """The file's own run over a whole stream of one row."""

    def truth(stream: Array) -> dict[str, Array]:
        original.start(h0=ZEROS, c0=ZEROS)
        found = original.run(x=stream[:, None] if time_major else stream[None])
        y = found["y"][:, 0] if time_major else found["y"][0]
        return {"y": y, "h0": found["hn"][:, 0], "c0": found["cn"][:, 0]}

    return truth


# --- files with a time axis ---


@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize("batch", ["batch", None, 1])
@pytest.mark.parametrize("said", [True, False])
def test_an_lstm_keeps_its_node_which_is_told_how_long_every_row_is(
    tmp_path: Path, plain_run: Any, batch: Size, time_major: bool, said: bool
) -> None:
    path = lstm_file(tmp_path / "lstm.onnx", batch=batch, time="t" if batch else None, time_major=time_major, said=said)
    report = adopt(path, tmp_path / "adopted.onnx")
    adopted = plain_run(report.path)
    hold(
        adopted,
        whole(Original(path, {"h0": "hn", "c0": "cn"}), time_major=time_major),
        [draw(steps, FEATURES, seed=steps) for steps in LENGTHS],
        ["h0", "c0"],
    )
    assert "Scan" not in kinds(report.path)
    (lstm,) = [n for n in adopted.model.graph.node if n.op_type == "LSTM"]
    assert lstm.input[4]
    assert [(s.name, s.output, s.shape, s.batch_axis) for s in report.contract.states] == [
        ("h0", "hn", (1, HIDDEN), 1),
        ("c0", "cn", (1, HIDDEN), 1),
    ]
    assert report.contract.causal
    assert report.contract.source.framework == "onnx"


def test_a_file_for_one_step_a_run_still_takes_chunks(tmp_path: Path, plain_run: Any) -> None:
    path = lstm_file(tmp_path / "lstm.onnx", batch=1, time=1)
    report = adopt(path, tmp_path / "adopted.onnx")
    original = Original(path, {"h0": "hn", "c0": "cn"})

    def truth(stream: Array) -> dict[str, Array]:
        original.start(h0=ZEROS, c0=ZEROS)
        return {"y": np.concatenate([original.run(x=step[None, None])["y"][0] for step in stream])}

    hold(plain_run(report.path), truth, [draw(steps, FEATURES) for steps in LENGTHS])
    assert report.contract.input.shape == (FEATURES,)


def test_a_file_that_declares_a_number_of_steps_it_does_not_need_takes_any_when_told(tmp_path: Path) -> None:
    path = lstm_file(tmp_path / "lstm.onnx", batch=1, time=6)
    windows = adopt(path, tmp_path / "windows.onnx")
    steps = adopt(path, tmp_path / "steps.onnx", Adoption(step_shape=(FEATURES,)))
    assert windows.contract.input.shape == (6, FEATURES)
    assert steps.contract.input.shape == (FEATURES,)
    assert all(check.ok for check in verify(steps.path))


def test_a_cache_of_the_last_inputs_makes_it_run_step_by_step(tmp_path: Path, plain_run: Any) -> None:
    """With lengths at the LSTM alone the cache of a short row would hold what it was padded with."""
    weights = lstm_weights() | {"last": np.array([-1]), "end": np.array([2**60])}
    nodes = [
        node("Concat", "cache x", "seen", axis=1),
        node("Slice", "seen zero last one", "late"),
        node("Slice", "seen last end one", "cache_out"),
        node("Add", "x late", "sum"),
        node("Transpose", "sum", "sequence", perm=[1, 0, 2]),
        node("LSTM", "sequence W R B - h c", "Y next_h next_c", hidden_size=HIDDEN),
        node("Squeeze", "Y one", "major"),
        node("Transpose", "major", "y", perm=[1, 0, 2]),
    ]
    state = [1, "n", HIDDEN]
    path = save(
        tmp_path / "conv.onnx",
        nodes,
        [port("x", ["n", "t", FEATURES]), port("cache", ["n", 1, FEATURES]), port("h", state), port("c", state)],
        [
            port("y", ["n", "t", HIDDEN]),
            port("cache_out", ["n", 1, FEATURES]),
            port("next_h", state),
            port("next_c", state),
        ],
        weights,
    )
    report = adopt(path, tmp_path / "adopted.onnx")
    original = Original(path, {"cache": "cache_out", "h": "next_h", "c": "next_c"})

    def truth(stream: Array) -> dict[str, Array]:
        found = original.start(cache=np.zeros((1, 1, FEATURES), np.float32), h=ZEROS, c=ZEROS).run(x=stream[None])
        return {"y": found["y"][0], "cache": found["cache_out"][0], "h": found["next_h"][:, 0]}

    hold(plain_run(report.path), truth, [draw(steps, FEATURES) for steps in LENGTHS], ["cache", "h"])
    assert "Scan" in kinds(report.path)


@pytest.mark.parametrize(("heeded", "expected"), [(True, "Cast"), (False, "Scan")])
def test_a_files_own_lengths_are_used_where_its_states_heed_them(
    tmp_path: Path, plain_run: Any, heeded: bool, expected: str
) -> None:
    """Where they do not (they mask the output only), each step is run on its own."""
    path = lstm_file(tmp_path / "lstm.onnx", lengths="short" if heeded else "-")
    model = onnx.load(path)
    model.graph.input.append(port("x_lens", ["batch"], "int64"))
    model.graph.node.insert(0, node("Cast", "x_lens", "short", to=onnx.TensorProto.INT32))
    onnx.save(model, path)
    report = adopt(path, tmp_path / "adopted.onnx")
    original = Original(path, {"h0": "hn", "c0": "cn"})

    def truth(stream: Array) -> dict[str, Array]:
        found = original.start(h0=ZEROS, c0=ZEROS).run(x=stream[None], x_lens=np.array([len(stream)]))
        return {"y": found["y"][0], "h0": found["hn"][:, 0]}

    hold(plain_run(report.path), truth, [draw(steps, FEATURES) for steps in LENGTHS], ["h0"])
    assert ("Scan" in kinds(report.path)) == (expected == "Scan")
    assert expected in kinds(report.path)


def test_lengths_that_a_file_works_out_itself_are_left_to_it(tmp_path: Path, plain_run: Any) -> None:
    """As converters from TensorFlow write them: every row is as long as the whole."""
    path = lstm_file(tmp_path / "lstm.onnx", lengths="own")
    model = onnx.load(path)
    shape = [
        node("Shape", "x", "rows", start=0, end=1),
        node("Shape", "x", "steps", start=1, end=2),
        node("Expand", "steps rows", "wide"),
        node("Cast", "wide", "own", to=onnx.TensorProto.INT32),
    ]
    for place, each in enumerate(shape):
        model.graph.node.insert(place, each)
    onnx.save(model, path)
    report = adopt(path, tmp_path / "adopted.onnx")
    truth = whole(Original(path, {"h0": "hn", "c0": "cn"}))
    hold(plain_run(report.path), truth, [draw(steps, FEATURES) for steps in LENGTHS], ["h0"])
    assert "Scan" in kinds(report.path)


def test_a_head_of_the_last_step_becomes_one_of_every_step(tmp_path: Path, plain_run: Any) -> None:
    more = [node("Gather", "before last", "end", axis=1), node("MatMul", "end V", "y")]
    path = lstm_file(tmp_path / "lstm.onnx", more=more, y=["batch", OUTPUTS])
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.array(-1), "last"))
    onnx.save(model, path)
    report = adopt(path, tmp_path / "adopted.onnx")
    original = Original(path, {"h0": "hn", "c0": "cn"})

    def truth(stream: Array) -> dict[str, Array]:
        original.start(h0=ZEROS, c0=ZEROS)
        return {"y": np.concatenate([original.run(x=step[None, None])["y"] for step in stream])}

    hold(plain_run(report.path), truth, [draw(steps, FEATURES) for steps in LENGTHS])


def test_outputs_with_batch_and_time_in_one_axis_are_told_apart(tmp_path: Path) -> None:
    more = [node("Reshape", "before flat", "rows"), node("MatMul", "rows V", "y")]
    path = lstm_file(tmp_path / "lstm.onnx", more=more, y=["both", OUTPUTS])
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, HIDDEN]), "flat"))
    onnx.save(model, path)
    report = adopt(path, tmp_path / "adopted.onnx")
    assert [(h.shape, h.per) for h in report.contract.heads] == [((OUTPUTS,), "step")]


def test_time_may_stand_anywhere(tmp_path: Path, plain_run: Any) -> None:
    """As in speech enhancers: [batch, bands, time, 2], a cache with another batch axis, sizes of an example."""
    nodes = [
        node("Mul", "cache half", "faded"),
        node("ReduceSum", "spectrum axes", "energy", keepdims=1),
        node("Transpose", "energy", "turned", perm=[3, 0, 1, 2]),
        node("Add", "faded turned", "cache_out"),
        node("Transpose", "cache_out", "back", perm=[1, 2, 3, 0]),
        node("Mul", "spectrum back", "enhanced"),
    ]
    path = save(
        tmp_path / "enhancer.onnx",
        nodes,
        [port("spectrum", [1, 5, 1, 2]), port("cache", [1, 1, 5, 1])],
        [port("enhanced", [1, 5, 1, 2]), port("cache_out", [1, 1, 5, 1])],
        {"half": np.float32([0.5]), "axes": np.array([3])},
    )
    report = adopt(path, tmp_path / "adopted.onnx")
    original = Original(path, {"cache": "cache_out"})

    def truth(stream: Array) -> dict[str, Array]:
        original.start(cache=np.zeros((1, 1, 5, 1), np.float32))
        found = [original.run(spectrum=step[None, :, None])["enhanced"][0, :, 0] for step in stream]
        return {"enhanced": np.stack(found)}

    hold(plain_run(report.path), truth, [draw(steps, 5, 2) for steps in LENGTHS])
    (state,) = report.contract.states
    assert (state.batch_axis, report.contract.input.shape) == (1, (5, 2))


# --- files that take one window a run ---


def window_file(path: Path, opset: int = 16) -> Path:
    """Like silero-vad: 2 + 6 samples a run, the first 2 are the end of the run before; a rate chooses a branch."""

    def branch(name: str, scale: float) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(f"{name}_out", onnx.TensorProto.FLOAT, None)
        values = numpy_helper.from_array(
            np.linspace(-scale, scale, 8 * HIDDEN, dtype=np.float32).reshape(8, HIDDEN), "w"
        )
        nodes = [node("Constant", "", f"{name}_w", value=values), node("MatMul", f"input {name}_w", f"{name}_out")]
        return helper.make_graph(nodes, name, [], [output])

    wide, narrow = branch("wide", 1.0), branch("narrow", 2.0)
    nodes = [
        node("Equal", "sr rate", "is_wide"),
        node("If", "is_wide", "features", then_branch=wide, else_branch=narrow),
        node("Split", "state", "h c", axis=0),
        node("Unsqueeze", "features zero", "sequence"),
        node("LSTM", "sequence W R B - h c", "Y hn cn", hidden_size=HIDDEN),
        node("Concat", "hn cn", "stateN", axis=0),
        node("Squeeze", "hn zero", "last"),
        node("MatMul", "last V", "logits"),
        node("Sigmoid", "logits", "output"),
    ]
    return save(
        path,
        nodes,
        [port("input", [None, None]), port("state", [2, None, HIDDEN]), port("sr", [], "int64")],
        [port("output", [None, OUTPUTS]), port("stateN", [None, None, None])],
        lstm_weights(HIDDEN) | {"rate": np.array(16000)},
        opset,
    )


def test_windows_with_context_and_a_constant_are_steps(tmp_path: Path, plain_run: Any) -> None:
    path = window_file(tmp_path / "vad.onnx")
    report = adopt(path, tmp_path / "adopted.onnx", Adoption(constants={"sr": 16000}, step_shape=(6,), context=2))
    original = Original(path, {"state": "stateN"}, sr=np.array(16000))

    def truth(stream: Array) -> dict[str, Array]:
        original.start(state=np.zeros((2, 1, HIDDEN), np.float32))
        context, found = np.zeros(2, np.float32), []
        for step in stream:
            window = np.concatenate([context, step])
            found.append(original.run(input=window[None])["output"][0])
            context = window[-2:]
        return {"output": np.stack(found), "state": original.states["state"][:, 0], "context": context}

    hold(plain_run(report.path), truth, [draw(steps, 6, seed=steps) for steps in LENGTHS], ["state", "context"])
    assert [(s.name, s.output, s.shape, s.batch_axis) for s in report.contract.states] == [
        ("state", "stateN", (2, HIDDEN), 1),
        ("context", "context.next", (2,), 0),
    ]
    assert "lifted from opset 16 to 17" in report.notes
    weights = [numpy_helper.to_array(tensor).shape for tensor in onnx.load(report.path).graph.initializer]
    assert weights.count((8, HIDDEN)) == 2, "the weights of both branches are where the hash covers them"


def test_the_constant_matters(tmp_path: Path, plain_run: Any) -> None:
    path = window_file(tmp_path / "vad.onnx")
    found = []
    for rate in (16000, 8000):
        said = Adoption(constants={"sr": rate}, step_shape=(6,), context=2)
        adopted = plain_run(adopt(path, tmp_path / f"{rate}.onnx", said).path)
        found.append(adopted.run(draw(4, 6)[None], adopted.initial(1))[0]["output"])
    assert np.abs(found[0] - found[1]).max() > 0.01


def test_a_model_whose_only_state_is_its_context_is_adopted(tmp_path: Path, plain_run: Any) -> None:
    path = save(
        tmp_path / "fir.onnx",
        [node("MatMul", "x taps", "y")],
        [port("x", ["n", 5])],
        [port("y", ["n", 3])],
        {"taps": np.arange(15, dtype=np.float32).reshape(5, 3)},
    )
    adopted = plain_run(adopt(path, tmp_path / "adopted.onnx", Adoption(context=4)).path)
    stream = draw(6, 1)
    signal = np.concatenate([np.zeros(4, np.float32), stream[:, 0]])
    windows = np.stack([signal[step : step + 5] for step in range(6)])
    np.testing.assert_allclose(
        adopted.chunks(stream[None], [2, 3])[0]["y"][0], windows @ np.arange(15).reshape(5, 3), rtol=0, atol=1e-4
    )


# --- element types, initial values, heads ---


@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_token_ids_go_as_far_as_the_table_does(tmp_path: Path, plain_run: Any, dtype: str) -> None:
    nodes = [node("Gather", "table ids", "row"), node("Add", "row h", "h_out"), node("Neg", "h_out", "y")]
    table = draw(7, 2)
    path = save(
        tmp_path / "ids.onnx",
        nodes,
        [port("ids", ["n"], dtype), port("h_in", ["n", 2])],
        [port("y", ["n", 2]), port("h_out", ["n", 2])],
        {"table": table},
    )
    model = onnx.load(path)
    model.graph.node[1].input[1] = "h_in"
    onnx.save(model, path)
    report = adopt(path, tmp_path / "adopted.onnx")
    assert (report.contract.input.dtype, report.contract.input.classes) == ("int64", 7)
    ids = np.array([6, 0, 3, 3])
    found = plain_run(report.path).chunks(ids[None], [1])[0]["y"][0]
    np.testing.assert_allclose(found, -np.cumsum(table[ids], axis=0), rtol=0, atol=1e-5)


def test_a_float64_model_gets_what_streams_send_as_float32(tmp_path: Path) -> None:
    nodes = [node("Add", "x h", "new_h"), node("Cast", "new_h", "y", to=onnx.TensorProto.FLOAT)]
    path = save(
        tmp_path / "double.onnx",
        nodes,
        [port("x", ["n", 2], "float64"), port("h", ["n", 2], "float64")],
        [port("y", ["n", 2]), port("new_h", ["n", 2], "float64")],
    )
    contract = adopt(path, tmp_path / "adopted.onnx").contract
    assert (contract.input.dtype, contract.states[0].dtype) == ("float32", "float64")


def test_a_model_that_does_not_take_any_number_is_given_examples(tmp_path: Path, plain_run: Any) -> None:
    """It takes logarithms; the context is put in front of the example's steps as of a stream's."""
    path = save(
        tmp_path / "log.onnx",
        [node("Add", "x fog", "xx"), node("Log", "xx", "y"), node("Add", "y h", "h_out")],
        [port("x", ["n", None]), port("h", ["n", 3])],
        [port("y", ["n", 3]), port("h_out", ["n", 3])],
        {"fog": np.float32(1e-3)},
    )
    steps = np.random.default_rng(0).uniform(1, 2, (9, 2)).astype(np.float32)
    np.save(tmp_path / "steps.npy", steps)
    adopted = plain_run(
        adopt(path, tmp_path / "adopted.onnx", Adoption(example=str(tmp_path / "steps.npy"), context=1)).path
    )
    signal = np.concatenate([[0], steps[:, 1]])[:9]
    windows = np.concatenate([signal[:, None], steps], axis=1)
    found = adopted.chunks(steps[None], [4])[0]["y"][0]
    np.testing.assert_allclose(found, np.log(windows + 1e-3), rtol=0, atol=1e-5)


def test_a_constant_with_a_batch_axis_is_repeated_for_every_row(tmp_path: Path, plain_run: Any) -> None:
    path = save(
        tmp_path / "speaker.onnx",
        [node("Add", "x h", "h_out"), node("Concat", "h_out speaker", "y", axis=1)],
        [port("x", ["n", 2]), port("h", ["n", 2]), port("speaker", ["n", 3])],
        [port("y", ["n", 5]), port("h_out", ["n", 2])],
    )
    adopted = plain_run(adopt(path, tmp_path / "adopted.onnx", Adoption(constants={"speaker": [1, 2, 3]})).path)
    found = adopted.run(np.ones((2, 4, 2), np.float32), adopted.initial(2))[0]["y"]
    np.testing.assert_array_equal(found[1], [[step, step, 1, 2, 3] for step in (1, 2, 3, 4)])


def test_float16_states_and_heads_are_kept(tmp_path: Path) -> None:
    """The runtime rounds to float16 where it likes, so the bound is wider, and cuts are held apart."""
    nodes = [
        node("Cast", "x", "small", to=onnx.TensorProto.FLOAT16),
        node("Mul", "h half", "faded"),
        node("Add", "small faded", "h_out"),
        node("Cast", "h_out", "y", to=onnx.TensorProto.FLOAT),
    ]
    path = save(
        tmp_path / "half.onnx",
        nodes,
        [port("x", ["n", 2]), port("h", ["n", 2], "float16")],
        [port("y", ["n", 2]), port("h_out", ["n", 2], "float16")],
        {"half": np.float16(0.5)},
    )
    report = adopt(path, tmp_path / "adopted.onnx")
    assert report.contract.states[0].dtype == "float16"
    assert all(check.ok for check in verify(report.path))


@pytest.mark.parametrize("said", [0.25, [0.25] * HIDDEN, "file"])
def test_initial_values_are_a_number_a_list_or_a_file(tmp_path: Path, plain_run: Any, said: Any) -> None:
    path = lstm_file(tmp_path / "lstm.onnx")
    if said == "file":
        said = str(tmp_path / "h0.npy")
        np.save(said, np.full((1, HIDDEN), 0.25, np.float32))
    report = adopt(path, tmp_path / "adopted.onnx", Adoption(states=(StatePair(input="h0", initial=said),)))
    original = Original(path, {"h0": "hn", "c0": "cn"})

    def truth(stream: Array) -> dict[str, Array]:
        return {"y": original.start(h0=ZEROS + np.float32(0.25), c0=ZEROS).run(x=stream[None])["y"][0]}

    hold(plain_run(report.path), truth, [draw(steps, FEATURES) for steps in LENGTHS])


def test_a_state_may_be_a_head_too_and_outputs_may_be_left_out(tmp_path: Path) -> None:
    path = lstm_file(tmp_path / "lstm.onnx")
    contract = adopt(path, tmp_path / "adopted.onnx", Adoption(heads=("hn",))).contract
    assert [(head.name, head.shape) for head in contract.heads] == [("hn", (1, HIDDEN))]
    assert [state.output for state in contract.states] == ["h0.next", "cn"]


def test_names_that_are_recurds_own_are_changed(tmp_path: Path) -> None:
    path = lstm_file(
        tmp_path / "lstm.onnx", names=("recurd.x", "input", "recurd.c", "lengths", "input_out", "recurd.c.out")
    )
    contract = adopt(path, tmp_path / "adopted.onnx").contract
    assert [head.name for head in contract.heads] == ["lengths_"]
    assert [state.name for state in contract.states] == ["input_", "model.recurd.c"]


@pytest.mark.parametrize("opset", [9, 13, 15])
def test_old_opsets_are_lifted(tmp_path: Path, plain_run: Any, opset: int) -> None:
    """Where squeezing took its axes as an attribute the converter is needed."""
    path = lstm_file(tmp_path / "lstm.onnx", opset=17)
    model = onnx.load(path)
    model.opset_import[0].version = opset
    for squeeze in (n for n in model.graph.node if n.op_type == "Squeeze" and opset < 13):
        del squeeze.input[1]
        squeeze.attribute.append(helper.make_attribute("axes", [1]))
    onnx.save(model, path)
    report = adopt(path, tmp_path / "adopted.onnx")
    hold(
        plain_run(report.path),
        whole(Original(path, {"h0": "hn", "c0": "cn"})),
        [draw(steps, FEATURES) for steps in LENGTHS],
    )
    assert f"lifted from opset {opset} to 17" in report.notes


def test_weights_in_another_file_come_inside(tmp_path: Path) -> None:
    path = lstm_file(tmp_path / "lstm.onnx")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="lstm.bin", size_threshold=64)
    report = adopt(path, tmp_path / "adopted.onnx")
    (tmp_path / "lstm.bin").unlink()
    assert all(check.ok for check in verify(report.path))


def test_the_adopted_file_says_nothing_of_where_it_was_made(tmp_path: Path) -> None:
    path = lstm_file(tmp_path / "lstm.onnx")
    model = onnx.load(path)
    model.doc_string = model.graph.doc_string = model.graph.node[0].doc_string = "/home/somebody"
    model.metadata_props.add(key="a", value="/home/somebody")
    onnx.save(model, path)
    content = adopt(path, tmp_path / "adopted.onnx").path.read_bytes()
    assert b"/home/somebody" not in content
    assert str(tmp_path).encode() not in content


# --- pairing ---


@pytest.mark.parametrize(
    ("inputs", "outputs", "expected"),
    [
        ("input state sr", "output stateN", "state:stateN"),
        ("input h c", "output hn cn", "h:hn c:cn"),
        ("input h0 c0", "output h_n c_n", "h0:h_n c0:c_n"),
        ("x h c", "encoder_out next_h next_c", "h:next_h c:next_c"),
        ("x cached_key_0 cached_key_1", "y new_cached_key_0 new_cached_key_1",
         "cached_key_0:new_cached_key_0 cached_key_1:new_cached_key_1"),
        ("audio_signal cache_last_channel cache_last_time", "outputs cache_last_channel_next cache_last_time_next",
         "cache_last_channel:cache_last_channel_next cache_last_time:cache_last_time_next"),
        ("targets input_states_1 input_states_2", "outputs output_states_1 output_states_2",
         "input_states_1:output_states_1 input_states_2:output_states_2"),
        ("mix conv_cache tra_cache", "enh conv_cache_out tra_cache_out",
         "conv_cache:conv_cache_out tra_cache:tra_cache_out"),
        ("ids past_key_values.0.key past_key_values.0.value", "logits present.0.key present.0.value",
         "past_key_values.0.key:present.0.key past_key_values.0.value:present.0.value"),
        ("x h_in c_in", "y h_out c_out", "h_in:h_out c_in:c_out"),
        ("hidden prev_state", "y new_state", "prev_state:new_state"),
        ("input", "output", ""),
        ("x a b", "y p q", ""),
    ],
)  # fmt: skip
def test_names_that_belong_together_are_paired(inputs: str, outputs: str, expected: str) -> None:
    ports = [[Port(name, "float32", ("n", 4)) for name in names.split()] for names in (inputs, outputs)]
    assert " ".join(f"{before.name}:{after.name}" for before, after in by_name(*ports)) == expected


def test_shapes_pair_what_names_do_not(tmp_path: Path) -> None:
    nodes = [
        node("Add", "x first", "p"),
        node("ReduceSum", "x axes", "sum", keepdims=0),
        node("Add", "second sum", "q"),
        node("Neg", "p", "y"),
    ]
    path = save(
        tmp_path / "model.onnx",
        nodes,
        [port("x", ["n", 2]), port("first", ["n", 2]), port("second", ["n"])],
        [port("y", ["n", 2]), port("q", ["n"]), port("p", ["n", 2])],
        {"axes": np.array([1])},
    )
    states = adopt(path, tmp_path / "adopted.onnx").contract.states
    assert [(s.name, s.output, s.batch_axis) for s in states] == [("first", "p", 0), ("second", "q", 0)]


# --- the command ---


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["adopt", *map(str, arguments)])


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    out = tmp_path / "pump.onnx"
    result = run(lstm_file(tmp_path / "lstm.onnx"), "--state", "h0:hn", "--state", "c0:cn", "--batch-axis", "1",
                 "--features", "a,b,c", "--labels", "y=low,high", "--model-version", "7", "-o", out)  # fmt: skip
    assert result.exit_code == ExitCode.OK, result.output
    assert f"'pump' to {out}" in result.output
    assert "carried from step to step: h0 -> hn, c0 -> cn" in result.output
    assert "checked chunks in ragged batches" in result.output
    assert all(check.ok for check in verify(out))


def test_every_option_reaches_the_contract(tmp_path: Path) -> None:
    out = tmp_path / "adopted.onnx"
    result = run(window_file(tmp_path / "vad.onnx"), "--input", "input", "--head", "output", "--constant", "sr=16000",
                 "--step-shape", "6", "--context", "2", "--batch-axis", "state=1", "--input-batch-axis", "0",
                 "--state-shape", f"state=2,{HIDDEN}", "--initial", "state=0.5", "--name", "vad",
                 "--units", "a,b,c,d,e,f", "--sample-rate-hz", "31.25", "--json", "-o", out)  # fmt: skip
    assert result.exit_code == ExitCode.OK, result.output
    contract = json.loads(result.stdout)["contract"]
    assert (contract["name"], contract["version"], contract["input"]["sample_rate_hz"]) == ("vad", "1", 31.25)
    assert contract["states"][0]["initial"] is not None
    assert contract["input"]["shape"] == [6]


def test_a_toml_file_says_the_same_and_options_win(tmp_path: Path) -> None:
    window_file(tmp_path / "vad.onnx")
    toml = tmp_path / "adopt.toml"
    np.save(tmp_path / "start.npy", np.full((2, HIDDEN), 0.5, np.float32))
    toml.write_text(
        'model = "vad.onnx"\nout = "adopted.onnx"\nname = "vad"\nstep_shape = [6]\ncontext = 2\n'
        "[constants]\nsr = 16000\n[labels]\noutput = ['silence', 'speech']\n"
        '[[states]]\ninput = "state"\noutput = "stateN"\nbatch_axis = 1\nshape = [2, 4]\ninitial = "start.npy"\n'
    )
    beside = run(toml)
    assert beside.exit_code == ExitCode.OK, beside.output
    assert (tmp_path / "adopted.onnx").exists()
    other = run("--config", toml, "--name", "other", "--json", "-o", tmp_path / "other.onnx")
    contract = json.loads(other.stdout)["contract"]
    assert contract["name"] == "other"
    assert contract["heads"][0]["labels"] == ["silence", "speech"]
    assert np.frombuffer(base64.b64decode(contract["states"][0]["initial"]["data"]), np.float32)[0] == 0.5


def test_help_explains_with_examples() -> None:
    result = run("--help")
    assert result.exit_code == ExitCode.OK
    assert "recurd adopt silero_vad.onnx --constant sr=16000 --step-shape 512 --context 64 -o vad.onnx" in result.output


def test_progress_is_told_and_no_framework_is_loaded(tmp_path: Path) -> None:
    path = lstm_file(tmp_path / "lstm.onnx")
    code = (
        "import sys; from recurd_export.adopt import adopt\n"
        f"stages = []; report = adopt({str(path)!r}, {str(tmp_path / 'a.onnx')!r}, progress=stages.append)\n"
        "print(stages[0], stages[-1], [name for name in ('torch', 'keras', 'tensorflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "look at the model write []\n"


def test_the_report_is_an_exports_own(tmp_path: Path) -> None:
    assert isinstance(adopt(lstm_file(tmp_path / "lstm.onnx"), tmp_path / "adopted.onnx"), Report)


def test_an_adopted_model_is_normalised_and_rounded_as_an_exported_one_is(tmp_path: Path) -> None:
    source = lstm_file(tmp_path / "lstm.onnx")
    (tmp_path / "n.json").write_text('{"mean": 100.0, "std": 4.0}')
    precision = ("--precision", "bfloat16-weights", "--state-precision", "float16")

    result = run(
        source,
        "-o",
        tmp_path / "a.onnx",
        "--normalize",
        tmp_path / "n.json",
        *precision,
        "--report",
        tmp_path / "a.html",
    )

    assert result.exit_code == ExitCode.OK, result.output
    _, contract = contracts.load(tmp_path / "a.onnx")
    assert contract.input.mean == (100.0,) * FEATURES
    assert {state.dtype for state in contract.states} == {"float16"}
    assert "<svg" in (tmp_path / "a.html").read_text()
