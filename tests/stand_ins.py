"""Methods that stand in for what a training would give."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from erasure import lora
from erasure.adapter import AdapterEraser
from erasure.concept import Concept
from erasure.families import NAMES
from erasure.method import ErasureMethod, Run


@dataclass(frozen=True, kw_only=True)
class RandomLoRA(ErasureMethod):
    """Random factors on attention layers: what a trained LoRA is to the suite."""

    name: ClassVar[str] = "random_lora"
    families: ClassVar[frozenset[str]] = frozenset(NAMES)

    layers: str = "attn2"
    """Part of the layers' names."""
    encoders: bool = False
    """Text encoders as well."""
    rank: int = 2
    """Rank; every third layer has one more."""
    size: float = 0.3
    """Scale of B."""

    def fit(self, pipe: Any, concepts: Sequence[Concept], *, run: Run = Run()) -> AdapterEraser:
        family, generator = self.family(pipe), torch.Generator().manual_seed(run.seed)
        factors: dict[str, torch.Tensor] = {}
        parts = [*(part for part, _ in family.parts(pipe)), *(["text_encoder"] if self.encoders else [])]
        for part in parts:
            for full, layer in getattr(pipe, part).named_modules():
                name = full.removesuffix(".base_layer")
                wanted = (self.layers in name or (part == "text_encoder" and "self_attn" in name)) and "lora_" not in name
                if type(layer) is torch.nn.Linear and wanted:
                    rank = self.rank + (len(factors) % 6 == 0)
                    key = f"{part}.{lora.file_name(pipe, part, name)}"
                    factors[f"{key}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=generator)
                    factors[f"{key}.lora_B.weight"] = self.size * torch.randn(layer.out_features, rank, generator=generator)
        return self.eraser(tuple(concepts), factors)

    def eraser(self, concepts: tuple[Concept, ...], tensors: Mapping[str, torch.Tensor]) -> AdapterEraser:
        return AdapterEraser(self, concepts, tensors)
