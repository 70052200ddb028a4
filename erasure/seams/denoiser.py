"""Hooks around the denoiser's call: change what goes in, change what comes out, add branches to the guidance."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NotErased
from ..families import Family
from .issued import Inputs, Issued, Rows

Branch = tuple[Tensor, Tensor | None]
"""Context [prompts, tokens, dim] and pooled vectors [prompts, dim] of one more branch of the guidance."""


@contextmanager
def calls(
    pipe: Any, family: Family, before: Callable[[Inputs], None] | None = None, after: Callable[[Tensor], Tensor] | None = None
) -> Iterator[int]:
    """Run ``before`` on each call's inputs, by name and in place, and ``after`` on its prediction. Yields the number of denoisers.

    Inside a prompt seam, opened first, `Issued` knows the rows and the step of the call under way. Seams nest: the one opened last adds
    its rows last and takes them off first.
    """

    def pre(module: nn.Module, args: tuple[Any, ...], kwargs: Inputs) -> tuple[tuple[Any, ...], Inputs]:
        inputs = dict(zip(family.inputs, args, strict=False)) | kwargs
        assert before is not None
        before(inputs)
        return (), inputs

    def post(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        assert after is not None
        if isinstance(output, tuple):
            return (after(output[0]), *output[1:])
        output.sample = after(output.sample)
        return output

    with ExitStack() as stack:
        opened = 0
        for _, denoiser in family.parts(pipe):
            if before is not None:
                stack.enter_context(denoiser.register_forward_pre_hook(pre, with_kwargs=True))
            if after is not None:
                stack.enter_context(denoiser.register_forward_hook(post, prepend=True))
            opened += 1
        yield opened


@contextmanager
def guidance(
    pipe: Any,
    family: Family,
    issued: Issued,
    branches: Callable[[], Sequence[Branch]],
    rule: Callable[[Tensor, Tensor, list[Tensor], int], Tensor],
) -> Iterator[int]:
    """Put ``rule(uncond, text, extras, step)`` [prompts, ...] in the place of the text prediction, from which the pipeline guides.

    ``u + s (g(u, c, extras) - u)`` covers every rule whose result is the uncond prediction plus s times something. The extra branches
    ride in the same call, and the rule reads them in float32 at least. Where guidance runs in two calls the first is the text's, so
    the negative branch rides there too and is computed again by the pipeline: 2 + extras branches become 3 + extras.
    """
    size = 0

    def before(inputs: Inputs) -> None:
        nonlocal size
        size = len(inputs[family.context])
        if active(inputs):
            for context, pooled in companions():
                append(inputs, family, _positives(issued.rows), context, pooled)

    def active(inputs: Inputs) -> bool:
        return issued.rows.positives is not None and inputs.get("skip_layers") is None

    def companions() -> list[Branch]:
        extras = list(branches())
        if issued.rows.negatives is not None:
            return extras
        if issued.negative is None:
            raise NotErased(f"the attached eraser changes the guidance, and guidance is off: use {family.scale} > 1")
        return [(issued.negative, issued.negative_pooled), *extras]

    def after(prediction: Tensor) -> Tensor:
        if len(prediction) == size:
            return prediction
        own, wide = prediction[:size].clone(), prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        text, added = wide[issued.rows.positives], list(wide[size:].split(len(wide[issued.rows.positives])))
        uncond = wide[issued.rows.negatives] if issued.rows.negatives is not None else added.pop(0)
        own[issued.rows.positives] = rule(uncond, text, added, issued.step).to(own)
        return own

    with calls(pipe, family, before, after) as opened:
        yield opened


def append(inputs: Inputs, family: Family, rows: Tensor, context: Tensor, pooled: Tensor | None) -> None:
    """Append copies of ``rows`` of every batched input, in place, with another context and other pooled vectors."""
    batch = len(inputs[family.context])
    for key, value in inputs.items():
        if key not in family.unbatched:
            inputs[key] = _with_copies(value, rows, batch)
    inputs[family.context][batch:] = context.to(inputs[family.context])
    put_pooled(inputs, family, slice(batch, None), pooled)


def put_pooled(inputs: Inputs, family: Family, rows: slice, pooled: Tensor | None) -> None:
    """Write pooled vectors into rows of a call's inputs, on copies of what the pipeline keeps."""
    if not family.pooled or pooled is None:
        return
    *path, last = family.pooled
    holder = inputs
    for key in path:
        holder[key] = dict(holder[key])
        holder = holder[key]
    holder[last] = holder[last].clone()
    holder[last][rows] = pooled.to(holder[last])


def _positives(rows: Rows) -> Tensor:
    assert rows.positives is not None
    return torch.arange(rows.positives.start, rows.positives.stop)


def _with_copies(value: Any, rows: Tensor, batch: int) -> Any:
    """``value`` with ``rows`` of every batched tensor in it appended: one more branch of whatever the pipeline passes."""
    if isinstance(value, Tensor):
        return torch.cat([value, value[rows.to(value.device)]]) if value.ndim and len(value) == batch else value
    if isinstance(value, dict):
        return {k: _with_copies(v, rows, batch) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_with_copies(v, rows, batch) for v in value)
    return value
