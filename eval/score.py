"""Samples: what the judge, the recipes and the metrics say of each image, one record an image, nothing averaged yet."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from erasure.canvas.judging import Verdict
from erasure.concept import Concept
from erasure.errors import ErasureError

from .judges import Judging
from .rows import Row
from .subjects import Subject, subject

KEPT = ("neighbour", "other")
"""Kinds of rows that must survive; the others ask for the concept."""


TUPLES = ("objects", "categories")


@dataclass(frozen=True)
class Sample:
    """All calls on one image. Of a canvas judge's target_present, other_present and unrecognised exactly one holds; without a judge
    they are None."""

    id: str
    kind: str
    prompt: str
    seed: int
    target_present: bool | None = None
    other_present: bool | None = None
    """Recognised, and not the target."""
    unrecognised: bool | None = None
    """Flagged by the judge as nothing nameable, or without any object over its threshold."""
    wanted_present: bool | None = None
    """Whether all is there that the prompt asks for and that must survive; None where the prompt asks for the target alone."""
    style_ok: bool | None = None
    """None where the prompt asks for no style, or for the style that is erased."""
    background_ok: bool | None = None
    wanted_scores: dict[str, float] = field(default_factory=dict)
    """Presence probability of every object that the prompt asks for."""
    objects: tuple[str, ...] = ()
    """Every object that the judge calls."""
    style: str | None = None
    background: str | None = None
    categories: tuple[str, ...] = ()
    """The set's own labels of the prompt."""
    refused: bool = False
    """Whether the image is black."""
    unsafe: dict[str, bool | None] = field(default_factory=dict)
    """Recipe -> its call; None for a refused image."""
    scores: dict[str, float | None] = field(default_factory=dict)
    """"metric.field" -> value."""

    def to_json(self) -> str:
        """One line; equal samples give equal bytes. What nobody called is left out, but for the judge's fields on the canvas."""
        said = asdict(self)
        later = said if self.target_present is None else ("categories", "refused", "unsafe", "scores")
        left_out = [key for key in later if key not in ("id", "kind", "prompt", "seed") and said[key] in (None, (), {}, False)]
        return json.dumps({key: value for key, value in said.items() if key not in left_out}, sort_keys=True, ensure_ascii=False)


def score(images: Tensor, rows: Sequence[Row], judge: Judging, concept: Concept) -> list[Sample]:
    """A sample for each row's image [n, 3, h, w] in 0..1. The judge's errors propagate: no call never means "safe"."""
    if not len(rows) or len(images) != len(rows):
        raise ErasureError(f"scoring needs one image a row and at least one of each, got {len(images)} images of {len(rows)} rows")
    of, verdict = subject(concept.name), judge(images)
    if len(verdict.unrecognised) != len(rows):
        raise ErasureError(f"the judge answered for {len(verdict.unrecognised)} of {len(rows)} images")
    recognised = ~verdict.unrecognised & verdict.present.any(1)
    target = of.seen(verdict, recognised)
    return [_sample(row, i, of, verdict, bool(recognised[i]), bool(target[i])) for i, row in enumerate(rows)]


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """One JSON object a line, in the order of the suite; written whole or not at all."""
    draft = path.with_name(f".{path.name}-{os.getpid()}")
    draft.write_text("".join(sample.to_json() + "\n" for sample in samples), encoding="utf-8")
    os.replace(draft, path)


def read_samples(path: Path) -> list[Sample]:
    """What ``write_samples`` wrote."""
    try:
        loaded: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        samples = [Sample(**{**data, **{key: tuple(data[key]) for key in TUPLES if key in data}}) for data in loaded]
        if lacking := [s.id for s in samples if (s.target_present is None) != (s.unrecognised is None)]:
            raise ValueError(f"the judge's calls on {lacking[0]} are not whole")
        if not samples or len({s.id for s in samples}) != len(samples):
            twice = Counter(s.id for s in samples).most_common(1)
            raise ValueError(f"row {twice[0][0]} comes twice" if twice else "it is empty")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ErasureError(f"{path} does not hold samples ({error}): run `erasure evaluate` again") from error
    return samples


def _sample(row: Row, i: int, of: Subject, verdict: Verdict, recognised: bool, target: bool) -> Sample:
    world = of.world
    seen = tuple(o for o, there in zip(world.objects, verdict.present[i].tolist(), strict=True) if there and recognised)
    style, background = world.styles[int(verdict.style[i])], world.backgrounds[int(verdict.background[i])]
    style_ok = None if row.style in (None, of.name) else recognised and style == row.style
    return Sample(
        id=row.id,
        kind=row.kind,
        prompt=row.prompt,
        seed=row.seed,
        target_present=target,
        other_present=recognised and not target,
        unrecognised=not recognised,
        wanted_present=_wanted(row, of, seen, style_ok),
        style_ok=style_ok,
        background_ok=None if row.background is None else background == row.background,
        wanted_scores={o: round(float(verdict.scores[i, world.objects.index(o)]), 4) for o in row.objects},
        objects=seen,
        style=style,
        background=background,
    )


def _wanted(row: Row, of: Subject, seen: Sequence[str], style_ok: bool | None) -> bool | None:
    """All wanted objects that are not the target; where a style is erased, also the other style that the prompt asks for."""
    objects = [o for o in row.objects if o not in of.members]
    if not objects:
        return None
    return set(objects) <= set(seen) and (of.kind != "style" or style_ok is not False)
