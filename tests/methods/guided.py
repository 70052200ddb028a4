"""What a guidance rule should have done to each call of a denoiser, worked out again with the bare model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from erasure.families import Family, family_of
from erasure.seams.issued import reach
from tests.tiny import FAMILIES, latents

Rule = Callable[[Tensor, Tensor, list[Tensor], int], Tensor]
"""(uncond, text, extras, step) -> what the pipeline should get in the place of the text prediction."""
LENGTH = 48
"""T5 tokens of the tiny pipelines."""


@dataclass
class Call:
    """One call of the denoiser, as the pipeline made it and as the pipeline got it back."""

    inputs: dict[str, Any]
    output: Tensor


@dataclass
class Recording:
    calls: list[Call] = field(default_factory=list)
    final: Tensor = field(default_factory=lambda: torch.zeros(0))


def copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: copied(each) for key, each in value.items()}
    return value.clone() if isinstance(value, Tensor) else value


@contextmanager
def recorded(pipe: Any) -> Iterator[list[Call]]:
    """Open before an eraser attaches: the pipeline's inputs, before any seam has edited them, and the outputs after all have."""
    family, calls = family_of(pipe), list[Call]()
    ((_, denoiser),) = family.parts(pipe)

    def pre(module: Any, args: Any, kwargs: Any) -> None:
        calls.append(Call(copied(dict(zip(family.inputs, args, strict=False)) | kwargs), torch.zeros(0)))

    def post(module: Any, args: Any, output: Any) -> None:
        calls[-1].output = (output[0] if isinstance(output, tuple) else output.sample).clone()

    hooks = denoiser.register_forward_pre_hook(pre, with_kwargs=True), denoiser.register_forward_hook(post)
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def run(name: str, eraser: Any, prompts: list[str], **options: Any) -> tuple[Any, Recording]:
    """A guided float64 run of a fresh tiny pipeline with an eraser attached, and then the pipeline without it."""
    pipe = FAMILIES[name]().to(torch.float64)
    with recorded(pipe) as calls, eraser(pipe).attach(pipe):
        final = latents(pipe, prompts, **options)
    return pipe, Recording(calls, final)


@torch.no_grad()
def encoded(pipe: Any, text: str) -> tuple[Tensor, Tensor | None]:
    """Context and pooled vector [1, ...] of a text, by the pipeline's own encode_prompt written out for each family."""
    match family_of(pipe).name:
        case "sd1" | "sd2":
            return pipe.encode_prompt(text, "cpu", 1, False)[0], None
        case "sdxl":
            context, _, pooled, _ = pipe.encode_prompt(text, device="cpu", do_classifier_free_guidance=False)
            return context, pooled
        case "sd3":
            context, _, pooled, _ = pipe.encode_prompt(text, None, None, do_classifier_free_guidance=False, max_sequence_length=LENGTH)
            return context, pooled
        case "flux":
            context, pooled, _ = pipe.encode_prompt(text, None, max_sequence_length=LENGTH)
            return context, pooled
        case "wan":
            return pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=LENGTH)[0], None
    raise AssertionError(f"no way to encode for {pipe}")


def with_text(inputs: dict[str, Any], family: Family, rows: slice, context: Tensor, pooled: Tensor | None) -> dict[str, Any]:
    """A call's inputs with another text in some rows."""
    inputs = copied(inputs)
    inputs[family.context][rows] = context
    if pooled is not None:
        vectors = reach(inputs, family.pooled)
        assert vectors is not None
        vectors[rows] = pooled
    return inputs


@torch.no_grad()
def worst(pipe: Any, recording: Recording, n: int, texts: list[str], rule: Rule) -> float:
    """Largest difference between what the pipeline got and what the bare denoiser and ``rule`` say it should have got."""
    family = family_of(pipe)
    ((_, denoiser),) = family.parts(pipe)

    def bare(inputs: dict[str, Any]) -> Tensor:
        output = denoiser(**inputs)
        return output[0] if isinstance(output, tuple) else output.sample

    conditions = [encoded(pipe, text) for text in texts]
    calls = [call for call in recording.calls if call.inputs.get("skip_layers") is None]
    apart = [call for call in recording.calls if call.inputs.get("skip_layers") is not None]
    found = [float((call.output - bare(call.inputs)).abs().max()) for call in apart]
    pairs = [(call, call) for call in calls] if family.cfg == "batch" else list(zip(calls[::2], calls[1::2], strict=True))
    for step, (call, other) in enumerate(pairs):
        rows = slice(n, 2 * n) if call is other else slice(0, n)
        text, uncond = bare(call.inputs)[rows], bare(other.inputs)[:n]
        extras = [bare(with_text(call.inputs, family, rows, *condition))[rows] for condition in conditions]
        found.append(float((call.output[rows] - rule(uncond, text, extras, step)).abs().max()))
        found.append(float((other.output[:n] - uncond).abs().max()))
    return max(found)
