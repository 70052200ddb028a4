"""Which recipes and metrics score a suite's images, and whether all that they need is here; said before anything is generated."""

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from erasure.errors import ErasureError

from .detectors import missing
from .recipes import Recipe, load_recipe
from .scoring import can_do_without
from .suite import Suite
from .weights import WEIGHTS, here

log = logging.getLogger("erasure")

KID_SUBSET = 1000
"""Images of KID's usual subset; fewer are taken all at once."""
NEEDS: dict[str, tuple[str, ...]] = {
    "fid": ("inception",),
    "kid": ("inception",),
    "lpips": ("alexnet",),
    "image_reward": ("ImageReward-v1.0", "ImageReward-config"),
}
"""Metric -> names of ``weights.WEIGHTS`` that it loads with its defaults."""
CLIP = {"clip_score": ("ViT-B-32", "openai"), "cmmd": ("ViT-L-14-336", "openai")}
"""Metric -> open_clip's model and tag."""
HUB = {"pick_score": ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")}


@dataclass(frozen=True)
class Choice:
    """Recipes and metrics by name, as checked against what there is."""

    recipes: tuple[Recipe, ...] = ()
    metrics: tuple[str, ...] = ()
    reference: Path | None = None
    """Real images for FID, KID and CMMD, instead of the base's: a folder, or an .npz file made from one."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Recipes of the suite that nobody asked for by name and that cannot run here, with what they need."""

    @classmethod
    def of(
        cls,
        suite: Suite,
        recipes: str | None = None,
        metrics: str | None = None,
        reference: Path | None = None,
        folders: Sequence[Path] = (),
    ) -> "Choice":
        """Those that were named, else the suite's own; names are separated by commas.

        A named recipe that cannot run is an error that names the file; the suite's own are left out, and said. folders: cells whose
        stored detections stand in for a detector that is not here.
        """
        wanted = [load_recipe(name) for name in (suite.recipes if recipes is None else _names(recipes, "recipe"))]
        lacking = {recipe.name: what for recipe in wanted if (what := _lacks(recipe, folders))}
        if recipes is not None and lacking:
            raise ErasureError("; ".join(f"recipe {name} {what}" for name, what in lacking.items()) + ": get it, or choose other recipes")
        for name, what in lacking.items():
            log.warning("recipe %s is left out: it %s", name, what)
        names = suite.metrics if metrics is None else _names(metrics, "metrics")
        _check_metrics(suite, names, reference)
        chosen = tuple(recipe for recipe in wanted if recipe.name not in lacking)
        if not (chosen or names or suite.protocol.judge):
            needs = "; ".join(f"{name} {what}" for name, what in lacking.items())
            raise ErasureError(f"nothing scores suite {suite.name} here ({needs or 'it names neither'}): give --recipe or --metrics")
        return cls(chosen, tuple(names), reference, lacking)

    @property
    def detectors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for recipe in self.recipes for name in recipe.detectors))

    def panel(self, images: int, *, base: bool) -> Any:
        """A ``metrics.base.Panel`` for so many images; on the base itself, those that compare with the base are left out."""
        from .metrics import metrics as registry
        from .metrics.base import Panel

        made = [registry.get(name)(**self._options(name, registry.get(name), images)) for name in self.metrics]
        fitting = [metric for metric in made if not (base and "base" in metric.needs)]
        return Panel(fitting) if fitting else None

    def require(self, images: int) -> None:
        """Load every metric's weights; raises ErasureError that names file, source and SHA-256 of one that cannot be had."""
        panel = self.panel(images, base=False)
        for metric in panel.metrics.values() if panel else ():
            metric.identity()

    def _options(self, name: str, metric: type, images: int) -> dict[str, Any]:
        reference = {"reference": self.reference} if self.reference is not None and _takes_reference(metric) else {}
        return reference | ({"subset_size": None} if name == "kid" and images < KID_SUBSET else {})

    def describe(self) -> dict[str, Any]:
        """What would score, and every file that would be fetched, without loading or fetching anything."""
        files = [_weight(name) for metric in self.metrics for name in NEEDS.get(metric, ())]
        files += [_clip(*CLIP[metric]) for metric in self.metrics if metric in CLIP]
        files += [{"file": "model.safetensors", "source": f"hub {repo}", "sha256": None} for m in self.metrics for repo in HUB.get(m, ())]
        return {
            "recipes": {r.name: f"ready ({', '.join(r.detectors)}; hash {r.hash})" for r in self.recipes}
            | {name: f"unavailable: {what}" for name, what in self.left_out.items()},
            "metrics": list(self.metrics),
            "downloads": list({str(file): file for file in files if not file.pop("here", False)}.values()),
        }


def _check_metrics(suite: Suite, names: Sequence[str], reference: Path | None) -> None:
    from .metrics import metrics as registry

    classes = [registry.get(name) for name in names]
    if suite.protocol.frames and names:
        raise ErasureError(f"suite {suite.name} makes videos, which metrics of images ({', '.join(names)}) cannot score: use recipes")
    if reference is not None and not reference.exists():
        raise ErasureError(f"no reference images at {reference}: give a folder of images, or an .npz file made from one")
    if reference is not None and not any(map(_takes_reference, classes)):
        raise ErasureError(f"--reference is for fid, kid and cmmd, and the metrics are {', '.join(names) or 'none'}: see --metrics")


def _names(text: str, what: str) -> list[str]:
    names = [name for part in text.split(",") if (name := part.strip())]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ErasureError(f"--{what} has {twice[0]} twice; once is enough")
    if not names and what == "recipe":
        raise ErasureError("--recipe is empty; see `erasure recipes`")
    return names


def _lacks(recipe: Recipe, folders: Sequence[Path]) -> str:
    """What keeps a recipe from running; nothing where its detectors' answers are stored."""
    what = recipe.unavailable()
    return "" if not what or all(not missing(name) or can_do_without(name, folders) for name in recipe.detectors) else what


def _takes_reference(metric: type) -> bool:
    return "reference" in inspect.signature(metric).parameters


def _weight(name: str) -> dict[str, Any]:
    weight = WEIGHTS[name]
    return {"file": weight.file, "source": weight.source, "sha256": weight.sha256, "here": here(name)}


def _clip(model: str, tag: str) -> dict[str, Any]:
    import open_clip

    known = open_clip.get_pretrained_cfg(model, tag)
    url, hub = str(known.get("url") or ""), str(known.get("hf_hub") or "").strip("/")
    # OpenAI's addresses hold the SHA-256 of the file behind them.
    return {"file": f"CLIP {model}/{tag}", "source": url or f"hub {hub}", "sha256": url.split("/")[-2] if "openaipublic" in url else None}
