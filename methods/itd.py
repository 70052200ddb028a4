"""Interpret-then-Deactivate: a concept's own features in a sparse autoencoder of the text encoder, switched off."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
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
from .sae.formulas import deactivate, distance, gate, select_features, strongest
from .sae.hookpoints import editing, find, layers, read
from .sae.prompts import accompanied, prompts_of, retained
from .sae.sources import coders

__all__ = ["Detected", "ItD", "ItDEraser", "Switch", "deactivate", "distance", "gate", "select_features", "strongest"]
log = logging.getLogger("erasure")

ACTIVATIONS: tuple[str, ...] = get_args(Activation)


@dataclass(frozen=True)
class Switch:
    """What one encoder's edit needs: its coder, where it sits, and each gate's features and threshold."""

    layer: int
    coder: SparseCoder
    owned: tuple[Tensor, ...]
    """Of each gate, the features int [f] that are switched where it opens."""
    threshold: Tensor
    """Of each gate, the change from which it opens, [gates]."""
    first: int
    """Index of the first token that may change: CLIP's start token may not."""

    @property
    def features(self) -> Tensor:
        """All gates' features, int [f], in rising order."""
        return torch.cat(self.owned).unique()

    def sizes(self, method: "ItD", x: Tensor, codes: Tensor) -> Tensor:
        """What each gate compares with its threshold [batch, gates]; its own features alone are switched for that."""
        plain, found = self.coder.decode(codes) if method.gate == "reconstruction" else None, []
        for features in self.owned:
            own = codes[..., features]
            every = torch.arange(len(features), device=x.device)
            moved = (deactivate(own, every, method.factor, self.first) - own) @ self.coder.W_dec[features]
            found.append(moved.square().mean((-2, -1)) if plain is None else distance(x, plain + moved))
        return torch.stack(found, -1)

    def read(self, method: "ItD", x: Tensor) -> Tensor:
        """``sizes`` of activations [batch, tokens, d]."""
        return self.sizes(method, x, self.coder.encode(x))

    def __call__(self, method: "ItD", states: Tensor) -> Tensor:
        """Hidden states [batch, tokens, d], edited by the features of the gates that open; where none does, bit by bit as they were."""
        x = states.float()
        codes = self.coder.encode(x)
        opens = torch.ones_like(self.threshold, dtype=torch.bool).expand(len(x), -1)
        if method.gate != "off":
            opens = self.sizes(method, x, codes) >= self.threshold
        off = torch.zeros(len(x), codes.shape[-1], dtype=torch.bool, device=x.device)
        for i, features in enumerate(self.owned):
            off[:, features] |= opens[:, i, None]
        moved = (deactivate(codes, off, method.factor, self.first) - codes) @ self.coder.W_dec
        edited = x + moved if method.error_term else self.coder.decode(codes) + moved
        return torch.where(off.any(-1)[:, None, None], edited.to(states), states)


@dataclass(frozen=True, kw_only=True)
class ItD(ErasureMethod):
    """Interpret-then-Deactivate (2025): features of a text encoder's coder that a concept has and retained ones have not, times a factor.

    A prompt that the edit moves by less than a share of the least of the concept's own prompts passes bit by bit, so the move is a
    zero-shot detector of the concept too (``erasure sae detect``). Several concepts need no training: each has its features and its gate.
    Only positive prompts are edited, in every text encoder that has a coder. Embeddings that skip the encoders are refused.
    The released code compares a mean with a largest token, adds no error term, and calibrates with another factor than it applies.
    """

    name: ClassVar[str] = "itd"
    paper: ClassVar[str] = "Interpret-then-Deactivate, 2025"
    families: ClassVar[frozenset[str]] = frozenset(NAMES)

    sae: str = ""
    """Folder of a coder, or a folder with one for each hookpoint; empty for what ships with the model."""
    k: int = 8
    """How many of a prompt's strongest features count as its own; the released code takes 128 or 256 of a coder of 524,288. With many, a
    retained prompt claims what it has only a little of, and a style is left without its own features."""
    factor: float = -2.0
    """What the features are multiplied by; the released code takes -8."""
    gate: Literal["change", "reconstruction", "off"] = "change"
    """What is compared with the threshold: how far switching the features moves the activations; as released, how far the edited
    reconstruction is from them, which holds the coder's own error too; or nothing: every prompt is edited."""
    gates: Literal["each", "union"] = "each"
    """Several concepts: each opens its own gate, made from its own prompts, and a prompt is edited by the features of those that open;
    or, as in the paper, one gate over all features, whose threshold is the least over all concepts' prompts, so that with more concepts
    more prompts that have none of them pass it. With one concept both are the same."""
    threshold_scale: float = 0.35
    """The threshold as a share of the least that any target prompt shows, alone or beside other things; the released code takes 0.99,
    which on the canvas lets longer prompts with the concept pass."""
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
            owners = torch.cat([torch.full_like(features, i) for i, features in enumerate(switch.owned)])
            own = {**coder.state_dict(), "features": torch.cat(switch.owned), "owners": owners}
            own |= {"threshold": switch.threshold, "shape": shape}
            tensors |= {f"{encoder.component}.{name}": value for name, value in own.items()}
        return self.eraser(tuple(concepts), tensors)

    def _switch(self, pipe: Any, encoder: Encoder, layer: int, coder: SparseCoder, concepts: Sequence[Concept]) -> Switch:
        switch = Switch(layer, coder, (), torch.zeros(0), 1 if encoder.kind == "clip" else 0)
        owned = self._owned(pipe, encoder, switch, concepts)
        prompts = [[*prompts_of(concept, concept.targets), *accompanied(concept, concepts)] for concept in concepts]
        if self.gates == "union":
            owned, prompts = [torch.cat(owned).unique()], [[text for own in prompts for text in own]]
        least = []
        for features, texts in zip(owned, prompts, strict=True):
            alone = replace(switch, owned=(features,))
            least.append(min(float(alone.read(self, x).min()) for x, _ in read(pipe, encoder, layer, texts)))
        if 0 in least and self.gate == "change":
            log.warning(
                "itd: a target phrase has none of the features in %s, so the gate there opens at the least change", encoder.component
            )
        threshold = torch.tensor([max(self.threshold_scale * one, 1e-12) for one in least])
        return replace(switch, owned=tuple(owned), threshold=threshold)

    def _owned(self, pipe: Any, encoder: Encoder, switch: Switch, concepts: Sequence[Concept]) -> list[Tensor]:
        """Each concept's features; one without any raises."""

        def peaks(texts: Sequence[str]) -> Tensor:
            found = (switch.coder.encode(x) for x, _ in read(pipe, encoder, switch.layer, texts))
            return torch.cat([codes[:, switch.first :].abs().amax(1) for codes in found])

        texts, owned = retained(concepts), []
        kept = peaks(texts)
        for concept in concepts:
            own = peaks(prompts_of(concept, concept.targets))
            owned.append(select_features(own, kept, self.k))
            if not len(owned[-1]):
                raise ErasureError(self._shared(encoder, concept, own, kept, texts))
        return owned

    def _shared(self, encoder: Encoder, concept: Concept, own: Tensor, kept: Tensor, texts: Sequence[str]) -> str:
        shared = (strongest(own, self.k) & strongest(kept, self.k)).nonzero().flatten()
        by = [strongest(row[None], self.k)[shared].sum().item() for row in kept]
        names = [texts[i].strip() for i in sorted(range(len(by)), key=lambda i: -by[i])[:4] if by[i]]
        return (
            f"itd: {encoder.component} has no feature of {concept.name!r} that no retained prompt has too; shared are "
            f"{', '.join(map(str, shared[:8].tolist())) or 'none, since none is on'}{', ...' if len(shared) > 8 else ''}"
            f"{', by ' + ', '.join(map(repr, names)) if names else ''}: retain less, lower k, or take a coder with more latents"
        )

    def eraser(self, concepts: tuple[Concept, ...], tensors: Mapping[str, Tensor]) -> "ItDEraser":
        components = {name.split(".")[0] for name in tensors}
        wanted = {"encoder.weight", "encoder.bias", "W_dec", "b_dec", "features", "owners", "threshold", "shape"}
        for component in components:
            if lost := wanted - {name.removeprefix(f"{component}.") for name in tensors}:
                raise ErasureError(f"itd needs {', '.join(sorted(lost))} of {component}, which are not there")
            features, owners, threshold = (tensors[f"{component}.{name}"] for name in ("features", "owners", "threshold"))
            if owners.shape != features.shape or threshold.dim() != 1 or not torch.isin(owners, torch.arange(len(threshold))).all():
                raise ErasureError(f"itd: of {component}, {len(features)} features do not all belong to one of {threshold.numel()} gates")
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
    concept: str
    """Whose gate it is: of several, the one that is nearest to its threshold or furthest above it."""


@dataclass(frozen=True)
class ItDEraser(RuntimeEraser):
    """Edits the hidden states of positive prompts inside the text encoders."""

    method: ItD
    held: Mapping[str, Tensor] = field(repr=False)
    """By component: the coder's tensors, ``features`` int [f], ``owners`` int [f] (the gate of each), ``threshold`` [gates], ``shape``
    (layer, k, kind of activation)."""

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
            threshold, features, owners = (own[name].to(device) for name in ("threshold", "features", "owners"))
            owned = tuple(features[owners == i] for i in range(len(threshold)))
            yield encoder, Switch(layer, coder, owned, threshold, 1 if encoder.kind == "clip" else 0)

    def detect(self, pipe: Any, texts: Sequence[str]) -> list["Detected"]:
        """How each text stands to the gate of the first encoder that has one; the pipeline is read, not changed."""
        encoder, switch = next(self.switches(pipe, self.method.family(pipe)))
        sizes = torch.cat([switch.read(self.method, x) for x, _ in read(pipe, encoder, switch.layer, texts)])
        names = [" and ".join(concept.name for concept in self.concepts)]
        if len(switch.owned) > 1:
            names = [concept.name for concept in self.concepts]
        found = []
        for text, size, nearest in zip(texts, sizes, (sizes / switch.threshold).argmax(1).tolist(), strict=True):
            score, threshold = float(size[nearest]), float(switch.threshold[nearest])
            found.append(Detected(text, score, threshold, "concept" if score >= threshold else "other", names[nearest]))
        return found

    def edits(self, pipe: Any, family: Family) -> Iterable[AbstractContextManager[int]]:
        armed: set[str] = set()
        present = list(self.switches(pipe, family))
        if idle := [encoder.component for encoder, switch in present if not len(switch.features)]:
            log.warning("itd: no feature is switched in %s, so every prompt passes there as it is", ", ".join(idle))

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
