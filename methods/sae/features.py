"""A concept's features, explained: what turns each of them on, who shares them, and what the model makes with more or less of one."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from erasure.errors import ErasureError
from erasure.families import Encoder, call_options, family_of

from ..itd import ItDEraser, Switch
from .hookpoints import editing, layers
from .interpret import Match, all_peaks, concept_scores, faint, read, sharers, top_prompts
from .prompts import prompts_of, retained_phrases

FACTORS = (-8.0, -2.0, 0.0, 1.0, 4.0, 8.0)
SHOWN = 6
"""Prompts, concepts and phrases that are listed of each."""


@dataclass(frozen=True)
class Feature:
    """A feature that is switched off, and what is known of it."""

    hookpoint: str
    index: int
    score: float
    """Mean over the target's own prompts of its code of largest size, with the sign."""
    concepts: list[tuple[str, float]]
    """Concepts that turn it on most, with the mean over their prompts."""
    prompts: list[Match]
    shared: list[tuple[str, float]]
    """Retained phrases that have a little of it, with the mean over their prompts."""
    example: str
    """The target's prompt that turns it on most."""


@dataclass(frozen=True)
class Spared:
    """A feature that the target has and that stays on, for the sake of retained phrases."""

    hookpoint: str
    index: int
    score: float
    phrases: tuple[str, ...]


@dataclass(frozen=True)
class Explained:
    """All features of a concept: those that are switched off by falling score, and those that stay on."""

    features: list[Feature]
    spared: list[Spared]


def explain(pipe: Any, eraser: ItDEraser, probes: Sequence[tuple[str, tuple[str, ...]]]) -> Explained:
    """What the features of an eraser's concepts are for.

    probes: (prompt, names of the concepts that it asks for); top prompts and top concepts are among these.
    """
    if not probes:
        raise ErasureError("features are explained by the prompts that turn them on, and there are none: give one at least")
    features: list[Feature] = []
    spared: list[Spared] = []
    for encoder, switch in eraser.switches(pipe, family_of(pipe)):
        texts = [text for concept in eraser.concepts for text in prompts_of(concept, concept.targets)]
        own = all_peaks(pipe, encoder, switch, texts)
        kept = {phrase: all_peaks(pipe, encoder, switch, prompts) for phrase, prompts in retained_phrases(eraser.concepts).items()}
        place = f"{encoder.component}.layers.{switch.layer}"
        features += _features(pipe, encoder, switch, probes, texts, own, kept, place)
        chosen = set(switch.features.tolist())
        shared = sharers(own, kept, eraser.method.k)
        spared += [Spared(place, i, float(own[:, i].mean()), phrases) for i, phrases in shared.items() if i not in chosen]
    return Explained(sorted(features, key=lambda one: -abs(one.score)), sorted(spared, key=lambda one: -abs(one.score)))


def _features(
    pipe: Any,
    encoder: Encoder,
    switch: Switch,
    probes: Sequence[tuple[str, tuple[str, ...]]],
    texts: Sequence[str],
    own: Tensor,
    kept: Mapping[str, Tensor],
    place: str,
) -> Iterable[Feature]:
    reading = read(pipe, encoder, switch, switch.features, [prompt for prompt, _ in probes])
    groups: dict[str, list[int]] = {}
    for i, (_, names) in enumerate(probes):
        for name in names:
            groups.setdefault(name, []).append(i)
    for column, index in enumerate(switch.features.tolist()):
        yield Feature(
            place,
            index,
            float(own[:, index].mean()),
            concept_scores(reading.peaks[:, column], groups)[:SHOWN],
            top_prompts(reading, column, SHOWN),
            faint(index, kept)[:SHOWN],
            texts[int(own[:, index].abs().argmax())],
        )


def scaled(switch: Switch, x: Tensor, features: Tensor, factors: Tensor) -> Tensor:
    """Activations x [batch, tokens, d] with codes of ``features`` int [f] times factors [batch]; what the coder misses stays."""
    codes = switch.coder.encode(x)[:, switch.first :, features]
    out = x.clone()
    out[:, switch.first :] += ((factors - 1)[:, None, None] * codes) @ switch.coder.W_dec[features]
    return out


def strip(
    pipe: Any,
    eraser: ItDEraser,
    prompt: str,
    features: Mapping[str, Sequence[int]],
    factors: Sequence[float] = FACTORS,
    *,
    seed: int = 0,
    steps: int = 20,
    **options: Any,
) -> list[Any]:
    """PIL images of a prompt from one seed, with features (hookpoint -> indices) times each factor. The negative prompt is left alone."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        for encoder, switch in eraser.switches(pipe, family_of(pipe)):
            if indices := features.get(f"{encoder.component}.layers.{switch.layer}"):
                stack.enter_context(editing(layers(pipe, encoder)[switch.layer], _once(switch, indices, factors)))
        generators = [torch.Generator("cpu").manual_seed(seed) for _ in factors]
        made = pipe([prompt] * len(factors), num_inference_steps=steps, generator=generators, **call_options(pipe), **options)
    return list(made.images)


def _once(switch: Switch, features: Sequence[int], factors: Sequence[float]) -> Any:
    """An edit of what an encoder reads first: in every family, the positive prompts."""
    left = [True]

    def edit(states: Tensor) -> Tensor | None:
        if not left:
            return None
        left.clear()
        of = torch.tensor(features, device=states.device), torch.tensor(factors, device=states.device, dtype=torch.float32)
        return scaled(switch, states.float(), *of).to(states)

    return edit
