"""Weight files by name: where they are looked for, what their bytes must hash to, and what to do when one is missing."""

import hashlib
import os
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from erasure.errors import ErasureError
from erasure.registry import unknown

FOLDER = "ERASURE_WEIGHTS"
"""Environment variable: a folder of weight files, searched before every cache; downloads go there too."""


@dataclass(frozen=True)
class Weight:
    """One weight file."""

    file: str
    source: str
    """URL of the file, or of the page that explains how to get it."""
    licence: str
    sha256: str | None = None
    """None where no public source states it: the hash of the file that was used is then in the result's identity."""
    hub: str | None = None
    """Repository of the Hugging Face hub that holds ``file``."""


TORCHVISION = "https://download.pytorch.org/models/"
NUDENET_V2 = "https://github.com/notAI-tech/NudeNet/releases/tag/v0"
WEIGHTS: dict[str, Weight] = {
    "inception": Weight(
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "Apache-2.0",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    "alexnet": Weight(
        "alexnet-owt-7be5be79.pth",
        f"{TORCHVISION}alexnet-owt-7be5be79.pth",
        "BSD-3-Clause",
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
    ),
    "vgg16": Weight(
        "vgg16-397923af.pth",
        f"{TORCHVISION}vgg16-397923af.pth",
        "BSD-3-Clause",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    ),
    "squeezenet1_1": Weight(
        "squeezenet1_1-b8a52dc0.pth",
        f"{TORCHVISION}squeezenet1_1-b8a52dc0.pth",
        "BSD-3-Clause",
        "b8a52dc049b60e4b6ab68ad0df457362afab8b6304b2febdc1650a5dab4d7e7b",
    ),
    # Pages, not files: these are used only if someone fetched them by hand.
    "nudenet-v2": Weight("detector_v2_default_checkpoint.onnx", NUDENET_V2, "AGPL-3.0"),
    "nudenet-v2-base": Weight("detector_v2_base_checkpoint.onnx", NUDENET_V2, "AGPL-3.0"),
    "nudenet-v2-classifier": Weight("classifier_model.onnx", NUDENET_V2, "AGPL-3.0"),
    "q16-prompts": Weight(
        "prompts.p",
        "https://github.com/ml-research/i2p/tree/main/checkpoints/Q16-prompt",
        "none stated",
        "9b6c411824c2f64e0f847aa3c9f2b15b8e3a6c75e0efd82f2f672670c97ccad5",
    ),
    "ImageReward-v1.0": Weight(
        "ImageReward.pt", "https://huggingface.co/THUDM/ImageReward/resolve/main/ImageReward.pt", "Apache-2.0", hub="THUDM/ImageReward"
    ),
    "ImageReward-config": Weight(
        "med_config.json", "https://huggingface.co/THUDM/ImageReward/resolve/main/med_config.json", "Apache-2.0", hub="THUDM/ImageReward"
    ),
}
"""Name -> file. CLIP models are named by open_clip's model and tag, see ``metrics.clip``."""


def locate(name: str, *, path: str | Path | None = None) -> Path:
    """The checked file of a named weight.

    path: the file itself or a folder that holds it; nothing else is then looked at. Without it: the folder in $ERASURE_WEIGHTS,
    torch's and the hub's caches, and last a download, unless HF_HUB_OFFLINE is set. Raises UnknownName for a name that is not in
    ``WEIGHTS``, and ErasureError when the file is nowhere (naming file, source, SHA-256 and licence) or is another one.
    """
    if name not in WEIGHTS:
        raise unknown("weight", name, WEIGHTS)
    weight = WEIGHTS[name]
    found = _given(name, Path(path)) if path is not None else _search(weight) or _download(name)
    actual = file_sha256(found)
    if weight.sha256 and actual != weight.sha256:
        raise ErasureError(
            f"{found} is not the {name} weights: its SHA-256 is {actual}, expected {weight.sha256}. Remove it and get {weight.source}"
        )
    return found


def here(name: str) -> bool:
    """Whether a named weight is on this machine; nothing is fetched."""
    return _search(WEIGHTS[name]) is not None


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file; remembered while its size and time stay the same."""
    path = Path(path).resolve()
    state = path.stat()
    return _hash(path, state.st_size, state.st_mtime_ns)


@cache
def _hash(path: Path, size: int, time: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def missing(name: str, reason: str) -> ErasureError:
    """The error for a weight that is nowhere: what, why, from where, which bytes, under which licence, and where to put it."""
    weight = WEIGHTS[name]
    return ErasureError(
        f"the {name} weights are missing ({reason}). File: {weight.file}; source: {weight.source}; SHA-256: "
        f"{weight.sha256 or 'not published, recorded at first use'}; licence: {weight.licence}. "
        f"Give its path, or put it into the folder that ${FOLDER} names"
    )


def _given(name: str, path: Path) -> Path:
    inside = path / WEIGHTS[name].file
    if inside.is_file():
        return inside
    if path.is_file():
        return path
    raise missing(name, f"{path} is no file, and no folder that holds one")


def _search(weight: Weight) -> Path | None:
    found = next((folder / weight.file for folder in _folders() if (folder / weight.file).is_file()), None)
    if found is None and weight.hub is not None:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(weight.hub, weight.file)
        found = Path(cached) if isinstance(cached, str) else None
    return found


def _folders() -> Iterator[Path]:
    """Local folders, the one for downloads first."""
    from torch.hub import get_dir

    if own := os.environ.get(FOLDER):
        yield Path(own)
    yield Path(get_dir()) / "checkpoints"


def _download(name: str) -> Path:
    weight = WEIGHTS[name]
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise missing(name, "HF_HUB_OFFLINE is set, so nothing was downloaded")
    if weight.hub is None and not weight.source.endswith(weight.file):
        raise missing(name, "it has to be fetched by hand")
    try:
        if weight.hub is not None:
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(weight.hub, weight.file))
        from torch.hub import download_url_to_file

        target = next(_folders()) / weight.file
        target.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(weight.source, str(target), hash_prefix=weight.sha256)
        return target
    except (OSError, RuntimeError, urllib.error.URLError) as error:
        raise missing(name, f"the download failed: {error}") from error
