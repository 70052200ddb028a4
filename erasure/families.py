"""One table with every difference between pipeline families that methods and seams may read."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from .errors import UnsupportedFamily


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A text encoder, and where what it says goes."""

    component: str = "text_encoder"
    tokenizer: str = "tokenizer"
    prompt: str = "prompt"
    """The argument of ``encode_prompt`` that it reads; where that is None, it reads ``prompt``."""
    kind: Literal["clip", "t5"] = "clip"
    """clip: causal, BOS and EOS around the words, pooled at the EOS. t5: bidirectional, EOS alone, no pooled vector."""
    layer: int = -1
    """Index into ``hidden_states`` of the token states; -1 stands for ``last_hidden_state``, which is normed."""
    place: Literal["tokens", "channels", "none"] = "tokens"
    """Its tokens in the context: after the former encoder's, beside them in further channels, or nowhere."""
    pooled: Literal["pooler_output", "text_embeds", ""] = ""
    """Its output that goes into the pooled vector, after the former encoder's."""
    length: int | None = None
    """Tokens that the pipeline asks for where a call says nothing else; None for the tokenizer's own length."""

    def slots(self, pipe: Any) -> int:
        """Tokens to ask of it: what the pipeline asks for, unless its tokenizer was made for fewer."""
        own = int(getattr(pipe, self.tokenizer).model_max_length)
        return min(self.length or own, own)


Unit = Literal["heads", "neurons", "norms"]


@dataclass(frozen=True, kw_only=True)
class Gated:
    """Units of a transformer block that can be switched off one by one, and the layers where that is done."""

    kind: Unit
    """heads and neurons: inputs of a linear layer. norms: outputs of a norm, or of the linear layer that modulates one."""
    layers: tuple[str, ...]
    """Names inside the block; a block without the first has no such units, and the others follow the same gates."""
    attention: str = ""
    """Of heads: their attention. Of neurons that share a layer's input with heads, which come first: that of those."""
    blocks: str = "transformer_blocks"
    """Name of the list of blocks."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a pipeline of this family looks like inside."""

    name: str
    pipelines: tuple[str, ...]
    """Class names of the pipelines."""
    mark: tuple[str, str, Any] | None = None
    """Component, key and value of a configuration that tells this family from a later row with the same pipelines."""
    denoisers: tuple[str, ...] = ("transformer",)
    """Component names of the denoisers; those that a pipeline has not (Wan 2.1's second) are left out."""
    inputs: tuple[str, ...]
    """Names of the denoiser's first positional arguments: latents first."""
    encoders: tuple[Encoder, ...]
    """In the order of their tokens in the context."""
    returns: tuple[str, ...]
    """What ``encode_prompt`` returns, in order."""
    context: str = "encoder_hidden_states"
    """The denoiser's keyword for prompt embeddings."""
    pooled: tuple[str, ...] = ()
    """Path of keywords to the pooled vector in the denoiser's inputs."""
    unbatched: tuple[str, ...] = ()
    """Inputs of the denoiser whose first axis is not the batch."""
    cfg: Literal["batch", "sequential"] = "batch"
    """How guidance runs: one batch [negative, positive], or a call for each inside ``cache_context("cond" | "uncond")``."""
    scale: str = "guidance_scale"
    """The pipeline's argument for classifier-free guidance."""
    text_layers: tuple[tuple[str, Literal["context", "pooled"]], ...]
    """Endings of the names of the linear layers that read the prompt first, and what each reads."""
    cross: tuple[str, ...] = ("attn2",)
    """Parts of dotted names: the layers of attention that are there for the text alone."""
    cross_kv: tuple[str, ...] = ("attn2.to_k", "attn2.to_v")
    """Of these, keys and values of the text."""
    self_attention: tuple[str, ...] = ("attn1",)
    """Parts of dotted names: attention of the image, or of image and text together, without the text's own layers."""
    ends: tuple[str, ...] = ("time_embedding", "add_embedding", "conv_norm_out", "conv_out")
    """Beginnings of names: embedding of the timestep, and output."""
    gates: tuple[Gated, ...] = ()
    """What masks can switch off in the denoiser."""

    def parts(self, pipe: Any) -> Iterator[tuple[str, Any]]:
        """Name and module of each denoiser that the pipeline has."""
        for name in self.denoisers:
            if (module := getattr(pipe, name, None)) is not None:
                yield name, module

    def text_linears(self, pipe: Any) -> Iterator[tuple[str, nn.Module, Literal["context", "pooled"]]]:
        """Names (with the component) and layers that read the prompt, and which part of it: what closed forms edit."""
        for component, denoiser in self.parts(pipe):
            for name, module in denoiser.named_modules():
                for ending, reads in self.text_layers:
                    if name == ending or name.endswith(f".{ending}"):
                        yield f"{component}.{name}", module, reads

    def up_blocks(self, pipe: Any) -> Iterator[tuple[nn.Module, int]]:
        """A UNet's up-path residual layers that read a skip connection, with the number of channels that are not the skip's."""
        for _, unet in self.parts(pipe):
            if not hasattr(unet, "up_blocks"):
                continue
            channels = unet.config.block_out_channels
            hidden = channels[-1]
            for block, width in zip(unet.up_blocks, reversed(channels), strict=True):
                for resnet in block.resnets:
                    yield resnet, hidden
                    hidden = width


BOTH = ("embeds", "negative_embeds")
POOLED = (*BOTH, "pooled", "negative_pooled")
UNET = ("sample", "timestep", "encoder_hidden_states")
CROSS_ATTENTION: tuple[tuple[str, Literal["context", "pooled"]], ...] = (("attn2.to_k", "context"), ("attn2.to_v", "context"))
EMBEDDERS: tuple[tuple[str, Literal["context", "pooled"]], ...] = (
    ("context_embedder", "context"),
    ("time_text_embed.text_embedder.linear_1", "pooled"),
)

UNET_GATES = (
    Gated(kind="heads", layers=("attn1.to_out.0",), attention="attn1"),
    Gated(kind="heads", layers=("attn2.to_out.0",), attention="attn2"),
    Gated(kind="neurons", layers=("ff.net.2",)),
    *(Gated(kind="norms", layers=(name,)) for name in ("norm1", "norm2", "norm3")),
)
JOINT_GATES = (
    Gated(kind="heads", layers=("attn.to_out.0", "attn.to_add_out"), attention="attn"),
    Gated(kind="heads", layers=("attn2.to_out.0",), attention="attn2"),
    Gated(kind="neurons", layers=("ff.net.2",)),
    Gated(kind="neurons", layers=("ff_context.net.2",)),
    Gated(kind="norms", layers=("norm1.linear",)),
    Gated(kind="norms", layers=("norm1_context.linear",)),
)
SINGLE_GATES = (
    Gated(kind="heads", layers=("proj_out",), attention="attn", blocks="single_transformer_blocks"),
    Gated(kind="neurons", layers=("proj_out",), attention="attn", blocks="single_transformer_blocks"),
    Gated(kind="norms", layers=("norm.linear",), blocks="single_transformer_blocks"),
)

JOINT: dict[str, Any] = {
    "cross": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    "cross_kv": ("attn.add_k_proj", "attn.add_v_proj"),
    "self_attention": ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out"),
    "ends": ("time_text_embed", "norm_out", "proj_out"),
}
"""Where text and image attend together."""


def _with_variants(name: str, *variants: str) -> tuple[str, ...]:
    return tuple(f"{name}{variant}Pipeline" for variant in ("", *variants))


SD1 = Family(
    name="sd1",
    pipelines=_with_variants("StableDiffusion", "Img2Img", "Inpaint", "ControlNet"),
    denoisers=("unet",),
    inputs=UNET,
    encoders=(Encoder(),),
    returns=BOTH,
    text_layers=CROSS_ATTENTION,
    gates=UNET_GATES,
)

TABLE = (
    replace(SD1, name="sd2", mark=("unet", "use_linear_projection", True)),
    SD1,
    Family(
        name="sdxl",
        pipelines=_with_variants("StableDiffusionXL", "Img2Img", "Inpaint", "ControlNet"),
        denoisers=("unet",),
        inputs=UNET,
        encoders=(
            Encoder(layer=-2),
            Encoder(
                component="text_encoder_2", tokenizer="tokenizer_2", prompt="prompt_2", layer=-2, place="channels", pooled="text_embeds"
            ),
        ),
        returns=POOLED,
        pooled=("added_cond_kwargs", "text_embeds"),
        text_layers=CROSS_ATTENTION,
        gates=UNET_GATES,
    ),
    Family(
        name="sd3",
        pipelines=_with_variants("StableDiffusion3", "Img2Img", "Inpaint", "ControlNet"),
        inputs=("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"),
        encoders=(
            Encoder(layer=-2, pooled="text_embeds"),
            Encoder(
                component="text_encoder_2", tokenizer="tokenizer_2", prompt="prompt_2", layer=-2, place="channels", pooled="text_embeds"
            ),
            Encoder(component="text_encoder_3", tokenizer="tokenizer_3", prompt="prompt_3", kind="t5", length=256),
        ),
        returns=POOLED,
        pooled=("pooled_projections",),
        text_layers=EMBEDDERS,
        gates=JOINT_GATES,
        **JOINT,
    ),
    Family(
        name="flux",
        pipelines=_with_variants("Flux", "Img2Img", "Inpaint"),
        inputs=("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids", "guidance"),
        encoders=(
            Encoder(place="none", pooled="pooler_output"),
            Encoder(component="text_encoder_2", tokenizer="tokenizer_2", prompt="prompt_2", kind="t5", length=512),
        ),
        returns=("embeds", "pooled", "text_ids"),
        pooled=("pooled_projections",),
        unbatched=("img_ids", "txt_ids"),
        cfg="sequential",
        scale="true_cfg_scale",
        text_layers=EMBEDDERS,
        gates=(*JOINT_GATES, *SINGLE_GATES),
        **JOINT,
    ),
    Family(
        name="wan",
        pipelines=("WanPipeline",),
        denoisers=("transformer", "transformer_2"),
        inputs=("hidden_states", "timestep", "encoder_hidden_states"),
        encoders=(Encoder(kind="t5", length=512),),
        returns=BOTH,
        cfg="sequential",
        text_layers=(("condition_embedder.text_embedder.linear_1", "context"),),
        ends=("condition_embedder.time_embedder", "norm_out", "proj_out"),
    ),
)
NAMES = tuple(family.name for family in TABLE)


def row_of(pipe: Any) -> Family | None:
    """The row of a pipeline, by the name of its class or of a class that it extends, and by its mark; None if it has none."""
    names = [cls.__name__ for cls in type(pipe).__mro__]
    return next((family for family in TABLE if any(name in family.pipelines for name in names) and _marked(pipe, family)), None)


def family_of(pipe: Any) -> Family:
    """The row of a pipeline; an unknown one raises UnsupportedFamily."""
    if family := row_of(pipe):
        return family
    known = ", ".join(dict.fromkeys(name for family in TABLE for name in family.pipelines))
    raise UnsupportedFamily(f"{type(pipe).__name__} is of no family that this version knows ({known})")


def call_options(pipe: Any) -> dict[str, Any]:
    """What every call of a pipeline must say: how many tokens T5 reads, where its tokenizer was made for fewer than the pipeline's own."""
    family = row_of(pipe)
    last = family.encoders[-1] if family else None
    if last is None or last.length is None or getattr(pipe, last.component) is None or last.slots(pipe) == last.length:
        return {}
    return {"max_sequence_length": last.slots(pipe)}


def _marked(pipe: Any, family: Family) -> bool:
    if family.mark is None:
        return True
    component, key, value = family.mark
    return bool(getattr(pipe, component).config.get(key) == value)
