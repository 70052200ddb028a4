"""What a training run does beside training: averages of its weights, and measurements that end it."""

import math

import torch
from torch import Tensor

from erasure.callbacks import Callback, Ema, Validate
from erasure.training import Training
from tests.test_training import Toy


class Line(Callback):
    """Records the weights after each step."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def step(self, run: Training) -> None:
        self.seen.append(next(iter(run.weights.values())).detach().clone())


def test_the_average_is_the_warmed_up_one_and_ends_in_place() -> None:
    toy, line = Toy(), Line()
    start = toy.weights()[0]
    toy.train(callbacks=[line, Ema(0.5)])
    average = start
    for n, weight in enumerate(line.seen, 1):
        decay = min(0.5, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(toy.weights()[0], average, atol=1e-6, rtol=0)
    assert (average - line.seen[-1]).abs().max() > 1e-3


def test_validation_keeps_the_best_and_stops_when_it_gets_no_better() -> None:
    toy, line = Toy(), Line()
    values = iter([5.0, 3.0, 4.0, 3.5, 1.0])
    check = Validate(lambda: next(values), every=1, patience=2)
    log = toy.train(callbacks=[line, check])
    assert check.values == {1: 5.0, 2: 3.0, 3: 4.0, 4: 3.5} and len(log.losses) == 4 and "no better than 3" in log.stop
    assert torch.equal(toy.weights()[0], line.seen[1])


def test_a_measurement_that_is_no_number_is_the_worst() -> None:
    toy, line = Toy(), Line()
    values = iter([math.nan, 3.0, math.nan, 4.0])
    check = Validate(lambda: next(values), every=1, patience=2)
    log = toy.train(callbacks=[line, check])
    assert "no better than 3 in 2 measurements" in log.stop and len(log.losses) == 4
    assert torch.equal(toy.weights()[0], line.seen[1])


def test_validation_stops_at_its_goal_and_sees_the_weights_of_the_step() -> None:
    toy = Toy()
    seen: list[Tensor] = []

    def measure() -> float:
        assert not torch.is_grad_enabled()
        seen.append(toy.weights()[0])
        return 10.0 - len(seen)

    log = toy.train(callbacks=[Validate(measure, every=2, goal=8.0)])
    assert len(log.losses) == 4 and "reached 8 at step 4" in log.stop
    assert torch.equal(toy.weights()[0], seen[-1]) and not torch.equal(seen[0], seen[1])
