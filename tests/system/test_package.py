"""What is installed: the two packages, and nothing that lies beside them."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_wheel_holds_the_two_packages_and_the_command(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="hatchling is not installed (pip install hatchling)")

    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT, check=True, timeout=60
    )

    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        entry_points = content.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    folders = {name.split("/")[0] for name in names}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"recurd", "recurd_export"}
    assert {"recurd/py.typed", "recurd_export/py.typed", "recurd/cli/serve.py"} <= set(names)
    assert "recurd = recurd.cli:main" in entry_points


def test_the_makefile_says_which_python_it_needs(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    old.chmod(0o755)

    for python, sentence in ((old, f"{old} is Python 3.9.2"), (tmp_path / "none", "there is no ")):
        done = subprocess.run(
            ["make", "setup", f"PYTHON={python}", f"VENV={tmp_path}/venv"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

        assert done.returncode != 0
        assert f"recurd needs Python 3.11 or newer: {sentence}" in done.stderr
        assert not (tmp_path / "venv").exists()


def test_make_alone_lists_what_it_can_do() -> None:
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)

    for target in ("make test", "make demo", "make test-gpu", "make bench", "make format", "make clean"):
        assert target in done.stdout
