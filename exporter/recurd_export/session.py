"""An exported file in a plain onnxruntime session, as any program without recurd would run it."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from recurd.contract import Contract
from recurd.model import DISABLED_OPTIMIZERS

Array = npt.NDArray[Any]


class Session:
    """Runs the contract file itself, states as inputs and outputs; owns the states of its slots.

    Satisfies :class:`recurd.verify.Runner`.
    """

    def __init__(self, model: onnx.ModelProto, contract: Contract) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1  # the runs are small
        self.contract = contract
        self._session = ort.InferenceSession(
            model.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=DISABLED_OPTIMIZERS,
        )
        self._rows: dict[int, dict[str, Array]] = {}

    def run(self, slots: Array, fresh: Array, lengths: Array, input: Array) -> list[Array]:
        """See :meth:`recurd.model.Model.run`."""
        contract = self.contract
        feeds = {contract.input.name: input, contract.lengths: lengths}
        for state in contract.states:
            rows = [
                state.initial_array() if new else self._rows[int(slot)][state.name]
                for slot, new in zip(slots, fresh, strict=True)
            ]
            feeds[state.name] = np.stack(rows, axis=state.batch_axis)
        names = [head.name for head in contract.heads] + [state.output for state in contract.states]
        outputs = self._session.run(names, feeds)
        after = outputs[len(contract.heads) :]
        for row, slot in enumerate(slots):
            self._rows[int(slot)] = {
                state.name: value.take(row, state.batch_axis)
                for state, value in zip(contract.states, after, strict=True)
            }
        return list(outputs[: len(contract.heads)])

    def read(self, slots: Array) -> dict[str, Array]:
        """See :meth:`recurd.model.Model.read`."""
        return {
            state.name: np.stack([self._rows[int(slot)][state.name] for slot in slots])
            for state in self.contract.states
        }
