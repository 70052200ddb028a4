"""What scores a suite's images: options of the verbs that do."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Scores:
    """Who looks at the images, beside the suite's own judge."""

    recipe: str | None = None
    """Recipes, separated by commas (see `erasure recipes`), instead of the suite's; one whose detector is not here is an error."""
    metrics: str | None = None
    """Metrics, separated by commas, instead of the suite's: fid, kid, cmmd, clip_score, lpips and others."""
    reference: Path | None = None
    """Real images for fid, kid and cmmd, instead of the base's: a folder, or an .npz file made from one."""
    workers: Annotated[int, Parameter(validator=Number(gte=0))] | None = None
    """Processes that read images; 0 reads in this one."""

    def choose(self, suite: Any, cells: list[Path]) -> Any:
        """``eval.choice.Choice`` for a suite; cells: where earlier detections may lie."""
        from erasure.eval.choice import Choice

        return Choice.of(suite, self.recipe, self.metrics, self.reference, cells)


def needs(model: str, suite: Any, choice: Any) -> dict[str, Any]:
    """What a run would score with, and all that it would download, with SHA-256 as far as anybody published one."""
    described = choice.describe()
    downloads = _base(model) + _prompts(suite) + described.pop("downloads")
    return {"model": model, **described, "downloads": downloads}


def _base(model: str) -> list[dict[str, Any]]:
    from ..models import EMBEDDED

    if model in EMBEDDED or Path(model).exists():
        return []
    return [{"file": "safetensors of the base", "source": f"hub {model}", "sha256": None}]


def _prompts(suite: Any) -> list[dict[str, Any]]:
    source = suite.prompts.source if suite.prompts is not None else None
    if source is None or source.folder is not None or source.package is not None:
        return []
    return [{"file": file.path, "source": str(source), "sha256": file.sha256} for file in source.files]
