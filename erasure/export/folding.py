"""Weights with an eraser folded in."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..adapter import AdapterEraser
from ..errors import ErasureError
from ..lora import by_component, live_name
from ..method import Eraser, WeightEraser
from ..seams.weights import editable, parameter


@dataclass
class Notes:
    """What a writer says of its output: ``checks`` open what was written as pipelines, by file."""

    usage: str
    checks: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    remedy: str = ""


@torch.no_grad()
def folded(eraser: Eraser, pipe: Any) -> dict[str, Tensor]:
    """New values of the parameters that the eraser changes, by dotted name with component, in the base's dtype, on the CPU."""
    if isinstance(eraser, WeightEraser):
        return {name: tensor.to(editable(name, parameter(pipe, name)).dtype).cpu() for name, tensor in eraser.values(pipe).items()}
    if not isinstance(eraser, AdapterEraser):
        raise ErasureError(f"{eraser.method.name} changes no weights that could be folded in")
    new = {}
    for component, layers in by_component(eraser.factors).items():
        module = getattr(pipe, component)
        for layer, pair in layers.items():
            name = f"{component}.{live_name(module, layer)}.weight"
            weight = editable(name, parameter(pipe, name)).cpu()
            change = (pair["B"].flatten(1).double() @ pair["A"].flatten(1).double()).reshape(weight.shape)
            new[name] = (weight.double() + change).to(weight.dtype)
    return new


def change(new: dict[str, Tensor], pipe: Any) -> dict[str, Tensor]:
    """New minus old, in float32, without the parameters that stay as they are."""
    changes = {name: tensor.float() - parameter(pipe, name).detach().cpu().float() for name, tensor in new.items()}
    return {name: tensor for name, tensor in changes.items() if tensor.any()}
