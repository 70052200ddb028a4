"""One resumable training loop for every part of the canvas."""

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

log = logging.getLogger("canvas")


class Ema:
    """Exponential moving average of parameters, warmed up so that early weights are forgotten."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        self.shadow = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in model.parameters()], 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        for p, s in zip(model.parameters(), self.shadow, strict=True):
            p.copy_(s)


def train(
    name: str,
    model: nn.Module,
    loss_of: Callable[[int, torch.Generator], Tensor],
    *,
    folder: Path,
    steps: int,
    lr: float,
    warmup: int = 100,
    weight_decay: float = 0.0,
    ema: float = 0.999,
    ema_every: int = 4,
    decay_from: float = 0.5,
    save_every: int = 500,
    sheet: Callable[[int], None] | None = None,
    seconds: float | None = None,
) -> None:
    """Train ``model`` in place to its EMA weights; killed and called again, it goes on from the last checkpoint.

    The learning rate is warmed up, held, and from ``decay_from`` of the run lowered linearly to zero. With ``seconds``, progress is
    counted in time instead of steps, so that a run fits the hours there are.
    """
    path = folder / f"{name}.train.pt"
    optimiser = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98), fused=True
    )
    average = Ema(model, ema)
    step, spent = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        average.shadow, average.count = state["ema"], state["ema_count"]
        step, spent = state["step"], state["spent"]
        log.info("%s: resumed at step %d", name, step)
    started, running = time.time() - spent, None
    model.train()

    def save() -> None:
        state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "ema": average.shadow, "ema_count": average.count}
        torch.save(state | {"step": step, "spent": time.time() - started}, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    while True:
        progress = (time.time() - started) / seconds if seconds else step / steps
        if progress >= 1 or step >= steps:
            break
        rate = lr * min(1.0, (step + 1) / warmup) * min(1.0, (1 - progress) / (1 - decay_from))
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss = loss_of(step, torch.Generator().manual_seed(1_000_003 * step + 17))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step += 1
        if step % ema_every == 0:
            average.update(model)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{name}: loss is not finite at step {step}; the last good state is in {path}")
        if step % 50 == 0:
            elapsed = time.time() - started
            log.info("%s step %d loss %.5f rate %.1e %.0f s (%.3f s a step)", name, step, running, rate, elapsed, elapsed / step)
        if step % save_every == 0:
            save()
            if sheet is not None:
                live = [p.detach().clone() for p in model.parameters()]
                average.copy_to(model)
                sheet(step)
                with torch.no_grad():
                    for p, value in zip(model.parameters(), live, strict=True):
                        p.copy_(value)
                model.train()
    save()
    average.copy_to(model)
    model.eval()
    (folder / f"{name}.json").write_text(json.dumps({"steps": step, "seconds": round(time.time() - started), "loss": running}))
