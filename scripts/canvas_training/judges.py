"""The two judges: trained on renders and their autoencoder round trips, and on what no longer shows anything."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from erasure.canvas import judge_dev, judge_test
from erasure.canvas.judging import Judge, JudgeNet
from erasure.canvas.world import World

from .art import Painter
from .loop import log, train
from .scenes import Scenes, sample
from .vae import paint

BUILDERS = {"judge_dev": judge_dev.build, "judge_test": judge_test.build}
SEEDS = {"judge_dev": 101, "judge_test": 202}
FALSE_POSITIVES = 0.01


@torch.no_grad()
def round_trip(vae: AutoencoderKL, images: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Images through the autoencoder, with noise (in latent standard deviations) as a sampler leaves it."""
    out = []
    for part in images.split(128):
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(part).latent_dist.mean.float()
            latents = latents + noise * torch.randn(latents.shape, generator=generator) / vae.config.scaling_factor
            out.append(vae.decode(latents).sample.float().clamp(-1, 1))
    return torch.cat(out)


def junk(painter: Painter, vae: AutoencoderKL, n: int, everything: Tensor, generator: torch.Generator) -> Tensor:
    """Images [n, 3, 64, 64] of nothing that a person could name: seven kinds in equal shares."""
    share = -(-n // 7)
    first, second = (paint(painter, sample(share, everything, generator)) for _ in range(2))
    backgrounds = torch.randint(8, (share,), generator=generator)
    blank = painter.blank(backgrounds) * 2 - 1
    scene = sample(share, everything, generator)
    scene.backgrounds = backgrounds
    faded = blank + (0.05 + 0.2 * torch.rand(share, 1, 1, 1, generator=generator)) * (paint(painter, scene) - blank)
    noise = torch.randn(share, 3, 64, 64, generator=generator)
    coarse = F.interpolate(torch.randn(share, 3, 8, 8, generator=generator), size=64, mode="bilinear").clamp(-1, 1)
    blur = F.interpolate(F.adaptive_avg_pool2d(first, 5), size=64, mode="bilinear")
    cells = first.unfold(2, 16, 16).unfold(3, 16, 16).reshape(share, 3, 16, 16, 16)
    order = torch.rand(share, 16, generator=generator).argsort(1)
    cells = torch.stack([c[:, o] for c, o in zip(cells, order, strict=True)])
    scrambled = cells.reshape(share, 3, 4, 4, 16, 16).permute(0, 1, 2, 4, 3, 5).reshape(share, 3, 64, 64)
    kinds = [noise.clamp(-1, 1), coarse, blank, faded, (first + second) / 2, blur, scrambled]
    images = torch.cat(kinds)[torch.randperm(7 * share, generator=generator)[:n]]
    trip = torch.rand(n, generator=generator) < 0.5
    images[trip] = round_trip(vae, images[trip], 0.1, generator)
    return images


class Data:
    """Scenes with labels, a share of them (``trips``) round-tripped, and junk, as uint8 pools."""

    def __init__(self, painter: Painter, vae: AutoencoderKL, n: int, seed: int, world: World, trips: float = 0.6) -> None:
        everything = torch.ones(len(world.objects), len(world.styles), dtype=torch.bool)
        generator = torch.Generator().manual_seed(seed)
        self.scenes: Scenes = sample(n, everything, generator, pair_share=0.35, jitter=3)
        images = paint(painter, self.scenes)
        trip = torch.rand(n, generator=generator) < trips
        images[trip] = round_trip(vae, images[trip], 0.15, generator)
        self.images = to_bytes(images)
        self.junk = to_bytes(junk(painter, vae, n // 3, everything, generator))
        self.presence = torch.zeros(n, len(world.objects) + 1)
        self.presence.scatter_(1, self.scenes.objects.where(self.scenes.objects >= 0, len(world.objects)), 1.0)
        self.presence = self.presence[:, :-1]


def to_bytes(images: Tensor) -> Tensor:
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_floats(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def augment(images: Tensor, name: str, generator: torch.Generator) -> Tensor:
    """judge_dev: shifts, noise, contrast; judge_test: crops to another scale, a grey patch, a light blur."""
    n = len(images)
    if name == "judge_dev":
        dy, dx = torch.randint(-3, 4, (2,), generator=generator).tolist()
        images = F.pad(images, (3, 3, 3, 3), mode="replicate")[:, :, 3 + dy : 67 + dy, 3 + dx : 67 + dx]
        images = images * (0.85 + 0.3 * torch.rand(n, 1, 1, 1, generator=generator))
        return images + 0.06 * torch.rand(n, 1, 1, 1, generator=generator) * torch.randn(images.shape, generator=generator)
    side = int(torch.randint(58, 71, (), generator=generator))
    images = F.interpolate(images, size=side, mode="bilinear", antialias=True)
    if side < 64:
        images = F.pad(images, (0, 64 - side, 0, 64 - side), mode="replicate")
    y, x = torch.randint(0, images.shape[-1] - 63, (2,), generator=generator).tolist()
    images = images[:, :, y : y + 64, x : x + 64].clone()
    y, x = torch.randint(0, 52, (2,), generator=generator).tolist()
    images[: n // 2, :, y : y + 12, x : x + 12] = 0.4
    images[n // 3 :: 3] = F.avg_pool2d(F.pad(images[n // 3 :: 3], (1, 1, 1, 1), mode="replicate"), 3, 1)
    return images


def fit(
    folder: Path, world: World, painter: Painter, vae: AutoencoderKL, name: str, steps: int, pool: int = 9000, batch: int = 64
) -> Judge:
    torch.manual_seed(SEEDS[name])
    net = BUILDERS[name]()
    data = Data(painter, vae, pool, SEEDS[name], world)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        seen = torch.randint(len(data.images), (batch,), generator=generator)
        bad = torch.randint(len(data.junk), (batch // 4,), generator=generator)
        images = augment(to_floats(torch.cat([data.images[seen], data.junk[bad]])), name, generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(images)
        presence = torch.cat([data.presence[seen], torch.zeros(len(bad), len(world.objects))])
        unrecognised = torch.cat([torch.zeros(batch), torch.ones(len(bad))])
        return (
            20 * F.binary_cross_entropy_with_logits(logits.presence.float(), presence)
            + F.cross_entropy(logits.style[:batch].float(), data.scenes.styles[seen])
            + F.cross_entropy(logits.background[:batch].float(), data.scenes.backgrounds[seen])
            + F.binary_cross_entropy_with_logits(logits.unrecognised.float(), unrecognised)
        )

    train(name, net, loss_of, folder=folder, steps=steps, lr=2e-3, weight_decay=0.02, ema=0.98, ema_every=1, save_every=300)
    recalibrate_norms(net, data, batch)
    judge = calibrate(name, net, Data(painter, vae, 6000, SEEDS[name] + 1, world))
    save(judge, folder / f"{name}.safetensors")
    return judge


@torch.no_grad()
def recalibrate_norms(net: JudgeNet, data: Data, batch: int) -> None:
    """Batch-norm statistics of the averaged weights."""
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    net.train()
    for index in torch.randperm(len(data.images))[: 40 * batch].split(batch):
        net(to_floats(torch.cat([data.images[index], data.junk[: batch // 4]])))
    net.eval()


@torch.no_grad()
def calibrate(name: str, net: JudgeNet, data: Data) -> Judge:
    """Thresholds at 1 % false positives an object, over renders without it and over junk."""
    judge = Judge(name, net, torch.zeros(data.presence.shape[1]), 0.5)
    seen, bad = judge(data.images.float() / 255), judge(data.junk.float() / 255)
    thresholds = []
    for k in range(data.presence.shape[1]):
        negatives = torch.cat([seen.scores[data.presence[:, k] == 0, k], bad.scores[:, k]])
        thresholds.append(max(float(negatives.quantile(1 - FALSE_POSITIVES)), 1e-4))
    judge.thresholds = torch.tensor(thresholds)
    log.info("%s thresholds: median %.4f, from %.4f to %.4f", name, judge.thresholds.median(), min(thresholds), max(thresholds))
    return judge


def save(judge: Judge, path: Path) -> None:
    metadata = {
        "thresholds": json.dumps([round(x, 6) for x in judge.thresholds.tolist()]),
        "unrecognised_threshold": str(judge.unrecognised_threshold),
    }
    save_file({k: v.half().contiguous() for k, v in judge.net.state_dict().items() if "num_batches" not in k}, path, metadata=metadata)
