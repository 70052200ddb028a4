"""The judges of canvas images under the protocol of detectors."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL.Image import Image

from erasure import __version__
from erasure.canvas.world import world

from ..judges import Judging, judge, judge_sha256
from .base import Detection, Identity


class Canvas:
    """Objects, style and background of a canvas image, by one of its judges."""

    name = "canvas"

    def __init__(self, judge_name: str = "canvas/judge_test", judging: Judging | None = None) -> None:
        """judge_name: as protocols name it; judging: stands in for the judge of that name."""
        self._name, self._judge = judge_name, judging or judge(judge_name)

    def identity(self) -> Identity:
        of = world()
        labels = (
            *of.objects,
            *(f"present:{o}" for o in of.objects),
            *(f"style:{s}" for s in of.styles),
            *(f"background:{b}" for b in of.backgrounds),
            "unrecognised",
        )
        return Identity(self.name, __version__, self._name, judge_sha256(self._name), labels, "Apache-2.0")

    def detect(self, images: Sequence[Image]) -> list[Detection]:
        """Every object's probability; and 1 for the judge's calls: "present:OBJECT", "style:STYLE", "background:..", "unrecognised"."""
        pixels = torch.stack([torch.from_numpy(np.array(i.convert("RGB"))).permute(2, 0, 1) for i in images])
        verdict, of = self._judge(pixels.float() / 255), world()
        found = []
        for n in range(len(images)):
            scores = {o: round(float(p), 6) for o, p in zip(of.objects, verdict.scores[n], strict=True)}
            calls = [f"present:{o}" for o, there in zip(of.objects, verdict.present[n], strict=True) if there]
            calls += [f"style:{of.styles[int(verdict.style[n])]}", f"background:{of.backgrounds[int(verdict.background[n])]}"]
            calls += ["unrecognised"] if verdict.unrecognised[n] else []
            found.append(Detection(scores={**scores, **dict.fromkeys(calls, 1.0)}))
        return found
