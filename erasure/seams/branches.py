"""Guidance by further texts: each becomes a branch of every denoiser call, beside the prompt's own two."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..families import Family
from . import denoiser, prompt
from .issued import Embeds, Issued


def _nothing() -> None:
    return None


@contextmanager
def guided(
    pipe: Any,
    family: Family,
    texts: Sequence[str],
    rule: Callable[[Tensor, Tensor, list[Tensor], int], Tensor],
    begin: Callable[[], None] = _nothing,
) -> Iterator[int]:
    """Replace the text prediction by ``rule(uncond, text, extras, step)``, with a prediction [prompts, ...] for each of ``texts``.

    See `denoiser.guidance`. The texts are encoded once a call of the pipeline, by the bare encoder with the options of that call, and
    serve all its prompts; ``begin`` runs then, so that what a rule remembers ends with its run. Without guidance, NotErased is raised.
    """
    issued = Issued(family, guided=True)
    branches: list[denoiser.Branch] = []

    def encode(arguments: prompt.Arguments, embeds: Embeds) -> Embeds:
        given = embeds["embeds"]
        assert given is not None
        found = prompt.encode_alone(pipe, family, list(texts), arguments | {"num_images_per_prompt": 1, "num_videos_per_prompt": 1})
        context, pooled = found["embeds"], found.get("pooled")
        assert context is not None
        branches[:] = [
            (context[i].expand(len(given), *context[i].shape), None if pooled is None else pooled[i].expand(len(given), *pooled[i].shape))
            for i in range(len(texts))
        ]
        begin()
        return embeds

    with (
        prompt.encoding(pipe, family, issued, after=encode) as opened,
        denoiser.guidance(pipe, family, issued, lambda: branches, rule) as more,
    ):
        yield opened + more


def run_length(pipe: Any) -> int:
    """Sampling steps of the run under way, counted as `Issued.step` counts them: a solver's second call in a step is none."""
    timesteps: Tensor = pipe.scheduler.timesteps[-pipe.num_timesteps :]
    return len(timesteps.unique_consecutive())
