"""Adversarial prompts in the space of token embeddings, and the road from there to the denoiser, open to gradients."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from erasure.denoising import Denoising
from erasure.errors import ErasureError
from erasure.families import Encoder
from erasure.seams.denoiser import Branch
from erasure.text import Place, encoders, places, token_ids

Strategy = Literal["prefix", "suffix", "replace", "add"]


def attack_step(delta: Tensor, gradient: Tensor, lr: float, radius: float) -> Tensor:
    """One step of projected gradient descent on perturbations [..., tokens, dim] or [dim], back into the ball of that radius.

    Every entry moves by ``lr`` against the sign of its gradient; a prompt's perturbation (its last two axes together) that is then longer
    than ``radius`` is shortened to it. One step of a size near the radius is the fast attack (FGSM). Source: Zhang et al., NeurIPS 2024,
    eq. 5; the released code has no projection and adds up the gradients of all steps.
    """
    moved = delta - lr * gradient.sign()
    norm = torch.linalg.vector_norm(moved, dim=tuple(range(max(-2, -moved.ndim), 0)), keepdim=True)
    return moved * (radius / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1.0)


def placed(words: Sequence[int], target: Sequence[int], strategy: Strategy, k: int) -> tuple[list[int | None], list[int]]:
    """A prompt's token ids (special ones left out) with None where the attack puts tokens of its own, and the places that it perturbs.

    All tokens of the target stay, however many pieces the tokenizer makes of it. replace: the first ``k`` that are not the target's, and
    where these are fewer, the rest goes in front. add: no new token; the target's own are perturbed.
    """
    start = next((i for i in range(len(words)) if list(words[i : i + len(target)]) == list(target)), 0)
    own = range(start, start + len(target)) if list(words[start : start + len(target)]) == list(target) else range(len(words))
    if strategy == "add":
        return list(words), list(own)
    new: list[int | None] = [None] * k
    if strategy == "prefix":
        ids = [*new, *words]
    elif strategy == "suffix":
        ids = [*words, *new]
    else:
        gone = [i for i in range(len(words)) if i not in own][:k]
        ids = [*new[len(gone) :], *(None if i in gone else word for i, word in enumerate(words))]
    return ids, [i for i, each in enumerate(ids) if each is None]


@dataclass(frozen=True)
class Slots:
    """Prompts as one encoder reads them under attack."""

    ids: Tensor
    """Padded ids [n, tokens]; at new places some word of the vocabulary, which the perturbation starts from."""
    mask: Tensor
    """[n, tokens, 1], 1 where the attack perturbs and 0 elsewhere."""


Perturbed = tuple[Mapping[str, Slots], Mapping[str, Tensor]]
"""Slots and perturbations [n, tokens, dim] by component."""


class Reader:
    """What a pipeline's CLIP encoders, as they are by now, say of prompts, differentiable from token embeddings on.

    Other encoders (T5) have said theirs in the base. Errors: a pipeline without a CLIP encoder raises.
    """

    def __init__(self, of: Denoising) -> None:
        self.of, self.pipe = of, of.pipe
        self.encoders = [encoder for encoder in encoders(of.pipe, of.family) if encoder.kind == "clip"]
        if not self.encoders:
            raise ErasureError(f"adv_unlearn attacks CLIP's token embeddings, and this {type(of.pipe).__name__} has no CLIP encoder")
        context, _ = of.encode([""])
        self.places = [place for place in places(of.pipe, of.family, context.shape[1]) if place.encoder in self.encoders]

    def check(self, prompt: str) -> None:
        """Raise unless this road ends where the pipeline's own ends."""
        with torch.no_grad():
            ours, theirs = self.encode([prompt]), self.of.encode([prompt])
        for a, b in zip(ours, theirs, strict=True):
            if a is not None and b is not None and float((a - b).float().norm()) > 0.02 * float(b.float().norm()):
                raise ErasureError(
                    f"adv_unlearn: {type(self.pipe).__name__} does not encode {prompt!r} as its family does "
                    "(an attention mask or a skipped layer of its own?), so its text encoders cannot be attacked"
                )

    def slots(self, prompts: Sequence[str], targets: Sequence[str], strategy: Strategy, k: int, draw: torch.Generator) -> dict[str, Slots]:
        """Where the attack on each prompt goes, by component; new places start from random words of the vocabulary."""
        return {encoder.component: self._slots(encoder, prompts, targets, strategy, k, draw) for encoder in self.encoders}

    def _slots(
        self, encoder: Encoder, prompts: Sequence[str], targets: Sequence[str], strategy: Strategy, k: int, draw: torch.Generator
    ) -> Slots:
        tokenizer, room = getattr(self.pipe, encoder.tokenizer), encoder.slots(self.pipe)
        words = torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
        ids = torch.full((len(prompts), room), tokenizer.pad_token_id)
        mask = torch.zeros(len(prompts), room, 1)
        for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
            whole, part = (token_ids(self.pipe, encoder, text).tolist() for text in (prompt, target))
            inner, where = placed(whole[1:-1], part[1:-1], strategy, k)
            if len(inner) + 2 > room:
                raise ErasureError(
                    f"adv_unlearn: {prompt!r} with {len(inner) - len(whole) + 2} new tokens is longer than the {room} of "
                    f"{encoder.component}; take fewer tokens or the strategy add"
                )
            new = words[torch.randint(len(words), (len(inner),), generator=draw)].tolist()
            inner = [fresh if each is None else each for each, fresh in zip(inner, new, strict=True)]
            ids[row, : len(inner) + 2] = torch.tensor([whole[0], *inner, whole[-1]])
            mask[row, [1 + i for i in where]] = 1.0
        device = self.pipe._execution_device
        return Slots(ids.to(device), mask.to(device))

    def start(self, slots: Mapping[str, Slots]) -> dict[str, Tensor]:
        """Perturbations of zero, float32 and wanting gradients, by component."""
        widths = {each: getattr(self.pipe, each).get_input_embeddings().weight.shape[1] for each in slots}
        return {each: torch.zeros(*s.ids.shape, widths[each], device=s.ids.device, requires_grad=True) for each, s in slots.items()}

    def encode(self, prompts: Sequence[str], perturbed: Perturbed | None = None) -> Branch:
        """Context [n, tokens, dim] and pooled vectors [n, dim] of prompts, or of their perturbations."""
        context, pooled = self.of.encode(prompts)
        context, pooled = context.clone(), None if pooled is None else pooled.clone()
        for place in self.places:
            rows, vector = self._read(place, prompts, perturbed)
            if place.tokens is not None:
                context[:, place.tokens, place.channels] = rows.to(context)
            if place.pooled is not None and pooled is not None:
                pooled[:, place.pooled] = vector.to(pooled)
        return context, pooled

    def _read(self, place: Place, prompts: Sequence[str], perturbed: Perturbed | None) -> tuple[Tensor, Any]:
        """Token states and pooled vectors by one encoder, at the layers that the pipeline reads."""
        encoder, module = place.encoder, getattr(self.pipe, place.encoder.component)
        hidden = encoder.layer != -1
        if perturbed is None:
            output = module(self._padded(encoder, prompts), output_hidden_states=hidden)
        else:
            slots, delta = perturbed[0][encoder.component], perturbed[1][encoder.component]
            with shifted(module, slots.mask * delta):
                output = module(slots.ids, output_hidden_states=hidden)
        rows = output.hidden_states[encoder.layer] if hidden else output.last_hidden_state
        return rows, getattr(output, encoder.pooled) if encoder.pooled else None

    def _padded(self, encoder: Encoder, prompts: Sequence[str]) -> Tensor:
        ids = torch.full((len(prompts), encoder.slots(self.pipe)), getattr(self.pipe, encoder.tokenizer).pad_token_id)
        for row, prompt in enumerate(prompts):
            own = token_ids(self.pipe, encoder, prompt)
            ids[row, : len(own)] = own
        return ids.to(self.pipe._execution_device)


@contextmanager
def shifted(module: Any, change: Tensor) -> Iterator[None]:
    """Inside the block, token embeddings of a text encoder [n, tokens, dim] come out moved by ``change``."""
    with module.get_input_embeddings().register_forward_hook(lambda layer, args, output: output + change.to(output)):
        yield
