"""Interpret-then-Deactivate: a concept's own features in a sparse autoencoder of the text encoder, switched off."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from erasure.concept import Concept
from erasure.errors import ErasureError
from erasure.families import NAMES, Encoder, Family
from erasure.method import ErasureMethod, Run, RuntimeEraser
from erasure.seams import prompt
from erasure.seams.issued import Issued

from .sae.coder import Activation, SparseCoder, SparseCoderConfig
from .sae.hookpoints import activations, editing, find, layers
from .sae.sources import coders

log = logging.getLogger("erasure")

ACTIVATIONS: tuple[str, ...] = get_args(Activation)
TEMPLATES: dict[str, tuple[str, ...]] = {
    "style": ("{}", "a picture in {} style", "{} art"),
    "other": ("{}", "a {}", "a picture of a {}"),
}
BATCH = 64
"""Prompts that are read at once."""


def select_features(target_codes: Tensor, retain_codes: Tensor, k: int) -> Tensor:
    """Features among the k strongest of any target prompt and of no retained prompt, int [f], in rising order.

    Codes [prompts, n] are each prompt's largest over its tokens without the start token; [prompts, tokens, n] are reduced to that here,
    and their first token is taken for the start. A feature that is off (0) is nobody's, whatever k.
    """
    own, kept = strongest(target_codes, k), strongest(retain_codes, k)
    return (own & ~kept).nonzero().flatten()


def strongest(codes: Tensor, k: int) -> Tensor:
    """S, joined over prompts: bool [n], the k features of largest size of any prompt; codes as in ``select_features``."""
    size = codes.abs()
    if size.dim() == 3:
        size = size[:, 1:].amax(1)
    found = torch.zeros(size.shape[-1], dtype=torch.bool, device=size.device)
    if len(size):
        values, indices = size.topk(min(k, size.shape[-1]), dim=-1)
        found[indices[values > 0]] = True
    return found


def deactivate(codes: Tensor, features: Tensor, factor: float, first: int = 1) -> Tensor:
    """Codes [..., tokens, n] with ``features`` int [f] times ``factor``, from token ``first`` on: CLIP's start token is left alone."""
    out = codes.clone()
    out[..., first:, features] = factor * out[..., first:, features]
    return out


def distance(x: Tensor, reconstruction: Tensor) -> Tensor:
    """m: mean over tokens and channels of (reconstruction - x)², [...] for [..., tokens, d]."""
    return (reconstruction - x).square().mean((-2, -1))


def gate(x: Tensor, reconstruction: Tensor, threshold: float | Tensor) -> Tensor:
    """Whether a prompt has the concept: bool [...] for x [..., tokens, d], where the mean distance reaches the threshold.

    The threshold is a mean like m itself; the released code sets it, for celebrities, from the largest token of each prompt, which the
    mean over tokens cannot reach.
    """
    return distance(x, reconstruction) >= threshold


def prompts_of(concept: Concept, phrases: Sequence[str]) -> list[str]:
    """Phrases in the templates of a concept's kind."""
    return [template.format(phrase) for phrase in phrases for template in TEMPLATES.get(concept.kind, TEMPLATES["other"])]


def retained(concepts: Sequence[Concept]) -> list[str]:
    """Prompts whose features stay: retained phrases, anchors and the templates without a phrase; nothing that is a target."""
    targets = {target.casefold() for concept in concepts for target in concept.targets}
    phrases = [(concept, phrase) for concept in concepts for phrase in ("", *concept.anchors, *concept.retain)]
    kept = [text for concept, phrase in phrases if phrase.casefold() not in targets for text in prompts_of(concept, (phrase,))]
    return list(dict.fromkeys(kept))


@dataclass(frozen=True)
class Switch:
    """What one encoder's edit needs: its coder, where it sits, which features are off and from which change on a prompt is edited."""

    layer: int
    coder: SparseCoder
    features: Tensor
    threshold: Tensor
    first: int
    """Index of the first token that may change: CLIP's start token may not."""

    def edited(self, method: "ItD", x: Tensor) -> tuple[Tensor, Tensor]:
        """The edited activations [batch, tokens, d] of x, and what the gate compares with the threshold [batch]."""
        codes = self.coder.encode(x)
        moved = (deactivate(codes, self.features, method.factor, self.first) - codes) @ self.coder.W_dec
        reconstruction = self.coder.decode(codes) + moved
        size = moved.square().mean((-2, -1)) if method.gate == "change" else distance(x, reconstruction)
        return (x + moved if method.error_term else reconstruction), size

    def __call__(self, method: "ItD", states: Tensor) -> Tensor:
        """Hidden states [batch, tokens, d] with the prompts edited that pass the gate; the others bit by bit as they were."""
        x = states.float()
        edited, size = self.edited(method, x)
        passes = torch.ones_like(size, dtype=torch.bool) if method.gate == "off" else size >= self.threshold
        return torch.where(passes[:, None, None], edited.to(states), states)


@dataclass(frozen=True, kw_only=True)
class ItD(ErasureMethod):
    """Interpret-then-Deactivate (2025): features of a text encoder's coder that a concept has and retained ones have not, times a factor.

    A prompt that the edit moves by less than the least of the concept's own prompts passes bit by bit, so the move is a zero-shot detector
    of the concept as well (``erasure sae detect``). Several concepts are the union of their features; nothing is trained.
    Only positive prompts are edited, in every text encoder that has a coder. Embeddings that skip the encoders are refused.
    The released code compares a mean with a largest token, adds no error term, and calibrates with another factor than it applies.
    """

    name: ClassVar[str] = "itd"
    paper: ClassVar[str] = "Interpret-then-Deactivate, 2025"
    families: ClassVar[frozenset[str]] = frozenset(NAMES)

    sae: str = ""
    """Folder of a coder, or a folder with one for each hookpoint; empty for what ships with the model."""
    k: int = 16
    """How many of a prompt's strongest features count as its own; the released code takes 128 or 256 of a coder of 524,288."""
    factor: float = -2.0
    """What the features are multiplied by; the released code takes -8."""
    gate: Literal["change", "reconstruction", "off"] = "change"
    """What is compared with the threshold: how far switching the features moves the activations; as released, how far the edited
    reconstruction is from them, which holds the coder's own error too; or nothing: every prompt is edited."""
    threshold_scale: float = 0.5
    """The threshold as a share of the least that any target prompt shows; the released code takes 0.99, which on the canvas lets longer
    prompts with the concept pass."""
    error_term: bool = True
    """Keep what the coder does not reconstruct, so that the features alone move. The released code drops it."""

    def __post_init__(self) -> None:
        if self.k < 1 or not self.threshold_scale > 0:
            raise ErasureError(f"itd: k is {self.k} and threshold_scale {self.threshold_scale}; take a k of at least 1 and a scale above 0")

    def fit(self, pipe: Any, concepts: Sequence[Concept], *, run: Run = Run()) -> "ItDEraser":
        family = self.family(pipe)
        if not concepts:
            raise ErasureError("itd was given no concept to erase")
        tensors: dict[str, Tensor] = {}
        for coder in coders(pipe, family, self.sae):
            encoder, layer = find(pipe, family, coder.config.hookpoint)
            switch = self._switch(pipe, encoder, layer, coder, concepts)
            shape = torch.tensor([layer, coder.config.k, ACTIVATIONS.index(coder.config.activation)])
            own = {**coder.state_dict(), "features": switch.features, "threshold": switch.threshold, "shape": shape}
            tensors |= {f"{encoder.component}.{name}": value for name, value in own.items()}
        return self.eraser(tuple(concepts), tensors)

    def _switch(self, pipe: Any, encoder: Encoder, layer: int, coder: SparseCoder, concepts: Sequence[Concept]) -> Switch:
        first = 1 if encoder.kind == "clip" else 0
        targets = [text for concept in concepts for text in prompts_of(concept, concept.targets)]
        read = [list(_read(pipe, encoder, layer, texts)) for texts in (targets, retained(concepts))]
        own, kept = (torch.cat([coder.encode(x)[:, first:].abs().amax(1) for x in part]) for part in read)
        features = select_features(own, kept, self.k)
        if not len(features):
            raise ErasureError(self._shared(encoder, own, kept, concepts))
        switch = Switch(layer, coder, features, torch.zeros(()), first)
        least = min(float(switch.edited(self, x)[1].min()) for x in read[0])
        if least == 0 and self.gate == "change":
            log.warning(
                "itd: a target phrase has none of the features in %s, so the gate there opens at the least change", encoder.component
            )
        return Switch(layer, coder, features, torch.tensor(max(self.threshold_scale * least, 1e-12)), first)

    def _shared(self, encoder: Encoder, own: Tensor, kept: Tensor, concepts: Sequence[Concept]) -> str:
        shared = (strongest(own, self.k) & strongest(kept, self.k)).nonzero().flatten().tolist()
        names = ", ".join(repr(concept.name) for concept in concepts)
        return (
            f"itd: {encoder.component} has no feature of {names} that no retained prompt has too; shared are "
            f"{', '.join(map(str, shared[:8])) or 'none, since none is on'}{', ...' if len(shared) > 8 else ''}: "
            "retain less, lower k, or take a coder with more latents"
        )

    def eraser(self, concepts: tuple[Concept, ...], tensors: Mapping[str, Tensor]) -> "ItDEraser":
        components = {name.split(".")[0] for name in tensors}
        wanted = {"encoder.weight", "encoder.bias", "W_dec", "b_dec", "features", "threshold", "shape"}
        for component in components:
            if lost := wanted - {name.removeprefix(f"{component}.") for name in tensors}:
                raise ErasureError(f"itd needs {', '.join(sorted(lost))} of {component}, which are not there")
        if not components:
            raise ErasureError("itd needs the tensors of one text encoder at least")
        return ItDEraser(self, concepts, dict(tensors))


@dataclass(frozen=True)
class Detected:
    """What the gate says of a prompt."""

    prompt: str
    score: float
    """How far switching the features moves its activations: what the gate compares."""
    threshold: float
    decision: str
    """``concept`` or ``other``."""


@dataclass(frozen=True)
class ItDEraser(RuntimeEraser):
    """Edits the hidden states of positive prompts inside the text encoders."""

    method: ItD
    held: Mapping[str, Tensor] = field(repr=False)
    """By component: the coder's tensors, ``features`` int [f], ``threshold`` [], ``shape`` (layer, k, kind of activation)."""

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.held)

    def switches(self, pipe: Any, family: Family) -> Iterator[tuple[Encoder, Switch]]:
        """Each encoder's edit, on the pipeline's device."""
        for encoder in family.encoders:
            own = {
                name.removeprefix(f"{encoder.component}."): value
                for name, value in self.held.items()
                if name.startswith(f"{encoder.component}.")
            }
            if not own:
                continue
            layer, k, kind = own["shape"].tolist()
            weight = own["encoder.weight"]
            config = SparseCoderConfig(d_in=weight.shape[1], num_latents=len(weight), k=k, activation=ACTIVATIONS[kind])  # type: ignore[arg-type]
            find(pipe, family, f"{encoder.component}.layers.{layer}")
            device = pipe._execution_device
            names = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
            coder = SparseCoder.of(config, {name: own[name] for name in names}).to(device)
            yield encoder, Switch(layer, coder, own["features"].to(device), own["threshold"].to(device), 1 if encoder.kind == "clip" else 0)

    def detect(self, pipe: Any, texts: Sequence[str]) -> list["Detected"]:
        """How each text stands to the gate of the first encoder that has one; the pipeline is read, not changed."""
        encoder, switch = next(self.switches(pipe, self.method.family(pipe)))
        scores = [switch.edited(self.method, x)[1] for x in _read(pipe, encoder, switch.layer, texts)]
        threshold = float(switch.threshold)
        decisions = ("concept" if score >= threshold else "other" for score in torch.cat(scores).tolist())
        return [
            Detected(text, score, threshold, decision)
            for text, score, decision in zip(texts, torch.cat(scores).tolist(), decisions, strict=True)
        ]

    def edits(self, pipe: Any, family: Family) -> Iterable[AbstractContextManager[int]]:
        armed: set[str] = set()
        present = list(self.switches(pipe, family))

        def arm(arguments: prompt.Arguments, side: prompt.Side) -> None:
            armed.clear()
            if side != "negative":  # positive prompts come first in every family, so each encoder's first reading is theirs
                armed.update(encoder.component for encoder, _ in present)

        def edit(component: str, switch: Switch) -> Callable[[Tensor], Tensor | None]:
            def run(states: Tensor) -> Tensor | None:
                if component not in armed:
                    return None
                armed.discard(component)
                return switch(self.method, states)

            return run

        for encoder, switch in present:
            yield editing(layers(pipe, encoder)[switch.layer], edit(encoder.component, switch))
        yield prompt.encoding(pipe, family, Issued(family), before=arm)


def _read(pipe: Any, encoder: Encoder, layer: int, texts: Sequence[str]) -> Iterator[Tensor]:
    for start in range(0, len(texts), BATCH):
        yield activations(pipe, encoder, layer, texts[start : start + BATCH])[0]
