"""SalUn: saliency unlearning, which moves only the weights on which the concept depends most."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from erasure.errors import ErasureError
from erasure.trained import FROM_PRESET, OfPreset, Session, TrainedMethod
from erasure.training import Loss

CHUNK = 1 << 22
"""Entries that are counted at once: counting needs 64-bit integers."""
HALF = 1 << 16


@overload
def saliency_mask(gradients: Tensor, keep: float) -> Tensor: ...
@overload
def saliency_mask(gradients: Mapping[str, Tensor], keep: float) -> dict[str, Tensor]: ...
def saliency_mask(gradients: Tensor | Mapping[str, Tensor], keep: float) -> Tensor | dict[str, Tensor]:
    """True on the share ``keep`` of weights whose gradients are largest by size: bool, shaped as the gradients.

    One threshold for all tensors of a mapping. Exactly int(keep n) weights are chosen, as in the released code, whose choice among equal
    ones is arbitrary: here the first. Exact without sorting: counts of 16 bits each find the threshold, two in float32 and four in
    float64, in memory that does not depend on n. Errors: a share outside 0..1 and gradients that are not finite raise. Source: Fan et al.,
    ICLR 2024; the released code sorts all weights, and until December 2023 it took those with the smallest gradients.
    """
    if isinstance(gradients, Tensor):
        return saliency_mask({"": gradients}, keep)[""]
    if not 0 <= keep <= 1:
        raise ErasureError(f"salun: the share of weights to move is {keep}; it has to be from 0 to 1")
    for name, gradient in gradients.items():
        if not gradient.isfinite().all():
            raise ErasureError(
                f"salun: the gradient of {name} is not finite, so nothing says which weights matter; load the base in float32"
            )
    count = int(keep * sum(gradient.numel() for gradient in gradients.values()))
    width = 64 if any(gradient.dtype == torch.float64 for gradient in gradients.values()) else 32
    threshold, left = _threshold(list(gradients.values()), count, width)
    masks = {}
    for name, gradient in gradients.items():
        bits = _bits(gradient.flatten(), width)
        mask = bits > threshold
        ties = (bits == threshold).nonzero().flatten()[:left]
        mask[ties] = True
        left -= len(ties)
        masks[name] = mask.view(gradient.shape)
    return masks


def _bits(values: Tensor, width: int) -> Tensor:
    """Sizes of floats as integers of 32 or 64 bits in the same order: the sign bit off, exponents above mantissas."""
    real, whole = (torch.float64, torch.int64) if width == 64 else (torch.float32, torch.int32)
    return values.to(real).abs().contiguous().view(whole)


def _threshold(tensors: Sequence[Tensor], count: int, width: int) -> tuple[int, int]:
    """Bits of the ``count``-th largest size of all entries, and how many entries of just that size are among these."""
    if count == 0:
        return (1 << (width - 1)) - 1, 0
    found, left = 0, count
    for shift in range(width - 16, -1, -16):
        digits = (_bits(part, width) >> shift for tensor in tensors for part in tensor.flatten().split(CHUNK))
        inside = (part[part >> 16 == found] & (HALF - 1) for part in digits)
        place, above = _place(sum(torch.bincount(part, minlength=HALF).cpu() for part in inside), left)  # type: ignore[arg-type]
        found, left = found * HALF + place, left - above
    return found, left


def _place(counts: Tensor, count: int) -> tuple[int, int]:
    """The bin that the ``count``-th largest falls into, and how many are in the bins above it."""
    reached = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(reached, count))
    return len(counts) - 1 - place, int(reached[place - 1]) if place else 0


@dataclass(frozen=True, kw_only=True)
class SalUn(TrainedMethod):
    """SalUn (Fan et al., ICLR 2024) for generation: a mask of the weights that matter for the concept, then relabelling.

    The base makes images of the concept, and of anchors and retain list to remain. The mask comes from the guided denoising loss on the
    concept's images. Then the prompt of a concept's image learns what its anchor's prompt predicts on that image, and remaining
    images are learned as ever. Weights outside the mask stay as they are, bit for bit. The released code's threshold is the top half, its
    comment says a tenth. An empty anchor makes the concept's prompts mean nothing; the authors take another class, or "a person wearing
    clothes".
    """

    name: ClassVar[str] = "salun"
    paper: ClassVar[str] = "arXiv:2310.12508"
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {  # of the nudity run: one epoch over 800 images
            "part": "full", "steps": 100, "lr": 1e-5, "batch": 8, "guidance": 7.5, "sampling_steps": 50, "images": 800, "keep": 0.5,
            "mask_guidance": 7.5, "retain_scale": 0.1, "expand": False,
        },
        "canvas": {
            "part": "full", "steps": 300, "lr": 1e-4, "batch": 8, "guidance": 4.0, "sampling_steps": 10, "images": 192, "keep": 0.5,
            "mask_guidance": 7.5, "retain_scale": 2.0, "expand": True,
        },
    }  # fmt: skip

    keep: OfPreset[float] = FROM_PRESET
    """Share of the part's weights that may move: those with the largest gradients. (The code ranks the whole UNet for any part.)"""
    mask_guidance: OfPreset[float] = FROM_PRESET
    """Guidance w in the loss whose gradients say which weights matter."""
    images: OfPreset[int] = FROM_PRESET
    """Images of the concepts, and as many that remain, that the base makes first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise ErasureError(f"salun: keep is {self.keep}; it has to be a share above 0 and up to 1, such as 0.5")

    def objective(self, session: Session) -> Loss:
        pairs, kept = self.phrases(session.concepts), self.retained(session.concepts)
        making: dict[str, Any] = {"steps": self.sampling_steps, "guidance": self.guidance, "batch": max(self.batch, 8)}
        forget = session.pool([word for word, _ in pairs], self.images, **making)
        remain = session.pool([*dict.fromkeys(anchor for _, anchor in pairs), *kept], self.images, **making)
        masks = saliency_mask(self.saliency(session, forget.states[:, -1], forget.prompts), self.keep)
        for name, parameter in session.tuned.parameters.items():
            session.stack.callback(parameter.register_hook(_masked(masks[name])).remove)
        of = session.denoising

        def loss(step: int, generator: torch.Generator) -> Tensor:
            gone = forget.noised(of, self.batch, generator)
            with torch.no_grad():
                wanted = of.predict(gone.x_t, gone.t, [pairs[i][1] for i in gone.sources])
            total = (of.predict(gone.x_t, gone.t, gone.prompts) - wanted).square().mean()
            here = remain.noised(of, self.batch, generator)
            return total + self.retain_scale * (of.predict(here.x_t, here.t, here.prompts) - here.target).square().mean()

        return loss

    def saliency(self, session: Session, latents: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Σ over batches of ∂/∂θ |target - guided prediction|² on clean latents [n, ...] of the concept, by parameter, float32."""
        of, draw = session.denoising, torch.Generator().manual_seed(session.run.seed)
        parameters = session.tuned.parameters
        found = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
        for x0, start in zip(latents.split(self.batch), range(0, len(latents), self.batch), strict=True):
            words = prompts[start : start + len(x0)]
            noise, t = torch.randn(x0.shape, generator=draw).to(x0), of.timesteps(len(x0), draw)
            x_t = of.schedule.add_noise(x0, noise, t)
            text, null = of.predict(x_t, t, words), of.predict(x_t, t, [""] * len(words))
            guided = (1 + self.mask_guidance) * text - self.mask_guidance * null
            error = (of.schedule.target(x0, noise, t) - guided).square().mean()
            for into, gradient in zip(
                found.values(), torch.autograd.grad(error, list(parameters.values()), allow_unused=True), strict=True
            ):
                if gradient is not None:
                    into += gradient
        return found


def _masked(mask: Tensor) -> Any:
    """A hook that clears gradients outside the mask; ``where``, since zero times infinity is no number."""
    return lambda gradient: torch.where(mask, gradient, 0)
