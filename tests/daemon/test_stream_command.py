"""``recurd stream`` as a process, as a user runs it, and its readers and writers of rows by themselves."""

import asyncio
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

import recurd
from recurd.cli import main
from recurd.cli.rows import InputError, PredictionWriter, reader
from recurd.signature import Head, Signature


def signature(**changes: Any) -> Signature:
    input = {"dtype": "float32", "shape": [2], "features": ["flow", "temp"]} | changes
    return Signature({"input": input, "heads": [{"name": "y", "shape": [1]}]})


def read_all(format: Any, *lines: str, header: bool = True, ignore_extra: bool = False, **changes: Any) -> list[Any]:
    rows = reader(format, signature(**changes), header=header, ignore_extra=ignore_extra)
    return [row for row in map(rows.read, lines) if row is not None]


# --- rows in ---


def test_columns_are_put_into_the_models_order_by_name() -> None:
    assert read_all("csv", "temp,flow\r\n", "1,2\r\n", "", ' "3", 4.5e0 ') == [[2, 1], [4.5, 3]]


def test_rows_without_names_are_taken_in_the_models_order() -> None:
    assert read_all("csv", "1,2", header=False) == [[1, 2]]
    assert read_all("csv", "a,b", "1,2", features=[]) == [[1, 2]]


def test_extra_columns_are_left_out_on_demand() -> None:
    assert read_all("csv", "time,temp,flow", "noon,1,2", ignore_extra=True) == [[2, 1]]
    assert read_all("jsonl", '{"flow": 1, "temp": 2, "x": null}', ignore_extra=True) == [[1, 2]]


def test_json_rows_are_objects_arrays_or_numbers() -> None:
    assert read_all("jsonl", '{"temp": 1, "flow": 2}', "", "[3, 4.5]", "[[5], [6]]") == [[2, 1], [3, 4.5], [5, 6]]
    assert read_all("jsonl", "7", dtype="int64", shape=[], features=[], classes=8) == [[7]]


@pytest.mark.parametrize(
    ("format", "lines", "sentence"),
    [
        ("csv", ["flow,heat"], "line 1: the columns are not the model's features: missing: 'temp'; unexpected: 'heat'"),
        ("csv", ["flow,temp,x"], "unexpected: 'x' (--ignore-extra leaves them out)"),
        ("csv", ["flow,temp,flow"], "line 1: a column stands twice: 'flow'"),
        ("csv", ["1,2"], "line 1: the first row holds numbers, not the columns' names (--no-header"),
        ("csv", ["1,2.5e3"], "line 1: the first row holds numbers"),
        ("csv", ["flow,temp", "1,2", "1"], "line 3: 1 values, 2 expected"),
        ("csv", ["flow,temp", "", "1,two"], "line 3: 'two' is not a finite number (column 'temp')"),
        ("csv", ["temp,flow", "nan,1"], "line 2: nan is not a finite number (column 'temp')"),
        ("csv", ["flow,temp", ",1"], "line 2: '' is not a finite number (column 'flow')"),
        ("csv", ["flow,temp", '"1,2'], "line 2: not CSV"),
        ("jsonl", ["[1, 2"], "line 1: not JSON"),
        ("jsonl", ["[1, 2]", "[1, null]"], "line 2: None is not a finite number (column 'temp')"),
        ("jsonl", ["[1, 1" + "0" * 400 + "]"], "is not a finite number (column 'temp')"),
        ("jsonl", ["[1, true]"], "line 1: True is not a finite number"),
        ("jsonl", ["[1, 2, 3]"], "line 1: 3 values, the model takes 2"),
        ("jsonl", ['{"flow": 1}'], "line 1: the columns are not the model's features: missing: 'temp'"),
    ],
)
def test_a_bad_row_is_named_with_its_line(format: Any, lines: list[str], sentence: str) -> None:
    with pytest.raises(InputError) as error:
        read_all(format, *lines)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [("1.5", "is not a whole number"), ("8", "8 is not in [0, 8)"), ("-1", "-1 is not in [0, 8)")],
)
def test_token_ids_are_held_against_the_vocabulary(line: str, sentence: str) -> None:
    tokens = {"dtype": "int64", "shape": [], "features": [], "classes": 8}
    for format in ("csv", "jsonl"):
        with pytest.raises(InputError) as error:
            read_all(format, line, header=False, **tokens)
        assert sentence in str(error.value)


@pytest.mark.parametrize("first", ["1", "1.0", "1.5", " 2e3"])
def test_a_first_number_is_no_name_whatever_the_model_takes(first: str) -> None:
    with pytest.raises(InputError, match=r"line 1: the first row holds numbers, .*--no-header"):
        read_all("csv", first, dtype="int64", shape=[], features=[], classes=8)
    with pytest.raises(InputError, match="line 1: the first row holds numbers"):
        read_all("csv", f"a,{first}", features=[])


def test_a_feature_may_be_called_as_a_number_is() -> None:
    assert read_all("csv", "temp,1", "3,4", features=["1", "temp"]) == [[4, 3]]


# --- predictions out ---


def test_csv_columns_are_named_by_labels_and_heads() -> None:
    labelled = Head(name="class", shape=(2,), labels=("ok", "not, ok"))
    plain = Head(name="level", shape=(1,))
    wide = Head(name="wide", shape=(2, 2))
    assert PredictionWriter("csv", (labelled,)).header() == 'ok,"not, ok"\n'
    assert PredictionWriter("csv", (labelled, plain)).header() == 'class.ok,"class.not, ok",level\n'
    assert PredictionWriter("csv", (wide,)).header() == "wide.0,wide.1,wide.2,wide.3\n"


def test_numbers_are_written_with_the_shortest_digits_that_give_them_again() -> None:
    y = np.array([[0.1], [1e-8]], np.float32)
    head = Head(name="y", shape=(1,))
    assert PredictionWriter("csv", (head,)).lines(y) == "0.1\n1e-08\n"
    assert PredictionWriter("jsonl", (head,)).lines(y) == '{"y":0.1}\n{"y":1e-8}\n'
    many = np.random.default_rng(0).standard_normal((100, 1)).astype(np.float32)
    lines = PredictionWriter("jsonl", (head,)).lines(many).splitlines()
    assert [np.float32(msgspec.json.decode(line)["y"]) for line in lines] == many.ravel().tolist()


def test_a_head_of_the_last_step_stands_in_a_chunks_last_line() -> None:
    heads = (Head(name="a", shape=(1,)), Head(name="b", shape=(2,), per="last"))
    result = {"a": np.array([[1], [2]], np.float32), "b": np.array([3, 4], np.float32)}
    assert PredictionWriter("csv", heads).lines(result) == "1.0,,\n2.0,3.0,4.0\n"
    assert PredictionWriter("jsonl", heads).lines(result) == '{"a":1.0}\n{"a":2.0,"b":[3.0,4.0]}\n'
    assert PredictionWriter("csv", heads[1:]).lines(result["b"]) == "3.0,4.0\n"


# --- the command ---


def command(daemon: Any, name: str, *arguments: str, model: str = "sum") -> list[str]:
    line = [sys.executable, "-W", "error", "-m", "recurd", "stream", "--endpoint", daemon.endpoint]
    return [*line, "--model", model, "--stream", name, *arguments]


def run(command: list[str], text: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)


def test_predictions_come_for_every_row_and_the_state_goes_on(daemon: Any, tmp_path: Path) -> None:
    first = run(command(daemon, "cli"), "flow\n" + "1\n" * 200)
    assert (first.stderr, first.returncode) == ("", 0)
    assert first.stdout == "sum\n" + "".join(f"{n}.0\n" for n in range(1, 201))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"flow": 1}\n[2]\n3')
    second = run(command(daemon, "cli", str(rows)))
    assert second.stdout == '{"total":201.0}\n{"total":203.0}\n{"total":206.0}\n'
    third = run(command(daemon, "cli", "--reset", "--no-header", "--chunk-steps", "1"), "1\n1\n")
    assert third.stdout == "1.0\n2.0\n"


def test_models_that_depend_on_where_a_chunk_ends_get_exact_chunks(daemon: Any) -> None:
    result = run(command(daemon, "exact", "--chunk-steps", "2", "--output", "jsonl", model="two"), "flow\n1\n1\n1\n")
    assert result.stdout == '{"total":1.0}\n{"total":2.0,"last":2.0}\n{"total":3.0,"last":3.0}\n'


def test_a_slow_source_gets_its_predictions_at_once(daemon: Any) -> None:
    process = subprocess.Popen(command(daemon, "slow"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        process.stdin.write("flow\n")
        assert process.stdout.readline() == "sum\n"
        for total in range(1, 20):
            process.stdin.write("1\n")
            process.stdin.flush()
            assert process.stdout.readline() == f"{total}.0\n"
        process.stdin.write("1")  # the last line feed is missing
        process.stdin.close()
        assert process.stdout.read() == "20.0\n"
    assert process.returncode == 0


def test_a_stream_that_is_held_to_a_rate_is_waited_for_as_long_as_it_goes_on(
    sum_model: Path, daemon: Any, tmp_path: Path
) -> None:
    config = tmp_path / "recurd.toml"
    config.write_text("[tenants.local.limits]\nchunks_per_second = 10\n")
    slow = type(daemon)(sum_model, "--config", config)
    try:
        line = command(slow, "held", "--chunk-steps", "1", "--timeout", "1")
        all_went_on = run(line, "flow\n" + "1\n" * 40)  # three seconds
    finally:
        slow.stop()
    assert (all_went_on.stderr, all_went_on.returncode) == ("", 0)
    assert all_went_on.stdout.endswith("\n40.0\n")

    config.write_text("[tenants.local.limits]\nchunks_per_second = 0.1\n")
    stuck = type(daemon)(sum_model, "--config", config)
    try:
        line = command(stuck, "held", "--chunk-steps", "1", "--timeout", "1")
        given_up = run(line, "flow\n" + "1\n" * 40)
        with (
            recurd.connect(stuck.endpoint, timeout_seconds=0.5) as client,
            pytest.raises(recurd.Unanswered, match="the daemon said last: limit: tenant 'local' has had its chunks"),
        ):
            client.open("another").push([1])
        with pytest.raises(
            recurd.Unanswered, match=r"'many' was not answered within 0\.5 s; .* last: limit: tenant 'local'"
        ):
            asyncio.run(push_many(stuck.endpoint))
    finally:
        stuck.stop()
    assert given_up.returncode == 69
    assert "were not answered within 1 s; the daemon said last: limit: tenant 'local' has had" in given_up.stderr


async def push_many(endpoint: str) -> None:
    async with recurd.aio.connect(endpoint, timeout_seconds=0.5) as client:
        await client.push_many({await client.open("many"): [1]})


@pytest.mark.parametrize(
    ("arguments", "text", "code", "sentence"),
    [
        ([], "flow\n1\nx\n", 65, "line 3: 'x' is not a finite number (column 'flow')"),
        ([], "heat\n1\n", 65, "missing: 'flow'; unexpected: 'heat'"),
        (["--endpoint", "tcp://127.0.0.1:9", "--timeout", "0.2"], "", 69, "no daemon answered at tcp://127.0.0.1:9"),
        (["--endpoint", "nowhere"], "", 2, "'nowhere' is neither tcp://host:port nor ipc:///path"),
        (["--model", "nope"], "", 1, "unknown_model: there is no model 'nope', only sum, two"),
        (["--format", "xml"], "", 2, "xml"),
        (["no such file.csv"], "", 2, "does not exist"),
    ],
)
def test_errors_are_a_sentence_and_an_exit_code(
    daemon: Any, arguments: list[str], text: str, code: int, sentence: str
) -> None:
    result = run(command(daemon, "cli errors", *arguments), text)
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
    assert result.returncode == code


def test_a_refused_chunk_names_its_lines(daemon: Any) -> None:
    result = run(command(daemon, "overflow", "--chunk-steps", "2"), "flow\n1\n1\n1\n1e300\n")
    assert "lines 4 to 5 were refused: not_finite" in result.stderr
    assert "; the other rows up to line 3 were answered" in result.stderr
    assert (result.stdout, result.returncode) == ("sum\n1.0\n2.0\n", 1)


def test_a_refused_chunk_does_not_cost_the_answers_to_those_behind_it(daemon: Any) -> None:
    rows = "flow\n1\n1\n1e300\n" + "1\n" * 10
    result = run(command(daemon, "behind", "--chunk-steps", "1"), rows)
    assert result.stdout == "sum\n" + "".join(f"{n}.0\n" for n in range(1, 13))
    assert result.stderr.startswith("recurd: lines 4 to 4 were refused: not_finite")
    assert result.stderr.endswith("; the other rows up to line 14 were answered\n")
    assert result.returncode == 1


def test_a_broken_row_does_not_cost_the_answers_to_those_before_it(daemon: Any) -> None:
    result = run(command(daemon, "broken row"), "flow\n" + "1\n" * 150 + "oops\n" + "1\n" * 10)
    assert result.stdout == "sum\n" + "".join(f"{n}.0\n" for n in range(1, 151))
    assert result.stderr == (
        "recurd: line 152: 'oops' is not a finite number (column 'flow'); rows up to line 151 were answered; "
        "go on from line 152\n"
    )
    assert result.returncode == 65
    goes_on = run(command(daemon, "broken row", "--no-header"), "1\n")
    assert goes_on.stdout == "151.0\n"


def test_a_broken_row_does_not_cut_a_chunk_short_where_that_matters(daemon: Any) -> None:
    arguments = ["--chunk-steps", "2", "--output", "jsonl"]
    result = run(command(daemon, "broken exact", *arguments, model="two"), "flow\n1\n1\n1\noops\n")
    assert result.stdout == '{"total":1.0}\n{"total":2.0,"last":2.0}\n'
    assert "line 5: 'oops'" in result.stderr
    assert result.stderr.endswith("; rows up to line 3 were answered; go on from line 4\n")


def test_a_model_has_to_be_named_where_there_are_several(daemon: Any) -> None:
    line = [part for part in command(daemon, "which") if part not in ("--model", "sum")]
    result = run(line, "flow\n1\n")
    assert "the daemon serves several models; name one with --model: sum, two" in result.stderr
    assert (result.returncode, "Traceback" in result.stderr) == (2, False)


def test_a_full_disk_is_told_with_the_lines_that_were_answered(daemon: Any) -> None:
    with Path("/dev/full").open("wb") as full:
        pipes: dict[str, Any] = {"input": b"flow\n1\n", "stdout": full, "stderr": subprocess.PIPE}
        result = subprocess.run(command(daemon, "full"), timeout=60, check=False, **pipes)
        sentence = b"recurd: the predictions cannot be written: No space left on device; no row was sent\n"
        assert (result.stderr, result.returncode) == (sentence, 1)

        # without a header they have run by the time that it is found out
        headless = command(daemon, "full", "--no-header")
        result = subprocess.run(headless, timeout=60, check=False, **pipes | {"input": b"1\n1\n1\n"})
    assert result.stderr.endswith(b"; rows up to line 3 were sent, and the stream goes on behind them\n")
    assert run(headless, "1\n").stdout == "4.0\n"


def test_one_is_told_that_a_stream_begins_afresh_or_has_it_refused(daemon: Any) -> None:
    gone = run(command(daemon, "resumed", "--resume"), "flow\n1\n")
    assert (gone.returncode, "there is no stream 'resumed' to resume" in gone.stderr) == (1, True)
    assert run(command(daemon, "resumed", "--no-header"), "1\n").stderr == ""
    assert run(command(daemon, "resumed", "--no-header", "--resume", "--close"), "1\n").stdout == "2.0\n"
    again = run(command(daemon, "resumed", "--no-header"), "1\n")
    assert (again.stdout, "stream 'resumed' begins afresh" in again.stderr) == ("1.0\n", True)
    both = run(command(daemon, "resumed", "--reset", "--resume"))
    assert (both.returncode, "--reset starts afresh" in both.stderr) == (2, True)


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "0", "soon"])
@pytest.mark.parametrize("line", [["stream", "--stream", "s"], ["reload"], ["bench"], ["drain", "--cancel"]])
def test_a_time_out_is_a_finite_number_of_seconds(line: list[str], seconds: str) -> None:
    result = CliRunner().invoke(main, [*line, "--timeout", seconds])
    assert (result.exit_code, "'--timeout'" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("descriptor", "sentence"), [(0, "standard input is closed: name a FILE"), (1, "standard output is closed")]
)
def test_a_closed_standard_stream_is_wrong_usage(daemon: Any, descriptor: int, sentence: str) -> None:
    shell = ["sh", "-c", f'exec "$@" {descriptor}{"<>"[descriptor]}&-', "sh", *command(daemon, "shut")]
    result = run(shell)
    assert sentence in result.stderr
    assert (result.returncode, "Traceback" in result.stderr) == (2, False)


def test_a_closed_streams_state_is_forgotten(daemon: Any) -> None:
    assert run(command(daemon, "closing", "--close"), "flow\n4\n").stdout == "sum\n4.0\n"
    with recurd.connect(daemon.endpoint) as client, pytest.raises(recurd.RecurdError, match="closed"):
        client.open("closing", model="sum", mode="resume")


def test_a_lost_state_is_told_with_the_lines_that_were_answered(daemon: Any, sum_model: Path) -> None:
    mortal = type(daemon)(sum_model)
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command(mortal, "lost"), text=True, **pipes) as process:
        process.stdin.write("flow\n1\n")
        process.stdin.flush()
        assert [process.stdout.readline() for _ in range(2)] == ["sum\n", "1.0\n"]
        mortal.kill()
        mortal = type(daemon)(sum_model, port=mortal.port)
        output, errors = process.communicate("1\n", timeout=60)
    mortal.stop()
    assert (output, process.returncode) == ("", 1)
    assert "the daemon was restarted (or forgot the stream), the state of stream 'lost' is lost" in errors
    assert errors.endswith("; rows up to line 2 were answered\n")


def test_a_wait_for_the_daemon_is_told_on_a_terminal() -> None:
    terminal, other = pty.openpty()
    line = [sys.executable, "-m", "recurd", "stream", "--endpoint", "tcp://127.0.0.1:9", "--stream", "waits"]
    with subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=other) as process:
        os.close(other)
        assert select.select([terminal], [], [], 20)[0]
        assert os.read(terminal, 65536).startswith(b"recurd: waiting for a daemon at tcp://127.0.0.1:9 ...")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    os.close(terminal)


@pytest.fixture
def running(daemon: Any) -> "Iterator[subprocess.Popen[str]]":
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command(daemon, "running", "--reset"), text=True, **pipes) as process:  # type: ignore[call-overload]
        process.stdin.write("flow\n1\n")
        process.stdin.flush()
        assert [process.stdout.readline() for _ in range(2)] == ["sum\n", "1.0\n"]
        yield process
        process.kill()


def test_rows_that_are_late_are_left_out_and_told(daemon: Any) -> None:
    done = run(command(daemon, "late rows", "--expires", "1e-9", "--chunk-steps", "2"), "flow\n1\n2\n3\n")
    assert (done.stdout, done.returncode) == ("sum\n", 0)
    assert done.stderr == "recurd: lines 2 to 3 were late and not run\nrecurd: lines 4 to 4 were late and not run\n"
    assert run(command(daemon, "late rows", "--expires", "20"), "flow\n5\n").stdout == "sum\n5.0\n"


def test_ctrl_c_is_clean(running: Any) -> None:
    running.send_signal(signal.SIGINT)
    assert running.wait(20) == 130
    assert running.stderr.read() == ""


def test_a_reader_that_has_seen_enough_ends_it(running: Any) -> None:
    running.stdout.close()  # what "head" does; no further row comes
    assert running.wait(20) == 0
    assert running.stderr.read() == ""


def test_a_file_on_a_terminal_shows_progress_beside_the_predictions(daemon: Any, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("flow\n" + "1\n" * 20_000)
    predictions = tmp_path / "predictions.csv"
    terminal, other = pty.openpty()
    with predictions.open("wb") as stdout:
        process = subprocess.Popen(
            command(daemon, "bar", str(rows)), stdout=stdout, stderr=other, env={**os.environ, "TERM": "xterm"}
        )
    os.close(other)
    shown = b""
    while select.select([terminal], [], [], 20)[0]:
        try:
            shown += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
    os.close(terminal)
    assert process.wait(20) == 0
    assert b"rows.csv" in shown
    assert predictions.read_text().endswith("\n20000.0\n")
