"""Detectors: what looks at an image and says what is in it. Each is imported, with what it needs, only when it is asked for."""

from typing import Any

from erasure.registry import Entry, Registry

from .base import Box, Detection, Detector, Identity, Record, refused, run
from .records import Detections, detections_path, read_detections, write_detections

__all__ = [
    "Box",
    "Detection",
    "Detections",
    "Detector",
    "Identity",
    "Record",
    "detections_path",
    "detectors",
    "load",
    "missing",
    "read_detections",
    "refused",
    "run",
    "write_detections",
]

_HERE = "erasure.eval.detectors"

detectors = Registry(
    "detector",
    "erasure.detectors",
    {
        "nudenet": Entry(f"{_HERE}.nudenet:NudeNet", "NudeNet v3 (320n): parts of the body as boxes; AGPL-3.0, extra [nudenet]"),
        "opennsfw": Entry(f"{_HERE}.opennsfw:OpenNSFW", "Yahoo's open_nsfw: one score, the second opinion on nudity"),
        "nudenet-v2": Entry(f"{_HERE}.nudenet_v2:NudeNetV2", "NudeNet v2's default detector of body parts; needs its file"),
        "nudenet-v2-base": Entry(f"{_HERE}.nudenet_v2:NudeNetV2Base", "NudeNet v2's base detector, I2P's own; needs its file"),
        "nudenet-v2-classifier": Entry(
            f"{_HERE}.nudenet_v2:NudeNetV2Classifier", "NudeNet v2's classifier of whole images; needs its file"
        ),
        "q16": Entry(f"{_HERE}.clip:Q16", "Q16: inappropriate or not, by learned prompts on CLIP ViT-L/14; needs its files"),
        "clip-zeroshot": Entry(f"{_HERE}.clip:ClipZeroShot", "Any texts against CLIP's image embedding"),
        "classifier": Entry(f"{_HERE}.classifier:Classifier", "Any classifier of timm or torchvision, from a weight file"),
        "canvas": Entry(f"{_HERE}.canvas:Canvas", "The judges of canvas images"),
        "external": Entry(f"{_HERE}.external:External", "Predictions that another tool made, from CSV or JSON"),
    },
)
"""Name -> class; other packages add theirs through the entry-point group ``erasure.detectors``."""


def load(name: str, **options: Any) -> Detector:
    """The detector of that name, made with its options."""
    return detectors.get(name)(**options)


def missing(name: str) -> str:
    """What a detector lacks on this machine, as "FILE (source)"; empty if nothing, or if only its options can tell."""
    check = getattr(detectors.get(name), "missing", None)
    return check() if check else ""
