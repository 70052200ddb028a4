"""Tiny random pipelines of every family, built from configuration in a fraction of a second: no downloads, no trained weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

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
T5_TOKENS = 48
FACTOR = 2.0
"""Of text encoders that are read before their last norm."""


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


def t5_tokenizer(length: int = T5_TOKENS) -> PreTrainedTokenizerFast:
    """A T5-like tokenizer: whole words or letters, no start token, one end token, id 0 for padding."""
    letters = [chr(code) for code in range(33, 127)]
    vocab = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS, *(x for x in letters if x not in WORDS)])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    known = "|".join(sorted((rf"\b{word}\b" for word in WORDS), key=len, reverse=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(f"{known}|."), behavior="isolated")]
    )
    core.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
        model_input_names=["input_ids", "attention_mask"],
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(state)


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd1(seed: int = 0, *, tokens: int = TOKENS) -> Any:
    """A random StableDiffusionPipeline, the same for equal seeds: latents [4, 8, 8], images 16 x 16, text width 32.

    As in SD 1.x the two deepest levels share a width; text matters more than in a freshly initialised UNet, so that edits show.
    """
    return _stable_diffusion(seed, tokens, DDIMScheduler(**SCHEDULE))


def sd2(seed: int = 0) -> Any:
    """As `sd1`, with v-prediction and the linear projections of SD 2.x."""
    return _stable_diffusion(seed, TOKENS, DDIMScheduler(**SCHEDULE, prediction_type="v_prediction"), use_linear_projection=True)


def _stable_diffusion(seed: int, tokens: int, scheduler: Any, **unet: Any) -> Any:
    with _seeded(seed):
        words = tokenizer(tokens)
        pipe = StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=_clip(words),
            tokenizer=words,
            unet=_unet(**unet),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return _quiet(pipe)


def sdxl(seed: int = 0) -> Any:
    """A random StableDiffusionXLPipeline: two text encoders of widths 32 and 24, pooled vectors of 20."""
    with _seeded(seed):
        words, words_2 = tokenizer(), tokenizer()
        words_2.pad_token = "!"
        pipe = StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=_clip(words, factor=FACTOR),
            text_encoder_2=_clip(words, 24, projection=20, factor=FACTOR),
            tokenizer=words,
            tokenizer_2=words_2,
            unet=_unet(
                cross_attention_dim=TEXT_WIDTH + 24,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=20 + 6 * 4,
            ),
            scheduler=DDIMScheduler(**SCHEDULE),
            add_watermarker=False,
        )
    return _quiet(pipe)


def sd3(seed: int = 0) -> Any:
    """A random StableDiffusion3Pipeline: CLIP widths 32 and 24 padded to T5's 64, pooled vectors of 16 + 20."""
    with _seeded(seed):
        words = tokenizer()
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=36,
            out_channels=4,
            pos_embed_max_size=8,
        ).eval()
        pipe = StableDiffusion3Pipeline(
            vae=_vae(shift_factor=0.0),
            text_encoder=_clip(words, projection=16, factor=FACTOR),
            text_encoder_2=_clip(words, 24, projection=20, factor=FACTOR),
            text_encoder_3=_t5(),
            tokenizer=words,
            tokenizer_2=tokenizer(),
            tokenizer_3=t5_tokenizer(),
            transformer=_loud(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    return _quiet(pipe)


def flux(seed: int = 0) -> Any:
    """A random FluxPipeline: CLIP width 32 for the pooled vector, T5 width 64 for the tokens, one double and one single block."""
    with _seeded(seed):
        words = tokenizer()
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=64,
            pooled_projection_dim=TEXT_WIDTH,
            axes_dims_rope=(2, 2, 4),
        ).eval()
        pipe = FluxPipeline(
            vae=_vae(shift_factor=0.0),
            text_encoder=_clip(words),
            text_encoder_2=_t5(),
            tokenizer=words,
            tokenizer_2=t5_tokenizer(),
            transformer=_loud(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    return _quiet(pipe)


def wan(seed: int = 0) -> Any:
    """A random WanPipeline (text to video): UMT5 width 64, latents [16, 2, 2, 2] for five frames of 16 x 16."""
    with _seeded(seed):
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=64,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ).eval()
        config = UMT5Config(vocab_size=len(t5_tokenizer()), d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
        pipe = WanPipeline(
            tokenizer=t5_tokenizer(),
            text_encoder=UMT5EncoderModel(config).eval(),
            transformer=_loud(transformer),
            vae=AutoencoderKLWan(
                base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    return _quiet(pipe)


FAMILIES: dict[str, Callable[..., Any]] = {"sd1": sd1, "sd2": sd2, "sdxl": sdxl, "sd3": sd3, "flux": flux, "wan": wan}


def _clip(words: CLIPTokenizer, width: int = TEXT_WIDTH, projection: int | None = None, factor: float = 8.0) -> Any:
    """``factor`` of its weights' size; where the layer before the last is read, which has no norm, a smaller one keeps runs from chaos."""
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=words.model_max_length,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        initializer_factor=factor,
        projection_dim=projection or width,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=64,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()


def _unet(**options: Any) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (16, 32, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "attention_head_dim": 4,
            "cross_attention_dim": TEXT_WIDTH,
        }
        | options
    ).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith(("attn2.to_v.weight", "attn2.to_out.0.weight")):
                parameter.mul_(3)
    return unet


def _loud(transformer: Any) -> Any:
    """Weights of a size at which text matters: fresh transformers are nearly deaf to it, and some start from zeros."""
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * parameter.flatten(1).shape[1] ** -0.5)
    return transformer


def _vae(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        **options,
    ).eval()


def latents(pipe: Any, prompt: str | list[str], *, seed: int | list[int] = 0, steps: int = 4, **options: Any) -> Tensor:
    """Latents [n, ...] of a short guided run; a list of seeds gives each image its own generator."""
    generators = [torch.Generator().manual_seed(s) for s in seed] if isinstance(seed, list) else torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": steps, "generator": generators, "output_type": "latent", **size_of(pipe, prompt)} | options
    output = pipe(prompt, **options)
    return torch.as_tensor(output.frames if hasattr(output, "frames") else output.images)


def size_of(pipe: Any, prompt: str | list[str] | None) -> dict[str, Any]:
    """Arguments that make a pipeline's run tiny, and guided where it is not by default."""
    match type(pipe).__name__:
        case "FluxPipeline":
            blank = "" if isinstance(prompt, str) or prompt is None else [""] * len(prompt)
            return {"height": 16, "width": 16, "max_sequence_length": T5_TOKENS, "true_cfg_scale": 4.0, "negative_prompt": blank}
        case "StableDiffusion3Pipeline":
            return {"height": 16, "width": 16, "max_sequence_length": T5_TOKENS}
        case "WanPipeline":
            return {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": T5_TOKENS}
    return {}
