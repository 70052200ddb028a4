"""CLIP models of open_clip: by name, from a file or folder, or given; loaded at first use, shared by the metrics that use them."""

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from erasure.errors import ErasureError

from .extraction import Extractor, state_sha256


class Parts(NamedTuple):
    """What open_clip makes: a model, its tokenizer (texts, context_length=) -> [n, length], and its transform of one Pillow image."""

    model: Any
    tokenizer: Callable[..., Tensor]
    preprocess: Callable[[Image.Image], Tensor]


class Clip:
    """A contrastive model; images and texts to embeddings [n, dim] of length one."""

    def __init__(self, name: str, make: Callable[[], Parts]) -> None:
        self.name, self._make = name, make

    @cached_property
    def parts(self) -> Parts:
        made = self._make()
        made.model.eval().requires_grad_(False)
        return made

    @cached_property
    def sha256(self) -> str:
        return state_sha256(self.parts.model)

    @cached_property
    def extractor(self) -> Extractor:
        """The image tower, for distances; of uint8 images [n, 3, h, w]."""
        return Extractor(f"clip {self.name}", lambda: int(self.images(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape[1]), self._tower)

    def identity(self) -> dict[str, Any]:
        return {"model": self.name, "sha256": self.sha256, "backend": _backend()}

    @torch.inference_mode()
    def images(self, images: Tensor) -> Tensor:
        """Embeddings of uint8 images, each through the model's own transform: resized and cropped by Pillow."""
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images.cpu()]
        inputs = torch.stack([self.parts.preprocess(picture) for picture in pictures])
        return nn.functional.normalize(self._on(images.device).encode_image(inputs.to(images.device)).float(), dim=1)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """Embeddings of texts; tokens over the model's context are cut off, see ``cut``."""
        tokens = self.parts.tokenizer(list(texts), context_length=self.context)
        return nn.functional.normalize(self._on(device).encode_text(tokens.to(device)).float(), dim=1)

    def cut(self, texts: Sequence[str]) -> list[bool]:
        """Which texts are longer than the model reads: with room for one more token, they tokenize differently."""
        read, roomy = (self.parts.tokenizer(list(texts), context_length=self.context + more) for more in (0, 1))
        return (read != roomy[:, : self.context]).any(1).tolist()

    @property
    def context(self) -> int:
        """Tokens that the text tower reads, start and end included."""
        return int(self.parts.model.context_length)

    def _on(self, device: torch.device) -> Any:
        return self.parts.model.to(device)

    def _tower(self) -> tuple[Callable[[Tensor], Tensor], str]:
        return self.images, self.sha256


def load(model: str | tuple[Any, Any, Any] | Clip, pretrained: str | None = None) -> Clip:
    """A CLIP by open_clip's model name and tag ("ViT-B-32", "openai"); nothing is loaded before its first use.

    pretrained: a tag of open_clip, or a file of weights. model "local-dir:FOLDER" or "hf-hub:OWNER/NAME" needs none, and a
    (model, tokenizer, preprocess) of open_clip's kind is taken as it is. Equal arguments give the same object.
    """
    if isinstance(model, Clip):
        return model
    if isinstance(model, str):
        return _named(model, pretrained)
    return Clip(f"given {type(model[0]).__name__}", lambda: Parts(*model))


@cache
def _named(model: str, pretrained: str | None) -> Clip:
    return Clip(f"{model}/{pretrained}" if pretrained else model, lambda: _open(model, pretrained))


def _open(model: str, pretrained: str | None) -> Parts:
    try:
        import open_clip
    except ImportError as error:
        raise ErasureError("CLIP models need open_clip: pip install 'erasure-suite[eval]'") from error
    if pretrained is None and ":" not in model:
        raise ErasureError(f"CLIP {model} without pretrained= would have random weights: {_choices(open_clip, model)}")
    known = open_clip.get_pretrained_cfg(model, pretrained) if pretrained and ":" not in model else {}
    try:
        # open_clip only warns where the activation that a tag was trained with differs from the model's own; scores would be off.
        net, _, preprocess = open_clip.create_model_and_transforms(
            model, pretrained=pretrained, force_quick_gelu=bool(known.get("quick_gelu")), require_pretrained=True
        )
        return Parts(net, open_clip.get_tokenizer(model), preprocess)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise ErasureError(f"CLIP {model}/{pretrained} does not load: {error}. {_origin(known)}; {_choices(open_clip, model)}") from error


def _origin(known: dict[str, Any]) -> str:
    """Where a tag's weights come from, and what is known of their bytes."""
    hub, url = str(known.get("hf_hub") or "").strip("/"), str(known.get("url") or "")
    if not (hub or url):
        return "The name is no tag of open_clip, and no file"
    digest = url.split("/")[-2] if "openaipublic" in url else None  # OpenAI's URLs hold the SHA-256 of the file behind them
    sources = ([f"open_clip_model.safetensors of the hub's {hub}"] if hub else []) + ([url] if url else [])
    return f"File: {' or '.join(sources)}; SHA-256: {f'{digest} (the second)' if digest and hub else digest or 'not published'}"


def _choices(open_clip: Any, model: str) -> str:
    tags = open_clip.list_pretrained_tags_by_model(model) if ":" not in model else []
    return f"give a file's path as pretrained=, or a folder as model='local-dir:FOLDER'; tags of {model}: {', '.join(tags) or 'none'}"


def _backend() -> str:
    try:
        return f"open_clip {version('open-clip-torch')}"
    except PackageNotFoundError:
        return "given"
