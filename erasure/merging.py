"""Several LoRA experts as one: the exact average or sum, TIES, and a reading of SafetyDPO's co-merge."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from .adapter import AdapterEraser
from .errors import ErasureError
from .export.lora import factorise
from .lora import by_component, live_name
from .method import Eraser

Rule = Literal["average", "sum", "ties", "co-merge"]
Expert = Mapping[str, Tensor]
"""LoRA factors by the keys of diffusers' files."""
ROUNDING = 1e-6
"""Share of a change that may be lost where nothing is cut."""


def delta(pair: Mapping[str, Tensor]) -> Tensor:
    """What a LoRA layer adds to its weight: B A [out, in]."""
    return pair["B"] @ pair["A"]


def added(experts: Sequence[Expert], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Σ wᵢ Bᵢ Aᵢ exactly, as a LoRA whose rank is the sum of ranks: A stacked, B side by side with the weights (1 each) in it."""
    merged: dict[str, Tensor] = {}
    for name, pairs in layers_of(experts).items():
        scales = [1.0 if weights is None else weights[i] for i, _ in pairs]
        merged[f"{name}.lora_A.weight"] = torch.cat([pair["A"] for _, pair in pairs])
        merged[f"{name}.lora_B.weight"] = torch.cat([scale * pair["B"] for scale, (_, pair) in zip(scales, pairs, strict=True)], dim=1)
    return merged


def ties(deltas: Tensor, density: float = 1.0) -> Tensor:
    """TIES merging of changes [experts, out, in] to [out, in]: trim, elect signs, and average those that agree.

    Of each expert the share ``density`` of entries that are largest by size stays; the sign of an entry is that of the sum over
    experts; the mean is over experts of that sign which kept theirs. Source: Yadav et al., NeurIPS 2023.
    """
    if not 0 < density <= 1:
        raise ErasureError(f"density is {density:g}; it is the share of entries that stay, above 0 and up to 1")
    flat = deltas.flatten(1)
    keep = max(round(density * flat.shape[1]), 1)
    trimmed = torch.zeros_like(flat)
    top = flat.abs().topk(keep, dim=1).indices
    trimmed.scatter_(1, top, flat.gather(1, top))
    sign = trimmed.sum(0).sign()
    agree = (trimmed.sign() == sign) & (trimmed != 0)
    mean = (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)
    return mean.view(deltas.shape[1:])


def co_merge(deltas: Tensor, wins: Tensor) -> Tensor:
    """Rows of changes [experts, out, in], each from the expert that wins it most often [experts, out]; tied ones averaged.

    Our reading of SafetyDPO's Co-Merge, whose code was never released: a row's wins count calibration inputs on which that expert's
    change of the output is the largest.
    """
    best = (wins == wins.amax(0)).to(deltas)
    return (deltas * (best / best.sum(0))[..., None]).sum(0)


def activations(pairs: Sequence[Mapping[str, Tensor]], inputs: Tensor) -> Tensor:
    """How much each expert changes each output, |B A x| averaged over tokens: [experts, batch, out] of inputs [batch, tokens, in]."""
    x = inputs if inputs.ndim > 2 else inputs[:, None]
    return torch.stack([(x.to(p["A"]) @ p["A"].T @ p["B"].T).abs().flatten(1, -2).mean(1) for p in pairs])


def layers_of(experts: Sequence[Expert]) -> dict[str, list[tuple[int, dict[str, Tensor]]]]:
    """Name of a layer -> (expert, its pair of factors) of all experts that have it; none at all raises."""
    if not experts:
        raise ErasureError("there is no expert to merge: give at least one")
    found: dict[str, list[tuple[int, dict[str, Tensor]]]] = {}
    for i, expert in enumerate(experts):
        for component, layers in by_component(expert).items():
            for layer, pair in layers.items():
                found.setdefault(f"{component}.{layer}", []).append((i, pair))
    for name, pairs in found.items():
        if len({(len(pair["B"]), pair["A"].shape[1]) for _, pair in pairs}) > 1:
            raise ErasureError(f"the experts' layers {name} have different shapes: they are of different bases")
    return found


def merge(
    experts: Sequence[Expert],
    rule: Rule = "average",
    *,
    rank: int | None = None,
    density: float = 0.5,
    wins: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], float]:
    """One LoRA of several, and the share of the merged change's norm that the cut to ``rank`` loses (0 where nothing is cut).

    Without a rank, the LoRA holds the merged change, whole but for rounding: the sum of ranks for an average or a sum, and at most the
    smaller side of a layer for other rules. One expert comes back as it is, unless TIES trims it or it is cut. An expert that lacks a
    layer leaves it unchanged, and counts in the mean as zero. ``wins``: layer -> [experts, out], which co-merge needs; see `count_wins`.
    """
    if rank is not None and rank < 1:
        raise ErasureError(f"rank is {rank}; a LoRA has at least 1")
    layers = layers_of(experts)
    whole = rule in ("average", "sum") or (len(experts) == 1 and (rule == "co-merge" or density == 1))
    if whole and rank is None:
        return added(experts, None if rule == "sum" else [1 / len(experts)] * len(experts)), 0.0
    merged: dict[str, Tensor] = {}
    lost, norm = 0.0, 0.0
    for name, pairs in layers.items():
        first = delta(pairs[0][1])
        deltas = first.new_zeros(len(experts), *first.shape)
        for i, pair in pairs:
            deltas[i] = delta(pair)
        match "average" if whole and rule != "sum" else rule:
            case "average":
                change = deltas.mean(0)
            case "sum":
                change = deltas.sum(0)
            case "ties":
                change = ties(deltas, density)
            case "co-merge":
                if wins is None:
                    raise ErasureError("co-merge needs calibration: the wins of each expert, counted on a base")
                change = co_merge(deltas, wins[name].to(deltas))
        left, right, missing = factorise(change, rank, None if rank else ROUNDING)
        merged[f"{name}.lora_A.weight"], merged[f"{name}.lora_B.weight"] = right.to(change), left.to(change)
        size = float(change.square().sum())
        lost, norm = lost + missing**2 * size, norm + size
    return merged, (lost / norm) ** 0.5 if norm else 0.0


@torch.no_grad()
def count_wins(
    pipe: Any, experts: Sequence[Expert], prompts: Sequence[str], *, steps: int, seed: int = 0, **options: Any
) -> dict[str, Tensor]:
    """Layer -> wins [experts, out]: calls of the layer, over the base's own runs of prompts, in which an expert changes an output most."""
    named = layers_of(experts)
    wins = {name: torch.zeros(len(experts), len(pairs[0][1]["B"])) for name, pairs in named.items()}
    with _watched(pipe, named, wins):
        for i, prompt in enumerate(prompts):
            draw = torch.Generator().manual_seed(seed + i)
            pipe(prompt, num_inference_steps=steps, generator=draw, output_type="latent", **options)
    return wins


@contextmanager
def _watched(pipe: Any, named: Mapping[str, list[tuple[int, dict[str, Tensor]]]], wins: dict[str, Tensor]) -> Iterator[None]:
    handles = []
    for name, pairs in named.items():
        component, _, layer = name.partition(".")
        module = getattr(pipe, component)

        def count(_: Any, inputs: tuple[Tensor, ...], name: str = name, pairs: Any = pairs) -> None:
            found = activations([pair for _, pair in pairs], inputs[0].cpu())
            winner = torch.tensor([i for i, _ in pairs])[found.argmax(0)]
            wins[name].scatter_add_(0, winner, torch.ones_like(winner, dtype=wins[name].dtype))

        handles.append(module.get_submodule(live_name(module, layer)).register_forward_pre_hook(count))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def factors_of(eraser: Eraser, source: object) -> Mapping[str, Tensor]:
    """The factors of an expert; an eraser that is none raises."""
    if not isinstance(eraser, AdapterEraser):
        raise ErasureError(
            f"{source} holds an eraser of kind {eraser.kind}; experts are LoRA adapters, as safety_dpo or esd with rank make"
        )
    return eraser.factors
