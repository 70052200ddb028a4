"""Names in what is exported are those of the original checkpoints, and of transformers 4 as well as 5."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint, convert_open_clip_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from erasure.errors import ErasureError
from erasure.export import export, lora, original
from erasure.export.full import file_key, plain_tokenizer, prefix_encoder
from tests import tiny
from tests.export.common import LowRank, save

KEYS = json.loads((Path(__file__).parents[1] / "data/clip_text_keys.json").read_text())

# names of the original checkpoints, at full size

SD15: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
XL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SAMPLES = {
    "sd15": {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
        "down_blocks.3.resnets.1.conv2.weight": "input_blocks.11.0.out_layers.3.weight",
        "down_blocks.1.resnets.0.conv_shortcut.weight": "input_blocks.4.0.skip_connection.weight",
        "mid_block.resnets.1.time_emb_proj.weight": "middle_block.2.emb_layers.1.weight",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
        "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
        "up_blocks.3.attentions.2.proj_out.weight": "output_blocks.11.1.proj_out.weight",
    },
    "sdxl": {
        "add_embedding.linear_2.weight": "label_emb.0.2.weight",
        "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_v.weight": "input_blocks.8.1.transformer_blocks.9.attn2.to_v.weight",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.2.conv.weight",
        "up_blocks.2.resnets.2.norm1.weight": "output_blocks.8.0.in_layers.0.weight",
    },
}


@pytest.mark.parametrize(("size", "config", "count"), [("sd15", SD15, 686), ("sdxl", XL, 1680)])
def test_the_names_of_a_full_unet_are_those_of_the_releases(size: str, config: dict[str, Any], count: int) -> None:
    with init_empty_weights():
        unet = UNet2DConditionModel(**config)
    named = original._renamed(unet, dict(original.unet_layers(unet)), original.UNET)
    assert len(named) == len(unet.state_dict()) == count
    back = convert_ldm_unet_checkpoint(dict(named), unet.config)
    ours = unet.state_dict(keep_vars=True)
    assert back.keys() == ours.keys() and all(back[key].shape == ours[key].shape for key in ours)
    for key, name in SAMPLES[size].items():
        assert back[key] is named[f"{original.UNET}{name}"], key


def test_a_lora_of_a_full_sdxl_has_the_names_of_the_release() -> None:
    """A1111 looks a layer up by its name in the checkpoint where its table of diffusers' names has none, or a wrong one."""
    with init_empty_weights():
        unet = UNet2DConditionModel(**XL)
    layers = [name for name, layer in unet.named_modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]
    named = {
        name: lora._original(unet, f"unet.{name}.lora_A.weight").removeprefix("unet.").removesuffix("lora_A.weight") for name in layers
    }
    theirs = original._renamed(unet, dict(original.unet_layers(unet)), "")
    assert len(set(named.values())) == len(layers) == 794 and all(f"{name}weight" in theirs for name in named.values())
    assert all(f"{named[key.removesuffix('.weight')]}weight" == name for key, name in SAMPLES["sdxl"].items() if "norm" not in key)
    with pytest.raises(ErasureError, match=r"know no layer of unet\.adapter\.lora_A\.weight"):
        lora._original(unet, "unet.adapter.lora_A.weight")


def test_the_names_of_a_full_vae_are_those_of_the_releases() -> None:
    with init_empty_weights():
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    named = original._vae(vae)
    assert len(named) == 248
    assert named["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    assert named["first_stage_model.decoder.up.1.block.0.nin_shortcut.weight"].shape == (256, 512, 1, 1)
    back = convert_ldm_vae_checkpoint(dict(named), vae.config)
    ours = vae.state_dict()
    assert back.keys() == ours.keys() and all(back[key].shape == ours[key].shape for key in ours)


def test_the_second_encoder_of_sdxl_is_open_clips() -> None:
    config = CLIPTextConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, projection_dim=6, vocab_size=20
    )
    encoder = CLIPTextModelWithProjection(config)
    named = original.open_clip(encoder.state_dict(), "x.")
    assert named["x.text_projection"].shape == (8, 6) and named["x.transformer.resblocks.1.attn.in_proj_weight"].shape == (24, 8)
    assert {
        "x.positional_embedding",
        "x.token_embedding.weight",
        "x.ln_final.bias",
        "x.transformer.resblocks.0.mlp.c_proj.bias",
    } < named.keys()
    back, ours = convert_open_clip_checkpoint(encoder, dict(named), prefix="x."), encoder.state_dict()
    assert back.keys() == ours.keys() and all(torch.equal(back[key], ours[key]) for key in ours)


def test_a_weight_without_an_original_name_is_refused() -> None:
    pipe = tiny.sd1()
    pipe.unet.add_module("extra", torch.nn.Linear(1, 1))
    with pytest.raises(ErasureError, match=r"extra\.weight that the original checkpoints have no name for"):
        original.checkpoint(pipe, "sd1", torch.float16)


# text encoders in transformers 4 and 5


@pytest.mark.parametrize("cls", [CLIPTextModel, CLIPTextModelWithProjection])
def test_text_encoders_are_written_with_the_frozen_keys(cls: Any, tmp_path: Path) -> None:
    encoder = cls(CLIPTextConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=20))
    encoder.save_pretrained(tmp_path)
    prefix_encoder(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == KEYS[cls.__name__]
    again = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not again[1]["missing_keys"] and not again[1]["unexpected_keys"]
    assert all(torch.equal(t, encoder.state_dict()[key]) for key, t in again[0].state_dict().items())
    assert all(file_key(key) == key for key in KEYS[cls.__name__])


def test_a_full_export_has_the_frozen_keys_and_transformers_4s_tokenizer(tmp_path: Path) -> None:
    pipe = tiny.sdxl()
    folder, _ = save(LowRank(encoder=True), pipe, tmp_path / "artefact")
    export(folder, pipe, tmp_path / "out", "full")
    for part, cls in (("text_encoder", "CLIPTextModel"), ("text_encoder_2", "CLIPTextModelWithProjection")):
        assert sorted(load_file(tmp_path / f"out/{part}/model.safetensors")) == KEYS[cls]
    vocabulary = json.loads((tmp_path / "out/tokenizer/vocab.json").read_text())
    merges = (tmp_path / "out/tokenizer/merges.txt").read_text().splitlines()
    assert vocabulary == pipe.tokenizer.get_vocab() and merges[0].startswith("#version") and "d a" in merges
    (tmp_path / "out/tokenizer/vocab.json").write_text("kept")
    plain_tokenizer(tmp_path / "out/tokenizer")
    assert (tmp_path / "out/tokenizer/vocab.json").read_text() == "kept"
