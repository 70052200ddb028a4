"""What a training run can do beside training: show its progress, average its weights, measure itself and stop when that is enough."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm.auto import tqdm

from .canvas.splits import splits
from .errors import ErasureError

if TYPE_CHECKING:
    from .training import Training


class Callback:
    """Something that watches a run. One whose state is not empty takes part in checkpoints, and its repr in what must agree on resume."""

    def __repr__(self) -> str:
        return type(self).__name__  # that of object would be another in each process

    def start(self, run: "Training") -> None:
        """Before the first step, or the first after a resume; ``load`` comes later."""

    def step(self, run: "Training") -> None:
        """After an optimiser step; ``run.stop`` set to a reason, by one process or all, makes it the last."""

    def end(self, run: "Training") -> None:
        """After the last step."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` gave."""


class Progress(Callback):
    """A progress bar with the mean loss of the last steps."""

    def __init__(self, name: str, show: bool = True) -> None:
        self.name, self.show = name, show
        self.bar: Any = None

    def start(self, run: "Training") -> None:
        self.bar = tqdm(total=run.steps, desc=self.name, disable=not (self.show and PartialState().is_main_process))

    def step(self, run: "Training") -> None:
        recent = run.losses[-20:]
        self.bar.set_postfix(loss=f"{sum(recent) / len(recent):.4g}", refresh=False)
        self.bar.update(run.step - self.bar.n)

    def end(self, run: "Training") -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it stands, for runs that end by an error."""
        if self.bar is not None:
            self.bar.close()


@dataclass
class Ema(Callback):
    """Exponential moving average of the weights, warmed up as (1 + n) / (10 + n); the run ends with the averages in place."""

    decay: float = 0.999
    average: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Averages by name, float32."""

    def start(self, run: "Training") -> None:
        self.average = {name: weight.detach().clone() for name, weight in run.weights.items()}

    @torch.no_grad()
    def step(self, run: "Training") -> None:
        decay = min(self.decay, (1 + run.step) / (10 + run.step))
        for name, weight in run.weights.items():
            self.average[name].lerp_(weight.detach(), 1 - decay)

    def end(self, run: "Training") -> None:
        run.write(self.average)

    def state(self) -> dict[str, Tensor]:
        return self.average

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.average = {name: tensor.to(self.average[name]) for name, tensor in state.items()}

    @contextmanager
    def applied(self, run: "Training") -> Iterator[None]:
        """The averages in place of the weights, for a while."""
        kept = {name: weight.detach().clone() for name, weight in run.weights.items()}
        run.write(self.average)
        try:
            yield
        finally:
            run.write(kept)


@dataclass
class Validate(Callback):
    """Call ``measure`` (less is better: `Shown`, say) every so many steps.

    Stops at ``goal``, or after ``patience`` measurements without a new best; the run ends with the weights of the best one.
    NaN is the worst. Of several processes, which may differ in the last digits, the first one's measurement counts.
    Put it after an Ema, given as ``ema``, to measure and keep the averages.
    """

    measure: Callable[[], float] = field(repr=False)
    every: int = 50
    goal: float = -math.inf
    patience: int | None = None
    ema: Ema | None = None
    values: dict[int, float] = field(default_factory=dict, repr=False)
    """Measurements by step."""
    best: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def step(self, run: "Training") -> None:
        if run.step % self.every and run.step < run.steps:
            return
        if self.ema is None:
            self._measure(run)
        else:
            with self.ema.applied(run):
                self._measure(run)
        since = list(self.values.values())
        waited = len(since) - 1 - since.index(min(since))
        if since[-1] <= self.goal:
            run.stop = f"reached {since[-1]:g} at step {run.step}, as asked"
        elif self.patience is not None and waited >= self.patience:
            run.stop = f"no better than {min(since):g} in {waited} measurements"

    @torch.no_grad()
    def _measure(self, run: "Training") -> None:
        [value] = broadcast_object_list([float(self.measure())])
        value = math.inf if math.isnan(value) else value
        if not self.values or value < min(self.values.values()):
            self.best = {name: weight.detach().clone() for name, weight in run.weights.items()}
        self.values[run.step] = value

    def end(self, run: "Training") -> None:
        if self.best:
            run.write(self.best)

    def state(self) -> dict[str, Tensor]:
        table = torch.tensor([list(self.values), list(self.values.values())], dtype=torch.float64)
        return {"values": table, **{f"best.{name}": tensor for name, tensor in self.best.items()}}

    def load(self, state: Mapping[str, Tensor]) -> None:
        steps, values = state["values"].tolist() if state["values"].numel() else ([], [])
        self.values = {int(step): value for step, value in zip(steps, values, strict=True)}
        self.best = {name.removeprefix("best."): tensor for name, tensor in state.items() if name != "values"}


Sees = Callable[[Tensor], Tensor]
"""Which of images [n, 3, height, width] in 0..1 show a concept, bool [n]."""


@dataclass(frozen=True)
class Shown:
    """A measure for `Validate`: the share of images that show a concept, drawn by the pipeline as it is trained so far."""

    pipe: Any
    prompts: Sequence[str]
    """What brought the concept before; they take turns."""
    sees: Sees
    """`judged`, or any other function that looks at images."""
    suite: str
    """Whose sampler, steps, guidance and size the images are drawn with: "canvas", or "coco-3k" for SD 1.5."""
    steps: int | None = None
    """Sampling steps, instead of the suite's."""
    n: int = 20
    """Images. Their seeds are always the same ones, which the canvas's suites do not use."""
    batch: int = 10

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str) or not self.prompts or self.n < 1:
            raise ErasureError("Shown needs a list of prompts, and at least one image")

    def __call__(self) -> float:
        from erasure.eval.generate import draw, under
        from erasure.eval.rows import Row
        from erasure.eval.suite import load_suite

        changes = {"dtype": str(self.pipe.dtype).removeprefix("torch."), **({} if self.steps is None else {"steps": self.steps})}
        protocol = load_suite(self.suite).fitting(self.pipe).under(**changes).protocol
        seeds = splits().seeds("dev")[: self.n]
        rows = [Row(str(seed), "named", self.prompts[i % len(self.prompts)], seed) for i, seed in enumerate(seeds)]
        parts = [rows[i : i + self.batch] for i in range(0, self.n, self.batch)]
        with under(self.pipe, protocol):
            seen = torch.cat([torch.as_tensor(self.sees(draw(self.pipe, part, protocol))) for part in parts])
        if seen.shape != (self.n,) or seen.dtype != torch.bool:
            raise ErasureError(f"{self.sees} has to say bool [{self.n}] of {self.n} images, and said {seen.dtype} {list(seen.shape)}")
        return int(seen.sum()) / self.n


def judged(concept: str) -> Sees:
    """Whether judge_dev sees an object, style or category of the canvas, in images of the embedded models."""
    from erasure.canvas.judge_dev import judge_dev
    from erasure.eval.subjects import subject

    of, judge = subject(concept), judge_dev()

    def sees(images: Tensor) -> Tensor:
        verdict = judge(images)
        return of.seen(verdict, ~verdict.unrecognised)

    return sees
