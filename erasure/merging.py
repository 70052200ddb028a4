"""Several LoRA experts as one: the exact average or sum, TIES, and a reading of SafetyDPO's co-merge."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from math import inf
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from .adapter import AdapterEraser
from .errors import ErasureError
from .export.lora import factorise
from .lora import by_component, file_name, live_name
from .method import Eraser

Rule = Literal["average", "sum", "ties", "co-merge"]
Trim = Literal["layer", "vector"]
Expert = Mapping[str, Tensor]
"""LoRA factors by the keys of diffusers' files."""
Layers = dict[str, list[tuple[int, dict[str, Tensor]]]]
"""Name of a layer -> (expert, its pair of factors) of all experts that have it."""
DENSITY = 0.2
"""Share of an expert's entries that TIES keeps: the paper's."""
ROUNDING = 1e-6
"""Share of a change that may be lost where nothing is cut."""


def delta(pair: Mapping[str, Tensor]) -> Tensor:
    """What a LoRA layer adds to its weight: B A, [out, in] or, of a convolution, [out, in, height, width]."""
    a, b = pair["A"], pair["B"]
    return (b.flatten(1) @ a.flatten(1)).reshape(len(b), *a.shape[1:])


def added(experts: Sequence[Expert], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Σ wᵢ Bᵢ Aᵢ as a LoRA whose rank is the sum of ranks: A stacked, B side by side with the weights (1 each) in it.

    Exact but for the rounding of wᵢ Bᵢ in the number format that holds all experts.
    """
    merged: dict[str, Tensor] = {}
    layers, dtype = layers_of(experts), _dtype(experts)
    for name, pairs in layers.items():
        scales = [1.0 if weights is None else weights[i] for i, _ in pairs]
        merged[f"{name}.lora_A.weight"] = torch.cat([pair["A"].to(dtype) for _, pair in pairs])
        scaled = [scale * pair["B"].to(dtype) for scale, (_, pair) in zip(scales, pairs, strict=True)]
        merged[f"{name}.lora_B.weight"] = torch.cat(scaled, dim=1)
    return merged


def ties(deltas: Tensor, density: float = 1.0) -> Tensor:
    """TIES merging of changes [experts, ...] to [...]: trim, elect signs, and average those that agree.

    Of each expert the share ``density`` of entries that are largest by size stays. The sign of an entry is that of the sum over experts;
    where this is zero, the one that most entries have; if there is none either, negative entries win, as in the released code. The mean
    is over experts of that sign which kept theirs. Source: Yadav et al., NeurIPS 2023.
    """
    if not 0 < density <= 1:
        raise ErasureError(f"density is {density:g}; it is the share of entries that stay, above 0 and up to 1")
    flat = deltas.flatten(1)
    keep = max(int(density * flat.shape[1]), 1)
    top = flat.abs().topk(keep, dim=1).indices
    trimmed = torch.zeros_like(flat).scatter_(1, top, flat.gather(1, top))
    sign = trimmed.sum(0).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    agree = torch.where(sign > 0, trimmed > 0, trimmed < 0)
    mean = (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)
    return mean.view(deltas.shape[1:])


def ties_of_vectors(deltas: Mapping[str, Tensor], density: float = 1.0) -> dict[str, Tensor]:
    """`ties` with all layers' changes [experts, ...] as one vector an expert, so that some layers keep more than others: the paper's."""
    whole = ties(torch.cat([each.flatten(1) for each in deltas.values()], dim=1), density)
    parts = whole.split([each[0].numel() for each in deltas.values()])
    return {name: part.view(each.shape[1:]) for (name, each), part in zip(deltas.items(), parts, strict=True)}


def co_merge(deltas: Tensor, wins: Tensor) -> Tensor:
    """Rows of changes [experts, out, ...], each from the expert that wins it most often [experts, out]; tied ones averaged.

    Our reading of SafetyDPO's Co-Merge, whose code was never released: a row's wins count calibration inputs on which that expert's
    change of the output is the largest.
    """
    best = (wins == wins.amax(0)).to(deltas)
    return torch.einsum("eo,eo...->o...", best / best.sum(0), deltas)


def activations(pairs: Sequence[Mapping[str, Tensor]], inputs: Tensor, **convolution: Any) -> Tensor:
    """How much each expert changes each output, |B A x| averaged over tokens or pixels: [experts, batch, out].

    Inputs are [batch, tokens, in] or [batch, in]; of a convolution [batch, in, height, width], with its stride, padding and dilation.
    """

    def size(a: Tensor, b: Tensor) -> Tensor:
        if a.ndim > 2:
            return conv2d(conv2d(inputs.to(a), a, **convolution), b).abs().flatten(2).mean(2)
        x = inputs if inputs.ndim > 2 else inputs[:, None]
        return linear(linear(x.to(a), a), b).abs().flatten(1, -2).mean(1)

    wide = torch.promote_types(_dtype(pairs), torch.float32)
    return torch.stack([size(pair["A"].to(wide), pair["B"].to(wide)) for pair in pairs])


def _dtype(experts: Sequence[Expert]) -> torch.dtype:
    """The narrowest number format that holds those of all tensors."""
    return reduce(torch.promote_types, (tensor.dtype for expert in experts for tensor in expert.values()))


def layers_of(experts: Sequence[Expert]) -> Layers:
    """The layers of all experts, by one spelling each; none at all raises, and what is no pair or differs in shape."""
    if not any(experts):
        raise ErasureError("there is no expert to merge: give at least one")
    found: Layers = {}
    for i, expert in enumerate(experts):
        for component, layers in by_component(expert).items():
            for layer, pair in layers.items():
                name = f"{component}.{file_name(component, layer)}"
                if pair.keys() != {"A", "B"} or pair["B"].shape[1:] != (len(pair["A"]), *(1 for _ in pair["A"].shape[2:])):
                    raise ErasureError(f"{name} of expert {i + 1} is no pair of lora_A [r, in, ...] and lora_B [out, r, ...] of one rank")
                found.setdefault(name, []).append((i, pair))
    for name, pairs in found.items():
        if len({(len(pair["B"]), pair["A"].shape[1:]) for _, pair in pairs}) > 1:
            raise ErasureError(f"the experts' layers {name} have different shapes: they are of different bases")
    return found


def merge(
    experts: Sequence[Expert],
    rule: Rule = "average",
    *,
    rank: int | None = None,
    density: float = DENSITY,
    trim: Trim = "layer",
    scale: float = 1.0,
    wins: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], float]:
    """One LoRA of several, and the share of the merged change's norm that the cut to ``rank`` loses (0 where nothing is cut).

    Without a rank, the LoRA holds the merged change, whole but for rounding: the sum of ranks for an average or a sum, in the number
    format that holds all experts, and at most the smaller side of a layer for other rules, in float32 at least. One expert comes back
    as it is, unless TIES trims it, or it is cut or scaled. An expert that lacks a layer leaves it unchanged, and counts in the mean as
    zero. TIES keeps the share ``density`` of each layer of an expert, as peft does, or of all its layers as one ``vector``, as the
    paper does (all changes are in memory then). ``scale``: λ, by which the merged change is multiplied. ``wins``: layer ->
    [experts, out], which co-merge needs; see `count_wins`.
    """
    layers = layers_of(experts)
    if len(experts) == 1 and (rule == "co-merge" or (rule == "ties" and density == 1)):
        rule = "average"
    _check(layers, rule, rank, trim, scale, wins)
    if rule in ("average", "sum") and rank is None:
        return added(experts, [scale if rule == "sum" else scale / len(experts)] * len(experts)), 0.0
    merged: dict[str, Tensor] = {}
    lost, norm = 0.0, 0.0
    wide = torch.promote_types(_dtype(experts), torch.float32)
    deltas = ((name, _stacked(pairs, len(experts), wide)) for name, pairs in layers.items())
    for name, change in _changes(deltas, rule, density, trim, wins or {}):
        left, right, missing = factorise(scale * change, rank, None if rank else ROUNDING)
        merged[f"{name}.lora_A.weight"], merged[f"{name}.lora_B.weight"] = right.to(wide), left.to(wide)
        size = float(change.square().sum())
        lost, norm = lost + missing**2 * size, norm + size
    return merged, (lost / norm) ** 0.5 if norm else 0.0


def _check(layers: Layers, rule: str, rank: int | None, trim: str, scale: float, wins: Mapping[str, Tensor] | None) -> None:
    for what, given, known in (("rule", rule, get_args(Rule)), ("trim", trim, get_args(Trim))):
        if given not in known:
            raise ErasureError(f"{what} is {given!r}; choose one of {', '.join(known)}")
    if rank is not None and rank < 1:
        raise ErasureError(f"rank is {rank}; a LoRA has at least 1")
    if not 0 < scale < inf:
        raise ErasureError(f"scale is {scale:g}; it multiplies the merged change, and is finite and above 0")
    if rule == "co-merge" and (uncounted := layers.keys() - (wins or {}).keys()):
        raise ErasureError(f"co-merge needs calibration: the wins of each expert, counted on a base, and has none of {min(uncounted)}")


def _stacked(pairs: Sequence[tuple[int, Mapping[str, Tensor]]], experts: int, dtype: torch.dtype) -> Tensor:
    """Changes of a layer by all experts [experts, out, in, ...]; those that lack it have zeros."""
    a, b = pairs[0][1]["A"], pairs[0][1]["B"]
    deltas = a.new_zeros(experts, len(b), *a.shape[1:], dtype=dtype)
    for i, pair in pairs:
        deltas[i] += delta({side: tensor.to(dtype) for side, tensor in pair.items()})
    return deltas


def _changes(
    deltas: Iterator[tuple[str, Tensor]], rule: Rule, density: float, trim: Trim, wins: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The merged change of each layer."""
    if rule == "ties" and trim == "vector":
        yield from ties_of_vectors(dict(deltas), density).items()
        return
    for name, each in deltas:
        match rule:
            case "average":
                yield name, each.mean(0)
            case "sum":
                yield name, each.sum(0)
            case "ties":
                yield name, ties(each, density)
            case "co-merge":
                yield name, co_merge(each, wins[name])


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
def _watched(pipe: Any, named: Layers, wins: dict[str, Tensor]) -> Iterator[None]:
    handles = []
    for name, pairs in named.items():
        component, _, layer = name.partition(".")
        module = getattr(pipe, component)

        def count(watched: Any, inputs: tuple[Tensor, ...], name: str = name, pairs: Any = pairs) -> None:
            options = {key: getattr(watched, key) for key in ("stride", "padding", "dilation")} if isinstance(watched, nn.Conv2d) else {}
            found = activations([pair for _, pair in pairs], inputs[0].cpu(), **options)
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
