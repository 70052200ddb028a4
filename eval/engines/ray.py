"""The chunks of a cell, drawn by the actors of a Ray cluster into a folder that all its machines share."""

import logging
import os
import platform
from collections import Counter, deque
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from erasure import artifact
from erasure.errors import ErasureError
from erasure.method import Eraser
from erasure.models import load_base

from ..bench import Bench, record_peak
from ..generate import make, under
from ..memory import peak_memory
from ..store import Cell, Chunk, Shard

log = logging.getLogger("erasure")

LOSSES = 3
"""Workers that one chunk, or loading the model, may cost before it is taken for the cause."""


@dataclass(frozen=True)
class Recipe:
    """All that a worker needs to draw what the process that hires it would; small enough to be pickled."""

    bench: Bench
    """Its pipeline stays behind."""
    name: str
    base: dict[str, Any]
    """Arguments of ``load_base``."""
    artefact: str | None
    """Folder of the eraser's artefact; None for the base."""


class Worker:
    """An actor: loads model and eraser once, then draws chunk after chunk."""

    def open(self, recipe: Recipe, place: Path, threads: int) -> str:
        """Get ready; the cell refuses a machine whose device, versions or weights are not those that it was begun with."""
        try:
            os.chdir(place)  # relative paths mean the same
            torch.set_num_threads(threads)
            self.pipe = load_base(**recipe.base)
            eraser = artifact.load_eraser(recipe.artefact)[0] if recipe.artefact else None
            self.cell = replace(recipe.bench, pipe=self.pipe).cell(recipe.name, eraser)
            self.protocol, self.held = recipe.bench.suite.protocol, ExitStack()  # never closed: the process ends with its actor
            self.held.enter_context(under(self.pipe, self.protocol))
            self.held.enter_context(eraser.attach(self.pipe) if eraser else nullcontext())
        except (ErasureError, OSError) as error:  # as plain words, since errors with arguments of their own do not travel
            raise ErasureError(f"a Ray worker on {platform.node()} cannot start: {error}") from None
        return f"worker ready: {platform.node()}, pid {os.getpid()}"

    def draw(self, chunk: Chunk) -> str:
        """Make a chunk, unless a worker kept it before it was lost."""
        if (self.cell.folder / chunk.folder).is_dir():
            return f"{chunk.folder} was there"
        with peak_memory(str(self.pipe.device)) as peak:
            make(self.pipe, self.cell, chunk, self.protocol)
        record_peak(self.cell.folder / "memory.json", peak.megabytes or 0)
        return f"{chunk.folder} made by {platform.node()}, pid {os.getpid()}"


def generate(recipe: Recipe, eraser: Eraser | None, shard: Shard = (1, 1)) -> Cell:
    """Make the missing chunks of a cell: one worker a GPU of the cluster, or one for as many of its CPUs as this process has threads.

    A worker that is lost is replaced, and its chunk given to another. Takes the cluster of RAY_ADDRESS or of this machine, else starts
    one here. Raises ErasureError for what a worker raises, and for a chunk that has cost several workers.
    """
    cell = recipe.bench.cell(recipe.name, eraser)
    cell.clean()
    todo = deque(cell.missing(shard))
    if not todo:
        return cell
    ray, hire, slots = _cluster(str(recipe.bench.pipe.device))
    order = (replace(recipe, bench=replace(recipe.bench, pipe=None, choice=None)), Path.cwd(), torch.get_num_threads())
    left, running, losses = len(todo), dict[Any, tuple[Any, Chunk | None]](), Counter[str]()

    def start() -> None:
        worker = hire()
        running[worker.open.remote(*order)] = (worker, None)

    with tqdm(total=sum(len(c.rows) for c in todo), desc=cell.folder.name, unit="image", disable=not recipe.bench.progress) as bar:
        for _ in range(min(slots, len(todo))):
            start()
        try:
            while left:
                done = ray.wait(list(running))[0][0]
                worker, chunk = running.pop(done)
                try:
                    log.info("%s: %s", cell.folder, ray.get(done))
                except ray.exceptions.RayTaskError as error:
                    raise error.cause or error from None
                except ray.exceptions.RayError as error:  # the worker is gone, or out of reach
                    ray.kill(worker)
                    what = chunk.folder if chunk else "loading the model"
                    log.warning("a Ray worker was lost at %s (%s); another takes over", what, type(error).__name__)
                    losses[what] += 1
                    if losses[what] > LOSSES:
                        raise ErasureError(f"{what} has cost {losses[what]} Ray workers, the last by: {error}") from error
                    todo.extendleft([chunk] if chunk else [])
                    start()
                    continue
                if chunk is not None:
                    left -= 1
                    bar.update(len(chunk.rows))
                if todo:
                    chunk = todo.popleft()
                    running[worker.draw.remote(chunk)] = (worker, chunk)
                else:
                    ray.kill(worker)
        finally:
            for worker, _ in running.values():
                ray.kill(worker)
    return cell


def _cluster(device: str) -> tuple[Any, Any, int]:
    """Ray, what hires a worker, and for how many there is room."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ErasureError("--engine ray needs Ray: pip install 'erasure-suite[ray]'") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    unit, each = ("GPU", 1) if device.startswith("cuda") else ("CPU", torch.get_num_threads())
    there = int(ray.cluster_resources().get(unit, 0))
    if there < each:
        raise ErasureError(f"the Ray cluster has {there} {unit}s, a worker needs {each}: start it with more, or set OMP_NUM_THREADS")
    options = {"num_gpus": 1} if unit == "GPU" else {"num_cpus": each}
    return ray, ray.remote(**options)(Worker).remote, there // each
