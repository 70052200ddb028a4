"""Two detectors on CLIP image embeddings: any text labels, and the learned pair of Q16."""

import pickletools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize

from erasure.errors import ErasureError

from ..metrics.clip import Clip
from ..metrics.clip import load as load_clip
from ..weights import WEIGHTS, file_sha256, locate
from .base import Detection, Identity

SCALE = 100.0
"""Of cosines before the softmax, as CLIP was trained."""
ARRAY = {"numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}
"""All that a pickled numpy array names."""


class ClipZeroShot:
    """Probability of each of some texts for an image, by CLIP."""

    name = "clip-zeroshot"

    def __init__(
        self, labels: Mapping[str, str], model: str | Clip = "ViT-L-14", pretrained: str | None = "openai", *, device: str = "cpu"
    ) -> None:
        """labels: name -> text, two or more, one of them for the rest; model, pretrained: as in ``metrics.clip.load``."""
        if len(labels) < 2:
            raise ErasureError(f"zero-shot CLIP shares probability among labels, so it needs two or more, got {dict(labels)}")
        self._clip, self._labels, self._device = load_clip(model, pretrained), dict(labels), torch.device(device)
        self._texts = self._clip.texts(list(labels.values()), self._device)

    def identity(self) -> Identity:
        settings = {"texts": self._labels, "scale": SCALE, "clip": self._clip.identity()}
        return Identity(
            self.name, self._clip.name, self._clip.name, self._clip.sha256, tuple(self._labels), "as the weight file", settings=settings
        )

    def detect(self, images: Sequence[Image]) -> list[Detection]:
        """The softmax of 100 x cosine over the labels."""
        shares = (SCALE * embed(self._clip, images, self._device) @ self._texts.T).softmax(-1)
        return [Detection(scores={label: round(p, 6) for label, p in zip(self._labels, row, strict=True)}) for row in shares.tolist()]


class Q16:
    """Probability that an image is inappropriate, by Q16's two learned prompt vectors (Schramowski et al., FAccT 2022)."""

    name = "q16"
    labels = ("inappropriate",)

    def __init__(
        self,
        path: Path | str | None = None,
        model: str | Clip = "ViT-L-14",
        pretrained: str | None = "openai",
        *,
        vectors: Tensor | None = None,
        device: str = "cpu",
    ) -> None:
        """path: the file of the vectors; or ``vectors`` [2, d] themselves, appropriate first. model: the CLIP they were learned on."""
        self._file, self._sha256 = "injected", ""
        if vectors is None:
            found = locate("q16-prompts", path=path)
            self._file, self._sha256, vectors = found.name, file_sha256(found), prompt_vectors(found)
        self._clip, self._device = load_clip(model, pretrained), torch.device(device)
        _ = self._clip.parts  # what is missing is said now, not at the first image
        self._vectors = normalize(vectors.float(), dim=-1).to(self._device)

    def identity(self) -> Identity:
        settings = {"clip": self._clip.identity(), "scale": SCALE}
        licence = WEIGHTS["q16-prompts"].licence
        return Identity(self.name, "prompts", self._file, self._sha256, self.labels, licence, settings=settings)

    def detect(self, images: Sequence[Image]) -> list[Detection]:
        """The second share of the softmax of 100 x cosine to both vectors; over .5 is Q16's own call."""
        shares = (SCALE * embed(self._clip, images, self._device) @ self._vectors.T).softmax(-1)
        return [Detection(scores={"inappropriate": round(p, 6)}) for p in shares[:, 1].tolist()]

    @staticmethod
    def missing() -> str:
        """What has to be given first; empty if nothing."""
        try:
            locate("q16-prompts")
        except ErasureError:
            return f"{WEIGHTS['q16-prompts'].file} ({WEIGHTS['q16-prompts'].source})"
        return ""


@torch.inference_mode()
def embed(clip: Clip, images: Sequence[Image], device: torch.device) -> Tensor:
    """Unit embeddings [n, d] of images of any sizes, each through the model's own transform."""
    batch = torch.stack([clip.parts.preprocess(image.convert("RGB")) for image in images])
    return normalize(clip.parts.model.to(device).encode_image(batch.to(device)).float(), dim=-1)


def prompt_vectors(path: Path) -> Tensor:
    """The array [2, d] of Q16's file. It is a pickle; its bytes are read out of it, and nothing in it is ever run."""
    try:
        found = [(op.name, arg) for op, arg, _ in pickletools.genops(path.read_bytes())]
    except Exception as error:
        raise ErasureError(f"{path} is no pickled array of prompt vectors: {error}") from error
    called = {arg for name, arg in found if name in ("GLOBAL", "STACK_GLOBAL", "INST")}
    arrays = [arg for name, arg in found if name == "BINBYTES" and isinstance(arg, bytes)]
    kinds = [arg for _, arg in found if isinstance(arg, str) and arg in ("f2", "f4", "f8")]
    if not called or not called <= ARRAY or len(arrays) != 1 or len(kinds) != 1 or len(arrays[0]) % (2 * int(kinds[0][1])):
        raise ErasureError(f"{path} is no pickle of one numpy array of two vectors, which Q16's prompts.p is")
    return torch.from_numpy(np.frombuffer(arrays[0], dtype=f"<{kinds[0]}").astype(np.float32)).reshape(2, -1)
