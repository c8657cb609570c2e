"""Files of streams: what is written is read again, and a hostile file ends in one sentence."""

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from recurd import statefile
from recurd.errors import ExitCode, StateFileError
from recurd.saving import ModelStamp, Parcel, SavedStream, Stamp

STAMP = Stamp("ab" * 32, "h float32 [1, 2], n int64 [1], c float32 [3]", "onnxruntime 1", "cpu")
#: One dtype after another: h, c, n.
ROW = np.arange(5, dtype="<f4").tobytes() + np.array([7], "<i8").tobytes()


def parcel(name: str = "s", model: str = "pump", state: bytes | None = ROW, **changes: Any) -> Parcel:
    saved = SavedStream("local", name, model, 1, 2, 9, 7, 60.0, state)
    answers = [(8, 2, b"header", b"data"), (9, 2, b"other", b"")]
    return Parcel(77, msgspec.structs.replace(saved, **changes), answers, STAMP.state_hash)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "streams.safetensors"
    statefile.write(path, [parcel("a"), parcel("b", state=None)], [ModelStamp("pump", STAMP)])
    return path


def test_what_is_written_is_read(file: Path) -> None:
    assert statefile.read(file) == ([parcel("a"), parcel("b", state=None)], [ModelStamp("pump", STAMP)])
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_states_are_tensors_by_name(file: Path) -> None:
    tensors = load_file(file)
    assert {name: tensor.tolist() for name, tensor in tensors.items() if "/" in name} == {
        "pump/h": [[[0, 1]]],
        "pump/c": [[2, 3, 4]],
        "pump/n": [[7]],
    }


def test_two_versions_of_a_model_are_told_apart(tmp_path: Path) -> None:
    other = msgspec.structs.replace(STAMP, state_hash="cd" * 32)
    streams = [parcel("a"), msgspec.structs.replace(parcel("b"), state_hash=other.state_hash)]
    stamps = [ModelStamp("pump", STAMP), ModelStamp("pump", other)]
    statefile.write(tmp_path / "f", streams, stamps)
    assert statefile.read(tmp_path / "f") == (streams, stamps)
    assert "pump@cdcdcdcdcdcdcdcd/h" in load_file(tmp_path / "f")


def test_no_streams_make_a_file_too(tmp_path: Path) -> None:
    statefile.write(tmp_path / "f", [], [])
    assert statefile.read(tmp_path / "f") == ([], [])


def test_a_file_that_cannot_be_written_is_told_and_the_former_one_stays(file: Path, tmp_path: Path) -> None:
    with pytest.raises(StateFileError, match="cannot be written: No such file"):
        statefile.write(tmp_path / "no" / "f", [], [])
    before = file.read_bytes()
    wrong = [parcel(state=ROW[:-1])]
    with pytest.raises(StateFileError, match="names that a file cannot have"):
        statefile.write(file, wrong, [ModelStamp("pump", STAMP)])
    assert file.read_bytes() == before


def rewrite(file: Path, entries: Any = None, stamps: Any = None, **tensors: Any) -> None:
    """The file again, with some of it replaced."""
    length = struct.unpack("<Q", file.read_bytes()[:8])[0]
    metadata = json.loads(file.read_bytes()[8 : 8 + length])["__metadata__"]
    found = load_file(file)
    if entries is not None:
        found["streams"] = np.frombuffer(json.dumps(entries(json.loads(found["streams"].tobytes()))).encode(), np.uint8)
    if stamps is not None:
        metadata["stamps"] = json.dumps(stamps)
    found = {name: value for name, value in (found | tensors).items() if value is not None}
    save_file(found, file, metadata | {"sha256": statefile.digest(found, metadata["stamps"])})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"entries": lambda found: [found[0] | {"row": 1}]}, "the state of stream 'a' is not in it"),
        ({"entries": lambda found: [found[0] | {"row": -1}]}, "the state of stream 'a' is not in it"),
        ({"entries": lambda found: [found[0] | {"model": "fan"}]}, "the state of stream 'a' is not in it"),
        (
            {"entries": lambda found: [found[0] | {"answers": [[8, 2, 6, 999]]}]},
            "answer 8 of stream 'a' is not in it",
        ),
        ({"entries": lambda found: [found[0] | {"answers": [[8, 2, 60, -60]]}]}, "answer 8 of stream 'a' is not in it"),
        ({"entries": lambda found: [found[0] | {"handle": "x"}]}, "Expected `int`"),
        ({"entries": lambda found: [found[0] | {"handle": 2**64}]}, "the numbers of stream 'a' cannot be"),
        ({"entries": lambda found: [found[0] | {"answers": [[-8, 2, 0, 0]]}]}, "the numbers of stream 'a' cannot be"),
        ({"entries": lambda found: {}}, "Expected `array`"),
        ({"stamps": 5}, "Expected `array`"),
        ({"streams": None}, "it has no 'streams' of bytes"),
        ({"answers": np.zeros(3, np.float32)}, "it has no 'answers' of bytes"),
        ({"pump/h": np.zeros((1, 2, 1), np.float32)}, "'pump/h' is not float32"),
        ({"pump/h": np.zeros((1, 1, 2), np.float64)}, "'pump/h' is not float32"),
        ({"pump/h": np.zeros((2, 1, 2), np.float32)}, "are of different numbers of streams"),
        ({"pump/h": None}, "the state of stream 'a' is not in it"),
    ],
)
def test_a_file_whose_parts_do_not_fit_is_refused_in_one_sentence(
    file: Path, changes: dict[str, Any], words: str
) -> None:
    rewrite(file, **changes)
    with pytest.raises(StateFileError) as refused:
        statefile.read(file)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == ExitCode.CONTRACT


def test_other_files_are_not_files_of_streams(tmp_path: Path) -> None:
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "other")
    with pytest.raises(StateFileError, match="not a file of streams, or of a later version"):
        statefile.read(tmp_path / "other")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(StateFileError, match="not a file of streams"):
        statefile.read(tmp_path / "text")
    with pytest.raises(StateFileError):
        statefile.read(tmp_path / "nothing")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.integers(0, 200))
def test_damaged_bytes_give_what_was_written_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int, cut: int
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "f"
    written = [parcel("a"), parcel("b", state=None)]
    statefile.write(path, written, [ModelStamp("pump", STAMP)])
    data = bytearray(path.read_bytes())
    data[place % len(data)] = byte
    path.write_bytes(bytes(data[: len(data) - cut] if cut > 150 else data))
    with contextlib.suppress(StateFileError):  # anything else fails the test
        assert statefile.read(path) == (written, [ModelStamp("pump", STAMP)])
