"""The judge that methods, callbacks and searches may use: a residual network with batch norm."""

from functools import cache

from torch import Tensor, nn

from .judging import Judge, JudgeNet, load
from .world import world


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.skip(x)).relu()


def build() -> JudgeNet:
    trunk = nn.Sequential(
        nn.Conv2d(3, 32, 5, 2, 2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        Residual(32, 64, 2),
        Residual(64, 128, 2),
        Residual(128, 192, 2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
    )
    return JudgeNet(trunk, 4 * 192, world())


@cache
def judge_dev() -> Judge:
    """The development judge, loaded once."""
    return load("judge_dev", build())
