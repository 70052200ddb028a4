"""SAFREE worked out slowly, in float64 and token by token from the paper's description, for its tests to compare with."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erasure.families import family_of
from tests.tiny import T5_TOKENS

Matrix = np.ndarray[Any, Any]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_projector(phrases: Tensor) -> Matrix:
    columns = phrases.double().numpy().T
    return np.asarray(columns @ np.linalg.pinv(columns.T @ columns) @ columns.T)


def naive_triggers(masked: Tensor, toxic: Tensor, alpha: float) -> list[bool]:
    distances = [float(np.linalg.norm((np.eye(toxic.shape[0]) - toxic.numpy()) @ row)) for row in masked.numpy()]
    found = []
    for i, distance in enumerate(distances):
        rest = distances[:i] + distances[i + 1 :]
        found.append(not (rest and distance < (1 + alpha) * sum(rest) / len(rest)))
    return found


def dft(size: int) -> np.ndarray[Any, Any]:
    k = np.arange(size)
    return np.exp(-2j * np.pi * np.outer(k, k) / size)


def dense_reattend(safe: Tensor, original: Tensor, scale: float, radius: int, rule: str) -> np.ndarray[Any, Any]:
    """By explicit Fourier matrices: signed frequencies from -radius to radius - 1, where the safe real part exceeds the original's."""
    height, width = safe.shape[-2:]
    rows, columns = dft(height), dft(width)
    f, g = (rows @ x.double().numpy() @ columns.T for x in (safe, original))
    for u in range(-radius, radius):
        for v in range(-radius, radius):
            here, there = f[..., u % height, v % width], g[..., u % height, v % width]
            if rule == "paper":
                f[..., u % height, v % width] = np.where(here.real > there.real, scale * here, here)
            else:
                f[..., u % height, v % width] = np.where(there.real - here.real > 0, here, scale)
    return np.asarray((np.linalg.inv(rows) @ f @ np.linalg.inv(columns).T).real)


@dataclass(frozen=True)
class Part:
    """Where one text encoder's output goes on a tiny pipeline, written down by hand."""

    encoder: str
    rows: slice | None
    columns: slice | None
    pooled: slice | None = None
    layer: int = -2
    """Into the hidden states; 0 stands for the last ones, normed."""

    @property
    def tokenizer(self) -> str:
        return self.encoder.replace("text_encoder", "tokenizer")


CLIP, T5 = slice(0, 77), T5_TOKENS
LAYOUT: dict[str, tuple[Part, ...]] = {
    "sd1": (Part("text_encoder", CLIP, slice(0, 32), layer=0),),
    "sd2": (Part("text_encoder", CLIP, slice(0, 32), layer=0),),
    "sdxl": (Part("text_encoder", CLIP, slice(0, 32)), Part("text_encoder_2", CLIP, slice(32, 56), slice(0, 20))),
    "sd3": (
        Part("text_encoder", CLIP, slice(0, 32), slice(0, 16)),
        Part("text_encoder_2", CLIP, slice(32, 56), slice(16, 36)),
        Part("text_encoder_3", slice(77, 77 + T5), slice(0, 64), layer=0),
    ),
    "flux": (Part("text_encoder", None, None, slice(0, 32)), Part("text_encoder_2", slice(0, T5), slice(0, 64), layer=0)),
    "wan": (Part("text_encoder", slice(0, T5), slice(0, 64), layer=0),),
}


def encode(pipe: Any, text: str | list[str], **options: Any) -> dict[str, Any]:
    """What a pipeline's ``encode_prompt`` returns, by name; an attached eraser has its say."""
    known = inspect.signature(type(pipe).encode_prompt).parameters
    defaults: dict[str, Any] = {"prompt_2": None, "prompt_3": None, "device": "cpu", "do_classifier_free_guidance": True}
    defaults |= {"max_sequence_length": T5, "num_images_per_prompt": 1}
    given = {key: value for key, value in (defaults | options).items() if key in known}
    family = family_of(pipe)
    with torch.no_grad():
        found = dict(zip(family.returns, pipe.encode_prompt(text, **given), strict=True))
    return {key: value for key, value in found.items() if key in ("embeds", "pooled")}


def is_t5(pipe: Any, part: Part) -> bool:
    return "T5" in type(getattr(pipe, part.encoder)).__name__


def ids_of(pipe: Any, part: Part, text: str) -> list[int]:
    length = T5 if is_t5(pipe, part) else 77
    return list(getattr(pipe, part.tokenizer)(text, truncation=True, max_length=length).input_ids)


@torch.no_grad()
def vectors(pipe: Any, part: Part, ids: list[int], skip: int = 0) -> tuple[Tensor, Tensor | None]:
    """One text in the space of an encoder's tokens [D] and, where it has one, in that of its pooled vectors [P]."""
    encoder, t5 = getattr(pipe, part.encoder), is_t5(pipe, part)
    output = encoder(torch.tensor([ids]), output_hidden_states=True)
    if t5:
        return output.last_hidden_state[0, : max(len(ids) - 1, 1)].double().mean(0), None
    states = output.last_hidden_state if part.layer == 0 else output.hidden_states[part.layer - skip]
    if part.layer == 0 and skip:
        states = encoder.final_layer_norm(output.hidden_states[-1 - skip])
    pooled = output.last_hidden_state[0, -1]
    if hasattr(encoder, "text_projection"):
        pooled = encoder.text_projection.weight @ pooled
    return states[0, -1].double(), pooled.double() if part.pooled is not None else None


@dataclass
class Reference:
    """The safe prompt."""

    context: Tensor
    pooled: Tensor | None
    triggers: dict[str, list[int]]
    """Rows of the context, or positions in the text where the encoder has none, by encoder."""
    beta: float
    """Over the real tokens of all encoders."""


def reference(
    pipe: Any, text: str, targets: Sequence[str], *, ids: dict[str, list[int]] | None = None, alpha: float = 0.01, clip_skip: int = 0
) -> Reference:
    """A prompt made safe; ``ids`` are its tokens by encoder where they are not those of ``text``."""
    plain = encode(pipe, text, **({"clip_skip": clip_skip} if clip_skip else {}))
    context = plain["embeds"][0].double()
    found = Reference(context.clone(), plain["pooled"][0].double() if "pooled" in plain else None, {}, 0.0)
    cosines: list[float] = []
    for part in LAYOUT[family_of(pipe).name]:
        if getattr(pipe, part.encoder) is None:
            continue
        first = 0 if is_t5(pipe, part) else 1
        read = (ids or {}).get(part.encoder) or ids_of(pipe, part, text)
        skip = 0 if is_t5(pipe, part) else clip_skip
        phrases = [vectors(pipe, part, ids_of(pipe, part, target), skip) for target in targets]
        masked = [vectors(pipe, part, [*read[:i], 0, *read[i + 1 :]], skip) for i in range(first, len(read) - 1)]
        side = 0 if part.rows else 1
        toxic, inputs = (dense_projector(torch.stack([one[side] for one in each])) for each in (phrases, masked))  # type: ignore[misc]
        hits = naive_triggers(torch.stack([one[side] for one in masked]), torch.tensor(toxic), alpha)  # type: ignore[misc]
        found.triggers[part.encoder] = [i + first + (part.rows.start if part.rows else 0) for i, hit in enumerate(hits) if hit]
        if part.rows:
            original = context[part.rows, part.columns]
            moved = torch.tensor((np.eye(len(toxic)) - toxic) @ inputs @ original.numpy().T).T
            for row in found.triggers[part.encoder]:
                found.context[row, part.columns] = moved[row - part.rows.start]
            cosines += torch.cosine_similarity(moved[: len(read)], original[: len(read)], dim=1).tolist()
        if part.pooled and any(hits):
            assert found.pooled is not None
            toxic, inputs = (dense_projector(torch.stack([one[1] for one in each])) for each in (phrases, masked))  # type: ignore[misc]
            found.pooled[part.pooled] = torch.tensor((np.eye(len(toxic)) - toxic) @ inputs @ found.pooled[part.pooled].numpy())
    found.beta = 1 - float(np.mean(cosines)) if cosines else 0.0
    return found
