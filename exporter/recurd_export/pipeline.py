"""From a trained model to a proven contract file: read this first.

A front end (``pytorch``, ``keras``, ``adopt``) makes a :class:`~recurd_export.candidate.Candidate` of the source model:
a contract graph, and the source as a runner. The rest is the same for all: put it into the precision that was asked for
(``precision``) and normalisation in front of it (``normalize``), hold it against the source (``prove``), and give the
file its final name (``publish``).
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from recurd import contract as contracts
from recurd.contract import Proof
from recurd.errors import ContractError
from recurd.model import Model
from recurd.verify import RAGGED, RTOL, check_golden
from recurd_export import page
from recurd_export.candidate import Candidate
from recurd_export.errors import ExportError
from recurd_export.facts import Facts
from recurd_export.normalize import put_in_front
from recurd_export.options import Options
from recurd_export.precision import reduce
from recurd_export.prove import check_unreduced, hold, prove
from recurd_export.publish import check_target, unpublished
from recurd_export.report import Report

#: Told the name of each stage as it begins.
Progress = Callable[[str], None]
#: A source model, ready to be looked at: gives its candidate, and tells of its stages.
FrontEnd = Callable[[Facts, Progress], Candidate]

LOAD, LOOK, TRACE, STEPS, CONVERT = "load", "look at the model", "trace", "check time steps", "convert"
#: Every stage there is, in order; a front end may leave some out.
STAGES = (LOAD, LOOK, TRACE, STEPS, CONVERT, "verify", "long run", "write")


def export(source: FrontEnd, path: Path, facts: Facts, progress: Progress, options: Options | None = None) -> Report:
    """The whole way. Raises :class:`ExportError`; then nothing is left at ``path`` (or what was there before)."""
    started = time.monotonic()
    if not facts.name:
        raise ExportError("the model's name is empty")
    check_target(path)
    options = options or Options()
    if options.page is not None:
        page.check_target(options.page, path)
    candidate = source(facts, progress)
    try:
        contracts.check_names(candidate.contract)
    except ContractError as error:
        raise ExportError(str(error)) from error
    if options.reduced:
        progress("verify")
        check_unreduced(candidate)
    # What a client sends is float32 whatever the model computes in, so its normalisation comes last, in front.
    candidate = put_in_front(reduce(candidate, options), options.normalize)
    contract, proto = candidate.contract, candidate.proto
    contract = msgspec.structs.replace(contract, weights_sha256=contracts.weights_sha256(proto))
    progress("verify")
    proven = prove(candidate, progress)
    proof, checks = proven.proof, list(proven.checks)
    contract = msgspec.structs.replace(contract, proof=proof)
    contracts.attach(proto, contract)
    progress("write")
    with unpublished(proto, path) as temporary:
        # The very bytes that get the final name, by the daemon's own way of reading them.
        checks.append(hold(check_golden(Model.load(temporary, slots=len(RAGGED), threads=1), proof, len(RAGGED))))
        report = Report(
            path=path,
            contract=contract,
            precision=options.precision,
            hoisted=candidate.hoisted,
            checks=tuple(checks),
            drift=proven.drift,
            notes=(*candidate.notes, *_notes(proof, candidate), *proven.notes),
            bytes=temporary.stat().st_size,
            seconds=time.monotonic() - started,
        )
        if options.page is not None:
            page.write(options.page, report, proto)
    return report


def _notes(proof: Proof, candidate: Candidate) -> Iterator[str]:
    if proof.rtol > max(RTOL, candidate.coarseness):
        yield f"rounding grows in this model, so relative errors up to {proof.rtol:.1e} are allowed"
