"""CLIP score (Hessel et al., EMNLP 2021) by any open_clip model, per image, with truncated prompts counted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erasure.errors import ErasureError

from ..rows import Row
from . import clip
from .base import SampleMetric


class CLIPScore(SampleMetric):
    """Alignment of images with their prompts.

    Fields of an image: ``clip_score`` = 100 · max(cos, 0), the number that papers print; ``cosine``, the plain cosine of the two
    embeddings; ``truncated``, 1 where the prompt is longer than the model reads (77 tokens for most). model, pretrained: see
    ``clip.load``. truncate: True scores long prompts by their beginning, and counts them; False raises ErasureError that names them.
    """

    name = "clip_score"
    higher_is_better = True
    fields = ("clip_score", "cosine", "truncated")
    needs = frozenset({"prompts"})

    def __init__(
        self,
        model: str | tuple[Any, Any, Any] | clip.Clip = "ViT-B-32",
        pretrained: str | Path | None = "openai",
        *,
        truncate: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        named = isinstance(model, str) and ":" not in model
        self.clip = clip.load(model, str(pretrained) if named and pretrained is not None else None)
        self.truncate = truncate

    def measure(self, images: Tensor, rows: Sequence[Row], base: Tensor | None) -> Tensor:
        prompts = [row.prompt for row in rows]
        cut = self.clip.cut(prompts)
        if any(cut) and not self.truncate:
            long = [row.id for row, over in zip(rows, cut, strict=True) if over]
            raise ErasureError(
                f"prompts of the rows {', '.join(long)} are over the {self.clip.context} tokens of {self.clip.name}: "
                "shorten them, or let truncate=True score their beginnings"
            )
        cosine = (self.clip.images(images) * self.clip.texts(prompts, images.device)).sum(1)
        return torch.stack([100 * cosine.clamp(min=0), cosine, torch.tensor(cut, device=cosine.device).float()], dim=1)

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "truncate": self.truncate, **self.clip.identity()}

    def truncated(self) -> int:
        """Images whose prompt was cut."""
        return sum(bool(values["truncated"]) for values in self.samples().values())

    def warnings(self) -> list[str]:
        cut, n = self.truncated(), len(self.samples())
        return [f"{cut} of {n} prompts are over {self.clip.context} tokens and were scored by their beginning"] if cut else []
