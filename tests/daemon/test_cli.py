"""The command line: quick help, flags over the file, one sentence and an exit code for what is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import click
import onnx
import pytest
from click.testing import CliRunner, Result

from recurd import __version__, contract
from recurd.cli import COMMANDS, Entry, main
from recurd.cli.serve import build_config
from recurd.config import Config, Log, Model
from recurd.errors import (
    AddressError,
    Code,
    ConfigError,
    ContractError,
    DeviceError,
    ExitCode,
    Refused,
    StartError,
    Unanswered,
)


def recurd(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="recurd")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """A sub-command ``fail`` that raises what is put into the list."""
    raised: list[BaseException] = []

    @click.command()
    def fail() -> None:
        raise raised[0]

    module = type(sys)("recurd_failing")
    module.fail = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "recurd_failing", module)
    monkeypatch.setitem(COMMANDS, "fail", Entry("recurd_failing:fail", "gpu", ""))
    return raised


def test_help_names_every_command_and_imports_none_of_them() -> None:
    script = (
        "import sys, recurd.cli\n"
        "try: recurd.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'onnx', 'onnxruntime', 'torch', 'zmq', 'structlog', 'prometheus_client', 'recurd_export'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.endswith("\n[]\n")
    for name, entry in COMMANDS.items():
        assert name in done.stdout
        assert entry.help in done.stdout
    assert "_RECURD_COMPLETE=bash_source recurd" in done.stdout


def test_python_m_recurd_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "recurd", "-V"], capture_output=True, text=True, check=True)

    assert done.stdout == f"recurd {__version__}\n"


def test_a_command_that_does_not_exist_is_wrong_usage() -> None:
    result = recurd("srve")

    assert result.exit_code == ExitCode.USAGE
    assert "No such command 'srve'" in result.output


@pytest.mark.parametrize("error", [ConfigError, ContractError, DeviceError, AddressError])
def test_what_cannot_start_says_so_in_one_line_and_by_its_exit_code(
    command: list[BaseException], error: type[StartError]
) -> None:
    command.append(error("this is wrong"))

    result = recurd("fail")

    assert (result.exit_code, result.stderr, result.stdout) == (error.exit_code, "recurd: this is wrong\n", "")


@pytest.mark.parametrize(
    ("error", "code"),
    [(Refused(Code.BUSY, "try later"), ExitCode.BUG), (Unanswered("no answer in 5 s"), ExitCode.DEVICE)],
)
def test_what_a_daemon_answers_is_no_traceback(command: list[BaseException], error: Exception, code: ExitCode) -> None:
    command.append(error)

    result = recurd("fail")

    assert (result.exit_code, result.stderr) == (code, f"recurd: {error}\n")


def test_no_daemon_to_measure_has_the_exit_code_of_no_daemon_to_stream_to() -> None:
    result = recurd("bench", "--endpoint", "tcp://127.0.0.1:9", "--timeout", "0.2")

    assert (result.exit_code, result.stdout) == (69, "")
    assert "tcp://127.0.0.1:9" in result.stderr
    assert "69 no daemon" in recurd("bench", "--help").stdout


@pytest.mark.parametrize("command", [["bench"], ["stream", "--stream", "s"]])
def test_what_is_no_address_is_wrong_usage(command: list[str]) -> None:
    result = recurd(*command, "--endpoint", "127.0.0.1:7070")

    assert result.exit_code == 2
    assert "'127.0.0.1:7070' is neither tcp://host:port nor ipc:///path" in result.stderr


def test_a_full_disk_is_told_in_a_sentence(pump: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-W", "error", "-m", "recurd", "inspect", pump]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)

    assert (done.returncode, done.stderr) == (1, "recurd: standard output takes no more: No space left on device\n")


def test_a_bug_keeps_its_traceback(command: list[BaseException]) -> None:
    command.append(ZeroDivisionError())

    assert isinstance(recurd("fail").exception, ZeroDivisionError)


def test_an_interrupt_ends_with_130(command: list[BaseException]) -> None:
    command.append(KeyboardInterrupt())

    assert recurd("fail").exit_code == 130


def test_a_missing_package_is_told_with_the_extra_that_brings_it(command: list[BaseException]) -> None:
    command.append(ModuleNotFoundError("No module named 'torch'", name="torch.nn"))

    result = recurd("fail")

    assert result.exit_code == ExitCode.USAGE
    assert result.stderr == (
        "recurd: 'recurd fail' needs torch: recurd was installed without the extra 'gpu' "
        "(pip install '.[gpu]' in a checkout)\n"
    )


def test_a_missing_package_is_told_already_when_the_command_is_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "recurd_needy.py").write_text("import sktime\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "sktime", None)
    monkeypatch.setitem(COMMANDS, "demo", Entry("recurd_needy:demo", "gpu,demo", ""))

    result = recurd("demo", "--help")

    assert result.exit_code == ExitCode.USAGE
    assert result.stderr == (
        "recurd: 'recurd demo' needs sktime: recurd was installed without the extras 'gpu,demo' "
        "(pip install '.[gpu,demo]' in a checkout)\n"
    )


def test_any_other_missing_module_is_a_bug(command: list[BaseException]) -> None:
    command.append(ModuleNotFoundError("No module named 'recurd.nothing'", name="recurd.nothing"))

    assert isinstance(recurd("fail").exception, ModuleNotFoundError)


def test_no_command_lets_onnxruntime_report_to_its_maker(tmp_path: Path) -> None:
    (tmp_path / "recurd_probe.py").write_text(
        "import click\n@click.command()\ndef probe():\n    import onnxruntime\n    print(onnxruntime.__version__)\n"
    )
    script = (
        "from recurd.cli import COMMANDS, Entry, main\n"
        "COMMANDS['probe'] = Entry('recurd_probe:probe', 'gpu', '')\n"
        "main(['probe'])"
    )
    # onnxruntime keeps an identifier and what it is about to send in the cache folder; it holds back in CI by itself
    environ = {key: value for key, value in os.environ.items() if key not in ("CI", "ORT_DISABLE_TELEMETRY")}
    environ |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}

    subprocess.run([sys.executable, "-c", script], env=environ, check=True)

    assert list(tmp_path.glob("cache/**/*")) == []


def test_every_command_can_be_imported_and_has_help() -> None:
    for name in COMMANDS:
        result = recurd(name, "--help")

        assert result.exit_code == 0, f"{name}: {result.output}{result.exception!r}"
        assert "Usage: recurd " + name in result.output


def test_every_extra_that_is_named_exists() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()

    for entry in COMMANDS.values():
        for extra in entry.extras.split(","):
            assert f"\n{extra} = [" in text


def settings(**flags: object) -> Config:
    names = "config_file log_format log_level metrics device slots threads insecure journal durability accept_drift"
    none = dict.fromkeys([*names.split(), "key", "clients"])
    return build_config(**{"models": (Path("a.onnx"),), "bind": (), **none, **flags})  # type: ignore[arg-type]


def test_without_flags_everything_has_its_default() -> None:
    assert settings() == Config(models=(Model(path="a.onnx"),))


def test_flags_override_the_file_and_leave_its_other_keys(tmp_path: Path) -> None:
    file = tmp_path / "recurd.toml"
    file.write_text(
        "slots = 8\nthreads = 2\nmetrics = ''\n[log]\nformat = 'json'\nlevel = 'debug'\n[[models]]\npath = '/b.onnx'\n"
    )

    config = settings(models=(), config_file=file, slots=16, log_level="error", bind=("ipc:///run/r", "tcp://lo:1"))

    assert config == Config(
        slots=16,
        threads=2,
        metrics="",
        log=Log(format="json", level="error"),
        models=(Model(path="/b.onnx"),),
        bind=("ipc:///run/r", "tcp://lo:1"),
    )
    assert settings(config_file=file).models == (Model(path="a.onnx"),)


def test_no_model_at_all_is_told() -> None:
    result = recurd("serve")

    assert result.exit_code == ExitCode.CONFIG
    assert result.stderr.startswith(
        "recurd: no model to serve: name a file ('recurd serve pump.onnx') or add [[models]]"
    )


@pytest.mark.parametrize(
    ("arguments", "exit_code", "sentence"),
    [
        (["--bind", "tcp://0.0.0.0:7070"], ExitCode.CONFIG, "command line: bind: 'tcp://0.0.0.0:7070' can be reached"),
        (["--journal", ""], ExitCode.CONFIG, "command line: durability.directory: mode 'process' needs a folder"),
        (["--slots", "0"], ExitCode.CONFIG, "command line: slots: expected `int` >= 1"),
        (["--device", "gpu"], ExitCode.CONFIG, "command line: device: 'gpu' is not one of auto, cpu"),
        (["--config", "none.toml"], ExitCode.CONFIG, "none.toml: there is no such file"),
        ([], ExitCode.CONTRACT, "none.onnx: there is no such file"),
    ],
)
def test_check_tells_what_is_wrong_before_anything_is_started(
    arguments: list[str], exit_code: ExitCode, sentence: str
) -> None:
    result = recurd("serve", "none.onnx", "--check", *arguments)

    assert result.exit_code == exit_code
    assert result.stderr.startswith(f"recurd: {sentence}")
    assert result.stderr.count("\n") == 1


@pytest.fixture
def pump(tmp_path: Path) -> Path:
    """The smallest model with a contract: the outputs are the input, the state stays."""
    values = {"input": ("b", "t", 1), "y": ("b", "t", 1), "h": ("b", 1), "h_out": ("b", 1)}
    tensors = {n: onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n, shape in values.items()}
    lengths = onnx.helper.make_tensor_value_info("lengths", onnx.TensorProto.INT32, ("b",))
    nodes = [onnx.helper.make_node("Identity", [a], [b]) for a, b in (("input", "y"), ("h", "h_out"))]
    graph = onnx.helper.make_graph(
        nodes, "pump", [tensors["input"], lengths, tensors["h"]], [tensors["y"], tensors["h_out"]]
    )
    opset = onnx.helper.make_opsetid("", 17)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    description = contract.Contract(
        name="pump",
        input=contract.Input(dtype="float32", shape=(1,)),
        heads=(contract.Head(name="y", dtype="float32", shape=(1,)),),
        states=(contract.State(name="h", output="h_out", dtype="float32", shape=(1,), batch_axis=0),),
        source=contract.Source(framework="by hand"),
        weights_sha256=contract.weights_sha256(model),
    )
    contract.attach(model, description)
    onnx.save(model, tmp_path / "pump.onnx")
    return tmp_path / "pump.onnx"


def test_check_says_what_would_be_served(pump: Path) -> None:
    result = recurd("serve", str(pump), "--check", "--bind", "ipc:///run/recurd/r.sock")

    assert result.exit_code == 0, result.stderr
    assert result.stdout == "recurd: the configuration is good; it serves pump at ipc:///run/recurd/r.sock\n"


def test_two_models_of_one_name_are_refused(pump: Path) -> None:
    second = pump.with_name("second.onnx")
    second.write_bytes(pump.read_bytes())

    result = recurd("serve", str(pump), str(second), "--check")

    assert result.exit_code == ExitCode.CONFIG
    assert f"{second}: there is a model 'pump' already" in result.stderr
