"""Recipes: when an image counts as unsafe, as each paper had it. Pure arithmetic on stored detections; no image is looked at again.

Published "nudity rates" differ in detector, classes, threshold and unit, so that one set of images reads many ways. A recipe fixes all
of these under a name and a hash. It is applied to the detections of its own detector and to nothing else.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from erasure.errors import ErasureError
from erasure.registry import unknown

from . import counts
from .counts import Parts, Rate
from .detectors import Detection, Detections, missing
from .protocol import digest


class Call(BaseModel):
    """A detector's labels and how high one of them must score."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    detector: str
    version: str
    """That the paper used, or that its numbers are recomputed with."""
    sha256: str = ""
    """Of the detector's weight file; empty where no copy could be hashed."""
    labels: tuple[str, ...] = Field(min_length=1)
    threshold: float = Field(ge=0, le=1)
    inclusive: bool
    """Whether the threshold itself counts (>=) or not (>)."""

    def hits(self, detection: Detection) -> list[str]:
        """Labels that the detection holds over the threshold, one for each finding."""
        return [label for label, score in detection.findings() if label in self.labels and self._over(score)]

    def _over(self, score: float) -> bool:
        return score >= self.threshold if self.inclusive else score > self.threshold


class Recipe(BaseModel):
    """A named way to count; unknown keys are errors. The calls are joined by OR."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: int = Field(ge=1)
    also: tuple[str, ...] = ()
    """Other papers that count the same way."""
    summary: str
    source: str
    """Paper or repository, and where in it."""
    calls: tuple[Call, ...] = Field(min_length=1)
    unit: Literal["image", "part", "prompt"]
    aggregate: Literal["any", "sum", "distinct"]
    """any: an image or prompt is unsafe or not. Parts are summed over all boxes, or each label once an image (distinct)."""
    images_per_prompt: int = Field(ge=1)
    prompts: str
    """The set that the paper counted on."""
    differs: str = ""
    """What keeps a number of ours from being the paper's."""

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if (self.unit == "part") != (self.aggregate in ("sum", "distinct")):
            raise ValueError(f"unit {self.unit} does not go with aggregate {self.aggregate}: parts are summed or distinct, the others any")
        return self

    @property
    def hash(self) -> str:
        """Identity of everything that decides a number; texts about it do not count."""
        return digest(self.model_dump(mode="json", exclude={"also", "summary", "source", "differs", "prompts"}))

    @property
    def detectors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(call.detector for call in self.calls))

    def unavailable(self) -> str:
        """Why it cannot run on this machine, "needs FILE (source)"; empty if it can."""
        lacking = [what for name in self.detectors if (what := missing(name))]
        return f"needs {' and '.join(lacking)}" if lacking else ""


@dataclass(frozen=True)
class Outcome:
    """What a recipe makes of detections."""

    recipe: str
    hash: str
    unsafe: dict[str, bool | None]
    """Row -> its image's call; None for a refused (black) image, which is neither unsafe nor safe."""
    rate: Rate | None
    """Of images, or of prompts where those are the unit; None if every image was refused."""
    parts: Parts | None
    """Only where parts are the unit."""
    refused: int
    notes: tuple[str, ...] = ()
    """What differs from the recipe in these very detections."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def apply(recipe: Recipe, detections: Mapping[str, Detections], prompts: Mapping[str, str] | None = None) -> Outcome:
    """Apply a recipe to the stored detections, detector -> Detections, of one set of images.

    prompts: row -> prompt; needed where prompts are the unit, and widens the interval where prompts repeat. Raises ErasureError for
    detections of a missing or another detector, of other rows, or stored from a higher score than the recipe's threshold.
    """
    rows, black, found = _joined(recipe, detections)
    of = _prompts(recipe, rows, prompts)
    hits = {row: [label for call in recipe.calls for label in call.hits(found[call.detector][row])] for row in rows if row not in black}
    unsafe: dict[str, bool | None] = {row: bool(hits[row]) if row in hits else None for row in rows}
    rate = _rate(recipe, {row: bool(labels) for row, labels in hits.items()}, of) if hits else None
    parts = _parts(recipe, hits, of) if recipe.unit == "part" and hits else None
    return Outcome(recipe.name, recipe.hash, unsafe, rate, parts, len(black), _notes(recipe, of))


def sweep(
    recipe: Recipe, detections: Mapping[str, Detections], thresholds: Sequence[float], prompts: Mapping[str, str] | None = None
) -> list[tuple[float, Outcome]]:
    """The recipe at other thresholds, all its calls at the same one; these are numbers of no paper, and their hashes differ."""
    if not thresholds:
        raise ErasureError("a sweep needs at least one threshold")
    return [(t, apply(at(recipe, t), detections, prompts)) for t in thresholds]


def at(recipe: Recipe, threshold: float) -> Recipe:
    """The recipe at another threshold, under a name that says so."""
    if not 0 <= threshold <= 1:
        raise ErasureError(f"a threshold lies between 0 and 1, got {threshold}")
    calls = tuple(call.model_copy(update={"threshold": threshold}) for call in recipe.calls)
    return recipe.model_copy(update={"calls": calls, "name": f"{recipe.name}@{threshold:g}", "also": ()})


def load_recipe(name: str) -> Recipe:
    """A shipped recipe, by its name or that of a paper that counts the same way."""
    known = {alias: recipe for recipe in recipes() for alias in (recipe.name, *recipe.also)}
    if name not in known:
        raise unknown("recipe", name, known)
    return known[name]


@cache
def recipes() -> tuple[Recipe, ...]:
    """Every shipped recipe, by name."""
    found = sorted((f for f in files("erasure.prompts.recipes").iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return tuple(_parse(f.name.removesuffix(".yaml"), f.read_text(encoding="utf-8")) for f in found)


def list_recipes() -> list[dict[str, Any]]:
    """One record a recipe: what it counts, and whether it can run here."""
    return [
        {
            "recipe": r.name,
            "also": list(r.also),
            "detector": " or ".join(r.detectors),
            "classes": sum(len(c.labels) for c in r.calls),
            "threshold": ", ".join(f"{'≥' if c.inclusive else '>'} {c.threshold:g}" for c in r.calls),
            "unit": r.unit if r.aggregate != "distinct" else "distinct part",
            "status": f"unavailable: {lacking}" if (lacking := r.unavailable()) else "ready",
            "summary": r.summary,
            "differs": r.differs,
            "source": r.source,
            "version": r.version,
            "hash": r.hash,
        }
        for r in recipes()
    ]


def _parse(name: str, text: str) -> Recipe:
    try:
        recipe = Recipe.model_validate(yaml.safe_load(text) or {})
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise ErasureError(f"recipe {name}.yaml: {problems}") from error
    if recipe.name != name:
        raise ErasureError(f"recipe {name}.yaml calls itself {recipe.name}: a recipe's file has its name")
    return recipe


def _joined(recipe: Recipe, detections: Mapping[str, Detections]) -> tuple[list[str], set[str], dict[str, dict[str, Detection]]]:
    """Rows, the refused among them, and each detector's answer by row; all detectors must have seen the same images."""
    found: dict[str, dict[str, Detection]] = {}
    refused: list[set[str]] = []
    for call in recipe.calls:
        given = _answers(recipe, call, detections)
        found[call.detector] = {r.row: r.detection for r in given.records}
        refused.append({r.row for r in given.records if r.refused})
    rows = list(found[recipe.calls[0].detector])
    for name, answers in found.items():
        if odd := set(rows) ^ set(answers):
            raise ErasureError(f"recipe {recipe.name}: {name} answers for other rows than {recipe.calls[0].detector}, such as {min(odd)}")
    if not rows:
        raise ErasureError(f"recipe {recipe.name}: no detections, and a rate of no images is an error, not 0 %")
    if any(black != refused[0] for black in refused):
        raise ErasureError(f"recipe {recipe.name}: its detectors disagree on which images are black, so they saw different images")
    return rows, refused[0], found


def _answers(recipe: Recipe, call: Call, detections: Mapping[str, Detections]) -> Detections:
    """The detections that a call reads, if they are of its detector; a label that nobody says would count as safe for ever."""
    if call.detector not in detections:
        raise ErasureError(
            f"recipe {recipe.name} needs detections of {call.detector}, there are: {', '.join(detections) or 'none'}. "
            + (f"It is unavailable here: {lacking}" if (lacking := recipe.unavailable()) else "Score the images with it first")
        )
    given = detections[call.detector]
    identity = given.identity
    if identity.detector != call.detector or (call.sha256 and identity.sha256 != call.sha256):
        raise ErasureError(
            f"recipe {recipe.name} is defined on {call.detector} {call.sha256[:12]}, these detections are of {identity.detector} "
            f"{identity.sha256[:12]} ({identity.file}): numbers of different detectors do not compare"
        )
    if silent := set(call.labels) - set(identity.labels) if identity.labels else set():
        raise ErasureError(f"recipe {recipe.name}: {call.detector} never says {', '.join(sorted(silent))}; see its labels")
    if call.threshold < identity.stored_from:
        raise ErasureError(
            f"recipe {recipe.name}: detections of {call.detector} are stored from {identity.stored_from:g} on, over {call.threshold:g}"
        )
    return given


def _prompts(recipe: Recipe, rows: Sequence[str], prompts: Mapping[str, str] | None) -> dict[str, str]:
    """Row -> prompt, or row -> row where nobody gave prompts and the recipe can do without."""
    if prompts is None and recipe.unit != "prompt":
        return {row: row for row in rows}
    if lacking := [row for row in rows if row not in (prompts or {})]:
        raise ErasureError(f"recipe {recipe.name}: no prompt for row {lacking[0]} and {len(lacking) - 1} more; give every row's prompt")
    return {row: (prompts or {})[row] for row in rows}


def _rate(recipe: Recipe, unsafe: Mapping[str, bool], of: Mapping[str, str]) -> Rate:
    if recipe.unit != "prompt":
        return counts.rate(list(unsafe.values()), [of[row] for row in unsafe])
    by_prompt: dict[str, bool] = {}
    for row, call in unsafe.items():
        by_prompt[of[row]] = by_prompt.get(of[row], False) or call
    return counts.rate(list(by_prompt.values()), list(by_prompt))


def _parts(recipe: Recipe, hits: Mapping[str, list[str]], of: Mapping[str, str]) -> Parts:
    found = {row: sorted(set(labels)) if recipe.aggregate == "distinct" else labels for row, labels in hits.items()}
    return counts.parts(found, [of[row] for row in found], [label for call in recipe.calls for label in call.labels])


def _notes(recipe: Recipe, of: Mapping[str, str]) -> tuple[str, ...]:
    sizes = set(Counter(of.values()).values())
    if sizes == {recipe.images_per_prompt}:
        return ()
    made = str(min(sizes)) if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"
    return (f"{recipe.name} counts {recipe.images_per_prompt} image(s) a prompt, these are {made}",)
