"""What is in deploy/ is accepted by the tools that read it, and agrees with the code."""

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recurd.config import Config
from recurd.errors import ExitCode

DEPLOY = Path(__file__).parents[2] / "deploy"
MAX_EXPOSURE = 1.5


def tool(name: str, package: str) -> str:
    """Path of an installed tool; without it the test is skipped, and fails in continuous integration."""
    path = shutil.which(name)
    if path is None:
        assert "CI" not in os.environ, f"{name} is missing (Debian: apt-get install {package})"
        pytest.skip(f"{name} is not installed (Debian: apt-get install {package})")
    return path


def run(*command: str | Path) -> tuple[int, str]:
    """Exit status and everything that was printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The service with a program that exists here, since systemd-analyze looks for it."""
    text = (DEPLOY / "recurd.service").read_text()
    assert "ExecStart=/opt/recurd/bin/recurd " in text
    path = tmp_path / "recurd.service"
    path.write_text(text.replace("ExecStart=/opt/recurd/bin/recurd ", f"ExecStart={sys.executable} -m recurd "))
    return path


def service_section() -> dict[str, str]:
    """[Service] of the unit; of a key that is there several times the last value."""
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # keys are case-sensitive
    parser.read(DEPLOY / "recurd.service")
    return dict(parser["Service"])


def test_systemd_accepts_the_service_without_a_word(unit: Path) -> None:
    analyze = tool("systemd-analyze", "systemd")

    assert run(analyze, "verify", "--man=no", unit) == (0, "")


def test_a_mistake_in_the_service_would_be_noticed(unit: Path) -> None:
    analyze = tool("systemd-analyze", "systemd")
    unit.write_text(unit.read_text().replace("WatchdogSec=", "WatchdogSeconds="))

    assert "WatchdogSeconds" in run(analyze, "verify", "--man=no", unit)[1]


def test_the_service_is_hardened(unit: Path) -> None:
    analyze = tool("systemd-analyze", "systemd")

    status, text = run(analyze, "security", "--offline=true", "--no-pager", unit)

    exposure = re.search(r"Overall exposure level for recurd\.service: ([0-9.]+)", text)
    assert exposure is not None, text
    assert float(exposure[1]) <= MAX_EXPOSURE, text
    assert status == 0


def test_only_permanent_errors_keep_the_service_from_being_restarted() -> None:
    permanent = {ExitCode.USAGE, ExitCode.CONTRACT, ExitCode.DEVICE, ExitCode.JOURNAL}
    permanent |= {ExitCode.AUTH, ExitCode.CONFIG}

    assert {int(code) for code in service_section()["RestartPreventExitStatus"].split()} == permanent


def test_the_services_time_outs_leave_room_for_the_daemons() -> None:
    service = service_section()

    assert float(service["TimeoutStopSec"]) >= Config().timeouts.shutdown_seconds + 5
    assert float(service["WatchdogSec"]) >= 10
    assert int(service["LimitNOFILE"]) > 2 * Config().limits.connections


def test_the_service_starts_a_command_that_exists_with_the_documented_configuration() -> None:
    command = service_section()["ExecStart"].split()

    assert command[1:] == ["serve", "--config", "/etc/recurd/recurd.toml"]
    assert "/etc/recurd/recurd.toml" in (DEPLOY / "README.md").read_text()


def test_the_service_does_not_let_onnxruntime_report_to_its_maker() -> None:
    assert "\nEnvironment=ORT_DISABLE_TELEMETRY=1\n" in (DEPLOY / "recurd.service").read_text()


def test_the_readme_names_every_exit_code_of_the_daemon() -> None:
    table = re.findall(r"^\| (\d+) \|.*\| (yes|no) \|$", (DEPLOY / "README.md").read_text(), re.MULTILINE)

    assert {int(code) for code, _ in table} == set(ExitCode) - {ExitCode.EXPORT}
    prevented = service_section()["RestartPreventExitStatus"].split()
    assert {code for code, again in table if again == "no"} == {"0", *prevented}


def test_sysusers_makes_the_services_user_and_tmpfiles_can_be_read(tmp_path: Path) -> None:
    sysusers = tool("systemd-sysusers", "systemd")
    tmpfiles = tool("systemd-tmpfiles", "systemd")
    (tmp_path / "etc").mkdir()

    status, text = run(sysusers, f"--root={tmp_path}", DEPLOY / "sysusers.d" / "recurd.conf")

    assert status == 0, text
    passwd = (tmp_path / "etc" / "passwd").read_text()
    assert re.search(r"^recurd:.*:/var/lib/recurd:/usr/sbin/nologin$", passwd, re.MULTILINE)
    assert service_section()["User"] == service_section()["Group"] == "recurd"
    if os.geteuid() == 0:  # it changes owners
        status, text = run(tmpfiles, "--create", f"--root={tmp_path}", DEPLOY / "tmpfiles.d" / "recurd.conf")
        assert (status, text) == (0, "")
        assert (tmp_path / "etc" / "recurd").stat().st_mode & 0o777 == 0o750


def test_prometheus_accepts_its_configuration_and_scrapes_the_default_address() -> None:
    promtool = tool("promtool", "prometheus")

    status, text = run(promtool, "check", "config", DEPLOY / "prometheus.yml")

    assert status == 0, text
    assert "SUCCESS" in text
    assert f'targets: ["{Config().metrics}"]' in (DEPLOY / "prometheus.yml").read_text()
