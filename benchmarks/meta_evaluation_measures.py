"""The three sorts of numbers that metrics give, each with intervals for a value and for a difference on the same prompts."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from meta_evaluation_orderings import CHANCE, Value

from erasure.eval import counts
from erasure.eval.metrics.base import mean_with_interval

Distance = Callable[[np.ndarray, np.ndarray], float]
HALVES = 200
"""Half samples that give a distance its interval."""


class Rates:
    """Calls on each row's image by control; chance is what random drawings would give."""

    def __init__(self, calls: Mapping[str, Sequence[bool]], prompts: Sequence[str], chance: float | None = None) -> None:
        self.calls, self.prompts, self.chance = calls, prompts, chance

    def value(self, of: str) -> Value:
        rate = counts.rate(self.calls[of], self.prompts)
        return Value(rate.rate, rate.lo, rate.hi, rate.n)

    def difference(self, left: str, right: str) -> Value:
        if right == CHANCE:
            assert self.chance is not None
            own = self.value(left)
            return Value(own.value - self.chance, own.lo - self.chance, own.hi - self.chance, own.n)
        found = counts.difference(self.calls[right], self.calls[left], self.prompts)
        return Value(found["value"], found["lo"], found["hi"], found["n"])


class Means:
    """A number for each row's image by control; bootstrap over prompts."""

    def __init__(self, numbers: Mapping[str, Sequence[float]], prompts: Sequence[str]) -> None:
        self.numbers, self.prompts = {name: np.asarray(column) for name, column in numbers.items()}, prompts

    def value(self, of: str) -> Value:
        return self._mean(self.numbers[of])

    def difference(self, left: str, right: str) -> Value:
        return self._mean(self.numbers[left] - self.numbers[right])

    def _mean(self, column: np.ndarray) -> Value:
        found = mean_with_interval(column, self.prompts)
        assert found is not None
        return Value(found["value"], found["lo"], found["hi"], found["n"])


class Distances:
    """A distance of sets of features [n, d] to the base's, rows in one order.

    Intervals are the percentiles of half samples, the same halves for every control, moved onto the full sample's value: FID of half the
    images is larger, and that bias is no spread.
    """

    def __init__(self, features: Mapping[str, np.ndarray], reference: np.ndarray, distance: Distance, halves: int = HALVES) -> None:
        rng, self.n = np.random.default_rng(0), len(reference)
        chosen = [rng.choice(self.n, self.n // 2, replace=False) for _ in range(halves)]
        self.whole = {name: distance(own, reference) for name, own in features.items()}
        self.drawn = {name: np.array([distance(own[half], reference[half]) for half in chosen]) for name, own in features.items()}

    def value(self, of: str) -> Value:
        return self._spread(self.whole[of], self.drawn[of])

    def difference(self, left: str, right: str) -> Value:
        return self._spread(self.whole[left] - self.whole[right], self.drawn[left] - self.drawn[right])

    def _spread(self, whole: float, drawn: np.ndarray) -> Value:
        lo, hi = np.quantile(drawn - drawn.mean(), [0.025, 0.975])
        return Value(whole, float(whole + lo), float(whole + hi), self.n)
