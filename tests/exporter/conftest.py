"""Shared by the exporter's tests: one thread, a seed, and a plain onnxruntime client of contract files."""

import base64
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from recurd_export import drift

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20)


@pytest.fixture(autouse=True)
def _short_long_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every export ends with a long run; test_drift.py holds it at its full length."""
    monkeypatch.setattr(drift, "STEPS", 2_000)


class PlainRun:
    """Runs a contract file as a program that knows docs/contract.md and nothing of recurd would."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path)
        self.contract: dict[str, Any] = json.loads(
            next(p.value for p in self.model.metadata_props if p.key == "recurd.contract")
        )
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def initial(self, rows: int) -> dict[str, np.ndarray]:
        """States of a fresh start."""
        states = {}
        for state in self.contract["states"]:
            value = np.zeros(state["shape"], state["dtype"])
            if state["initial"] is not None:
                data = base64.b64decode(state["initial"]["data"])
                value = np.frombuffer(data, state["initial"]["dtype"]).reshape(state["shape"])
            states[state["name"]] = np.stack([value] * rows, axis=state["batch_axis"])
        return states

    def run(
        self, x: np.ndarray, states: dict[str, np.ndarray], lengths: list[int] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """One chunk of every row: heads by name, and the next states."""
        steps = np.array(lengths or [x.shape[1]] * len(x), np.int32)
        heads = [head["name"] for head in self.contract["heads"]]
        nexts = {state["output"]: state["name"] for state in self.contract["states"]}
        outputs = self.session.run([*heads, *nexts], {"input": x, "lengths": steps, **states})
        found = dict(zip([*heads, *nexts], outputs, strict=True))
        return {h: found[h] for h in heads}, {name: found[output] for output, name in nexts.items()}

    def chunks(self, x: np.ndarray, cuts: list[int]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """A whole sequence in chunks, the states carried on; heads of the last step are those of the last chunk."""
        states = self.initial(len(x))
        parts: list[dict[str, np.ndarray]] = []
        edges = [0, *cuts, x.shape[1]]
        for start, stop in itertools.pairwise(edges):
            heads, states = self.run(np.ascontiguousarray(x[:, start:stop]), states)
            parts.append(heads)
        joined = {
            head["name"]: np.concatenate([part[head["name"]] for part in parts], axis=1)
            if head["per"] == "step"
            else parts[-1][head["name"]]
            for head in self.contract["heads"]
        }
        return joined, states


@pytest.fixture(scope="session")
def plain_run() -> Callable[[Path], PlainRun]:
    """Opens a contract file."""
    return PlainRun
