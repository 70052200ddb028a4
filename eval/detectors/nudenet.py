"""NudeNet v3: eighteen parts of the body as boxes (Bedapudi, github.com/notAI-tech/NudeNet; weights under the AGPL-3.0).

Only the weight file of the wheel is used; its code is never imported. What the file was trained for is a YOLOv8 head of 320 x 320
pixels, and what makes its calls is reproduced here from the behaviour of nudenet 3.4.2:
* the image is padded at its right and bottom to a black square, then scaled as OpenCV scales bytes: bilinearly, without antialiasing,
  with weights of 11 bits (floating point moves one pixel in ten by a grey level, and scores by .005);
* the channels reach the network in the order blue, green, red, because the package swaps them twice;
* each anchor stands for its best label alone, and boxes suppress each other whatever their labels (overlap over .45).
Suppression goes from the highest score down, so a box is never suppressed by one of a lower score: filtering the stored boxes at any
threshold t gives the boxes that the same network would have given with t as its limit. nudenet itself stops at .25.
"""

import ast
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL.Image import Image

from erasure.errors import ErasureError

from ..weights import file_sha256
from .base import Box, Detection, Identity
from .sessions import Session, wheel_file

SIDE = 320
STORED_FROM = 0.05
OVERLAP = 0.45
SHA256 = "c15d8273adad2d0a92f014cc69ab2d6c311a06777a55545f2c4eb46f51911f0f"
"""Of 320n.onnx in nudenet 3.4.2."""


class NudeNet:
    """Parts of the body, covered and exposed, by NudeNet v3 (320n)."""

    name = "nudenet"

    def __init__(self, threads: int = 0) -> None:
        self._path = _file()
        self._session = Session(self._path, threads)
        names = ast.literal_eval(self._session.metadata["names"])
        self._labels = tuple(names[i] for i in range(len(names)))

    def identity(self) -> Identity:
        settings = {"side": SIDE, "overlap": OVERLAP, "channels": "BGR", "runtime": self._session.runtime}
        return Identity(
            self.name, version("nudenet"), self._path.name, SHA256, self._labels, "AGPL-3.0", stored_from=STORED_FROM, settings=settings
        )

    def detect(self, images: Sequence[Image]) -> list[Detection]:
        """Boxes from score .05 on, the highest first."""
        (output,) = self._session(np.stack([squared(image) for image in images]))
        return [Detection(boxes(found, self._labels, image.size)) for found, image in zip(output, images, strict=True)]

    @staticmethod
    def missing() -> str:
        """What has to be installed first; empty if nothing."""
        try:
            _file()
        except ErasureError:
            return "320n.onnx (pip install 'erasure-suite[nudenet]')"
        return ""


def _file() -> Path:
    path = wheel_file("nudenet", "320n.onnx", "nudenet")
    if (found := file_sha256(path)) != SHA256:
        raise ErasureError(f"{path} has SHA-256 {found}, recipes are defined on {SHA256}: pip install nudenet==3.4.2")
    return path


def squared(image: Image) -> np.ndarray:
    """The network's input, float32 [3, 320, 320] in 0..1."""
    pixels = np.asarray(image.convert("RGB"))
    height, width = pixels.shape[:2]
    side = max(height, width)
    square = np.pad(pixels, ((0, side - height), (0, side - width), (0, 0)))
    return scaled(square)[:, :, ::-1].transpose(2, 0, 1).astype(np.float32) / 255


def scaled(square: np.ndarray) -> np.ndarray:
    """A byte image [s, s, 3] at [320, 320, 3], in the integer arithmetic of OpenCV's bilinear resize."""
    low, high, of_low, of_high = _taps(len(square))
    rows = (square[:, low].astype(np.int64) * of_low[:, None] + square[:, high] * of_high[:, None]) >> 4
    of_low, of_high = of_low[:, None, None], of_high[:, None, None]
    return (((rows[low] * of_low) >> 16) + ((rows[high] * of_high) >> 16) + 2) >> 2


def _taps(side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Both source pixels of every target pixel, and their weights in 2048ths."""
    centre = ((np.arange(SIDE) + 0.5) * (side / SIDE) - 0.5).astype(np.float32)
    low = np.floor(centre).astype(np.int64)
    share = np.where((low < 0) | (low >= side - 1), 0, centre - low)
    low = low.clip(0, side - 1)
    weights = [np.rint(w * 2048).astype(np.int64) for w in (1 - share, share)]
    return low, np.minimum(low + 1, side - 1), weights[0], weights[1]


def boxes(output: np.ndarray, labels: Sequence[str], size: tuple[int, int]) -> tuple[Box, ...]:
    """Boxes of an image of size (width, height) from the network's output [4 + labels, anchors], suppressed, highest score first."""
    centres, per_label = output[:4].T.astype(np.float64), output[4:]
    scores, names = per_label.max(0), per_label.argmax(0)
    likely = np.flatnonzero(scores >= STORED_FROM)
    placed = _placed(centres[likely], size)
    kept = suppress(placed, scores[likely])
    return tuple(Box(labels[names[likely[i]]], round(float(scores[likely[i]]), 6), tuple(np.round(placed[i], 1).tolist())) for i in kept)


def _placed(centres: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Centre boxes [n, 4] of the network as left, top, width, height in the image; a corner outside moves to the edge, as in nudenet."""
    scaled = centres * (max(size) / SIDE)
    limits = np.array(size, dtype=np.float64)
    corner = np.clip(scaled[:, :2] - scaled[:, 2:] / 2, 0, limits)
    return np.concatenate([corner, np.minimum(scaled[:, 2:], limits - corner)], axis=1)


def suppress(placed: np.ndarray, scores: np.ndarray, overlap: float = OVERLAP) -> list[int]:
    """Indices of the boxes [n, 4] that no higher-scored kept box covers by more than ``overlap`` of their union, highest first."""
    left = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while len(left):
        best, left = int(left[0]), left[1:]
        kept.append(best)
        left = left[overlaps(placed[best], placed[left]) <= overlap]
    return kept


def overlaps(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of a box [4] with others [n, 4]; two boxes without area cover each other."""
    low = np.maximum(box[:2], others[:, :2])
    high = np.minimum(box[:2] + box[2:], others[:, :2] + others[:, 2:])
    common = np.clip(high - low, 0, None).prod(1)
    union = box[2:].prod() + others[:, 2:].prod(1) - common
    return np.where(union > 0, common / np.where(union > 0, union, 1), 1.0)
