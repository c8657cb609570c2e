"""Keras on the CPU, without what it says about itself, and without a trace in the process."""

import contextlib
import random
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Run Keras on the CPU, where its float32 is float32; keep to ourselves what no user of ours can act on.

    The random generators, from which layers draw weights and seeds when they are built, stay as they are.
    """
    import keras

    drawn = random.getstate()
    with warnings.catch_warnings(), keras.device("cpu"), torch.random.fork_rng(devices=[]):
        # Keras' torch back end and numpy 2: Variable.numpy() gives the same with and without a copy.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        try:
            yield
        finally:
            random.setstate(drawn)
