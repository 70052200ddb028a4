"""Reference images from a folder: read in a fixed order, turned into features, and kept so that this is done once."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from erasure.errors import ErasureError

from .extraction import Extractor
from .frechet import Statistics

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def images_in(folder: str | Path) -> list[Path]:
    """Image files of a folder and its subfolders, by name; raises ErasureError when there are none."""
    folder = Path(folder)
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise ErasureError(f"{folder} holds no reference images ({', '.join(SUFFIXES)})")
    return found


def read(path: Path) -> Tensor:
    """An image file as uint8 [3, h, w]; raises ErasureError that names a file which cannot be read whole."""
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError) as error:
        raise ErasureError(f"{path} is no readable image: {error}. Replace it, a reference with holes is another reference") from error


def batches(folder: str | Path, size: int = 32, *, progress: bool = False) -> Iterator[Tensor]:
    """uint8 batches [n <= size, 3, h, w]: neighbours of one size together, in the order of ``images_in``, nothing cropped."""
    held: list[Tensor] = []
    for path in tqdm(images_in(folder), desc="reference", unit="image", disable=not progress, leave=False):
        image = read(path)
        if held and (len(held) == size or held[0].shape != image.shape):
            yield torch.stack(held)
            held = []
        held.append(image)
    yield torch.stack(held)


def features(folder: str | Path, extractor: Extractor, *, device: Any = "cpu", progress: bool = False) -> Iterator[Tensor]:
    """Batches of features [n, dim] of a folder's images."""
    return (extractor(batch.to(device)) for batch in batches(folder, progress=progress))


def statistics(source: str | Path, extractor: Extractor, *, device: Any = "cpu", progress: bool = False) -> Statistics:
    """Mean and covariance of a folder of images, or of an .npz file that ``Statistics.save`` wrote for this extractor."""
    if not _is_file(source):
        return Statistics.of_features(features(source, extractor, device=device, progress=progress), extractor.identity())
    loaded = Statistics.load(source)
    same_extractor(loaded.extractor, extractor, str(source))
    return loaded


def feature_table(source: str | Path, extractor: Extractor, *, device: Any = "cpu", progress: bool = False) -> Tensor:
    """Features [n, dim] of a folder of images, or of an .npz file that ``save_features`` wrote for this extractor."""
    if not _is_file(source):
        return torch.cat(list(features(source, extractor, device=device, progress=progress))).cpu()
    try:
        with np.load(source, allow_pickle=False) as data:
            table, made_by = torch.from_numpy(data["features"]), json.loads(str(data["extractor"]))
    except (KeyError, ValueError, OSError) as error:
        raise ErasureError(f"{source} holds no features of ours ({error}): make them with save_features") from error
    same_extractor(made_by, extractor, str(source))
    return table


def save_features(path: str | Path, table: Tensor, extractor: Extractor) -> None:
    """An .npz file: features [n, dim] as float32, and the extractor's identity as JSON."""
    with Path(path).open("wb") as file:
        np.savez(file, features=table.float().cpu().numpy(), extractor=json.dumps(extractor.identity(), sort_keys=True))


def same_extractor(made_by: dict[str, Any], extractor: Extractor, where: str) -> None:
    """Raise ErasureError, naming what differs, unless features were made by this extractor; its package's version may differ."""
    now = extractor.identity()
    keys = sorted((set(made_by) | set(now)) - {"backend"})
    if unequal := [f"{key}: {made_by.get(key)} there, {now.get(key)} here" for key in keys if made_by.get(key) != now.get(key)]:
        raise ErasureError(f"{where} was made by another extractor ({'; '.join(unequal)}): such distances mean nothing")


def _is_file(source: str | Path) -> bool:
    path = Path(source)
    if path.suffix == ".npz":
        return True
    if not path.is_dir():
        raise ErasureError(f"no reference at {path}: give a folder of images, or an .npz file of its statistics or features")
    return False
