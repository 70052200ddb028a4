"""Suite rows to images in a cell of the store; a killed run goes on where it stopped."""

import copy
import inspect
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from erasure.errors import ErasureError
from erasure.families import call_options

from .protocol import SHIPPED, Protocol, is_flow
from .rows import ASKED, Row
from .store import Cell, Chunk, Shard, chunked

log = logging.getLogger("erasure")

Attach = Callable[[Any], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Estimate:
    """What a run would cost."""

    images: int
    minutes: float
    megabytes: float
    """At most: as much as the pixels take without compression."""


def generate(
    pipe: Any, cell: Cell, protocol: Protocol, *, attach: Attach = nullcontext, shard: Shard = (1, 1), progress: bool = True
) -> None:
    """Make the missing chunks of a cell under a protocol, with an eraser's ``attach`` if given.

    Every image has its own generator, seeded by its row, so that neither order nor shard changes it. Raises ErasureError on
    NaN or black images, before anything of their chunk is kept; where rows ask whether benign prompts are refused, black images
    are the answer, and stay. The pipeline is left as it was found.
    """
    cell.clean()
    todo = cell.missing(shard)
    bar = tqdm(total=sum(len(c.rows) for c in todo), desc=cell.folder.name, unit="image", disable=not progress)
    with bar, under(pipe, protocol), attach(pipe):
        for chunk in todo:
            make(pipe, cell, chunk, protocol)
            bar.update(len(chunk.rows))
    log.info("%s: %d chunks made, %d were there", cell.folder, len(todo), len(cell.chunks) - len(todo))


def make(pipe: Any, cell: Cell, chunk: Chunk, protocol: Protocol) -> None:
    """Draw and keep one chunk of a cell, by a pipeline that is already ``under`` the protocol."""
    started = time.perf_counter()
    images = draw(pipe, chunk.rows, protocol)
    cell.write(chunk, images, time.perf_counter() - started)


@contextmanager
def under(pipe: Any, protocol: Protocol) -> Iterator[None]:
    """The pipeline with the protocol's scheduler, without safety checker and progress bars; undone at the end."""
    actual = str(pipe.dtype).removeprefix("torch.")
    if actual != protocol.dtype:
        raise ErasureError(f"the protocol asks for {protocol.dtype}, the pipeline is {actual}: load it with --dtype {protocol.dtype}")
    before = {name: getattr(pipe, name) for name in ("scheduler", "safety_checker") if hasattr(pipe, name)}
    bars = getattr(pipe, "_progress_bar_config", {})
    pipe.scheduler = _scheduler(pipe.scheduler, protocol)
    if "safety_checker" in before:
        pipe.safety_checker = None
    pipe.set_progress_bar_config(**{**bars, "disable": True})
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(pipe, name, value)
        pipe.set_progress_bar_config(**bars)


def draw(pipe: Any, rows: Sequence[Row], protocol: Protocol) -> Tensor:
    """Images [n, 3, height, width] in 0..1 of some rows by one call of a pipeline that is already ``under`` the protocol.

    The rows share guidance and size, their own or the protocol's. A video is its frames below each other: height is frames x height.
    """
    guidance, height, width = _shared(rows, protocol)
    arguments: dict[str, Any] = {
        "prompt": [row.prompt for row in rows],
        # On the CPU wherever the model runs, so that one seed is one noise everywhere.
        "generator": [torch.Generator("cpu").manual_seed(row.seed) for row in rows],
        "num_inference_steps": protocol.steps,
        "guidance_scale": guidance,
        "height": height,
        "width": width,
        "output_type": "pt",
        **call_options(pipe),
    }
    if protocol.true_cfg is not None:
        arguments["true_cfg_scale"] = protocol.true_cfg
    if protocol.negative_prompt is not None or protocol.true_cfg is not None:
        arguments["negative_prompt"] = [protocol.negative_prompt or ""] * len(rows)
    if protocol.frames is None:
        images = pipe(**arguments).images.detach().float().cpu()
    else:
        videos = pipe(**arguments, num_frames=protocol.frames).frames.detach().float().cpu()  # [n, frames, 3, h, w]
        images = videos.transpose(1, 2).flatten(2, 3)
    _check(images, rows, (len(rows), 3, height * (protocol.frames or 1), width), protocol.dtype)
    return images


def _shared(rows: Sequence[Row], protocol: Protocol) -> tuple[float, int, int]:
    """Guidance, height and width of rows of one chunk; rows that differ raise ErasureError."""
    settings = {
        (
            protocol.guidance if row.guidance is None else row.guidance,
            protocol.height if row.height is None else row.height,
            protocol.width if row.width is None else row.width,
        )
        for row in rows
    }
    if len(settings) != 1:
        raise ErasureError(f"rows of one call share guidance and size; these have {len(settings)} settings: make them by chunks")
    return settings.pop()


def seconds_per_image(pipe: Any, rows: Sequence[Row], protocol: Protocol, *, attach: Attach = nullcontext) -> float:
    """Timed on one call, of which nothing is kept; a first call that only warms up is not counted."""
    rows = chunked(rows, len(rows))[0].rows
    with under(pipe, protocol), attach(pipe):
        draw(pipe, rows[:1], protocol)
        started = time.perf_counter()
        draw(pipe, rows, protocol)
    return (time.perf_counter() - started) / len(rows)


def estimate(images: int, seconds: float, protocol: Protocol) -> Estimate:
    """Cost of that many images at so many seconds each, measured by ``Cell.seconds_per_image`` or ``seconds_per_image``."""
    return Estimate(images, images * seconds / 60, images * (protocol.frames or 1) * protocol.height * protocol.width * 3 / 1e6)


def _scheduler(shipped: Any, protocol: Protocol) -> Any:
    """A copy of the model's own scheduler where the class agrees, else one of the protocol's class on the same noise schedule."""
    own = protocol.scheduler in (SHIPPED, type(shipped).__name__)
    if own and not protocol.scheduler_config:
        return copy.deepcopy(shipped)
    import diffusers

    wanted = type(shipped) if own else getattr(diffusers, protocol.scheduler, None)
    if wanted is None or not issubclass(wanted, diffusers.SchedulerMixin):
        raise ErasureError(f"the protocol's scheduler {protocol.scheduler!r} is no scheduler of diffusers {diffusers.__version__}")
    unknown = sorted(protocol.scheduler_config.keys() - inspect.signature(wanted).parameters.keys())
    if unknown:
        raise ErasureError(f"{protocol.scheduler} has no setting {', '.join(unknown)}: correct scheduler_config in the protocol")
    # Without its private keys, which make from_config drop values that a pipeline has patched.
    public = {key: value for key, value in shipped.config.items() if not key.startswith("_")}
    made = wanted.from_config({**public, **protocol.scheduler_config})
    if is_flow(made) != is_flow(shipped):
        raise ErasureError(
            f"the protocol's scheduler {protocol.scheduler} does not fit this model, which ships {type(shipped).__name__}: only one of "
            "them is for flow matching; take a suite whose protocol has a block flow, or write one"
        )
    return made


def _check(images: Tensor, rows: Sequence[Row], shape: tuple[int, ...], dtype: str) -> None:
    if tuple(images.shape) != shape:
        raise ErasureError(f"the pipeline gave images {tuple(images.shape)}, the suite asks for {shape}")
    flat, may_refuse = images.flatten(1), torch.tensor([ASKED[row.kind] == "answered" for row in rows])
    for problem, bad in (("NaN", ~flat.isfinite().all(1)), ("nothing but black", (flat <= 0).all(1) & ~may_refuse)):
        if bad.any():
            ids = ", ".join(row.id for row, b in zip(rows, bad, strict=True) if b)
            raise ErasureError(
                f"the pipeline gave {problem} for {ids}: an overflow in {dtype} or a checker that blanks images; "
                "try --dtype float32. Such images are never scored."
            )
