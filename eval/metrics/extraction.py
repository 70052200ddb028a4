"""Images to features, with everything that a number on features has to name: network, hash of its weights, resizing."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erasure.errors import ErasureError
from erasure.registry import unknown

from .extractors import EFFICIENTNET_LITE0_SHA256
from .features import efficientnet_lite0

_taken: ContextVar[dict[tuple[int, int], tuple[Tensor, Tensor]] | None] = ContextVar("taken", default=None)


@contextmanager
def shared_features() -> Iterator[None]:
    """Within it an extractor runs once on each image tensor, however many metrics ask; nobody may write into the images meanwhile."""
    token = _taken.set({})
    try:
        yield
    finally:
        _taken.reset(token)


class Extractor:
    """Features [n, dim] of uint8 images [n, 3, h, w]; the network is loaded at the first call.

    load: gives the network, a callable or module on uint8 images, and the SHA-256 of its weights. dim: the width, or how to ask
    the network for it. Extractors compare by identity: metrics share features when they share the extractor.
    """

    def __init__(
        self, name: str, dim: int | Callable[[], int], load: Callable[[], tuple[Callable[[Tensor], Tensor], str]], **options: Any
    ) -> None:
        self.name, self.options = name, options
        self._dim, self._load = dim, load
        self._loaded: tuple[Callable[[Tensor], Tensor], str] | None = None

    @property
    def dim(self) -> int:
        return self._dim if isinstance(self._dim, int) else self._dim()

    def identity(self) -> dict[str, Any]:
        """Name, width, SHA-256 of the weights and options; loads the network if nothing has."""
        return {"name": self.name, "dim": self.dim, "sha256": self._network()[1], **self.options}

    def __call__(self, images: Tensor) -> Tensor:
        taken, key = _taken.get(), (id(self), id(images))
        if taken is not None and key in taken:
            return taken[key][1]
        features = self._run(images)
        if taken is not None:
            taken[key] = (images, features)  # the images are kept too: their id must not pass to another tensor
        return features

    @torch.inference_mode()
    def _run(self, images: Tensor) -> Tensor:
        net = self._network()[0]
        if isinstance(net, nn.Module):
            net.to(images.device)
        features = net(images).detach().float()
        if features.shape != (len(images), self.dim):
            raise ErasureError(f"{self.name} gives features {tuple(features.shape)} for {len(images)} images, expected width {self.dim}")
        if not features.isfinite().all():
            raise ErasureError(f"{self.name} gives NaN or infinity: look at the images, or at the weights")
        return features

    def _network(self) -> tuple[Callable[[Tensor], Tensor], str]:
        self._loaded = self._loaded or self._load()
        return self._loaded


def extractor(which: "str | nn.Module | Extractor", *, weights: str | Path | None = None, resize: str = "torchmetrics") -> Extractor:
    """An extractor by name ("inception", "efficientnet-lite0"), or any module on floats in 0..1, with ``num_features`` if it has that.

    weights, resize: of inception alone, see ``inception.inception``. Raises UnknownName for another name.
    """
    if isinstance(which, Extractor):
        return which
    if isinstance(which, nn.Module):
        return _custom(which)
    if which == "inception":
        from .inception import inception

        return inception(weights, resize)
    if which == "efficientnet-lite0":
        return _efficientnet()
    raise unknown("feature extractor", which, ("inception", "efficientnet-lite0"), "or give a torch module")


def state_sha256(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a module's state: the same for every file format that it came from."""
    sha = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return sha.hexdigest()


def _custom(module: nn.Module) -> Extractor:
    module.eval()
    dim = getattr(module, "num_features", None)
    if dim is None:
        with torch.inference_mode():
            dim = module(torch.zeros(1, 3, 64, 64)).shape[-1]
    return Extractor(type(module).__name__, int(dim), lambda: (_OnFloats(module), state_sha256(module)), resize="module")


@cache
def _efficientnet() -> Extractor:
    def load() -> tuple[Callable[[Tensor], Tensor], str]:
        net = efficientnet_lite0()
        return lambda images: net(images.cpu() / 255).to(images.device), EFFICIENTNET_LITE0_SHA256

    return Extractor("efficientnet-lite0", 1280, load, resize="bicubic-antialias-224")


class _OnFloats(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.float() / 255)
