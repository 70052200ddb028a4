"""Attention processors, wrapped: only where a method needs the attention map itself; hooks on modules serve all else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import Conflict
from ..families import Family

Processor = Callable[..., Any]


@contextmanager
def processors(pipe: Any, family: Family, wrap: Callable[[str, Processor], Processor | None]) -> Iterator[int]:
    """Put ``wrap(name, processor)`` in the place of each attention processor for which it is not None. Yields how many were wrapped.

    A wrapper delegates to the processor that it holds. An IP-Adapter owns its processors, so it is refused.
    """
    saved, opened = {}, 0
    for component, denoiser in family.parts(pipe):
        before = dict(denoiser.attn_processors)
        if taken := next((type(p).__name__ for p in before.values() if "IPAdapter" in type(p).__name__), None):
            raise Conflict(f"{component} has {taken}, which an eraser on attention processors would displace; unload the IP-Adapter")
        wrapped = {name: wrap(name, processor) for name, processor in before.items()}
        opened += sum(processor is not None for processor in wrapped.values())
        saved[component] = before
        denoiser.set_attn_processor({name: wrapped[name] or before[name] for name in before})
    try:
        yield opened
    finally:
        for component, before in saved.items():
            getattr(pipe, component).set_attn_processor(dict(before))  # set_attn_processor empties what it is given
