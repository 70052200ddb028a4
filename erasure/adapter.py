"""Erasers that are LoRA adapters, in the file format of diffusers: no base weight is written, so that quantised bases take them too."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import ErasureError
from .families import Family
from .lora import by_component
from .method import Eraser
from .seams import adapters


@dataclass(frozen=True)
class AdapterEraser(Eraser):
    """LoRA factors by the keys of diffusers' files: ``unet.down_blocks.0….to_k.lora_A.weight`` [r, in] and ``lora_B`` [out, r].

    Alpha is the rank in every layer, so the change of a layer is B A. Errors: keys without a component, halves of a pair, factors
    that do not fit each other and a LoRA without effect raise ErasureError.
    """

    kind: ClassVar[str] = "adapter"
    factors: Mapping[str, Tensor] = field(repr=False)
    notes: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Tables for the card: see ``details``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = by_component(self.factors)
        for component, layers in parts.items():
            for layer, pair in layers.items():
                if pair.keys() != {"A", "B"} or len(pair["A"]) != pair["B"].shape[1]:
                    raise ErasureError(f"{component}.{layer}: a LoRA layer is a pair lora_A [r, in], lora_B [out, r] of one rank")
                if not all(torch.is_floating_point(t) and t.isfinite().all() for t in pair.values()):
                    raise ErasureError(f"{component}.{layer} holds values that are not finite")
        if not any(pair["A"].any() and pair["B"].any() for layers in parts.values() for pair in layers.values()):
            raise ErasureError(f"all LoRA layers of {self.method.name} are zero: nothing would be erased")

    def seams(self, pipe: Any, family: Family) -> Iterable[AbstractContextManager[int]]:
        yield adapters.loaded(pipe, self.factors)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.factors)

    def details(self) -> dict[str, Any]:
        return dict(self.notes)
