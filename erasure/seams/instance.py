"""Methods replaced on one instance, in layers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Method = Callable[..., Any]
LAYERS = "_erasure_layers"
"""Attribute of the instance that holds, by method name, what lay there before and the layers over it; gone with the last layer."""


@contextmanager
def overridden(owner: Any, name: str, wrap: Callable[[Method], Method]) -> Iterator[None]:
    """Put ``wrap(inner)`` over a method of ``owner``. Layers may come off in any order: the others stay in force."""
    layers = vars(owner).setdefault(LAYERS, {}).setdefault(name, [vars(owner).get(name)])
    layers.append(wrap)
    _rebuild(owner, name)
    try:
        yield
    finally:
        layers.remove(wrap)
        _rebuild(owner, name)


def _rebuild(owner: Any, name: str) -> None:
    before, *wraps = vars(owner)[LAYERS][name]
    vars(owner).pop(name, None)
    if before is not None:
        setattr(owner, name, before)
    if wraps:
        method = getattr(owner, name)
        for wrap in wraps:
            method = wrap(method)
        setattr(owner, name, method)
        return
    del vars(owner)[LAYERS][name]
    if not vars(owner)[LAYERS]:
        delattr(owner, LAYERS)
