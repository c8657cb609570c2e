"""The front end for Keras models.

The model's graph is followed and every layer becomes a torch module (``twin``), which goes the way of all torch
modules; what is held against the exported file is Keras itself (``reference``).
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from recurd.contract import Contract, Source
from recurd.verify import Check, Inputs, Tolerance
from recurd_export import pipeline
from recurd_export.candidate import Candidate
from recurd_export.errors import ExportError
from recurd_export.facts import Facts
from recurd_export.keras import checks
from recurd_export.keras.load import import_keras, load
from recurd_export.keras.quiet import quiet
from recurd_export.keras.recurrent import RECURRENT
from recurd_export.keras.reference import Keeper, Reference
from recurd_export.keras.twin import Notes, Twin, is_graph
from recurd_export.pytorch.front import front as torch_front

#: Batch and steps of the example, which nobody has to give: a Keras model knows the sizes of its input.
BATCH, STEPS = 2, 16


def front(source: Any) -> pipeline.FrontEnd:
    """The front end for a model, which is left as it was, or for a ``.keras`` or HDF5 file of one."""

    def look(facts: Facts, progress: pipeline.Progress) -> Candidate:
        model = load(Path(source)) if isinstance(source, str | Path) else source
        import_keras()  # as old as it may be, where the model was given
        with torch.no_grad():
            return _candidate(model, facts, progress)

    return look


def _candidate(model: Any, facts: Facts, progress: pipeline.Progress) -> Candidate:
    _check_model(model)
    notes = Notes()
    with quiet():
        twin = Twin(model, (True,), notes).eval()
        if not notes.recurrent:
            kinds = ", ".join(sorted(RECURRENT))
            raise ExportError(f"model '{model.name}' has no recurrent layer of Keras' own ({kinds})")
        made = torch_front(twin, _example(model, twin.takes_ids))(facts, progress)
    contract = msgspec.structs.replace(made.contract, source=_source(model, made.contract))
    keepers = _keepers(contract, notes)
    reference = Reference(model, notes, keepers, contract)

    def more_checks(inputs: Inputs, tolerance: Tolerance) -> Iterator[Check]:
        yield checks.check_stateful(made.proto, reference, inputs, tolerance)
        if not notes.coarse:
            yield checks.check_as_given(model, reference, inputs, tolerance)

    return replace(
        made,
        contract=contract,
        reference=reference,
        exact=Reference(model, notes, keepers, contract, double=True),
        more_checks=more_checks,
        notes=(*made.notes, *_notes(notes)),
    )


def _check_model(model: Any) -> None:
    """Only a model of one input, whose layers can be seen. Raises :class:`ExportError`."""
    import keras

    kind = type(model).__name__
    if isinstance(model, keras.Sequential) and not is_graph(model):
        raise ExportError(
            f"model '{model.name}' is not built yet, or Keras cannot follow it from layer to layer; begin it with a "
            f"keras.Input, and build it in float32 or mixed precision"
        )
    if not is_graph(model):
        if not isinstance(model, keras.Model):
            raise ExportError(f"{kind} is a layer, not a model; put it behind a keras.Input in a keras.Sequential")
        raise ExportError(
            f"{kind} is a subclassed model, whose code cannot be looked into; build it with keras.Sequential or the "
            f"functional API (keras.Model(inputs, outputs)), or write its step in torch and export that"
        )
    if len(model.inputs) != 1:
        names = ", ".join(f"'{tensor.name}'" for tensor in model.inputs)
        raise ExportError(
            f"model '{model.name}' has {len(model.inputs)} inputs ({names}), and a stream has one; join them"
        )

    shape = list(model.inputs[0].shape)
    if len(shape) < 2:
        raise ExportError(f"the model's input is {shape}; it must be [batch, time, ...]")
    if any(size is None for size in shape[2:]):
        raise ExportError(f"the model's input is {shape}; all but batch and time must be of a fixed size")


def _example(model: Any, takes_ids: bool) -> Tensor:
    """An input ``[batch, time, ...]`` of the model's sizes."""
    given = model.inputs[0]
    sizes = (BATCH, STEPS, *given.shape[2:])
    if takes_ids:
        return torch.zeros(sizes, dtype=torch.int64)
    if not given.dtype.startswith(("float", "bfloat")):
        raise ExportError(
            f"the model's input is {given.dtype}, but does not go into an Embedding alone; give the keras.Input the "
            f"dtype float32"
        )
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0))


def _source(model: Any, contract: Contract) -> Source:
    import keras

    assert contract.source is not None
    return Source(
        framework="keras",
        versions={"keras": keras.__version__, **contract.source.versions},
        model=f"{type(model).__module__.partition('.')[0]}.{type(model).__qualname__}",
    )


def _keepers(contract: Contract, notes: Notes) -> dict[str, Keeper]:
    names = {state.name for state in contract.states}
    return {
        name: Keeper(lead, part)
        for path, lead in notes.recurrent.items()
        for part, name in enumerate((f"{path}.h_l0", f"{path}.c_l0"))
        if name in names
    }


def _notes(notes: Notes) -> Iterator[str]:
    if notes.unusual:
        yield (
            f"onnxruntime runs {' and '.join(notes.unusual)} on the CPU, on a machine with CUDA too, because of the "
            f"activations or reset_after=False"
        )
    if notes.coarse:
        yield f"the model computes in {notes.coarse}; the file, and Keras for the proof, compute in float32"
