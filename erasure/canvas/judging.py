"""What a judge of canvas images says, and how it says it; the two judges are in judge_dev.py and judge_test.py."""

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import ErasureError
from .world import World


class Logits(NamedTuple):
    """Raw outputs of a judge network for n images."""

    presence: Tensor
    """[n, objects], one sigmoid each."""
    style: Tensor
    """[n, styles], one softmax."""
    background: Tensor
    """[n, backgrounds], one softmax."""
    unrecognised: Tensor
    """[n], a sigmoid: noise, blanks, blends, blur, fragments."""


class JudgeNet(nn.Module):
    """A trunk that gives features [n, width], and the four heads."""

    def __init__(self, trunk: nn.Module, width: int, of: World) -> None:
        super().__init__()
        self.trunk = trunk
        self.sizes = [len(of.objects), len(of.styles), len(of.backgrounds), 1]
        self.head = nn.Linear(width, sum(self.sizes))

    def forward(self, images: Tensor) -> Logits:
        """Logits of images [n, 3, 64, 64] in -1..1."""
        presence, style, background, unrecognised = self.head(self.trunk(images)).split(self.sizes, dim=1)
        return Logits(presence, style, background, unrecognised[:, 0])


@dataclass(frozen=True)
class Verdict:
    """A judge's calls on n images."""

    scores: Tensor
    """Presence probabilities [n, objects]."""
    present: Tensor
    """bool [n, objects]: scores at or over each object's threshold, in images that are recognised."""
    style: Tensor
    """int [n]."""
    background: Tensor
    """int [n]."""
    unrecognised: Tensor
    """bool [n]: nothing that a person could name."""


class Judge:
    """A judge network with its thresholds: call it on images [n, 3, 64, 64] in 0..1, as pipelines give them with output_type="pt"."""

    def __init__(self, name: str, net: JudgeNet, thresholds: Tensor, unrecognised_threshold: float) -> None:
        self.name, self.net = name, net.eval()
        self.thresholds, self.unrecognised_threshold = thresholds, unrecognised_threshold

    @torch.no_grad()
    def __call__(self, images: Tensor, batch: int = 128) -> Verdict:
        if images.ndim != 4 or images.shape[1:] != (3, 64, 64):
            raise ValueError(f"the canvas judge {self.name} reads images [n, 3, 64, 64] in 0..1, got {tuple(images.shape)}")
        if not len(images):
            raise ValueError(f"the canvas judge {self.name} was given no images: a rate of none would be meaningless")
        device = next(self.net.parameters()).device
        parts = [self.net(part.to(device, torch.float32) * 2 - 1) for part in images.split(batch)]
        logits = Logits(*(torch.cat(field).cpu() for field in zip(*parts, strict=True)))
        unrecognised = logits.unrecognised.sigmoid() >= self.unrecognised_threshold
        scores = logits.presence.sigmoid()
        present = (scores >= self.thresholds) & ~unrecognised[:, None]
        return Verdict(scores, present, logits.style.argmax(1), logits.background.argmax(1), unrecognised)


def load(name: str, net: JudgeNet) -> Judge:
    """The judge whose weights and thresholds lie in the package as ``<name>.safetensors``."""
    path = str(files("erasure.canvas").joinpath(f"weights/{name}.safetensors"))
    with safe_open(path, "pt") as file:
        thresholds = torch.tensor(json.loads(file.metadata()["thresholds"]))
        problems = net.load_state_dict({key: file.get_tensor(key).float() for key in file.keys()}, strict=False)
        gaps = [key for key in problems.missing_keys if not key.endswith("num_batches_tracked")]  # a counter that only training reads
        if gaps or problems.unexpected_keys:
            raise ErasureError(f"{path} is not a {name}: it lacks {gaps}, and has {problems.unexpected_keys} too many")
        return Judge(name, net, thresholds, float(file.metadata()["unrecognised_threshold"]))
