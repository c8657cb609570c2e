"""The report as a page: complete, self-contained, and nobody's name in it is markup."""

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper
from torch import Tensor, nn

import recurd_export
from recurd.cli import main
from recurd_export import diagram, plot
from recurd_export.drift import Curve
from recurd_export.errors import ExportError
from recurd_export.markup import Html, tag, text
from recurd_export.report import Report

NASTY = "<script>alert('1')<b> & \"pump\""
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """What a browser sees: text by element, tags, attributes; fails where tags do not match."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.by_tag: dict[str, list[str]] = {}
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)
            self.by_tag.setdefault(self.open[-1], []).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(3, 5, 2, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)[0])


class Written:
    """An export and its page."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(4)
        self.path = folder / "report.html"
        self.report: Report = recurd_export.export(
            Net(),
            torch.zeros(1, 5, 3),
            folder / "m.onnx",
            name=NASTY,
            version="<2>",
            features=["<img src=x onerror=y>", "flow", "p"],
            units=["l/s", "bar", "&"],
            labels={"output": ["<b>", "ok"]},
            sample_rate_hz=50,
            normalize=([1, 2, 3], [4, 5, 6]),
            precision="float16",
            state_precision="float32",
            report=self.path,
        )
        self.source = self.path.read_text()
        self.page = Page(self.source)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("page"))


def test_no_name_becomes_markup(written: Written) -> None:
    page = written.page

    assert NASTY in page.text
    assert not {"script", "img", "b", "iframe", "object", "link"} & set(page.tags)
    assert "<script" not in written.source
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "<img src=x onerror=y> [l/s], flow [bar], p [&]" in page.text
    assert "Version <2>" in page.text


def test_nothing_is_loaded_from_anywhere(written: Written) -> None:
    loading = [(name, value) for _, name, value in written.page.attributes if name in ("src", "href", "srcset", "data")]

    assert not loading
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", written.source)
    assert any("default-src 'none'" in value for _, _, value in written.page.attributes)


def test_it_has_what_was_found(written: Written) -> None:
    page, report = written.page, written.report
    contract = report.contract

    wanted = ["Errors over time", "Chunk invariance", "Hoisted states", "Contract", "Graph", "Origin"]
    assert page.by_tag["h2"] == wanted
    for check in report.checks:
        assert check.name in page.by_tag["strong"]
        assert f"{check.error:.1e}" in page.text
    for state in contract.states:
        assert state.name in page.by_tag["code"]
    for said in (
        contract.weights_sha256, "float16, states float32", "50 Hz", "encoder (LSTM)", "float32 [batch, time, 3]",
        "float32 [1, 5]", "1, 2, 3", "4, 5, 6", "<b>, ok", f"torch {contract.source.versions['torch']}", "ai.onnx 18",
        f"error nearest its bound in {report.drift.steps:,} steps",
    ):  # fmt: skip
        assert said in page.text, said
    assert [note for note in report.notes if note not in page.text] == []


def test_it_can_be_read_on_a_phone_in_the_dark_and_on_paper(written: Written) -> None:
    assert ("meta", "name", "viewport") in written.page.attributes
    for rule in ("prefers-color-scheme: dark", "@media print", "max-width: 36rem"):
        assert rule in written.source
    assert written.page.tags.count("svg") == 2
    assert [name for tag, name, _ in written.page.attributes if tag == "svg" and name in ("width", "height")] == []
    assert len(written.source) < 60_000


def test_the_graph_is_drawn_with_its_states(written: Written) -> None:
    graph = written.source.partition("<h2>Graph</h2>")[2].partition("<h2>")[0]
    nodes = onnx.load(written.report.path).graph.node

    assert graph.count("<rect") == len(nodes)
    assert graph.count('class="box recurrent"') == 2
    for state in written.report.contract.states:
        assert f">{state.name}</text>" in graph
        assert f">{state.output}</text>" in graph


CURVES = (
    Curve("rises", "head", (10, 20, 30), (1e-6, 1e-4, 1e-2), 1.0, 1e-4),
    Curve("<none>", "state", (10, 30), (0.0, 0.0), 1.0, 1e-4),
    Curve("lost", "state", (10, 30), (1e-5, float("inf")), 1.0, 1e-4),
)


def test_the_plot_has_a_logarithmic_axis_and_the_bound() -> None:
    drawn = plot.plot(CURVES, 30)
    page = Page(drawn)

    labels = page.by_tag["text"]
    assert "allowed" in labels
    assert [label for label in labels if label.startswith("0.")] == ["0.001", "0.01", "0.1"]
    assert {"10", "100", "30", "steps"} <= set(labels)
    bound = next(
        value for tag, name, value in page.attributes if (tag, name) == ("path", "d") and value in _bounds(drawn)
    )
    height = float(bound.split(" ")[1].split("H")[0])
    lines = [value for _, name, value in page.attributes if name == "points"]
    rises, none, lost = ([float(point.split(",")[1]) for point in line.split()] for line in lines)
    assert rises[1] == height
    assert rises[0] - rises[1] == pytest.approx(rises[1] - rises[2], abs=0.2)
    assert none == [max(none)] * 2
    assert lost[1] == min(*rises, *none, *lost)
    assert "<none>" in page.by_tag["title"]
    assert all(np.isfinite([*rises, *none, *lost]))


def _bounds(drawn: str) -> list[str]:
    return re.findall(r'<path d="([^"]+)" class="bound">', drawn)


def _chain(count: int) -> onnx.ModelProto:
    names = ["input", *(f"t{i}" for i in range(count))]
    nodes = [helper.make_node("Neg", [a], [b]) for a, b in itertools.pairwise(names)]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in (names[0], names[-1])]
    return helper.make_model(helper.make_graph(nodes, "chain", values[:1], values[1:]))


@pytest.mark.parametrize(("count", "rest"), [(48, None), (49, "and 1 more"), (500, "and 452 more")])
def test_a_large_graph_is_cut_off_with_a_count(written: Written, count: int, rest: str | None) -> None:
    page = Page(diagram.diagram(_chain(count), written.report.contract))

    assert page.tags.count("rect") == 48
    assert [said for said in page.by_tag["text"] if " more" in said] == ([rest] if rest else [])


def test_long_names_are_shortened_and_told_whole(written: Written) -> None:
    contract = written.report.contract
    long = "encoder.layers.0.block.1.recurrent.attention.h_l0"
    model = _chain(1)
    model.graph.node[0].input[0] = long
    state = msgspec.structs.replace(contract.states[0], name=long, output="t0")

    page = Page(diagram.diagram(model, msgspec.structs.replace(contract, states=(state,))))

    assert "…rent.attention.h_l0" in page.by_tag["text"]
    assert long in page.by_tag["title"]


def test_text_is_escaped_and_markup_is_not() -> None:
    assert text("<&\"'>") == "&lt;&amp;&quot;&#x27;&gt;"
    assert tag("a", "<", Html("<br>"), class_='"', text_anchor=1) == '<a class="&quot;" text-anchor="1">&lt;<br></a>'


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nowhere/report.html", "the report cannot be written: there is no directory"),
        (".", "the report needs a file of its own"),
        ("m.onnx", "the report needs a file of its own"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_at_once(tmp_path: Path, target: str, words: str) -> None:
    def told(stage: str) -> Any:
        raise AssertionError(stage)

    with pytest.raises(ExportError, match=words):
        recurd_export.export(Net(), torch.zeros(1, 5, 3), tmp_path / "m.onnx", report=tmp_path / target, progress=told)

    assert not list(tmp_path.iterdir())


def test_a_page_that_turns_out_not_to_be_writable_is_said(tmp_path: Path) -> None:
    page = tmp_path / "page.html"

    def in_its_place(stage: str) -> None:
        if stage == "write":
            page.mkdir()

    with pytest.raises(ExportError, match=r"page\.html: the report cannot be written: Is a directory"):
        recurd_export.export(Net(), torch.zeros(1, 5, 3), tmp_path / "m.onnx", report=page, progress=in_its_place)

    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_page_that_was_there_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")

    def look(stage: str) -> None:
        assert page.read_text() == "old"

    recurd_export.export(Net(), torch.zeros(1, 5, 3), tmp_path / "m.onnx", report=page, progress=look)

    assert page.read_text().startswith("<!")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "page.html"]


def test_the_command_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "paged_factory.py").write_text(
        "from torch import nn\ndef make():\n    return nn.GRU(3, 4, batch_first=True)\n"
    )
    monkeypatch.chdir(tmp_path)

    result = CliRunner().invoke(
        main,
        ["export", "paged_factory:make", "--out", "m.onnx", "--report", "r.html", "--precision", "bfloat16-weights",
         "--state-precision", "float16", "--json"],
    )  # fmt: skip

    assert result.exit_code == 0, result.output
    report = msgspec.json.decode(result.stdout)
    assert report["precision"] == "bfloat16-weights"
    assert report["contract"]["states"][0]["dtype"] == "float16"
    assert report["drift"]["steps"] == 2_000
    assert "GRU" in Page((tmp_path / "r.html").read_text()).text
