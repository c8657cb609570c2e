"""What only the caller can know about a model, and the parts of the contract it is told in."""

from collections.abc import Iterable
from typing import Literal

import msgspec

from recurd import wire
from recurd.contract import Head, Input
from recurd_export.errors import ExportError


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Name and version of the model; names, units and rate of what goes in; names of what comes out."""

    name: str
    version: str = "1"
    features: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    #: Per head, names of its elements.
    labels: dict[str, tuple[str, ...]] = {}
    sample_rate_hz: float | None = None

    def input(self, dtype: Literal["float32", "int64"], shape: tuple[int, ...], classes: int | None) -> Input:
        """The contract's input. Raises :class:`ExportError` when a step has not as many features as are named."""
        described = Input(
            dtype=dtype,
            shape=shape,
            features=self.features,
            units=self.units,
            sample_rate_hz=self.sample_rate_hz,
            classes=classes,
        )
        for what, names in (("features", self.features), ("units", self.units)):
            if names and len(names) != described.width:
                raise ExportError(f"{len(names)} {what} are named, but a step of the input has {described.width}")
        return described

    def head(self, name: str, dtype: str, shape: tuple[int, ...], per: Literal["step", "last"]) -> Head:
        """One of the contract's heads.

        Raises :class:`ExportError` for an element type no result can have, and when it has not as many elements as
        labels are given.
        """
        if dtype not in wire.DTYPES:
            raise ExportError(f"head '{name}' is {dtype}; a head must be one of {', '.join(wire.DTYPES)}")
        labels = self.labels.get(name, ())
        described = Head(name=name, dtype=dtype, shape=shape, per=per, labels=labels)
        if labels and len(labels) != described.width:
            raise ExportError(f"{len(labels)} labels are given for head '{name}', which has {described.width} elements")
        return described

    def check_labels(self, heads: Iterable[str]) -> None:
        """Raises :class:`ExportError` when labels are given for a head that there is not."""
        names = list(heads)
        for name in self.labels:
            if name not in names:
                raise ExportError(f"labels are given for '{name}', but the heads are {', '.join(names)}")
