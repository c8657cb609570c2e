"""silero-vad from its own wheel, adopted and served: a stream gets what the wheel's ONNX file gives one alone."""

import signal
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner

import recurd
from process import Process
from recurd.cli import main
from recurd.errors import ExitCode

Array = np.ndarray[Any, Any]
RATE, SAMPLES, CONTEXT = 16000, 512, 64
WINDOWS, STREAMS = 300, 24


def find_model() -> Path | None:
    """The model in the wheel; the package itself is not imported, as that wants torchaudio or asks for it."""
    try:
        files = metadata.files("silero-vad") or []
    except metadata.PackageNotFoundError:
        return None
    found = [file for file in files if file.name == "silero_vad.onnx"]
    return Path(str(found[0].locate())) if found else None


MODEL = find_model()
pytestmark = pytest.mark.skipif(
    MODEL is None, reason="silero-vad is not installed (pip install --no-deps silero-vad; 'make setup' does)"
)


def signal_of(stream: int) -> Array:
    """Bursts of a warbling tone with harmonics between stretches of noise, ``[WINDOWS, SAMPLES]``."""
    random = np.random.default_rng(stream)
    time = np.arange(WINDOWS * SAMPLES) / RATE
    pitch = random.uniform(90, 250) * (1 + 0.03 * np.sin(2 * np.pi * random.uniform(3, 6) * time))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    voice = sum(np.sin(harmonic * phase) / harmonic for harmonic in range(1, 12))
    loudness = np.clip(np.sin(2 * np.pi * random.uniform(0.2, 0.8) * time + stream), 0, 1)
    mixed = 0.2 * loudness * voice + 0.02 * random.normal(size=len(time))
    return np.asarray(mixed, np.float32).reshape(WINDOWS, SAMPLES)


def alone(samples: Array) -> Array:
    """As silero's own OnnxWrapper drives the file: state and the last 64 samples of each window carried by hand."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(MODEL), options, providers=["CPUExecutionProvider"])
    state, context, found = np.zeros((2, 1, 128), np.float32), np.zeros((1, CONTEXT), np.float32), []
    for window in samples:
        x = np.concatenate([context, window[None]], axis=1)
        output, state = session.run(None, {"input": x, "state": state, "sr": np.array(RATE, np.int64)})
        context = x[:, -CONTEXT:]
        found.append(output[0])
    return np.stack(found)


@pytest.fixture(scope="module")
def vad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("silero") / "vad.onnx"
    said = ["--constant", f"sr={RATE}", "--step-shape", str(SAMPLES), "--context", str(CONTEXT)]
    result = CliRunner().invoke(
        main, ["adopt", str(MODEL), *said, "--labels", "output=speech", "--sample-rate-hz", "31.25", "-o", str(out)]
    )
    assert result.exit_code == ExitCode.OK, result.output
    return out


def test_many_streams_in_any_chunks_get_what_each_gets_alone(vad: Path, tmp_path: Path) -> None:
    """The streams go round by round, so that windows of many streams share every tick; bit for bit the same."""
    signals = [signal_of(stream) for stream in range(STREAMS)]
    random = np.random.default_rng(9)
    with Process(tmp_path, vad, "--bind", "tcp://127.0.0.1:0", "--metrics", "127.0.0.1:0") as daemon:
        with recurd.connect(daemon.ready().endpoint) as client:
            streams = [client.open(f"line-{number}", model="vad") for number in range(STREAMS)]
            done = [0] * STREAMS
            answers: list[list[Array]] = [[] for _ in range(STREAMS)]
            while min(done) < WINDOWS:
                futures = []
                for number, stream in enumerate(streams):
                    stop = min(WINDOWS, done[number] + int(random.integers(1, 1 + 3 * (1 + number % 5))))
                    if stop > done[number]:
                        futures.append((number, stream.submit(signals[number][done[number] : stop])))
                        done[number] = stop
                for number, future in futures:
                    answers[number].append(np.asarray(future.result()))
            rows = daemon.metric('recurd_tick_rows_sum{model="vad"}') / daemon.metric(
                'recurd_tick_rows_count{model="vad"}'
            )
        assert daemon.stop(signal.SIGTERM) == ExitCode.OK

    assert rows > 2, "ticks were shared"
    for number in range(STREAMS):
        np.testing.assert_array_equal(np.concatenate(answers[number]), alone(signals[number]))
    heard = np.stack([np.concatenate(answer) for answer in answers])
    assert heard.min() < 0.01, "noise is told ..."
    assert heard.max() > 0.5, "... from what is like a voice"
