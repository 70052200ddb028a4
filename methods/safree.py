"""SAFREE: training-free erasure by projecting prompts off the concept's subspace, with latent re-attention."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erasure.concept import Concept
from erasure.errors import Conflict, ErasureError, NotErased
from erasure.families import Family
from erasure.method import Eraser, ErasureMethod, Run, RuntimeEraser
from erasure.seams import activation, denoiser, prompt
from erasure.text import pooled

from .negative_prompt import extend_negative, target_phrases, warn_of_cut

RANK_TOLERANCE = 1e-5
"""Singular values under this share of the largest are noise of float32 encoders: duplicate phrases, not directions."""
UP_T = 10
"""Most steps, less one, that the self-validating filter keeps the projection on: the paper's γ, the code's up_t."""


def projector(phrases: Tensor) -> Tensor:
    """Orthogonal projector [D, D] onto the span of phrases [K, D], eq. 1, float64 inside.

    A rank-revealing SVD, so that duplicate and near-parallel phrases are harmless (the released pseudo-inverse is not truncated).
    """
    if not len(phrases):
        return phrases.new_zeros(phrases.shape[1], phrases.shape[1])
    _, singular, basis = torch.linalg.svd(phrases.double(), full_matrices=False)
    basis = basis[singular > RANK_TOLERANCE * singular.max()]
    return (basis.T @ basis).to(phrases.dtype)


def trigger_mask(masked: Tensor, toxic: Tensor, alpha: float) -> Tensor:
    """Which of a prompt's n tokens carry the concept: bool [n] from pooled leave-one-out encodings [n, D], eq. 3-4.

    A token is safe if, without it, the prompt is nearer to the toxic subspace than (1 + alpha) times the mean over the other tokens.
    A lone token has no others to compare with and counts as a trigger, as in the released code.
    """
    distances = (masked - masked @ toxic.T).norm(dim=1)
    n = len(distances)
    if n < 2:
        return torch.ones(n, dtype=torch.bool, device=masked.device)
    others = (distances.sum() - distances) / (n - 1)
    return ~(distances < (1 + alpha) * others)


def project(tokens: Tensor, inputs: Tensor, toxic: Tensor, order: Literal["code", "paper"] = "code") -> Tensor:
    """Tokens [n, D] moved off the toxic subspace and kept in the input's, eq. 5; ``inputs`` and ``toxic`` are projectors [D, D].

    The released code computes (I - P_C) P_I e, which is orthogonal to the concept; the paper prints P_I (I - P_C) e, which lies in
    the span of the input. They differ because projectors do not commute.
    """
    if order == "code":
        inside = tokens @ inputs.T
        return inside - inside @ toxic.T
    if order == "paper":
        return (tokens - tokens @ toxic.T) @ inputs.T
    raise ValueError(f"order is 'code' or 'paper', not {order!r}")


def filter_steps(beta: float, kind: Literal["nudity", "artist"] = "nudity", rule: Literal["code", "paper"] = "code") -> int:
    """The last step (from 0) at which safe embeddings are used, eq. 6, from beta = 1 - mean cosine of projected and original tokens.

    The paper prints γ sigmoid(1 - cos), which is always 5, 6 or 7; the released code puts a steep sigmoid around a midpoint.
    """
    if rule == "paper":
        return round(UP_T / (1 + math.exp(-beta)))
    if rule != "code":
        raise ValueError(f"rule is 'code' or 'paper', not {rule!r}")
    if kind not in ("nudity", "artist"):
        raise ValueError(f"kind is 'nudity' or 'artist', not {kind!r}")
    midpoint, slope = (5.5, 3.5) if kind == "artist" else (5.333, 2.5)
    return round(UP_T / (1 + math.exp(-2 * slope * (10 * beta - midpoint))))


def reattend(safe: Tensor, original: Tensor, scale: float, radius: int = 1, rule: Literal["code", "paper"] = "paper") -> Tensor:
    """Skip features [B, C, H, W] whose low frequencies are attenuated where the safe prompt exceeds the original, eq. 7-8.

    The window is the centre 2 radius x 2 radius of the shifted spectrum, compared by real part. The paper multiplies by ``scale``;
    the released function sets the constant ``scale`` there (and its caller never reaches it).
    """
    spectrum = torch.fft.fftshift(torch.fft.fft2(safe.float()), dim=(-2, -1))
    reference = torch.fft.fftshift(torch.fft.fft2(original.float()), dim=(-2, -1))
    y, x = (slice(max(size // 2 - radius, 0), size // 2 + radius) for size in safe.shape[-2:])
    low, low_reference = spectrum[..., y, x], reference[..., y, x]
    if rule == "paper":
        spectrum[..., y, x] = torch.where(low.real > low_reference.real, low * scale, low)
    elif rule == "code":
        spectrum[..., y, x] = torch.where(low_reference.real - low.real > 0, low, torch.full_like(low, scale))
    else:
        raise ValueError(f"rule is 'code' or 'paper', not {rule!r}")
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real.to(safe.dtype)


@dataclass(frozen=True, kw_only=True)
class SAFREE(ErasureMethod):
    """SAFREE (Yoon et al., ICLR 2025): subspace projection, trigger tokens, self-validating filter, Fourier re-attention.

    The released code always sets the concept phrases as negative prompt as well (``negative_prompt``), and its re-attention is never
    reached; here both do what they say. Prompts longer than the encoder are cut with their end token kept, so that they stay filtered.
    """

    name: ClassVar[str] = "safree"
    paper: ClassVar[str] = "arXiv:2410.12761"
    families: ClassVar[frozenset[str]] = frozenset({"sd1"})

    alpha: float = 0.01
    """Tolerance of the trigger test."""
    order: Literal["code", "paper"] = "code"
    """Order of the two projections."""
    scope: Literal["triggers", "sentence"] = "triggers"
    """What is projected: the trigger tokens, as published, or (ours) also the end and padding tokens, which in a causal encoder have
    read the trigger, whenever there is one."""
    self_validating: bool = True
    """Choose how many steps to filter from how much the projection changes the prompt; otherwise filter every step."""
    filter_rule: Literal["code", "paper"] = "code"
    """Formula of the self-validating filter."""
    reattention: bool = True
    """Attenuate low frequencies of the UNet's skip features; costs a third branch while the filter is on."""
    s1: float = 0.9
    """Attenuation in the deepest up-path stage."""
    s2: float = 0.2
    """Attenuation in the next stage."""
    negative_prompt: bool = True
    """Also put the concept's phrases into the negative prompt, as every published SAFREE figure does."""

    def fit(self, pipe: Any, concepts: Sequence[Concept], *, run: Run = Run()) -> "SafreeEraser":
        family = self.family(pipe)
        encoder, tokenizer = (getattr(pipe, name) for name in family.encoders[0])
        phrases = target_phrases(concepts)
        if not phrases:
            raise ErasureError("safree was given no concept to erase")
        if self.negative_prompt:
            warn_of_cut(tokenizer, phrases)
        ids = [tokenizer(p, truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt").input_ids for p in phrases]
        return self.eraser(tuple(concepts), {"phrases": torch.cat([pooled(encoder, one) for one in ids]).cpu()})

    def eraser(self, concepts: tuple[Concept, ...], tensors: Mapping[str, Tensor]) -> "SafreeEraser":
        return SafreeEraser(self, concepts, tensors["phrases"])


@dataclass
class _Call:
    """What one call of the pipeline has to remember between its prompt and its steps."""

    safe: Tensor
    original: Tensor
    last_step: Tensor
    active: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    """bool [prompts]: rows that have a third branch in the denoiser call under way."""
    rows: int = 0
    """Batch size that the pipeline sent to the denoiser."""


@dataclass(frozen=True)
class SafreeEraser(RuntimeEraser):
    """Filters the prompt embeddings of each call, and the skip features while the filter is on."""

    method: SAFREE
    phrases: Tensor = field(repr=False)
    """Pooled encodings of the concept's phrases [K, D]."""

    def tensors(self) -> dict[str, Tensor]:
        return {"phrases": self.phrases}

    def check_conflicts(self, attached: Sequence[Eraser]) -> None:
        super().check_conflicts(attached)
        if any(isinstance(other, SafreeEraser) for other in attached):
            raise Conflict("another SAFREE eraser is attached, and each would undo the other's steps; fit one on all concepts instead")

    def edits(self, pipe: Any, family: Family) -> Iterable[AbstractContextManager[int]]:
        session = _Session(self, pipe, family)
        phrases = target_phrases(self.concepts)
        before = (lambda a: extend_negative(a, phrases)) if self.method.negative_prompt else (lambda a: None)
        yield prompt.encoding(pipe, family, session.encode, before, guided=self.method.negative_prompt)
        yield denoiser.calls(pipe, family, session.before_step, session.after_step)
        if self.method.reattention:
            yield activation.inputs(session.scales, session.reattend)


class _Session:
    """One attachment: carries tensors between the seams and the formulas above."""

    def __init__(self, eraser: SafreeEraser, pipe: Any, family: Family) -> None:
        self.method, self.family = eraser.method, family
        self.encoder, self.tokenizer = (getattr(pipe, name) for name in family.encoders[0])
        self.toxic = projector(eraser.phrases)
        self.kind: Literal["nudity", "artist"] = "artist" if all(c.kind in ("style", "identity") for c in eraser.concepts) else "nudity"
        self.steps = denoiser.StepCounter()
        self.call: _Call | None = None
        widths = [
            w for component in family.denoisers for w in sorted(set(getattr(pipe, component).config.block_out_channels), reverse=True)
        ]
        strengths = dict(zip(widths, (self.method.s1, self.method.s2), strict=False))
        self.scales = {module: (hidden, strengths[hidden]) for module, hidden in family.up_blocks(pipe) if hidden in strengths}

    def encode(self, arguments: prompt.Arguments, embeds: prompt.Embeds) -> prompt.Embeds:
        original = embeds["embeds"]
        assert original is not None
        prompts = [arguments["prompt"]] if isinstance(arguments["prompt"], str) else list(arguments["prompt"])
        repeats = len(original) // len(prompts)
        filtered = [self.filter(text, states) for text, states in zip(prompts, original[::repeats], strict=True)]
        safe = torch.stack([states for states, _ in filtered]).to(original).repeat_interleave(repeats, dim=0)
        last_step = torch.tensor([steps for _, steps in filtered]).repeat_interleave(repeats)
        self.call = _Call(safe, original, last_step)
        self.steps.reset()
        return embeds | {"embeds": safe}

    def filter(self, text: str, states: Tensor) -> tuple[Tensor, int]:
        """The safe embeddings [tokens, D] of one prompt, and the last step that uses them."""
        ids = self.tokenizer(text, truncation=True, max_length=self.tokenizer.model_max_length, return_tensors="pt").input_ids[0]
        n = len(ids) - 2  # between BOS and EOS, which truncation keeps
        if n < 1:
            return states, -1
        masked_ids = ids.repeat(n, 1)
        masked_ids[torch.arange(n), torch.arange(1, n + 1)] = 0  # token 0 in place of each word in turn, as released
        masked, states32 = pooled(self.encoder, masked_ids), states.float()
        toxic = self.toxic.to(masked)
        moved = project(states32, projector(masked), toxic, self.method.order)
        triggers = torch.zeros(len(states), dtype=torch.bool, device=states.device)
        triggers[1 : n + 1] = trigger_mask(masked, toxic, self.method.alpha)
        if self.method.scope == "sentence" and triggers.any():
            triggers[n + 1 :] = True
        safe = torch.where(triggers[:, None], moved, states32)
        if not self.method.self_validating:
            return safe, 10**9
        beta = 1 - F.cosine_similarity(moved[: n + 2], states32[: n + 2], dim=1).mean().item()
        return safe, filter_steps(beta, self.kind, self.method.filter_rule)

    def before_step(self, inputs: denoiser.Inputs) -> None:
        if self.call is None:
            raise NotErased("the denoiser was called before any prompt passed SAFREE")
        call, step = self.call, self.steps.see(inputs["timestep"])
        context = inputs[self.family.context]
        n, call.rows = len(call.safe), len(context)
        if call.rows not in (n, 2 * n):
            raise NotErased(f"the denoiser got {call.rows} rows for {n} prompts: SAFREE cannot tell which are which")
        filtering = call.last_step >= step
        positive = torch.where(filtering[:, None, None].to(context.device), call.safe, call.original).to(context)
        inputs[self.family.context] = torch.cat([context[: call.rows - n], positive])
        call.active = filtering if self.method.reattention and self.scales else torch.zeros_like(filtering)
        if call.active.any():
            rows = call.rows - n + call.active.nonzero()[:, 0]
            for key, value in inputs.items():
                inputs[key] = _with_copies(value, rows, call.rows)
            inputs[self.family.context][call.rows :] = call.original[call.active.to(call.original.device)].to(context)

    def after_step(self, prediction: Tensor) -> Tensor:
        assert self.call is not None
        return prediction[: self.call.rows]

    def reattend(self, module: nn.Module, features: Tensor) -> Tensor:
        call = self.call
        if call is None or not call.active.any():
            return features
        hidden, scale = self.scales[module]
        rows = call.rows - len(call.safe) + call.active.nonzero()[:, 0]
        features = features.clone()
        features[rows, hidden:] = reattend(features[rows, hidden:], features[call.rows :, hidden:], scale)
        return features


def _with_copies(value: Any, rows: Tensor, batch: int) -> Any:
    """``value`` with ``rows`` of every batched tensor in it appended: the third branch of whatever the pipeline passes."""
    if isinstance(value, Tensor):
        return torch.cat([value, value[rows.to(value.device)]]) if value.ndim and len(value) == batch else value
    if isinstance(value, dict):
        return {k: _with_copies(v, rows, batch) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_with_copies(v, rows, batch) for v in value)
    return value
