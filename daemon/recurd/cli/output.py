"""Standard output, when it cannot be written to any more."""

import os
import sys


def discard_output() -> None:
    """Let go of what is still buffered: Python would complain at exit when it cannot flush it anywhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
