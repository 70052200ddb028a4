"""Layers of text encoders by name, and what they give on prompts as the pipeline encodes them."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from erasure.errors import ErasureError
from erasure.families import Encoder, Family
from erasure.text import encoders

BATCH = 64
"""Prompts that are read at once."""
HOOKPOINT = re.compile(r"(?P<component>\w+)\.layers\.(?P<layer>\d+)")


def layers(pipe: Any, encoder: Encoder) -> nn.ModuleList:
    """The blocks of a text encoder, CLIP's or T5's, in order."""
    module = getattr(pipe, encoder.component)
    inner = getattr(module, "text_model", module).encoder
    found: nn.ModuleList = inner.block if encoder.kind == "t5" else inner.layers
    return found


def readable(pipe: Any, encoder: Encoder) -> int:
    """The number of blocks whose output the pipeline goes on from: where it reads an inner layer, later ones are for nobody."""
    return len(layers(pipe, encoder)) + (encoder.layer + 1 if not encoder.pooled else 0)


def find(pipe: Any, family: Family, hookpoint: str) -> tuple[Encoder, int]:
    """Encoder and index of the layer of a hookpoint such as ``text_encoder.layers.8``; one that the pipeline lacks raises."""
    present = {encoder.component: encoder for encoder in encoders(pipe, family)}
    match = HOOKPOINT.fullmatch(hookpoint)
    encoder = present.get(match["component"]) if match else None
    if match is None or encoder is None or int(match["layer"]) >= len(layers(pipe, encoder)):
        known = ", ".join(f"{name}.layers.0 to {len(layers(pipe, each)) - 1}" for name, each in present.items())
        raise ErasureError(f"{type(pipe).__name__} has no hookpoint {hookpoint!r}; it has {known}")
    return encoder, int(match["layer"])


@contextmanager
def editing(module: nn.Module, edit: Callable[[Tensor], Tensor | None]) -> Iterator[int]:
    """Pass a block's hidden states [batch, tokens, dim] through ``edit``; None leaves them as they are."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        edited = edit(states)
        if edited is None:
            return output
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    handle = module.register_forward_hook(hook)
    try:
        yield 1
    finally:
        handle.remove()


class Enough(Exception):
    """The layer has been read; the blocks after it need not run."""


@torch.no_grad()
def activations(pipe: Any, encoder: Encoder, layer: int, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """A layer's output [n, tokens, dim] in float32 on texts padded as the pipeline pads them, and bool [n, tokens]: the real tokens."""
    tokenizer = getattr(pipe, encoder.tokenizer)
    batch = tokenizer(list(texts), padding="max_length", truncation=True, max_length=encoder.slots(pipe), return_tensors="pt")
    read: list[Tensor] = []

    def note(states: Tensor) -> None:
        read.append(states.float())
        raise Enough

    with editing(layers(pipe, encoder)[layer], note):
        try:
            getattr(pipe, encoder.component)(batch.input_ids.to(pipe._execution_device))
        except Enough:
            pass
    return read[0], batch.attention_mask.bool().to(read[0].device)


def read(pipe: Any, encoder: Encoder, layer: int, texts: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """``activations`` of any number of texts, a batch at a time."""
    for start in range(0, len(texts), BATCH):
        yield activations(pipe, encoder, layer, texts[start : start + BATCH])
