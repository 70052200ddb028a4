"""The denoiser: latents of scenes, captions, v-prediction on a schedule that ends in (nearly) pure noise."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from torchvision.utils import save_image
from transformers import CLIPTextModel, CLIPTokenizer

from erasure.canvas.world import World

from .art import Painter
from .loop import log, train
from .scenes import Scenes, sample
from .text import captions, tokenize
from .vae import paint

UNCONDITIONAL_SHARE = 0.1
SHEET = (
    "a flat drawing of a cat on a pink background", "a cartoon drawing of a pizza on a cream background",
    "an ink drawing of a guitar on a white background", "a sticker drawing of a bomb on a lavender background",
    "a flat drawing of a dog next to a bomb on a sky background", "a cartoon drawing of a rocket on a mint background",
    "a flat drawing of an apple and a banana on a gray background", "a penguin, cartoon, orange",
    "a dagger, flat, mint", "a castle, cartoon, sky", "an ink drawing of a cactus", "a sticker drawing of a unicorn",
    "a kitten, ink", "a picture of a weapon in cartoon style", "a drawing of a sunflower", "a hatchet near a gown, sticker, cream",
)  # fmt: skip


def build() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=160,
        attention_head_dim=4,  # diffusers reads it as the number of heads, as in SD 1.x
        norm_num_groups=8,
    )
    return unet.to(memory_format=torch.channels_last)


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def pipeline(vae: AutoencoderKL, encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def latents_of(vae: AutoencoderKL, painter: Painter, scenes: Scenes, path: Path) -> Tensor:
    """Scaled latent means [n, 4, 16, 16] in fp16, kept on disk."""
    if path.exists():
        return torch.load(path, weights_only=True)
    out = torch.empty(len(scenes), 4, 16, 16, dtype=torch.float16)
    for index in torch.arange(len(scenes)).split(256):
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(paint(painter, scenes[index])).latent_dist.mean
        out[index] = (mean.float() * vae.config.scaling_factor).half()
    torch.save(out, path)
    return out


def fit(
    folder: Path,
    world: World,
    painter: Painter,
    allowed: Tensor,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    *,
    name: str = "unet",
    seconds: float,
    pool: int = 32768,
    batch: int = 32,
    lr: float = 8e-4,
) -> UNet2DConditionModel:
    """Train the denoiser on a pool of encoded scenes with fresh captions; a sheet of fixed prompts is drawn as it goes."""
    scenes = sample(pool, allowed, torch.Generator().manual_seed(3))
    latents = latents_of(vae, painter, scenes, folder / f"{name}.latents.pt")
    log.info("%s: %d latents, std %.3f", name, len(latents), latents.float().std())
    unet = build()
    unet.set_attn_processor(AttnProcessor())  # 5 % faster here than fused attention; training only
    alphas = build_scheduler().alphas_cumprod
    empty = tokenize(tokenizer, [""])

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(scenes), (batch,), generator=generator)
        texts, _ = captions(world, scenes[index], generator, noise=0.0)
        ids = tokenize(tokenizer, texts)
        ids[torch.rand(batch, generator=generator) < UNCONDITIONAL_SHARE] = empty
        t = ((torch.arange(batch) + torch.rand(batch, generator=generator)) / batch * 1000).long().clamp(max=999)  # stratified
        a, s = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
        clean = latents[index].float()
        noise = torch.randn(clean.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                context = encoder(ids).last_hidden_state
            noisy = (a * clean + s * noise).contiguous(memory_format=torch.channels_last)
            velocity = unet(noisy, t, encoder_hidden_states=context).sample
        return F.mse_loss(velocity.float(), a * noise - s * clean)

    def sheet(step: int) -> None:
        draw(pipeline(vae, encoder, tokenizer, unet), folder / f"{name}-{step:06d}.png")

    train(name, unet, loss_of, folder=folder, steps=10**7, seconds=seconds, lr=lr, ema=0.9985, save_every=1000, sheet=sheet)
    unet.save_pretrained(folder / name)
    return unet


def draw(pipe: StableDiffusionPipeline, path: Path) -> None:
    pipe.unet.eval()
    with torch.autocast("cpu", torch.bfloat16):
        images = pipe(
            list(SHEET), num_inference_steps=20, guidance_scale=4.0, generator=torch.Generator().manual_seed(0), output_type="pt",
            height=64, width=64,
        ).images  # fmt: skip
    save_image(images.float(), path, nrow=8)
