"""Cells of the canvas benchmark: which there should be, and the files that keep them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erasure.artifact import CONFIG
from erasure.errors import ErasureError
from erasure.eval import results
from erasure.eval.bench import BASE
from erasure.registry import methods

MEMORY = "fit-memory.json"
Record = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One fit on one concept; ``seed`` is 0 where the fit draws nothing."""

    model: str
    concept: str
    method: str
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.method}-seed{self.seed}" if self.seed else self.method

    def path(self, docs: Path) -> Path:
        return docs / "cells" / self.model / self.concept / f"{self.name}.json"


def plan(model: str, names: Sequence[str], concepts: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """Every cell that the table should have: the base, each method, and trained ones with every fit seed."""
    fits = {BASE: (0,)} | {name: tuple(seeds) if methods.get(name).trained else (0,) for name in names}
    return [Cell(model, concept, name, seed) for name, own in fits.items() for seed in own for concept in concepts]


def read(path: Path) -> Record | None:
    """The results of a cell or {"failed": reason}, None where it was not run yet; raises ErasureError for anything else."""
    if not path.exists():
        return None
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ErasureError(f"{path} is not JSON ({error}): remove it, and run its cell again") from error
    if isinstance(record, dict) and isinstance(record.get("failed"), str):
        return record
    return results.read(path)


def read_memory(docs: Path, model: str) -> dict[str, float]:
    path = docs / "cells" / model / MEMORY
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def gather_memory(docs: Path, model: str, out: Path) -> None:
    """Add what the artefacts of this machine say of their fits: OUT/MODEL/CONCEPT/seedN/artefacts/METHOD."""
    found = read_memory(docs, model)
    for config in sorted((out / model).glob(f"*/seed*/artefacts/*/{CONFIG}")):
        concept, seed, _, method, _ = config.relative_to(out / model).parts
        peak = json.loads(config.read_text(encoding="utf-8")).get("cost", {}).get("fit_peak_memory_mb")
        if peak is not None:
            found[f"{concept}/{Cell(model, concept, method, int(seed.removeprefix('seed'))).name}"] = peak
    if found:
        (docs / "cells" / model / MEMORY).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
