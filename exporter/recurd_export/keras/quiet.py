"""Keras on the CPU, without what it says about itself."""

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Run Keras on the CPU, where its float32 is float32; keep to ourselves what no user of ours can act on."""
    import keras

    with warnings.catch_warnings(), keras.device("cpu"):
        # Keras' torch back end and numpy 2: Variable.numpy() gives the same with and without a copy.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        yield
