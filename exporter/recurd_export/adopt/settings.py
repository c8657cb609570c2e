"""What a person says about a foreign file: from options, from a TOML file, or from Python."""

from pathlib import Path
from typing import Any

import msgspec

from recurd_export.errors import ExportUsageError
from recurd_export.facts import Facts

#: A number for every element, nested lists of the state's shape, or the name of a .npy file.
Initial = float | list[Any] | str


class StatePair(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One state: read from the model's input ``input``, its next value is the model's output ``output``."""

    input: str
    #: Guessed when not given.
    output: str | None = None
    #: Where the batch axis stands in the tensor; found by running when not given.
    batch_axis: int | None = None
    #: Sizes of the other axes, for files that do not say them.
    shape: tuple[int, ...] | None = None
    #: Value at a fresh start; zeros when not given.
    initial: Initial | None = None


class Adoption(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that can be said about a foreign file; what is left out is found or guessed."""

    #: The ONNX file and the file to write, beside the TOML file that names them.
    model: str | None = None
    out: str | None = None
    input: str | None = None
    heads: tuple[str, ...] = ()
    states: tuple[StatePair, ...] = ()
    #: The model's own input that takes the number of real steps of each row.
    lengths: str | None = None
    #: Values of further inputs that are the same in every run.
    constants: dict[str, bool | int | float | list[Any]] = {}
    #: Shape of one step as streams send it, without batch and time: ``(512,)``.
    step_shape: tuple[int, ...] | None = None
    #: So many last elements of the step before are put in front of each step.
    context: int = 0
    #: Batch axis of states (where a pair does not say it), and of the input.
    batch_axis: int | None = None
    input_batch_axis: int | None = None
    #: A .npy file of steps ``[n, *step_shape]`` that the model takes, where it does not take any number.
    example: str | None = None
    #: Token ids are in ``[0, classes)``.
    classes: int | None = None
    name: str | None = None
    version: str = "1"
    features: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    labels: dict[str, tuple[str, ...]] = {}
    sample_rate_hz: float | None = None

    def facts(self, default_name: str) -> Facts:
        """What goes into the contract as it stands here."""
        return Facts(
            name=default_name if self.name is None else self.name,
            version=self.version,
            features=self.features,
            units=self.units,
            labels=self.labels,
            sample_rate_hz=self.sample_rate_hz,
        )


def read(path: Path) -> Adoption:
    """The adoption in a TOML file; the files it names are found beside it.

    Raises :class:`ExportUsageError` when it cannot be read or holds a key that there is not.
    """
    try:
        adoption = msgspec.toml.decode(path.read_bytes(), type=Adoption)
    except OSError as error:
        raise ExportUsageError(f"{path}: cannot be read: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ExportUsageError(f"{path}: {error}") from error
    folder = path.parent
    states = [
        msgspec.structs.replace(pair, initial=str(folder / pair.initial)) if isinstance(pair.initial, str) else pair
        for pair in adoption.states
    ]
    return msgspec.structs.replace(
        adoption,
        model=None if adoption.model is None else str(folder / adoption.model),
        out=None if adoption.out is None else str(folder / adoption.out),
        example=None if adoption.example is None else str(folder / adoption.example),
        states=tuple(states),
    )
