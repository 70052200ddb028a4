"""LPIPS and its shift-tolerant relative: how far an edited model's images moved from the base's. Drift, not quality."""

import re
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cached_property
from importlib.metadata import version
from importlib.resources import as_file, files
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from erasure.errors import ErasureError

from ..rows import Row
from ..weights import file_sha256, locate
from .base import SampleMetric, as_unit
from .extraction import state_sha256

BACKBONES = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}
"""LPIPS's name of a backbone -> the name of its ImageNet weights, and of torchvision's model."""


class PerceptualDistance(SampleMetric):
    """A distance of each image to the base's of the same row; zero for equal images. Images of both sides have one size."""

    higher_is_better = None  # a kept row should not move, an erased one has to
    needs = frozenset({"base"})

    def measure(self, images: Tensor, rows: Sequence[Row], base: Tensor | None) -> Tensor:
        assert base is not None
        if images.shape != base.shape:
            raise ErasureError(
                f"{self.name} compares images of one size, got {tuple(images.shape[2:])} and {tuple(base.shape[2:])} of the base"
            )
        return self.net.to(images.device)(as_unit(images), as_unit(base)).reshape(len(images), 1)

    @property
    @abstractmethod
    def net(self) -> nn.Module:
        """A module on two batches of floats in 0..1."""


class LPIPS(PerceptualDistance):
    """Learned Perceptual Image Patch Similarity (Zhang et al., CVPR 2018, version 0.1) by torchmetrics.

    backbone: alex, vgg or squeeze. The linear heads come with torchmetrics; the backbone's ImageNet weights are a file of
    torchvision, given by weights (file or folder) or found by ``weights.locate``. net: a module on two batches of images in 0..1
    in place of all that.
    """

    name = "lpips"
    fields = ("lpips",)

    def __init__(
        self,
        backbone: Literal["alex", "vgg", "squeeze"] = "alex",
        *,
        weights: str | Path | None = None,
        net: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if backbone not in BACKBONES:
            raise ErasureError(f"no LPIPS backbone {backbone!r}; there are: {', '.join(BACKBONES)}")
        self.backbone, self.weights, self.given = backbone, weights, net

    @cached_property
    def _file(self) -> Path:
        return locate(BACKBONES[self.backbone], path=self.weights)

    @cached_property
    def net(self) -> nn.Module:
        return self.given.eval() if self.given is not None else _OnUnit(lpips_net(self.backbone, self._file))

    def identity(self) -> dict[str, Any]:
        if self.given is not None:
            return {"name": self.name, "model": type(self.given).__name__, "sha256": state_sha256(self.given)}
        from torchmetrics.functional.image import lpips

        heads = Path(lpips.__file__).parent / f"lpips_models/{self.backbone}.pth"
        hashes = {"sha256": file_sha256(self._file), "heads_sha256": file_sha256(heads)}
        return {"name": self.name, "model": f"{self.backbone} v0.1", **hashes, "backend": f"torchmetrics {version('torchmetrics')}"}


def lpips_net(backbone: str, path: Path) -> nn.Module:
    """torchmetrics' LPIPS network with the backbone's weights of a torchvision file; takes images in -1..1, gives [n, 1, 1, 1]."""
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    net = _NoTrainLpips(net=backbone, pnet_rand=True)  # type: ignore[arg-type]
    state = torch.load(path, map_location="cpu", weights_only=True)
    # torchmetrics cuts torchvision's sequence into slices that keep each layer's number.
    names = {key: re.sub(r"^slices?\.?\d+\.", "features.", key) for key in net.net.state_dict()}
    if lacking := sorted(set(names.values()) - set(state)):
        raise ErasureError(f"{path} is no torchvision {BACKBONES[backbone]}: it lacks {', '.join(lacking[:3])}")
    net.net.load_state_dict({key: state[name] for key, name in names.items()})
    return net


class STLPIPS(PerceptualDistance):
    """Shift-tolerant LPIPS (Ghildyal and Liu, ECCV 2022) by ``stlpips_pytorch``, whose wheel holds all weights. It is not LPIPS.

    backbone: alex or vgg.
    """

    name = "st_lpips"
    fields = ("st_lpips",)
    sha256: ClassVar[dict[str, str]] = {
        "alex": "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee",
        "vgg": "44597da68f49c1837c100ff52299050f274d102eb102e5837178c79be6f0e250",
    }
    """Of the files in stlpips_pytorch 0.0.2."""

    def __init__(self, backbone: Literal["alex", "vgg"] = "alex", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if backbone not in self.sha256:
            raise ErasureError(f"no ST-LPIPS backbone {backbone!r}; there are: {', '.join(self.sha256)}")
        self.backbone = backbone

    @cached_property
    def net(self) -> nn.Module:
        stlpips = _stlpips()
        with as_file(files("stlpips_pytorch").joinpath(f"weights/vST0.0/{self.backbone}_shift_tolerant.pth")) as path:
            if (found := file_sha256(path)) != self.sha256[self.backbone]:
                raise ErasureError(f"{path} has SHA-256 {found}, expected {self.sha256[self.backbone]}: reinstall stlpips_pytorch==0.0.2")
            net = stlpips.LPIPS(pretrained=False, net=self.backbone, variant="shift_tolerant", verbose=False)
            state = torch.load(path, map_location="cpu", weights_only=True)
        # The file names each head once, the module twice.
        state |= {f"lins.{key[3:]}": value for key, value in state.items() if key.startswith("lin") and key[3].isdigit()}
        net.load_state_dict(state)
        return _OnUnit(net.eval().requires_grad_(False))

    def identity(self) -> dict[str, Any]:
        package = f"stlpips_pytorch {version('stlpips_pytorch')}"
        return {"name": self.name, "model": f"{self.backbone} vST0.0", "sha256": self.sha256[self.backbone], "backend": package}


class _OnUnit(nn.Module):
    """A network on images in -1..1, called on images in 0..1."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.net(2 * a - 1, 2 * b - 1)


def _stlpips() -> Any:
    """The package's module. It imports two debugging tools that it neither declares nor calls."""
    try:
        with _stand_ins({"IPython": "embed", "torchsummary": "summary"}), redirect_stdout(StringIO()):
            from stlpips_pytorch import stlpips
    except ImportError as error:
        raise ErasureError("ST-LPIPS needs its package: pip install 'erasure-suite[eval]'") from error
    return stlpips


@contextmanager
def _stand_ins(wanted: dict[str, str]) -> Iterator[None]:
    """Empty modules with one name each, for as long as an import takes, in place of those that are not installed."""
    absent = {module: name for module, name in wanted.items() if module not in sys.modules and find_spec(module) is None}
    for module, name in absent.items():
        stand_in = ModuleType(module)
        unused: Callable[..., None] = lambda *_, **__: None  # noqa: E731
        setattr(stand_in, name, unused)
        sys.modules[module] = stand_in
    try:
        yield
    finally:
        for module in absent:
            del sys.modules[module]
