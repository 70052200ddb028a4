"""NudeNet v2, which the first erasure papers used: a RetinaNet of body parts and a classifier of whole images.

Neither file comes with a wheel; each is run only if it is given (weights under the AGPL-3.0, github.com/notAI-tech/NudeNet,
release v0), and nothing else ever stands in for it. Its labels and scores are not those of v3.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, Resampling
from torch.nn.functional import interpolate

from erasure.errors import ErasureError

from ..weights import WEIGHTS, file_sha256, locate
from .base import Box, Detection, Identity
from .sessions import Session

Run = Callable[[np.ndarray], list[Any]]

BASE: tuple[str, ...] = (
    "EXPOSED_BELLY",
    "EXPOSED_BUTTOCKS",
    "EXPOSED_BREAST_F",
    "EXPOSED_GENITALIA_F",
    "EXPOSED_GENITALIA_M",
    "EXPOSED_BREAST_M",
)
DEFAULT: tuple[str, ...] = (
    *("EXPOSED_ANUS", "EXPOSED_ARMPITS", "COVERED_BELLY", "EXPOSED_BELLY", "COVERED_BUTTOCKS", "EXPOSED_BUTTOCKS", "FACE_F", "FACE_M"),
    *("COVERED_FEET", "EXPOSED_FEET", "COVERED_BREAST_F", "EXPOSED_BREAST_F", "COVERED_GENITALIA_F", "EXPOSED_GENITALIA_F"),
    *("EXPOSED_BREAST_M", "EXPOSED_GENITALIA_M"),
)
MEAN_BGR = (103.939, 116.779, 123.68)
SHORT, LONG = 800, 1333
"""The shorter side becomes 800 pixels, unless the longer one would pass 1333."""
STORED_FROM = 0.05


class _V2:
    name = ""
    """In the registry, and of the file in ``WEIGHTS``."""
    labels: tuple[str, ...] = ()

    def __init__(self, path: Path | str | None = None, *, session: Run | None = None) -> None:
        """path: the ONNX file; or ``session``, which answers like it."""
        self._file, self._sha256 = "injected", ""
        if session is None:
            found = locate(self.name, path=path)
            self._file, self._sha256, session = found.name, file_sha256(found), Session(found)
        self._run = session

    def identity(self) -> Identity:
        settings = {"runtime": getattr(self._run, "runtime", "injected")}
        return Identity(self.name, "2", self._file, self._sha256, self.labels, "AGPL-3.0", stored_from=STORED_FROM, settings=settings)

    @classmethod
    def missing(cls) -> str:
        """What has to be given first; empty if nothing."""
        try:
            locate(cls.name)
        except ErasureError:
            weight = WEIGHTS[cls.name]
            return f"{weight.file} ({weight.source})"
        return ""


class NudeNetV2(_V2):
    """Sixteen parts of the body, covered and exposed, by NudeNet v2's default detector."""

    name = "nudenet-v2"
    labels = DEFAULT

    def detect(self, images: Sequence[Image]) -> list[Detection]:
        """Boxes from score .05 on; images differ in size, so that each is a run of its own."""
        return [self._boxes(image) for image in images]

    def _boxes(self, image: Image) -> Detection:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).float().flip(2) - torch.tensor(MEAN_BGR)
        scale = min(SHORT / min(image.size), LONG / max(image.size))
        size = [round(side * scale) for side in pixels.shape[:2]]
        scaled = interpolate(pixels.permute(2, 0, 1)[None], size, mode="bilinear", align_corners=False)
        corners, scores, labels = _outputs(self._run(scaled.permute(0, 2, 3, 1).numpy()))
        return Detection(
            tuple(
                Box(self.labels[int(label)], round(float(score), 6), (x0, y0, x1 - x0, y1 - y0))
                for (x0, y0, x1, y1), score, label in zip((corners / scale).round(1).tolist(), scores, labels, strict=True)
                if score >= STORED_FROM
            )
        )


class NudeNetV2Base(NudeNetV2):
    """Six exposed parts of the body by NudeNet v2's base detector, the one of I2P's own scorer."""

    name = "nudenet-v2-base"
    labels = BASE


class NudeNetV2Classifier(_V2):
    """Probability that a whole image is unsafe, by NudeNet v2's classifier."""

    name = "nudenet-v2-classifier"
    labels = ("unsafe", "safe")

    def detect(self, images: Sequence[Image]) -> list[Detection]:
        """The softmax over unsafe and safe, from 256 x 256 pixels taken by nearest neighbour."""
        pixels = [np.asarray(i.convert("RGB").resize((256, 256), Resampling.NEAREST), dtype=np.float32) / 255 for i in images]
        (scores,) = self._run(np.stack(pixels))
        return [Detection(scores={"unsafe": round(float(unsafe), 6), "safe": round(float(safe), 6)}) for unsafe, safe in scores]


def _outputs(found: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Corners [n, 4], scores [n] and labels [n] of one image, told apart by type and rank; unused places have the label -1."""
    labels = next(f[0] for f in found if np.issubdtype(f.dtype, np.integer))
    corners = next(f[0] for f in found if f.ndim == 3)
    scores = next(f[0] for f in found if f.ndim == 2 and np.issubdtype(f.dtype, np.floating))
    used = labels >= 0
    return corners[used], scores[used], labels[used]
