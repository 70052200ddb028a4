"""Wrap the pipeline's ``encode_prompt``, and let the denoiser see no embeddings but those that it returned."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import NotErased
from ..families import Family, call_options
from .instance import overridden
from .issued import Embeds, Issued

Arguments = dict[str, Any]
Side = Literal["both", "positive", "negative"]
"""What a call of ``encode_prompt`` encodes: families with a call for each side encode the positive prompt first."""
GUARDS = "_erasure_guards"
GIVEN = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def _unchanged(arguments: Arguments, side: Side) -> None:
    return None


def _as_returned(arguments: Arguments, embeds: Embeds) -> Embeds:
    return embeds


@contextmanager
def encoding(
    pipe: Any,
    family: Family,
    issued: Issued,
    after: Callable[[Arguments, Embeds], Embeds] = _as_returned,
    before: Callable[[Arguments, Side], None] = _unchanged,
) -> Iterator[int]:
    """Edit prompts: ``before`` changes the bound arguments of ``encode_prompt``, ``after`` what it returns for positive prompts, by name.

    Seams stack: the outermost one's embeddings are what the denoiser gets, so each seam records them with the guards of all.
    Yields the number of places opened: the pipeline's ``encode_prompt`` and a guard on each denoiser.
    """
    signature = inspect.signature(pipe.encode_prompt)
    guards: list[Issued] = vars(pipe).setdefault(GUARDS, [])

    def encode(inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def encode_prompt(*args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            for key in GIVEN:
                if bound.arguments.get(key) is not None:
                    raise NotErased(f"{key}= skips the text that the attached eraser must read; pass the prompt as text")
            side = side_of(family, issued)
            before(bound.arguments, side)
            returned = dict(zip(family.returns, inner(*bound.args, **bound.kwargs), strict=True))
            edited = returned if side == "negative" else after(bound.arguments, returned)
            for each in guards:
                each.record(edited, side)
            issued.encodings += 1
            return tuple(edited[key] for key in family.returns)

        return encode_prompt

    def guard(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        issued.check(dict(zip(family.inputs, args, strict=False)) | kwargs)

    with ExitStack() as stack:
        guards.append(issued)
        stack.callback(_forget, pipe, issued)
        # Every pipeline checks its inputs first and frees its models last: what was issued lives in between.
        stack.enter_context(overridden(pipe, "check_inputs", lambda inner: _then(issued.clear, inner)))
        stack.enter_context(overridden(pipe, "maybe_free_model_hooks", lambda inner: _then(issued.clear, inner)))
        stack.enter_context(overridden(pipe, "encode_prompt", encode))
        opened = 1
        for _, denoiser in family.parts(pipe):
            # First in line: seams that were opened earlier edit the context at each step.
            stack.enter_context(denoiser.register_forward_pre_hook(guard, prepend=True, with_kwargs=True))
            opened += 1
        yield opened


def side_of(family: Family, issued: Issued) -> Side:
    """What the coming call of ``encode_prompt`` encodes."""
    if "negative_embeds" in family.returns:
        return "both"
    return "negative" if issued.encodings % 2 else "positive"


@torch.no_grad()
def encode_alone(pipe: Any, family: Family, texts: list[str], arguments: Arguments | None = None) -> Embeds:
    """Embeddings of some texts as the bare pipeline makes them, with the options of a bound call of ``encode_prompt`` if given."""
    plain = functools.partial(type(pipe).encode_prompt, pipe)
    known = inspect.signature(type(pipe).encode_prompt).parameters
    options: Arguments = {
        "device": pipe._execution_device,
        "num_images_per_prompt": 1,
        "num_videos_per_prompt": 1,
        **call_options(pipe),
        **(arguments or {}),
    }
    options = {key: value for key, value in options.items() if key in known and ("prompt" not in key or key.startswith("num_"))}
    options |= {encoder.prompt: None for encoder in family.encoders} | {"prompt": texts}
    if "do_classifier_free_guidance" in known:
        options["do_classifier_free_guidance"] = False
    return dict(zip(family.returns, plain(**options), strict=True))


def _then(first: Callable[[], None], inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def run(*args: Any, **kwargs: Any) -> Any:
        first()
        return inner(*args, **kwargs)

    return run


def _forget(pipe: Any, issued: Issued) -> None:
    guards = vars(pipe)[GUARDS]
    guards[:] = [each for each in guards if each is not issued]
    if not guards:
        delattr(pipe, GUARDS)
