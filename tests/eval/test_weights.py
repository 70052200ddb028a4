import hashlib
from pathlib import Path

import pytest
import torch

from erasure.errors import ErasureError, UnknownName
from erasure.eval import weights
from erasure.eval.weights import WEIGHTS, Weight, file_sha256, locate

CONTENT = b"some weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of one file, caches of our own, no network."""
    monkeypatch.setitem(WEIGHTS, "toy", Weight("toy.pth", (tmp_path / "server/toy.pth").as_uri(), "MIT", SHA256))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv(weights.FOLDER, raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def put(folder: Path, content: bytes = CONTENT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "toy.pth").write_bytes(content)
    return folder / "toy.pth"


def test_an_explicit_path_is_a_file_or_its_folder_and_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, cached = put(tmp_path / "given"), put(tmp_path / "cache")
    monkeypatch.setenv(weights.FOLDER, str(cached.parent))
    assert locate("toy", path=given) == locate("toy", path=given.parent) == given
    assert locate("toy") == cached
    with pytest.raises(ErasureError, match="no file, and no folder that holds one"):
        locate("toy", path=tmp_path / "elsewhere")


def test_the_named_folder_comes_before_torchs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = put(tmp_path / "torch/hub/checkpoints")
    assert locate("toy") == cached
    own = put(tmp_path / "own")
    monkeypatch.setenv(weights.FOLDER, str(own.parent))
    assert locate("toy") == own


def test_another_file_of_that_name_is_refused_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = put(tmp_path / "own", b"other weights")
    monkeypatch.setenv(weights.FOLDER, str(wrong.parent))
    for path in (None, wrong):
        with pytest.raises(ErasureError, match=f"{file_sha256(wrong)}, expected {SHA256}"):
            locate("toy", path=path)


def test_a_file_without_a_published_hash_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WEIGHTS, "toy", Weight("toy.pth", "https://example.org/toy.pth", "MIT"))
    path = put(tmp_path / "own", b"anything")
    assert locate("toy", path=path) == path


def test_the_hash_follows_the_files_bytes(tmp_path: Path) -> None:
    path = put(tmp_path)
    assert file_sha256(path) == SHA256
    path.write_bytes(b"longer than before")
    assert file_sha256(path) == hashlib.sha256(b"longer than before").hexdigest()


def test_a_download_is_checked_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "server")
    monkeypatch.setenv(weights.FOLDER, str(tmp_path / "own"))
    assert locate("toy") == tmp_path / "own/toy.pth" and (tmp_path / "own/toy.pth").read_bytes() == CONTENT
    put(tmp_path / "server", b"changed upstream")
    assert locate("toy").read_bytes() == CONTENT
    (tmp_path / "own/toy.pth").unlink()
    with pytest.raises(ErasureError, match=r"missing \(the download failed: invalid hash"):
        locate("toy")
    assert list((tmp_path / "own").iterdir()) == []


def test_what_is_nowhere_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ErasureError, match="the download failed"):
        locate("toy")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("offline"))
    with pytest.raises(ErasureError) as caught:
        locate("toy")
    for part in ("toy.pth", "file:///", SHA256, "licence: MIT", "$ERASURE_WEIGHTS"):
        assert part in str(caught.value)


def test_a_page_is_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WEIGHTS, "toy", Weight("toy.pth", "https://example.org/releases", "MIT"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("a page"))
    with pytest.raises(ErasureError, match=r"by hand.*SHA-256: not published"):
        locate("toy")


def test_unknown_weights_are_unknown_names() -> None:
    with pytest.raises(UnknownName, match="did you mean inception"):
        locate("inceptoin")


def test_hashes_in_the_table_agree_with_the_prefix_that_torchs_file_names_hold() -> None:
    prefixed = [weight for weight in WEIGHTS.values() if weight.source.startswith(weights.TORCHVISION) or "torch-fidelity" in weight.source]
    assert len(prefixed) == 4
    for weight in prefixed:
        assert weight.sha256 is not None and len(weight.sha256) == 64
        assert weight.sha256.startswith(weight.file.removesuffix(".pth").rpartition("-")[2])
