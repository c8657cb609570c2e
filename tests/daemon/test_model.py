"""A loaded model: ticks, rows in and out, and files that are refused in one sentence."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

from recurd import contract as c
from recurd import verify
from recurd.errors import ContractError, DeviceError, StartError
from recurd.model import Model, resolve_device
from recurrent import Array, Network

NETWORK = Network(counter=True, learned=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pump.onnx"


@pytest.fixture
def model(path: Path) -> Model:
    return Model.load(NETWORK.save(path), slots=6, threads=1)


def tick(model: Model, slots: list[int], x: Array, *, fresh: bool = True, lengths: Any = None) -> list[Array]:
    steps = np.array([x.shape[1]] * len(slots) if lengths is None else lengths, np.int32)
    return model.run(np.array(slots, np.int64), np.full(len(slots), fresh), steps, x)


def draw(rows: int, steps: int = 3) -> Array:
    return np.random.default_rng(0).standard_normal((rows, steps, 3), np.float32)


# --- ticks ---


def test_a_stream_goes_on_in_another_slot_with_the_state_it_is_given(model: Model) -> None:
    x = draw(1, 8)
    tick(model, [4], x[:, :5])

    model.write(np.array([1]), model.read(np.array([4])))
    (after,) = tick(model, [1], x[:, 5:], fresh=False)

    np.testing.assert_allclose(after[0], NETWORK.run(x[0])[0]["output"][5:], rtol=0, atol=1e-5)
    assert model.read(np.array([1]))["count"].tolist() == [[48]]


def test_states_are_read_batch_first_by_name_and_dtype(model: Model) -> None:
    tick(model, [0, 5, 2], draw(3))

    states = model.read(np.array([5, 0]))

    assert list(states) == [state.name for state in model.contract.states]
    assert {name: (value.shape, value.dtype.name) for name, value in states.items()} == {
        **{f"lstm.{kind}_l{layer}": ((2, 1, 5), "float32") for layer in (0, 1) for kind in "hc"},
        "count": ((2, 1), "int64"),
    }
    for row, stream in enumerate((1, 0)):
        _, expected = NETWORK.run(draw(3)[stream])
        for name, value in states.items():
            np.testing.assert_allclose(value[row], expected[name], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("slots", "lengths"),
    [([], []), ([-1], [3]), ([7], [3]), ([0, 10**9], [3, 3]), ([0], [0]), ([0, 1], [3, 0]), ([0], [4]), ([0], [-1])],
    ids=str,
)
def test_a_tick_that_would_harm_is_refused_and_harms_nobody(model: Model, slots: list[int], lengths: list[int]) -> None:
    tick(model, [0, 1, 2, 3, 4, 5], draw(6))
    before = model.read(np.arange(6))

    with pytest.raises(ValueError, match="a tick"):
        tick(model, slots, draw(len(slots)), lengths=lengths)

    for name, value in model.read(np.arange(6)).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_tick_of_the_wrong_width_raises_and_the_model_serves_on(model: Model) -> None:
    with pytest.raises(Exception, match=r"(?i)dimension"):
        tick(model, [0], np.zeros((1, 3, 4), np.float32))

    (y,) = tick(model, [0], draw(1))
    np.testing.assert_allclose(y[0], NETWORK.run(draw(1)[0])[0]["output"], rtol=0, atol=1e-5)


def test_what_the_arenas_take_is_told(model: Model) -> None:
    assert model.state_bytes == 6 * (4 * 5 * 4 + 8)


# --- devices ---


def test_the_cpu_is_always_to_be_had() -> None:
    assert resolve_device("cpu") == ("cpu", None)


def test_a_gpu_that_cannot_be_had_is_told_in_one_sentence() -> None:
    if resolve_device("auto")[1] is None:
        pytest.skip("there is a GPU here")
    for wanted in ("cuda", "cuda:0", "cuda:7"):
        with pytest.raises(DeviceError) as error:
            resolve_device(wanted)
        assert f"'{wanted}'" in str(error.value)
        assert "\n" not in str(error.value)
    device, reason = resolve_device("auto")
    assert device == "cpu"
    assert reason


# --- files that are no good ---


def refused(path: Path) -> str:
    """The one sentence that a file is refused with, without its name."""
    with pytest.raises(ContractError) as error:
        Model.load(path, slots=2, threads=1)
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


def test_a_file_that_is_not_there(path: Path) -> None:
    assert "no such file" in refused(path)


def test_a_folder(path: Path) -> None:
    path.mkdir()
    assert "cannot be read" in refused(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x08\x08", b"\xff" * 1000, "cut"], ids=["empty", *"abc", "cut"])
def test_a_file_that_is_no_model(path: Path, content: bytes | str) -> None:
    whole = NETWORK.save(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)

    assert "not a valid ONNX model" in refused(path)


def test_a_model_without_a_contract_is_told_how_to_get_one(path: Path) -> None:
    onnx.save(NETWORK.model(), path)

    assert "recurd export" in refused(path)
    assert "pump.contract.json" in refused(path)


@pytest.mark.parametrize("text", ["", "{", "7", "{}", '{"format": "1"}', '{"name": "\\ud800"}', "[" * 50_000])
def test_a_contract_that_cannot_be_read(path: Path, text: str) -> None:
    model = NETWORK.model()
    model.metadata_props.add(key=c.METADATA_KEY, value=text)
    onnx.save(model, path)

    assert "contract cannot be read" in refused(path)


def tensor(dtype: str, shape: tuple[int, ...], size: int) -> c.Tensor:
    return c.Tensor(dtype, shape, b"\0" * size)


def with_state(**changes: Any) -> dict[str, Any]:
    first, *others = NETWORK.contract(NETWORK.model()).states
    return {"states": (msgspec.structs.replace(first, **changes), *others)}


def with_head(**changes: Any) -> dict[str, Any]:
    (head,) = NETWORK.contract(NETWORK.model()).heads
    return {"heads": (msgspec.structs.replace(head, **changes),)}


def with_input(**changes: Any) -> dict[str, Any]:
    return {"input": msgspec.structs.replace(NETWORK.contract(NETWORK.model()).input, **changes)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "format 2"),
        ({"weights_sha256": "0" * 64}, "weights"),
        ({"heads": ()}, "no head"),
        ({"states": ()}, "no state"),
        ({"lengths": "steps"}, "missing ['steps'], unexpected ['lengths']"),
        (with_input(name="x"), "missing ['x'], unexpected ['input']"),
        (with_input(dtype="int64"), "int64"),
        (with_input(shape=()), "axes"),
        (with_input(shape=(4,)), "'input'"),
        (with_head(name="y"), "missing ['y'], unexpected ['output']"),
        (with_head(dtype="float64"), "float64"),
        (with_head(per="last"), "axes"),
        (with_head(shape=(3,)), "'output'"),
        (with_head(dtype="nonsense"), "nonsense"),
        (with_state(output="h"), "unexpected ['lstm.h_l0.next']"),
        (with_state(dtype="float64"), "float64"),
        (with_state(dtype="nonsense", initial=None), "nonsense"),
        (with_state(batch_axis=3), "batch axis 3"),
        (with_state(batch_axis=-1), "batch axis -1"),
        (with_state(shape=(1, 4), initial=None), "'lstm.h_l0'"),
        (with_state(shape=(-1, 5), initial=None), "'lstm.h_l0'"),
        (with_state(initial=tensor("float32", (5,), 20)), "initial value"),
        (with_state(initial=tensor("float32", (1, 5), 16)), "initial value"),
        (with_state(initial=tensor("nonsense", (1, 5), 20)), "initial value"),
        (with_state(initial=tensor("int64", (1, 5), 40)), "initial value"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_contract_that_is_not_the_models(path: Path, changes: dict[str, Any], words: str) -> None:
    assert words in refused(NETWORK.save(path, **changes))


def test_a_head_of_a_type_the_protocol_cannot_carry(path: Path) -> None:
    network = Network(layers=1)
    model = network.model()
    model.graph.node.append(onnx.helper.make_node("Cast", ["output"], ["positive"], to=onnx.TensorProto.BOOL))
    model.graph.output.append(onnx.helper.make_tensor_value_info("positive", 9, ["batch", "time", 2]))
    head = c.Head(name="positive", dtype="bool", shape=(2,))
    contract = network.contract(model)
    c.attach(model, msgspec.structs.replace(contract, heads=(*contract.heads, head)))
    onnx.save(model, path)

    assert "bool" in refused(path)


def test_a_contract_beside_the_file_serves_a_foreign_model(path: Path) -> None:
    network = Network()
    model = network.model()
    onnx.save(model, path)
    path.with_suffix(".contract.json").write_bytes(msgspec.json.encode(network.contract(model)))

    (y,) = tick(Model.load(path, slots=2, threads=1), [0], draw(1))

    np.testing.assert_allclose(y[0], network.run(draw(1)[0])[0]["output"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"name": "\xff"}'])
def test_a_contract_beside_the_file_that_cannot_be_read(path: Path, content: bytes) -> None:
    NETWORK.save(path)
    path.with_suffix(".contract.json").write_bytes(content)

    assert "contract cannot be read" in refused(path)


def test_a_folder_where_the_contract_should_be(path: Path) -> None:
    NETWORK.save(path)
    path.with_suffix(".contract.json").mkdir()

    assert "contract" in refused(path)


# --- the golden run ---


def proof(**changes: Any) -> dict[str, Any]:
    true = NETWORK.golden(NETWORK.contract(NETWORK.model()))
    return {"proof": msgspec.structs.replace(true, golden=msgspec.structs.replace(true.golden, **changes))}


@pytest.mark.parametrize("slots", [1, 2, 8])
def test_a_true_golden_run_is_confirmed_with_its_error(path: Path, slots: int) -> None:
    error = verify.replay_golden(Model.load(NETWORK.save(path, proof=True), slots=slots, threads=1))

    assert error is not None
    assert error < 1e-6


def test_without_a_proof_there_is_nothing_to_replay(model: Model) -> None:
    assert verify.replay_golden(model) is None


def off_by(tensor: c.Tensor, amount: float) -> c.Tensor:
    array = tensor.array().copy()
    array[0, 1, 0] += np.asarray(amount, array.dtype)
    return c.Tensor.of(array)


def test_another_output_or_state_than_the_golden_one_stops_the_start_with_its_numbers(path: Path) -> None:
    true = proof()["proof"].golden
    wrong_output = proof(outputs={"output": off_by(true.outputs["output"], 0.125)})
    count = true.states["count"]
    wrong_state = proof(states=true.states | {"count": c.Tensor.of(count.array() + 2)})
    for changes, words in ((wrong_output, "'output' is off by 0.125"), (wrong_state, "'count' is off by 2")):
        with pytest.raises(ContractError, match=words):
            verify.replay_golden(Model.load(NETWORK.save(path, **changes), slots=4, threads=1))


def test_a_golden_nan_is_a_mismatch(path: Path) -> None:
    true = proof()["proof"].golden
    changes = proof(outputs={"output": off_by(true.outputs["output"], np.nan)})

    with pytest.raises(ContractError, match="off by nan"):
        verify.replay_golden(Model.load(NETWORK.save(path, **changes), slots=4, threads=1))


TRUE = proof()["proof"].golden


@pytest.mark.parametrize(
    "changes",
    [
        {"outputs": {}},
        {"outputs": {"other": TRUE.outputs["output"]}},
        {"states": {}},
        {"lengths": c.Tensor.of(np.array([4, 9], np.int32))},
        {"lengths": c.Tensor.of(np.array([4, 0], np.int32))},
        {"lengths": c.Tensor.of(np.array([4], np.int32))},
        {"input": c.Tensor.of(np.zeros((2, 4), np.float32))},
        {"input": c.Tensor.of(np.zeros((0, 4, 3), np.float32))},
        {"input": c.Tensor.of(np.zeros((2, 4, 9), np.float32))},
        {"input": tensor("float32", (2, 4, 3), 5)},
        {"input": tensor("nonsense", (2, 4, 3), 96)},
        {"outputs": {"output": c.Tensor.of(np.zeros((2, 4), np.float32))}},
        {"outputs": {"output": c.Tensor.of(np.zeros((1, 4, 2), np.float32))}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_golden_run_that_cannot_be_replayed_stops_the_start_in_one_sentence(
    path: Path, changes: dict[str, Any]
) -> None:
    NETWORK.save(path, **proof(**changes))

    with pytest.raises(StartError) as error:
        verify.replay_golden(Model.load(path, slots=4, threads=1))

    assert "golden" in str(error.value)
    assert "\n" not in str(error.value)
