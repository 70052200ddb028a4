"""Inception with random weights: the real network, loaded by the real code, against torchmetrics' own and a slow resizer."""

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.image.fid import NoTrainInceptionV3

from erasure.errors import ErasureError, UnknownName
from erasure.eval import weights
from erasure.eval.metrics import inception as module
from erasure.eval.metrics.base import Panel
from erasure.eval.metrics.distances import FID, KID
from erasure.eval.metrics.inception import clean_resize, inception

Noise = Callable[..., Tensor]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the right names and shapes."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        net = theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path_factory.mktemp("weights") / weights.WEIGHTS["inception"].file
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture
def accepted(file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file, with its hash in the table."""
    entry = weights.WEIGHTS["inception"]
    pinned = weights.Weight(entry.file, entry.source, entry.licence, weights.file_sha256(file))
    monkeypatch.setitem(weights.WEIGHTS, "inception", pinned)
    return file


def test_features_are_those_of_torchmetrics(accepted: Path, noise: Noise) -> None:
    images = noise(2, side=40)
    theirs = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(accepted))
    for resize, antialias in (("torchmetrics", True), ("torch-fidelity", False)):
        theirs.use_antialias = antialias
        with torch.inference_mode():
            expected = theirs(images)
        assert expected.std() > 0
        assert torch.allclose(inception(accepted, resize)(images), expected, rtol=1e-4, atol=1e-6)
    own = inception(accepted)
    assert own is inception(accepted) and own is not inception(accepted, "clean")
    assert own.identity()["sha256"] == weights.file_sha256(accepted) and own.dim == 2048


def cubic(x: float) -> float:
    """Keys' kernel at a = -0.5, Pillow's."""
    x = abs(x)
    return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def resampled(line: Any, side: int) -> Any:
    """One row of pixels under the widened kernel of antialiased shrinking, by its definition."""
    scale = len(line) / side
    out = []
    for i in range(side):
        centre, wide = (i + 0.5) * scale, max(scale, 1.0)
        taps = range(max(0, math.floor(centre - 2 * wide)), min(len(line), math.ceil(centre + 2 * wide)))
        kernel = [cubic((k + 0.5 - centre) / wide) for k in taps]
        out.append(sum(w * float(line[k]) for w, k in zip(kernel, taps, strict=True)) / sum(kernel))
    return np.array(out)


@pytest.mark.parametrize("side", [64, 500])
def test_the_clean_resize_is_antialiased_bicubic_without_rounding(side: int) -> None:
    line = 255 * np.random.default_rng(side).integers(0, 2, side)
    image = torch.from_numpy(np.tile(line, (3, side, 1)).astype(np.uint8))[None]
    resized = clean_resize(image)
    assert resized.shape == (1, 3, 299, 299)
    expected = resampled(line, 299)
    assert np.abs(resized[0, 0, 150].numpy() - expected).max() < 1e-2
    assert (expected < 0).any() and (resized < 0).any()  # neither clipped
    assert (resized != resized.round()).float().mean() > 0.5  # nor rounded


def test_resizers_differ(noise: Noise) -> None:
    images = noise(1, side=600)
    made = {name: resize(images) for name, resize in module.RESIZERS.items()}
    for name, value in made.items():
        assert value.shape == (1, 3, 299, 299) and value.abs().max() < 1.3, name
    names = list(made)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert (made[a] - made[b]).abs().max() > 0.003, (a, b)
    with pytest.raises(UnknownName, match="did you mean clean"):
        inception(resize="cleen")


def test_fid_and_kid_fed_together_run_the_network_once_a_side(accepted: Path, noise: Noise, rows: Any) -> None:
    shared, calls = inception(accepted), []
    run = shared._run
    shared._run = lambda images: calls.append(len(images)) or run(images)  # type: ignore[method-assign, func-returns-value]
    try:
        panel = Panel([FID(weights=accepted), KID(weights=accepted, subset_size=None)])
        panel.update(noise(4, 1), rows(4), base=noise(4, 2))
        panel.update(noise(3, 3), rows(3, 4), base=noise(3, 4))
    finally:
        del shared._run
    assert calls == [4, 4, 3, 3]
    fid, kid = panel.metrics["fid"], panel.metrics["kid"]
    assert isinstance(fid, FID) and isinstance(kid, KID)
    assert fid.statistics().n == 7 and fid.statistics("ref").n == 7
    # Both hold the same features: the sums of one are those of the other's table.
    for side in ("own", "ref"):
        table = kid.table(side).double().numpy()
        assert np.allclose(fid.statistics(side).mu, table.mean(0), rtol=1e-12)
        assert np.allclose(fid.statistics(side).cov, np.cov(table, rowvar=False), atol=1e-9)
    assert not np.allclose(fid.statistics().mu, fid.statistics("ref").mu, rtol=1e-3)


def test_missing_weights_name_file_source_and_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, noise: Noise, rows: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv(weights.FOLDER, raising=False)
    fid = FID()  # nothing is loaded, or missed, before the first image
    with pytest.raises(ErasureError) as caught:
        fid.update(noise(2), rows(2), base=noise(2))
    for part in ("weights-inception-2015-12-05-6726825d.pth", "github.com/toshas/torch-fidelity", "6726825d0af5f729", "Apache-2.0"):
        assert part in str(caught.value)


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: Noise, rows: Any) -> None:
    """Even one with the pinned hash."""

    class Touch:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "evil.pth"
    torch.save({"x": Touch()}, path)
    entry = weights.WEIGHTS["inception"]
    monkeypatch.setitem(weights.WEIGHTS, "inception", weights.Weight(entry.file, entry.source, entry.licence))
    with pytest.raises(pickle.UnpicklingError):
        FID(weights=path).update(noise(2), rows(2), base=noise(2))
    assert not (tmp_path / "ran").exists()
