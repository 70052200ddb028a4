"""Models of human preference, which are no part of the eval extra's weights: PickScore and ImageReward."""

from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from erasure.errors import ErasureError

from ..rows import Row
from ..weights import file_sha256, locate
from .base import SampleMetric
from .extraction import state_sha256


class PickScore(SampleMetric):
    """PickScore (Kirstain et al., NeurIPS 2023): the temperature times the cosine of a CLIP tuned on human choices.

    Fields of an image: ``pick_score``, and ``truncated``, 1 where the prompt is over the 77 tokens that are read. model, processor:
    ids of the hub or local folders in transformers' format; by default the authors' model (MIT) and the processor that it was
    tuned with. A folder that holds both needs no processor.
    """

    name = "pick_score"
    higher_is_better = True
    fields = ("pick_score", "truncated")
    needs = frozenset({"prompts"})
    model_id: ClassVar[str] = "yuvalkirstain/PickScore_v1"
    processor_id: ClassVar[str] = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def __init__(self, model: str | Path = model_id, processor: str | Path | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model = str(model)
        self.processor = str(processor) if processor is not None else self.processor_id if self.model == self.model_id else self.model

    @cached_property
    def parts(self) -> tuple[Any, Any]:
        """transformers' model and processor."""
        from transformers import AutoModel, AutoProcessor

        try:
            net = AutoModel.from_pretrained(self.model, use_safetensors=True)
            return net.eval().requires_grad_(False), AutoProcessor.from_pretrained(self.processor)
        except (OSError, ValueError) as error:
            raise ErasureError(
                f"PickScore does not load: {error}. File: model.safetensors of {self.model} (hub or folder), and the processor of "
                f"{self.processor}; SHA-256: not published, recorded with the result; licence of the authors' model: MIT. "
                "Give model= and processor= as folders where there is no network"
            ) from error

    def measure(self, images: Tensor, rows: Sequence[Row], base: Tensor | None) -> Tensor:
        net, processor = self.parts
        prompts = [row.prompt for row in rows]
        length = net.config.text_config.max_position_embeddings
        whole = processor.tokenizer(prompts)["input_ids"]
        texts = processor.tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        pictures = processor.image_processor(images=_pictures(images), return_tensors="pt")
        inputs = {key: value.to(images.device) for key, value in {**texts, **pictures}.items()}
        scores = net.to(images.device)(**inputs).logits_per_image.diagonal()
        cut = torch.tensor([len(ids) > length for ids in whole], device=images.device)
        return torch.stack([scores.float(), cut.float()], dim=1)

    def identity(self) -> dict[str, Any]:
        backend = f"transformers {version('transformers')}"
        return {
            "name": self.name,
            "model": self.model,
            "processor": self.processor,
            "sha256": state_sha256(self.parts[0]),
            "backend": backend,
        }


class ImageReward(SampleMetric):
    """ImageReward (Xu et al., NeurIPS 2023) by its own package; reads the first 35 tokens of a prompt.

    weights: ImageReward.pt, or a folder with it and med_config.json; else where ``weights.locate`` looks. net: anything with the
    package's ``score(prompt, picture) -> float`` in place of that.
    """

    name = "image_reward"
    higher_is_better = True
    fields = ("image_reward",)
    needs = frozenset({"prompts"})

    def __init__(self, weights: str | Path | None = None, *, net: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.weights, self.given = weights, net

    @cached_property
    def _file(self) -> Path:
        return locate("ImageReward-v1.0", path=self.weights)

    @cached_property
    def net(self) -> Any:
        """The package's model."""
        if self.given is not None:
            return self.given
        try:
            import ImageReward as package
        except ImportError as error:
            raise ErasureError(f"ImageReward needs its package, and what that needs: pip install image-reward ({error})") from error
        beside = self._file.parent / "med_config.json"
        config = locate("ImageReward-config", path=beside if beside.is_file() else None)
        return package.load(str(self._file), device=str(self.device), med_config=str(config))

    def measure(self, images: Tensor, rows: Sequence[Row], base: Tensor | None) -> Tensor:
        pictures = _pictures(images)
        return torch.tensor([[float(self.net.score(row.prompt, image))] for row, image in zip(rows, pictures, strict=True)])

    def identity(self) -> dict[str, Any]:
        if self.given is not None:
            sha256 = state_sha256(self.given) if isinstance(self.given, nn.Module) else None
            return {"name": self.name, "model": type(self.given).__name__, "sha256": sha256}
        return {
            "name": self.name,
            "model": "ImageReward-v1.0",
            "sha256": file_sha256(self._file),
            "backend": f"image-reward {version('image-reward')}",
        }


def _pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images.cpu()]
