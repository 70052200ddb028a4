import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from matplotlib.cbook import get_sample_data
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _NoTrainLpips
from torchvision.transforms.functional import gaussian_blur

from erasure.errors import ErasureError
from erasure.eval import weights
from erasure.eval.metrics.perceptual import BACKBONES, LPIPS, STLPIPS

Rows = Callable[..., list[Any]]
Noise = Callable[..., Tensor]


@pytest.fixture(scope="module")
def photo() -> Tensor:
    """The photograph that matplotlib ships, uint8 [3, 260, 260]."""
    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB").resize((260, 260)))).permute(2, 0, 1)


def backbone_file(folder: Path, backbone: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, nn.Module]:
    """Random weights in torchvision's format, with their hash in the table, and the network they belong to."""
    name = BACKBONES[backbone]
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)(weights=None)
    path = folder / weights.WEIGHTS[name].file
    torch.save(net.state_dict(), path)
    entry = weights.WEIGHTS[name]
    monkeypatch.setitem(weights.WEIGHTS, name, weights.Weight(entry.file, entry.source, entry.licence, weights.file_sha256(path)))
    return path, net


@pytest.mark.parametrize("backbone", ["alex", "squeeze"])
def test_lpips_has_the_files_backbone_and_torchmetrics_heads(
    backbone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Rows, noise: Noise
) -> None:
    path, net = backbone_file(tmp_path, backbone, monkeypatch)
    theirs = _NoTrainLpips(net=backbone, pnet_rand=True)
    # Both keep the layers in their order, so the slices can be filled without a word on names.
    layers = [layer for layer in theirs.net.modules() if isinstance(layer, nn.Conv2d)]
    source = [layer for layer in net.features.modules() if isinstance(layer, nn.Conv2d)]  # type: ignore[union-attr]
    for layer, filled in zip(layers, source, strict=True):
        layer.load_state_dict(filled.state_dict())
    own, base = noise(5, 1, side=64), noise(5, 2, side=64)
    with torch.inference_mode():
        expected = theirs(own.float() / 255, base.float() / 255, normalize=True).flatten()
    metric = LPIPS(backbone, weights=tmp_path)
    metric.update(own[:3], rows(3), base=base[:3])
    metric.update(own[3:], rows(2, 3), base=base[3:])
    values = [s["lpips"] for s in metric.samples().values()]
    assert values == pytest.approx(expected.tolist(), rel=1e-4) and min(expected) > 0
    assert metric.result()["value"] == pytest.approx(expected.mean().item(), rel=1e-4)
    assert metric.identity()["sha256"] == weights.file_sha256(path)
    assert metric.identity()["heads_sha256"].startswith({"alex": "df73285e", "squeeze": "4a5350f2"}[backbone])


def test_a_file_of_another_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Rows, noise: Noise) -> None:
    backbone_file(tmp_path, "squeeze", monkeypatch)
    path = tmp_path / weights.WEIGHTS["alexnet"].file
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), path)
    images = noise(1, side=64)
    with pytest.raises(ErasureError, match=r"is not the alexnet weights.*7be5be79"):
        LPIPS(weights=path).update(images, rows(1), base=images)
    entry = weights.WEIGHTS["alexnet"]
    monkeypatch.setitem(weights.WEIGHTS, "alexnet", weights.Weight(entry.file, entry.source, entry.licence))
    with pytest.raises(ErasureError, match="no torchvision alexnet: it lacks features"):
        LPIPS(weights=path).update(images, rows(1), base=images)


def test_lpips_without_a_backbone_says_what_to_get(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: Rows, noise: Noise) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ErasureError) as caught:
        LPIPS("vgg").update(noise(1), rows(1), base=noise(1))
    for part in ("vgg16-397923af.pth", "https://download.pytorch.org/models/", "397923af8e79cdbb", "BSD-3-Clause"):
        assert part in str(caught.value)


def test_perceptual_distances_want_the_base_in_the_same_size(rows: Rows, noise: Noise) -> None:
    metric = STLPIPS()
    with pytest.raises(ErasureError, match="give them as base="):
        metric.update(noise(1, side=64), rows(1))
    with pytest.raises(ErasureError, match=r"\(64, 64\) and \(32, 32\) of the base"):
        metric.update(noise(1, side=64), rows(1), base=noise(1, side=32))
    with pytest.raises(ErasureError, match="2 images and 1 of the base"):
        metric.update(noise(2, side=64), rows(2), base=noise(1, side=64))


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_st_lpips_tolerates_a_shift_and_not_a_blur(backbone: Any, photo: Tensor, rows: Rows) -> None:
    """The real weights: an equal image is at 0, one moved by a pixel far nearer than one blurred by two."""
    here, moved = photo[:, 2:-2, 2:-2], photo[:, 2:-2, 3:-1]
    blurred = gaussian_blur(photo, 9, 2.0)[:, 2:-2, 2:-2]  # type: ignore[arg-type]
    metric = STLPIPS(backbone)
    metric.update(torch.stack([here, moved, blurred]), rows(3), base=torch.stack([here] * 3))
    same, shift, blur = (s["st_lpips"] for s in metric.samples().values())
    assert same == 0 and shift is not None and blur is not None
    assert 0 < shift < blur / 10 and blur > 0.1
    assert "lpips" not in metric.samples()["row-000"] and metric.identity()["name"] == "st_lpips"


def test_st_lpips_loads_every_weight_and_leaves_no_stand_in(photo: Tensor, rows: Rows) -> None:
    metric = STLPIPS()
    images = photo[None, :, :64, :64]
    metric.update(images, rows(1), base=images)
    from stlpips_pytorch import stlpips

    files = Path(stlpips.__file__).parent / "weights/vST0.0/alex_shift_tolerant.pth"
    assert weights.file_sha256(files) == metric.identity()["sha256"]
    loaded, stored = metric.net.net.state_dict(), torch.load(files, map_location="cpu", weights_only=True)  # type: ignore[union-attr]
    assert all(torch.equal(loaded[key], value) for key, value in stored.items())
    for name in ("IPython", "torchsummary"):
        assert name not in sys.modules or sys.modules[name].__spec__ is not None


def test_a_changed_st_lpips_file_is_refused(monkeypatch: pytest.MonkeyPatch, rows: Rows, noise: Noise) -> None:
    monkeypatch.setitem(STLPIPS.sha256, "alex", "0" * 64)
    with pytest.raises(ErasureError, match="reinstall stlpips_pytorch"):
        STLPIPS().update(noise(1, side=64), rows(1), base=noise(1, side=64))
