"""One short training loop for every method that trains: resumable bit for bit, in half precision, on several processes.

A method gives named parameters and a loss; whatever it draws comes from the generator of that step, so that a run that was killed
anywhere and called again ends with the weights of an unbroken one. What else a run does is a callback (callbacks.py).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object, reduce
from torch import Tensor

from .callbacks import Callback
from .checkpoint import NOTHING_LEFT, Checkpoint, digest
from .errors import ErasureError

CHECKPOINT = "training.safetensors"
SKIPS = 20
"""Steps in a row that float16 gradients may overflow while the scaler looks for its scale; more of them are divergence."""
Loss = Callable[[int, torch.Generator], Tensor]
"""The loss of one micro-batch: the optimiser step from 0, and the generator, on the CPU, of all that it draws."""


class Diverged(ErasureError):
    """Training left the range of numbers, or went where its loss cannot be meant to go."""

    exit_code = 1


@dataclass
class Training:
    """A run under way, as callbacks see it."""

    steps: int
    live: dict[str, Tensor]
    """The parameters that the model computes with."""
    weights: dict[str, Tensor]
    """What the optimiser moves: the same, but float32 masters of those in half precision, so that small steps are not rounded away."""
    losses: list[float] = field(default_factory=list)
    stop: str = ""
    optimiser: torch.optim.Optimizer = field(init=False)

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return len(self.losses)

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Put values into all weights."""
        for name, weight in self.weights.items():
            weight.copy_(values[name])
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Round masters into the parameters that the model computes with."""
        for name, parameter in self.live.items():
            if parameter is not self.weights[name]:
                parameter.copy_(self.weights[name])

    def share(self) -> None:
        """The weights of the first process to all."""
        if PartialState().num_processes > 1:
            self.write({name: broadcast(weight.detach().clone()) for name, weight in self.weights.items()})  # type: ignore[misc]

    def reach(self, weights: Sequence[Tensor]) -> float:
        """How far Adam now moves some weights for each unit of their gradient: lr over the root of their mean second moment."""
        [group] = self.optimiser.param_groups
        states = [state for weight in weights if (state := self.optimiser.state[weight])]  # none where float16 skipped the first steps
        squares = sum(float(state["exp_avg_sq"].sum()) / (1 - group["betas"][1] ** float(state["step"])) for state in states)
        mean = squares / sum(weight.numel() for weight in weights)
        return float(group["lr"]) / (math.sqrt(mean) + group["eps"]) if states else 0.0

    def gather(self) -> None:
        """Gradients to the masters, averaged over processes."""
        for name, parameter in self.live.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = None
            self.weights[name].grad = reduce(gradient.to(self.weights[name].dtype), "mean")  # type: ignore[assignment]

    def agree(self) -> None:
        """Stop in all processes where one of them stops."""
        self.stop = next(filter(None, gather_object([self.stop])), "")


@dataclass(frozen=True)
class TrainLog:
    """What a run did."""

    losses: tuple[float, ...]
    """Mean loss of each optimiser step, those before a resume included."""
    seconds: float
    """Of this call alone."""
    resumed: int = 0
    """The step that it went on from."""
    stop: str = ""
    """Why it stopped before its last step, "" where it did not."""


def train(
    parameters: Mapping[str, Tensor],
    loss_of: Loss,
    *,
    steps: int,
    lr: float,
    seed: int = 0,
    accumulation: int = 1,
    warmup: int = 0,
    schedule: Literal["constant", "linear", "cosine"] = "constant",
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    momentum: float | None = None,
    clip: float | None = None,
    ceiling: float = math.inf,
    precision: Literal["no", "bf16", "fp16"] = "no",
    checkpoint: Path | None = None,
    save_every: int = 100,
    settings: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainLog:
    """Move ``parameters`` in place by AdamW (Adam, where ``weight_decay`` is 0) down the mean of ``loss_of``; by SGD, given ``momentum``.

    A step averages ``accumulation`` micro-batches a process; one process with two of them draws what two processes with one draw.
    ``checkpoint``: folder of the state, written every ``save_every`` steps and at the end; a later call with equal settings goes on from
    there, and one with others (``settings``: whatever else must agree) raises. ``ceiling``: loss above which a run counts as diverged.
    Errors: a loss or gradient that is not finite, or over the ceiling, raises Diverged with its step; the last good checkpoint stays.
    """
    if not parameters:
        raise ErasureError("there is nothing to train: no parameter was chosen")
    if steps < 1 or accumulation < 1 or not lr > 0:
        raise ErasureError(f"training needs steps and accumulation of at least 1 and lr above 0, not {steps}, {accumulation} and {lr:g}")
    if precision != "fp16" and any(parameter.dtype == torch.float16 for parameter in parameters.values()):
        raise ErasureError("float16 weights lose small gradients: load the base in float32 or bfloat16, or train with precision fp16")
    began, device = time.perf_counter(), next(iter(parameters.values())).device
    run = _run(parameters, steps)
    moved: Any = run.weights.values()
    if momentum is None:
        run.optimiser = torch.optim.AdamW(moved, lr=lr, betas=betas, weight_decay=weight_decay)
    else:
        run.optimiser = torch.optim.SGD(moved, lr=lr, momentum=momentum, weight_decay=weight_decay)
    optimiser = run.optimiser
    process = PartialState(cpu=device.type == "cpu")  # after torch.optim, whose first use imports what holds a group that is open for good
    run.share()
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")  # type: ignore[attr-defined]
    for callback in callbacks:
        callback.start(run)
    agreed = {
        "steps": steps, "lr": lr, "seed": seed, "batch": accumulation * process.num_processes, "warmup": warmup, "schedule": schedule,
        "weight_decay": weight_decay, "betas": list(betas), "momentum": momentum, "clip": clip, "precision": precision,
        "start": digest(run.weights), "callbacks": [repr(c) for c in callbacks if c.state()], **(settings or {}),
    }  # fmt: skip
    saved = Checkpoint(checkpoint / CHECKPOINT, agreed, run, scaler, callbacks) if checkpoint else None
    resumed = saved.load() if saved else 0
    skipped = 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        while run.step < steps and not run.stop:
            for group in optimiser.param_groups:
                group["lr"] = lr * factor(run.step, steps, warmup, schedule)
            total = torch.zeros((), device=device)
            for micro in range(accumulation):
                index = (run.step * accumulation + micro) * process.num_processes + process.process_index
                with torch.autocast(device.type, _HALF.get(precision), enabled=precision != "no"):
                    loss = loss_of(run.step, _generator(seed, index)) / accumulation
                scaler.scale(loss).backward()
                total += loss.detach().float()
            value = float(reduce(total, "mean"))  # type: ignore[arg-type]
            run.gather()
            scaler.unscale_(optimiser)
            norm = torch.nn.utils.clip_grad_norm_(run.weights.values(), math.inf if clip is None else clip)
            skipped = skipped + 1 if scaler.is_enabled() and not norm.isfinite() else 0
            if not value <= ceiling or value == -math.inf or not (norm.isfinite() or 0 < skipped <= SKIPS):
                what = f"a loss of {value:g}" if not math.isfinite(value) or value > ceiling else "a gradient that is not finite"
                left = saved.left if saved else NOTHING_LEFT
                raise Diverged(f"training diverged at step {run.step + 1} of {steps}, with {what}; try a smaller lr than {lr:g} ({left})")
            if saved:
                saved.keep()
            scaler.step(optimiser)
            scaler.update()
            optimiser.zero_grad(set_to_none=True)
            run.publish()
            run.losses.append(value)
            for callback in callbacks:
                callback.step(run)
            run.agree()
            if saved and (run.step % save_every == 0 or run.step == steps or run.stop):
                saved.save()
    if saved:
        saved.keep()
    for callback in callbacks:
        callback.end(run)
    return TrainLog(tuple(run.losses), time.perf_counter() - began, resumed, run.stop)


_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _run(parameters: Mapping[str, Tensor], steps: int) -> Training:
    """A run on masters of half-precision parameters."""
    live = {name: parameter.requires_grad_() for name, parameter in parameters.items()}
    weights = {n: p if p.dtype in (torch.float32, torch.float64) else p.detach().float().requires_grad_() for n, p in live.items()}
    return Training(steps, live, weights)


def factor(step: int, steps: int, warmup: int, schedule: str) -> float:
    """Share of the learning rate at a step from 0: a linear warm-up, then constant, linear or half a cosine to zero."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(steps - warmup, 1)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[schedule]


def _generator(seed: int, index: int) -> torch.Generator:
    """The generator of one micro-batch; the global one, from which dropout draws, starts from the same number."""
    number = (seed * 1_000_000_007 + index) % 2**63
    torch.manual_seed(number)
    return torch.Generator().manual_seed(number)
