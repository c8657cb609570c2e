"""The demo from beginning to end: load, train, export, serve, stream, compare, draw."""

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from rich.console import Console

from recurd.contract import Contract
from recurd.errors import RecurdError
from recurd_export import export
from recurd_export.demo import daemon, picture, streaming, training
from recurd_export.demo.data import Array, Dataset, load
from recurd_export.demo.report import Files, Report, judge, summarize
from recurd_export.demo.stages import Stages
from recurd_export.demo.streaming import Outcome


class _Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """A data set with its exported model, and what the trained model says to each recording of the test part."""

    data: Dataset
    files: Files
    contract: Contract
    offline: list[Array]


class _Streamed(msgspec.Struct, frozen=True, kw_only=True):
    """What came back from the daemon."""

    outcomes: list[Outcome]
    seconds: float
    device: str
    metrics: list[str]


def run(names: Sequence[str], out: Path, *, epochs: int | None, connections: int, device: str, seed: int) -> Report:
    """The whole way; writes into ``out``. Raises :class:`RecurdError` when something fails on the way."""
    torch.set_num_threads(1)  # more would cost more than they bring in models as small as these
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecurdError(f"cannot make the directory {out}: {error.strerror}") from error
    log = out / "daemon.log"
    with Stages(Console(stderr=True)) as stages:
        prepared = [_prepare(name, out, stages, epochs=epochs, seed=seed) for name in names]
        streamed = _stream(prepared, log, stages, connections=connections, device=device, seed=seed)
        results = []
        for part in prepared:
            name = part.data.name
            stages.begin(f"{name}: draw a stream")
            outcomes = [outcome for outcome in streamed.outcomes if outcome.script.model == name]
            picture.draw(part.data, outcomes, part.files.picture)
            results.append(judge(part.data, part.contract, part.files, outcomes, part.offline))
    return summarize(
        results,
        streamed.outcomes,
        seconds=streamed.seconds,
        device=streamed.device,
        connections=connections,
        metrics=streamed.metrics,
        log=log,
    )


def _prepare(name: str, out: Path, stages: Stages, *, epochs: int | None, seed: int) -> _Prepared:
    stages.begin(f"{name}: load")
    data = load(name)
    files = Files.below(out, name)
    epochs = epochs or data.recipe.epochs
    stages.begin(f"{name}: train on {len(data.train)} recordings, {epochs} epochs", epochs)
    model = training.train(data, seed=seed, epochs=epochs, advance=stages.advance)
    stages.begin(f"{name}: export and verify")
    exported = export(
        model,
        training.example(data),
        files.model,
        name=name,
        features=data.features,
        labels={"probability": data.labels},
        sample_rate_hz=data.sample_rate_hz,
    )
    stages.begin(f"{name}: run the model on {len(data.test)} recordings, offline", len(data.test))
    offline = training.run_offline(model, data.test, stages.advance)
    _write_rows(data, files.rows)
    return _Prepared(data=data, files=files, contract=exported.contract, offline=offline)


def _write_rows(data: Dataset, path: Path) -> None:
    """A recording of the test part, for 'recurd stream'."""
    with path.open("w", encoding="utf-8") as file:
        np.savetxt(file, data.test[0].values, "%g", ",", header=",".join(data.features), comments="")


def _stream(
    prepared: Sequence[_Prepared], log: Path, stages: Stages, *, connections: int, device: str, seed: int
) -> _Streamed:
    random = np.random.default_rng(seed)
    scripts = [script for part in prepared for script in streaming.write_scripts(part.data, random)]
    recordings = {part.data.name: part.data.test for part in prepared}
    stages.begin("start the daemon")
    with daemon.serving([part.files.model for part in prepared], log, device=device) as running:
        steps = sum(cuts[-1] for script in scripts for cuts in script.cuts)
        stages.begin(f"stream {steps} steps over {connections} connections", steps)
        began = time.monotonic()
        outcomes = streaming.play(
            running.endpoint, scripts, recordings, connections=connections, seed=seed, advance=stages.advance
        )
        seconds = time.monotonic() - began
        stages.begin("read /metrics and stop the daemon")
        metrics = daemon.scrape(running)
    return _Streamed(outcomes=outcomes, seconds=seconds, device=daemon.device(metrics), metrics=metrics)
