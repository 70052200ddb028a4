"""Swap parameters and put the originals back."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Conflict, NothingAttached


def parameter(pipe: Any, name: str) -> Tensor:
    """The parameter that a dotted name with its component stands for."""
    component, _, path = name.partition(".")
    module = getattr(pipe, component, None)
    if module is None:
        raise NothingAttached(f"the pipeline has no component {component!r} (for {name})")
    try:
        return module.get_parameter(path)
    except AttributeError as error:
        raise NothingAttached(f"{component} has no parameter {path!r}") from error


def plain(weight: Any) -> bool:
    """Whether these are weights as trained, not what a quantiser made of them: other dtypes, or subclasses of tensors."""
    return type(weight) in (Tensor, nn.Parameter) and torch.is_floating_point(weight)


def editable(name: str, weight: Any) -> Tensor:
    """The weight, if a closed form can read and write it; quantised and offloaded ones raise."""
    if not plain(weight):
        kind = getattr(weight, "dtype", type(weight).__name__)
        raise NothingAttached(
            f"{name} is quantised ({type(weight).__name__}, {kind}) and cannot be edited: erase the unquantised base first and "
            "quantise the result, or use a runtime or LoRA method"
        )
    if weight.is_meta:
        raise NothingAttached(f"{name} is offloaded and cannot be written; attach the eraser before sequential offloading")
    found: Tensor = weight
    return found


@contextmanager
def swapped(pipe: Any, tensors: Mapping[str, Tensor]) -> Iterator[int]:
    """Copy ``tensors`` (by dotted name with component) into the pipeline; yields how many, restores them bit-exactly."""
    live = {name: parameter(pipe, name) for name in tensors}
    for name, tensor in tensors.items():
        if live[name].shape != tensor.shape:
            raise NothingAttached(f"{name} is {tuple(live[name].shape)} here and {tuple(tensor.shape)} in the eraser: another base model")
        editable(name, live[name])
    originals = {name: p.detach().clone() for name, p in live.items()}
    written = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            live[name].copy_(tensor)
            written[name] = live[name].detach().clone()
    try:
        yield len(live)
    finally:
        changed = [name for name, p in live.items() if not torch.equal(p, written[name].to(p))]
        with torch.no_grad():
            for name, p in live.items():
                p.copy_(originals[name])
        if changed:
            raise Conflict(f"{changed[0]} was changed by something else while the eraser was attached; the originals are back in place")
