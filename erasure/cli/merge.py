"""``erasure merge``: several LoRA experts to one."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ..errors import ErasureError
from .options import Base, Json, Out, Positive, emit

CALIBRATION = 20
"""Sampling steps of calibration runs."""


def merge(
    *folders: Annotated[Path, Parameter(help="Artefacts of LoRA experts, fitted on one base.")],
    base: Base,
    out: Out,
    rule: Annotated[
        Literal["average", "sum", "ties", "co-merge"],
        Parameter(help="average, sum (both exact), ties, or co-merge: rows of the expert that moves them most (our reading of SafetyDPO)."),
    ] = "average",
    rank: Annotated[Positive | None, Parameter(help="Cut the merged LoRA to this rank; what is lost is printed.")] = None,
    density: Annotated[float, Parameter(help="Share of entries of each expert that TIES keeps.")] = 0.5,
    json: Json = False,
) -> None:
    """Merge LoRA experts into one artefact."""
    from .. import artifact
    from ..adapter import AdapterEraser
    from ..merging import count_wins, factors_of
    from ..merging import merge as merged_of

    if not folders:
        raise ErasureError("give the folders of at least one expert")
    pipe = base.load()
    erasers = [artifact.check(folder, pipe)[0] for folder in folders]
    experts = [factors_of(eraser, folder) for eraser, folder in zip(erasers, folders, strict=True)]
    concepts = tuple({concept.name: concept for eraser in erasers for concept in eraser.concepts}.values())
    wins = None
    if rule == "co-merge":
        prompts = [phrase for concept in concepts for phrase in (*concept.targets[:2], *concept.anchors[:1])]
        wins = count_wins(pipe, experts, prompts, steps=CALIBRATION)
    factors, lost = merged_of(experts, rule, rank=rank, density=density, wins=wins)
    ranks = [len(tensor) for key, tensor in factors.items() if "lora_A" in key]
    notes = {"rule": rule, "experts": len(experts), "largest rank": max(ranks), "lost by the cut": round(lost, 6)}
    notes |= {"density": density} if rule == "ties" else {}
    method = erasers[0].method
    eraser = AdapterEraser(method, concepts, factors, notes={"Merging": {"merged": notes}})
    artifact.save(eraser, out, pipe=pipe, base_id=base.model)
    emit([{"out": str(out), **notes}], json, ("out", *notes))
