"""Any image classifier of timm or torchvision, from a weight file: Imagenette's classes, styles, whatever a checker was trained on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, Resampling
from torch import Tensor, nn

from erasure.errors import ErasureError

from ..weights import file_sha256
from .base import Detection, Identity

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation of ImageNet's classifiers."""
IMAGENETTE = {
    **{"tench": 0, "english springer": 217, "cassette player": 482, "chain saw": 491, "church": 497, "french horn": 566},
    **{"garbage truck": 569, "gas pump": 571, "golf ball": 574, "parachute": 701},
}
"""Imagenette's ten classes among ImageNet's thousand."""


class Classifier:
    """Probabilities of chosen classes, and whether one of them is the first of all, by a timm or torchvision classifier."""

    name = "classifier"

    def __init__(
        self,
        model: str,
        labels: Mapping[str, int],
        path: Path | str | None = None,
        *,
        classes: int = 1000,
        side: int = 224,
        resize: int = 256,
        normalise: tuple[Sequence[float], Sequence[float]] = IMAGENET,
        licence: str = "as the weight file",
        device: str = "cpu",
        module: nn.Module | None = None,
    ) -> None:
        """model: "timm:NAME" or "torchvision:NAME"; labels: name -> index; path: its state dict; or ``module``, [n, 3, s, s] -> logits."""
        if not labels or not all(0 <= index < classes for index in labels.values()):
            raise ErasureError(f"labels name classes 0 to {classes - 1} of {model}, got {dict(labels)}")
        self._file, self._sha256 = "injected", ""
        if module is None:
            if path is None or not Path(path).is_file():
                raise ErasureError(f"the classifier {model} needs its weight file, a state dict of {classes} classes; none at {path}")
            self._file, self._sha256 = Path(path).name, file_sha256(Path(path))
            module = build(model, classes, Path(path))
        self._net, self._model, self._labels, self._device = module.eval().to(device), model, dict(labels), device
        self._classes, self._side, self._resize, self._normalise, self._licence = classes, side, resize, normalise, licence

    def identity(self) -> Identity:
        mean, deviation = self._normalise
        settings = {"side": self._side, "resize": self._resize, "mean": list(mean), "deviation": list(deviation), "classes": self._labels}
        labels = (*self._labels, *(f"top1:{label}" for label in self._labels))
        return Identity(self.name, self._model, self._file, self._sha256, labels, self._licence, settings=settings)

    @torch.no_grad()
    def detect(self, images: Sequence[Image]) -> list[Detection]:
        """Softmax over all classes: each label's share, and "top1:LABEL" 1 or 0."""
        batch = torch.stack([self._pixels(image) for image in images]).to(self._device)
        shares = self._net(batch).float().softmax(-1).cpu()
        if shares.shape != (len(images), self._classes):
            raise ErasureError(f"{self._model} gave logits {tuple(shares.shape)} for {len(images)} images of {self._classes} classes")
        return [Detection(scores=self._scores(row)) for row in shares]

    def _scores(self, shares: Tensor) -> dict[str, float]:
        first = int(shares.argmax())
        own = {label: round(float(shares[index]), 6) for label, index in self._labels.items()}
        return {**own, **{f"top1:{label}": float(index == first) for label, index in self._labels.items()}}

    def _pixels(self, image: Image) -> Tensor:
        """The centre [3, side, side] after the shorter side became ``resize``, normalised."""
        scale = self._resize / min(image.size)
        width, height = (max(round(s * scale), self._side) for s in image.size)
        left, top = (width - self._side) // 2, (height - self._side) // 2
        scaled = image.convert("RGB").resize((width, height), Resampling.BILINEAR)
        pixels = np.asarray(scaled.crop((left, top, left + self._side, top + self._side)), dtype=np.float32) / 255
        mean, deviation = (np.asarray(v, dtype=np.float32) for v in self._normalise)
        return torch.from_numpy((pixels - mean) / deviation).permute(2, 0, 1)


def build(model: str, classes: int, path: Path) -> nn.Module:
    """The network with the weights of the file; every one must fit."""
    library, _, name = model.partition(":")
    if library == "timm":
        net: nn.Module = _library("timm").create_model(name, pretrained=False, num_classes=classes)
    elif library == "torchvision":
        net = _library("torchvision.models").get_model(name, weights=None, num_classes=classes)
    else:
        raise ErasureError(f"a classifier is named timm:NAME or torchvision:NAME, got {model!r}")
    try:
        net.load_state_dict(_state(path))
    except RuntimeError as error:
        raise ErasureError(f"{path} does not fit {model} with {classes} classes: {error}") from error
    return net


def _library(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise ErasureError(f"this classifier needs {module.split('.')[0]}: pip install {module.split('.')[0]}") from error


def _state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)  # tensors alone; anything else in the file raises
    return state.get("state_dict", state.get("model", state))
