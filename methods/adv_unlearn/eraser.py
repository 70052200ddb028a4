"""Changed parameters of text encoders: named so that every pipeline with the same encoder takes them, and guarded while attached."""

from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from erasure.errors import NothingAttached
from erasure.families import Family
from erasure.lora import ENCODER, live_name
from erasure.method import WeightEraser
from erasure.seams import prompt
from erasure.seams.issued import Issued
from erasure.text import encoders

TextPart = Literal["text", "text_attn", "text_mlp"]
"""Of the CLIP encoders: all blocks and the last norm, attention alone, feed-forwards alone."""
INSIDE: dict[str, tuple[str, ...]] = {
    "text": ("encoder.layers", "final_layer_norm"),
    "text_attn": ("self_attn",),
    "text_mlp": ("mlp",),
}
"""Parts of dotted names."""


@dataclass(frozen=True)
class TextWeights(WeightEraser):
    """A weight eraser of text encoders: ``text_encoder.text_model.encoder.layers.0…``, with the prefix that files have.

    While attached, embeddings that were made before do not pass: the denoiser is the base's, and would paint the concept from them.
    """

    def seams(self, pipe: Any, family: Family) -> Iterable[AbstractContextManager[int]]:
        yield from super().seams(pipe, family)
        if self.changed:
            yield prompt.encoding(pipe, family, Issued(family))

    def values(self, pipe: Any) -> Mapping[str, Tensor]:
        return {live(pipe, name): tensor for name, tensor in self.changed.items()}

    def writes(self) -> Set[str]:
        return self.changed.keys()


def filed(name: str) -> str:
    """A parameter's dotted name as transformers 4 and all files have it."""
    component, _, path = name.partition(".")
    return f"{component}.{ENCODER}{path.removeprefix(ENCODER)}"


def live(pipe: Any, name: str) -> str:
    """A parameter's dotted name in the model that is loaded; a pipeline without that text encoder raises."""
    component, _, path = name.partition(".")
    if (module := getattr(pipe, component, None)) is None:
        raise NothingAttached(f"{type(pipe).__name__} has no {component}, which the eraser changes")
    return f"{component}.{live_name(module, path)}"


def parameters(pipe: Any, family: Family, part: TextPart, layers: Sequence[str]) -> list[str]:
    """Dotted names (with the component) of what is trained in the CLIP encoders of a pipeline, or of these in ``layers``.

    Blocks behind the last one that the pipeline reads are left out. Errors: a layer that is nowhere in that part raises.
    """
    found: list[str] = []
    for encoder in encoders(pipe, family):
        if encoder.kind != "clip":
            continue
        module = getattr(pipe, encoder.component)
        deaf = _deaf(module.config.num_hidden_layers, -1 if encoder.pooled else encoder.layer)
        names = [name for name, _ in module.named_parameters() if _within(name, INSIDE[part]) and not _within(name, deaf)]
        found += [f"{encoder.component}.{name}" for name in names]
    if missing := [layer for layer in layers if not any(_within(name, (layer,)) for name in found)]:
        known = f"({found[0]}, …)" if found else "(it has none)"
        raise NothingAttached(
            f"{type(pipe).__name__} has no layer {missing[0]!r} among those that {part} trains in its CLIP encoders {known}"
        )
    return [name for name in found if _within(name, layers)] if layers else found


def _deaf(blocks: int, layer: int) -> tuple[str, ...]:
    """Parts that nothing is read from, where token states come from hidden_states[layer] and no pooled vector is wanted."""
    return () if layer == -1 else ("final_layer_norm", *(f"encoder.layers.{i}" for i in range(blocks + 1 + layer, blocks)))


def _within(name: str, parts: Iterable[str]) -> bool:
    return any(f".{_bare(part)}." in f".{_bare(name)}." for part in parts)


def _bare(name: str) -> str:
    """A dotted name without the prefix that files have and models have by version."""
    return name.removeprefix(ENCODER).replace(f".{ENCODER}", ".")
