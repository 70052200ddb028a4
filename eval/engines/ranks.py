"""Ranks of a launcher (``accelerate launch``, ``torchrun``, ``mpirun``), which share a run's chunks through the store alone.

No process group is opened: ranks need nothing of each other but chunks, and a barrier would end a rank that waits for longer than the
group's timeout while the others still draw.
"""

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from erasure.errors import ErasureError

if TYPE_CHECKING:  # the command line asks for its rank before it loads anything heavy
    from ..store import Cell, Shard

log = logging.getLogger("erasure")

INDEX = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")
COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
LOCAL = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK")
"""Where launchers write a process's place: torch's, Intel's and Open MPI's."""
PATIENCE = 3600.0
"""Seconds without a new chunk after which the others are given up for dead."""


@dataclass(frozen=True)
class Rank:
    """The place of a process among those of a launcher; a process on its own is rank 0 of 1."""

    index: int = 0
    count: int = 1
    local: int = 0
    """Index on its machine."""

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> "Rank":
        """The place of this process; raises ErasureError where the environment contradicts itself."""
        index, count, local = (_number(environment, names) for names in (INDEX, COUNT, LOCAL))
        if (count or 1) > 1 and index is None:
            raise ErasureError(f"the environment says {count} processes ({'/'.join(COUNT)}), but not which one this is: set RANK")
        rank = cls(index or 0, count or 1, local or 0)
        if not 0 <= rank.index < rank.count:
            raise ErasureError(f"the environment says rank {rank.index} of {rank.count} processes: ranks count from 0; start by a launcher")
        return rank

    @property
    def first(self) -> bool:
        """Whether it is the one that speaks, waits and scores."""
        return self.index == 0

    def share(self, shard: "Shard" = (1, 1)) -> "Shard":
        """This rank's part of a shard; the parts of all ranks are disjoint and make up the shard."""
        part, parts = shard
        return part + parts * self.index, parts * self.count

    def device(self, asked: str | None) -> str | None:
        """The device to load on: of several ranks that ask for no device, or for cuda, each has a GPU of its own."""
        if asked not in (None, "cuda") or self.count == 1:
            return asked
        if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
            return "cpu"
        import torch

        # A launcher may show each process its own GPU alone.
        return f"cuda:{self.local % torch.cuda.device_count()}" if torch.cuda.is_available() else asked


def wait(cell: "Cell", shard: "Shard" = (1, 1), *, patience: float = PATIENCE, every: float = 1.0) -> None:
    """Return when all chunks of a shard are there; raises ErasureError when none has come for ``patience`` seconds."""
    left, since = len(cell.missing(shard)), time.monotonic()
    if left:
        log.info("%s: waiting for %d chunks of other ranks", cell.folder, left)
    while left:
        if time.monotonic() - since > patience:
            raise ErasureError(
                f"{cell.folder}: {left} chunks are missing and none has come for {patience / 60:.0f} minutes: see what the other ranks "
                "said, and run the command again; it goes on from here"
            )
        time.sleep(every)
        before, left = left, len(cell.missing(shard))
        since = time.monotonic() if left < before else since


def _number(environment: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    for name in names:
        if value := environment.get(name):
            if not value.isdecimal():
                raise ErasureError(f"{name}={value} is no number: start by a launcher, or unset it")
            return int(value)
    return None
