"""What the demo found: the daemon's answers held against the model run offline, and the numbers of the run."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from recurd.contract import Contract
from recurd.verify import Tolerance, compare
from recurd_export.demo.data import Array, Dataset
from recurd_export.demo.streaming import Outcome

#: How the samples of /metrics begin that are shown.
_SHOWN = (
    "recurd_chunks_processed_total",
    "recurd_steps_processed_total",
    "recurd_resets_total",
    "recurd_ticks_total",
    "recurd_tick_rows_sum",
    "recurd_tick_rows_count",
    'recurd_stream_slots{kind="used"',
)


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One data set. Accuracy is that of the answer at a recording's last step."""

    name: str
    model: Path
    picture: Path
    rows: Path
    streams: int
    #: Recordings streamed; each is in the test part once, and was streamed several times.
    recordings: int
    chunks: int
    steps: int
    resets: int
    accuracy_daemon: float
    accuracy_offline: float
    #: Share of right answers over all steps, the first ones of a recording included.
    step_accuracy_daemon: float
    largest_difference: float
    allowed_difference: float
    agrees: bool


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole run, as ``--json`` prints it."""

    results: tuple[Result, ...]
    device: str
    connections: int
    seconds: float
    chunks_per_second: float
    steps_per_second: float
    latency_p50_seconds: float
    latency_p99_seconds: float
    metrics: tuple[str, ...]
    log: Path

    @property
    def agrees(self) -> bool:
        """Whether the daemon gave what the models give."""
        return all(result.agrees for result in self.results)


class Files(msgspec.Struct, frozen=True, kw_only=True):
    """What is written for a data set."""

    model: Path
    picture: Path
    rows: Path

    @classmethod
    def below(cls, folder: Path, name: str) -> "Files":
        """Their names."""
        return cls(model=folder / f"{name}.onnx", picture=folder / f"{name}.png", rows=folder / f"{name}.csv")


def judge(
    data: Dataset, contract: Contract, files: Files, outcomes: Sequence[Outcome], offline: Sequence[Array]
) -> Result:
    """Hold one data set's outcomes against ``offline``, the model's answer to each recording of the test part."""
    answers = [answer for outcome in outcomes for answer in outcome.answers]
    order = [index for outcome in outcomes for index in outcome.script.order]
    wanted = np.array([data.test[index].label for index in order])
    right = np.concatenate([answer.argmax(1) == label for answer, label in zip(answers, wanted, strict=True)])
    proof = contract.proof
    check = compare(
        "daemon",
        {"probability": [offline[index] for index in order]},
        {"probability": answers},
        Tolerance() if proof is None else Tolerance(proof.atol, proof.rtol),
    )
    return Result(
        name=data.name,
        model=files.model,
        picture=files.picture,
        rows=files.rows,
        streams=len(outcomes),
        recordings=len(order),
        chunks=sum(outcome.chunks for outcome in outcomes),
        steps=len(right),
        resets=sum(outcome.resets for outcome in outcomes),
        accuracy_daemon=_accuracy(answers, wanted),
        accuracy_offline=_accuracy(offline, np.array([series.label for series in data.test])),
        step_accuracy_daemon=float(right.mean()),
        largest_difference=check.error,
        allowed_difference=check.bound,
        agrees=check.ok,
    )


def _accuracy(answers: Sequence[Array], wanted: Array) -> float:
    return float(np.mean([answer[-1].argmax() == label for answer, label in zip(answers, wanted, strict=True)]))


def summarize(
    results: Sequence[Result],
    outcomes: Sequence[Outcome],
    *,
    seconds: float,
    device: str,
    connections: int,
    metrics: Sequence[str],
    log: Path,
) -> Report:
    """The numbers of the whole run; ``metrics`` are all samples, of which a few are kept."""
    latencies = np.concatenate([outcome.latency_seconds for outcome in outcomes])
    p50, p99 = np.quantile(latencies, (0.5, 0.99)).tolist()
    return Report(
        results=tuple(results),
        device=device,
        connections=connections,
        seconds=seconds,
        chunks_per_second=len(latencies) / seconds,
        steps_per_second=sum(outcome.steps for outcome in outcomes) / seconds,
        latency_p50_seconds=p50,
        latency_p99_seconds=p99,
        metrics=tuple(line for line in metrics if line.startswith(_SHOWN)),
        log=log,
    )


def describe(report: Report) -> str:
    """For people."""
    parts = [*map(_describe_result, report.results), _describe_speed(report), "some of /metrics:"]
    parts += [f"  {line}" for line in report.metrics]
    parts.append("written:")
    for result in report.results:
        parts += [f"  {result.picture}  <- look at this", f"  {result.model}", f"  {result.rows}"]
    first = report.results[0]
    parts += [
        f"  {report.log}",
        "try next:",
        f"  recurd inspect {first.model}",
        f"  recurd serve {first.model}",
        f"  recurd stream --model {first.name} --stream mine {first.rows}   (in another terminal)",
    ]
    return "\n".join(parts)


def _describe_result(result: Result) -> str:
    verdict = "within" if result.agrees else "MORE THAN"
    return (
        f"{result.name}: {result.recordings} recordings over {result.streams} streams, {result.chunks} chunks, "
        f"{result.steps} steps, {result.resets} resets\n"
        f"  accuracy through the daemon  {result.accuracy_daemon:7.2%}\n"
        f"  accuracy of torch, offline   {result.accuracy_offline:7.2%}\n"
        f"  largest difference           {result.largest_difference:.1e} "
        f"({verdict} the {result.allowed_difference:.1e} allowed)"
    )


def _describe_speed(report: Report) -> str:
    return (
        f"speed: {report.chunks_per_second:,.0f} chunks/s, {report.steps_per_second:,.0f} steps/s, latency p50 "
        f"{1000 * report.latency_p50_seconds:.2f} ms, p99 {1000 * report.latency_p99_seconds:.2f} ms "
        f"({report.connections} connections, device {report.device})"
    )
