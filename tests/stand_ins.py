"""Methods and files that stand in for what a training would give."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch

from erasure import lora
from erasure.adapter import AdapterEraser
from erasure.concept import Concept
from erasure.families import NAMES, family_of
from erasure.method import ErasureMethod, Run
from erasure.methods.sae.coder import SparseCoder, SparseCoderConfig
from erasure.testing import tiny
from erasure.text import encoders


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
                    key = f"{part}.{lora.file_name(part, name)}"
                    factors[f"{key}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=generator)
                    factors[f"{key}.lora_B.weight"] = self.size * torch.randn(layer.out_features, rank, generator=generator)
        return self.eraser(tuple(concepts), factors)

    def eraser(self, concepts: tuple[Concept, ...], tensors: Mapping[str, torch.Tensor]) -> AdapterEraser:
        return AdapterEraser(self, concepts, tensors)


UNET_BLOCK = "unet.up_blocks.1.attentions.0"
"""A cross-attention block of the tiny UNets, 32 wide."""


@cache
def unet_coder() -> str:
    """Folder of a random sparse coder of that block, the same every time; gone with the process."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        SparseCoder(SparseCoderConfig(d_in=32, num_latents=64, k=8, hookpoint=UNET_BLOCK)).save(_FOLDER.name)
    return _FOLDER.name


@cache
def text_coders(family: str) -> str:
    """Folder of random sparse coders of the first layer of each text encoder of a family's tiny pipeline."""
    pipe, folder = getattr(tiny, family)(), Path(_FOLDER.name) / family
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for encoder in encoders(pipe, family_of(pipe)):
            width = int(getattr(pipe, encoder.component).config.hidden_size)
            config = SparseCoderConfig(d_in=width, num_latents=256, k=64, hookpoint=f"{encoder.component}.layers.0")
            SparseCoder(config).save(folder / encoder.component)
    return str(folder)


_FOLDER = tempfile.TemporaryDirectory()
