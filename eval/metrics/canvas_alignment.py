"""Alignment of canvas images with their prompts, by the canvas's judge: of what the prompt asks for, the share that is there."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from erasure.canvas.world import world
from erasure.errors import ErasureError

from ..judges import Judging, judge, judge_sha256
from ..rows import Row
from .base import SampleMetric, as_unit

FLOOR = 1e-7
"""Smallest presence probability that the logarithm is taken of."""


class CanvasAlignment(SampleMetric):
    """Alignment of 64 x 64 canvas images with prompts whose content is known; no distance in an embedding of text and image.

    Fields of an image: ``canvas_alignment``, the mean over everything the row asks for, each object, the style and the background
    counting one: 1 where the judge calls it, else 0; ``objects``, ``style`` and ``background``, the same for each alone;
    ``log_presence``, mean natural logarithm of the judge's presence probability of the asked objects. In an image that is not
    recognised nothing is found. None where a row does not ask. judge: a name of ``judges.JUDGES``, or judging that gives Verdicts.
    """

    name = "canvas_alignment"
    higher_is_better = True
    fields = ("canvas_alignment", "objects", "style", "background", "log_presence")
    needs = frozenset({"prompts"})
    may_skip = True

    def __init__(self, judge: str | Judging = "canvas/judge_test", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.judge = judge

    def measure(self, images: Tensor, rows: Sequence[Row], base: Tensor | None) -> Tensor:
        judging = judge(self.judge) if isinstance(self.judge, str) else self.judge
        verdict, of, table = judging(as_unit(images).cpu()), world(), []
        if len(verdict.unrecognised) != len(rows):
            raise ErasureError(f"the judge answered for {len(verdict.unrecognised)} of {len(rows)} images")
        for i, row in enumerate(rows):
            named = [of.objects.index(name) for name in row.objects]
            seen = not bool(verdict.unrecognised[i])
            found = [seen and bool(verdict.present[i, k]) for k in named]
            styles = [seen and of.styles[int(verdict.style[i])] == row.style] if row.style else []
            backgrounds = [seen and of.backgrounds[int(verdict.background[i])] == row.background] if row.background else []
            presence = [float(verdict.scores[i, k].clamp(min=FLOOR).log()) for k in named]
            table.append([_mean(part) for part in (found + styles + backgrounds, found, styles, backgrounds, presence)])
        return torch.tensor(table)

    def identity(self) -> dict[str, Any]:
        if isinstance(self.judge, str):
            return {"name": self.name, "judge": self.judge, "sha256": judge_sha256(self.judge)}
        return {"name": self.name, "judge": getattr(self.judge, "name", type(self.judge).__name__), "sha256": None}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
