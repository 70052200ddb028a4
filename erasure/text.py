"""What a pipeline's text encoders say of phrases, and where in the context each of them says it."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .families import Encoder, Family
from .seams.prompt import encode_alone


@dataclass(frozen=True)
class Place:
    """Where one encoder's output lies in the context [tokens, dim] and in the pooled vector."""

    encoder: Encoder
    tokens: slice | None
    channels: slice | None
    pooled: slice | None


@dataclass(frozen=True)
class Encoded:
    """Phrases as the pipeline encodes them."""

    context: Tensor
    """[phrases, tokens, dim]"""
    pooled: Tensor | None
    """[phrases, dim], in families that have pooled vectors."""
    lengths: tuple[Tensor, ...]
    """For each encoder the number of real tokens of each phrase [phrases], special ones included."""


def encoders(pipe: Any, family: Family) -> Iterator[Encoder]:
    """The text encoders that a pipeline has: SD3 also runs without its T5."""
    return (encoder for encoder in family.encoders if getattr(pipe, encoder.component) is not None)


def places(pipe: Any, family: Family, tokens: int) -> tuple[Place, ...]:
    """Where each encoder's output lies in a context of that many tokens."""
    found: list[Place] = []
    row, column, vector = slice(0, 0), slice(0, 0), 0
    for encoder in encoders(pipe, family):
        config = getattr(pipe, encoder.component).config
        if encoder.place == "tokens":  # all encoders but the last have a fixed number of tokens
            stop = tokens if encoder is family.encoders[-1] or family.encoders[-1].place != "tokens" else row.stop + encoder.slots(pipe)
            row, column = slice(row.stop, stop), slice(0, config.hidden_size)
        elif encoder.place == "channels":
            column = slice(column.stop, column.stop + config.hidden_size)
        pooled = None
        if encoder.pooled:
            width = config.projection_dim if encoder.pooled == "text_embeds" else config.hidden_size
            pooled, vector = slice(vector, vector + width), vector + width
        here = encoder.place != "none"
        found.append(Place(encoder, row if here else None, column if here else None, pooled))
    return tuple(found)


def token_ids(pipe: Any, encoder: Encoder, text: str, length: int | None = None) -> Tensor:
    """Ids [tokens] of a text as the pipeline cuts it, without padding; truncation keeps the end token."""
    tokenizer = getattr(pipe, encoder.tokenizer)
    if hasattr(pipe, "maybe_convert_prompt"):  # one word of a textual inversion may stand for several vectors
        text = pipe.maybe_convert_prompt(text, tokenizer)
    ids: Tensor = tokenizer(text, truncation=True, max_length=length or encoder.slots(pipe), return_tensors="pt").input_ids[0]
    return ids


def encode(pipe: Any, family: Family, texts: Sequence[str], batch: int = 32) -> Iterator[Encoded]:
    """Encode phrases through the bare pipeline's own ``encode_prompt``, in float32, a batch at a time."""
    for start in range(0, len(texts), batch):
        part = list(texts[start : start + batch])
        embeds = encode_alone(pipe, family, part)
        context, pooled = embeds["embeds"], embeds.get("pooled")
        assert context is not None
        lengths = tuple(torch.tensor([len(token_ids(pipe, encoder, text)) for text in part]) for encoder in encoders(pipe, family))
        yield Encoded(context.float(), None if pooled is None else pooled.float(), lengths)


@contextmanager
def reading(pipe: Any, family: Family, ids: dict[str, Tensor]) -> Iterator[int]:
    """While open, note in ``ids``, by component, what each text encoder reads first: padded ids [prompts, tokens].

    Positive prompts come first in every family, so whoever empties ``ids`` before ``encode_prompt`` has the prompt as the encoders got it,
    cleaned, converted and cut by the pipeline's own rules. Yields the number of encoders.
    """

    def note(component: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids.setdefault(component, args[0] if args else kwargs["input_ids"])

        return hook

    with ExitStack() as stack:
        modules = {encoder.component: getattr(pipe, encoder.component) for encoder in encoders(pipe, family)}
        for component, module in modules.items():
            stack.enter_context(module.register_forward_pre_hook(note(component), with_kwargs=True))
        yield len(modules)


def unpadded(pipe: Any, encoder: Encoder, ids: Tensor) -> Tensor:
    """Padded ids [tokens] of one text up to its end token. Where padding is made of end tokens, the first of the last ones ends it."""
    tokenizer = getattr(pipe, encoder.tokenizer)
    real = (ids != tokenizer.pad_token_id).nonzero().flatten().tolist()
    return ids[: (real[-1] + 1 if real else 0) + (tokenizer.pad_token_id == tokenizer.eos_token_id)]


@torch.no_grad()
def states(pipe: Any, encoder: Encoder, ids: Tensor, batch: int = 64, skip: int = 0) -> tuple[Tensor, Tensor | None]:
    """Token states [n, tokens, dim] of unpadded ids [n, tokens] at the layer that the pipeline reads, and pooled vectors [n, dim].

    ``skip`` is the pipeline's ``clip_skip``: so many layers earlier. Pooled vectors are taken at the last token, not by the encoder's own
    rule, which stops at the first end token that a prompt may hold as text; for CLIP that is the row the encoder pools wherever the text
    holds none.
    """
    module = getattr(pipe, encoder.component)
    last = encoder.layer == -1 and not skip
    rows, vectors = [], []
    for part in ids.split(batch):
        output = module(part.to(pipe._execution_device), output_hidden_states=not last)
        rows.append((output.last_hidden_state if last else _normed(module, encoder, output.hidden_states[encoder.layer - skip])).float())
        if encoder.pooled:
            vectors.append(_pooled(module, encoder, output).float())
    return torch.cat(rows), torch.cat(vectors) if vectors else None


def _normed(module: Any, encoder: Encoder, states: Tensor) -> Tensor:
    """An inner layer's states as pipelines pass them on: those that read the last layer, which is normed, norm an earlier one too."""
    if encoder.layer != -1:
        return states
    normed: Tensor = getattr(module, "text_model", module).final_layer_norm(states)
    return normed


def _pooled(module: Any, encoder: Encoder, output: Any) -> Tensor:
    end: Tensor = output.last_hidden_state[:, -1]
    return module.text_projection(end) if encoder.pooled == "text_embeds" else end


def summary(encoder: Encoder, rows: Tensor) -> Tensor:
    """One vector [n, dim] for token states [n, tokens, dim] of unpadded texts: the end token's, or T5's mean over all but the end token.

    A causal encoder's end token has read everything; a bidirectional one has no such place, and its first token is a word like others.
    """
    return rows[:, -1] if encoder.kind == "clip" else rows[:, : max(rows.shape[1] - 1, 1)].mean(1)
