"""Foreign files and wishes that 'recurd adopt' refuses: one clear sentence each, and nothing is left behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import helper

from foreign_models import Array, lstm_file, node, port, save
from recurd.cli import main
from recurd.errors import ExitCode

#: Writes a file into a folder.
Maker = Callable[[Path], Path]
STATE = ["n", 2]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["adopt", *map(str, arguments)])


def refused(folder: Path, path: Path, *options: str, code: int = ExitCode.EXPORT) -> str:
    """The one sentence with which a file is refused; nothing is left."""
    before = set(folder.iterdir())
    result = run(path, "-o", folder / "adopted.onnx", *options)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert set(folder.iterdir()) == before
    (line,) = result.stderr.splitlines()
    return line.removeprefix("recurd: ").replace(f"{path}", "FILE")


def lstm(**changes: Any) -> Maker:
    return lambda folder: lstm_file(folder / "lstm.onnx", **changes)


def changed(maker: Maker, change: Callable[[onnx.ModelProto], None]) -> Maker:
    def make(folder: Path) -> Path:
        path = maker(folder)
        model = onnx.load(path)
        change(model)
        onnx.save(model, path)
        return path

    return make


def adding(*nodes: onnx.NodeProto, weights: dict[str, Array] | None = None, **ports: Any) -> Maker:
    """A file that adds ``x`` to a state ``h`` and has more nodes, inputs and outputs."""

    def make(folder: Path) -> Path:
        return save(
            folder / "adder.onnx",
            nodes or [node("Add", "x h", "h_out"), node("Neg", "h_out", "y")],
            ports.get("inputs", [port("x", STATE), port("h", STATE)]),
            ports.get("outputs", [port("y", STATE), port("h_out", STATE)]),
            weights,
            ports.get("opset", 17),
        )

    return make


SUM = [node("Add", "x h", "h_out"), node("Neg", "h_out", "y")]

REFUSED: dict[str, tuple[Maker, tuple[str, ...], str]] = {
    "no state": (
        adding(node("Neg", "x", "y"), inputs=[port("x", STATE)], outputs=[port("y", STATE)]),
        (),
        (
            "no state was found: the inputs are 'x' float32 [n, 2] and the outputs 'y' float32 [n, 2]; if one is "
            "carried from step to step, name it with --state INPUT:OUTPUT"
        ),
    ),
    "a state of another shape": (
        adding(node("Add", "x h", "h_out"), node("ReduceMax", "h_out", "y", axes=[1]),
               outputs=[port("y", ["n", 1]), port("h_out", STATE)]),
        ("--state", "h:y"),
        "the state 'h' float32 [n, 2] and its next value 'y' float32 [n, 1] are not of one type and shape",
    ),
    "a state of another type": (
        adding(*SUM, node("Cast", "h_out", "big", to=11), outputs=[port("y", STATE), port("big", STATE, "float64")]),
        ("--state", "h:big"),
        "the state 'h' float32 [n, 2] and its next value 'big' float64 [n, 2] are not of one type and shape",
    ),
    "a state whose shape changes when it runs": (
        adding(node("Concat", "x h", "h_out", axis=1), node("Neg", "h_out", "y"),
               outputs=[port("y", None), port("h_out", None)]),
        (),
        (
            "FILE: the state 'h' is float32 [1, 2] and its next value 'h_out' float32 [1, 4]; a state keeps its "
            "type and shape"
        ),
    ),
    "an ambiguous pairing": (
        lstm(names=("x", "a", "b", "y", "p", "q")),
        (),
        (
            "the input 'a' float32 [1, batch, 4] may be a state, but it is not clear which output is its next "
            "value: p or q; say it with --state a:p"
        ),
    ),
    "a batch axis fixed to 1 inside": (
        adding(node("Reshape", "x two", "flat"), node("Add", "flat h", "h_out"), node("Neg", "h_out", "y"),
               weights={"two": np.array([1, 2])}),
        (),
        (
            "FILE: the batch axis is fixed to 1: 3 rows do not run (The input tensor cannot be reshaped to the "
            "requested shape. Input shape:{3,2}, requested shape:{1,2}), so rows of several streams cannot share "
            "a tick; export it again with a free batch axis"
        ),
    ),
    "no axis for the batch in the input": (
        adding(inputs=[port("x", [4, 2]), port("h", [4, 2])], outputs=[port("y", [4, 2]), port("h_out", [4, 2])]),
        (),
        (
            "the input 'x' float32 [4, 2] has no axis for the batch, so rows of several streams cannot share a "
            "tick; export it again with a free batch axis"
        ),
    ),
    "a state of one number for all": (
        adding(inputs=[port("x", STATE), port("h", [])], outputs=[port("y", STATE), port("h_out", None)]),
        (),
        "the state 'h' float32 [] has no axis for the batch, so rows of several streams cannot share a tick",
    ),
    "no axis for the batch in a state": (
        adding(inputs=[port("x", STATE), port("h", [2])], outputs=[port("y", STATE), port("h_out", None)]),
        (),
        (
            "the state 'h' float32 [2] has no axis for the batch, so rows of several streams cannot share a "
            "tick; export it again with a free batch axis"
        ),
    ),
    "rows that see each other": (
        adding(node("ReduceMean", "x", "mean", axes=[0]), node("Add", "mean h", "h_out"), node("Neg", "h_out", "y")),
        (),
        "FILE: what a row gives in 'y' depends on the other rows, so streams cannot share a tick",
    ),
    "dynamic quantisation": (
        adding(node("DynamicQuantizeLinear", "x", "q scale zero"), node("DequantizeLinear", "q scale zero", "xx"),
               node("Add", "xx h", "h_out"), node("Neg", "h_out", "y")),
        (),
        "FILE: what a row gives in 'y' depends on the other rows, so streams cannot share a tick; dynamic ",
    ),
    "a head without rows": (
        adding(*SUM, node("ReduceSum", "x", "total", keepdims=0),
               outputs=[port("y", STATE), port("h_out", STATE), port("total", [])]),
        (),
        (
            "FILE: the output 'total' is [] with one row and [] with 3, so no row has its own; leave it out by "
            "naming the others with --head"
        ),
    ),
    "an opset too old": (
        adding(node("Pad", "x", "xx", paddings=[0, 0, 0, 0]), node("Add", "xx h", "h_out"),
               node("Neg", "h_out", "y"), opset=1),
        (),
        "FILE: its opset 1 is too old and it cannot be lifted to 17",
    ),
    "an input nobody gives": (
        adding(inputs=[port("x", STATE), port("h", STATE), port("sr", [], "int64")]),
        (),
        (
            "nobody gives the input 'sr' int64 [] a value; say what it is: --constant sr=VALUE, --state "
            "sr:OUTPUT, --lengths sr or --input sr"
        ),
    ),
    "ids without classes": (
        adding(node("OneHot", "x depth onoff", "hot"), node("Add", "hot h", "h_out"), node("Neg", "h_out", "y"),
               inputs=[port("x", ["n"], "int64"), port("h", STATE)],
               weights={"depth": np.array(2), "onoff": np.float32([0, 1])}),
        (),
        "the input 'x' int64 [n] is token ids, and the file does not say how many there are; use --classes",
    ),
    "more classes than the table has": (
        adding(node("Gather", "table x", "row"), node("Add", "row h", "h_out"), node("Neg", "h_out", "y"),
               inputs=[port("x", ["n"], "int64"), port("h", STATE)], weights={"table": np.ones((5, 2), np.float32)}),
        ("--classes", "6"),
        (
            "FILE: the model does not run with one step of one stream: indices element out of data bounds, idx=5 "
            "must be within the inclusive range [-5,4]"
        ),
    ),
    "classes of numbers": (
        adding(),
        ("--classes", "6"),
        "--classes is for token ids, but the input 'x' float32 [n, 2] is no integer",
    ),
    "an input of truth values": (
        adding(node("Cast", "x", "xx", to=1), node("Add", "xx h", "h_out"), node("Neg", "h_out", "y"),
               inputs=[port("x", STATE, "bool"), port("h", STATE)]),
        (),
        "the input 'x' bool [n, 2] is neither a float nor token ids (int32 or int64)",
    ),
    "a state of truth values": (
        adding(node("Not", "h", "h_out"), node("Cast", "h", "hh", to=1), node("Add", "x hh", "y"),
               inputs=[port("x", STATE), port("h", STATE, "bool")],
               outputs=[port("y", STATE), port("h_out", STATE, "bool")]),
        (),
        "the state 'h' is bool; a state must be float32, float16, float64, int32, int64",
    ),
    "heads of several types": (
        adding(*SUM, node("ArgMax", "y", "best", axis=1, keepdims=0),
               outputs=[port("y", STATE), port("best", ["n"], "int64"), port("h_out", STATE)]),
        (),
        "the heads are of different types (y float32, best int64); a result has one, so choose with --head",
    ),
    "a head of truth values": (
        adding(*SUM, node("Greater", "y x", "more"), outputs=[port("more", STATE, "bool"), port("h_out", STATE)]),
        (),
        "head 'more' is bool; a head must be one of",
    ),
    "random numbers": (
        adding(node("RandomNormalLike", "x", "noise"), node("Add", "noise h", "h_out"), node("Neg", "h_out", "y")),
        (),
        (
            "FILE: the model draws random numbers (RandomNormalLike), so nothing about it can be verified; "
            "export it again without them"
        ),
    ),
    "dropout as in training": (
        adding(node("Dropout", "x half yes", "xx"), node("Add", "xx h", "h_out"), node("Neg", "h_out", "y"),
               weights={"half": np.float32(0.5), "yes": np.array(True)}),
        (),
        "FILE: the same input gives another 'y' the next time, so the model draws random numbers (dropout in training ",
    ),
    "numbers it does not take": (
        adding(node("Log", "x", "xx"), node("Add", "xx h", "h_out"), node("Neg", "h_out", "y")),
        (),
        "FILE: random numbers make the model give NaN in 'y'; give steps it takes, in a .npy file [steps, ...], with",
    ),
    "mixed time": (
        lstm(more=[node("ReduceMean", "before", "mean", axes=[1]), node("Add", "before mean", "mixed"),
                   node("MatMul", "mixed V", "y")]),
        (),
        (
            "FILE: 5 steps at once do not give what they give one by one, so the model mixes steps along axis 1 "
            "of 'x' and cannot be cut into chunks; if a run is meant to take windows of a fixed size, give that "
            "with --step-shape"
        ),
    ),
    "no size of a step": (
        adding(inputs=[port("x", ["n", "t", "f"]), port("h", STATE)]),
        (),
        (
            "the file does not say the size of a step of the input 'x' float32 [n, t, f]; give it with "
            "--step-shape"
        ),
    ),
    "another size of a step": (
        adding(),
        ("--step-shape", "3"),
        "a step of shape [3] does not fit the input 'x' float32 [n, 2]",
    ),
    "a context longer than what the model takes": (
        adding(),
        ("--context", "2"),
        "the file does not say the size of a step of the input 'x' float32 [n, 2]",
    ),
    "no size of a state": (
        adding(inputs=[port("x", STATE), port("h", ["n", "k"])], outputs=[port("y", None), port("h_out", None)]),
        (),
        "the file does not say the shape of the state 'h' float32 [n, k]; give it with --state-shape",
    ),
    "another size of a state": (
        adding(),
        ("--state-shape", "h=3"),
        "a state of shape [3] (without batch) does not fit 'h' float32 [n, 2]",
    ),
    "a run that fails": (
        adding(node("Reshape", "x seven", "xx"), node("Add", "xx h", "h_out"), node("Neg", "h_out", "y"),
               weights={"seven": np.array([7])}),
        (),
        (
            "FILE: the model does not run with one step of one stream: The input tensor cannot be reshaped to "
            "the requested shape. Input shape:{1,2}, requested shape:{7}; if a step is larger, give its shape "
            "with --step-shape"
        ),
    ),
    "an operator the runtime does not have": (
        adding(helper.make_node("Magic", ["x"], ["xx"], domain="elsewhere"), node("Add", "xx h", "h_out"),
               node("Neg", "h_out", "y")),
        (),
        "FILE: the runtime does not take it: ",
    ),
    "no input left": (
        adding(),
        ("--constant", "x=1", "--constant", "h=1"),
        "no input is left for what streams send; every one is a state or a constant",
    ),
    "no head left": (
        adding(outputs=[port("h_out", STATE)]),
        (),
        "every output (h_out) is the next value of a state; say with --head which streams get",
    ),
    "labels that do not fit": (
        adding(),
        ("--labels", "y=a,b,c"),
        "3 labels are given for head 'y', which has 2 elements",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_cannot_be_served_is_refused_with_its_reason(case: str, tmp_path: Path) -> None:
    maker, options, sentence = REFUSED[case]
    assert refused(tmp_path, maker(tmp_path), *options).startswith(sentence)


WRONG_USAGE: dict[str, tuple[tuple[str, ...], str]] = {
    "no such input": (("--input", "z"), "the model has no input 'z'; its inputs are x, h"),
    "no such output": (("--head", "z"), "the model has no output 'z'; its outputs are y, h_out"),
    "two roles": (
        ("--constant", "h=1", "--state", "h:h_out"),
        "'h' is given two roles; every input and output has one",
    ),
    "no pair": (("--state", "h"), "'h' does not name a state's input and output; write --state h:hn, and names with a"),
    "no value": (("--constant", "x"), "'x' has no name and value; write --constant sr=16000"),
    "not a number": (("--constant", "x=a"), "'a' is no value for 'x'; write --constant x=1, =0.5 or =[1,2]"),
    "a constant of another shape": (
        ("--constant", "x=[1,2,3]"),
        "the constant [1, 2, 3] is no value for the input 'x'",
    ),
    "no axis": (("--batch-axis", "-1"), "'-1' is no axis; write --batch-axis 1 or --batch-axis h=1"),
    "no such axis of a state": (("--batch-axis", "7"), "the state 'h' float32 [n, 2] has no axis 7 for the batch"),
    "no such axis of the input": (
        ("--input-batch-axis", "7"),
        "the input 'x' float32 [n, 2] has no axis 7 for the batch",
    ),
    "no shape": (("--step-shape", "a"), "'a' is not a shape; write --step-shape like 512 or 2,128"),
    "a shape of nothing": (("--state-shape", "h=0"), "'0' is not a shape; write --state-shape like 512 or 2,128"),
    "no initial value": (("--initial", "h=no.npy"), "the initial value of 'h' cannot be read: no.npy: No such file"),
    "no example": (("--example", "no.npy"), "the example cannot be read: no.npy: No such file or directory"),
    "no labels": (("--labels", "y"), "'y' does not say the labels of a head; write --labels output=low,high"),
}


@pytest.mark.parametrize("case", WRONG_USAGE)
def test_wrong_usage_is_told_from_a_wrong_model(case: str, tmp_path: Path) -> None:
    options, sentence = WRONG_USAGE[case]
    assert refused(tmp_path, adding()(tmp_path), *options, code=ExitCode.USAGE).startswith(sentence)


def test_an_initial_value_of_another_shape_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "start.npy", np.ones(3))
    sentence = refused(tmp_path, adding()(tmp_path), "--initial", f"h={tmp_path / 'start.npy'}", code=ExitCode.USAGE)
    assert sentence == "the initial value of 'h' does not fit: a number, nested lists or a .npy file of shape [2]"


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        (np.ones((4, 3), np.float32), "a step of shape [3] does not fit the input 'x' float32 [n, 2]"),
        (np.full((4, 2), np.nan), "does not hold finite numbers"),
        (np.array([["a", "b"]]), "does not hold finite numbers"),
        (np.float32(3), "holds []; it must hold steps"),
    ],
)
def test_an_example_that_does_not_fit_is_refused(tmp_path: Path, steps: Array, sentence: str) -> None:
    np.save(tmp_path / "steps.npy", steps)
    result = run(adding()(tmp_path), "-o", tmp_path / "adopted.onnx", "--example", tmp_path / "steps.npy")
    assert result.exit_code in (ExitCode.USAGE, ExitCode.EXPORT)
    assert sentence in result.stderr
    (tmp_path / "steps.npy").write_bytes(b"no array")
    result = run(adding()(tmp_path), "-o", tmp_path / "adopted.onnx", "--example", tmp_path / "steps.npy")
    assert "is not a .npy file of numbers" in result.stderr


# --- files that are none ---


@pytest.mark.parametrize("content", [b"", b"a text file\n", b"PK\x03\x04 a zip", b"\x80\x02 a pickle", b"\x08\x08"])
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert "ONNX file" in refused(tmp_path, path)


def test_every_truncated_file_is_refused(tmp_path: Path) -> None:
    whole = lstm_file(tmp_path / "lstm.onnx").read_bytes()
    path = tmp_path / "cut.onnx"
    for length in range(0, len(whole), len(whole) // 17):
        path.write_bytes(whole[:length])
        assert "ONNX file" in refused(tmp_path, path), length


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, tmp_path / "no.onnx") == "FILE: cannot be read: No such file or directory"


def test_the_model_itself_is_never_written_over(tmp_path: Path) -> None:
    path = lstm_file(tmp_path / "lstm.onnx")
    before = path.read_bytes()
    result = run(path, "-o", tmp_path / ".." / tmp_path.name / "lstm.onnx")
    assert result.exit_code == ExitCode.USAGE
    assert "is the model itself, which is left as it is; name another file to write" in result.stderr
    assert path.read_bytes() == before


def test_a_file_with_a_contract_is_served_and_not_adopted(tmp_path: Path) -> None:
    path = tmp_path / "pump.onnx"
    adopted = run(lstm_file(tmp_path / "lstm.onnx"), "-o", path, "--initial", "h0=0.5", "--features", "a,b,c")
    assert adopted.exit_code == 0, adopted.output
    assert "(opset 17, somebody)" in CliRunner().invoke(main, ["inspect", str(path)]).stdout
    sentence = refused(tmp_path, path, code=ExitCode.USAGE)
    assert sentence == (
        "FILE: has a contract already, which adopting would drop; look at it with recurd inspect, and serve the file "
        "as it is with recurd serve"
    )


def test_an_axis_that_cannot_be_the_batchs_is_told_from_a_shape_that_is_not_said(tmp_path: Path) -> None:
    path = lstm_file(tmp_path / "lstm.onnx")
    sentence = refused(tmp_path, path, "--state", "h0:hn", "--batch-axis", "h0=0", code=ExitCode.USAGE)
    assert sentence == (
        "axis 0 of the state 'h0' float32 [1, batch, 4] is not the batch's, as its size is always 1; say "
        "--batch-axis h0=1, or leave it out"
    )


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    path = lstm_file(tmp_path / "lstm.onnx")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="lstm.bin", size_threshold=64)
    (tmp_path / "lstm.bin").unlink()
    sentence = refused(tmp_path, path)
    assert sentence.startswith("FILE: its weights are in another file that cannot be read; put it beside the model: ")
    assert "lstm.bin" in sentence


def test_an_input_without_a_shape_and_one_that_is_no_tensor_are_refused(tmp_path: Path) -> None:
    def forget(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.ClearField("shape")

    def list_of_tensors(model: onnx.ModelProto) -> None:
        model.graph.input[0].CopyFrom(helper.make_tensor_sequence_value_info("x", 1, None))

    assert "does not say how many axes the input 'x' has" in refused(tmp_path, changed(adding(), forget)(tmp_path))
    sentence = refused(tmp_path, changed(adding(), list_of_tensors)(tmp_path))
    assert sentence == "FILE: 'x' is sequence_type, not a tensor"


# --- TOML ---


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stat = 1", "Object contains unknown field `stat`"),
        ("[[states]]\ninput = 'h'\naxis = 1", "Object contains unknown field `axis` - at `$.states[0]`"),
        ("context = 'a'", "Expected `int`, got `str` - at `$.context`"),
        ("= 1", "Invalid"),
        ("", "no model is named; give MODEL.onnx, or a TOML file that names it"),
        ("model = 'a.onnx'", "no file to write is named; give --out, or a TOML file that names it"),
    ],
)
def test_a_toml_file_with_a_mistake_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "adopt.toml"
    path.write_text(text)
    result = run(path)
    assert result.exit_code == ExitCode.USAGE
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_toml_file_that_is_not_there_and_two_of_them_are_refused(tmp_path: Path) -> None:
    assert "cannot be read: No such file or directory" in run(tmp_path / "no.toml").stderr
    assert "are both TOML files; give one" in run(tmp_path / "a.toml", "--config", tmp_path / "b.toml").stderr


def test_recurd_export_says_that_onnx_files_are_adopted(tmp_path: Path) -> None:
    path = adding()(tmp_path)
    result = CliRunner().invoke(main, ["export", str(path), "--out", str(tmp_path / "a.onnx")])
    assert result.exit_code == ExitCode.USAGE
    assert "recurd adopt adder.onnx" in result.stderr
