"""A method of known rank, and what the tests of exports share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from erasure import artifact
from erasure.concept import Concept
from erasure.families import TABLE
from erasure.method import ErasureMethod, Run, WeightEraser
from tests import tiny
from tests.stand_ins import RandomLoRA
from tests.tiny import latents

CONCEPT = Concept("dagger", anchors=("cat",))
PROMPT = "a photo of a dagger"


@dataclass(frozen=True, kw_only=True)
class LowRank(ErasureMethod):
    """Adds a matrix of rank 2 to every third attention layer and, where asked, other things to other layers."""

    name: ClassVar[str] = "low_rank"
    families: ClassVar[frozenset[str]] = frozenset(family.name for family in TABLE)

    convolutions: bool = False
    """Change convolutions as well."""
    biases: bool = False
    """Change biases as well, which no LoRA can hold."""
    encoder: bool = False
    """Change the text encoder as well."""

    def fit(self, pipe: Any, concepts: Sequence[Concept], *, run: Run = Run()) -> WeightEraser:
        generator = torch.Generator().manual_seed(run.seed)
        changed: dict[str, Tensor] = {}
        parts = [part for part, _ in self.family(pipe).parts(pipe)] + (["text_encoder"] if self.encoder else [])
        for part in parts:
            for name, layer in getattr(pipe, part).named_modules():
                attention = isinstance(layer, torch.nn.Linear) and "attn" in name
                if attention or (self.convolutions and isinstance(layer, torch.nn.Conv2d)):
                    weight = layer.weight.detach()
                    sides = (torch.randn(n, 2, generator=generator) for n in weight.flatten(1).shape)
                    step = (next(sides) @ next(sides).T).reshape(weight.shape).to(weight)
                    changed[f"{part}.{name}.weight"] = weight + 0.3 * step * weight.norm() / step.norm()
                    if self.biases and layer.bias is not None:
                        changed[f"{part}.{name}.bias"] = layer.bias.detach() + 0.1
        return self.eraser(tuple(concepts), changed)

    def eraser(self, concepts: tuple[Concept, ...], tensors: Mapping[str, Tensor]) -> WeightEraser:
        return WeightEraser(self, concepts, tensors)


def save(method: ErasureMethod, pipe: Any, folder: Path) -> tuple[Path, Tensor]:
    """The artefact, and what the attached eraser makes of the prompt."""
    eraser = method.fit(pipe, [CONCEPT])
    artifact.save(eraser, folder, pipe=pipe, base_id="tiny")
    with eraser.attach(pipe):
        return folder, latents(pipe, PROMPT)


def near(made: Tensor, wanted: Tensor, base: Tensor, share: float) -> None:
    """The distance to what was wanted is a small share of what the eraser changes, and that is something."""
    effect = (wanted - base).norm()
    assert effect > 0.05 * base.norm()
    assert (made - wanted).norm() <= share * effect


def state(pipe: Any) -> dict[str, Tensor]:
    parts = {name: module for name, module in pipe.components.items() if isinstance(module, torch.nn.Module)}
    return {f"{part}.{key}": value.clone() for part, module in parts.items() for key, value in module.state_dict().items()}


def same(pipe: Any, before: dict[str, Tensor]) -> bool:
    after = state(pipe)
    return after.keys() == before.keys() and all(torch.equal(value, before[key]) for key, value in after.items())


def sdxl() -> Any:
    """The tiny SDXL with the real one's blocks: those that its original names count, and that their readers expect."""
    pipe = tiny.sdxl()
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe.register_modules(unet=UNet2DConditionModel.from_config(pipe.unet.config, **blocks).eval())
    return pipe


FAMILIES = tiny.FAMILIES | {"sdxl": sdxl}
KINDS = {"weights": LowRank(encoder=True), "adapter": RandomLoRA(layers="attn", encoders=True, size=0.05)}


def nothing_left(folder: Path) -> None:
    assert [p.name for p in folder.iterdir()] == ["artefact"]
