"""Runs of the source model that leave no trace in the process."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def apart(double: bool) -> Iterator[None]:
    """The random generators stay as they are; with ``double`` what a forward makes (``torch.zeros``) is float64."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.set_default_dtype(torch.float64 if double else before)
            yield
        finally:
            torch.set_default_dtype(before)
