"""The flow canvas's denoiser: a small FLUX transformer that learns the velocity from scenes' latents to noise."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torchvision.utils import save_image
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from erasure.canvas.world import World

from .art import Painter
from .loop import log, train
from .scenes import sample
from .text import LENGTH, WIDTH, captions, tokenize
from .unet import SHEET, UNCONDITIONAL_SHARE, latents_of

SIDE = 8
"""Packed tokens along each side of a 16 x 16 latent."""


def build() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=8,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)


def pipeline(
    vae: AutoencoderKL,
    encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    t5: T5EncoderModel,
    t5_tokenizer: T5TokenizerFast,
    transformer: FluxTransformer2DModel,
) -> FluxPipeline:
    vae.register_to_config(shift_factor=0.0)  # FLUX adds it before decoding; the shared autoencoder has none
    pipe = FluxPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
        scheduler=build_scheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def packed(latents: Tensor) -> Tensor:
    """Latents [n, 4, 16, 16] as FLUX's tokens [n, 64, 16]: two by two pixels each, channels first."""
    n, channels = latents.shape[:2]
    return latents.reshape(n, channels, SIDE, 2, SIDE, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, SIDE * SIDE, 4 * channels)


def fit(
    folder: Path,
    world: World,
    painter: Painter,
    allowed: Tensor,
    vae: AutoencoderKL,
    texts: tuple[CLIPTokenizer, CLIPTextModel],
    t5s: tuple[T5TokenizerFast, T5EncoderModel],
    *,
    seconds: float,
    pool: int = 32768,
    batch: int = 32,
    lr: float = 8e-4,
) -> FluxTransformer2DModel:
    """Train the transformer on a pool of encoded scenes with fresh captions; a sheet of fixed prompts is drawn as it goes."""
    scenes = sample(pool, allowed, torch.Generator().manual_seed(3))
    latents = latents_of(vae, painter, scenes, folder / "flow.latents.pt")
    log.info("flow: %d latents, std %.3f", len(latents), latents.float().std())
    transformer = build()
    (tokenizer, encoder), (t5_tokenizer, t5) = texts, t5s
    empty, t5_empty = tokenize(tokenizer, [""]), tokenize(t5_tokenizer, [""])
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    places = torch.stack([torch.zeros(SIDE, SIDE), rows, columns], -1).reshape(-1, 3).float()

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(scenes), (batch,), generator=generator)
        words, _ = captions(world, scenes[index], generator, noise=0.0)
        ids, t5_ids = tokenize(tokenizer, words), tokenize(t5_tokenizer, words)
        blank = torch.rand(batch, generator=generator) < UNCONDITIONAL_SHARE
        ids[blank], t5_ids[blank] = empty, t5_empty
        sigma = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch  # stratified
        clean = packed(latents[index].float())
        noise = torch.randn(clean.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                pooled, context = encoder(ids).pooler_output, t5(t5_ids).last_hidden_state
            velocity = transformer(
                hidden_states=torch.lerp(clean, noise, sigma[:, None, None]),
                encoder_hidden_states=context,
                pooled_projections=pooled,
                timestep=sigma,
                img_ids=places,
                txt_ids=torch.zeros(LENGTH, 3),
            ).sample
        return F.mse_loss(velocity.float(), noise - clean)

    def sheet(step: int) -> None:
        draw(pipeline(vae, encoder, tokenizer, t5, t5_tokenizer, transformer), folder / f"flow-{step:06d}.png")

    train("flow", transformer, loss_of, folder=folder, steps=10**7, seconds=seconds, lr=lr, ema=0.9985, save_every=1000, sheet=sheet)
    transformer.save_pretrained(folder / "flow")
    return transformer


def draw(pipe: FluxPipeline, path: Path) -> None:
    pipe.transformer.eval()
    with torch.autocast("cpu", torch.bfloat16):
        images = pipe(
            list(SHEET), num_inference_steps=20, generator=torch.Generator().manual_seed(0), output_type="pt",
            height=64, width=64, max_sequence_length=LENGTH,
        ).images  # fmt: skip
    save_image(images.float(), path, nrow=8)
