"""What a coder's features stand for: the prompts, concepts and tokens that turn them on, and who shares them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from erasure.families import Encoder

from ..itd import Switch
from .formulas import strongest
from .hookpoints import BATCH, activations


class Token(NamedTuple):
    """A token of a prompt, and a feature's code there."""

    text: str
    code: float


class Match(NamedTuple):
    """A prompt that turns a feature on."""

    prompt: str
    peak: float
    """The code of largest size at any token."""
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Reading:
    """Some features on some prompts."""

    prompts: tuple[str, ...]
    codes: Tensor
    """[prompts, tokens, f], from the first token that a method may change."""
    words: tuple[tuple[str, ...], ...]
    """Each prompt's real tokens; whatever tokens follow are padding."""

    @property
    def peaks(self) -> Tensor:
        """[prompts, f]: each feature's code of largest size, with its sign."""
        return peaks(self.codes)


def peaks(codes: Tensor) -> Tensor:
    """Codes [..., tokens, f] to the one of largest size [..., f], with its sign."""
    return codes.gather(-2, codes.abs().argmax(-2, keepdim=True)).squeeze(-2)


def read(pipe: Any, encoder: Encoder, switch: Switch, features: Tensor, prompts: Sequence[str]) -> Reading:
    """The codes of ``features`` int [f] on prompts, a batch at a time, so that not all latents are held at once."""
    found, words = [], []
    tokenizer = getattr(pipe, encoder.tokenizer)
    for part, x, real in _batches(pipe, encoder, switch.layer, prompts):
        found.append(switch.coder.encode(x)[:, switch.first :, features].cpu())
        ids = tokenizer(part, truncation=True, max_length=x.shape[1]).input_ids
        words += [_words(tokenizer, row[switch.first : int(n)]) for row, n in zip(ids, real.sum(1), strict=True)]
    return Reading(tuple(prompts), torch.cat(found), tuple(words))


def all_peaks(pipe: Any, encoder: Encoder, switch: Switch, prompts: Sequence[str]) -> Tensor:
    """Every latent's code of largest size [prompts, n], with its sign, over the tokens that a method may change."""
    read = _batches(pipe, encoder, switch.layer, prompts)
    return torch.cat([peaks(switch.coder.encode(x)[:, switch.first :]).cpu() for _, x, _ in read])


def top_prompts(reading: Reading, column: int, count: int) -> list[Match]:
    """The prompts that turn the feature in a column on most, by size of the peak; equal ones in their order, silent ones never."""
    peak = reading.peaks[:, column]
    order = peak.abs().sort(descending=True, stable=True).indices.tolist()
    return [Match(reading.prompts[i], float(peak[i]), tokens(reading, i, column)) for i in order[:count] if peak[i] != 0]


def tokens(reading: Reading, row: int, column: int) -> tuple[Token, ...]:
    """A feature's code at each token of a prompt; the padding, which the encoder reads as well, is one token with its largest."""
    codes, words = reading.codes[row, :, column], reading.words[row]
    shown = [Token(word, float(code)) for word, code in zip(words, codes, strict=False)]
    rest = codes[len(words) :]
    return (*shown, Token(f"padding × {len(rest)}", float(peaks(rest[:, None])))) if len(rest) else tuple(shown)


def concept_scores(peaks: Tensor, groups: Mapping[str, Sequence[int]]) -> list[tuple[str, float]]:
    """Mean peak [prompts] over each concept's prompts, largest size first; concepts that never turn the feature on are left out.

    groups: concept -> indices of its prompts.
    """
    means = {name: float(peaks[list(rows)].mean()) for name, rows in groups.items() if rows}
    return sorted(((name, mean) for name, mean in means.items() if mean), key=lambda one: -abs(one[1]))


def sharers(own: Tensor, retained: Mapping[str, Tensor], k: int) -> dict[int, tuple[str, ...]]:
    """Features that the target has and is not switched off in: each with the retained phrases that keep it, in their order.

    own: peaks [prompts, n] of target prompts; retained: phrase -> its prompts' peaks. A feature is a prompt's own as in
    ``itd.select_features``: among its k strongest.
    """
    target = strongest(own, k)
    kept = {phrase: strongest(peaks, k) for phrase, peaks in retained.items()}
    wanted = target.nonzero().flatten().tolist()
    found = {feature: tuple(phrase for phrase, has in kept.items() if has[feature]) for feature in wanted}
    return {feature: phrases for feature, phrases in found.items() if phrases}


def faint(feature: int, retained: Mapping[str, Tensor]) -> list[tuple[str, float]]:
    """Retained phrases that turn a feature on at all, with the mean peak of their prompts, largest size first.

    Of a chosen feature these stay below the k strongest, so it is switched off although they have a little of it.
    """
    means = ((phrase, float(peaks[:, feature].mean())) for phrase, peaks in retained.items())
    return sorted((one for one in means if one[1]), key=lambda one: -abs(one[1]))


def _batches(pipe: Any, encoder: Encoder, layer: int, prompts: Sequence[str]) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    for start in range(0, len(prompts), BATCH):
        part = list(prompts[start : start + BATCH])
        yield part, *activations(pipe, encoder, layer, part)


def _words(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Tokens as people read them: "·" before one that goes on within a word, "end" for the end token."""
    shown: list[str] = []
    inside = False
    for i, token in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        if i == tokenizer.eos_token_id:
            shown.append("end")
            continue
        starts = token.startswith("▁") if "▁" in token else not inside
        inside = not token.endswith("</w>")
        text = token.replace("</w>", "").replace("▁", "") or "␣"
        shown.append(text if starts else f"·{text}")
    return tuple(shown)
