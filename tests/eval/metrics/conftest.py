"""Rows and small images for metrics, and networks of the right interface with random weights."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from erasure.eval.rows import Row


class Pooled(nn.Module):
    """Three colour means and three spreads, mixed: features whose covariance has full rank."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(6, 6, bias=False)
        nn.init.orthogonal_(self.mix.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, images: Tensor) -> Tensor:
        return 10 * self.mix(torch.cat([images.mean((2, 3)), images.std((2, 3))], dim=1))


@pytest.fixture
def pooled() -> nn.Module:
    return Pooled()


@pytest.fixture(scope="session")
def rows() -> Callable[..., list[Row]]:
    """n rows, each with its own prompt."""
    return lambda n, start=0, prompt="a picture of number {}": [
        Row(f"row-{i:03d}", "other", prompt.format(i), i) for i in range(start, start + n)
    ]


@pytest.fixture(scope="session")
def noise() -> Callable[..., Tensor]:
    """n uint8 images [n, 3, side, side] of uniform noise, each around its own brightness."""

    def make(n: int, seed: int = 0, side: int = 16, bright: float = 0.5) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        level = bright * torch.rand(n, 3, 1, 1, generator=generator)
        return ((level + 0.5 * torch.rand(n, 3, side, side, generator=generator)).clamp(0, 1) * 255).round().to(torch.uint8)

    return make
