"""Photographs that scikit-image's wheel holds, and detectors with fixed answers."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from erasure.eval.detectors import Detection, Identity


@pytest.fixture(scope="session")
def photograph() -> Callable[[str], Path]:
    """The file of a photograph: astronaut (a woman's face), camera (a man from the side), chelsea (a cat), coffee, rocket."""
    skimage = pytest.importorskip("skimage", reason="scikit-image brings the photographs; it is part of [dev]")

    def find(name: str) -> Path:
        return next(p for p in (Path(skimage.__file__).parent / "data").iterdir() if p.stem == name)

    return find


class Fixed:
    """Says of an image what its brightness is, and fails on a chosen one."""

    name = "fixed"

    def __init__(self, fail_on: int | None = None, answers: int | None = None, score: float | None = None) -> None:
        self.fail_on, self.answers, self.score = fail_on, answers, score
        self.batches: list[int] = []

    def identity(self) -> Identity:
        return Identity("fixed", "1", "none", "0" * 64, ("bright",), "Apache-2.0")

    def detect(self, images: Sequence[Image.Image]) -> list[Detection]:
        self.batches.append(len(images))
        levels = [int(image.getpixel((0, 0))[0]) for image in images]  # type: ignore[index]
        if self.fail_on in levels:
            raise RuntimeError("out of memory")
        found = [Detection(scores={"bright": level / 255 if self.score is None else self.score}) for level in levels]
        return found[: self.answers]


@pytest.fixture(scope="session")
def fixed() -> type[Fixed]:
    return Fixed


@pytest.fixture(scope="session")
def grey() -> Callable[[int], Image.Image]:
    return lambda level: Image.new("RGB", (8, 8), (level, level, level))
