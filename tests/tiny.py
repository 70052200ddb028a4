"""Tiny random pipelines of every family, built from configuration in a fraction of a second: no downloads, no trained weights."""

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = "a an the of in on with and painting photo dagger knife cat dog gogh van style big red night sky boat".split()
START, END = "<|startoftext|>", "<|endoftext|>"
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""That of SD 1.x."""
TEXT_WIDTH = 32
TOKENS = 77


def tokenizer(length: int = TOKENS) -> CLIPTokenizer:
    """A CLIP tokenizer over ASCII with whole-word tokens for WORDS; id 0 is "!", the end token has the highest id, as in CLIP's own."""
    letters = [chr(code) for code in range(33, 127)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if pair not in merges:
                merges.append(pair)
            pieces[:2] = ["".join(pair)]
    tokens = dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), START, END])
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length, bos_token=START, eos_token=END, unk_token=END, pad_token=END)


def sd1(seed: int = 0, *, tokens: int = TOKENS) -> Any:
    """A random StableDiffusionPipeline, the same for equal seeds: latents [4, 8, 8], images 16 x 16, text width 32.

    As in SD 1.x the two deepest levels share a width; text matters more than in a freshly initialised UNet, so that edits show.
    """
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        words = tokenizer(tokens)
        pipe = StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=_text_encoder(words),
            tokenizer=words,
            unet=_unet(),
            scheduler=DDIMScheduler(**SCHEDULE),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    finally:
        torch.random.set_rng_state(state)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _text_encoder(words: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=TEXT_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=words.model_max_length,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        initializer_factor=8.0,
    )
    return CLIPTextModel(config).eval()


def _unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
    ).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith(("attn2.to_v.weight", "attn2.to_out.0.weight")):
                parameter.mul_(3)
    return unet


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    ).eval()


def latents(pipe: Any, prompt: str | list[str], *, seed: int | list[int] = 0, steps: int = 4, **options: Any) -> Tensor:
    """Latents [n, 4, 8, 8] of a short run; a list of seeds gives each image its own generator."""
    generators = [torch.Generator().manual_seed(s) for s in seed] if isinstance(seed, list) else torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": steps, "generator": generators, "output_type": "latent"} | options
    return torch.as_tensor(pipe(prompt, **options).images)
