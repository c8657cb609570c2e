"""Names the module that mixes time steps in a model that cannot even be traced: runs it whole and in chunks."""

import itertools
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recurd_export.pytorch import convolutions
from recurd_export.pytorch.arguments import BATCH, STEPS
from recurd_export.pytorch.fresh import fresh_run
from recurd_export.pytorch.layout import Layout
from recurd_export.pytorch.watch import ForwardError, Passage, Run

_CUTS = (0, 4, 5, STEPS)


def mixing_module(model: nn.Module, layout: Layout) -> str | None:
    """The first module without children that gives chunks something else than the whole, if it is to blame."""
    if not layout.causal:
        return None
    x = layout.arguments.random(BATCH, STEPS, 0)
    try:
        whole = fresh_run(model, layout.arguments, x)
        chunks = _in_chunks(model, layout, x)
    except ForwardError as error:
        return error.layer
    counts: dict[str, int] = defaultdict(int)
    by_layer = [_by_layer(run) for run in (whole, *chunks)]
    for passage in whole.passages:
        number = counts[passage.layer]
        counts[passage.layer] += 1
        parts = _matching(number, *(passages[passage.layer] for passages in by_layer))
        for place, output in enumerate(passage.outputs):
            if _differs(output, [part.outputs[place] for part in parts]):
                # A recurrent layer carries its state on; what it differs in, something outside any module has mixed.
                return None if passage.recurrent else passage.layer
    return None


def _by_layer(run: Run) -> dict[str, list[Passage]]:
    found: dict[str, list[Passage]] = defaultdict(list)
    for passage in run.passages:
        found[passage.layer].append(passage)
    return found


def _matching(number: int, whole: list[Passage], *chunks: list[Passage]) -> list[Passage]:
    """What a layer's call in the whole is held against: the same call in chunks, or, in a loop, the same step."""
    steps = [stop - start for start, stop in itertools.pairwise(_CUTS)]
    if len(whole) == STEPS and [len(chunk) for chunk in chunks] == steps:
        return [[passage for chunk in chunks for passage in chunk][number]]
    return [chunk[number] for chunk in chunks if number < len(chunk)]


def _in_chunks(model: nn.Module, layout: Layout, x: Tensor) -> list[Run]:
    runs: list[Run] = []
    states: dict[str, Tensor] | None = None
    for start, stop in itertools.pairwise(_CUTS):
        left = {call.key: call.left for call in runs[-1].calls} if runs else {}
        convolve = convolutions.carrying(layout.convolutions, states)
        runs.append(
            fresh_run(
                model,
                layout.arguments,
                x[:, start:stop],
                lambda key, *_, left=left: left.get(key),
                convolve,
                plain=layout.plain,
            )
        )
        states = convolutions.left(layout.convolutions, runs[-1], states)
    return runs


def _differs(whole: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether the parts, joined where they grow with the steps, are not the whole."""
    steps = [stop - start for start, stop in itertools.pairwise(_CUTS)]
    if not parts:
        return False
    for axis, size in enumerate(whole.shape):
        if size == STEPS and [part.shape[axis] for part in parts] == steps:
            joined = torch.cat(list(parts), axis)
            return whole.shape != joined.shape or not torch.allclose(whole, joined, 1e-4, 1e-5, equal_nan=True)
        more = size - STEPS
        if more > 0 and [part.shape[axis] - more for part in parts] == steps:
            return False  # padded steps are among them, which are not the same in every chunk
    last = parts[-1]
    return whole.shape != last.shape or not torch.allclose(whole, last, 1e-4, 1e-5, equal_nan=True)
