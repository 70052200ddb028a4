"""Safe Latent Diffusion: guidance away from a text that says what is unwanted, element by element and with momentum."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from erasure.concept import Concept
from erasure.errors import ErasureError, NotErased
from erasure.families import NAMES, Family
from erasure.method import ErasureMethod, Run, RuntimeEraser
from erasure.seams import branches

from .negative_prompt import target_phrases, warn_of_cut


@dataclass(frozen=True)
class Preset:
    """The five numbers of SLD."""

    scale: float
    """s_S, safety guidance scale; at 0 the result is plain guidance. The released code switches itself off at 1 and below."""
    warmup: int
    """δ, steps before the guidance is applied."""
    threshold: float
    """λ, of text minus safety prediction: elements at or above it are left alone."""
    momentum_scale: float
    """s_m, share of the momentum in the guidance."""
    momentum_beta: float
    """β_m, share of the old momentum in the new."""


Name = Literal["weak", "weak-paper", "medium", "strong", "max"]
PRESETS: dict[str, Preset] = {
    "weak": Preset(20, 15, 0.0, 0.0, 0.0),
    "weak-paper": Preset(200, 15, 0.0, 0.0, 0.0),
    "medium": Preset(1000, 10, 0.01, 0.3, 0.4),
    "strong": Preset(2000, 7, 0.025, 0.5, 0.7),
    "max": Preset(5000, 0, 1.0, 0.5, 0.7),
}
"""The paper's four; of weak the released s_S and, by a name of its own, the paper's."""
MOST = {"scale": 1e6, "warmup": 500, "momentum_scale": 100, "momentum_beta": 1}
"""Upper ends of what the settings may be."""


def guide(uncond: Tensor, text: Tensor, safety: Tensor, momentum: Tensor | None, step: int, preset: Preset | Name) -> tuple[Tensor, Tensor]:
    """SLD's guidance term and its new momentum, eq. 3-8: (guided, momentum), all shaped as the predictions [batch, ...].

    ``guided`` is the term that the guidance scale s_g multiplies, (text - uncond) - γ once ``step`` (from 0) has reached the warm-up
    and text - uncond before it, so that the final prediction is uncond + s_g * guided; the released code calls it noise_guidance.
    ``momentum`` is None or zeros at the first step, then what the former step gave; it grows during the warm-up too. Element-wise
    throughout. Source: Schramowski et al., CVPR 2023. Errors: an unknown preset name raises KeyError.
    """
    of = PRESETS[preset] if isinstance(preset, str) else preset
    nu = torch.zeros_like(text) if momentum is None else momentum
    away = text - safety
    mu = torch.where(away >= of.threshold, 0.0, (away.abs() * of.scale).clamp(max=1))  # eq. 6; the comparison keeps the sign
    gamma = mu * (safety - uncond) + of.momentum_scale * nu  # eq. 4 and 7
    nu = of.momentum_beta * nu + (1 - of.momentum_beta) * gamma  # eq. 8
    guided = text - uncond
    return (guided - gamma if step >= of.warmup else guided), nu  # eq. 3


@dataclass(frozen=True, kw_only=True)
class SLD(ErasureMethod):
    """Safe Latent Diffusion (Schramowski et al., CVPR 2023), with every target phrase in the safety text.

    The rule acts on what the model predicts. For velocities that is the noise's rule with the same signs, but s_S and λ are sized for
    noise. Warm-up counts sampling steps; a run that ends within it raises. Momentum moves at each call of the denoiser, as in the released
    code, so twice a step with solvers that call twice. Needs classifier-free guidance: for FLUX.1 ``true_cfg_scale`` > 1 and a
    ``negative_prompt``, if only an empty one. Costs a third branch at every step, and a fourth where guidance runs in two calls.
    """

    name: ClassVar[str] = "sld"
    paper: ClassVar[str] = "arXiv:2211.05105"
    families: ClassVar[frozenset[str]] = frozenset(NAMES)

    preset: Name = "medium"
    """Values of the five settings below where they are not given. weak has the released s_S of 20, weak-paper the paper's 200."""
    scale: float | None = None
    """Safety guidance scale, s_S."""
    warmup: int | None = None
    """Steps before the guidance acts, δ; the presets' are meant for 50 steps."""
    threshold: float | None = None
    """Elements whose text prediction is this much above the safety text's are left alone, λ."""
    momentum_scale: float | None = None
    """Share of the momentum in the guidance, s_m."""
    momentum_beta: float | None = None
    """Share of the old momentum in the new, β_m."""

    def __post_init__(self) -> None:
        for key, most in MOST.items():
            if (value := getattr(self, key)) is not None and not 0 <= value <= most:
                raise ErasureError(f"sld: {key} is {value}; it has to be from 0 to {most:g}")

    @property
    def settings(self) -> Preset:
        """The preset, with whatever is given in its place."""
        given = {field.name: getattr(self, field.name) for field in fields(Preset)}
        return replace(PRESETS[self.preset], **{key: value for key, value in given.items() if value is not None})

    def fit(self, pipe: Any, concepts: Sequence[Concept], *, run: Run = Run()) -> "SLDEraser":
        warn_of_cut(pipe, self.family(pipe), target_phrases(concepts))
        return self.eraser(tuple(concepts), {})

    def eraser(self, concepts: tuple[Concept, ...], tensors: Mapping[str, Tensor]) -> "SLDEraser":
        return SLDEraser(self, concepts)


@dataclass(frozen=True)
class SLDEraser(RuntimeEraser):
    """Guides each call away from the concepts' phrases."""

    probe: ClassVar[str] = "a picture of {}"
    method: SLD

    @property
    def first_step(self) -> int:
        return self.method.settings.warmup

    def edits(self, pipe: Any, family: Family) -> Iterable[AbstractContextManager[int]]:
        settings = self.method.settings
        momentum: Tensor | None = None

        def begin() -> None:
            nonlocal momentum
            momentum = None

        def rule(uncond: Tensor, text: Tensor, extras: list[Tensor], step: int) -> Tensor:
            nonlocal momentum
            if momentum is None and (n := branches.run_length(pipe)) <= settings.warmup:
                raise NotErased(
                    f"SLD acts after {settings.warmup} steps of warm-up and this run has {n}, so nothing would be erased; "
                    "take more steps, or a smaller warmup (preset max has none)"
                )
            guided, momentum = guide(uncond, text, extras[0], momentum, step, settings)
            return uncond + guided

        yield branches.guided(pipe, family, [", ".join(target_phrases(self.concepts))], rule, begin)

    def tensors(self) -> dict[str, Tensor]:
        return {}
