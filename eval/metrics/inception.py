"""Inception of the FID papers as an extractor: the network of TensorFlow's 2015 graph, under each resizing that is in use."""

import io
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from erasure.registry import unknown

from ..weights import file_sha256, locate
from .extraction import Extractor

SIDE = 299
STAGES = (
    "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2 Mixed_5b Mixed_5c Mixed_5d "
    "Mixed_6a Mixed_6b Mixed_6c Mixed_6d Mixed_6e Mixed_7a Mixed_7b Mixed_7c AvgPool"
).split()
"""Layers up to the pooled 2048 features, in order, by torch-fidelity's names."""


def _torchmetrics(images: Tensor) -> Tensor:
    resized = nn.functional.interpolate(images.float(), (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
    return (resized - 128) / 128


def _torch_fidelity(images: Tensor) -> Tensor:
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    resized = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(SIDE, SIDE), align_corners=False)
    return (resized - 128) / 128


def _pytorch_fid(images: Tensor) -> Tensor:
    resized = nn.functional.interpolate(images.float() / 255, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return 2 * resized - 1


def _clean(images: Tensor) -> Tensor:
    return (clean_resize(images) - 128) / 128


RESIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "torchmetrics": _torchmetrics,
    "torch-fidelity": _torch_fidelity,
    "pytorch-fid": _pytorch_fid,
    "clean": _clean,
}
"""uint8 images [n, 3, h, w] to the network's input [n, 3, 299, 299]: antialiased bilinear; TensorFlow 1's bilinear; plain bilinear,
scaled as in pytorch-fid; and Parmar et al.'s (CVPR 2022), antialiased bicubic without rounding. Their FIDs are not comparable."""


def clean_resize(images: Tensor) -> Tensor:
    """Pillow's antialiased bicubic on each channel as floats, unrounded and unclipped: uint8 [n, 3, h, w] to [n, 3, 299, 299] in 0..255."""
    planes = images.cpu().float().flatten(0, 1).numpy()
    resized = [np.asarray(Image.fromarray(plane).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for plane in planes]
    return torch.from_numpy(np.stack(resized)).unflatten(0, images.shape[:2]).to(images.device)


def inception(weights: str | Path | None = None, resize: str = "torchmetrics") -> Extractor:
    """Pooled features [n, 2048] by torch-fidelity's Inception; the same extractor for equal arguments.

    weights: the file, or a folder that holds it; else where ``weights.locate`` looks. resize: a name of ``RESIZERS``.
    """
    if resize not in RESIZERS:
        raise unknown("resizing", resize, RESIZERS)
    return _inception(None if weights is None else str(weights), resize)


@cache
def _inception(weights: str | None, resize: str) -> Extractor:
    def load() -> tuple[nn.Module, str]:
        path = locate("inception", path=weights)
        return Inception(path, resize), file_sha256(path)

    return Extractor("inception-2015-12-05", 2048, load, resize=resize, backend=f"torch-fidelity {version('torch-fidelity')}")


class Inception(nn.Module):
    """The network up to its last pooling; uint8 images to features [n, 2048]."""

    def __init__(self, path: Path, resize: str) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        net: Any = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=_plain(path))
        self.stages = nn.Sequential(*(getattr(net, stage) for stage in STAGES)).eval().requires_grad_(False)
        self.prepare = RESIZERS[resize]

    def forward(self, images: Tensor) -> Tensor:
        return self.stages(self.prepare(images)).flatten(1)


def _plain(path: Path) -> io.BytesIO:
    """The file's tensors, saved again: torch-fidelity unpickles what it is given, and a file from outside never is."""
    plain = io.BytesIO()
    torch.save(torch.load(path, map_location="cpu", weights_only=True), plain)
    plain.seek(0)
    return plain
