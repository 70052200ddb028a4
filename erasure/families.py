"""One table with every difference between pipeline families that methods and seams may read."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from .errors import UnsupportedFamily


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a pipeline of this family looks like inside."""

    name: str
    pipelines: tuple[str, ...]
    """Class names of the pipelines."""
    denoisers: tuple[str, ...]
    """Component names of the denoisers."""
    encoders: tuple[tuple[str, str], ...]
    """Component names (text encoder, tokenizer), in the order of their tokens in the context."""
    encode_returns: tuple[str, ...]
    """Names of what ``encode_prompt`` returns, in order."""
    context: str = "encoder_hidden_states"
    """The denoiser's keyword for prompt embeddings."""
    cfg: Literal["batch", "sequential", "embedded"] = "batch"
    """How guidance runs: one batch [negative, positive], two calls, or a distilled scale."""

    def cross_attention(self, pipe: Any) -> Iterator[tuple[str, nn.Linear]]:
        """Names (with the component) and layers that read keys and values from the prompt."""
        for component in self.denoisers:
            for name, module in getattr(pipe, component).named_modules():
                if name.endswith(("attn2.to_k", "attn2.to_v")):
                    yield f"{component}.{name}", module

    def up_blocks(self, pipe: Any) -> Iterator[tuple[nn.Module, int]]:
        """The UNet's up-path residual layers that read a skip connection, with the number of channels that are not the skip's."""
        for component in self.denoisers:
            unet = getattr(pipe, component)
            channels = unet.config.block_out_channels
            hidden = channels[-1]
            for block, width in zip(unet.up_blocks, reversed(channels), strict=True):
                for resnet in block.resnets:
                    yield resnet, hidden
                    hidden = width


TABLE = (
    Family(
        name="sd1",
        pipelines=("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
        denoisers=("unet",),
        encoders=(("text_encoder", "tokenizer"),),
        encode_returns=("embeds", "negative_embeds"),
    ),
)


def family_of(pipe: Any) -> Family:
    """The row of a pipeline, by the name of its class or of a class that it extends."""
    names = [cls.__name__ for cls in type(pipe).__mro__]
    for family in TABLE:
        if any(name in family.pipelines for name in names):
            return family
    known = ", ".join(name for family in TABLE for name in family.pipelines)
    raise UnsupportedFamily(f"{type(pipe).__name__} is of no family that this version knows ({known})")
