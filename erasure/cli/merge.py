"""``erasure merge``: several LoRA experts to one."""

from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from ..errors import ErasureError
from .options import Base, Json, Out, Positive, emit
from .output import chatty

if TYPE_CHECKING:
    from ..concept import Concept
    from ..method import Eraser, ErasureMethod

CALIBRATION = 20
"""Sampling steps of calibration runs."""
ABOVE = {"method, settings and fit seed above": "the first expert's, but for the rank"}
"""What the card has to say of its own first tables."""


def merge(
    *folders: Annotated[Path, Parameter(help="Artefacts of LoRA experts, fitted on one base.")],
    base: Base,
    out: Out,
    rule: Annotated[
        Literal["average", "sum", "ties", "co-merge"],
        Parameter(help="average, sum (both exact), ties, or co-merge: rows of the expert that moves them most (our reading of SafetyDPO)."),
    ] = "average",
    rank: Annotated[Positive | None, Parameter(help="Cut the merged LoRA to this rank; what is lost is printed.")] = None,
    density: Annotated[
        float | None, Parameter(help="Share of entries of each expert that TIES keeps; 0.2, the paper's.", validator=Number(gt=0, lte=1))
    ] = None,
    trim: Annotated[
        Literal["layer", "vector"] | None,
        Parameter(help="What TIES keeps that share of: each layer of an expert, or all of them as one vector, as in the paper; layer."),
    ] = None,
    scale: Annotated[float, Parameter(help="λ, by which the merged change is multiplied.", validator=Number(gt=0, lt=inf))] = 1.0,
    json: Json = False,
) -> None:
    """Merge LoRA experts into one artefact."""
    from .. import artifact
    from ..adapter import AdapterEraser
    from ..merging import DENSITY, count_wins, factors_of
    from ..merging import merge as merged_of

    _check(folders, out, rule, density, trim)
    pipe = base.load()
    pipe.set_progress_bar_config(disable=not chatty(json))
    erasers = [artifact.check(folder, pipe)[0] for folder in folders]
    experts = [factors_of(eraser, folder) for eraser, folder in zip(erasers, folders, strict=True)]
    concepts = _concepts(erasers, folders)
    wins = None
    if rule == "co-merge":
        prompts = [phrase for concept in concepts for phrase in (*concept.targets[:2], *concept.anchors[:1])]
        wins = count_wins(pipe, experts, prompts, steps=CALIBRATION)
    options: dict[str, Any] = {"density": density or DENSITY, "trim": trim or "layer"} if rule == "ties" else {}
    factors, lost = merged_of(experts, rule, rank=rank, scale=scale, wins=wins, **options)
    largest = max(len(tensor) for key, tensor in factors.items() if "lora_A" in key)
    notes = {"rule": rule, "experts": len(experts), "largest rank": largest, "lost by the cut": round(lost, 6), "scale": scale, **options}
    details = {"Merging": {"merged": notes | ABOVE}, "Experts": _experts(folders)}
    eraser = AdapterEraser(_of_rank(erasers[0].method, largest), concepts, factors, notes=details)
    artifact.save(eraser, out, pipe=pipe, base_id=base.model, seed=artifact.read_config(folders[0])["seed"])
    emit([{"out": str(out), **notes}], json, ("out", *notes))


def _check(folders: Sequence[Path], out: Path, rule: str, density: float | None, trim: str | None) -> None:
    """Raise, before any base is loaded, for what cannot be merged as asked, or would overwrite an expert."""
    from .. import artifact

    if not folders:
        raise ErasureError("give the folders of at least one expert")
    if rule != "ties" and (density, trim) != (None, None):
        raise ErasureError(f"--density and --trim belong to --rule ties; {rule} trims nothing")
    if out.resolve() in [folder.resolve() for folder in folders]:
        raise ErasureError(f"--out {out} is one of the experts, which would be overwritten; choose another folder")
    artifact.check_target(out)


def _concepts(erasers: "Sequence[Eraser]", folders: Sequence[Path]) -> "tuple[Concept, ...]":
    """The concepts of all experts; two of one name have to be equal, or one's targets would be missing from what is erased."""
    from .. import artifact

    found: dict[str, tuple[Concept, Path]] = {}
    for eraser, folder in zip(erasers, folders, strict=True):
        for concept in eraser.concepts:
            other, where = found.setdefault(concept.name, (concept, folder))
            if other != concept:
                theirs, ours = other.to_dict(), concept.to_dict()
                said = "; ".join(f"{key}: {theirs[key]} and {ours[key]}" for key in ours if ours[key] != theirs[key])
                raise ErasureError(
                    f"{where} and {folder} mean different things by the concept {concept.name!r} ({said}): "
                    f"give one of them another name, in its {artifact.CONFIG}"
                )
    return tuple(concept for concept, _ in found.values())


def _experts(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """What each expert was, for the card, by its place."""
    from ..manifest import CONFIG, read, sha256

    rows: dict[str, dict[str, Any]] = {}
    for i, folder in enumerate(folders, 1):
        config = read(folder)
        concepts = ", ".join(concept["name"] for concept in config["concepts"])
        known = {"folder": folder.name, "method": config["method"], "concepts": concepts, "fit seed": config["seed"]}
        rows[str(i)] = known | {f"sha256 of {CONFIG}": sha256(folder / CONFIG)}
    return rows


def _of_rank(method: "ErasureMethod", rank: int) -> "ErasureMethod":
    """The method with the merged LoRA's rank among its settings, where it has one."""
    config = method.config()
    return method.from_config(config | {"rank": rank}) if "rank" in config else method
