"""Training a sparse coder on the activations of a text encoder, straight from prompts."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erasure.callbacks import Callback, Progress
from erasure.families import family_of
from erasure.training import Training, train

from .coder import SparseCoder, SparseCoderConfig
from .hookpoints import activations, find

log = logging.getLogger("erasure")
AUX_SCALE = 1 / 32
Read = Callable[[torch.Generator], Tensor]
"""A batch of activations [n, d_in], drawn by a generator."""


def fvu(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Fraction of variance unexplained: squared error over the squared distance to the batch's mean; x [n, d]."""
    return (x - reconstruction).square().sum() / (x - x.mean(0)).square().sum()


def auxiliary(coder: SparseCoder, x: Tensor, reconstruction: Tensor, pre: Tensor, dead: Tensor) -> Tensor | None:
    """How badly the strongest dead latents (bool [n_latents]) explain what the live ones leave over of x [n, d]; None when none is dead.

    The residual x - reconstruction is a constant here, and the dead latents' share is decoded without the bias, which the residual is
    without as well. As many are asked as half the width, and the loss counts less where fewer are dead. Source: Gao et al., 2024, A.2.
    """
    count, wanted = int(dead.sum()), max(coder.config.d_in // 2, 1)
    if not count:
        return None
    masked = pre.masked_fill(~dead, -torch.inf)
    values, indices = masked.topk(min(count, wanted), dim=-1, sorted=False)
    codes = torch.zeros_like(pre).scatter(-1, indices, values.relu())
    return min(count / wanted, 1.0) * fvu((x - reconstruction).detach(), codes @ coder.W_dec)


def geometric_median(x: Tensor, rounds: int = 100) -> Tensor:
    """The point [d] of least summed distance to x [n, d], by Weiszfeld's rounds."""
    point = x.mean(0)
    for _ in range(rounds):
        weight = 1 / (x - point).norm(dim=1).clamp(min=1e-8)
        point = (weight[:, None] * x).sum(0) / weight.sum()
    return point


def orthogonal(gradient: Tensor, directions: Tensor) -> Tensor:
    """The gradient [n, d] without its part along each unit direction [n, d], which the norm takes back anyway."""
    return gradient - (gradient * directions).sum(-1, keepdim=True) * directions


class Upkeep(Callback):
    """Keeps directions at norm 1, counts for each latent the tokens since it was last on, and logs how the coder does."""

    def __init__(self, coder: SparseCoder, dead_after: int) -> None:
        self.coder, self.dead_after = coder, dead_after
        self.silent = torch.zeros(coder.config.num_latents, dtype=torch.int64, device=coder.b_dec.device)
        self.explained = self.active = 0.0

    def __repr__(self) -> str:
        return f"Upkeep(dead_after={self.dead_after})"

    @property
    def dead(self) -> Tensor:
        """bool [n]: latents that no token of the last ``dead_after`` turned on."""
        return self.silent > self.dead_after

    def see(self, codes: Tensor, unexplained: Tensor) -> None:
        """Take note of a batch's codes [n, latents]."""
        on = codes.detach() != 0
        self.silent = torch.where(on.any(0), 0, self.silent + len(codes))
        self.explained, self.active = 1 - float(unexplained.detach()), float(on.sum(-1).float().mean())

    def step(self, run: Training) -> None:
        self.coder.normalise()
        if run.step % 100 == 0 or run.step == run.steps:
            share = float(self.dead.float().mean())
            log.info(
                "step %d: %.1f %% of variance explained, %.1f latents on, %.1f %% dead",
                run.step,
                100 * self.explained,
                self.active,
                100 * share,
            )

    def state(self) -> dict[str, Tensor]:
        return {"silent": self.silent}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.silent = state["silent"].to(self.silent.device)


def fit(
    read: Read,
    config: SparseCoderConfig,
    *,
    steps: int,
    lr: float = 1e-3,
    l1: float = 1e-3,
    dead_after: int = 100_000,
    seed: int = 0,
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> tuple[SparseCoder, dict[str, float]]:
    """A coder of activations that ``read`` draws, and how it does: explained variance, latents on, dead share.

    ``dead_after``: tokens after which a latent that no token turned on counts as dead; ``l1``: weight of the codes' size, for ``relu``.
    Killed and called again with the same ``checkpoint`` folder, it ends with the same weights.
    """
    torch.manual_seed(seed)
    coder = SparseCoder(config).to(device)
    with torch.no_grad():
        coder.b_dec.copy_(geometric_median(read(torch.Generator().manual_seed(seed)).to(device)))
    coder.W_dec.register_hook(lambda gradient: orthogonal(gradient, coder.W_dec.detach()))
    upkeep, bar = Upkeep(coder, dead_after), Progress("sae", show=progress)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        x = read(generator).to(device)
        out = coder(x)
        loss = fvu(x, out.reconstruction)
        upkeep.see(out.codes, loss)
        if (extra := auxiliary(coder, x, out.reconstruction, out.pre, upkeep.dead)) is not None:
            loss = loss + AUX_SCALE * extra
        return loss + l1 * out.codes.abs().sum(-1).mean() if config.activation == "relu" else loss

    try:
        train(
            dict(coder.named_parameters()), loss_of, steps=steps, lr=lr, seed=seed, warmup=min(steps // 20, 1000), schedule="linear",
            checkpoint=checkpoint, settings=settings, callbacks=(upkeep, bar),
        )  # fmt: skip
    finally:
        bar.close()
    measured = {"explained": upkeep.explained, "latents_on": upkeep.active, "dead": float(upkeep.dead.float().mean())}
    return coder.eval().requires_grad_(False), measured


def reader(pipe: Any, hookpoint: str, prompts: Sequence[str], batch: int) -> tuple[Read, int]:
    """Batches of a text encoder's activations on prompts drawn at random, and their width.

    Every token that inference will see is there, padding too, but for CLIP's start token, which is the same in all.
    """
    encoder, layer = find(pipe, family_of(pipe), hookpoint)
    first = 1 if encoder.kind == "clip" else 0

    def read(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(prompts), (batch,), generator=generator).tolist()
        x, _ = activations(pipe, encoder, layer, [prompts[i] for i in chosen])
        return x[:, first:].flatten(0, 1)

    return read, int(getattr(pipe, encoder.component).config.hidden_size)
