"""Log lines as key=value or JSON, one event a line whatever stands in it."""

import io
import json
import os
from pathlib import Path

import pytest

from recurd.config import Log
from recurd.logs import open_log


def test_a_line_is_time_level_event_and_fields() -> None:
    stream = io.StringIO()

    open_log(Log(), stream, {}).bind(model="pump").info("stream expired", stream="a b", idle_seconds=1.5, fresh=True)

    time, _, rest = stream.getvalue().partition(" ")
    assert time.startswith("time=20")
    assert time.endswith("Z")
    assert rest == 'level=info event="stream expired" model=pump stream="a b" idle_seconds=1.5 fresh=true\n'


def test_json_lines_begin_with_the_same_fields() -> None:
    stream = io.StringIO()

    open_log(Log(format="json"), stream, {}).warning("full", slots=8)

    line = json.loads(stream.getvalue())
    assert list(line) == ["time", "level", "event", "slots"]
    assert (line["level"], line["event"], line["slots"]) == ("warning", "full", 8)


@pytest.mark.parametrize("form", ["keyvalue", "json"])
def test_an_exception_is_one_line_with_its_traceback(form: str) -> None:
    stream = io.StringIO()
    log = open_log(Log(format=form), stream, {})  # type: ignore[arg-type]

    try:
        raise ZeroDivisionError("over nothing")
    except ZeroDivisionError:
        log.exception("bug")

    assert stream.getvalue().count("\n") == 1
    assert "Traceback" in stream.getvalue()
    assert "ZeroDivisionError: over nothing" in stream.getvalue()
    assert "error" in stream.getvalue()


@pytest.mark.parametrize("form", ["keyvalue", "json"])
def test_a_clients_text_can_neither_begin_a_line_nor_reach_the_terminal(form: str) -> None:
    stream = io.StringIO()

    open_log(Log(format=form), stream, {}).info("hello", client='x\nlevel=error\r\x1b[31m"\u2028', number=None)  # type: ignore[arg-type]

    line = stream.getvalue()
    assert len(line.splitlines()) == 1
    assert "\x1b" not in line


def test_what_is_below_the_level_is_left_out() -> None:
    stream = io.StringIO()
    log = open_log(Log(level="warning"), stream, {})

    log.info("not this")
    log.error("this")

    assert "not this" not in stream.getvalue()
    assert "event=this" in stream.getvalue()


@pytest.mark.parametrize("form", ["keyvalue", "json"])
def test_in_the_journal_a_line_has_a_priority_and_no_time(tmp_path: Path, form: str) -> None:
    with (tmp_path / "journal").open("w+") as stream:
        status = os.fstat(stream.fileno())
        log = open_log(Log(format=form), stream, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})  # type: ignore[arg-type]

        log.warning("full")
        log.error("bug")

        stream.seek(0)
        lines = stream.read().splitlines()
    assert [line[:3] for line in lines] == ["<4>", "<3>"]
    assert "time" not in lines[0]


def test_a_stream_that_is_not_the_journals_keeps_its_time(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+") as stream:
        open_log(Log(), stream, {"JOURNAL_STREAM": "1:2"}).info("started")

        stream.seek(0)
        assert stream.read().startswith("time=")


def test_two_loggers_do_not_share_anything() -> None:
    first, second = io.StringIO(), io.StringIO()

    open_log(Log(), first, {}).info("one")
    open_log(Log(format="json"), second, {}).info("two")

    assert "event=one" in first.getvalue()
    assert json.loads(second.getvalue())["event"] == "two"
