"""What a loop over time may not do with its cells."""

import itertools

import torch
from torch import nn

from recurd_export.errors import ExportError
from recurd_export.pytorch.arguments import STEPS
from recurd_export.pytorch.watch import Call, Run


def calls_trouble(model: nn.Module, call: Call) -> str:
    """Why a cell is called other than once a step."""
    paths = [
        path for path, module in model.named_modules(remove_duplicate=False) if module is model.get_submodule(call.path)
    ]
    others = [f"'{path}'" for path in paths if path != call.path]
    times = "once" if call.steps == 1 else f"{call.steps} times"
    what = f"{call.label} is called {times} for {STEPS} steps"
    if others:
        return (
            f"{what}: it is {' and '.join(others)} too, and one cell has one state; give each place a cell of its own"
        )
    return f"{what}; a cell must be called once a step, on a batch of one row a stream"


def check_loops(run: Run) -> None:
    """A cell must be handed in every step what the step before has made of its state.

    Raises :class:`ExportError` for a state that is reset, or never handed on.
    """
    for call in run.calls:
        resets = [
            step
            for step, (before, now) in enumerate(itertools.pairwise(call.taken), start=2)
            if _is_start(now, call) and not (now.given and all(map(torch.equal, now.given, before.left)))
        ]
        if resets and len(resets) == len(call.taken) - 1:
            raise ExportError(f"the loop never hands the state of {call.label} from one step to the next")
        if resets:
            raise ExportError(
                f"the state of {call.label} is reset inside the loop (in step {resets[0]} of {STEPS}); a stream's "
                f"state is reset from outside"
            )


def _is_start(step: Call, loop: Call) -> bool:
    """Whether a step of a cell starts from the state that the loop starts from."""
    if step.given is None or loop.given is None:
        return step.given is loop.given or not any(part.any() for part in (*(step.given or ()), *(loop.given or ())))
    return all(map(torch.equal, step.given, loop.given))
