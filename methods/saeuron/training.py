"""Activations of a UNet block for the training of an autoencoder."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from erasure.families import family_of

from ..sae.training import Read
from .reading import activations


def reader(
    pipe: Any,
    hookpoint: str,
    prompts: Sequence[str],
    batch: int,
    *,
    steps: int = 20,
    patches: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Read, int]:
    """Batches of a block's activations [rows, d] on the text side of the guidance, and their width d, for `sae.training.fit`.

    The base draws an image of each prompt; at each of its ``steps``, up to ``patches`` patches, picked at random, stay in memory in half
    precision: 20 steps of 1000 images, at width 1280, are 3.3 GB. A batch has as many rows as ``batch`` of these maps, drawn from all.
    """
    draw, kept = torch.Generator().manual_seed(seed), list[Tensor]()
    with tqdm(total=len(prompts), desc="activations", unit="image", disable=not progress) as bar:
        for _, x in activations(pipe, family_of(pipe), hookpoint, prompts, steps=steps, seed=seed, bar=bar):
            some = torch.randperm(x.shape[1], generator=draw)[:patches].to(x.device)
            kept.append(x[:, some].flatten(0, 1).half().cpu())
    pool, rows = torch.cat(kept), batch * len(some)

    def read(generator: torch.Generator) -> Tensor:
        return pool[torch.randint(len(pool), (rows,), generator=generator)].float()

    return read, pool.shape[1]
