"""Wrap the pipeline's ``encode_prompt``, and let the denoiser see no embeddings but those that it returned."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NotErased
from ..families import Family
from .instance import overridden

Arguments = dict[str, Any]
Embeds = dict[str, Tensor | None]
GUARDS = "_erasure_guards"


def _unchanged(arguments: Arguments) -> None:
    return None


class Issued:
    """The embeddings that the pipeline's prompt seams gave out last, and the check that the denoiser runs on nothing else."""

    def __init__(self, guided: bool) -> None:
        self.guided = guided
        self.rows: Tensor | None = None
        self.negatives = 0

    def record(self, embeds: Embeds) -> None:
        parts = [part for key in ("negative_embeds", "embeds") if (part := embeds.get(key)) is not None]
        self.rows = torch.cat(parts)
        self.negatives = len(self.rows) - len(parts[-1])

    def check(self, context: Tensor) -> None:
        """Every row of ``context`` [batch, tokens, dim] must be one that was issued; a guided eraser wants negative rows among them."""
        if self.rows is None:
            raise NotErased("the denoiser was called before any prompt passed the attached eraser")
        known = self.rows.to(context)
        if context.shape == known.shape and torch.equal(context, known):
            return
        if context.shape[1:] != known.shape[1:] or not all(any(torch.equal(row, seen) for seen in known) for row in context):
            raise NotErased(
                "the denoiser got prompt embeddings that did not pass the attached eraser (prompt_embeds=, from_pipe, a copied pipeline?); "
                "pass prompts as text to the pipeline that the eraser is attached to"
            )
        if self.guided and not any(torch.equal(row, seen) for seen in known[: self.negatives] for row in context):
            raise NotErased("the denoiser was called without the negative prompt, by which the attached eraser works; keep guidance on")


@contextmanager
def encoding(
    pipe: Any,
    family: Family,
    after: Callable[[Arguments, Embeds], Embeds],
    before: Callable[[Arguments], None] = _unchanged,
    *,
    guided: bool = False,
) -> Iterator[int]:
    """Edit prompts: ``before`` changes the bound arguments of ``encode_prompt``, ``after`` the embeddings it returns, by name.

    ``guided``: the edit lives in the negative prompt, so calls of the denoiser without it are refused. Seams stack: the outermost
    one's embeddings are what the denoiser gets, so each seam records them with the guards of all.
    Yields the number of places opened: the pipeline's ``encode_prompt`` and a guard on each denoiser.
    """
    signature = inspect.signature(pipe.encode_prompt)
    issued = Issued(guided)
    guards: list[Issued] = vars(pipe).setdefault(GUARDS, [])

    def wrap(inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def encode_prompt(*args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            for key in ("prompt_embeds", "negative_prompt_embeds"):
                if bound.arguments.get(key) is not None:
                    raise NotErased(f"{key}= skips the text that the attached eraser must read; pass the prompt as text")
            before(bound.arguments)
            returned = dict(zip(family.encode_returns, inner(*bound.args, **bound.kwargs), strict=True))
            edited = after(bound.arguments, returned)
            for each in guards:
                each.record(edited)
            return tuple(edited[key] for key in family.encode_returns)

        return encode_prompt

    def guard(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context = kwargs.get(family.context)
        if context is None:
            raise NotErased(f"the denoiser was called without {family.context}=, so the attached eraser cannot tell what it runs on")
        issued.check(context)

    with ExitStack() as stack:
        guards.append(issued)
        stack.callback(_forget, pipe, issued)
        stack.enter_context(overridden(pipe, "encode_prompt", wrap))
        for component in family.denoisers:
            # First in line: seams that were opened earlier edit the context at each step.
            stack.enter_context(getattr(pipe, component).register_forward_pre_hook(guard, prepend=True, with_kwargs=True))
        yield 1 + len(family.denoisers)


def _forget(pipe: Any, issued: Issued) -> None:
    guards = vars(pipe)[GUARDS]
    guards.remove(issued)
    if not guards:
        delattr(pipe, GUARDS)
