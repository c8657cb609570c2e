"""``python -m recurd`` is the command ``recurd``."""

from recurd.cli import main

main(prog_name="recurd")
