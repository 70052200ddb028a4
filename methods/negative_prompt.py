"""The plain negative prompt, the baseline that every table shows."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from erasure.concept import Concept
from erasure.errors import NotErased
from erasure.families import NAMES, Family
from erasure.method import ErasureMethod, Run, RuntimeEraser
from erasure.seams import prompt
from erasure.seams.issued import Issued
from erasure.text import encoders

log = logging.getLogger("erasure")


def target_phrases(concepts: Iterable[Concept]) -> list[str]:
    """All target phrases of some concepts, each once."""
    return list(dict.fromkeys(target for concept in concepts for target in concept.targets))


def combine(phrases: Iterable[str], user: str | list[str] | None) -> str | list[str]:
    """The concept's phrases, then whatever negative prompt the user gave: the encoder cuts off the end."""
    if isinstance(user, list):
        return [str(combine(phrases, one)) for one in user]
    return ", ".join(filter(None, [*phrases, user or ""]))


def warn_of_cut(pipe: Any, family: Family, phrases: Sequence[str]) -> None:
    """Log which of the phrases are more than an encoder reads; they would be in the negative prompt to no effect."""
    for encoder in encoders(pipe, family):
        tokenizer, room = getattr(pipe, encoder.tokenizer), encoder.slots(pipe)

        def fits(n: int, tokenizer: Any = tokenizer, room: int = room) -> bool:
            return len(tokenizer(", ".join(phrases[:n]), truncation=True, max_length=room + 1).input_ids) <= room

        fitting = max(n for n in range(len(phrases) + 1) if fits(n))
        if fitting < len(phrases):
            log.warning(
                "%s has room for %d tokens in the negative prompt; cut off: %s", encoder.tokenizer, room - 2, ", ".join(phrases[fitting:])
            )


def extend_negative(arguments: prompt.Arguments, family: Family, side: prompt.Side, phrases: Sequence[str]) -> None:
    """Add ``phrases`` to the negative prompt of a bound ``encode_prompt`` call, in place; without guidance it would do nothing."""
    if side == "positive":  # the negative prompt comes in a call of its own, and the guard sees to it that it does
        return
    names = [encoder.prompt for encoder in family.encoders]
    if side == "both":
        if not arguments["do_classifier_free_guidance"]:
            raise NotErased(f"a negative prompt does nothing without classifier-free guidance; use {family.scale} > 1")
        names = [f"negative_{name}" for name in names]
    for name in dict.fromkeys(names):
        if name in ("prompt", "negative_prompt") or arguments.get(name):
            arguments[name] = _matching(combine(phrases, arguments.get(name)), arguments["prompt"])


def _matching(negative: str | list[str], prompts: str | list[str]) -> str | list[str]:
    """One for all becomes one each where prompts are a list: pipelines want the same type."""
    return [negative] * len(prompts) if isinstance(prompts, list) and isinstance(negative, str) else negative


@dataclass(frozen=True, kw_only=True)
class NegativePrompt(ErasureMethod):
    """Every target phrase becomes part of the negative prompt: no training, no cost, no promise.

    FLUX.1 has guidance with a negative prompt only where ``true_cfg_scale`` > 1 and a ``negative_prompt`` is given, if only an empty one.
    """

    name: ClassVar[str] = "negative_prompt"
    families: ClassVar[frozenset[str]] = frozenset(NAMES)

    def fit(self, pipe: Any, concepts: Sequence[Concept], *, run: Run = Run()) -> "NegativePromptEraser":
        warn_of_cut(pipe, self.family(pipe), target_phrases(concepts))
        return self.eraser(tuple(concepts), {})

    def eraser(self, concepts: tuple[Concept, ...], tensors: Mapping[str, Tensor]) -> "NegativePromptEraser":
        return NegativePromptEraser(self, concepts)


@dataclass(frozen=True)
class NegativePromptEraser(RuntimeEraser):
    """Extends the negative prompt of each call."""

    def edits(self, pipe: Any, family: Family) -> Iterable[AbstractContextManager[int]]:
        phrases = target_phrases(self.concepts)
        issued = Issued(family, guided=True)
        yield prompt.encoding(pipe, family, issued, before=lambda arguments, side: extend_negative(arguments, family, side, phrases))

    def tensors(self) -> dict[str, Tensor]:
        return {}
