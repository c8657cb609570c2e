"""Inputs and outputs of contract graphs as ONNX declares them (docs/contract.md section 2)."""

from collections.abc import Sequence

import numpy as np
from onnx import ValueInfoProto, helper

from recurd.contract import Contract, Head, State


def inputs(contract: Contract) -> list[ValueInfoProto]:
    """All inputs of the contract's graph."""
    return [
        tensor(contract.input.name, contract.input.dtype, ["batch", "time", *contract.input.shape]),
        tensor(contract.lengths, "int32", ["batch"]),
        *(state(each, each.name) for each in contract.states),
    ]


def outputs(contract: Contract) -> list[ValueInfoProto]:
    """All outputs of the contract's graph."""
    heads = [
        tensor(head.name, head.dtype, [*(["batch", "time"] if head.per == "step" else ["batch"]), *head.shape])
        for head in contract.heads
    ]
    return [*heads, *(state(each, each.output) for each in contract.states)]


def state(state: State, name: str) -> ValueInfoProto:
    """A state's tensor under a name."""
    return tensor(name, state.dtype, [*state.shape[: state.batch_axis], "batch", *state.shape[state.batch_axis :]])


def row(head: Head, name: str) -> ValueInfoProto:
    """One step of a head under a name."""
    return tensor(name, head.dtype, ["batch", *head.shape])


def tensor(name: str, dtype: str, shape: Sequence[str | int]) -> ValueInfoProto:
    """Any tensor."""
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
