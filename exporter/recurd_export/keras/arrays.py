"""Keras' variables and classes, seen without its back end."""

from typing import Any

import numpy as np
import numpy.typing as npt


def as_array(variable: Any) -> npt.NDArray[np.float32]:
    """A variable or tensor of any back end as float32."""
    import keras

    return np.array(keras.ops.convert_to_numpy(variable), np.float32)


def own_name(thing: Any) -> str:
    """The name of a class of Keras' own; of another, one that no class of Keras has."""
    kind = type(thing)
    return kind.__name__ if kind.__module__.partition(".")[0] == "keras" else f"{kind.__module__}.{kind.__name__}"


def is_operation(thing: Any) -> bool:
    """Whether it is an operation of ``keras.ops`` rather than a layer."""
    return type(thing).__module__.startswith("keras.src.ops.")
