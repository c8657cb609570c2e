"""Guesses from names which outputs are the next values of which inputs.

Names seen in the field: ``state``/``stateN`` and ``h, c``/``hn, cn`` (silero-vad), ``h0, c0``/``hn, cn`` (examples of
torch.onnx.export), ``h, c``/``next_h, next_c`` (icefall's LSTM transducers), ``cached_key_0``/``new_cached_key_0``
(icefall's zipformer, sherpa-onnx), ``cache_last_channel``/``cache_last_channel_next`` and ``input_states_1``/
``output_states_1`` (NeMo), ``conv_cache``/``conv_cache_out`` (GTCRN), ``past_key_values.0.key``/``present.0.key``
(Hugging Face optimum), ``x_in``/``x_out``.
"""

import re
from collections.abc import Sequence

from recurd_export.adopt.foreign import Port

#: What a name may begin and end with before the step ...
_BEFORE = (
    r"(?:past_key_values|past|prev|previous|old|last|in|input|initial|init)[._]",
    r"[._]?(?:in|input|i|prev|old|init|0|past)",
)
#: ... and after it. Taken off, the two names of a state are the same.
_AFTER = (
    r"(?:present_key_values|present|new|next|updated|out|output|final)[._]",
    r"[._]?(?:out|output|o|next|new|n|1|present|final)",
)


def stems(name: str, affixes: tuple[str, str]) -> set[str]:
    """The name itself and what is left without its affixes; never nothing."""
    prefix, suffix = affixes
    lower = name.lower()
    bare = re.sub(f"^{prefix}", "", lower)
    found = {lower, bare, re.sub(f"{suffix}$", "", lower), re.sub(f"{suffix}$", "", bare)}
    return found - {""}


def by_name(inputs: Sequence[Port], outputs: Sequence[Port]) -> list[tuple[Port, Port]]:
    """Pairs whose names belong together and whose shapes can be one; an input with several such outputs has none."""
    links = {
        before: [after for after in outputs if fits(before, after) and _related(before.name, after.name)]
        for before in inputs
    }
    pairs = []
    for before, found in links.items():
        mine = _nearest(before, found)
        if mine is not None and not any(mine == _nearest(b, f) for b, f in links.items() if b is not before):
            pairs.append((before, mine))
    return pairs


def by_shape(inputs: Sequence[Port], outputs: Sequence[Port]) -> list[tuple[Port, Port]]:
    """Pairs of which each fits the other and nothing else."""
    pairs = []
    for before in inputs:
        mine = [after for after in outputs if fits(before, after)]
        if len(mine) == 1 and sum(fits(other, mine[0]) for other in inputs) == 1:
            pairs.append((before, mine[0]))
    return pairs


def fits(before: Port, after: Port) -> bool:
    """Whether the two can be one state: same element type, as many axes, no size that contradicts."""
    if before.dtype != after.dtype:
        return False
    if before.dims is None or after.dims is None:
        return True
    if len(before.dims) != len(after.dims):
        return False
    both = zip(before.dims, after.dims, strict=True)
    return all(one == other for one, other in both if isinstance(one, int) and isinstance(other, int))


def _related(before: str, after: str) -> bool:
    return not stems(before, _BEFORE).isdisjoint(stems(after, _AFTER))


def _nearest(before: Port, outputs: Sequence[Port]) -> Port | None:
    """The one output, or of several the one whose stem is the input's whole name."""
    if len(outputs) > 1:
        outputs = [after for after in outputs if before.name.lower() in stems(after.name, _AFTER)]
    return outputs[0] if len(outputs) == 1 else None
