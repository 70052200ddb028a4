"""The judge of tables alone: a patch-based ConvNeXt, trained apart from judge_dev. Nothing that fits or searches may import it."""

from functools import cache

from torch import Tensor, nn

from .judging import Judge, JudgeNet, load
from .world import world


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.GroupNorm(1, width)
        self.widen, self.narrow = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(3 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(nn.functional.gelu(self.widen(self.norm(self.depthwise(x)))))


def build() -> JudgeNet:
    trunk = nn.Sequential(
        nn.Conv2d(3, 96, 4, 4),
        nn.GroupNorm(1, 96),
        Block(96),
        Block(96),
        nn.Conv2d(96, 192, 2, 2),
        Block(192),
        Block(192),
        nn.GroupNorm(1, 192),
        nn.AdaptiveMaxPool2d(2),
        nn.Flatten(),
    )
    return JudgeNet(trunk, 4 * 192, world())


@cache
def judge_test() -> Judge:
    """The test judge, loaded once."""
    return load("judge_test", build())
