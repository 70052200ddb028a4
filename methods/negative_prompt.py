"""The plain negative prompt, the baseline that every table shows."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from erasure.concept import Concept
from erasure.errors import NotErased
from erasure.families import Family
from erasure.method import ErasureMethod, Run, RuntimeEraser
from erasure.seams import prompt

log = logging.getLogger("erasure")


def target_phrases(concepts: Iterable[Concept]) -> list[str]:
    """All target phrases of some concepts, each once."""
    return list(dict.fromkeys(target for concept in concepts for target in concept.targets))


def combine(phrases: Iterable[str], user: str | list[str] | None) -> str | list[str]:
    """The concept's phrases, then whatever negative prompt the user gave: the encoder cuts off the end."""
    if isinstance(user, list):
        return [str(combine(phrases, one)) for one in user]
    return ", ".join(filter(None, [*phrases, user or ""]))


def warn_of_cut(tokenizer: Any, phrases: Sequence[str]) -> None:
    """Log which of the phrases are more than the encoder reads; they would be in the negative prompt to no effect."""
    room = tokenizer.model_max_length
    fitting = max(
        n for n in range(len(phrases) + 1) if len(tokenizer(", ".join(phrases[:n]), truncation=True, max_length=room + 1).input_ids) <= room
    )
    if fitting < len(phrases):
        log.warning("the negative prompt has room for %d tokens; cut off: %s", room - 2, ", ".join(phrases[fitting:]))


def extend_negative(arguments: prompt.Arguments, phrases: Sequence[str]) -> None:
    """Add ``phrases`` to the negative prompt of a bound ``encode_prompt`` call, in place; without guidance it would do nothing."""
    if not arguments["do_classifier_free_guidance"]:
        raise NotErased("a negative prompt does nothing without classifier-free guidance; use guidance_scale > 1")
    combined = combine(phrases, arguments.get("negative_prompt"))
    if isinstance(arguments["prompt"], list) and isinstance(combined, str):
        combined = [combined] * len(arguments["prompt"])
    arguments["negative_prompt"] = combined


@dataclass(frozen=True, kw_only=True)
class NegativePrompt(ErasureMethod):
    """Every target phrase becomes part of the negative prompt: no training, no cost, no promise."""

    name: ClassVar[str] = "negative_prompt"
    families: ClassVar[frozenset[str]] = frozenset({"sd1"})

    def fit(self, pipe: Any, concepts: Sequence[Concept], *, run: Run = Run()) -> "NegativePromptEraser":
        family = self.family(pipe)
        warn_of_cut(getattr(pipe, family.encoders[0][1]), target_phrases(concepts))
        return self.eraser(tuple(concepts), {})

    def eraser(self, concepts: tuple[Concept, ...], tensors: Mapping[str, Tensor]) -> "NegativePromptEraser":
        return NegativePromptEraser(self, concepts)


@dataclass(frozen=True)
class NegativePromptEraser(RuntimeEraser):
    """Extends the negative prompt of each call."""

    def edits(self, pipe: Any, family: Family) -> Iterable[AbstractContextManager[int]]:
        phrases = target_phrases(self.concepts)
        yield prompt.encoding(pipe, family, lambda arguments, embeds: embeds, lambda a: extend_negative(a, phrases), guided=True)

    def tensors(self) -> dict[str, Tensor]:
        return {}
