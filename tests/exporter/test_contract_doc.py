"""docs/contract.md and its schema say what the code does."""

import contextlib
import io
import json
import os
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

import recurd_export
from recurd import contract as contracts
from recurd.contract import Contract
from recurd_export import page
from recurd_export.report import Report

DOCS = Path(__file__).parents[2] / "docs"


def test_the_schema_is_the_code_s() -> None:
    kept = json.loads((DOCS / "contract.schema.json").read_text())

    assert kept == json.loads(msgspec.json.encode(msgspec.json.schema(Contract))), (
        "write it again: msgspec.json.schema(recurd.contract.Contract) into docs/contract.schema.json"
    )


def test_every_key_of_the_contract_is_in_the_specification() -> None:
    text = (DOCS / "contract.md").read_text()

    for name, struct in msgspec.json.schema(Contract)["$defs"].items():
        for key in struct["properties"]:
            assert re.search(rf"\b{key}\b", text), f"{name}.{key}"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    path = tmp_path_factory.mktemp("doc") / "pump.onnx"
    return recurd_export.export(nn.LSTM(3, 4, batch_first=True), torch.zeros(2, 5, 3), path)


def test_the_names_of_the_checks_are_those_of_the_specification(report: Report) -> None:
    section = (DOCS / "contract.md").read_text().partition("## 5.")[2].partition("## 6.")[0]
    named = set(re.findall(r"^\| ([A-Za-z ]+) \| ", section.partition("| name |")[2], re.MULTILINE))

    assert named == page.MEANINGS.keys()
    of_some = {"state passed along", "Keras stateful", "model as given", "against itself"}
    assert {check.name for check in report.checks} == named - of_some


def test_the_example_in_the_specification_runs(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", (DOCS / "contract.md").read_text(), re.DOTALL)
    assert code is not None
    monkeypatch.chdir(report.path.parent)
    chunks = [np.ones((steps, 3), np.float32) for steps in (2, 1, 4)]
    printed = io.StringIO()

    with contextlib.redirect_stdout(printed):
        exec(code[1], {"chunks": chunks})

    assert printed.getvalue().count("\n") == 7
    assert os.path.exists("pump.onnx")


def test_the_hash_is_what_the_specification_says(report: Report) -> None:
    import hashlib

    import onnx

    model = onnx.load(report.path)
    digest = hashlib.sha256()
    for tensor in sorted(model.graph.initializer, key=lambda t: t.name):
        array = onnx.numpy_helper.to_array(tensor)
        digest.update(f"{tensor.name}:{array.dtype}:{tuple(array.shape)};".encode() + array.tobytes())

    assert digest.hexdigest() == report.contract.weights_sha256 == contracts.weights_sha256(model)
