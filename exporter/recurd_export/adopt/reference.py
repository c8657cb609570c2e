"""The foreign file itself as a runner: what every check of an adopted file is held against.

The very file runs in a plain session, one stream at a time, as its author's own loop would run it: nothing of the
contract graph, of lifted opsets or of batches is in it.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from recurd.contract import Contract
from recurd_export.adopt.foreign import Foreign, first_line
from recurd_export.adopt.layout import Layout
from recurd_export.adopt.roles import Roles
from recurd_export.adopt.running import feeds, open_as_it_is, open_relaxed
from recurd_export.errors import ExportError

Array = npt.NDArray[Any]
#: What a stream leaves behind: the states as the file has them, of one row, and the context if there is one.
_Left = tuple[dict[str, Array], Array]


class Reference:
    """Runs the file row by row; owns the states of its slots. Satisfies :class:`recurd.verify.Runner`."""

    def __init__(self, foreign: Foreign, roles: Roles, layout: Layout, contract: Contract) -> None:
        self.contract = contract
        self._roles = roles
        self._layout = layout
        time = layout.input.time_axis
        declared = None if time is None else (layout.input.port.dims or ())[time]
        self._whole = layout.whole and not isinstance(declared, int)
        if isinstance(declared, int) and declared != 1:
            # The file declares a number of steps that its graph does not need, and a session would insist on it.
            self._session = open_relaxed(foreign)
        else:
            self._session = open_as_it_is(foreign)
        self._states: dict[int, _Left] = {}

    def run(self, slots: Array, fresh: Array, lengths: Array, input: Array) -> list[Array]:
        """See :meth:`recurd.model.Model.run`."""
        outputs = [np.zeros((*input.shape[:2], *head.shape), head.dtype) for head in self.contract.heads]
        for row, slot in enumerate(slots):
            start = self._start(input) if fresh[row] else self._states[int(slot)]
            steps = input[row, : lengths[row]]
            heads, self._states[int(slot)] = self._stream(steps, *start)
            for output, head in zip(outputs, heads, strict=True):
                output[row, : len(steps)] = head
        return outputs

    def read(self, slots: Array) -> dict[str, Array]:
        """See :meth:`recurd.model.Model.read`."""
        rows = []
        for slot in slots:
            states, context = self._states[int(slot)]
            own = [states[state.before.name].take(0, state.batch_axis) for state in self._layout.states]
            rows.append([*own, context][: len(self.contract.states)])
        names = [state.name for state in self.contract.states]
        return {name: np.stack([row[index] for row in rows]) for index, name in enumerate(names)}

    def _start(self, input: Array) -> _Left:
        states = {state.before.name: state.rows(1) for state in self._layout.states}
        shape = self._layout.input.shape
        kept = shape[-1] - input.shape[-1] if shape else 0
        return states, np.zeros((*shape[:-1], kept), input.dtype)

    def _stream(self, x: Array, states: dict[str, Array], context: Array) -> tuple[list[Array], _Left]:
        """All steps of one stream, ``x [steps, *shape]``: its heads, and what it leaves behind."""
        parts = [x] if self._whole else [x[step : step + 1] for step in range(len(x))]
        found: list[list[Array]] = [[] for _ in self._layout.heads]
        for part in parts:
            if context.size:
                part = np.concatenate([context[None], part], axis=-1)
                context = part[0, ..., -context.shape[-1] :]
            outputs = self._call(part, states)
            states = {state.before.name: outputs[state.after.name] for state in self._layout.states}
            for into, head in zip(found, self._layout.heads, strict=True):
                value = np.moveaxis(outputs[head.port.name], head.leading, range(len(head.leading)))
                into.append(value[0] if head.time_axis is not None else value)
        return [np.concatenate(part) for part in found], (states, context)

    def _call(self, part: Array, states: dict[str, Array]) -> dict[str, Array]:
        layout = self._layout.input
        # From [steps, *shape] to the file's order of axes, with a batch of one.
        x = part[None] if layout.time_axis is not None else part
        x = np.moveaxis(x, range(len(layout.leading)), layout.leading).astype(layout.port.dtype)
        names = [port.name for port in self._roles.heads] + [state.after.name for state in self._layout.states]
        try:
            found = self._session.run(names, feeds(self._roles, np.ascontiguousarray(x), states, 1, len(part)))
        except Exception as error:  # the runtime raises its own unexported types
            raise ExportError(
                f"the file itself fails with {len(part)} steps of one stream: {first_line(error)}"
            ) from error
        return dict(zip(names, found, strict=True))
