"""The training loop: by hand, killed anywhere, in half precision, and where it diverges."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from erasure.callbacks import Callback, Ema, Progress, Validate
from erasure.errors import ErasureError
from erasure.training import CHECKPOINT, Diverged, TrainLog, factor, train

STEPS = 9


class Toy:
    """A regression with dropout, so that the global generator matters too."""

    def __init__(self, *, fail_at: int | None = None, act: Callable[[], None] | None = None, dtype: torch.dtype = torch.float32) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1)).to(dtype=dtype)
        self.fail_at, self.act = fail_at, act

    @property
    def first(self) -> Tensor:
        return next(self.net.parameters())

    def loss(self, step: int, generator: torch.Generator) -> Tensor:
        if step == self.fail_at and self.act is not None:
            self.act()
        x = torch.randn(5, 4, generator=generator).to(self.first.dtype)
        error: Tensor = self.net(x) - x.sum(1, keepdim=True)
        return error.square().mean()

    def train(self, **options: Any) -> TrainLog:
        return train(dict(self.net.named_parameters()), self.loss, **{"steps": STEPS, "lr": 0.03, "seed": 5, **options})

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.net.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def watched(toy: Toy) -> list[Callback]:
    """An average, and a measurement of it that keeps the best."""
    ema = Ema(0.8)
    return [Progress("toy", show=False), ema, Validate(lambda: abs(float(toy.first.detach().sum()) - 0.4), every=2, ema=ema)]


# what it computes


def test_it_is_adam_with_warm_up_and_clipping_on_the_mean_of_micro_batches() -> None:
    target = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        return ((w - target) * torch.rand(3, generator=generator, dtype=torch.float64)).square().sum()

    log = train({"w": w}, loss, steps=6, lr=0.1, seed=2, accumulation=3, warmup=2, schedule="cosine", clip=0.5, betas=(0.8, 0.95))
    by_hand, m, v = (torch.zeros(3, dtype=torch.float64) for _ in range(3))
    losses = []
    for step in range(6):
        draws = [torch.Generator().manual_seed(2 * 1_000_000_007 + step * 3 + micro) for micro in range(3)]
        scales = [torch.rand(3, generator=g, dtype=torch.float64) for g in draws]
        losses.append(sum(float(((by_hand - target) * s).square().sum()) for s in scales) / 3)
        gradient = torch.stack([2 * (by_hand - target) * s.square() for s in scales]).mean(0)
        gradient = gradient * min(1.0, 0.5 / (float(gradient.norm()) + 1e-6))
        m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient.square()
        lr = 0.1 * ((step + 1) / 3 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 4)))
        by_hand = by_hand - lr * (m / (1 - 0.8 ** (step + 1))) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
    torch.testing.assert_close(w.detach(), by_hand, atol=1e-12, rtol=0)
    assert log.losses == pytest.approx(losses, rel=1e-6) and log.stop == "" and log.resumed == 0


def test_momentum_makes_it_plain_descent_and_resumes(tmp_path: Path) -> None:
    target = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def run() -> Tensor:
        w = torch.zeros(3, dtype=torch.float64, requires_grad=True)

        def loss(step: int, generator: torch.Generator) -> Tensor:
            log.append(step)
            if len(log) == 4:
                raise KeyboardInterrupt  # once, after the third step
            return (w - target).square().sum()

        train({"w": w}, loss, steps=5, lr=0.1, momentum=0.9, checkpoint=tmp_path, save_every=2)
        return w.detach()

    log: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        run()
    resumed = run()
    assert log == [0, 1, 2, 3, 2, 3, 4]
    by_hand = velocity = torch.zeros(3, dtype=torch.float64)
    for _ in range(5):
        velocity = 0.9 * velocity + 2 * (by_hand - target)
        by_hand = by_hand - 0.1 * velocity
    torch.testing.assert_close(resumed, by_hand, atol=1e-12, rtol=0)


def test_schedules_end_near_zero_and_the_constant_one_stays() -> None:
    assert [factor(s, 4, 0, "linear") for s in range(4)] == [1, 0.75, 0.5, 0.25]
    assert [factor(s, 6, 2, "constant") for s in range(4)] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1, 1]
    assert factor(2, 4, 0, "cosine") == pytest.approx(0.5)


def test_small_steps_of_half_precision_weights_are_not_rounded_away() -> None:
    """Steps of 1e-4 at 1.0 are below bfloat16's spacing of 2**-7, and 100 of them are not."""
    w = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    train({"w": w}, lambda step, generator: w.float().sum(), steps=100, lr=1e-4)
    assert w.dtype == torch.bfloat16 and torch.equal(w, torch.full((4,), 0.99).bfloat16()) and w[0] != 1


def test_float16_weights_need_gradients_that_are_scaled() -> None:
    w = torch.ones(2, dtype=torch.float16, requires_grad=True)
    with pytest.raises(ErasureError, match="precision fp16"):
        train({"w": w}, lambda step, generator: w.float().sum(), steps=1, lr=0.1)


def test_float16_gradients_are_scaled_on_every_device(tmp_path: Path) -> None:
    """Of 1e-8, which float16 rounds to zero: Adam's epsilon of the same size leaves half of each step."""
    w = torch.ones(2, dtype=torch.float16, requires_grad=True)
    train({"w": w}, lambda step, generator: (w * 1e-4).float().sum() * 1e-4, steps=5, lr=0.01, precision="fp16")
    assert w.tolist() == pytest.approx([0.975, 0.975], abs=1e-3)


def test_the_scale_goes_down_where_float16_overflows_and_is_resumed(tmp_path: Path) -> None:
    """A gradient of 10 fits below 65504 from the fifth step on, at a scale of 4096; until then nothing moves."""
    seen: list[int] = []

    def run() -> list[float]:
        w = torch.ones(2, dtype=torch.float16, requires_grad=True)

        def loss(step: int, generator: torch.Generator) -> Tensor:
            seen.append(step)
            if len(seen) == 4:
                raise KeyboardInterrupt
            return (w * 10).float().sum()

        train({"w": w}, loss, steps=7, lr=0.01, precision="fp16", checkpoint=tmp_path, save_every=2)
        found: list[float] = w.tolist()
        return found

    with pytest.raises(KeyboardInterrupt):
        run()
    assert run() == pytest.approx([0.97, 0.97], abs=1e-3) and seen == [0, 1, 2, 3, 2, 3, 4, 5, 6]


def test_float16_that_overflows_at_every_scale_is_divergence() -> None:
    w = torch.zeros(2, dtype=torch.float16, requires_grad=True)
    with pytest.raises(Diverged, match="step 21 of 30, with a gradient that is not finite"):
        train({"w": w}, lambda step, generator: w.float().abs().sqrt().sum(), steps=30, lr=0.1, precision="fp16")
    assert torch.equal(w, torch.zeros(2, dtype=torch.float16))


def test_autocast_is_on_for_the_loss_where_asked_for() -> None:
    seen = []
    layer = nn.Linear(3, 3)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        out = layer(torch.ones(2, 3))
        seen.append(out.dtype)
        return out.float().square().mean()

    train(dict(layer.named_parameters()), loss, steps=1, lr=0.1, precision="bf16")
    train(dict(layer.named_parameters()), loss, steps=1, lr=0.1)
    assert seen == [torch.bfloat16, torch.float32] and layer.weight.dtype == torch.float32


def test_the_global_generator_is_left_alone_and_runs_repeat_whatever_it_holds() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first, second = Toy(), Toy()
    first.train()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(77)
    second.train()
    assert equal(first.weights(), second.weights())
    third = Toy()
    third.train(seed=6)
    assert not equal(first.weights(), third.weights())


# killed and resumed


def unbroken() -> tuple[Toy, TrainLog]:
    toy = Toy()
    return toy, toy.train(callbacks=watched(toy))


@pytest.mark.parametrize("killed_at", range(1, STEPS))
def test_a_run_that_died_at_any_step_ends_with_the_weights_of_an_unbroken_one(tmp_path: Path, killed_at: int) -> None:
    whole, log = unbroken()

    def die() -> None:
        raise KeyboardInterrupt

    first = Toy(fail_at=killed_at, act=die)
    with pytest.raises(KeyboardInterrupt):
        first.train(callbacks=watched(first), checkpoint=tmp_path, save_every=2)
    again = Toy()
    resumed = again.train(callbacks=watched(again), checkpoint=tmp_path, save_every=2)
    assert resumed.resumed == (killed_at - 1) // 2 * 2 and resumed.losses == log.losses  # a state is kept in the step after it
    assert equal(again.weights(), whole.weights())
    third = Toy()  # a finished run, called again, does nothing and ends the same
    assert third.train(callbacks=watched(third), checkpoint=tmp_path, save_every=2).resumed == STEPS
    assert equal(third.weights(), whole.weights())


class Counted(Callback):
    """Counts what the loss has seen; its state changes between two steps, and it has no repr of its own."""

    def __init__(self, toy: Toy) -> None:
        self.seen, inner = 0, toy.loss

        def loss(step: int, generator: torch.Generator) -> Tensor:
            self.seen += 1
            return inner(step, generator)

        toy.loss = loss  # type: ignore[method-assign]

    def state(self) -> dict[str, Tensor]:
        return {"seen": torch.tensor(self.seen)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.seen = int(state["seen"])


@pytest.mark.parametrize("killed_at", range(3, 7))
def test_a_users_callback_is_resumed_in_the_state_of_its_step(tmp_path: Path, killed_at: int) -> None:
    def die() -> None:
        raise KeyboardInterrupt

    first, again = Toy(fail_at=killed_at, act=die), Toy()
    with pytest.raises(KeyboardInterrupt):
        first.train(callbacks=[Counted(first)], checkpoint=tmp_path, save_every=2)
    counted = Counted(again)
    assert again.train(callbacks=[counted], checkpoint=tmp_path, save_every=2).resumed == (killed_at - 1) // 2 * 2
    assert counted.seen == STEPS


CHILD = """
import os, signal, sys
from pathlib import Path
from tests.test_training import Toy, watched
toy = Toy(fail_at=int(sys.argv[2]), act=lambda: os.kill(os.getpid(), signal.SIGKILL))
toy.train(callbacks=watched(toy), checkpoint=Path(sys.argv[1]), save_every=2)
"""


def test_a_process_that_is_killed_goes_on_in_another(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), "5"],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]
    again = Toy()
    assert again.train(callbacks=watched(again), checkpoint=tmp_path, save_every=2).resumed == 4
    assert equal(again.weights(), unbroken()[0].weights())


def test_a_resume_with_other_settings_names_each_difference(tmp_path: Path) -> None:
    toy = Toy()
    toy.train(checkpoint=tmp_path, settings={"method": {"eta": 1.0}, "concepts": ["dagger"]})
    before = toy.weights()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"lr": 0.01}, r"lr was 0\.03, is 0\.01"),
        ({"accumulation": 2}, "batch was 1, is 2"),
        ({"settings": {"method": {"eta": 2.0}, "concepts": ["dagger"]}}, r"method\.eta was 1\.0, is 2\.0"),
        ({"settings": {"method": {"eta": 1.0}, "concepts": ["cat"]}}, r"concepts was \['dagger'\], is \['cat'\]"),
        ({"callbacks": [Ema(0.5)]}, r"callbacks was \[\], is \['Ema\(decay=0\.5\)'\]"),
    ]
    for options, said in cases:
        with pytest.raises(ErasureError, match=said) as caught:
            Toy().train(**{"settings": {"method": {"eta": 1.0}, "concepts": ["dagger"]}, "checkpoint": tmp_path, **options})
        assert CHECKPOINT in str(caught.value) and "remove" in str(caught.value)
    other = Toy()
    with torch.no_grad():
        other.first.add_(1)
    with pytest.raises(ErasureError, match="start was"):
        other.train(checkpoint=tmp_path, settings={"method": {"eta": 1.0}, "concepts": ["dagger"]})
    assert equal(toy.weights(), before)


def test_a_damaged_state_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).write_bytes(b"\x00" * 40)
    with pytest.raises(ErasureError, match="no state of a training run"):
        Toy().train(checkpoint=tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / CHECKPOINT)
    with pytest.raises(ErasureError, match="no state of a training run"):
        Toy().train(checkpoint=tmp_path)


# divergence


@pytest.mark.parametrize(
    ("value", "what"), [(math.nan, "loss of nan"), (math.inf, "loss of inf"), (-math.inf, "loss of -inf"), (7.0, "loss of 7")]
)
def test_divergence_stops_names_its_step_and_keeps_the_last_good_state(tmp_path: Path, value: float, what: str) -> None:
    w = torch.ones(3, requires_grad=True)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        return w.square().sum() * 0.1 if step < 5 else w.sum() * 0 + value

    with pytest.raises(Diverged, match=f"step 6 of 20, with a {what}") as caught:
        train({"w": w}, loss, steps=20, lr=0.1, checkpoint=tmp_path, save_every=2, ceiling=5.0)
    assert "of step 4" in str(caught.value) and str(tmp_path) in str(caught.value)
    state = load_file(tmp_path / CHECKPOINT)
    assert len(state["losses"]) == 4 and state["weights.w"].isfinite().all() and w.isfinite().all()


def test_a_state_whose_loss_is_no_number_is_not_the_last_good_one(tmp_path: Path) -> None:
    """w goes 0.35, 0.25, 0.15, 0.05, -0.05: the fourth step was fine, and where it went is not."""

    def run(folder: Path, lr: float = 0.1) -> Tensor:
        w = torch.tensor([0.35], requires_grad=True)
        train({"w": w}, lambda step, generator: w.log().sum(), steps=20, lr=lr, checkpoint=folder, save_every=2)
        return w.detach()

    said = r"step 5 of 20, with a loss of nan; try a smaller lr than 0\.1 \(.*of step 2, is in .*need a fresh start: remove it, or"
    for _ in range(2):  # begun, and gone on with
        with pytest.raises(Diverged, match=said):
            run(tmp_path / "a")
    state = load_file(tmp_path / "a" / CHECKPOINT)
    assert len(state["losses"]) == 2 and float(state["weights.w"]) == pytest.approx(0.15, abs=1e-2)
    with pytest.raises(ErasureError, match=r"lr was 0\.1, is 0\.01"):
        run(tmp_path / "a", 0.01)
    assert float(run(tmp_path / "b", 0.01)) == pytest.approx(0.15, abs=1e-2)


def test_a_gradient_that_is_not_finite_is_divergence_too() -> None:
    w = torch.zeros(3, requires_grad=True)
    with pytest.raises(Diverged, match=r"step 1 of 2, with a gradient that is not finite.*no state was saved"):
        train({"w": w}, lambda step, generator: w.abs().sqrt().sum(), steps=2, lr=0.1)
    assert torch.equal(w, torch.zeros(3))


def test_nothing_to_train_and_senseless_numbers_are_errors() -> None:
    with pytest.raises(ErasureError, match="nothing to train"):
        train({}, lambda step, generator: torch.zeros(()), steps=1, lr=0.1)
    for options in ({"steps": 0}, {"lr": 0.0}, {"accumulation": 0}):
        with pytest.raises(ErasureError, match="at least 1 and lr above 0"):
            Toy().train(**options)
