"""Names of the original Stable Diffusion checkpoints: those of the LDM code for UNet and VAE, of transformers and open_clip for text."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ErasureError
from .full import file_key

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP = {"sd1": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}
"""Prefix of a text encoder by OpenAI, which keeps transformers' names."""
OPEN_CLIP = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}
"""Prefix of a text encoder by open_clip."""
UNET_LAYERS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
TEXT = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final",
}
TEXT_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def checkpoint(pipe: Any, family: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights of an SD 1, SD 2 or SDXL pipeline by their original names. A weight that has none raises."""
    parts = [_renamed(pipe.unet, dict(unet_layers(pipe.unet)), UNET), _vae(pipe.vae)]
    encoders = [pipe.text_encoder, getattr(pipe, "text_encoder_2", None)]
    if family in CLIP:
        parts.append({CLIP[family] + file_key(key): tensor for key, tensor in encoders.pop(0).state_dict().items()})
    if family in OPEN_CLIP:
        parts.append(open_clip(encoders.pop(0).state_dict(), OPEN_CLIP[family]))
    merged = {key: tensor for part in parts for key, tensor in part.items()}
    return {key: tensor.detach().to("cpu", dtype).contiguous().clone() for key, tensor in merged.items()}


def unet_layers(unet: Any) -> Iterator[tuple[str, str]]:
    """Diffusers' and the original name of every layer or block of a UNet: the original one numbers its blocks through."""
    yield from UNET_LAYERS.items()
    n = 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0"
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{n}.1"
            n += 1
        if block.downsamplers:
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{n}.0.op"
            n += 1
    n = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0"
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{n}.1"
            n += 1
        yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{n - 1}.{2 if hasattr(block, 'attentions') else 1}.conv"


def vae_layers(vae: Any) -> Iterator[tuple[str, str]]:
    """The same for a VAE, whose decoder the original one numbers from the output."""
    for side in ("encoder", "decoder"):
        for layer, theirs in (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")):
            yield f"{side}.{layer}", f"{side}.{theirs}"
        for j in (0, 1):
            yield f"{side}.mid_block.resnets.{j}", f"{side}.mid.block_{j + 1}"
        yield f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1"
    for i, block in enumerate(vae.encoder.down_blocks):
        for j in range(len(block.resnets)):
            yield f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}"
        yield f"encoder.down_blocks.{i}.downsamplers.0.conv", f"encoder.down.{i}.downsample.conv"
    for i, block in enumerate(vae.decoder.up_blocks):
        n = len(vae.decoder.up_blocks) - 1 - i
        for j in range(len(block.resnets)):
            yield f"decoder.up_blocks.{i}.resnets.{j}", f"decoder.up.{n}.block.{j}"
        yield f"decoder.up_blocks.{i}.upsamplers.0.conv", f"decoder.up.{n}.upsample.conv"
    yield from (("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv"))


def _vae(vae: Any) -> dict[str, Tensor]:
    def inner(block: str, rest: str) -> str:
        return _replaced(rest, {"conv_shortcut": "nin_shortcut"} if "resnets" in block else VAE_ATTENTION)

    named = _renamed(vae, dict(vae_layers(vae)), VAE, inner)
    convolutions = tuple(f"mid.attn_1.{layer}.weight" for layer in ("q", "k", "v", "proj_out"))  # of size 1 x 1 in the original
    return {key: tensor[..., None, None] if key.endswith(convolutions) and tensor.ndim == 2 else tensor for key, tensor in named.items()}


def _unet_inner(block: str, rest: str) -> str:
    return _replaced(rest, UNET_RESNET) if "resnets" in block else rest


def _renamed(module: Any, layers: Mapping[str, str], prefix: str, inner: Callable[[str, str], str] = _unet_inner) -> dict[str, Tensor]:
    """A module's tensors, with layers or blocks renamed by ``layers`` and what is in a block by ``inner``."""
    named = {}
    for key, tensor in module.state_dict().items():
        pieces = key.split(".")
        block = next((name for n in range(len(pieces), 0, -1) if (name := ".".join(pieces[:n])) in layers), None)
        if block is None:
            raise ErasureError(
                f"{type(module).__name__} has a weight {key} that the original checkpoints have no name for; use --format full"
            )
        named[f"{prefix}{layers[block]}.{inner(block, key[len(block) + 1 :])}"] = tensor
    return named


def open_clip(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A CLIP text encoder's tensors by open_clip's names: queries, keys and values in one matrix, the projection transposed."""
    named: dict[str, Tensor] = {}
    for key, tensor in state.items():
        bare = key.removeprefix("text_model.")
        if bare == "text_projection.weight":
            named[f"{prefix}text_projection"] = tensor.T
        elif not bare.startswith("encoder.layers."):
            named[prefix + _replaced(bare, TEXT)] = tensor
        else:
            _, _, n, rest = bare.split(".", 3)
            block = f"{prefix}transformer.resblocks.{n}."
            if rest.startswith("self_attn.q_proj"):
                sort = rest.rpartition(".")[2]
                stem = key.removesuffix(f"q_proj.{sort}")
                named[f"{block}attn.in_proj_{sort}"] = torch.cat([state[f"{stem}{each}_proj.{sort}"] for each in "qkv"])
            elif not rest.startswith(("self_attn.k_proj", "self_attn.v_proj")):
                named[block + _replaced(rest, TEXT_LAYER)] = tensor
    return named


def _replaced(name: str, layers: Mapping[str, str]) -> str:
    """The name with its beginning replaced by that of the other side."""
    found = next((ours for ours in layers if name == ours or name.startswith(f"{ours}.")), None)
    return name if found is None else layers[found] + name[len(found) :]
