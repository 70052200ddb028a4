"""The eraser that masks are: a bit for every unit, folded into the weights of whatever base they are attached to."""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from erasure.errors import ErasureError, NothingAttached
from erasure.families import TABLE, Unit, family_of
from erasure.method import WeightEraser

from . import sites

GATED = tuple(dict.fromkeys(row for family in TABLE for row in family.gates))


@dataclass(frozen=True)
class MaskEraser(WeightEraser):
    """Units to switch off: ``changed`` has a mask [count] bool for each site, True for off. The new weights are the base's, with zeros.

    Errors: tensors that are no masks raise; a base without one of the sites, or with another count there, raises when attached.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, mask in self.changed.items():
            if mask.dtype != torch.bool or mask.ndim != 1 or key.rpartition(".")[2] not in get_args(Unit):
                raise ErasureError(f"{key} ({mask.dtype}, {tuple(mask.shape)}) is no mask of {', '.join(get_args(Unit))}")

    def values(self, pipe: Any) -> Mapping[str, Tensor]:
        if not self.changed:
            return {}
        known = {site.key: site for site in sites.find(pipe, family_of(pipe), get_args(Unit))}
        if unknown := [key for key in self.changed if key not in known]:
            raise NothingAttached(f"{type(pipe).__name__} has no {unknown[0]} (and {len(unknown) - 1} more): the masks are another base's")
        return sites.fold(pipe, [known[key] for key in self.changed], self.changed)

    def writes(self) -> Set[str]:
        return {name for key, mask in self.changed.items() if mask.any() for name in sites.parameters(key, GATED)}

    def details(self) -> dict[str, Any]:
        return {
            f"Switched off: {kind}": {block or "all": {**n, "share": f"{n['off'] / n['all']:.2%}"} for block, n in blocks.items()}
            for kind, blocks in shares(self).items()
        }


def shares(eraser: MaskEraser) -> dict[str, dict[str, dict[str, int]]]:
    """How many units an eraser switches ``off``, of ``all``, by kind (heads, neurons, norms) and block; block "" is all together."""
    return sites.shares(eraser.changed)
